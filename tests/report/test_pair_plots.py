from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex

from dpocli.report.inline_svg import inline_svg
from dpocli.report.pair_plots import (
    FEW_PAIRS,
    MANY_POINTS,
    MOST_POINTS,
    draw_margins,
    draw_reliability,
    draw_rewards,
    report_plots,
)
from dpocli.report.plot_style import BLUE, GRAY, RED, Plot
from tests.support.reports import made_up_report, made_up_table

GENERATOR = np.random.default_rng(0)


def test_a_full_report_has_every_plot():
    names = [plot.name for plot in report_plots(made_up_report(), made_up_table())]
    assert names == ["margins", "reliability", "slices", "rewards", "checkpoints"]


def captions(**more):
    return {plot.name: plot.caption for plot in report_plots(made_up_report(**more), made_up_table())}


def bars(figure):
    return [(patch.get_x(), patch.get_width(), patch.get_height()) for patch in figure.axes[0].patches]


def test_no_bar_is_half_right_and_half_wrong():
    """With a pair beyond either end, which the last bars hold."""
    margins = np.concatenate([GENERATOR.normal(0.3, 1, 1000), [-500.0, 500.0]])
    found = bars(draw_margins(margins).figure)
    assert sum(height for *_, height in found) == len(margins)
    assert not any(x < -1e-9 and x + width > 1e-9 for x, width, _ in found)
    right = sum(height for x, _, height in found if x > -1e-9)
    assert right == (margins >= 0).sum()


def heights(figure):
    """Pairs in the bars of each colour."""
    found = {BLUE: 0, RED: 0, GRAY: 0}
    for patch in figure.axes[0].patches:
        found[to_hex(patch.get_facecolor())] += patch.get_height()
    return found


def words(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_ties_have_a_bar_of_their_own_at_0(shift):
    others = GENERATOR.normal(shift, 1, 300)
    figure = draw_margins(np.concatenate([others, np.zeros(120)])).figure
    assert heights(figure) == {BLUE: (others > 0).sum(), RED: (others < 0).sum(), GRAY: 120}
    (tie,) = [patch for patch in figure.axes[0].patches if to_hex(patch.get_facecolor()) == GRAY]
    assert tie.get_x() == pytest.approx(-tie.get_width() / 2)
    low, high = figure.axes[0].get_xlim()
    assert low < tie.get_x()
    assert tie.get_x() + tie.get_width() < high
    assert tie.get_width() > (high - low) / 500
    edges = sorted((x, x + width) for x, width, _ in bars(figure))
    assert all(right < left for (_, right), (left, _) in pairwise(edges))  # none hides another
    assert "120 ties" in words(figure)


def test_a_model_that_ties_on_all_pairs_has_a_gray_bar_alone():
    figure = draw_margins(np.zeros(50)).figure
    assert heights(figure) == {BLUE: 0, RED: 0, GRAY: 50}
    assert words(figure) == ["50 ties: all pairs"]
    assert figure.axes[0].get_xlim() == (-1, 1)


def test_margins_without_a_tie_tell_of_none():
    assert not any("tie" in text for text in words(draw_margins(np.array([1.0, -1.0])).figure))
    assert "ties" not in captions()["margins"]


@pytest.mark.parametrize("margins", [[0.0], [0.0] * 50, [2.0, 2.0], [np.nan, 1.0], [np.inf, 0.5, 0.7], [1e-30, 2e-30]])
def test_odd_margins_are_drawn(margins):
    assert draw_margins(np.array(margins, dtype=np.float64)) is not None


def test_what_is_not_there_is_not_drawn():
    nothing = np.array([])
    assert draw_margins(nothing) is None
    assert draw_margins(np.array([np.nan])) is None
    assert draw_rewards(nothing, nothing) is None
    assert draw_reliability({"bins": []}) is None


def inside(figure):
    area = figure.axes[0]
    (left, right), (bottom, top) = area.get_xlim(), area.get_ylim()
    points = np.concatenate([line.get_xydata() for line in area.lines if line.get_marker() == "o"])
    return (
        (left <= points[:, 0]) & (points[:, 0] <= right) & (bottom <= points[:, 1]) & (points[:, 1] <= top)
    ).tolist()


def test_a_small_data_set_is_shown_whole():
    rewards = GENERATOR.normal(0, 1, (2, FEW_PAIRS - 1))
    rewards[:, 0] = 9, -9
    figure = draw_rewards(*rewards).figure
    assert len(inside(figure)) == FEW_PAIRS - 1
    assert all(inside(figure))
    assert "beyond" not in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("outliers", [1, 3])
def test_pairs_beyond_the_axes_are_counted(outliers):
    rewards = np.tile(np.linspace(-1, 1, 1000), (2, 1))
    rewards[0, :outliers] = 50
    figure = draw_rewards(*rewards).figure
    assert inside(figure).count(False) == outliers
    told = "1 pair lies" if outliers == 1 else "3 pairs lie"
    assert figure.axes[0].get_xlabel() == f"reward of the rejected answer; {told} beyond the axes"


def test_points_of_equal_rewards_are_neither_right_nor_wrong():
    figure = draw_rewards(np.array([1.0, 2.0, 0.0, 0.0]), np.array([0.0, 2.0, 1.0, 1.0])).figure
    assert words(figure) == ["chosen higher: 25%", "chosen lower: 50%", "equal: 25%"]


def test_a_part_of_the_pairs_is_said_to_be_one():
    table = made_up_table(MOST_POINTS + 10)
    found = {plot.name: plot.caption for plot in report_plots(made_up_report(models=[], slices={}), table)}
    assert found["rewards"].startswith("Each point is a pair, 20,000 of 20,010.")


def test_bins_have_their_intervals():
    bins = [
        {"pairs": 50, "mean_probability": 0.55, "accuracy": 0.6, "accuracy_interval": [0.4, 0.7]},
        {"pairs": 1, "mean_probability": 0.95, "accuracy": 1.0, "accuracy_interval": [0.5, 1.0]},
    ]
    figure = draw_reliability({"bins": bins}).figure
    upright = [line.get_xydata().tolist() for line in figure.axes[0].lines if len({*line.get_xdata()}) == 1]
    assert upright == [[[0.55, 0.4], [0.55, 0.7]], [[0.95, 0.5], [0.95, 1.0]]]
    assert figure.axes[0].get_ylim()[0] == 0.4


def test_many_points_do_not_make_a_large_page():
    rewards = GENERATOR.normal(0, 1, (2, 20 * MANY_POINTS))
    svg = inline_svg(draw_rewards(*rewards))
    assert len(svg) < 400_000
    assert 'href="data:image/png;base64,' in svg


def test_a_picture_has_words_and_ids_of_its_own():
    one = inline_svg(Plot("one", "What it <shows>", draw_margins(np.array([0.1, -0.2])).figure))
    assert 'role="img" aria-label="What it &lt;shows&gt;"' in one
    assert ">Reward margins<" in one
    assert ' id="one-' in one
    assert not any(forbidden in one for forbidden in ("xmlns", "http", "<style", "<metadata"))
