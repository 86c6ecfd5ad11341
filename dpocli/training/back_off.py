"""Smaller passes where memory runs out in training: the step is made again, and means the same."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dpocli.errors import ResourceError
from dpocli.scoring.passes import size_of_pass
from dpocli.training.gradients import MicroBatch
from dpocli.training.policy import Policy
from dpocli.training.shortage import can_be_undone, throw_away_gradients

SMALLEST = 16
"""Tokens; what `--token-budget` may be at least."""


class BackOff:
    """Halves the token budget of a policy's passes where they do not fit, and remembers it.

    Args:
        policy: whose gradients of a step are thrown away.
        given: what `--token-budget` says.
        say: told once for every step at which the budget became smaller.
    """

    def __init__(self, policy: Policy, given: int | None, say: Callable[[str], None]) -> None:
        self._policy, self._given, self._say = policy, given, say
        self._before: int | None = None

    @property
    def budget(self) -> int:
        """Tokens of a pass from now on."""
        return self._policy.scorer.packing.token_budget

    def after(self, step: int, passes: Sequence[MicroBatch], shortage: str | None, *, together: bool) -> None:
        """Makes ready for doing a step again in smaller passes, after memory ran out in one of them.

        To be called where the error no longer holds on to what the pass had allocated.

        Args:
            step: its number.
            passes: this process's micro-batches.
            shortage: the error of this process in words; None where another one has met it.
            together: whether all processes are here, and will make the step again.

        Raises:
            ResourceError: no smaller pass is possible, or there are other processes, which wait in an exchange that this one
                has left and cannot come back to.
        """
        processes, layout = self._policy.processes, self._policy.scorer.packing.layout
        largest = max(size_of_pass(layout, pairs) for _, pairs in passes)
        smaller = max(SMALLEST, min(self.budget, largest) // 2)
        found = f"Step {step}: out of memory in a pass of at most {min(self.budget, largest):,} tokens ({shortage})"
        is_hopeless = shortage is not None and all(len(pairs) <= 1 for _, pairs in passes)
        if together and processes.any(is_hopeless) and not is_hopeless:
            raise ResourceError(f"Step {step}: a single pair of another process does not fit into its memory.")
        if is_hopeless:
            pair = max((pair for _, pairs in passes for pair in pairs), key=lambda pair: size_of_pass(layout, [pair]))
            raise ResourceError(
                f"{found}, which holds a single pair; the longest is that of source row {pair.row}, "
                f"{size_of_pass(layout, [pair]):,} tokens. Give --gradient-checkpointing, or a cache with a smaller --max-length; "
                "the same command line then goes on from the last checkpoint."
            )
        if not together and processes.count > 1:
            raise ResourceError(
                f"{found}, in the middle of an exchange with other processes, from which there is no way back. Give --token-budget "
                f"{smaller}: the same command line then goes on from the last checkpoint."
            )
        if not can_be_undone(self._policy):
            raise ResourceError(
                f"{found}, and this torch cannot go back in the middle of a step (2.13 can). Give --token-budget {smaller}: the "
                "same command line then goes on from the last checkpoint."
            )
        throw_away_gradients(self._policy)
        self._before = self._before or self.budget
        self._set(min(processes.gather([smaller])) if together else smaller)
        self._policy.scorer.tally.splits += 1

    def tell(self, step: int) -> None:
        """After a step that went well: says it where its passes had to become smaller."""
        if self._before:
            self._say(
                f"Step {step}: memory ran out with passes of {self._before:,} tokens, and the step was made again with "
                f"{self.budget:,}, as all that follow are (--token-budget). Its values are the same."
            )
        self._before = None

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what was asked for, where, and what it came to."""
        return {"given": self._given, "device": self._policy.processes.device.type, "tokens": self.budget}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Begins with the budget that a checkpoint remembers, unless another is asked for, or another device is used."""
        if state and {name: state[name] for name in ("given", "device")} == {
            name: self.state()[name] for name in ("given", "device")
        }:
            self._set(int(state["tokens"]))

    def _set(self, tokens: int) -> None:
        scorer = self._policy.scorer
        scorer.packing = replace(scorer.packing, token_budget=tokens)
