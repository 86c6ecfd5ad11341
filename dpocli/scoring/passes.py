"""Micro-batches: which pairs go through the scorer together, on which process, and what to do if they do not fit."""

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
"""Names of learned position embeddings and of GPT-J's buffer."""

_NO_TOKEN = np.zeros(1, dtype=np.int32)

FILLER = EncodedPair(row=-1, pair_id="", prompt_ids=_NO_TOKEN, chosen_ids=_NO_TOKEN, rejected_ids=_NO_TOKEN)
"""Scored by a process without pairs while others need its part in collective operations."""

ScoredPass = tuple[list[int], PairBatch, TokenLogps]
"""Indices of the pairs of a micro-batch, the batch, and its log-probs."""


def token_budget(given: int | None, device: torch.device) -> int:
    """Tokens per forward pass, with padding: `--token-budget`, or the default of the device."""
    return given or DEFAULT_TOKEN_BUDGET[device.type]


def reference_logps(
    scorer: PairScorer,
    pairs: Sequence[EncodedPair],
    progress: Progress,
    check_stop: Callable[[], None],
    team: Processes,
) -> list[EncodedPair]:
    """Score pairs as `score_passes` does, and return them in the same order with `reference` set.

    Args:
        scorer: the model.
        pairs: the same ones on every process of the team.
        progress: receives the pairs of the whole team.
        check_stop: called before each pass; raises to stop, on all processes of the team at once.
        team: the processes that share the passes.
    """
    passes: list[ScoredPass] = []
    for members, batch, tokens in score_passes(scorer, pairs, check_stop, team):
        passes.append((members, batch, tokens))
        progress.update(pairs=len(members) * team.count, tokens=batch.num_tokens * team.count)
    found: list[tuple[int, ReferenceLogps]] = []
    # Copied to the CPU at the end, so that no pass waits for the one before.
    for members, batch, tokens in passes:
        chosen = np.split(tokens.chosen.cpu().numpy(), np.cumsum(batch.chosen_lengths)[:-1])
        rejected = np.split(tokens.rejected.cpu().numpy(), np.cumsum(batch.rejected_lengths)[:-1])
        found += zip(members, map(ReferenceLogps, chosen, rejected), strict=True)
    scored: list[EncodedPair] = list(pairs)
    for index, logps in team.gather(found):
        scored[index] = replace(pairs[index], reference=logps)
    return scored


def score(scorer: PairScorer, pairs: Sequence[EncodedPair]) -> tuple[PairBatch, TokenLogps]:
    """Score one micro-batch.

    Returns:
        The batch, on the CPU, and its log-probs, on the scorer's device.

    Raises:
        UsageError: a token id beyond the model's embeddings, or a position beyond its position table. (On a GPU either would
            be a device-side assertion, which names no cause.)
    """
    check_ids(scorer, pairs)
    batch = PairBatch.of(pairs)
    return batch, scorer(batch)


def check_ids(scorer: PairScorer, pairs: Sequence[EncodedPair]) -> None:
    """Raise UsageError for a token id or a position that the model has no row for."""
    _check_positions(scorer, max(pair.num_tokens_longer for pair in pairs))
    largest = max(int(ids.max(initial=0)) for pair in pairs for ids in pair.all_ids)
    if largest >= scorer.num_embeddings:
        raise UsageError(
            f"--model: it has embeddings for {scorer.num_embeddings:,} token ids, and the pairs have the id {largest:,}: its "
            "tokenizer has more tokens than the model. Resize the embeddings and save the model again."
        )


def _check_positions(scorer: PairScorer, longest: int) -> None:
    limit = getattr(scorer.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or longest <= limit:
        return
    # Rotary positions are computed without a limit; learned ones, and GPT-J's, are looked up in a table.
    names = {
        name.rpartition(".")[2]
        for holder in (scorer.model.named_modules, scorer.model.named_buffers)
        for name, _ in holder()
    }
    if names & _POSITION_TABLES:
        raise UsageError(
            f"--model: it has positions for {limit:,} tokens, and a pair has {longest:,}. Give precompute --max-length {limit}."
        )


def pair_sizes(layout: Layout, pairs: Sequence[EncodedPair]) -> list[int]:
    """Tokens that each pair takes in a layout."""
    return [layout.size(*map(len, pair.all_ids)) for pair in pairs]


def size_of_pass(layout: Layout, pairs: Sequence[EncodedPair]) -> int:
    """Tokens of a micro-batch of these pairs, with padding."""
    sizes = pair_sizes(layout, pairs)
    return max(sizes, default=0) * len(sizes) if layout.pads else sum(sizes)


def micro_batches(scorer: PairScorer, pairs: Sequence[EncodedPair]) -> list[list[int]]:
    """Group pairs within the scorer's token budget; returns indices into `pairs`."""
    return pack(pair_sizes(scorer.packing.layout, pairs), scorer.packing)


def my_passes(
    view: PairView, positions: NDArray[np.int64], packing: Packing, processes: Processes
) -> Iterator[tuple[NDArray[np.int64], list[EncodedPair]]]:
    """Load this process's micro-batches of `positions`: as many as every other process has, some of them empty."""
    sizes = view.at(positions).sizes(packing.layout).tolist()
    for members in deal(sizes, processes.count, packing)[processes.rank]:
        mine = positions[members]
        yield mine, view.load(mine) if members else []


def score_passes(
    scorer: PairScorer,
    pairs: Sequence[EncodedPair],
    check_stop: Callable[[], None] = lambda: None,
    team: Processes | None = None,
) -> Iterator[ScoredPass]:
    """Score pairs without gradient.

    Alone, a micro-batch that runs out of memory is split in two. Several processes share the pairs and make the same number
    of passes, without splits.

    Args:
        scorer: the model.
        pairs: the same ones on every process of the team.
        check_stop: called before each pass.
        team: the processes that share the passes; None: this one scores all of them.
    """
    num_processes, rank = (team.count, team.rank) if team else (1, 0)
    todo = deal(pair_sizes(scorer.packing.layout, pairs), num_processes, scorer.packing)[rank][::-1]
    while todo:
        check_stop()
        members = todo.pop()
        try:
            with torch.no_grad():
                batch, tokens = score(scorer, [pairs[index] for index in members] or [FILLER])
        except Exception as error:
            if num_processes > 1 or len(members) == 1 or not is_out_of_memory(error):
                raise
        else:
            if members:
                yield members, batch, tokens
            continue
        # Outside the `except` block, where the error no longer references the tensors of the failed pass.
        scorer.tally.splits += 1
        release_cached_memory(scorer.device)
        half = len(members) // 2
        todo += [members[half:], members[:half]]


def release_cached_memory(device: torch.device) -> None:
    """Return the allocator's fragments to the device after running out of memory. Not to be called in an `except` block."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
