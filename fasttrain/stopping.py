"""When a run is looked at and when it ends: the rules, and the record of one run's checks."""

import bisect
import math
from dataclasses import dataclass

import numpy as np

from fasttrain.records import History, Outcome
from fasttrain.spec import ScanSpec, Variant, budget_steps

PLATEAU_AFTER = 0.1  # share of the budget before which no run is called a plateau
PLATEAU_RATIO = 0.9  # best loss now over best loss at half of the steps so far, above which it is one
PLATEAU_LOSS = 0.15  # best loss over that of guessing, ln C, up to which none is: runs that near a fit often come to it
CHECKS = 100
"""Checks that a run has at least, where its budget is given in epochs or samples and has so many steps."""
_HISTORY_POINTS = 64


def plateau_loss(classes: int) -> float:
    """Best loss up to which no plateau ends a run, in nats."""
    return PLATEAU_LOSS * math.log(classes)


@dataclass(frozen=True, slots=True)
class StopRules:
    """Budget and cadence of a run.

    Attributes:
        steps: optimizer steps it may take.
        check_every: steps between checks; there is one at the last step too.
        early_stop: whether a plateau ends it.
        plateau_loss: best loss up to which no plateau ends it, in nats.
    """

    steps: int
    check_every: int
    early_stop: bool = True
    plateau_loss: float = 0.0

    @classmethod
    def of(cls, spec: ScanSpec, variant: Variant, n: int, short: bool = False) -> "StopRules":
        """Those of a run; all of them follow from its own budget, as if the scan had been asked with that.

        With a budget in steps checks come every ``check_every`` steps. One in epochs or samples may be few steps: there
        they come every min(check_every, max(1, steps // 100)).

        Args:
            spec: the scan.
            variant: what is trained.
            n: training samples.
            short: whether it may take a third of the budget only.
        """
        steps = budget_steps(spec, variant, n, short)
        every = spec.check_every if spec.budget is None else min(spec.check_every, max(1, steps // CHECKS))
        return cls(steps, every, spec.early_stop, plateau_loss(variant.classes))

    @property
    def plateau_after(self) -> int:
        """The first step at which a check may call the run a plateau; beyond the budget if none may."""
        return math.ceil(PLATEAU_AFTER * self.steps) if self.early_stop else self.steps + 1

    def next_check(self, step: int) -> int:
        """The first step after ``step`` at which the run is checked."""
        return min((step // self.check_every + 1) * self.check_every, self.steps)

    def step_of(self, checks: int) -> int:
        """The step of a run's check of this number, from 1."""
        return min(checks * self.check_every, self.steps)


class Monitor:
    """The checks of one run so far, and the verdict on it."""

    def __init__(self, rules: StopRules) -> None:
        self.rules = rules
        self._steps: list[int] = []
        self._losses: list[float] = []
        self._errors: list[float] = []
        self._best: list[float] = []

    def observe(self, step: int, loss: float, wrong: int, n: int) -> Outcome | None:
        """Records a check and says how the run ended, or None while it goes on.

        Args:
            step: optimizer steps taken.
            loss: mean cross-entropy over all n samples, in nats.
            wrong: samples not strictly right.
            n: training samples.
        """
        self._steps.append(step)
        self._losses.append(loss)
        self._errors.append(wrong / n)
        self._best.append(min(loss, self._best[-1] if self._best else math.inf))
        if not math.isfinite(loss):
            return Outcome.DIVERGED
        if wrong == 0:
            return Outcome.FITTED
        if step >= self.rules.plateau_after and self._flat(step):
            return Outcome.PLATEAUED
        return Outcome.OUT_OF_BUDGET if step >= self.rules.steps else None

    def record(self, losses: np.ndarray, wrong: np.ndarray, n: int) -> None:
        """Records a run's first checks, none of which ended it, all at once.

        Args:
            losses: [K], mean cross-entropy over all n samples, in nats; finite.
            wrong: [K], samples not strictly right, at least one.
            n: training samples.
        """
        self._steps = [self.rules.step_of(k + 1) for k in range(len(losses))]
        self._losses = losses.tolist()
        self._errors = (wrong / n).tolist()
        self._best = np.minimum.accumulate(losses).tolist()

    def checks(self, n: int) -> np.ndarray:
        """The checks so far, as ``record`` takes them: float64 [K, 2], losses and samples not strictly right."""
        return np.column_stack([np.array(self._losses), np.rint(np.array(self._errors) * n)]).reshape(-1, 2)

    def _flat(self, step: int) -> bool:
        half = bisect.bisect_right(self._steps, step / 2) - 1
        best = self._best[-1]
        return half >= 0 and best > self.rules.plateau_loss and best > PLATEAU_RATIO * self._best[half]

    @property
    def last(self) -> tuple[int, float, float]:
        """Step, mean training loss (nats) and training error (share) of the last check."""
        return self._steps[-1], self._losses[-1], self._errors[-1]

    def history(self) -> History:
        """The training curve, thinned to at most 64 evenly spaced checks, the first and the last among them."""
        count = len(self._steps)
        keep = np.unique(np.linspace(0, count - 1, min(count, _HISTORY_POINTS)).round().astype(int))
        return History(
            step=np.array(self._steps, dtype=np.int64)[keep],
            train_loss=np.array(self._losses)[keep],
            train_accuracy=1.0 - np.array(self._errors)[keep],
        )
