"""Checkpoints of one training are one line, and no others are joined to them."""

import pytest

from dpocli.report.checkpoints_plot import draw_checkpoints, runs_of
from dpocli.report.inline_svg import inline_svg
from dpocli.report.pair_plots import report_plots
from tests.reports import made_up_report, made_up_table

PANELS = ("rewards/accuracies", "rewards/margins")


def checkpoints(run, *steps, name="{run}/checkpoints/step-{step}", **more):
    return [
        {
            "name": name.format(run=run, step=step),
            "run": run,
            "step": step,
            "rewards/accuracies": step / 1000,
            "rewards/margins": step / 10,
        }
        | more
        for step in steps
    ]


def lines(area):
    return [list(line.get_xdata()) for line in area.lines if line.get_marker() not in ("None", "", None)]


def legend(figure):
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def caption(models):
    plots = report_plots(made_up_report(models=models, slices={}, calibration={}), made_up_table(30))
    return next(plot.caption for plot in plots if plot.name == "checkpoints")


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


def test_checkpoints_are_in_the_order_of_their_steps():
    models = checkpoints("a", 3, 1, 2, **{"rewards/margins": None})
    figure = draw_checkpoints(models)
    accuracy, margin = figure.axes
    assert lines(accuracy) == [[1, 2, 3]]
    assert [text.get_text() for text in margin.texts] == ["not comparable"]
    assert legend(figure) == []
    assert "of the run" in caption(models)


def test_each_run_has_its_line_and_models_of_none_have_no_point():
    models = [*checkpoints("a", 1, 2), *checkpoints("b", 10, 20, 30), *checkpoints("c", 5), *checkpoints(None, 7, 8)]
    figure = draw_checkpoints(models[::-1])
    assert [lines(area) for area in figure.axes] == [[[10, 20, 30], [1, 2]]] * 2
    assert legend(figure) == ["b", "a"]
    colors = [line.get_color() for line in figure.axes[0].lines if len(line.get_xdata()) in (2, 3)][:2]
    assert len({*colors}) == 2
    assert "a line for each run" in caption(models)


def test_margins_of_other_losses_share_no_axis():
    models = [
        *checkpoints("a", 1, 2, loss_choice={"name": "dpo"}),
        *checkpoints("b", 1, 2, loss_choice={"name": "ipo"}),
    ]
    accuracy, margin = draw_checkpoints(models).axes
    assert len(lines(accuracy)) == 2
    assert lines(margin) == [[1, 2]]
    assert margin.get_title(loc="left") == "Margin of “a” only"
    assert "only those of the first run" in caption(models)
    same = [model | {"loss_choice": {"name": "dpo"}} for model in models]
    assert len(lines(draw_checkpoints(same).axes[1])) == 2
    assert "only" not in caption(same)


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
    names = [run.name for run in runs_of(models)]
    assert names == ["out/A", "out/B", "C", "run 4", "run 5", "run 6"]


def test_names_of_runs_are_no_formulas_and_stay_in_the_legend():
    models = [*checkpoints("_a$x_1^$", 1, 2), *checkpoints("b\n\u202e$\\frac{$", 1, 2)]
    figure = draw_checkpoints(models)
    assert legend(figure) == ["_a$x_1^$", "b ⟨U+202E⟩$\\frac{$"]
    svg = inline_svg(figure, "checkpoints", "x")
    assert "_a$x_1^$" in svg
    assert "var(--other)" in svg
    assert "#7850aa" not in svg
