"""A report of an evaluation made up, in the format of `metrics.json`, with its pairs: for tests that look at it."""

from typing import Any

import numpy as np

from dpocli.config.loss_expression import LossChoice
from dpocli.evaluation.pair_table import PairTable
from dpocli.report.token_heatmap import ExamplePair, ExamplePairs, ExampleToken

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def made_up_table(pairs: int = 640, seed: int = 0) -> PairTable:
    """Rewards of pairs of which about two thirds are right."""
    generator = np.random.default_rng(seed)
    chosen = generator.normal(-0.1, 0.9, pairs)
    margins = generator.normal(0.4, 0.9, pairs)
    columns = {
        "row": np.arange(pairs),
        "source": np.array([("wiki", "forum", "books")[row % 3] for row in range(pairs)], dtype=object),
        "chosen_rewards": chosen,
        "rejected_rewards": chosen - margins,
        "margins": margins,
        "losses": np.log1p(np.exp(-margins)),
    }
    return PairTable(columns, ("dpo",))


def made_up_report(table: PairTable | None = None, **more: Any) -> dict[str, Any]:
    """What evaluate says of such pairs, of three checkpoints of a run."""
    table = table or made_up_table()
    models = [_figures(table, f"run/checkpoints/step-{step}", step) for step in (300, 100, 200)]
    for less, model in zip((0, 0.04, 0.02), models, strict=True):
        model["rewards/accuracies"] -= less
        model["rewards/accuracies_interval"] = [bound - less for bound in model["rewards/accuracies_interval"]]
    return {
        "format": 2,
        **{name: value for name, value in models[0].items() if name not in ("name", "step", "run")},
        "model": "run/model",
        "reference": "ref-heldout",
        "dtype": "bfloat16",
        "environment": {"dpocli": "0.1.0", "torch": "2.11.0", "python": "3.12.3", "device": "NVIDIA H100 80GB HBM3"},
        "scoring": {"scoring": "shared", "attention": "flex_attention", "tokens_computed": 812_233, "seconds": 61.3},
        "loss_choice": LossChoice.of("dpo").model_dump(),
        "by_loss": {},
        "interval": {"level": 0.95, "method": "bootstrap over prompts", "resamples": 2000},
        "slices": {
            "source": [
                _slice("books", 213, 0.71),
                _slice("forum", 213, 0.58),
                _slice("wiki", 214, 0.69),
            ],
            "completion_tokens": [
                _slice("1 to 64", 400, 0.7),
                _slice("65 to 512", 236, 0.62),
                _slice("513 to 900", 4, 1),
            ],
        },
        "models": models,
        "comparisons": [
            _comparison("run/checkpoints/step-100", 0.04, 0.05),
            _comparison("run/checkpoints/step-200", 0.02, 0.001),
        ],
    } | more


def _figures(table: PairTable, name: str, step: int) -> dict[str, Any]:
    margins, chosen, rejected = (table.column(key) for key in ("margins", "chosen_rewards", "rejected_rewards"))
    accuracy = float((margins > 0).mean())
    edges = np.linspace(0.5, 1, 11)
    probabilities = 1 / (1 + np.exp(-np.abs(margins)))
    places = np.digitize(probabilities, edges[1:-1])
    return {
        "name": name,
        "step": step,
        "run": "run",
        "loss_choice": LossChoice.of("dpo").model_dump(),
        "pairs": len(margins),
        "prompts": len(margins) // 2,
        "loss": float(table.column("losses").mean()),
        "rewards/accuracies": accuracy,
        "rewards/accuracies_interval": [accuracy - 0.04, accuracy + 0.04],
        "rewards/accuracies_ties_half": accuracy,
        "rewards/accuracies_ties_half_interval": [accuracy - 0.04, accuracy + 0.04],
        "rewards/ties": 0.0,
        "rewards/within_noise": 0.06,
        "rewards/margins": float(margins.mean()),
        "rewards/margins_interval": [float(margins.mean()) - 0.07, float(margins.mean()) + 0.07],
        "rewards/margins_quantiles": {f"{q:g}": float(np.quantile(margins, q)) for q in QUANTILES},
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "accuracies": {
            "length_normalised": {"value": 0.66, "interval": [0.62, 0.70]},
            "policy": {"value": 0.55, "interval": [0.51, 0.59]},
            "reference": {"value": 0.49, "interval": [0.45, 0.53]},
            "pick_the_longer": {"value": 0.57, "interval": [0.53, 0.61]},
        },
        "over_length": {"rule": "longer", "rule_accuracy": 0.57, "value": 0.07, "interval": [0.01, 0.13]},
        "calibration": {
            "brier": 0.21,
            "bins": [
                {
                    "low": float(edges[place]),
                    "high": float(edges[place + 1]),
                    "mean_probability": float(probabilities[places == place].mean()),
                    "accuracy": float((margins[places == place] > 0).mean()),
                    "accuracy_interval": [0.4, 0.9],
                    "pairs": int((places == place).sum()),
                }
                for place in range(10)
                if (places == place).any()
            ],
        },
        "logratios/chosen": -1.2,
        "logratios/rejected": -5.1,
        "displacement": 0.61,
        "correlation/reward_length": -0.18,
    }


def _slice(name: str, pairs: int, accuracy: float) -> dict[str, Any]:
    half = 0.98 * (accuracy * (1 - accuracy) / pairs) ** 0.5
    return {
        "name": name,
        "pairs": pairs,
        "accuracy": accuracy,
        "interval": [max(0.0, accuracy - 2 * half), min(1.0, accuracy + 2 * half)],
        "margin": accuracy - 0.5,
        "too_small": pairs < 20,
    }


def _comparison(against: str, difference: float, half: float) -> dict[str, Any]:
    return {
        "model": "run/checkpoints/step-300",
        "against": against,
        "pairs": 640,
        "accuracy_difference": difference,
        "accuracy_interval": [difference - half, difference + half],
        "margin_difference": 3 * difference,
        "margin_interval": [3 * difference - half, 3 * difference + half],
    }


def made_up_tokens(text: str, seed: int = 0) -> tuple[ExampleToken, ...]:
    """A token a word; the last is not scored."""
    generator = np.random.default_rng(seed)
    words = [word if not place else f" {word}" for place, word in enumerate(text.split(" "))]
    last = len(words) - 1
    return tuple(ExampleToken(word, float(generator.normal(0, 0.8)), place != last) for place, word in enumerate(words))


def made_up_pair(row: int = 0, **more: Any) -> ExamplePair:
    """A pair of a few words."""
    values: dict[str, Any] = {
        "row": row,
        "pair_id": f"{row:032x}",
        "source": "forum",
        "margin": -1.25,
        "chosen_reward": -0.5,
        "rejected_reward": 0.75,
        "prompt": "<|im_start|>user\nName a tree, please.<|im_end|>\n<|im_start|>assistant\n",
        "chosen": made_up_tokens(
            "An oak is a tree that can live for  many hundred years.\n\nIt bears acorns. <|im_end|>", row
        ),
        "rejected": made_up_tokens(
            "Granite is a tree.\tIt is hard and heavy, and it does not grow. <|im_end|>", row + 1
        ),
    }
    return ExamplePair(**values | more)


def made_up_examples(**more: Any) -> ExamplePairs:
    """Two bad pairs, one of them long, and a good one."""
    long = made_up_pair(7, prompt="A long story. " * 300, chosen=made_up_tokens("and so on " * 200, 3))
    good = made_up_pair(5, margin=2.5, chosen_reward=1.5, rejected_reward=-1.0)
    return ExamplePairs((made_up_pair(3, **more), long), (good,), has_reference=True)
