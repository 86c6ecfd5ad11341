import math

import pytest

from dpocli.errors import UsageError
from dpocli.report import training_curves
from dpocli.report.training_curves import draw_curves

SIDES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
TRAINING = ("loss", "rewards/accuracies", "rewards/margins", *SIDES, "grad_norm", "learning_rate")


def row(step, **more):
    values = {key: math.sin(step + place) + 2 for place, key in enumerate(TRAINING)}
    return {"step": step} | values | more


def with_held_out(row):
    return row | {
        f"eval/{key}": value for key, value in row.items() if key not in ("step", "grad_norm", "learning_rate")
    }


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn = []
    make = training_curves.blank_figure

    def figure(*size):
        drawn.append(make(*size))
        return drawn[-1]

    monkeypatch.setattr(training_curves, "blank_figure", figure)
    return drawn


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [row(1)],
        [with_held_out(row(0))],
        [row(step) for step in range(1, 3)],
        [with_held_out(row(step)) if step % 5 == 0 else row(step) for step in range(200)],
        [{"step": step, "loss": 0.5} for step in range(5)],
        [{"step": step, "learning_rate": 0.0} for step in range(5)],
        [{"step": 0, "eval/loss": 0.7}, {"step": 9, "eval/loss": 0.6}],
        [row(1, loss=None), row(2, loss=float("nan")), row(3, loss=float("inf")), row(4)],
        [row(step, grad_norm=10.0**step) for step in range(5)],
        [{"loss": 0.5}],
    ],
)
def test_it_draws_what_there_is(tmp_path, metrics):
    draw_curves(metrics, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_the_untrained_policy_stands_where_chance_does(tmp_path, figures):
    untrained = {"step": 0, "eval/rewards/accuracies": 0.0, "eval/rewards/ties": 1.0}
    later = {"step": 9, "eval/rewards/accuracies": 0.75, "eval/rewards/ties": 0.0}
    draw_curves([untrained, later], tmp_path / "curves.png")
    (line, _) = figures[0].axes[1].lines
    assert list(line.get_ydata()) == [0.5, 0.75]


def test_every_metric_has_its_panel(tmp_path, figures):
    draw_curves([with_held_out(row(step)) for step in range(50)], tmp_path / "curves.png")
    areas = figures[0].axes
    titles = [area.get_title(loc="left") for area in areas]
    assert titles[:6] == [
        "Loss",
        "Reward accuracy",
        "Reward margin",
        "Rewards",
        "Log-probs of the sides",
        "Gradient norm before clipping",
    ]
    legend = [text.get_text() for text in areas[3].get_legend().get_texts()]
    assert legend == ["chosen", "chosen, held out", "rejected", "rejected, held out"]
    assert [text.get_text() for text in areas[6].get_legend().get_texts()] == ["training", "learning rate (right)"]


def test_held_out_figures_are_markers_at_their_steps(tmp_path, figures):
    metrics = [row(step) for step in range(1, 11)]
    metrics[4] = with_held_out(metrics[4])
    draw_curves(metrics, tmp_path / "curves.png")
    thin, thick, held_out = figures[0].axes[0].lines
    assert (thin.get_linewidth() < thick.get_linewidth(), held_out.get_marker()) == (True, "o")
    assert list(held_out.get_xdata()) == [5]
    assert list(held_out.get_ydata()) == [metrics[4]["loss"]]


def test_the_thick_line_is_a_running_mean(tmp_path, figures):
    draw_curves([{"step": step, "loss": float(step % 2)} for step in range(100)], tmp_path / "curves.png")
    thick = figures[0].axes[0].lines[1].get_ydata()
    assert len(thick) == 100
    assert all(0.3 < value < 0.7 for value in thick)


def test_a_picture_that_cannot_be_written(tmp_path):
    with pytest.raises(UsageError):
        draw_curves([row(1)], tmp_path / "missing" / "curves.png")
