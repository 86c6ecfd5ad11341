import numpy as np
import pytest

from dpocli.artifacts.inline_svg import inline_svg
from dpocli.artifacts.report_plots import (
    MANY_POINTS,
    NAMES,
    draw_checkpoints,
    draw_margins,
    draw_reliability,
    draw_rewards,
    report_plots,
)
from dpocli.artifacts.slices_plot import draw_slices
from tests.reports import made_up_report, made_up_table

GENERATOR = np.random.default_rng(0)


def test_every_plot_has_a_name_that_is_known():
    assert {plot.name for plot in report_plots(made_up_report(), made_up_table())} == NAMES


def bars(figure):
    return [(patch.get_x(), patch.get_width(), patch.get_height()) for patch in figure.axes[0].patches]


def test_no_bar_is_half_right_and_half_wrong():
    """With a pair beyond either end, which the last bars hold."""
    margins = np.concatenate([GENERATOR.normal(0.3, 1, 1000), [-500.0, 500.0]])
    found = bars(draw_margins(margins))
    assert sum(height for *_, height in found) == len(margins)
    assert not any(x < -1e-9 and x + width > 1e-9 for x, width, _ in found)
    right = sum(height for x, _, height in found if x > -1e-9)
    assert right == (margins >= 0).sum()


@pytest.mark.parametrize("margins", [[0.0], [0.0] * 50, [2.0, 2.0], [np.nan, 1.0], [np.inf, 0.5, 0.7], [1e-30, 2e-30]])
def test_odd_margins_are_drawn(margins):
    assert draw_margins(np.array(margins, dtype=np.float64)) is not None


def test_what_is_not_there_is_not_drawn():
    nothing = np.array([])
    assert draw_margins(nothing) is None
    assert draw_margins(np.array([np.nan])) is None
    assert draw_rewards(nothing, nothing) is None
    assert draw_reliability({}) is None
    assert draw_reliability({"bins": [{"pairs": 0, "mean_probability": None, "accuracy": None}]}) is None
    assert draw_slices({"source": [{"name": "all", "accuracy": 0.5}]}, 0.5) is None
    assert draw_checkpoints([{"step": None, "rewards/accuracies": 0.5}] * 2) is None
    assert draw_checkpoints([{"step": 1, "rewards/accuracies": 0.5}]) is None


def test_checkpoints_are_in_the_order_of_their_steps():
    models = [{"step": step, "rewards/accuracies": step / 10, "rewards/margins": None} for step in (3, 1, 2)]
    accuracy, margin = draw_checkpoints(models).axes
    assert list(accuracy.lines[0].get_xdata()) == [1, 2, 3]
    assert [text.get_text() for text in margin.texts] == ["not comparable"]


def test_slices_show_too_few_pairs_hollow():
    entries = [
        {"name": "many", "accuracy": 0.7, "interval": [0.6, 0.8], "too_small": False},
        {"name": "few", "accuracy": 1.0, "interval": None, "too_small": True},
        {"name": "none", "accuracy": None},
    ]
    area = draw_slices({"source": entries}, 0.7).axes[0]
    faces = [line.get_markerfacecolor() for line in area.lines if line.get_marker() == "o"]
    assert len(faces) == 2
    assert faces[1] == "none"
    assert [label.get_text() for label in area.get_yticklabels()] == ["source", "many", "few"]


def test_many_points_do_not_make_a_large_page():
    rewards = GENERATOR.normal(0, 1, (2, 20 * MANY_POINTS))
    svg = inline_svg(draw_rewards(*rewards), "rewards", "points")
    assert len(svg) < 400_000
    assert 'href="data:image/png;base64,' in svg


def test_a_picture_has_words_and_ids_of_its_own():
    one = inline_svg(draw_margins(np.array([0.1, -0.2])), "one", "What it <shows>")
    assert 'role="img" aria-label="What it &lt;shows&gt;"' in one
    assert ">Reward margins<" in one
    assert ' id="one-' in one
    assert not any(forbidden in one for forbidden in ("xmlns", "http", "<style", "<metadata"))
