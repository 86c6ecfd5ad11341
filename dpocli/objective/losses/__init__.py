"""The DPO family: `LOSSES` maps a name to a pure function (logps, *, beta, …) -> LossOutput.

`config.losses` has the defaults and needs of each loss. `compute` evaluates the choice of `--loss`: modifiers, the
functions, and the weights of a sum. To add a loss: an entry in `config.losses`, a function of the same name in one of
the families here, and golden numbers in the tests.

In the docstrings π is the policy, π_ref the reference, |y| the number of counted tokens of an answer, σ the sigmoid.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from dpocli.config.loss_expression import LossChoice, LossTerm
from dpocli.config.losses import CATALOGUE
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import batch_coupled, likelihood, logistic, margin_target, per_side, reference_free
from dpocli.objective.losses.modifiers import length_desensitized, with_divergence, wpo_weights
from dpocli.objective.losses.output import LossOutput, LossState

Loss = Callable[..., LossOutput]
"""(logps: PairLogps, *, beta: float, <its own keyword-only hyperparameters>) -> LossOutput.

A stateful loss also takes `state: LossState | None`; None computes it from the given pairs.
"""

_FAMILIES = (logistic, margin_target, per_side, reference_free, likelihood, batch_coupled)

LOSSES: Mapping[str, Loss] = {
    name: function for family in _FAMILIES for name, function in vars(family).items() if name in CATALOGUE
}

NEXT_STATE: Mapping[str, Callable[..., LossState]] = {
    "bco_pair": per_side.bco_state,
    "beta_dpo": batch_coupled.beta_dpo_state,
}
"""(logps, *, beta, <the loss's hyperparameters>, state: LossState | None) -> the state after these pairs."""

States = Mapping[str, LossState]
"""The state of each stateful term, by the name of its loss."""


def compute(choice: LossChoice, logps: PairLogps, states: States | None = None) -> LossOutput:
    """Evaluate a loss or a weighted sum.

    Args:
        choice: the loss, with every number filled in.
        logps: summed log-probs; of the whole batch, where the loss depends on it. Shapes (pairs,), nats.
        states: from `next_states`; a stateful term without one computes it from these pairs.

    Returns:
        Losses and rewards, shapes (pairs,). A sum has the rewards of its first term that compares the sides.
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
    """Update the states with the pairs of a batch. Call it before `compute` of that batch."""
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
    """The log-probs with the term's modifiers applied."""
    given = term.modifiers
    if "ld_alpha" in given:
        logps = length_desensitized(logps, ld_alpha=float(given["ld_alpha"]))
    if "f_divergence" in given:
        logps = with_divergence(
            logps, f_divergence=str(given["f_divergence"]), f_alpha=float(given.get("f_alpha", 0.5))
        )
    return logps


__all__ = ["LOSSES", "NEXT_STATE", "Loss", "LossOutput", "LossState", "PairLogps", "States", "compute", "next_states"]
