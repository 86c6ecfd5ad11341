"""Figures of a model from per-pair values: pure functions of columns, shapes (pairs,), with intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpocli.evaluation.bootstrap import DIFFERENCE_OF_SHARES, Clusters, mean_interval, share_interval

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

NUM_BINS = 10

Floats = NDArray[np.float64]


def half_of_ties(margins: Floats) -> Floats:
    """1 where a pair is right, 0.5 where it is a tie, else 0: a model without any knowledge has 0.5 on average."""
    return np.asarray((margins > 0) + 0.5 * (margins == 0))


def share(right: NDArray[Any], clusters: Clusters) -> dict[str, Any]:
    """A share of pairs with its interval. `right`: between 0 and 1."""
    return {"value": float(right.mean()), "interval": list(share_interval(right, clusters))}


def rewards(chosen: Floats, rejected: Floats, noise: Floats, clusters: Clusters) -> dict[str, Any]:
    """Figures of the rewards of one loss.

    Args:
        chosen: rewards of the chosen side.
        rejected: rewards of the other.
        noise: rounding error of the margins, in the unit of the rewards.
        clusters: of the pairs.
    """
    margins = chosen - rejected
    accuracy, ties_half = share(chosen > rejected, clusters), share(half_of_ties(margins), clusters)
    of_margins = mean_interval(margins, clusters)
    quantiles = zip(QUANTILES, np.quantile(margins, QUANTILES), strict=True)
    return {
        "rewards/accuracies": accuracy["value"],
        "rewards/accuracies_interval": accuracy["interval"],
        "rewards/accuracies_ties_half": ties_half["value"],
        "rewards/accuracies_ties_half_interval": ties_half["interval"],
        "rewards/ties": float((chosen == rejected).mean()),
        "rewards/within_noise": float((np.abs(margins) <= noise).mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/margins_interval": list(of_margins) if of_margins else None,
        "rewards/margins_quantiles": {f"{share:g}": float(value) for share, value in quantiles},
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
    }


def accuracies(columns: Mapping[str, NDArray[Any]], clusters: Clusters) -> dict[str, Any]:
    """How often the chosen answer wins by other measures than the reward. `columns`: of `pairs.parquet`."""
    policy = columns["policy_chosen_logps"], columns["policy_rejected_logps"]
    tokens = columns["chosen_tokens"], columns["rejected_tokens"]
    reference = _reference(columns)
    chosen, rejected = (p - r for p, r in zip(policy, reference, strict=True)) if reference else policy
    found = {
        "length_normalised": chosen / tokens[0] > rejected / tokens[1],
        "policy": policy[0] > policy[1],
        "pick_the_longer": pick_the_longer(*tokens),
    }
    if reference:
        found["reference"] = reference[0] > reference[1]
    return {name: share(right, clusters) for name, right in found.items()}


def pick_the_longer(chosen_tokens: NDArray[Any], rejected_tokens: NDArray[Any]) -> Floats:
    """1 where the chosen answer is the longer one, 0.5 where both are as long, else 0."""
    return half_of_ties(chosen_tokens - rejected_tokens)


def over_length(
    margins: Floats, chosen_tokens: NDArray[Any], rejected_tokens: NDArray[Any], clusters: Clusters
) -> dict[str, Any]:
    """Accuracy less the accuracy of always picking the longer, or always the shorter answer, whichever is right more often;
    pair by pair. Ties, of rewards and of lengths, count half."""
    longer = pick_the_longer(chosen_tokens, rejected_tokens)
    rule, by_rule = ("longer", longer) if longer.mean() >= 0.5 else ("shorter", 1 - longer)
    return {"rule": rule, "rule_accuracy": float(by_rule.mean())} | difference(
        half_of_ties(margins) - by_rule, clusters
    )


def difference(change: Floats, clusters: Clusters) -> dict[str, Any]:
    """A paired difference of shares with its interval. `change`: between -1 and 1."""
    found = mean_interval(change, clusters, DIFFERENCE_OF_SHARES)
    return {"value": float(change.mean()), "interval": list(found) if found else None}


def log_ratios(columns: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Means of log-probs and log-ratios, in nats, and the share of pairs whose chosen answer has become less likely.

    The mean log-ratio of a side is no KL divergence: the answers are not samples of the policy. Displacement: Razin et al.
    2024, "Unintentional unalignment: likelihood displacement in direct preference optimization".
    """
    chosen, rejected = columns["policy_chosen_logps"], columns["policy_rejected_logps"]
    means: dict[str, Any] = {"logps/chosen": chosen, "logps/rejected": rejected}
    if reference := _reference(columns):
        up, down = chosen - reference[0], rejected - reference[1]
        means |= {
            "logratios/chosen": up,
            "logratios/rejected": down,
            "logratios/margins": up - down,
            "logratios/accuracies": up > down,
            "displacement": up < 0,
        }
    return {name: float(values.mean()) for name, values in means.items()}


def calibration(margins: Floats, clusters: Clusters) -> dict[str, Any]:
    """How well σ(margin) predicts that the chosen answer is the preferred one (Bradley and Terry 1952).

    `brier` is the mean (1 - σ(margin))², 0.25 for a model without any knowledge (Brier 1950). The bins look at each pair from
    the side that the model prefers, since the chosen side of every pair is right: `mean_probability` is the model's
    probability of that side, from 0.5 on, and `accuracy` how often it was the chosen one; a tie counts half. Empty bins are
    left out.
    """
    sure = sigmoid(np.abs(margins))
    right = half_of_ties(margins)
    edges = np.linspace(0.5, 1.0, NUM_BINS + 1)
    places = np.clip(np.searchsorted(edges, sure, side="right") - 1, 0, NUM_BINS - 1)
    bins = []
    for place in np.unique(places).tolist():
        members = places == place
        accuracy = share(right[members], clusters.where(members))
        bins.append(
            {
                "low": float(edges[place]),
                "high": float(edges[place + 1]),
                "mean_probability": float(sure[members].mean()),
                "accuracy": accuracy["value"],
                "accuracy_interval": accuracy["interval"],
                "pairs": int(members.sum()),
            }
        )
    return {"brier": float(np.square(sigmoid(-margins)).mean()), "bins": bins}


def reward_length_correlation(
    chosen: Floats, rejected: Floats, chosen_tokens: NDArray[Any], rejected_tokens: NDArray[Any]
) -> float | None:
    """Pearson correlation of reward and tokens over both sides of all pairs; None where one of them is constant."""
    reward, tokens = _centred(chosen, rejected), _centred(chosen_tokens, rejected_tokens)
    scale = float(np.sqrt((reward**2).sum() * (tokens**2).sum()))
    return float((reward * tokens).sum() / scale) if scale > 0 else None


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + e^-x), without overflow. Shape of the argument."""
    small: Floats = np.exp(-np.abs(values))
    return np.asarray(np.where(values >= 0, 1.0, small) / (1 + small))


def _centred(*sides: NDArray[Any]) -> Floats:
    values = np.concatenate([side.astype(np.float64) for side in sides])
    return np.asarray(values - values.mean())


def _reference(columns: Mapping[str, NDArray[Any]]) -> tuple[Floats, Floats] | None:
    if "ref_chosen_logps" not in columns:
        return None
    return columns["ref_chosen_logps"], columns["ref_rejected_logps"]
