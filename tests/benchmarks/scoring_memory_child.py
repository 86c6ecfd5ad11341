"""One measurement of `scoring_memory.py`, in its own process: prints a JSON object as the last line of stdout.

It imports dpocli or TRL, never both, so that it runs in either environment. That both had the same model and the same
pairs is seen from the log-probs, which the parent compares.
"""

import sys
import tempfile
from pathlib import Path

from measuring import SEED, Outcome, Pair, random_pairs, save_random_model

NUM_PAIRS = 8


def measured_pairs() -> list[Pair]:
    """The batch: rows of 300 to 700 tokens."""
    return random_pairs(NUM_PAIRS, 150, 350, SEED)


def with_dpocli(phase: str, model: Path, *, budget: bool, checkpointing: bool) -> Outcome:
    """All pairs in one pass, or cut by the commands' default token budget."""
    from with_dpocli import UNLIMITED, scored, trained

    tokens = None if budget else UNLIMITED
    if phase == "scoring":  # without gradients there is nothing to checkpoint
        return scored(model, measured_pairs(), budget=tokens)
    return trained(model, measured_pairs(), budget=tokens, checkpointing=checkpointing)


def with_trl(phase: str, model: Path, *, checkpointing: bool) -> Outcome:
    from with_trl import scored, trained

    if phase == "scoring":
        return scored(model, measured_pairs(), batch=NUM_PAIRS)
    return trained(model, measured_pairs(), batch=NUM_PAIRS, checkpointing=checkpointing)


def main(tool: str, phase: str, *flags: str) -> None:
    checkpointing = "checkpointing" in flags
    with tempfile.TemporaryDirectory() as directory:
        model = save_random_model(Path(directory))
        if tool == "dpocli":
            outcome = with_dpocli(phase, model, budget="budget" in flags, checkpointing=checkpointing)
        else:
            outcome = with_trl(phase, model, checkpointing=checkpointing)
    outcome.print()


if __name__ == "__main__":
    main(*sys.argv[1:])
