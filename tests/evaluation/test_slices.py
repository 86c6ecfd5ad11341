"""Slices have names that can be read, leave no pair out, and say when they are too small to tell."""

from typing import Any

import numpy as np
import pytest

from dpocli.evaluation.report import report_of
from dpocli.evaluation.slices import MAX_LABELS, parted
from tests.evaluation.scored_tables import evaluated, with_margins


def objects(values: list[Any]) -> np.ndarray:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


@pytest.mark.parametrize(
    ("values", "names", "sizes"),
    [
        (np.arange(1, 101), ["1 to 25", "26 to 50", "51 to 75", "76 to 100"], [25] * 4),
        (np.array([1, 1, 1, 2, 5]), ["1", "2", "5"], [3, 1, 1]),
        (np.repeat([1, 7, 8, 9, 10], [96, 1, 1, 1, 1]), ["1", "7 to 10"], [96, 4]),
        (np.arange(-4, 4), ["-4 to -3", "-2 to -1", "0 to 1", "2 to 3"], [2] * 4),
        (np.array([0.5, 0.25, 0.125, 0.75]) * 1e-3, ["0.000125", "0.00025", "0.0005", "0.00075"], [1] * 4),
        (1 + np.arange(5) * 1e-6, ["1 to 1.000001", "1.000002", "1.000003", "1.000004"], [2, 1, 1, 1]),
        (np.full(3, 2), ["2"], [3]),
        (objects(["b", "a", "", None, "b"]), ["(empty)", "(none)", "a", "b"], [1, 1, 1, 2]),
        (objects([1, "1", "2", '"1"', 1]), ['"1"', '"\\"1\\""', "1", "2"], [1, 1, 2, 1]),
        (objects(["1", '"1"', "true"]), ['"1"', "1", "true"], [1, 1, 1]),
        (objects([True, "true", 1]), ['"true"', "1", "true"], [1, 1, 1]),
        (objects([None, "", "(none)", "(empty)"]), ['"(empty)"', '"(none)"', "(empty)", "(none)"], [1, 1, 1, 1]),
        (objects([" ", "a", "(3 others)"]), ['" "', '"(3 others)"', "a"], [1, 1, 1]),
        (objects([True, False, True]), ["false", "true"], [1, 2]),
        (objects([3, 1.5, 3]), ["1.5", "3"], [1, 2]),
        (objects([["x"], {"b": 1}, ["x"]]), ['["x"]', '{"b": 1}'], [2, 1]),
        (objects([1, None, 1, 4]), ["1", "4", "(none)"], [2, 1, 1]),
        (objects([0.5, float("nan"), 2.5, "x"]), ["0.5", "2.5", "NaN", "x"], [1, 1, 1, 1]),
        (objects([0.5, float("nan")]), ["0.5", "(none)"], [1, 1]),
        (objects([None, None]), ["(none)"], [2]),
    ],
)
def test_names_and_sizes(values: np.ndarray, names: list[str], sizes: list[int]) -> None:
    found, codes = parted(values)
    assert found == names
    assert np.bincount(codes, minlength=len(names)).tolist() == sizes


def test_of_many_labels_the_largest_have_slices_of_their_own() -> None:
    labels = objects([f"label {n:02}" for n in range(30) for _ in range(n + 1)])
    names, codes = parted(labels)
    assert len(names) == MAX_LABELS
    assert names[-1] == "(11 others)"
    assert names[0] == "label 11"
    assert np.bincount(codes)[-1] == sum(range(1, 12))


def test_slices_are_exact_and_small_ones_are_marked() -> None:
    source = objects(["big"] * 100 + ["few"] * 20 + ["wide"] * 36 + ["20 prompts"] * 100)
    margins = np.concatenate(
        [np.where(np.arange(100) < 80, 1.0, -1.0), np.ones(20), np.tile([2.0, -1.0], 18), np.ones(100)]
    )
    prompts = np.arange(256, dtype=np.uint64)
    prompts[156:] = 10_000 + np.arange(100) // 5
    kept = objects(["x"] * 128 + ["y"] * 128)
    found = report_of([evaluated(with_margins(margins, source=source, prompt_hash=prompts, **{"kept/topic": kept}))])[
        "slices"
    ]
    by_name = {entry["name"]: entry for entry in found["source"]}
    assert list(by_name) == ["20 prompts", "big", "few", "wide"]
    twenty, big, few, wide = by_name.values()
    assert (big["pairs"], big["accuracy"], big["too_small"]) == (100, 0.8, False)
    assert big["margin"] == pytest.approx(0.6)
    assert big["interval"][0] < 0.8 < big["interval"][1]
    assert (few["accuracy"], few["too_small"]) == (1.0, True)  # 20 prompts
    assert (wide["accuracy"], wide["too_small"]) == (0.5, True)  # 36 prompts, ±0.16
    assert (twenty["pairs"], twenty["too_small"]) == (100, True)
    assert [entry["name"] for entry in found["topic"]] == ["x", "y"]
    assert set(found) == {"source", "topic"}  # nothing else parts these pairs


def test_every_kind_has_every_pair_once() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 90, 200), generator.integers(5, 90, 200)
    more = {"prompt_tokens": generator.integers(1, 50, 200), "num_turns": generator.integers(1, 4, 200)}
    scored = with_margins(generator.normal(size=200), tokens=tokens, **more)
    scored.matrix[:, 2] += generator.normal(size=200)  # the reference's log-prob of the chosen side
    found = report_of([evaluated(scored)])["slices"]
    kinds = {"prompt_tokens", "completion_tokens", "length_difference", "reference_margin", "num_turns"}
    assert set(found) == kinds
    for kind in kinds:
        assert sum(entry["pairs"] for entry in found[kind]) == 200, kind


def test_a_kept_column_may_be_called_like_one_of_ours() -> None:
    labels = {"source": objects(["a", "b"]), "kept/source": objects(["x", "y"])}
    found = report_of([evaluated(with_margins([1.0, 2.0], **labels))])["slices"]
    assert {kind: [entry["name"] for entry in entries] for kind, entries in found.items()} == {
        "source": ["a", "b"],
        "kept/source": ["x", "y"],
    }


def test_pairs_without_a_source_are_said_to_have_none() -> None:
    labels = {"source": objects(["wiki", "", ""])}
    found = report_of([evaluated(with_margins([1.0, 2.0, 3.0], **labels))])["slices"]
    assert [(entry["name"], entry["pairs"]) for entry in found["source"]] == [("(none)", 2), ("wiki", 1)]
