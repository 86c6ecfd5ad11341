"""Pairs through the scorer: which pairs this process takes, in which micro-batches, and what comes out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from dpocli.cache.view import PairView
from dpocli.console.progress import Progress
from dpocli.data.batch import PairBatch
from dpocli.data.packing import Layout, Packing, deal, pack
from dpocli.data.preference import EncodedPair, ReferenceLogps
from dpocli.distributed.processes import Processes
from dpocli.errors import UsageError, is_out_of_memory
from dpocli.scoring.scorer import PairScorer
from dpocli.scoring.token_logps import TokenLogps

DEFAULT_TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}
"""On a CPU small rows stay in its caches: measured, a sixth faster than 4096."""

_POSITION_TABLES = {"wpe", "embed_positions", "position_embeddings"}
"""What models call them."""

_NO_TOKEN = np.zeros(1, dtype=np.int32)

FILLER = EncodedPair(row=-1, pair_id="", prompt_ids=_NO_TOKEN, chosen_ids=_NO_TOKEN, rejected_ids=_NO_TOKEN)
"""Goes through the model where a process has no pair left but the others still need it in their collectives."""

ScoredPass = tuple[list[int], PairBatch, TokenLogps]
"""Which pairs went together, and what came out."""


def reference_logps(
    scorer: PairScorer,
    pairs: Sequence[EncodedPair],
    progress: Progress,
    check_stop: Callable[[], None],
    team: Processes,
) -> list[EncodedPair]:
    """The same pairs, in the same order, with the log-probs that the scorer gives them.

    A pass for which the memory is not enough is made in two, unless several processes keep step.

    Args:
        scorer: the model.
        pairs: the same ones on every process of the team.
        progress: told of the whole team's pairs.
        go_on: called before each pass, and may raise to stop, on all of the team at once.
        team: shares the passes.
    """
    passes: list[ScoredPass] = []
    for done in (
        passes_that_fit(scorer, pairs, check_stop)
        if team.count == 1
        else passes_in_step(scorer, pairs, check_stop, team)
    ):
        members, batch, _ = done
        passes.append(done)
        progress.update(pairs=len(members) * team.count, tokens=batch.num_tokens * team.count)
    found: list[tuple[int, ReferenceLogps]] = []
    # Fetched at the end, so that no pass waits for the one before it to leave the accelerator.
    for members, batch, tokens in passes:
        chosen = np.split(tokens.chosen.cpu().numpy(), np.cumsum(batch.chosen_lengths)[:-1])
        rejected = np.split(tokens.rejected.cpu().numpy(), np.cumsum(batch.rejected_lengths)[:-1])
        found += zip(members, map(ReferenceLogps, chosen, rejected), strict=True)
    scored: list[EncodedPair] = list(pairs)
    for index, logps in team.gather(found):
        scored[index] = replace(pairs[index], reference=logps)
    return scored


def passes_of(scorer: PairScorer, pairs: Sequence[EncodedPair]) -> list[list[int]]:
    """The indices of the pairs that go together through the scorer, as it is laid out."""
    return pack([scorer.packing.layout.size(*map(len, pair.all_ids)) for pair in pairs], scorer.packing)


def passes_in_step(
    scorer: PairScorer, pairs: Sequence[EncodedPair], check_stop: Callable[[], None], team: Processes
) -> Iterator[ScoredPass]:
    """This process's share of the pairs, scored without gradient in as many passes as any other of the team makes."""
    sizes = [scorer.packing.layout.size(*map(len, pair.all_ids)) for pair in pairs]
    for members in deal(sizes, team.count, scorer.packing)[team.rank]:
        check_stop()
        with torch.no_grad():
            outcome = score(scorer, [pairs[index] for index in members] or [FILLER])
        if members:
            yield members, *outcome


def passes_that_fit(
    scorer: PairScorer, pairs: Sequence[EncodedPair], check_stop: Callable[[], None] = lambda: None
) -> Iterator[ScoredPass]:
    """All pairs, scored without gradient; a pass for which the memory is not enough is made in two."""
    todo = passes_of(scorer, pairs)[::-1]
    while todo:
        check_stop()
        members = todo.pop()
        with torch.no_grad():
            outcome = _score_if_it_fits(scorer, [pairs[index] for index in members])
        if outcome is None:
            half = len(members) // 2
            todo += [members[half:], members[:half]]
        else:
            yield members, *outcome


def _score_if_it_fits(scorer: PairScorer, pairs: Sequence[EncodedPair]) -> tuple[PairBatch, TokenLogps] | None:
    """None where memory runs out over several pairs."""
    try:
        return score(scorer, pairs)
    except Exception as error:
        if len(pairs) == 1 or not is_out_of_memory(error):
            raise
    # Here, where the error no longer holds on to what the pass had allocated.
    scorer.tally.splits += 1
    free_memory(scorer)
    return None


def free_memory(scorer: PairScorer) -> None:
    """After memory ran out: what the allocator keeps in pieces becomes whole again. Not inside an `except`."""
    if scorer.device.type == "cuda":
        torch.cuda.empty_cache()


def token_budget(given: int | None, device: torch.device) -> int:
    """Tokens per forward pass, padding included."""
    return given or DEFAULT_TOKEN_BUDGET[device.type]


def my_passes(
    view: PairView, positions: NDArray[np.int64], packing: Packing, processes: Processes
) -> Iterator[tuple[NDArray[np.int64], list[EncodedPair]]]:
    """This process's micro-batches of `positions`, loaded. Empty ones are there to keep all processes in step."""
    sizes = view.at(positions).sizes(packing.layout).tolist()
    for members in deal(sizes, processes.count, packing)[processes.rank]:
        mine = positions[members]
        yield mine, view.load(mine) if members else []


def size_of_pass(layout: Layout, pairs: Sequence[EncodedPair]) -> int:
    """Tokens that go through the model for these pairs together, padding included."""
    sizes = [layout.size(*map(len, pair.all_ids)) for pair in pairs]
    return max(sizes, default=0) * len(sizes) if layout.pads else sum(sizes)


def score(scorer: PairScorer, pairs: Sequence[EncodedPair]) -> tuple[PairBatch, TokenLogps]:
    """The scorer's output for `pairs`, on its device, and the batch that it belongs to, on the CPU.

    Raises:
        UsageError: a token has no row in the model's embeddings, or a position none in its table of positions (on a GPU
            either would end the process without words).
    """
    batch = PairBatch.of(pairs)
    _check_positions(scorer, max(pair.num_tokens_longer for pair in pairs))
    if (largest := batch.largest_id()) >= scorer.num_embeddings:
        raise UsageError(
            f"--model: it has embeddings for {scorer.num_embeddings:,} token ids, and the pairs hold the id {largest:,}: the "
            "tokenizer beside it has more tokens than the model. Resize the embeddings and save the model again."
        )
    return batch, scorer(batch)


def _check_positions(scorer: PairScorer, longest: int) -> None:
    limit = getattr(scorer.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or longest <= limit:
        return
    # Rotary positions are computed and go on; learned ones, and GPT-J's, are looked up in a table that ends.
    names = {
        name.rpartition(".")[2]
        for holder in (scorer.model.named_modules, scorer.model.named_buffers)
        for name, _ in holder()
    }
    if names & _POSITION_TABLES:
        raise UsageError(
            f"--model: it has positions for {limit:,} tokens, and a pair has {longest:,}. Give precompute --max-length {limit}."
        )
