"""The frozen reference of `precompute`: loaded when first needed, in the fastest layout that is exact for it."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dpocli.cache.reader import PairStore
from dpocli.cache.reuse import Reusable
from dpocli.config.commands import PrecomputeOptions
from dpocli.console.console import Console
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

PAIRS_AT_ONCE = 4096
"""Pairs of a cache that `verify` holds in memory."""


class Reference:
    """Gives pairs their log-probs, from old caches where they have them, else by scoring.

    All methods are collective: call them on every rank of `team`.

    Args:
        files: of the model, which is loaded when a pair has to be scored.
        options: of the command.
        dtype: of the forward pass.
        team: the processes that share one copy of the model.
        reusable: old caches.
        console: for what the layout check reports.

    Attributes:
        information: how pairs are scored, for the fingerprint of the parts.
    """

    def __init__(
        self,
        files: ModelFiles,
        options: PrecomputeOptions,
        dtype: torch.dtype,
        team: Processes,
        reusable: Reusable,
        console: Console,
    ) -> None:
        self.reusable = reusable
        self.information = environment(team.device)
        self._files, self._options, self._dtype = files, options, dtype
        self._team, self._console = team, console
        self._longest_checked = 0
        """Tokens of the longest pair that the layout was checked with; 0 before the first check."""
        self._num_reused = 0

    def complete(
        self, pairs: Sequence[EncodedPair], progress: Progress, check_stop: Callable[[], None]
    ) -> list[EncodedPair]:
        """The pairs of a tile, in their order, with log-probs. `check_stop` is called before each pass; it may raise."""
        completed = self.reusable.fill_in(pairs)
        unscored = [index for index, pair in enumerate(completed) if pair.reference is None]
        self._num_reused += len(completed) - len(unscored)
        progress.update(pairs=len(completed) - len(unscored))
        if unscored:
            to_score = [completed[index] for index in unscored]
            self._choose_layout(to_score)
            with self._throughput.clock():
                scored = reference_logps(self._scorer, to_score, progress, check_stop, self._team)
            for index, pair in zip(unscored, scored, strict=True):
                completed[index] = pair
        return completed

    def verify(self, store: PairStore, count: int, progress: Progress) -> step0.Step0:
        """Score random pairs of a cache again, and compare.

        Raises:
            CacheError: the log-probs differ from those in the cache.
        """
        if not len(store):
            raise CacheError(f"--verify {count}: the cache {store.directory} holds no pair.")
        positions = self._team.from_first(np.sort(np.random.default_rng().permutation(len(store))[:count]))
        differences: list[step0.Difference] = []
        for start in range(0, len(positions), PAIRS_AT_ONCE):
            cached = store.load(positions[start : start + PAIRS_AT_ONCE])
            self._choose_layout(cached)
            scored = reference_logps(self._scorer, cached, progress, lambda: None, self._team)
            for before, now in zip(cached, scored, strict=True):
                assert now.reference
                differences.append(step0.Difference.of(before, now.reference))
        found = step0.judge(differences, step0.TOLERANCE[self._dtype])
        if not found.holds:
            raise CacheError(
                f"--verify {count}: the cache {store.directory} does not hold what this model gives: {found}. If versions or "
                "devices differ from when it was made, that may be their arithmetic; else rebuild the cache."
            )
        return found

    def figures(self) -> dict[str, Any]:
        """For `summary.json`: throughput of scoring, and the number of reused pairs."""
        used = {"scoring": self._throughput.summary()} if self._longest_checked else {}
        return {"reused": self._num_reused} | used

    @property
    def num_splits(self) -> int:
        """Passes that were split in two because memory ran out."""
        return self._throughput.num_splits if self._longest_checked else 0

    @cached_property
    def _scorer(self) -> PairScorer:
        budget = token_budget(self._options.scoring.token_budget, self._team.device)
        return frozen_scorer(self._files, self._options.model, self._dtype, self._team, budget)

    @cached_property
    def _throughput(self) -> Throughput:
        return Throughput(self._scorer)

    def _choose_layout(self, pairs: Sequence[EncodedPair]) -> None:
        """Choose the layout once, and again for pairs that exceed the attention window by more than those before."""
        tile = PairsInMemory(pairs)
        longest, window = int(tile.lengths.max()), window_of(self._scorer)
        reaches_further = window and longest > window and longest > 1.25 * self._longest_checked
        is_first_beyond = window and self._longest_checked <= window < longest
        if self._longest_checked and not (reaches_further or is_first_beyond):
            return
        pairs_to_try = sample(self._scorer, [tile], seed=0)
        choose_layout(self._scorer, pairs_to_try, self._options.scoring.layout, self._team, self._console.say)
        self._longest_checked = longest
        self.information = environment(self._team.device, self._scorer)
