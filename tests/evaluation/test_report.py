"""Known answers: pairs whose accuracy, margins and calibration are known give exactly those."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpocli.console.console import Printer
from dpocli.evaluation.bootstrap import Clusters
from dpocli.evaluation.metrics import calibration, reward_length_correlation, sigmoid
from dpocli.evaluation.report import report_of, write_report
from dpocli.report.terminal_table import render
from tests.evaluation.scored_tables import evaluated, scored_pairs, with_margins

SURE, LESS_SURE = np.log(0.92 / 0.08), np.log(0.76 / 0.24)
MARGINS = np.repeat([SURE, -SURE, LESS_SURE, -LESS_SURE], [23, 2, 19, 6])
"""Calibrated: of 25 pairs given 92%, 23 are right; of 25 given 76%, 19."""


def report(*models: Any) -> dict[str, Any]:
    return report_of(models) | {"model": "m"}


def test_accuracy_margins_and_calibration_are_those_of_the_pairs() -> None:
    found = report(evaluated(with_margins(MARGINS)))
    assert (found["pairs"], found["prompts"]) == (50, 50)
    assert found["rewards/accuracies"] == 42 / 50
    assert found["rewards/ties"] == 0
    assert found["rewards/margins"] == pytest.approx((21 * SURE + 13 * LESS_SURE) / 50)
    assert found["rewards/margins_quantiles"]["0.95"] == pytest.approx(SURE)
    assert found["rewards/margins_quantiles"]["0.05"] == pytest.approx(-LESS_SURE)
    # For probabilities that are true, the Brier score is their variance.
    assert found["calibration"]["brier"] == pytest.approx((0.92 * 0.08 + 0.76 * 0.24) / 2)
    for found_bin in found["calibration"]["bins"]:
        low, high = found_bin.pop("accuracy_interval")
        assert low < found_bin["accuracy"] < high
    assert found["calibration"]["bins"] == [
        {"low": 0.75, "high": 0.8, "mean_probability": pytest.approx(0.76), "accuracy": 19 / 25, "pairs": 25},
        {"low": 0.9, "high": 0.95, "mean_probability": pytest.approx(0.92), "accuracy": 23 / 25, "pairs": 25},
    ]
    low, high = found["rewards/accuracies_interval"]
    # Wilson's interval of 42 out of 50, which the percentiles come near.
    assert (low, high) == (pytest.approx(0.715, abs=0.04), pytest.approx(0.917, abs=0.04))
    low, high = found["rewards/margins_interval"]
    spread = 1.96 * MARGINS.std() / np.sqrt(50)
    assert (low, high) == pytest.approx((MARGINS.mean() - spread, MARGINS.mean() + spread), abs=0.12)


def test_the_other_accuracies_are_those_of_the_pairs() -> None:
    chosen, rejected = np.array([-10.0, -20, -30, -6]), np.array([-12.0, -18, -33, -6])
    reference = np.array([-11.0, -19, -20, -5]), np.array([-10.0, -20, -25, -9])
    tokens = np.array([10, 10, 30, 2]), np.array([10, 5, 11, 2])
    found = report(evaluated(scored_pairs(chosen, rejected, reference, tokens)))
    assert {name: entry["value"] for name, entry in found["accuracies"].items()} == {
        "policy": 2 / 4,  # 2, -2, 3, 0
        "reference": 3 / 4,  # -1, 1, 5, 4
        "pick_the_longer": (2 + 2 * 0.5) / 4,
        # Log-ratios a token: 0.1 and -0.2; -0.1 and 0.4; -1/3 and -8/11; -0.5 and 1.5.
        "length_normalised": 2 / 4,
    }
    assert found["rewards/accuracies"] == 1 / 4  # log-ratios 1 and -2, -1 and 2, -10 and -8, -1 and 3
    assert found["displacement"] == 3 / 4
    assert (found["logratios/chosen"], found["logratios/rejected"]) == (-11 / 4, -5 / 4)


def test_without_a_reference_there_is_nothing_about_one() -> None:
    found = report(evaluated(scored_pairs([-10.0, -20], [-12.0, -18]), "simpo"))
    assert set(found["accuracies"]) == {"policy", "pick_the_longer", "length_normalised"}
    assert not {"displacement", "logratios/chosen"} & found.keys()
    assert "reference_margin" not in found["slices"]


def test_margins_within_the_noise_are_counted() -> None:
    """A log-prob a token that is off by e moves a side of n tokens by e√n: with beta 0.1, e 0.02, n 100 and 44, by 0.024."""
    tokens = np.full(4, 100), np.full(4, 44)
    model = evaluated(with_margins([0.0239, -0.0239, 0.0241, 0.0], tokens=tokens), noise=0.02)
    np.testing.assert_allclose(model.table.column("noise"), 0.1 * 0.02 * np.sqrt(144), rtol=1e-6)
    found = report(model)
    assert found["rewards/within_noise"] == 3 / 4
    assert found["rewards/ties"] == 1 / 4
    assert report(evaluated(with_margins([0.1, 0.0])))["rewards/within_noise"] == 1 / 2


def test_the_noise_is_in_the_unit_of_each_loss() -> None:
    scored = scored_pairs([-10.0], [-12.0], ([-9.0], [-9.0]), (np.array([25]), np.array([16])))
    table = evaluated(scored, "dpo(beta=0.1)", "simpo(beta=2, gamma=1)", noise=0.02).table
    assert table.column("noise")[0] == pytest.approx(0.1 * 0.02 * np.sqrt(41))
    assert table.column("simpo/noise")[0] == pytest.approx(2 * 0.02 * np.hypot(1 / 5, 1 / 4))


def test_rewards_that_go_with_length_are_seen() -> None:
    tokens = np.array([10, 20, 30]), np.array([15, 25, 5])
    assert reward_length_correlation(tokens[0] * 0.1, tokens[1] * 0.1, *tokens) == pytest.approx(1)
    assert reward_length_correlation(tokens[0] * -0.1, tokens[1] * -0.1, *tokens) == pytest.approx(-1)
    assert reward_length_correlation(np.ones(3), np.ones(3), *tokens) is None
    both, rewards = np.concatenate(tokens), np.array([0.3, -1.0, 2.0, 0.1, 0.0, 5.0])
    found = reward_length_correlation(rewards[:3], rewards[3:], *tokens)
    assert found == pytest.approx(np.corrcoef(both, rewards)[0, 1])


def test_calibration_of_extreme_and_of_missing_margins() -> None:
    assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0, 0.5, 1]
    found = calibration(np.array([0.0, 1e4, -1e4]), Clusters.of(np.arange(3)))
    assert found["brier"] == pytest.approx((0.25 + 0 + 1) / 3)
    assert [(entry["low"], entry["accuracy"], entry["pairs"]) for entry in found["bins"]] == [
        (0.5, 0.5, 1),
        (0.95, 0.5, 2),
    ]


def test_prompts_that_repeat_are_said_and_widen_the_interval() -> None:
    margins = np.repeat(np.where(np.arange(40) % 4 == 0, -1.0, 1.0), 5)
    alone = report(evaluated(with_margins(margins)))
    repeated = report(evaluated(with_margins(margins, prompt_hash=np.arange(200, dtype=np.uint64) // np.uint64(5))))
    assert alone["interval"]["method"] == "bootstrap over pairs"
    assert repeated["interval"] == {"level": 0.95, "method": "bootstrap over prompts", "resamples": 1000}
    assert repeated["prompts"] == 40
    for name in ("rewards/accuracies_interval", "rewards/margins_interval"):
        narrow, wide = (found[name][1] - found[name][0] for found in (alone, repeated))
        assert wide > 1.8 * narrow


# several models


def test_a_paired_comparison_knows_that_both_find_the_same_pairs_hard() -> None:
    """The first is right wherever the second is, and on 10 of 200 more: apart, their intervals overlap by far."""
    hard = np.where(np.arange(200) % 2 == 0, 1.0, -1.0)
    better = np.where(np.arange(200) % 20 == 1, 0.5, hard)
    found = report(evaluated(with_margins(better), name="b", step=7), evaluated(with_margins(hard), name="a"))
    assert [(entry["name"], entry["step"], entry["rewards/accuracies"]) for entry in found["models"]] == [
        ("b", 7, 0.55),
        ("a", None, 0.5),
    ]
    (comparison,) = found["comparisons"]
    assert (comparison["model"], comparison["against"], comparison["pairs"]) == ("b", "a", 200)
    assert comparison["accuracy_difference"] == pytest.approx(0.05)
    assert comparison["accuracy_interval"][0] > 0.015
    assert comparison["margin_difference"] == pytest.approx(1.5 * 10 / 200)
    low, high = comparison["margin_interval"]
    assert 0 < low < 0.075 < high
    first, second = found["models"]
    assert first["rewards/accuracies_interval"][0] < second["rewards/accuracies_interval"][1]


def test_the_reference_itself_stands_at_half() -> None:
    """It ties on every pair: against 85% right it is 35 points behind, and not 85."""
    right = np.where(np.arange(20) < 17, 1.0, -1.0)
    found = report(evaluated(with_margins(right)), evaluated(with_margins(np.zeros(20)), name="base"))
    (comparison,) = found["comparisons"]
    assert comparison["accuracy_difference"] == pytest.approx(0.35)
    low, high = comparison["accuracy_interval"]
    assert 0.1 < low < 0.35 < high < 0.6
    assert found["models"][1]["rewards/accuracies_ties_half"] == 0.5


def test_length_is_compared_pair_by_pair() -> None:
    """Of ten pairs the longer answer is the chosen one in three, so the better rule is the shorter: right in seven."""
    tokens = np.where(np.arange(10) < 3, 9, 4), np.full(10, 5)
    right = np.where(np.arange(10) < 9, 1.0, -1.0)
    found = report(evaluated(with_margins(right, tokens=tokens)))["over_length"]
    assert (found["rule"], found["rule_accuracy"], found["value"]) == ("shorter", 0.7, pytest.approx(0.2))
    assert found["interval"][0] < 0 < found["interval"][1]


def test_every_model_has_the_figures_of_every_loss() -> None:
    models = [evaluated(with_margins([1.0, -2.0, 3.0]), "dpo", "ipo", name=name) for name in "ab"]
    found = report(*models)
    assert [list(entry["by_loss"]) for entry in found["models"]] == [["dpo", "ipo"]] * 2
    assert found["by_loss"] == found["models"][0]["by_loss"]


@pytest.mark.parametrize(
    ("loss", "ids", "why"),
    [("dpo(beta=0.2)", "", "the losses differ"), ("dpo(beta=0.1)", "f", "the tokenizers differ")],
)
def test_margins_of_another_scale_are_not_compared(loss: str, ids: str, why: str) -> None:
    first = evaluated(with_margins([1.0, -1.0, 1.0]))
    pair_ids = {"pair_id": np.array([ids + "0" * 31] * 3)} if ids else {}
    other = evaluated(with_margins([1.0, 1.0, 1.0], **pair_ids), loss, name="b")
    (comparison,) = report(first, other)["comparisons"]
    assert comparison["accuracy_difference"] == pytest.approx(-1 / 3)
    assert (comparison["margin_difference"], comparison["margin_interval"]) == (None, None)
    assert why in comparison["why_no_margin"]


def test_models_are_compared_on_the_rows_that_both_have(tmp_path: Path) -> None:
    """Another tokenizer finds other pairs too long."""
    first = evaluated(with_margins([1.0, -1.0, 1.0, 1.0], row=np.array([0, 2, 3, 9])))
    other = evaluated(with_margins([1.0, 1.0, -1.0], row=np.array([2, 3, 5])), name="b")
    found = report(first, other)
    assert found["comparisons"][0]["pairs"] == 2
    assert found["comparisons"][0]["accuracy_difference"] == -0.5
    write_report(tmp_path, found, [first, other])
    columns = pq.read_table(tmp_path / "pairs.parquet").to_pydict()
    assert columns["row"] == [0, 2, 3, 9]
    assert columns["model-2/margins"] == [None, pytest.approx(1), pytest.approx(1), None]


# files and terminal


def test_the_table_fits_a_hundred_columns() -> None:
    generator = np.random.default_rng(0)
    margins = generator.normal(300, 4000, 300)
    more = {
        "source": np.array([f"a source with a name that is long {row % 3}" for row in range(300)], dtype=object),
        "tokens": (generator.integers(1000, 9000, 300), generator.integers(1000, 9000, 300)),
    }
    models = [
        evaluated(with_margins(margins + n, **more), "dpo", "ipo", "hinge", name=f"/a/very/long/path/to/step-{n}/model")
        for n in (0, 1)
    ]
    stream = io.StringIO()
    render(Printer(stream), report(*models))
    tables = [line for line in stream.getvalue().splitlines() if "  " in line]
    assert len(tables) > 30
    assert max(map(len, tables)) <= 100, max(tables, key=len)
    assert "-1/model" in stream.getvalue()


def test_metrics_json_is_json_and_the_columns_have_types(tmp_path: Path) -> None:
    kept, hollow = np.empty(3, dtype=object), np.empty(3, dtype=object)
    kept[:], hollow[:] = ["a", 1, None], [{"a": {}}] * 3  # Parquet has no structs without fields
    model = evaluated(
        with_margins(
            [0.0, 0.0, 0.0],
            **{"kept/mixed": kept, "kept/hollow": hollow, "prompt_hash": np.array([2**64 - 1, 1, 2], np.uint64)},
        )
    )
    found = report(model)
    write_report(tmp_path, found, [model])
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(found))
    columns = pq.read_table(tmp_path / "pairs.parquet").to_pydict()
    assert columns["kept/mixed"] == ['"a"', "1", None]
    assert columns["kept/hollow"] == ['{"a": {}}'] * 3
    assert columns["prompt_hash"] == [2**64 - 1, 1, 2]
