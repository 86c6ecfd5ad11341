"""The golden cases of the public implementations in our terms, and why some are deliberately not matched.

`python -m tests.objective.golden_cases` prints a table: loss, sources, largest difference.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpocli.config.loss_expression import LossChoice
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import LossOutput, compute

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parent / "goldens.json").read_text())
Case = Mapping[str, Any]


@dataclass(frozen=True)
class Ours:
    """What a golden case is called here."""

    loss: str
    numbers: dict[str, Any] = field(default_factory=dict)
    states: dict[str, dict[str, float]] = field(default_factory=dict)
    is_sorted: bool = False
    """The source returns the losses in the order of their rank."""
    is_batch_mean: bool = False
    """The source has one number for the batch in every pair: only the mean can be compared."""
    is_unpaired: bool = False
    """The source has a loss for each side, all chosen ones first: ours is their sum."""
    is_preference_term: bool = False
    """The source leaves out the likelihood of the chosen answer."""
    reward_factor: float | None = 1.0
    """Our rewards times this are the source's; None where it reports another quantity (`OTHER_REWARDS`)."""

    def output(self, inputs: str) -> LossOutput:
        return compute(LossChoice.of(self.loss, self.numbers), logps_named(inputs), self.states)


def column(values: Any) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def from_sums(inputs: Mapping[str, Any]) -> PairLogps:
    policy_chosen = column(inputs["policy_chosen_logps"])
    ones = [1] * len(policy_chosen)
    return PairLogps(
        policy_chosen,
        column(inputs["policy_rejected_logps"]),
        column(inputs["ref_chosen_logps"]),
        column(inputs["ref_rejected_logps"]),
        torch.tensor(inputs.get("chosen_lengths", ones)),
        torch.tensor(inputs.get("rejected_lengths", ones)),
    )


def from_tokens(inputs: Mapping[str, Any]) -> PairLogps:
    """The same from whole logits: rows 0-3 are the chosen sides, rows 4-7 the rejected."""
    ids, mask = torch.tensor(inputs["input_ids"])[:, 1:], torch.tensor(inputs["labels"])[:, 1:] != -100
    policy, reference = (
        torch.log_softmax(torch.tensor(inputs[name], dtype=torch.float64), -1)[:, :-1]
        for name in ("policy_logits", "ref_logits")
    )
    counts = mask.sum(1)
    shared = torch.minimum(counts[:4], counts[4:]).repeat(2)
    tail = mask & (mask.cumsum(1) > shared[:, None])

    def picked(log_probs: Tensor) -> Tensor:
        return log_probs.gather(-1, ids[..., None])[..., 0]

    columns: dict[str, Tensor] = {}
    for name, values, counted in (
        ("policy_{}", picked(policy), mask),
        ("reference_{}", picked(reference), mask),
        ("policy_{}_collision", torch.logsumexp(2 * policy, -1), mask),
        ("policy_{}_tail", picked(policy), tail),
        ("reference_{}_tail", picked(reference), tail),
    ):
        summed = (values * counted).sum(1)
        columns |= {name.format("chosen"): summed[:4], name.format("rejected"): summed[4:]}
    return PairLogps(**columns, chosen_tokens=counts[:4], rejected_tokens=counts[4:])


@cache
def logps_named(name: str) -> PairLogps:
    inputs = GOLDENS["inputs"][name]
    return from_tokens(inputs) if name == "tokens4" else from_sums(inputs)


def ours(case: Case) -> Ours | str:
    """The same loss in our terms, or why it is deliberately another."""
    source, given, variant = case["source"], case["params"], case["variant"]
    if given.get("ld_alpha") != 1.0 or "v0.24" in source:  # at 1 it changes nothing, wherever it is applied
        for (of_variant, part_of_source), reason in MISMATCHES.items():
            if of_variant == variant and part_of_source in source:
                return reason
    return nearest(case)


def nearest(case: Case) -> Ours | str:
    """Our loss of that name, although it may be another; a name that we do not have stays as it is."""
    source, given, variant = case["source"], case["params"], case["variant"]
    numbers = {name: given[name] for name in ("beta", "label_smoothing", "ld_alpha") if name in given}
    if "gamma_beta_ratio" in given:
        numbers["gamma"] = given["gamma_beta_ratio"] * given["beta"]
    build = _SPECIAL.get(variant)
    made = build(case, numbers) if build else Ours(_NAMES.get(variant, variant), numbers)
    if isinstance(made, str):
        return made
    where = f"{variant} of {source}"
    if any(re.search(pattern, where) for pattern in OTHER_REWARDS):
        return replace(made, reward_factor=None)
    without_beta = any(re.search(pattern, where) for pattern in REWARDS_WITHOUT_BETA)
    return replace(made, reward_factor=1 / given["beta"] if without_beta else 1.0)


_NAMES = {
    "dpo_sigmoid": "dpo",
    "cdpo": "dpo",
    "cdpo_reference_free": "dpo_reference_free",
    "ld_dpo": "dpo",
    "bco_pair_delta": "bco_pair",
    "wpo_open_instruct": "wpo",
}


def _weighted(case: Case, text: str) -> Ours:
    return Ours(text.format(**case["params"]), {"beta": case["params"]["beta"]})


def _divergence(case: Case, numbers: dict[str, Any]) -> Ours | str:
    _, kind, loss = case["variant"].split("_", 2)
    kind, loss = ("forward_kl", loss.removeprefix("kl_")) if kind == "forward" else (kind, loss)
    name = {"sigmoid": "dpo", "sigmoid_norm": "dpo_norm"}.get(loss, loss)
    if kind == "alpha":
        order = case["params"]["trl0_alpha"]
        if order < 0:
            return "alpha below 0 is outside what the paper allows"
        numbers["f_divergence"] = {0.0: "reverse_kl", 1.0: "forward_kl"}.get(order, "alpha")
        return Ours(name, numbers | ({"f_alpha": order} if numbers["f_divergence"] == "alpha" else {}))
    return Ours(name, numbers | {"f_divergence": kind})


def _beta_dpo(case: Case, numbers: dict[str, Any]) -> Ours:
    given = case["params"]
    numbers["beta_dpo_alpha"] = given["a"]
    return Ours("beta_dpo", numbers, {"beta_dpo": {"mean": given["gap_mean"]}})


def _ipo(case: Case, numbers: dict[str, Any]) -> Ours:
    averages = any(source in case["source"] for source in ("HALOs", "huggingface/trl", "LLaMA-Factory"))
    return Ours("ipo", numbers | {"reduction": "mean" if averages else "sum"})


def _slic(case: Case, numbers: dict[str, Any]) -> Ours:
    # It divides the sum by the padded width, the longest answer or row of the inputs.
    width = {"main8": 200, "tokens4": 11}[case["input_set"]]
    return Ours("slic", numbers | {"sft_weight": case["params"]["lambda_coef"] / width})


_SPECIAL: Mapping[str, Any] = {
    "aot": lambda _, numbers: Ours("aot", numbers, is_sorted=True),
    "aot_unpaired": lambda _, numbers: Ours("aot_unpaired", numbers, is_sorted=True),
    "alphapo": lambda case, numbers: Ours("alphapo", numbers | {"alphapo_alpha": case["params"]["alpha"]}),
    "beta_dpo": _beta_dpo,
    "bco_pair": lambda _, numbers: Ours("bco_pair", numbers | {"delta": "none"}),
    "cal_dpo_batch": lambda _, numbers: Ours("cal_dpo", numbers, is_batch_mean=True),
    "cpo_full": lambda case, numbers: Ours("cpo", numbers | {"sft_weight": case["params"]["alpha"]}),
    "cpo_sigmoid": lambda _, numbers: Ours("cpo", numbers | {"sft_weight": 0.0}),
    "cpo_simpo": lambda _, numbers: Ours("simpo+sft", numbers),
    "discopop": lambda case, numbers: Ours("discopop", numbers | {"discopop_tau": case["params"]["discopop_tau"]}),
    "dpo_bco_mix": lambda case, _: _weighted(case, f"{1 / 1.5}*dpo+{0.5 / 1.5}*bco_pair"),
    "dpop": lambda case, numbers: Ours("dpop", numbers | {"dpop_lambda": case["params"]["dpop_lambda"]}),
    "ipo": _ipo,
    "bco_unpaired": lambda _, numbers: Ours("bco_pair", numbers, is_unpaired=True),
    "apo_zero_unpaired": lambda _, numbers: Ours("apo_zero", numbers, is_unpaired=True),
    "orpo_or_term": lambda _, numbers: Ours("orpo", numbers, is_preference_term=True),
    "mpo": lambda case, _: _weighted(case, "0.8*dpo+0.2*bco_pair+sft"),
    "mpo_no_delta": lambda case, _: _weighted(case, "0.8*dpo+0.2*bco_pair(delta=none)+sft"),
    "rpo": lambda case, numbers: Ours("rpo", numbers | {"sft_weight": case["params"]["rpo_alpha"]}),
    "rpo_sum_nll": lambda case, numbers: Ours(
        "rpo", numbers | {"sft_weight": case["params"]["rpo_alpha"], "reduction": "sum"}
    ),
    "sft": lambda _, __: Ours("sft"),
    "slic": _slic,
    "wpo_hinge": lambda _, numbers: Ours("hinge", numbers | {"weighting": "wpo"}),
    "wpo_ipo": lambda _, numbers: Ours("ipo", numbers | {"weighting": "wpo"}),
    "wpo_sigmoid_norm": lambda _, numbers: Ours("dpo_norm", numbers | {"weighting": "wpo"}),
} | {name: _divergence for name in {case["variant"] for case in GOLDENS["cases"]} if name.startswith("fdiv_")}

_IGNORED = "ignores label smoothing under its plain sigmoid loss"
_BATCH_TOKENS = "one mean over all tokens of the micro-batch, which depends on how a batch is cut"
_POLICY_ONLY = "alpha on the policy only: a margin where the policy is the reference"
_NO_CLAMP = "does not clamp the weight to 1, as the paper's code does"
_UNPAIRED = "refused: learns from single answers, with a KL divergence estimated on other prompts"
_FULL_VOCABULARY = "refused: needs the KL divergence over the whole vocabulary"
_REFERENCE_FREE = "no such loss here: a reference-free variant of no paper"

MISMATCHES: dict[tuple[str, str], str] = {
    ("cdpo", "trl@1.16.0"): _IGNORED,
    ("cdpo", "Liger"): _IGNORED,
    (
        "ipo",
        "LLaMA-Factory:src/llamafactory/train/dpo/trainer.py:CustomDPOTrainer.compute_preference_loss[ipo] on trl 0.24",
    ): ("computes the sigmoid loss"),
    ("hinge", "on trl 0.24"): "computes the sigmoid loss",
    ("ld_dpo", "v0.24"): "counts positions from the start of the prompt",
    ("ld_dpo", "LLaMA-Factory"): _POLICY_ONLY,
    ("wpo", "v0.24"): "off by one token",
    ("wpo", "trl@1.16.0"): _NO_CLAMP,
    ("wpo_hinge", ""): _NO_CLAMP,
    ("wpo_ipo", ""): _NO_CLAMP,
    ("wpo_sigmoid_norm", ""): _NO_CLAMP,
    ("wpo_open_instruct", ""): "takes sums for means",
    ("rpo", "v0.24"): _BATCH_TOKENS,
    ("sft", ""): _BATCH_TOKENS,
    ("mpo", ""): _BATCH_TOKENS,
    ("orpo", "ORPOTrainer"): "takes the prompt's tokens into the likelihood",
    ("kto", ""): _UNPAIRED,
    ("kto_pair", ""): _UNPAIRED,
    ("tdpo1", ""): _FULL_VOCABULARY,
    ("tdpo2", ""): _FULL_VOCABULARY,
    ("cpo_hinge", ""): _REFERENCE_FREE,
    ("cpo_ipo", ""): _REFERENCE_FREE,
}
"""(variant, part of the source) → why we compute something else."""

OTHER_REWARDS = (
    "reference_free of (?!.*OpenRLHF)",  # they subtract the reference
    "fdiv_.* of ",  # they report the log-ratio, we what the loss ranks by
    r"(ipo|dpo_norm) of huggingface/trl@1\.16",  # they report sums
    "ipo of ContextualAI",
    "cal_dpo.* of ",  # they report the policy's log-probs
    "^(dpo_bco_mix|mpo)",  # weighted sums of rewards
)
REWARDS_WITHOUT_BETA = ("of NVIDIA-NeMo", "simpo of ContextualAI")
"""Patterns of `variant of source`."""


def tolerance(case: Case) -> float:
    """The precision that the source itself works in."""
    if "alpha" in case["variant"] and "fdiv" in case["variant"]:
        return 8e-6
    if case["variant"] == "exo_pair":
        return 3e-8
    if "NeMo" in case["source"]:  # + 1e-8 in denominators
        return 3e-8
    if "llamafactory/v1" in case["source"]:  # + 1e-6 in token counts
        return 3e-7
    return 1e-9 if case["dtype"] == "float64" else 3e-7


def difference(case: Case, made: Ours) -> float:
    """The largest difference of a pair's loss, relative where it is above 1."""
    losses, expected = made.output(case["input_set"]).losses, column(case["losses"])
    if made.is_unpaired:
        expected = expected[: len(losses)] + expected[len(losses) :]
    if made.is_preference_term:
        logps = logps_named(case["input_set"])
        losses = losses + logps.policy_chosen / logps.chosen_tokens
    if made.is_sorted:
        losses, expected = losses.sort().values, expected.sort().values
    if made.is_batch_mean:
        losses, expected = losses.mean(), expected.mean()
    return float(((losses - expected).abs() / expected.abs().clamp(min=1)).max())


def reward_difference(case: Case, made: Ours) -> float | None:
    """The same of the rewards; None where the source reports none, or another quantity."""
    if "chosen_rewards" not in case or made.reward_factor is None:
        return None
    output = made.output(case["input_set"])
    return max(
        float(((mine * made.reward_factor - column(theirs)).abs() / column(theirs).abs().clamp(min=1)).max())
        for mine, theirs in (
            (output.chosen_rewards, case["chosen_rewards"]),
            (output.rejected_rewards, case["rejected_rewards"]),
        )
    )


def _table() -> None:
    matched: dict[str, list[tuple[str, float]]] = {}
    for case in GOLDENS["cases"]:
        made = ours(case)
        if isinstance(made, Ours):
            matched.setdefault(made.loss, []).append((case["source"].partition(":")[0], difference(case, made)))
    for loss, entries in matched.items():
        sources = ", ".join(dict.fromkeys(source for source, _ in entries))
        print(f"| {loss} | {len(entries)} | {sources} | {max(value for _, value in entries):.1e} |")
    for (variant, source), reason in MISMATCHES.items():
        print(f"| {variant} | {source or 'all'} | {reason} |")


if __name__ == "__main__":
    _table()
