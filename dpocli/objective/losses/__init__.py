"""The DPO family: `LOSSES` maps a name to a pure function (logps, *, beta, …) -> LossOutput.

What each loss needs, its hyperparameters and its paper stand in `config.catalogue`. `compute` is the way from what
`--loss` says to the losses of pairs: modifiers, the functions, and the weights of a sum.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from dpocli.config.loss_expression import LossChoice, LossTerm
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.batch_coupled import aot, aot_unpaired, beta_dpo, beta_dpo_state
from dpocli.objective.losses.likelihood import rpo, sft
from dpocli.objective.losses.logistic import (
    discopop,
    dpo,
    dpo_norm,
    dpo_reference_free,
    dpop,
    exo_pair,
    r_dpo,
    robust,
    wpo,
)
from dpocli.objective.losses.margin_target import hinge, ipo
from dpocli.objective.losses.modifiers import length_desensitized, with_divergence, wpo_weights
from dpocli.objective.losses.output import LossOutput, LossState
from dpocli.objective.losses.per_side import apo_down, apo_zero, bco_pair, bco_state, cal_dpo, nca_pair, sppo_hard
from dpocli.objective.losses.reference_free import alphapo, cpo, orpo, simpo, simpo_hinge, slic

Loss = Callable[..., LossOutput]
"""(logps: PairLogps, *, beta: float, <its own keyword-only hyperparameters>) -> LossOutput.

A loss with a state also takes `state: LossState | None`; without one, it goes by the pairs at hand.
"""

LOSSES: Mapping[str, Loss] = {
    function.__name__: function
    for function in (
        *(dpo, dpo_norm, dpo_reference_free, wpo, robust, exo_pair, discopop, dpop, r_dpo),
        *(hinge, ipo),
        *(nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, cal_dpo),
        *(simpo, simpo_hinge, alphapo, cpo, orpo, slic),
        *(sft, rpo),
        *(aot, aot_unpaired, beta_dpo),
    )
}

NEXT_STATE: Mapping[str, Callable[..., LossState]] = {"bco_pair": bco_state, "beta_dpo": beta_dpo_state}
"""(logps, *, beta, <the loss's hyperparameters>, state: LossState | None) -> the state once these pairs are counted in."""

States = Mapping[str, LossState]
"""The state of each term that has one, by the name of its loss."""


def compute(choice: LossChoice, logps: PairLogps, states: States | None = None) -> LossOutput:
    """The chosen loss with its numbers filled in; of a weighted sum, the sum.

    The rewards of a sum are those of its first term that compares the sides.

    Args:
        choice: what `--loss` says.
        logps: of the pairs; of the whole batch, where the loss depends on it.
        states: of `next_states`; a term without one goes by these pairs alone.
    """
    outputs = {term.name: _compute_term(term, logps, (states or {}).get(term.name)) for term in choice.terms}
    if choice.is_single:
        return outputs[choice.terms[0].name]
    ranking = outputs[choice.ranked_by.name]
    total = sum(term.weight * outputs[term.name].losses for term in choice.terms)
    assert isinstance(total, Tensor)
    terms = {name: output.losses.detach() for name, output in outputs.items()}
    return LossOutput(total, ranking.chosen_rewards, ranking.rejected_rewards, terms)


def next_states(choice: LossChoice, logps: PairLogps, states: States) -> States:
    """What the terms remember once the pairs of a batch are counted in: to be computed before their loss."""
    return {
        term.name: NEXT_STATE[term.name](_modified(term, logps), **term.numbers, state=states.get(term.name))
        for term in choice.terms
        if term.spec.stateful
    }


def _compute_term(term: LossTerm, logps: PairLogps, state: LossState | None) -> LossOutput:
    remembered = {"state": state} if term.spec.stateful else {}
    output = LOSSES[term.name](_modified(term, logps), **term.numbers, **remembered)
    if term.modifiers.get("weighting") == "wpo":
        return LossOutput(wpo_weights(logps) * output.losses, output.chosen_rewards, output.rejected_rewards)
    return output


def _modified(term: LossTerm, logps: PairLogps) -> PairLogps:
    """The log-probs as the term's modifiers would have them."""
    given = term.modifiers
    if "ld_alpha" in given:
        logps = length_desensitized(logps, ld_alpha=float(given["ld_alpha"]))
    if "f_divergence" in given:
        logps = with_divergence(
            logps, f_divergence=str(given["f_divergence"]), f_alpha=float(given.get("f_alpha", 0.5))
        )
    return logps


__all__ = [
    "LOSSES",
    "NEXT_STATE",
    "Loss",
    "LossOutput",
    "LossState",
    "PairLogps",
    "States",
    "compute",
    "next_states",
]
