"""Tables of pairs whose log-probs are known, as if a model had given them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dpocli.config.loss_expression import LossChoice, named
from dpocli.evaluation.pair_table import PairTable, ScoredPairs
from dpocli.evaluation.report import Evaluated
from dpocli.objective.logps import LogpColumns, PairLogps


def scored_pairs(
    chosen: Any,
    rejected: Any,
    reference: tuple[Any, Any] | None = None,
    tokens: tuple[Any, Any] | None = None,
    **about: Any,
) -> ScoredPairs:
    """Pairs with these sums of log-probs; 10 tokens a side, a prompt each, unless it is said otherwise."""
    count = len(chosen)
    tokens = tokens or (np.full(count, 10), np.full(count, 10))
    columns = {
        "policy_chosen": chosen,
        "policy_rejected": rejected,
        "chosen_tokens": tokens[0],
        "rejected_tokens": tokens[1],
    }
    columns |= {} if reference is None else {"reference_chosen": reference[0], "reference_rejected": reference[1]}
    wanted = LogpColumns(reference=reference is not None)
    logps = {name: torch.tensor(np.asarray(columns[name], dtype=np.float64)) for name in wanted.names}
    known: dict[str, Any] = {
        "row": np.arange(count),
        "pair_id": np.array([f"{row:032x}" for row in range(count)]),
        "source": np.array([""] * count, dtype=object),
        "weight": np.ones(count),
        "chosen_tokens": np.asarray(tokens[0]),
        "rejected_tokens": np.asarray(tokens[1]),
        "prompt_tokens": np.full(count, 5),
        "num_turns": np.ones(count, dtype=np.int64),
        "prompt_hash": np.arange(count, dtype=np.uint64),
    }
    nothing = {"reference_chosen": None, "reference_rejected": None}
    matrix = PairLogps(**nothing | logps).matrix().numpy()  # type: ignore[arg-type]
    return ScoredPairs(np.arange(count), known | about, matrix, wanted)


def evaluated(scored: ScoredPairs, *losses: str, name: str = "m", noise: float = 0.0, **more: Any) -> Evaluated:
    by_name: Mapping[str, LossChoice] = named([LossChoice.of(loss) for loss in losses or ("dpo(beta=0.1)",)])
    return Evaluated(name, PairTable.of(scored, by_name, {}, noise), by_name, **more)


def with_margins(margins: Any, beta: float = 0.1, **more: Any) -> ScoredPairs:
    """Pairs whose DPO margins are these; the reference finds both sides alike."""
    margins = np.asarray(margins, dtype=np.float64)
    zeros = np.zeros(len(margins))
    return scored_pairs(zeros - 10, -10 - margins / beta, (zeros - 10, zeros - 10), **more)
