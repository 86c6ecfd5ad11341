"""Tokens, seconds and model FLOPs of scoring, against figures worked out by hand."""

import pytest
import torch

from dpocli.data.batch import PairBatch
from dpocli.data.packing import Layout
from dpocli.scoring import throughput
from dpocli.scoring.scorer import PairScorer
from dpocli.scoring.throughput import Throughput
from tests.support.sized_pairs import pairs_of
from tests.support.tiny_models import FAMILIES, RECURRENT, TRAPS, build, families

BATCH = PairBatch.of(pairs_of((3, 2, 4), (1, 1, 1)))
UNIQUE, SCORED = 12, 8
ATTENDED = (3 * 3 / 2 + 2 * (3 + 2 / 2) + 4 * (3 + 4 / 2)) + (1 / 2 + 2 * (1 + 1 / 2))
# The tiny Llama: 2 layers, hidden size 32, 4 heads of 8, 2 of them for keys and values, 48 in between, 97 tokens.
PROJECTIONS = 32 * 32 + 2 * (32 * 16) + 32 * 32
LLAMA_LAYER = PROJECTIONS + 3 * 32 * 48
ATTENTION_FLOPS = 2 * 2 * 2 * 32 * ATTENDED
HEAD_FLOPS = 2 * 97 * 32 * SCORED


def measured(scorer: PairScorer, *, backward: bool = False) -> Throughput:
    found = Throughput(scorer, backward=backward)
    with found.clock():
        scorer(BATCH)
    return found


@pytest.fixture(autouse=True)
def _short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "PROBE_SECONDS", 0.001)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("family", ["llama-untied", "llama-tied"])
def test_the_flops_of_a_llama_are_those_worked_out_by_hand(family: str, layout: Layout) -> None:
    """In every layout, with tied and untied heads."""
    scorer = PairScorer(build(family))
    scorer.lay_out(layout)
    forward = 2 * 2 * LLAMA_LAYER * UNIQUE + ATTENTION_FLOPS + HEAD_FLOPS
    assert measured(scorer).flops() == pytest.approx(forward)
    assert measured(scorer, backward=True).flops() == pytest.approx(3 * forward)


@pytest.mark.parametrize(
    ("family", "experts", "rest"),
    [
        # 4 experts of which a token goes through 2; the router looks at every token.
        ("qwen3-moe", 4 * 3 * 32 * 24, PROJECTIONS + 4 * 32),
        # The same, and a bias for each of them.
        ("gpt-oss-sinks", 4 * (3 * 32 * 48 + 2 * 48 + 32), PROJECTIONS + 4 * 32),
    ],
)
def test_of_experts_only_those_count_that_a_token_goes_through(family: str, experts: int, rest: int) -> None:
    scorer = PairScorer(build(family))
    layer = experts / 2 + rest
    expected = 2 * 2 * layer * UNIQUE + ATTENTION_FLOPS + HEAD_FLOPS
    assert measured(scorer).flops() == pytest.approx(expected)


def test_only_what_happens_under_the_clock_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = PairScorer(build("llama-tied"))
    found = Throughput(scorer)
    assert found.summary() == {"scoring": "padded", "attention": "sdpa"}
    scorer(BATCH)
    assert "tokens_unique" not in found.summary()
    now = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(throughput.time, "perf_counter", lambda: now)
        for seconds in (2.0, 3.0):
            with found.clock():
                scorer(BATCH)
                now += seconds
            now += 100.0
            scorer(BATCH)
    facts = found.summary()
    assert (facts["tokens_unique"], facts["seconds"]) == (2 * UNIQUE, 5.0)
    assert facts["unique_tokens_per_second"] == pytest.approx(2 * UNIQUE / 5, abs=0.1)


def test_two_measurements_of_one_scorer_do_not_mix() -> None:
    scorer = PairScorer(build("llama-tied"))
    first, second = Throughput(scorer), Throughput(scorer)
    with first.clock():
        scorer(BATCH)
    with second.clock():
        scorer(BATCH)
        scorer(BATCH)
    assert first.summary()["tokens_unique"] == UNIQUE
    assert second.summary()["tokens_unique"] == 2 * UNIQUE


def test_training_counts_what_learns_and_not_what_is_scored_beside_it() -> None:
    scorer = PairScorer(build("llama-tied"))
    found = Throughput(scorer, backward=True)
    with found.clock():
        with torch.no_grad():
            scorer(BATCH)
        scorer(BATCH)
    assert found.summary()["tokens_unique"] == UNIQUE


@pytest.mark.parametrize(
    ("layout", "computed", "padding"), [(Layout.SHARED, 12, 0), (Layout.PACKED, 16, 0), (Layout.PADDED, 28, 12)]
)
def test_the_summary_tells_the_way_and_what_it_costs(layout: Layout, computed: int, padding: int) -> None:
    scorer = PairScorer(build("llama-tied"))
    scorer.lay_out(layout)
    found = measured(scorer)
    facts = found.summary()
    assert facts["scoring"] == layout
    assert facts["attention"] == ("sdpa" if layout.pads else "segments")
    assert facts["tokens_computed"] == computed
    assert facts["tokens_unique"] == UNIQUE
    assert facts["padding_share"] == pytest.approx(padding / computed, abs=1e-4)


def test_flop_utilization_is_the_flops_per_second_of_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = PairScorer(build("llama-tied"))
    assert Throughput(scorer).share_of_the_rate(4.0) is None
    found = measured(scorer)
    monkeypatch.setattr(throughput, "matmul_rate", lambda _: found.flops())
    assert found.share_of_the_rate(4.0) == 0.25
    assert found.share_of_the_rate(0.0) is None


@pytest.mark.parametrize("family", families([*FAMILIES, *TRAPS, *RECURRENT]))
def test_every_architecture_has_a_summary_and_a_utilization(family: str) -> None:
    found = measured(PairScorer(build(family)))
    assert found.summary()["tokens_unique"] == UNIQUE
    assert (found.share_of_the_rate(1.0) or 0.0) > 0


def test_the_rate_is_that_of_a_large_product_in_the_forward_passs_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = PairScorer(build("llama-tied"))
    scorer.compute_dtype = torch.bfloat16
    dtypes = set()
    plain = torch.Tensor.__matmul__

    def watched(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        dtypes.add(left.dtype)
        return plain(left[:8], right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    assert throughput.matmul_rate(scorer) > 1e9
    assert dtypes == {torch.bfloat16}
