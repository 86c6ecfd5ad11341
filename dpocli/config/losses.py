"""The catalogue of losses: what `--loss` accepts, with the beta, hyperparameters, needs and rewards of each loss.

The function of the same name in `objective.losses` computes the loss; its docstring has the formula, the paper and when to
use it. This module does not import torch, so that `--help` is fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dpocli.config.hyperparameters import (
    BETA,
    DELTA,
    F_ALPHA,
    F_DIVERGENCE,
    GAMMA,
    LABEL_SMOOTHING,
    LD_ALPHA,
    MODIFIERS,
    REDUCTION,
    SFT_WEIGHT,
    WEIGHTING,
    Hyperparameter,
    Need,
    Value,
)


@dataclass(frozen=True, slots=True)
class Reward:
    """The quantity that a loss ranks by; the columns `rewards/…` hold it."""

    per_token: bool = False
    log_ratio: bool = True
    """Relative to the reference; else the policy's log-prob alone."""
    times_beta: bool = True
    note: str = ""

    def __str__(self) -> str:
        what = f"{'mean' if self.per_token else 'summed'} {'log-ratio' if self.log_ratio else 'log-prob'}"
        return f"{'beta x ' if self.times_beta else ''}{what}{f' ({self.note})' if self.note else ''}"


LOG_RATIO = Reward()

MEAN_LOG_RATIO = Reward(per_token=True)

LOGP = Reward(log_ratio=False)

MEAN_LOGP = Reward(per_token=True, log_ratio=False)


@dataclass(frozen=True, slots=True)
class LossSpec:
    """One loss: its defaults, what it accepts and what it needs."""

    name: str
    beta: float | None = 0.1
    """The paper's default; None where the formula has no beta."""
    reward: Reward = LOG_RATIO
    hyperparameters: tuple[Hyperparameter, ...] = ()
    """Its own, beyond beta."""
    modifiers: tuple[Hyperparameter, ...] = ()
    """The modifiers that it is defined for."""
    always_needs: frozenset[Need] = frozenset()
    stateful: bool = False
    """Carries a running statistic of the pairs from step to step."""
    takes_weights: bool = True
    """Whether pair weights other than 1 are defined."""

    @property
    def defaults(self) -> dict[str, Value]:
        return {parameter.name: parameter.default for parameter in self.hyperparameters}

    @property
    def accepts(self) -> Mapping[str, Hyperparameter]:
        """Every number and choice that the loss accepts, by name; beta first."""
        beta = () if self.beta is None else (BETA,)
        return {parameter.name: parameter for parameter in (*beta, *self.hyperparameters, *self.modifiers)}

    @property
    def needs_reference(self) -> bool:
        return self.reward.log_ratio

    def needs(self, values: Mapping[str, Value]) -> frozenset[Need]:
        """What the loss reads when its hyperparameters have these values."""
        asked = {
            parameter.need
            for name, parameter in self.accepts.items()
            if parameter.need and values.get(name, parameter.default) != parameter.off
        }
        return self.always_needs | asked | ({Need.REFERENCE} if self.needs_reference else set())


_F = (F_DIVERGENCE, F_ALPHA)

_WHOLE_BATCH = frozenset({Need.WHOLE_BATCH})

_SPECS = (
    # Logistic: a log-sigmoid of the margin.
    LossSpec("dpo", hyperparameters=(LABEL_SMOOTHING,), modifiers=MODIFIERS),
    LossSpec(
        "dpo_norm",
        beta=5.0,
        reward=MEAN_LOG_RATIO,
        hyperparameters=(LABEL_SMOOTHING,),
        modifiers=(*_F, WEIGHTING),
    ),
    LossSpec("dpo_reference_free", reward=LOGP, hyperparameters=(LABEL_SMOOTHING,)),
    LossSpec("wpo", hyperparameters=(LABEL_SMOOTHING,), always_needs=frozenset({Need.COLLISION})),
    LossSpec("robust", beta=0.01, hyperparameters=(replace(LABEL_SMOOTHING, default=0.1),), modifiers=(LD_ALPHA,)),
    LossSpec("exo_pair", hyperparameters=(replace(LABEL_SMOOTHING, default=1e-3, minimum=None, above=0.0),)),
    LossSpec(
        "discopop",
        beta=0.05,
        hyperparameters=(Hyperparameter("discopop_tau", 0.05, "temperature of the blend", above=0.0),),
    ),
    LossSpec(
        "dpop",
        beta=0.3,
        hyperparameters=(Hyperparameter("dpop_lambda", 50.0, "weight of the penalty", minimum=0.0),),
    ),
    LossSpec("r_dpo", hyperparameters=(Hyperparameter("r_dpo_alpha", 0.01, "length penalty per token", minimum=0.0),)),
    # Margin target: the gradient is zero where the margin is at, or beyond, its target.
    LossSpec("hinge", modifiers=MODIFIERS),
    LossSpec(
        "ipo",
        reward=replace(MEAN_LOG_RATIO, note="summed with --reduction sum"),
        hyperparameters=(REDUCTION,),
        modifiers=(*_F, WEIGHTING),
    ),
    # Per side: each answer has its own term.
    LossSpec("nca_pair", beta=0.01),
    LossSpec("bco_pair", beta=0.01, hyperparameters=(DELTA,), stateful=True),
    LossSpec("sppo_hard", beta=0.001),
    LossSpec("apo_zero"),
    LossSpec("apo_down"),
    LossSpec("cal_dpo", beta=0.001, reward=replace(LOG_RATIO, times_beta=False)),
    # Reference-free.
    LossSpec("simpo", beta=2.0, reward=MEAN_LOGP, hyperparameters=(GAMMA, LABEL_SMOOTHING)),
    LossSpec("simpo_hinge", beta=2.0, reward=MEAN_LOGP, hyperparameters=(GAMMA,)),
    LossSpec(
        "alphapo",
        beta=2.5,
        reward=replace(MEAN_LOGP, note="bent by alpha"),
        hyperparameters=(
            replace(GAMMA, default=0.25),
            LABEL_SMOOTHING,
            Hyperparameter("alphapo_alpha", 0.25, "shape of the reward (0: simpo)"),
        ),
    ),
    LossSpec("cpo", reward=LOGP, hyperparameters=(SFT_WEIGHT, LABEL_SMOOTHING)),
    LossSpec("orpo", reward=MEAN_LOGP),
    LossSpec(
        "slic",
        beta=1.0,
        reward=replace(LOGP, times_beta=False),
        hyperparameters=(replace(SFT_WEIGHT, default=0.1),),
    ),
    # Likelihood of the chosen answer.
    LossSpec("sft", beta=None, reward=replace(MEAN_LOGP, times_beta=False), hyperparameters=(REDUCTION,)),
    LossSpec("rpo", hyperparameters=(SFT_WEIGHT, LABEL_SMOOTHING, REDUCTION)),
    # Batch-coupled: the loss of a pair depends on the other pairs of the batch.
    LossSpec("aot", hyperparameters=(LABEL_SMOOTHING,), always_needs=_WHOLE_BATCH, takes_weights=False),
    LossSpec("aot_unpaired", hyperparameters=(LABEL_SMOOTHING,), always_needs=_WHOLE_BATCH, takes_weights=False),
    LossSpec(
        "beta_dpo",
        hyperparameters=(
            Hyperparameter("beta_dpo_alpha", 0.6, "how strongly beta follows the batch", minimum=0.0),
            Hyperparameter("beta_dpo_momentum", 0.9, "decay of the running mean margin", minimum=0.0, below=1.0),
        ),
        always_needs=_WHOLE_BATCH,
        stateful=True,
    ),
)

CATALOGUE: Mapping[str, LossSpec] = {spec.name: spec for spec in _SPECS}

MIXTURES: Mapping[str, str] = {"mpo": "0.8*dpo+0.2*bco_pair(beta=0.1)+sft"}
"""Weighted sums with a name. MPO: Wang et al. 2024, arXiv:2411.10442."""


def losses_using(name: str) -> list[str]:
    """The losses that accept a hyperparameter or modifier of this name."""
    return [spec.name for spec in CATALOGUE.values() if name in spec.accepts]


def all_hyperparameters() -> Mapping[str, Hyperparameter]:
    """Hyperparameters and modifiers by name, less beta, as the first loss declares them; other losses' bounds may differ."""
    found: dict[str, Hyperparameter] = {}
    for spec in CATALOGUE.values():
        for name, parameter in spec.accepts.items():
            found.setdefault(name, parameter)
    del found[BETA.name]
    return found
