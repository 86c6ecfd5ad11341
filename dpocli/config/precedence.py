"""Which keys of a `--config` file a flag replaces beyond its own: alternatives, and hyperparameters of another loss.

Two flags that exclude each other are an error, and so are two lines of one file.
"""

from collections.abc import Mapping
from itertools import permutations

from dpocli.config.loss_expression import names_in, numbers_of
from dpocli.config.options import NUMBERS_OF_LOSSES, DataOptions
from dpocli.config.training_options import ADAMW_SETTINGS, LoraOptions

_ENCODING = frozenset(DataOptions.model_fields) - {"files", "scratch"}
"""Options of --data: the pairs of a cache are encoded already."""

_LORA = frozenset(f"lora_{name}" for name in LoraOptions.model_fields if name not in ("rank", "merge"))
"""Options of the adapter that --lora-rank creates."""

ALTERNATIVES: tuple[tuple[tuple[str, frozenset[str]], ...], ...] = (
    (("warmup_ratio", frozenset()), ("warmup_steps", frozenset())),
    (("epochs", frozenset()), ("max_steps", frozenset())),
    (("reference", frozenset()), ("data", _ENCODING)),
    (("eval_reference", frozenset()), ("eval_fraction", frozenset())),
    (("adapter", frozenset()), ("lora_rank", _LORA)),
)
"""Options of which only one is given; each with the options that have a meaning beside it alone."""


def replaced_keys(flags: Mapping[str, object], file: Mapping[str, object]) -> set[str]:
    """Keys of a file that flags replace: alternatives of a flag, and the hyperparameters of another loss.

    Where --loss names another loss than the file, the file's hyperparameters are dropped, except where the first term is the
    same loss. Where the file names no loss, its hyperparameters apply to any.

    Args:
        flags: given on the command line: key → text.
        file: given in the file: key → text.
    """
    dropped: set[str] = set()
    for choice in ALTERNATIVES:
        for (name, _), (other, settings) in permutations(choice, 2):
            if name in flags and other in file:
                dropped |= {other, *settings}
    if "loss" in flags and "loss" in file:
        dropped |= _hyperparameters_of_another_loss(str(flags["loss"]), str(file["loss"]))
    if flags.get("optimizer") == "rmsprop":
        dropped |= set(ADAMW_SETTINGS)
    return dropped & file.keys() - flags.keys()


def _hyperparameters_of_another_loss(flag: str, file: str) -> set[str]:
    """Hyperparameters that belong to the file's loss and not to that of the flag."""
    now, before = names_in(flag), names_in(file)
    if flag == file or (now and set(now) == set(before)):
        return set()
    # `sft` only accompanies a loss that compares the answers, at whatever place of the sum.
    first, first_before = ([name for name in names if name != "sft"] or names for names in (now, before))
    kept = numbers_of(first[0]) if first and first_before and first[0] == first_before[0] else set()
    return set(NUMBERS_OF_LOSSES) - kept
