"""The worst and the best pairs of an evaluation, scored once more so that every token says what it did."""

import time
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
from dpocli.console.progress import Nothing, Progress
from dpocli.data.detokenize import decoded, token_texts
from dpocli.data.preference import EncodedPair, TokenIds, TokenMask
from dpocli.distributed.processes import Processes
from dpocli.errors import DpoError
from dpocli.evaluation.pair_table import PairTable
from dpocli.report.html import FILE_NAME, PLOTS, write_html_report
from dpocli.report.pair_plots import NAMES
from dpocli.report.tables import facts_of_cache
from dpocli.report.token_heatmap import Showcase, ShownPair, ShownToken
from dpocli.scoring.passes import reference_logps
from dpocli.scoring.scorer import PairScorer


def showcase(
    scorer: PairScorer,
    view: PairView,
    tokenizer: PreTrainedTokenizerBase,
    table: PairTable,
    count: int,
    team: Processes,
    *,
    against_reference: bool,
) -> Showcase:
    """Shows the pairs with the lowest and the highest margins of the first loss.

    All processes call it, and each team scores all of these few pairs: so a model in shards has everybody it needs, and
    nobody waits for what only the first process does.

    Args:
        scorer: of the policy that made `table`.
        view: the pairs, in the order of `table`.
        tokenizer: to show tokens as text.
        table: their margins and rewards.
        count: how many of the worst and of the best; of few pairs, none is shown twice.
        team: the processes that share the scorer's model with this one.
        against_reference: whether the reward is made of log-ratios, else of log-probs: that is what tokens show.
    """
    worst, best = ends(table.column("margins"), count)
    positions = np.concatenate([worst, best])
    pairs = view.load(positions)
    scored = reference_logps(scorer, pairs, _silent(), lambda: None, team) if pairs else []
    shown = tuple(
        _shown(pair, policy, tokenizer, table, position, against_reference=against_reference)
        for pair, policy, position in zip(pairs, scored, positions.tolist(), strict=True)
    )
    return Showcase(shown[: len(worst)], shown[len(worst) :], against_reference)


def write_page(
    options: EvaluateOptions,
    report: Mapping[str, Any],
    table: PairTable,
    shown: Showcase,
    store: PairStore,
    console: Console,
) -> None:
    """`report.html` and its plots, after the figures are safe: what fails in drawing them is said, and loses nothing.

    Raises:
        DpoError: no room is left, or the like.
    """
    values = values_of(options)
    given = {key: values[key] for key in given_keys(options)}
    try:
        write_html_report(
            options.out, report, table, shown, {"Options given": given, "Reference cache": facts_of_cache(store)}
        )
    except DpoError:
        raise
    except Exception as error:
        console.warn(
            f"{FILE_NAME} could not be made ({type(error).__name__}: {error}). metrics.json and pairs.parquet are whole."
        )


def remove_report(directory: Path) -> None:
    """What an earlier evaluation left there: should this one fail, nobody takes that for its result."""
    for name in ("metrics.json", "pairs.parquet", FILE_NAME, *(f"{PLOTS}/{name}.png" for name in NAMES)):
        (directory / name).unlink(missing_ok=True)


def ends(margins: NDArray[np.float64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the lowest margins are, lowest first, and the highest, highest first; no place is in both."""
    order = np.argsort(margins, kind="stable")
    num_worst = min(count, (len(order) + 1) // 2)
    num_best = min(count, len(order) - num_worst)
    return order[:num_worst], order[::-1][:num_best]


def _silent() -> Progress:
    """A few pairs take no time worth a bar."""
    return Progress(Nothing(), None, "pairs", 0, time.monotonic)


def _shown(
    pair: EncodedPair,
    policy: EncodedPair,
    tokenizer: PreTrainedTokenizerBase,
    table: PairTable,
    position: int,
    *,
    against_reference: bool,
) -> ShownPair:
    assert policy.reference
    values, masks = [policy.reference.chosen, policy.reference.rejected], (pair.chosen_mask, pair.rejected_mask)
    if against_reference:
        assert pair.reference
        values = [values[0] - pair.reference.chosen, values[1] - pair.reference.rejected]
    chosen, rejected = (
        shown_tokens(tokenizer, pair.prompt_ids, ids, mask, of_side.astype(np.float64))
        for ids, mask, of_side in zip((pair.chosen_ids, pair.rejected_ids), masks, values, strict=True)
    )
    return ShownPair(
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


def shown_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: TokenIds,
    ids: TokenIds,
    mask: TokenMask | None,
    values: NDArray[np.float64] | Sequence[float],
) -> tuple[ShownToken, ...]:
    """A side as text, with the value of each token: log-ratio or log-prob.

    Args:
        tokenizer: that made the tokens.
        prompt_ids: what stands before the side.
        ids: of the side, shape (tokens,).
        mask: which of them count; None where all do.
        values: shape (tokens,).
    """
    counts = np.ones(len(ids), dtype=np.bool_) if mask is None else mask
    shown = []
    for piece in token_texts(tokenizer, prompt_ids.tolist(), ids.tolist()):
        tokens = slice(piece.start, piece.stop)
        # Of tokens that share a character only those that count are summed: the sum over a side stays its log-ratio.
        counted = np.asarray(values)[tokens][counts[tokens]]
        value = counted if len(counted) else np.asarray(values)[tokens]
        shown.append(ShownToken(piece.text, float(value.sum()), bool(len(counted))))
    return tuple(shown)
