"""The frozen reference of `precompute`: loaded when it is first needed, laid out the fastest way that is exact for it."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dpocli.cache.reader import PairStore
from dpocli.cache.reuse import Reusable
from dpocli.config.commands import PrecomputeOptions
from dpocli.console.progress import Progress
from dpocli.data.preference import EncodedPair
from dpocli.distributed.processes import Processes
from dpocli.errors import CacheError
from dpocli.model.identity import ModelFiles
from dpocli.scoring.frozen import frozen_scorer
from dpocli.scoring.layout_check import PairsInMemory, choose_layout, sample, window_of
from dpocli.scoring.passes import reference_logps, token_budget
from dpocli.scoring.scorer import PairScorer, environment
from dpocli.scoring.throughput import Throughput
from dpocli.training import step0

VERIFIED_AT_ONCE = 4096
"""Pairs in memory at a time."""


class Reference:
    """Gives pairs their log-probs: taken over from old caches where they have them, else scored.

    Args:
        files: of the model. It is not loaded before a pair has to be scored.
        options: of the command.
        dtype: of the forward pass.
        team: the processes that share one copy of the model. They keep step: all go through every method together.
        reusable: old caches.
        inform: told how pairs are scored (information for the parts).
        say: told what the user should know.
    """

    def __init__(
        self,
        files: ModelFiles,
        options: PrecomputeOptions,
        dtype: torch.dtype,
        team: Processes,
        reusable: Reusable,
        inform: Callable[[dict[str, str]], None],
        say: Callable[[str], None],
    ) -> None:
        self._files, self._options, self._dtype = files, options, dtype
        self._team = team
        self.reusable = reusable
        self._inform, self._say = inform, say
        self._longest_tried = 0
        self._num_reused = 0

    def complete(
        self, pairs: Sequence[EncodedPair], progress: Progress, check_stop: Callable[[], None]
    ) -> list[EncodedPair]:
        """The pairs of a tile, in their order, with log-probs. `check_stop` is called before each pass, and may raise."""
        known = self.reusable.take_over(pairs)
        open_places = [place for place, pair in enumerate(known) if pair.reference is None]
        self._num_reused += len(known) - len(open_places)
        progress.update(pairs=len(known) - len(open_places))
        if open_places:
            todo = [known[place] for place in open_places]
            self._settle(todo)
            with self._throughput.clock():
                scored = reference_logps(self._scorer, todo, progress, check_stop, self._team)
            for place, pair in zip(open_places, scored, strict=True):
                known[place] = pair
        return known

    def verify(self, store: PairStore, count: int, progress: Progress) -> step0.Step0:
        """Scores pairs of a cache again, drawn anew each time.

        Raises:
            CacheError: they are not what the cache holds.
        """
        if not len(store):
            raise CacheError(f"--verify {count}: the cache {store.directory} holds no pair.")
        positions = self._team.from_first(np.sort(np.random.default_rng().permutation(len(store))[:count]))
        differences: list[step0.Difference] = []
        for start in range(0, len(positions), VERIFIED_AT_ONCE):
            cached = store.load(positions[start : start + VERIFIED_AT_ONCE])
            self._settle(cached)
            scored = reference_logps(self._scorer, cached, progress, lambda: None, self._team)
            for before, now in zip(cached, scored, strict=True):
                assert now.reference
                differences.append(step0.Difference.of(before, now.reference))
        found = step0.judge(differences, step0.TOLERANCE[self._dtype])
        if not found.holds:
            raise CacheError(
                f"--verify {count}: the cache {store.directory} does not hold what this model gives: {found}. If versions or "
                "devices differ from when it was made, that may be their arithmetic; else make the cache anew."
            )
        return found

    def figures(self) -> dict[str, Any]:
        """For `summary.json`: how pairs were scored, and how many were not."""
        used = {"scoring": self._throughput.summary()} if self._longest_tried else {}
        return {"reused": self._num_reused} | used

    @property
    def num_splits(self) -> int:
        """Passes for which the memory was not enough."""
        return self._throughput.num_splits if self._longest_tried else 0

    @cached_property
    def _scorer(self) -> PairScorer:
        budget = token_budget(self._options.scoring.token_budget, self._team.device)
        return frozen_scorer(self._files, self._options.model, self._dtype, self._team, budget)

    @cached_property
    def _throughput(self) -> Throughput:
        return Throughput(self._scorer)

    def _settle(self, pairs: Sequence[EncodedPair]) -> None:
        """Once; and again where pairs come that reach further beyond what the model looks back over."""
        tile = PairsInMemory(pairs)
        longest, window = int(tile.lengths.max()), window_of(self._scorer)
        reaches_further = window and longest > window and longest > 1.25 * self._longest_tried
        is_first_beyond = window and self._longest_tried <= window < longest
        if self._longest_tried and not (reaches_further or is_first_beyond):
            return
        choose_layout(
            self._scorer, sample(self._scorer, [tile], seed=0), self._options.scoring.layout, self._team, self._say
        )
        self._longest_tried = longest
        self._inform(environment(self._team.device, self._scorer))
