"""The catalogue of losses: formulas, papers, needs, hyperparameters. Free of torch, so that `--help` is fast.

`objective.losses` implements what stands here; tests hold the two equal, and the README's tables too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dpocli.config.hyperparameters import (
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
    """What a loss ranks by, which is what its reward columns hold."""

    per_token: bool = False
    log_ratio: bool = True
    """Against the reference; else the policy's log-prob alone."""
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
    """What a loss is, needs and defaults to."""

    name: str
    summary: str
    when: str
    """When to use it."""
    formula: str
    paper: str
    beta: float | None = 0.1
    """The paper's default; None where the formula has no such number."""
    reward: Reward = LOG_RATIO
    needs_reference: bool = True
    always_needs: frozenset[Need] = frozenset()
    hyperparameters: tuple[Hyperparameter, ...] = ()
    modifiers: tuple[Hyperparameter, ...] = ()
    stateful: bool = False
    """Remembers something of the pairs it has seen, from step to step."""
    takes_weights: bool = True
    """Whether weights of pairs other than 1 mean something."""
    disagreement: str = ""
    """Where public implementations differ, what was chosen and why."""

    @property
    def defaults(self) -> dict[str, Value]:
        return {parameter.name: parameter.default for parameter in self.hyperparameters}

    @property
    def accepts(self) -> Mapping[str, Hyperparameter]:
        """By name: its own hyperparameters, and the modifiers that it is defined for."""
        return {parameter.name: parameter for parameter in (*self.hyperparameters, *self.modifiers)}

    def needs(self, values: Mapping[str, Value]) -> frozenset[Need]:
        """What it looks at when its hyperparameters have these values."""
        asked = {
            parameter.need
            for name, parameter in self.accepts.items()
            if parameter.need and values.get(name, parameter.default) != parameter.off
        }
        return self.always_needs | asked | ({Need.REFERENCE} if self.needs_reference else set())


_WHOLE_BATCH = frozenset({Need.WHOLE_BATCH})

_F = (F_DIVERGENCE, F_ALPHA)

_DPO_PAPER = "Rafailov et al. 2023, arXiv:2305.18290, eq. 7"

_LOGISTIC = (
    LossSpec(
        name="dpo",
        summary="Direct Preference Optimization; with label smoothing, cDPO",
        when="the place to start",
        formula="-(1-e) log sigmoid(beta h) - e log sigmoid(-beta h), h = summed log-ratio margin",
        paper=f"{_DPO_PAPER}; smoothing: Mitchell 2023, 'A note on DPO with noisy preferences'",
        hyperparameters=(LABEL_SMOOTHING,),
        modifiers=MODIFIERS,
        disagreement="label smoothing applies whenever it is given; recent TRL and Liger ignore it under their plain "
        "sigmoid loss",
    ),
    LossSpec(
        name="dpo_norm",
        summary="DPO on per-token mean log-ratios (length-normalised)",
        when="answers differ much in length, and DPO grows long ones",
        formula="dpo with h = margin of the mean log-ratios per token",
        paper="Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, length-normalized DPO",
        beta=5.0,
        reward=MEAN_LOG_RATIO,
        hyperparameters=(LABEL_SMOOTHING,),
        modifiers=(*_F, WEIGHTING),
        disagreement="the rewards are per token, what the loss ranks by, as in open-instruct; TRL's `sigmoid_norm` "
        "reports sums",
    ),
    LossSpec(
        name="dpo_reference_free",
        summary="DPO with a uniform reference: no cache is needed",
        when="there is no reference, and answers are of like length",
        formula="dpo with h = summed log-prob margin of the policy",
        paper=f"{_DPO_PAPER}, with a uniform reference",
        reward=LOGP,
        needs_reference=False,
        hyperparameters=(LABEL_SMOOTHING,),
        disagreement="the rewards hold no reference either; some implementations subtract it there",
    ),
    LossSpec(
        name="wpo",
        summary="DPO with each pair weighted by how likely the policy is to have written it (dpo --weighting wpo)",
        when="the answers come from other models than the policy",
        formula="min(1, w(chosen) w(rejected)) x dpo, w = exp mean_t(log p(y_t) - log sum_v p(v)^2), no gradient",
        paper="Zhou et al. 2024, arXiv:2406.11827, with sampled alignment",
        always_needs=frozenset({Need.COLLISION}),
        hyperparameters=(LABEL_SMOOTHING,),
        disagreement="the product of the two weights is clamped to 1, as in the paper's code; TRL 1.x does not clamp, "
        "TRL 0.24 is off by one token, open-instruct takes sums for means",
    ),
    LossSpec(
        name="robust",
        summary="DPO made unbiased for flipped labels (rDPO)",
        when="you know about how many labels are wrong",
        formula="(-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e)",
        paper="Chowdhury et al. 2024, arXiv:2403.00409",
        beta=0.01,
        hyperparameters=(replace(LABEL_SMOOTHING, default=0.1),),
        modifiers=(LD_ALPHA,),
    ),
    LossSpec(
        name="exo_pair",
        summary="Efficient Exact Optimization: the reverse KL between the model's and the smoothed preference",
        when="DPO covers too many modes; sharper policies",
        formula="sum over z = +-1 of sigmoid(z beta h) (log sigmoid(z beta h) - log p(z)), p(1) = 1-e, p(-1) = e",
        paper="Ji et al. 2024, arXiv:2402.00856, eq. 16",
        hyperparameters=(replace(LABEL_SMOOTHING, default=1e-3, minimum=None, above=0.0),),
    ),
    LossSpec(
        name="discopop",
        summary="the blend of logistic and exponential loss that a language model found",
        when="to try what the search of the paper liked best",
        formula="(1-m) (-log sigmoid(x)) + m exp(-x), x = beta h, m = sigmoid(x / tau)",
        paper="Lu et al. 2024 (DiscoPOP), arXiv:2406.08414, LRML",
        beta=0.05,
        hyperparameters=(Hyperparameter("discopop_tau", 0.05, "temperature of the blend", above=0.0),),
    ),
    LossSpec(
        name="dpop",
        summary="DPO-Positive: a penalty inside the sigmoid where the chosen answer loses likelihood",
        when="the sides differ in few tokens, and DPO lowers both",
        formula="-log sigmoid(beta (h - lambda max(0, -log-ratio chosen)))",
        paper="Pal et al. 2024 (Smaug), arXiv:2402.13228, eq. 3",
        beta=0.3,
        hyperparameters=(Hyperparameter("dpop_lambda", 50.0, "weight of the penalty", minimum=0.0),),
    ),
    LossSpec(
        name="r_dpo",
        summary="DPO with the length difference explained away",
        when="chosen answers are longer, and the policy must not learn that",
        formula="-log sigmoid(beta h + alpha (tokens chosen - tokens rejected))",
        paper="Park et al. 2024, arXiv:2403.19159",
        hyperparameters=(
            Hyperparameter("r_dpo_alpha", 0.01, "reward that a token of length is taken for", minimum=0.0),
        ),
        disagreement="the rewards leave the length term out: it is what the raters are taken to add, not the policy's",
    ),
)

_TARGETS = (
    LossSpec(
        name="hinge",
        summary="margin loss of RSO / SLiC on log-ratios",
        when="pairs that are right by a margin shall be left alone",
        formula="max(0, 1 - beta h), h = summed log-ratio margin",
        paper="Liu et al. 2023 (RSO), arXiv:2309.06657, hinge-norm (its gamma is beta here)",
        modifiers=MODIFIERS,
    ),
    LossSpec(
        name="ipo",
        summary="squared distance of the margin to 1/(2 beta); does not saturate",
        when="DPO overfits pairs on which all raters agree",
        formula="(h - 1/(2 beta))^2, h = margin of the mean log-ratios per token",
        paper="Azar et al. 2023, arXiv:2310.12036, eq. 17 (its tau is beta here)",
        reward=replace(MEAN_LOG_RATIO, note="summed with --reduction sum"),
        hyperparameters=(REDUCTION,),
        modifiers=(*_F, WEIGHTING),
        disagreement="averages per token, as the authors confirmed and TRL and HALOs do; `--reduction sum` is what the "
        "original DPO repository, torchtune and OpenRLHF compute",
    ),
)

_REFERENCE_FREE = (
    LossSpec(
        name="simpo",
        summary="reference-free, length-normalised, with a target margin",
        when="without a reference, and the length of answers shall not count",
        formula="-log sigmoid(beta (mean logp chosen - mean logp rejected) - gamma)",
        paper="Meng et al. 2024, arXiv:2405.14734, eq. 6",
        beta=2.0,
        reward=MEAN_LOGP,
        needs_reference=False,
        hyperparameters=(GAMMA, LABEL_SMOOTHING),
        disagreement="gamma is subtracted as in the paper; code that takes gamma/beta multiplies it by beta",
    ),
    LossSpec(
        name="simpo_hinge",
        summary="SimPO with a hinge in place of the logistic loss",
        when="as simpo, but pairs that are right by the margin shall be left alone",
        formula="max(0, 1 - (beta (mean logp chosen - mean logp rejected) - gamma))",
        paper="Meng et al. 2024, arXiv:2405.14734, loss type of its code",
        beta=2.0,
        reward=MEAN_LOGP,
        needs_reference=False,
        hyperparameters=(GAMMA,),
    ),
    LossSpec(
        name="alphapo",
        summary="SimPO with the reward's shape as a parameter",
        when="simpo lowers the likelihood of both sides too much",
        formula="-log sigmoid(r(chosen) - r(rejected) - gamma), r = beta (1 - exp(-alpha mean logp)) / alpha",
        paper="Gupta et al. 2025 (AlphaPO), arXiv:2501.03884",
        beta=2.5,
        reward=replace(MEAN_LOGP, note="bent by alpha"),
        needs_reference=False,
        hyperparameters=(
            replace(GAMMA, default=0.25),
            LABEL_SMOOTHING,
            Hyperparameter("alphapo_alpha", 0.25, "shape of the reward (0: simpo)"),
        ),
    ),
    LossSpec(
        name="cpo",
        summary="Contrastive Preference Optimization: reference-free DPO plus the likelihood of the chosen answer",
        when="translation and the like, where the chosen answer shall also be imitated",
        formula="-log sigmoid(beta (logp chosen - logp rejected)) - sft_weight mean logp chosen",
        paper="Xu et al. 2024, arXiv:2401.08417",
        reward=LOGP,
        needs_reference=False,
        hyperparameters=(SFT_WEIGHT, LABEL_SMOOTHING),
        disagreement="the likelihood term is a mean per token of the chosen answer, as in the authors' code, TRL and Liger",
    ),
    LossSpec(
        name="orpo",
        summary="likelihood of the chosen answer plus the log odds ratio of the sides",
        when="from a base model in one stage, without SFT and reference",
        formula="-mean logp chosen - beta log sigmoid(log odds chosen - log odds rejected), odds = P/(1-P), log P = mean "
        "logp",
        paper="Hong et al. 2024, arXiv:2403.07691, eq. 6 (its lambda is beta here)",
        reward=MEAN_LOGP,
        needs_reference=False,
        disagreement="the likelihood is that of the answer, as in LLaMA-Factory and Liger; TRL takes the prompt's tokens in",
    ),
    LossSpec(
        name="slic",
        summary="Sequence Likelihood Calibration: a hinge on the log-probs plus the likelihood of the chosen answer",
        when="reference-free, with a margin in nats",
        formula="max(0, beta - logp chosen + logp rejected) - sft_weight logp chosen",
        paper="Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425, eq. 4 (its delta is beta, its lambda sft_weight here)",
        beta=1.0,
        reward=replace(LOGP, times_beta=False),
        needs_reference=False,
        hyperparameters=(replace(SFT_WEIGHT, default=0.1),),
        disagreement="the likelihood term is the chosen answer's sum; HALOs divides it by the padded width of the batch",
    ),
)

_LIKELIHOOD = (
    LossSpec(
        name="sft",
        summary="negative log-likelihood of the chosen answer; a term for weighted sums",
        when="beside another loss, to keep the chosen answers likely",
        formula="-mean logp chosen",
        paper="the language-modelling loss",
        beta=None,
        reward=replace(MEAN_LOGP, times_beta=False),
        needs_reference=False,
        hyperparameters=(REDUCTION,),
        disagreement="every pair counts alike: a mean over pairs of means per token (`--reduction sum`: of sums), as in "
        "LLaMA-Factory and NeMo; TRL takes one mean over all tokens of a micro-batch, which depends on how it is cut",
    ),
    LossSpec(
        name="rpo",
        summary="DPO plus the likelihood of the chosen answer (Iterative RPO)",
        when="reasoning, where the chosen answer must stay likely",
        formula="dpo - sft_weight mean logp chosen",
        paper="Pang et al. 2024, arXiv:2404.19733, eq. 1",
        hyperparameters=(SFT_WEIGHT, LABEL_SMOOTHING, REDUCTION),
        disagreement="as for sft; `--reduction sum` is NeMo's likelihood term without averaging",
    ),
)

_EACH_SIDE = (
    LossSpec(
        name="nca_pair",
        summary="Noise Contrastive Alignment: the chosen answer's likelihood must not fall",
        when="DPO lowers the likelihood of chosen answers",
        formula="-log sigmoid(r_c) - 1/2 log sigmoid(-r_c) - 1/2 log sigmoid(-r_r), r = beta log-ratio",
        paper="Chen et al. 2024, arXiv:2402.05369",
        beta=0.01,
    ),
    LossSpec(
        name="bco_pair",
        summary="Binary Classifier Optimization on pairs, with the rewards shifted by their running mean",
        when="labels are thumbs up and down rather than comparisons",
        formula="-log sigmoid(r_c - delta) - log sigmoid(-(r_r - delta)), r = beta log-ratio, delta = mean reward so far",
        paper="Jung et al. 2024, arXiv:2404.04656",
        beta=0.01,
        hyperparameters=(DELTA,),
        stateful=True,
        disagreement="delta is the mean of all rewards seen, those of the batch included, as in TRL 0.x and the paper; "
        "`--delta none` is TRL 1.x and Liger",
    ),
    LossSpec(
        name="sppo_hard",
        summary="Self-Play Preference Optimization with hard win rates: each side is driven to its own target",
        when="iterated self-play; the likelihood of chosen answers must rise",
        formula="(log-ratio chosen - 1/(2 beta))^2 + (log-ratio rejected + 1/(2 beta))^2",
        paper="Wu et al. 2024, arXiv:2405.00675 (its 1/eta is beta here)",
        beta=0.001,
        disagreement="without the factor 1/2 of the authors' code, as in TRL and Liger",
    ),
    LossSpec(
        name="apo_zero",
        summary="Anchored Preference Optimization: chosen answers up, rejected answers down",
        when="chosen answers are better than what the policy writes",
        formula="1 - sigmoid(r_c) + sigmoid(r_r), r = beta log-ratio",
        paper="D'Oosterlinck et al. 2024, arXiv:2408.06266",
    ),
    LossSpec(
        name="apo_down",
        summary="Anchored Preference Optimization: both down, rejected answers further",
        when="the policy is better than the chosen answers",
        formula="sigmoid(r_c) + 1 - sigmoid(r_c - r_r), r = beta log-ratio",
        paper="D'Oosterlinck et al. 2024, arXiv:2408.06266",
    ),
    LossSpec(
        name="cal_dpo",
        summary="DPO plus a calibration of each side's log-ratio to +-1/(2 beta)",
        when="rewards shall keep a scale, and chosen answers their likelihood",
        formula="-log sigmoid(h) + 1/2 ((log-ratio chosen - 1/(2 beta))^2 + (log-ratio rejected + 1/(2 beta))^2)",
        paper="Xiao et al. 2024 (Cal-DPO), arXiv:2412.14516",
        beta=0.001,
        reward=replace(LOG_RATIO, times_beta=False),
        disagreement="calibration per pair, with the authors' factor 1/2; their code adds one mean over the batch to every pair, "
        "which gives the batch the same loss and gradient",
    ),
)

_WHOLE = (
    LossSpec(
        name="aot",
        summary="Alignment via Optimal Transport, paired: the policy's margins dominate the reference's, as distributions",
        when="preferences hold on the whole rather than pair by pair",
        formula="-(1-e) log sigmoid(beta d) - e log sigmoid(-beta d), d = sorted policy margins - sorted reference margins",
        paper="Melnyk et al. 2024, arXiv:2406.05882, paired",
        disagreement="a loss belongs to the pair whose policy margin has its rank; TRL returns them sorted",
        always_needs=_WHOLE_BATCH,
        hyperparameters=(LABEL_SMOOTHING,),
        takes_weights=False,
    ),
    LossSpec(
        name="aot_unpaired",
        summary="Alignment via Optimal Transport, unpaired: chosen log-ratios dominate rejected ones, as distributions",
        when="chosen and rejected answers belong to different prompts",
        formula="as aot, d = sorted log-ratios chosen - sorted log-ratios rejected",
        paper="Melnyk et al. 2024, arXiv:2406.05882, unpaired",
        disagreement="TRL 0.x calls it `aot_pair`",
        always_needs=_WHOLE_BATCH,
        hyperparameters=(LABEL_SMOOTHING,),
        takes_weights=False,
    ),
    LossSpec(
        name="beta_dpo",
        summary="DPO with beta set batch by batch, from how far its margins are from usual",
        when="the quality of the pairs varies, and one beta does not fit all",
        formula="dpo with beta (1 + alpha (mean margin of the batch - running mean margin)), no gradient through it",
        paper="Wu et al. 2024 (beta-DPO), arXiv:2407.08639",
        always_needs=_WHOLE_BATCH,
        hyperparameters=(
            Hyperparameter("beta_dpo_alpha", 0.6, "how strongly beta follows the batch", minimum=0.0),
            Hyperparameter("beta_dpo_momentum", 0.9, "decay of the running mean margin", minimum=0.0, below=1.0),
        ),
        stateful=True,
        disagreement="the margins are not scaled by beta inside the formula, as in the authors' code; their filter, which "
        "leaves out a fifth of each batch by chance, is not part of the loss",
    ),
)

CATALOGUE: Mapping[str, LossSpec] = {
    spec.name: spec for spec in (*_LOGISTIC, *_TARGETS, *_EACH_SIDE, *_REFERENCE_FREE, *_LIKELIHOOD, *_WHOLE)
}

MIXTURES: Mapping[str, str] = {"mpo": "0.8*dpo+0.2*bco_pair(beta=0.1)+sft"}
"""Weighted sums with a name. MPO: Wang et al. 2024, arXiv:2411.10442."""


def losses_using(name: str) -> list[str]:
    """The losses that take a hyperparameter or modifier of this name."""
    return [spec.name for spec in CATALOGUE.values() if name in spec.accepts]


def all_hyperparameters() -> Mapping[str, Hyperparameter]:
    """By name, each as the first loss declares it; bounds and defaults of other losses may differ."""
    found: dict[str, Hyperparameter] = {}
    for spec in CATALOGUE.values():
        for name, parameter in spec.accepts.items():
            found.setdefault(name, parameter)
    return found
