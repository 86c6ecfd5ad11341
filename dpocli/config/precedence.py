"""What a flag replaces of a `--config` file beyond the option of its own name: options that say the same thing otherwise.

Two flags that do not go together stay an error, and so do two lines of one file.
"""

from collections.abc import Mapping
from itertools import permutations

from dpocli.config.loss_choice import names_in, numbers_of
from dpocli.config.shared_options import NUMBERS_OF_LOSSES, DataOptions
from dpocli.config.training_options import ADAMW_SETTINGS, NEW_ADAPTER_SETTINGS

_ENCODING = frozenset(DataOptions.model_fields) - {"data", "scratch"}
"""Of --data alone: a cache holds encoded pairs."""

ALTERNATIVES: tuple[tuple[tuple[str, frozenset[str]], ...], ...] = (
    (("warmup_ratio", frozenset()), ("warmup_steps", frozenset())),
    (("epochs", frozenset()), ("max_steps", frozenset())),
    (("reference", frozenset()), ("data", _ENCODING)),
    (("eval_reference", frozenset()), ("eval_fraction", frozenset())),
    (("adapter", frozenset()), ("lora_rank", frozenset(NEW_ADAPTER_SETTINGS))),
)
"""Each a choice between options: the option, and what has a meaning with it alone."""


def replaced(flags: Mapping[str, object], file: Mapping[str, object]) -> set[str]:
    """The fields of a file that do not count any more.

    A loss takes the numbers of the file's own loss with it, less those of a term that stays the first; where the file
    names none, its numbers are meant for any.

    Args:
        flags: what was given on the command line: field → text.
        file: what was given in the file: field → text.
    """
    gone: set[str] = set()
    for choice in ALTERNATIVES:
        for (name, _), (other, settings) in permutations(choice, 2):
            if name in flags and other in file:
                gone |= {other, *settings}
    if "loss" in flags and "loss" in file:
        gone |= _numbers_of_another_loss(str(flags["loss"]), str(file["loss"]))
    if flags.get("optimizer") == "rmsprop":
        gone |= set(ADAMW_SETTINGS)
    return gone & file.keys() - flags.keys()


def _numbers_of_another_loss(flag: str, file: str) -> set[str]:
    """Those that a file gives for its own loss, and that mean nothing for the one of the flag."""
    now, before = names_in(flag), names_in(file)
    if flag == file or (now and set(now) == set(before)):
        return set()
    # `sft` only goes with a loss that compares the sides, wherever it stands.
    first, first_before = ([name for name in names if name != "sft"] or names for names in (now, before))
    kept = numbers_of(first[0]) if first and first_before and first[0] == first_before[0] else set()
    return set(NUMBERS_OF_LOSSES) - kept
