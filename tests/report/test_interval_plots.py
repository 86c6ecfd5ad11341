"""Slices and checkpoints, a line each: all of a run by step, and of many slices those that have room."""

from itertools import pairwise

import pytest

from dpocli.report.inline_svg import inline_svg
from dpocli.report.interval_plots import MOST_LINES, draw_checkpoints, draw_slices, runs_of


def labels(plot):
    return [label.get_text() for label in plot.figure.axes[0].get_yticklabels()]


def headings(plot):
    return [label.get_fontweight() == "bold" for label in plot.figure.axes[0].get_yticklabels()]


def points(area):
    """Line and value of each point, from top to bottom."""
    found = [line.get_xydata()[0] for line in area.lines if line.get_marker() == "o"]
    return [(round(-height), float(value)) for value, height in found]


def slices_of(sizes, **more):
    return {
        f"kind {kind}": [{"name": f"{kind}.{place}", "accuracy": 0.5, "pairs": 9} | more for place in range(size)]
        for kind, size in enumerate(sizes)
    }


def test_slices_of_too_few_pairs_are_hollow_and_those_without_an_accuracy_are_left_out():
    entries = [
        {"name": "many", "accuracy": 0.7, "interval": [0.6, 0.8], "pairs": 90, "too_small": False},
        {"name": "few", "accuracy": 1.0, "interval": None, "pairs": 2, "too_small": True},
        {"name": "none", "accuracy": None, "pairs": 0},
    ]
    plot = draw_slices({"source": entries}, 0.7)
    (area,) = plot.figure.axes
    faces = [line.get_markerfacecolor() for line in area.lines if line.get_marker() == "o"]
    assert (len(faces), faces[1]) == (2, "none")
    assert labels(plot) == ["source", "many", "few"]
    assert points(area) == [(1, 0.7), (2, 1.0)]
    assert [0.6, 0.8] in [list(line.get_xdata()) for line in area.lines]
    assert draw_slices({"source": entries[:1]}, 0.7) is None, "one alone compares nothing"


def test_without_room_for_all_some_of_each_kind_are_kept_and_the_caption_says_so():
    slices = slices_of((20, 38, 2, 20, 3))
    for place, entry in enumerate(slices["kind 0"]):
        entry["pairs"] = place
    plot = draw_slices(slices, 0.5)
    shown = labels(plot)
    assert [label for label, is_heading in zip(shown, headings(plot), strict=True) if is_heading] == list(slices)
    assert len(shown) == MOST_LINES
    count = {kind: sum(label.startswith(f"{kind}.") for label in shown) for kind in range(5)}
    assert (count[2], count[4]) == (2, 3)
    assert min(count[0], count[1], count[3]) >= 10
    assert [label for label in shown if label.startswith("0.")] == [f"0.{place}" for place in range(20 - count[0], 20)]
    left_out = 83 - sum(count.values())
    assert "each slice" not in plot.caption
    assert f"{left_out} more slices; the table has all" in plot.caption
    assert "each slice" in draw_slices(slices_of((2, 2)), 0.5).caption


@pytest.mark.parametrize(("kinds", "size"), [(14, 2), (40, 2), (10, 3), (3, 39), (1, 100)])
def test_no_slice_plot_ends_on_a_heading(kinds, size):
    plot = draw_slices(slices_of([size] * kinds), None)
    assert len(labels(plot)) <= MOST_LINES
    assert not any(one and next_ for one, next_ in pairwise([*headings(plot), True]))


def test_long_names_of_slices_look_different():
    entries = [{"name": f"{'a' * 40}{place}{'b' * 40}", "accuracy": 0.5, "pairs": 1} for place in range(5)]
    assert len({*labels(draw_slices({"x": entries}, None))}) == 6


def checkpoints(run, *steps, name="{run}/checkpoints/step-{step}", **more):
    return [
        {
            "name": name.format(run=run, step=step),
            "run": run,
            "step": step,
            "rewards/accuracies": step / 1000,
            "rewards/accuracies_interval": [step / 1000 - 0.1, step / 1000 + 0.1],
            "rewards/margins": step / 10,
        }
        | more
        for step in steps
    ]


@pytest.mark.parametrize(
    "models",
    [
        [{"step": None, "rewards/accuracies": 0.5, "run": "a"}] * 2,
        checkpoints("a", 1),
        checkpoints(None, 1, 2, 3),
        [{"step": 1}, {"step": 2}],
        checkpoints("a", 1) + checkpoints("b", 2),
        checkpoints("a", 2, 2),
    ],
)
def test_without_several_steps_of_a_run_there_is_nothing_to_draw(models):
    assert draw_checkpoints(models) is None


def test_each_run_has_its_heading_and_its_checkpoints_by_step():
    models = [*checkpoints("a", 1, 2), *checkpoints("b", 10, 2000, 30), *checkpoints("c", 5), *checkpoints(None, 7, 8)]
    plot = draw_checkpoints(models[::-1])
    assert labels(plot) == ["b", "step 10", "step 30", "step 2,000", "a", "step 1", "step 2"]
    accuracy, margin = plot.figure.axes
    assert points(accuracy) == [(1, 0.01), (2, 0.03), (3, 2.0), (5, 0.001), (6, 0.002)]
    assert points(margin) == [(1, 1.0), (2, 3.0), (3, 200.0), (5, 0.1), (6, 0.2)]
    joined = [len(line.get_xdata()) for line in margin.lines if line.get_alpha() and len(line.get_xdata()) > 1]
    assert joined == [3, 2], "a curve for each run"
    assert "Losses differ" not in plot.caption


def test_margins_of_other_losses_are_not_drawn():
    models = [
        *checkpoints("a", 1, 2, loss_choice={"name": "dpo"}),
        *checkpoints("b", 1, 2, loss_choice={"name": "ipo"}),
    ]
    plot = draw_checkpoints(models)
    accuracy, margin = plot.figure.axes
    assert len(points(accuracy)) == 4
    assert points(margin) == [(1, 0.1), (2, 0.2)]
    assert "only margins of the first loss are drawn" in plot.caption


def test_runs_are_named_by_their_directories_or_by_number():
    models = [
        *checkpoints("1", 1, 2, name="out/A/checkpoints/step-{step}"),
        *checkpoints("2", 1, 2, name="out/B/step-{step}"),
        *checkpoints("3", 1, name="C/model"),
        *checkpoints("3", 2, name="C/checkpoints/step-2"),
        *checkpoints("4", 1, name="here"),
        *checkpoints("4", 2, name="/there"),
        *checkpoints("5", 1, 2, name="twice/step-{step}"),
        *checkpoints("6", 1, 2, name="twice/step-{step}"),
    ]
    assert list(runs_of(models)) == ["out/A", "out/B", "C", "run 4", "run 5", "run 6"]


def test_names_are_no_formulas():
    models = [*checkpoints("_a$x_1^$", 1, 2), *checkpoints("b\n\u202e$\\frac{$", 1, 2)]
    plot = draw_checkpoints(models)
    assert labels(plot)[::3] == ["_a$x_1^$", "b ⟨U+202E⟩$\\frac{$"]
    svg = inline_svg(plot)
    assert "_a$x_1^$" in svg
    assert "var(--up)" in svg
    assert "#0072b2" not in svg
