"""The catalogue of losses: names, needs, hyperparameters, bounds, papers. Free of torch, so that `--help` is fast.

`objective.losses` implements what stands here; a test holds the two equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """A number or choice of a loss beyond beta. Its name is the keyword of the function and, with dashes, the flag."""

    name: str
    default: float | str
    help: str
    minimum: float | None = None
    maximum: float | None = None
    """Exclusive, since every upper bound so far is one at which the formula breaks down."""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LossSpec:
    """What a loss is, needs and defaults to."""

    name: str
    summary: str
    formula: str
    paper: str
    beta: float
    """The paper's default."""
    needs_reference: bool = True
    needs_collision: bool = False
    """Needs log Σ_v p(v)² of the policy at every token, which the head computes only when asked."""
    reward: str = "beta x summed log-ratio"
    """What the reward columns hold: what the loss ranks by."""
    hyperparameters: tuple[Hyperparameter, ...] = ()

    @property
    def defaults(self) -> dict[str, float | str]:
        return {parameter.name: parameter.default for parameter in self.hyperparameters}


LABEL_SMOOTHING = Hyperparameter(
    "label_smoothing", 0.0, "assumed share of pairs whose label is flipped (cDPO)", minimum=0.0, maximum=0.5
)

_DPO_PAPER = "Rafailov et al. 2023, arXiv:2305.18290, eq. 7"
_CDPO_PAPER = "Mitchell 2023, 'A note on DPO with noisy preferences'"

CATALOGUE: Mapping[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec(
            name="dpo",
            summary="Direct Preference Optimization; with label smoothing, cDPO",
            formula="-(1-e) log sigmoid(beta h) - e log sigmoid(-beta h), h = summed log-ratio margin",
            paper=f"{_DPO_PAPER}; smoothing: {_CDPO_PAPER}",
            beta=0.1,
            hyperparameters=(LABEL_SMOOTHING,),
        ),
        LossSpec(
            name="dpo_norm",
            summary="DPO on per-token mean log-ratios (length-normalised)",
            formula="dpo with h = margin of the mean log-ratios per token",
            paper="Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, length-normalized DPO",
            beta=5.0,
            reward="beta x mean log-ratio per token",
            hyperparameters=(LABEL_SMOOTHING,),
        ),
        LossSpec(
            name="dpo_reference_free",
            summary="DPO with a uniform reference: no cache is needed",
            formula="dpo with h = summed log-prob margin of the policy",
            paper=_DPO_PAPER + ", with a uniform reference",
            beta=0.1,
            needs_reference=False,
            reward="beta x summed log-prob",
            hyperparameters=(LABEL_SMOOTHING,),
        ),
        LossSpec(
            name="hinge",
            summary="margin loss of RSO / SLiC on log-ratios",
            formula="max(0, 1 - beta h), h = summed log-ratio margin",
            paper="Liu et al. 2023 (RSO), arXiv:2309.06657, hinge-norm (its gamma is beta here)",
            beta=0.1,
        ),
        LossSpec(
            name="ipo",
            summary="squared distance of the margin to 1/(2 beta); does not saturate",
            formula="(h - 1/(2 beta))^2, h = margin of the mean log-ratios per token",
            paper="Azar et al. 2023, arXiv:2310.12036, eq. 17 (its tau is beta here)",
            beta=0.1,
            reward="beta x mean log-ratio per token (summed with --reduction sum)",
            hyperparameters=(
                Hyperparameter(
                    "reduction",
                    "mean",
                    "log-ratios per token (mean, as the authors confirmed) or per answer (sum)",
                    choices=("mean", "sum"),
                ),
            ),
        ),
        LossSpec(
            name="simpo",
            summary="reference-free, length-normalised, with a target margin",
            formula="-log sigmoid(beta (mean logp chosen - mean logp rejected) - gamma)",
            paper="Meng et al. 2024, arXiv:2405.14734, eq. 6",
            beta=2.0,
            needs_reference=False,
            reward="beta x mean log-prob per token",
            hyperparameters=(
                Hyperparameter(
                    "gamma", 1.0, "target reward margin, subtracted as it stands (not times beta)", minimum=0.0
                ),
                LABEL_SMOOTHING,
            ),
        ),
        LossSpec(
            name="wpo",
            summary="DPO with each pair weighted by how likely the policy is to have written it",
            formula="min(1, w(chosen) w(rejected)) x dpo, w = exp mean_t(log p(y_t) - log sum_v p(v)^2), no gradient",
            paper="Zhou et al. 2024, arXiv:2406.11827, with sampled alignment",
            beta=0.1,
            needs_collision=True,
            hyperparameters=(LABEL_SMOOTHING,),
        ),
    )
}
