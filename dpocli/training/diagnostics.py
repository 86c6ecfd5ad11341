"""Warnings about a run, each once, and what to try.

A function of the rows of `metrics.jsonl`: who reads the rows of a run again comes to the same warnings. Figures of
single batches are noise, so that a warning needs several rows that agree; fewer than 20 rows are left in peace.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from dpocli.config.loss_expression import LossChoice
from dpocli.training.schedule import Schedule

WINDOW, LARGEST_WINDOW, SHARE_OF_RUN = 10, 100, 0.02
"""Rows whose median is "now"; more in long runs, where each step is a chance to be wrong. Before twice as many
nothing is said of how a run goes."""

FALL_NATS = 5.0
"""How far the chosen answers must have lost log-prob, a mean over pairs (e^-5: 150 times less likely) …"""

FALL_OF_MARGIN = 0.25
"""… and which share of the margin's gain that must be: else it is the rejected answers that move."""

STANDARD_ERRORS, MEDIAN_ERROR = 3.0, 1.25
"""By which the fall must exceed both; the standard error of a median, in standard errors of a mean."""

CERTAIN_PAIRS, CERTAIN_ROWS = 100, 3
"""Pairs, in so many rows from the second step on, that are all ranked right when they are seen for the first time."""

NEAR_LN_2, ALL_NEAR_LN_2, SMALL_MARGIN = 0.002, 0.01, 0.01
"""|loss - ln 2| as a median and in every row, and reward margin, of a policy that has not moved …"""

LATEST_START = 0.25
"""… after this share of the steps."""

EXPLODED, EXPLODED_ALONE = 10.0, 100.0
"""Times the usual gradient norm: in 3 of 5 rows, or in a single one."""

USUAL_ROWS, USUAL_ROWS_AT_LEAST = 50, 20

SATURATED_LOSS = 0.01
"""-log σ(margin), a mean over the pairs of the latest rows. What is left of a gradient is 1 - σ, which is never more."""

TRUNCATED_SHARE = 0.1

STARTS_AT_LN_2 = frozenset({"dpo", "dpo_norm", "robust", "dpop", "aot", "aot_unpaired", "beta_dpo"})
"""Losses that are ln 2 where policy and reference agree."""

SATURATES = frozenset(
    {"dpo", "dpo_norm", "dpo_reference_free", "dpop", "r_dpo", "hinge", "simpo", "simpo_hinge", "alphapo", "aot"}
    | {"aot_unpaired", "beta_dpo"}
)
"""Losses that go to 0 with their gradient as margins grow; label smoothing keeps them from it."""

LOWERS_CHOSEN = frozenset({"apo_down"})
"""Losses that are made to lower the chosen answers."""

LIKELIHOOD_TERMS = frozenset({"sft", "rpo", "cpo", "orpo", "slic"})

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunWarning:
    """Something that is wrong."""

    kind: str
    step: int
    """After which it was seen; 0: before training."""
    text: str
    """What was found, what it means, what to try."""


class Diagnostics:
    """Looks at the rows of one run, in their order.

    Args:
        loss: which warnings make sense depends on it.
        schedule: how many pairs a row covers, and how many steps there are to be.
    """

    def __init__(self, loss: LossChoice, schedule: Schedule) -> None:
        self._loss, self._schedule = loss, schedule
        self._checks: dict[str, Callable[[Row], str | None]] = {
            "likelihood displacement": self._displacement,
            "accuracy 1.0 from the start": self._certainty,
            "loss stuck at ln 2": self._standstill,
            "gradient norm exploding": self._explosion,
            "margins saturating": self._saturation,
        }
        """Those that have not been said."""
        self._num_rows = 0
        self._last_step = 0
        self._first_row: Row = {}
        self._window = min(LARGEST_WINDOW, max(WINDOW, round(SHARE_OF_RUN * schedule.num_steps)))
        self._recent: deque[Row] = deque(maxlen=self._window)
        self._first_evaluation: Row = {}
        self._last_evaluation: Row = {}
        self._norms: deque[float] = deque(maxlen=USUAL_ROWS + 5)
        self._first_norms: list[float] = []
        self._certain_rows: int | None = 0

    def see(self, row: Row) -> list[RunWarning]:
        """What is to be said after this row and was not said after one before. A row that was seen changes nothing."""
        if not self._take_in(row):
            return []
        found = {kind: check(row) for kind, check in self._checks.items()}
        said = [RunWarning(kind, int(row["step"]), text) for kind, text in found.items() if text]
        for warning in said:
            del self._checks[warning.kind]
        return said

    def _take_in(self, row: Row) -> bool:
        is_new = False
        if row.get("eval/loss") is not None and row["step"] > self._last_evaluation.get("step", -1):
            # Beside its training figures, or added to a row whose evaluation had been cut short.
            self._first_evaluation = self._first_evaluation or row
            self._last_evaluation = row
            is_new = True
        if row.get("loss") is None or row["step"] <= self._last_step:
            return is_new
        self._num_rows += 1
        self._last_step = row["step"]
        self._first_row = self._first_row or row
        self._recent.append(row)
        if (norm := row.get("grad_norm")) is not None:
            self._norms.append(norm)
            if len(self._first_norms) < USUAL_ROWS_AT_LEAST:
                self._first_norms.append(norm)
        self._count_certain(row)
        return True

    def _count_certain(self, row: Row) -> None:
        """Rows so far in which all pairs were ranked right; None once there was another, or pairs come again."""
        if self._certain_rows is None or row["step"] <= 1:  # at step 1 every pair is a tie
            return
        is_certain = row.get("rewards/accuracies") == 1 and row.get("epoch", 0.0) <= 1
        self._certain_rows = self._certain_rows + 1 if is_certain else None

    def _latest(self, name: str) -> list[float]:
        """Of the latest rows; nothing where there are too few rows, or they lack it."""
        values = [row[name] for row in self._recent if row.get(name) is not None]
        return values if self._num_rows >= 2 * self._window and len(values) == self._window else []

    def _now(self, name: str) -> float | None:
        return median(values) if (values := self._latest(name)) else None

    def _displacement(self, row: Row) -> str | None:
        if any(term.name in LOWERS_CHOSEN for term in self._loss.terms) or self._loss.ranked_by.name == "sft":
            return None
        for fall, error, gain, whose in (self._moved_in_training(), self._moved_held_out(row)):
            if gain > 0 and fall - STANDARD_ERRORS * error >= max(FALL_NATS, FALL_OF_MARGIN * gain):
                return (
                    f"The chosen answers have lost {fall:.1f} nats of log-prob on average ({whose}) while the margin has "
                    f"grown by {gain:.1f}: the policy moves away from both sides, and what becomes likelier instead is "
                    f"neither (likelihood displacement). {self._against_displacement()}"
                )
        return None

    def _moved_in_training(self) -> tuple[float, float, float, str]:
        """Nats that the chosen side has lost (with its standard error) and that the margin has gained against the reference.

        Where the policy began elsewhere than at the reference, batches differ too much, and held-out pairs must tell.
        """
        chosen, margin = self._latest("logratios/chosen"), self._now("logratios/margins")
        began_there = abs(self._first_row.get("logratios/chosen") or 0.0) < 1.0
        if not chosen or margin is None or not began_there:
            return 0.0, 0.0, 0.0, ""
        error = MEDIAN_ERROR * stdev(chosen) / math.sqrt(len(chosen))
        return -median(chosen), error, margin, "training pairs, against the reference"

    def _moved_held_out(self, row: Row) -> tuple[float, float, float, str]:
        """The same since the first evaluation. The pairs are the same each time: no noise."""
        first = self._first_evaluation
        if row is not self._last_evaluation or self._num_rows < 2 * WINDOW or first is row:
            return 0.0, 0.0, 0.0, ""
        chosen, rejected = (
            (row.get(name) or 0.0) - (first.get(name) or 0.0) for name in ("eval/logps/chosen", "eval/logps/rejected")
        )
        return -chosen, 0.0, chosen - rejected, "held-out pairs, since the first evaluation"

    def _against_displacement(self) -> str:
        if any(term.name in LIKELIHOOD_TERMS for term in self._loss.terms):
            return "Try a larger weight of the likelihood term, or a higher --beta."
        label = self._loss.label
        dpop = ", --loss dpop" if self._loss.is_single and label == "dpo" else ""
        return f'Try a term that keeps them likely (--loss "{label}+0.2*sft"){dpop}, or a higher --beta.'

    def _certainty(self, _: Row) -> str | None:
        rows = self._certain_rows or 0
        pairs = rows * self._schedule.batch_size
        if rows < CERTAIN_ROWS or pairs < CERTAIN_PAIRS:
            return None
        return (
            f"Accuracy is 1.0 from the start: {pairs:,} pairs, none of them seen before, are all ranked right. Something "
            "tells the sides apart that is no preference (a marker, a template, length, an empty answer), or the policy "
            "has learned these pairs before. Look at some pairs, and at the triage in the cache's summary.json."
        )

    def _standstill(self, row: Row) -> str | None:
        key = self._key_of(STARTS_AT_LN_2)
        losses, margin = self._latest(key) if key else [], self._now("rewards/margins")
        if not losses or margin is None or row["step"] < LATEST_START * self._schedule.num_steps:
            return None
        loss, farthest = median(losses), max(abs(loss - math.log(2)) for loss in losses)
        if abs(loss - math.log(2)) > NEAR_LN_2 or farthest > ALL_NEAR_LN_2 or abs(margin) > SMALL_MARGIN:
            return None
        return (
            f"The loss is still at ln 2 ({loss:.4f}), where it began: the policy does not move away from the reference. "
            "Try a higher --learning-rate (ten times, say); if that changes nothing, look at whether the two sides of the "
            "pairs differ in more than a few tokens."
        )

    def _explosion(self, _: Row) -> str | None:
        norms = list(self._norms)
        usual, latest = norms[:-5], norms[-5:]
        if len(usual) < USUAL_ROWS_AT_LEAST:
            return None
        # Where margins saturate gradients all but vanish, and the next hard batch is no explosion: hence the beginning too.
        normal = max(median(usual), median(self._first_norms))
        large = [norm for norm in latest if norm > EXPLODED * normal]
        if not (len(large) >= 3 or latest[-1] > EXPLODED_ALONE * normal) or normal <= 0:
            return None
        return (
            f"The gradient norm has risen to {max(latest):.3g}, {max(latest) / normal:,.0f} times its usual {normal:.3g}: the "
            "run may be about to break. Try a lower --learning-rate or a larger --warmup-ratio, and keep --max-grad-norm on."
        )

    def _saturation(self, _: Row) -> str | None:
        key = self._key_of(SATURATES, smoothed=False)
        losses = self._latest(key) if key else []
        if not losses or (loss := fmean(losses)) >= SATURATED_LOSS:
            return None
        smooth = ", or --label-smoothing 0.1," if "label_smoothing" in self._loss.ranked_by.spec.accepts else ""
        return (
            f"Margins saturate: the loss is {loss:.2g}, nearly all pairs are ranked right by so much that hardly any gradient "
            "is left, and further steps only memorise. Try fewer epochs or a lower --learning-rate; a loss with a target "
            f"(--loss ipo){smooth} keeps margins from growing without end."
        )

    def _key_of(self, names: frozenset[str], *, smoothed: bool = True) -> str | None:
        """The metric that holds the loss of the first term among `names`; of those with label smoothing where that may be.

        WPO's weights scale the loss, so that it says nothing of the margins.
        """
        for term in self._loss.terms:
            numbers = term.hyperparameters
            if term.name in names and "weighting" not in numbers and (smoothed or not numbers.get("label_smoothing")):
                return "loss" if self._loss.is_single else f"loss/{term.name}"
        return None


def warnings_of(rows: Sequence[Row], loss: LossChoice, schedule: Schedule) -> list[RunWarning]:
    """Everything that there was to say about a run."""
    watch = Diagnostics(loss, schedule)
    return [warning for row in rows for warning in watch.see(row)]


def truncation(num_truncated: int, num_pairs: int, max_length: int | None) -> RunWarning | None:
    """Where many pairs were cut when they were encoded."""
    if num_truncated <= TRUNCATED_SHARE * num_pairs:
        return None
    limit = f" to {max_length:,} tokens" if max_length else ""
    return RunWarning(
        "many truncated pairs",
        0,
        f"{num_truncated:,} of {num_pairs:,} training pairs ({num_truncated / num_pairs:.0%}) were cut{limit}: what makes "
        "the one side better may be in the rest, and cut answers have no end. Rebuild the cache with a larger "
        "--max-length (--reuse takes over the pairs that stay the same), or leave such pairs out with --truncation drop.",
    )
