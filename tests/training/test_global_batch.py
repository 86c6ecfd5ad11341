"""A batch's rows come back in the batch's order and to the last bit, however they were dealt out."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpocli.distributed.processes import Processes
from dpocli.objective.logps import LogpColumns, PairLogps
from dpocli.training.gradients import GlobalBatch

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
EVERYTHING = LogpColumns(reference=True, collision=True, tails=True)


def shuffled(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Positions as a batch of a permuted epoch has them."""
    return np.random.default_rng(seed).permutation(1000)[:count]


def logps_of(count: int, wanted: LogpColumns = EVERYTHING) -> PairLogps:
    """Numbers that float32 cannot hold; and counts, as the engine gives them, in whole numbers."""
    generator = torch.Generator().manual_seed(0)
    columns: dict[str, Tensor | None] = dict.fromkeys(("reference_chosen", "reference_rejected"))
    for name in wanted.names:
        if name.endswith("tokens"):
            columns[name] = torch.randint(1, 2**40, (count,), generator=generator)
        else:
            columns[name] = -1000 * torch.rand(count, generator=generator, dtype=torch.float64)
    return PairLogps(**columns)  # type: ignore[arg-type]


def some(logps: PairLogps, members: NDArray[np.int64]) -> PairLogps:
    columns = {name: column[torch.from_numpy(members)] for name, column in logps.columns().items()}
    return PairLogps(**({"reference_chosen": None, "reference_rejected": None} | columns))  # type: ignore[arg-type]


def assert_the_same(found: PairLogps, expected: PairLogps) -> None:
    columns, expected_columns = found.columns(), expected.columns()
    assert columns.keys() == expected_columns.keys()
    for name, column in expected_columns.items():
        assert columns[name].tolist() == column.tolist(), name


def test_places_are_those_of_the_batch() -> None:
    positions = shuffled(17)
    batch = GlobalBatch(positions, LogpColumns(), ALONE)
    assert batch.index(positions).tolist() == list(range(17))
    members = np.random.default_rng(1).permutation(17)[:6]
    assert batch.index(positions[members]).tolist() == members.tolist()


def test_a_micro_batch_without_pairs_has_no_places() -> None:
    positions = shuffled(5)
    nobody = positions[[]]
    assert nobody.dtype == np.int64
    places = GlobalBatch(positions, LogpColumns(), ALONE).index(nobody)
    assert (places.shape, places.dtype) == ((0,), torch.int64)
    assert torch.ones(5, dtype=torch.float64)[places].sum() == 0


@pytest.mark.parametrize(
    "wanted",
    [LogpColumns(), LogpColumns(reference=True), LogpColumns(collision=True), LogpColumns(tails=True), EVERYTHING],
    ids=lambda wanted: (
        "+".join(name for name in ("reference", "collision", "tails") if getattr(wanted, name)) or "none"
    ),
)
@pytest.mark.parametrize("parts", [1, 2, 5, 17])
def test_what_is_put_in_pieces_comes_back_whole_and_exact(parts: int, wanted: LogpColumns) -> None:
    positions, logps = shuffled(17), logps_of(17, wanted)
    batch = GlobalBatch(positions, wanted, ALONE)
    for members in np.array_split(np.random.default_rng(2).permutation(17), parts):
        batch.write(positions[members], some(logps, members))
    assert_the_same(batch.all_gather(), logps)
    assert tuple(batch.all_gather().columns()) == wanted.names


def test_counts_stay_exact_where_float32_would_round_them() -> None:
    positions, logps = shuffled(3), logps_of(3, LogpColumns())
    counts = torch.tensor([2**24 + 1, 2**31 + 1, 2**53 - 1])
    batch = GlobalBatch(positions, LogpColumns(), ALONE)
    batch.write(positions, PairLogps(logps.policy_chosen, logps.policy_rejected, None, None, counts, counts.flip(0)))
    whole = batch.all_gather()
    assert [int(value) for value in whole.chosen_tokens] == counts.tolist()
    assert [int(value) for value in whole.rejected_tokens] == counts.flip(0).tolist()


def test_it_holds_no_graph() -> None:
    positions, logps = shuffled(4), logps_of(4, LogpColumns())
    live = PairLogps(
        logps.policy_chosen.requires_grad_(), logps.policy_rejected * 1, None, None, logps.chosen_tokens,
        logps.rejected_tokens,
    )  # fmt: skip
    batch = GlobalBatch(positions, LogpColumns(), ALONE)
    batch.write(positions, live)
    assert not any(column.requires_grad for column in batch.all_gather().columns().values())


def sharing(said: list[Tensor]) -> Callable[[int, int], Processes]:
    """Processes that speak one after the other: the last to ask for the sum hears all of them."""

    class Sharing(Processes):
        def sum(self, values: Tensor) -> Tensor:
            said.append(values.clone())
            return torch.stack(said).sum(0)

    return lambda rank, count: Sharing(rank, count, CPU)


@pytest.mark.parametrize("count", [2, 3])
def test_what_several_processes_hold_adds_up_to_the_whole(count: int) -> None:
    """One of them, without pairs, puts nothing."""
    positions, logps = shuffled(9), logps_of(9)
    process = sharing([])
    hands = np.array_split(np.random.default_rng(3).permutation(9), count - 1)
    whole = None
    for rank in range(count):
        batch = GlobalBatch(positions, EVERYTHING, process(rank, count))
        if rank < len(hands):
            batch.write(positions[hands[rank]], some(logps, hands[rank]))
        whole = batch.all_gather()
    assert whole is not None
    assert_the_same(whole, logps)
