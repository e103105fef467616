"""The records that pass between search, trainer and store. Plain values; no torch."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fasttrain.spec import SHORT, Variant


class Outcome(enum.StrEnum):
    """How a probe ended. Only ``FITTED`` counts as a fit; the others say why there was none."""

    FITTED = "fitted"
    PLATEAUED = "plateaued"
    DIVERGED = "diverged"
    OUT_OF_BUDGET = "out_of_budget"

    @property
    def message(self) -> str:
        """What the outcome means, in a sentence."""
        return _MESSAGES[self]


_MESSAGES = {
    Outcome.FITTED: "every training sample was classified strictly right at a check",
    Outcome.PLATEAUED: "the best training loss fell by less than 10 % since half of the steps so far",
    Outcome.DIVERGED: "the training loss became NaN or infinite",
    Outcome.OUT_OF_BUDGET: "the steps ran out before every sample was right",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One variant as the search sees it.

    Attributes:
        index: position of the variant in the scan; the key that probes and estimates carry.
        variant: its settings.
        params: trained parameters, biases included.
        n_min: smallest number of samples that may be tried.
        n_max: largest number of samples that may be tried.
        elements: numbers that a pass over one sample keeps, about; 0 for the perceptrons, whose sizes tell.
    """

    index: int
    variant: Variant
    params: int
    n_min: int
    n_max: int
    elements: int = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """One training run to be made: fresh data and fresh initial weights, keyed by (seed, n).

    Attributes:
        variant: ``Problem.index``.
        n: training samples.
        seed: 0, 1, 2, ... at each n; from ``spec.CONFIRM`` on where it confirms the winner of a race, from
            ``spec.SHORT`` on where it may take only a third of the budget.
        round: round of the search that asked for it; 0 is the bracket.
    """

    variant: int
    n: int
    seed: int
    round: int = 0

    @property
    def short(self) -> bool:
        """Whether it may take only a third of the budget."""
        return self.seed >= SHORT


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """Training curve of one probe at its checks, thinned; three arrays of one length.

    Attributes:
        step: int64, optimizer steps taken.
        train_loss: float64, mean cross-entropy over all n samples, in nats.
        train_accuracy: float64, share of the n samples that are strictly right.
    """

    step: np.ndarray
    train_loss: np.ndarray
    train_accuracy: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class ProbeResult:
    """What one training run gave.

    Attributes:
        probe: the run that was asked for.
        outcome: how it ended.
        steps: optimizer steps taken.
        fit_step: step of the first fit; -1 if there was none.
        train_loss: mean cross-entropy over the n samples at the last check, in nats.
        train_error: share of the n samples not strictly right at the last check.
        test_accuracy: share of the held-out samples classified right at the end of a fitted run; NaN where none was.
        weights: parameters at its end by name, if they were to be kept.
        history: its training curve.
        started: seconds after the start of the scan at which it took a slot.
        finished: seconds after the start of the scan at which it left.
        train_seconds: its share of the time that the batches it was in took.
    """

    probe: Probe
    outcome: Outcome
    steps: int
    fit_step: int
    train_loss: float
    train_error: float
    history: History
    started: float = math.nan
    finished: float = math.nan
    train_seconds: float = math.nan
    test_accuracy: float = math.nan
    weights: Mapping[str, np.ndarray] | None = None

    @property
    def fitted(self) -> bool:
        """Whether every sample was fitted."""
        return self.outcome is Outcome.FITTED


Saved = Mapping[str, np.ndarray]
"""A run under way, as arrays from which it goes on bit for bit: its ``step``; its ``checks`` so far, float64 [K, 2],
mean loss and samples not strictly right; its ``clock``, float64 [3], seconds: after the start of the scan when it took
a slot, in training, and after the start when it was saved; and what its backend adds."""


class Terminated(KeyboardInterrupt):
    """SIGTERM while a scan ran; all that finished is kept."""


@dataclass(frozen=True, slots=True)
class Curvature:
    """Where one training run ended (``curvature.measure``). NaN where it could not be had.

    Attributes:
        loss: mean cross-entropy over the n samples at its parameters, computed in float64, in nats.
        gradient_norm: Euclidean norm of the gradient of that loss with respect to all parameters.
        loss_slope: d ln loss / d ln step over the last half of its training curve.
        lambda_min: smallest eigenvalue of the Hessian of that loss.
        residual_min: |H v - lambda v| of it; an eigenvalue lies within.
        lambda_max: largest eigenvalue.
        residual_max: of it.
        products: Hessian-vector products that this took.
        converged: whether both residuals are at most 1e-5 of the larger |eigenvalue|.
    """

    loss: float
    gradient_norm: float
    loss_slope: float
    lambda_min: float
    residual_min: float
    lambda_max: float
    residual_max: float
    products: int
    converged: bool


class Censored(enum.StrEnum):
    """Whether EMC50 lies outside of what could be measured."""

    NO = "no"
    ABOVE = "above"
    BELOW = "below"


class Race(enum.StrEnum):
    """Where a learning rate stands in the race of the variants that differ in nothing else."""

    NONE = ""
    RUNNING = "running"
    DROPPED = "dropped"
    LOST = "lost"
    WON = "won"


MISFIT_P = 0.02
"""An estimate's p-value of the test of its model below which it is flagged."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """EMC50 of one variant from its finished probes.

    Of the winner of a race, all but the fields named ``race...`` come from its confirming probes alone, ``third`` and
    the elasticity from its short ones too.

    Attributes:
        variant: ``Problem.index``.
        emc50: n at which the whole probability of a fit is one half (posterior median); NaN if censored or unknown.
        emc50_low: lower end of the interval; the bound n_max if censored above, 0 if censored below.
        emc50_high: upper end; infinite if it lies beyond n_max or was not reached, n_min if censored below.
        slope: s in P(fit) = (1 - lapse) / (1 + exp(s (ln n - ...))), posterior median.
        lapse: probability to fail where n is no obstacle, posterior mean.
        censored: whether EMC50 lies above n_max or below n_min.
        budget_spent: whether max_probes (or the last admissible seed) ended the search before the tolerance was met.
        finished: whether the search of this variant has ended.
        n_probes: finished probes behind the estimate.
        misfit_p: p-value of a test that the verdicts follow the model (``Posterior.misfit``).
        third: EMC50 at a third of the budget, its interval and the probes behind it; None where it is not measured.
        elasticity: d ln EMC50 / d ln budget between the two budgets (posterior median); NaN without both.
        elasticity_low: lower end of its interval, of the same content.
        elasticity_high: upper end.
        race: where it stands: no race, running, dropped as clearly worse, lost at the end, or won.
        race_emc50: ``emc50`` from the race's own probes; NaN without a race. Of a winner it is too high.
        race_low: ``emc50_low`` from these.
        race_high: ``emc50_high`` from these.
    """

    variant: int
    emc50: float
    emc50_low: float
    emc50_high: float
    slope: float
    lapse: float
    censored: Censored
    budget_spent: bool
    finished: bool
    n_probes: int
    misfit_p: float = 1.0
    third: "Estimate | None" = None
    elasticity: float = math.nan
    elasticity_low: float = math.nan
    elasticity_high: float = math.nan
    race: Race = Race.NONE
    race_emc50: float = math.nan
    race_low: float = math.nan
    race_high: float = math.nan

    @property
    def misfit(self) -> bool:
        """Whether the verdicts contradict the model that the estimate rests on."""
        return self.misfit_p < MISFIT_P

    @property
    def budget_limited(self) -> bool:
        """Whether ten times the budget would add more than 10 % to EMC50, if the elasticity held that far."""
        return self.elasticity > math.log(1.1) / math.log(10.0)
