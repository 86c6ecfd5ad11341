"""Whether a run directory holds the same run: to go on with, finished already, or another one."""

from typing import Any

from dpocli.artifacts.files import read_json
from dpocli.config.models import TrainOptions
from dpocli.errors import UsageError
from dpocli.options import load_options

NEUTRAL = frozenset(
    "out as_json device token_budget scratch data reference gradient_checkpointing step0_tolerance "  # noqa: SIM905
    "log_every save_every keep_last track eval_every".split()
)
"""Options that cannot change a value of the run; and paths of pairs, whose contents the checkpoints remember."""


def finished_summary(options: TrainOptions) -> dict[str, Any] | None:
    """The summary of the same run where it is finished, else None.

    Raises:
        UsageError: the directory holds a run with other settings.
    """
    config = options.out / "config.yaml"
    if not config.is_file():
        return None
    try:
        earlier = load_options(TrainOptions, {"config": str(config)})
    except UsageError as error:
        raise UsageError(
            f"--out {options.out}: its config.yaml is not that of a training run ({error}) Give another directory."
        ) from None
    differing = [
        f"{name}: {getattr(earlier, name)} -> {getattr(options, name)}"
        for name in TrainOptions.model_fields
        if name not in NEUTRAL and getattr(earlier, name) != getattr(options, name)
    ]
    if differing:
        raise UsageError(
            f"--out {options.out}: it holds a run with other settings ({'; '.join(differing)}). Give another directory, or "
            "the settings of that run to go on with it."
        )
    summary = read_json(options.out / "summary.json")
    if not isinstance(summary, dict) or not (options.out / "model").is_dir():
        return None
    if (earlier.reference, earlier.data) != (options.reference, options.data):
        raise UsageError(
            f"--out {options.out}: it holds a finished run on the pairs of {earlier.reference or ', '.join(earlier.data)}. "
            "Give another directory for other pairs."
        )
    return summary
