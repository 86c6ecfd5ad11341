"""The worst and the best pairs of an evaluation, scored again to get the value of every token."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dpocli.cache.reader import PairStore
from dpocli.cache.view import PairView
from dpocli.config.commands import EvaluateOptions
from dpocli.config.flags import given_keys, values_of
from dpocli.console.console import Console
from dpocli.console.progress import Progress
from dpocli.data.detokenize import decoded, token_texts
from dpocli.data.preference import EncodedPair, TokenIds, TokenMask
from dpocli.distributed.processes import Processes
from dpocli.errors import DpoError
from dpocli.evaluation.pair_table import PairTable
from dpocli.report.html import FILE_NAME, write_html_report
from dpocli.report.tables import facts_of_cache
from dpocli.report.token_heatmap import ExamplePair, ExamplePairs, ExampleToken
from dpocli.scoring.passes import reference_logps
from dpocli.scoring.scorer import PairScorer


def score_examples(
    scorer: PairScorer,
    view: PairView,
    tokenizer: PreTrainedTokenizerBase,
    table: PairTable,
    count: int,
    team: Processes,
    *,
    against_reference: bool,
) -> ExamplePairs:
    """Score the pairs with the lowest and the highest margins of the first loss token by token.

    Collective: call on every rank. Each team scores all of these few pairs, so that a model in shards has all its processes,
    and none waits for the first.

    Args:
        scorer: of the policy that made `table`.
        view: the pairs, in the order of `table`.
        tokenizer: to show tokens as text.
        table: their margins and rewards.
        count: number of the worst, and of the best; no pair is in both.
        team: the processes that share the scorer's model with this one.
        against_reference: whether the reward is made of log-ratios, else of log-probs; tokens show the same.
    """
    worst, best = ends(table.column("margins"), count)
    positions = np.concatenate([worst, best])
    pairs = view.load(positions)
    scored = reference_logps(scorer, pairs, Progress(), lambda: None, team) if pairs else []
    examples = tuple(
        _example(pair, policy, tokenizer, table, position, against_reference=against_reference)
        for pair, policy, position in zip(pairs, scored, positions.tolist(), strict=True)
    )
    return ExamplePairs(examples[: len(worst)], examples[len(worst) :], against_reference)


def write_page(
    directory: Path,
    options: EvaluateOptions,
    report: Mapping[str, Any],
    table: PairTable,
    examples: ExamplePairs,
    store: PairStore,
    console: Console,
) -> None:
    """Write `report.html` and its plots; where they cannot be drawn, warn, since the figures are worth keeping.

    Raises:
        DpoError: the disk is full, or the like.
    """
    values = values_of(options)
    given = {key: values[key] for key in given_keys(options)}
    settings = {"Options given": given, "Reference cache": facts_of_cache(store)}
    try:
        write_html_report(directory, report, table, examples, settings)
    except DpoError:
        raise
    except Exception as error:
        console.warn(
            f"{FILE_NAME} could not be made ({type(error).__name__}: {error}). metrics.json and pairs.parquet are written."
        )


def ends(margins: NDArray[np.float64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the lowest margins, lowest first, and of the highest, highest first; none is in both."""
    order = np.argsort(margins, kind="stable")
    num_worst = min(count, (len(order) + 1) // 2)
    num_best = min(count, len(order) - num_worst)
    return order[:num_worst], order[::-1][:num_best]


def _example(
    pair: EncodedPair,
    policy: EncodedPair,
    tokenizer: PreTrainedTokenizerBase,
    table: PairTable,
    position: int,
    *,
    against_reference: bool,
) -> ExamplePair:
    assert policy.reference
    values, masks = [policy.reference.chosen, policy.reference.rejected], (pair.chosen_mask, pair.rejected_mask)
    if against_reference:
        assert pair.reference
        values = [values[0] - pair.reference.chosen, values[1] - pair.reference.rejected]
    chosen, rejected = (
        example_tokens(tokenizer, pair.prompt_ids, ids, mask, of_side.astype(np.float64))
        for ids, mask, of_side in zip((pair.chosen_ids, pair.rejected_ids), masks, values, strict=True)
    )
    return ExamplePair(
        row=pair.row,
        pair_id=pair.pair_id,
        source=pair.source,
        margin=float(table.column("margins")[position]),
        chosen_reward=float(table.column("chosen_rewards")[position]),
        rejected_reward=float(table.column("rejected_rewards")[position]),
        prompt=decoded(tokenizer, pair.prompt_ids.tolist()),
        chosen=chosen,
        rejected=rejected,
    )


def example_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: TokenIds,
    ids: TokenIds,
    mask: TokenMask | None,
    values: NDArray[np.float64] | Sequence[float],
) -> tuple[ExampleToken, ...]:
    """A side as text, with the value of each token: log-ratio or log-prob.

    Args:
        tokenizer: that made the tokens.
        prompt_ids: the tokens before the side.
        ids: of the side, shape (tokens,).
        mask: which of them count; None where all do.
        values: shape (tokens,).
    """
    counts = np.ones(len(ids), dtype=np.bool_) if mask is None else mask
    found = []
    for piece in token_texts(tokenizer, prompt_ids.tolist(), ids.tolist()):
        tokens = slice(piece.start, piece.stop)
        # Of tokens that share a character, sum those that count, so that the sum over a side stays its log-ratio.
        counted = np.asarray(values)[tokens][counts[tokens]]
        value = counted if len(counted) else np.asarray(values)[tokens]
        found.append(ExampleToken(piece.text, float(value.sum()), bool(len(counted))))
    return tuple(found)
