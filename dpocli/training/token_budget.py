"""The token budget of a run, settled before step 1: rehearsed on a GPU, estimated on a CPU, half as large after a shortage."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dpocli.cache.view import PairView
from dpocli.config.commands import TrainOptions
from dpocli.console.console import Console
from dpocli.errors import ExitCode, ResourceError, UsageError, brief_message, is_out_of_memory
from dpocli.run.directory import RunDirectory
from dpocli.run.status import Status
from dpocli.scoring.passes import DEFAULT_TOKEN_BUDGET, size_of_pass
from dpocli.training.optimizers import allocate_state, state_bytes
from dpocli.training.policy import Policy
from dpocli.training.rehearsal import SHARE, LargestPasses, Memory, Rehearsal, largest_share, set_token_budget
from dpocli.training.trainer import TrainSetup

SMALLEST, MOST_TOKENS = 16, 65536
"""Tokens: the least that `--token-budget` takes, and the largest default (beyond it a pass becomes larger, but hardly faster;
assumed, not measured)."""

STEP = 256
"""Larger budgets are multiples of it."""

WEIGHT_BYTES = GRADIENT_BYTES = 4
"""Of a trained parameter: master weight and gradient are float32."""

OUT_OF_MEMORY = "Out of memory with passes of"
"""How the message of a shortage begins; `status.json` keeps it."""


def choose_token_budget(setup: TrainSetup, previous: Status | None, memory: Memory | None, console: Console) -> None:
    """Set the token budget of the policy's passes to what fits into memory, the same on all processes.

    Args:
        setup: of the run; where passes are rehearsed, the optimizer's state is allocated.
        previous: the status of the start before, if there was one.
        memory: of the device; None on a CPU, where the default is estimated and what is given is taken.
        console: for notices.

    Raises:
        UsageError: `--token-budget` does not fit.
        ResourceError: not even a single pair fits.
    """
    policy, options = setup.policy, setup.options
    views = [view for view in (setup.training, setup.held_out) if view]
    given, wanted = options.scoring.token_budget, options.scoring.token_budget
    if previous and previous.token_budget and (given is None or given >= previous.token_budget):
        if ran_out_of_memory(previous):
            wanted = max(SMALLEST, previous.token_budget // 2)
            console.say(
                f"The start before ran out of memory with passes of {previous.token_budget:,} tokens (status.json): "
                f"--token-budget {wanted} from now on."
            )
        elif given is None:
            wanted = previous.token_budget  # the same passes as before the stop, and so the same rounding
    if memory is None:
        set_token_budget(policy, wanted or _estimated(policy, views, options))
        return
    layout, count = policy.scorer.packing.layout, policy.processes.count
    shares = [largest_share(view.sizes(layout), len(view), count, layout) for view in views[1:]]
    most = max(largest_share(views[0].sizes(layout), setup.schedule.batch_size, count, layout), *shares, SMALLEST)
    target = min(wanted or MOST_TOKENS, -(-most // STEP) * STEP)
    allocate_state(setup.optimizer)
    rehearsal = Rehearsal(policy, memory)
    sources = [LargestPasses(view, layout, target, with_gradient=view is views[0]) for view in views]
    for source in sources:
        for pair in source.extremes:
            size = size_of_pass(layout, [pair])
            if (reached := rehearsal.climb(source.beginnings(pair), size)) < size:
                raise ResourceError(
                    f"The pair of source row {pair.row} does not fit into memory beside weights, gradients and optimizer state: "
                    f"it takes {size:,} tokens, and {reached:,} fit. Give --gradient-checkpointing, --cpu-offload or --shards, "
                    "or a cache with a smaller --max-length."
                )
    reached = rehearsal.climb(lambda budget: [probe for source in sources for probe in source.within(budget)], target)
    fits = reached if reached == target or reached < STEP else reached // STEP * STEP
    rehearsal.end(wanted if wanted and reached == target else max(SMALLEST, fits))
    if given is not None and given == wanted and reached < target:
        raise UsageError(
            f"--token-budget {given} does not fit into memory: {fits} is the largest that does. Give that or less, or leave the "
            "option out."
        )


def ran_out_of_memory(status: Status) -> bool:
    """Whether the start of this status ended because memory ran out."""
    return status.exit_code == ExitCode.RESOURCES and status.message.startswith(OUT_OF_MEMORY)


@contextmanager
def reporting_shortage(policy: Policy, out: RunDirectory) -> Iterator[None]:
    """Memory that runs out in the block, as an error that says what the next start does; the status keeps the budget."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        budget = policy.scorer.packing.token_budget
        out.update(token_budget=budget)
        raise ResourceError(
            f"{OUT_OF_MEMORY} {budget:,} tokens ({brief_message(error)}). The same command resumes from the last "
            f"checkpoint with --token-budget {max(SMALLEST, budget // 2)}. Where that is not enough either, give "
            "--gradient-checkpointing, or a cache with a smaller --max-length."
        ) from error


def bytes_beside_weights(policy: Policy, options: TrainOptions) -> float:
    """A rule of thumb: gradients, the copy that computes, and optimizer state on this process."""
    copied: int = policy.scorer.compute_dtype.itemsize
    return policy.num_parameters() * (GRADIENT_BYTES + copied) + state_bytes(policy, options.optimizer)


def bytes_per_token(policy: Policy, options: TrainOptions) -> float:
    """A rule of thumb: what a token of a micro-batch leaves behind for the backward pass."""
    config = policy.scorer.model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    kept = hidden if options.policy.gradient_checkpointing else 8 * hidden + 4 * inner
    return float(layers * kept * policy.scorer.compute_dtype.itemsize)


def _estimated(policy: Policy, views: Sequence[PairView], options: TrainOptions) -> int:
    """The default of a CPU, or less where the host has no memory for it; never less than a single pair takes."""
    default = DEFAULT_TOKEN_BUDGET["cpu"]
    longest = max(int(view.sizes(policy.scorer.packing.layout).max()) for view in views)
    host = socket.gethostname()
    sharing = policy.processes.gather([host]).count(host)
    free = SHARE * available_memory() / sharing - bytes_beside_weights(policy, options)
    fits = int(max(free, 0.0) / bytes_per_token(policy, options))
    return min(policy.processes.gather([min(default, max(fits, longest, SMALLEST))]))


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that the host, and the control group of this process, can still give; infinity where neither is known."""
    free = float("inf")
    with suppress(OSError, ValueError, IndexError):
        free = int((root / "proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    group = root / "sys/fs/cgroup"
    with suppress(OSError, ValueError, IndexError):  # without a limit it says "max"
        cached = int((group / "memory.stat").read_text().partition("\nfile ")[2].split()[0])
        used = int((group / "memory.current").read_text()) - cached
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free
