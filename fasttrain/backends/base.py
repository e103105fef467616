"""The contract of a backend, and the record of one run in its hands."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from fasttrain.data import Task, task
from fasttrain.models import draw_weights
from fasttrain.records import Outcome, Probe, ProbeResult, Problem, Saved
from fasttrain.sampling import minibatches, order_key
from fasttrain.spec import ScanSpec, Variant
from fasttrain.stopping import Monitor, StopRules


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs of a scan share.

    Attributes:
        spec: the scan.
        features: I, inputs a sample.
        device: where the runs train.
        dtype: float32 or float64.
        in_shape: of a sample; (I,), or (channels, height, width) of an image.
    """

    spec: ScanSpec
    features: int
    device: torch.device
    dtype: torch.dtype
    in_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.in_shape:
            object.__setattr__(self, "in_shape", (self.features,))


@dataclass(slots=True, eq=False)
class Run:
    """One run in a slot: its problem and probe, its data, and how far it is.

    Attributes:
        problem: the variant.
        probe: n and seed.
        task: its training set.
        key: of its sample order.
        monitor: its checks, with the budget and the cadence that are its own.
        step: optimizer steps taken.
        batch_loss: mean loss of the minibatch of the last step before its update, in nats; for tests and logs.
        begun: where it goes on, until a backend has taken it in; None for one that starts.
    """

    problem: Problem
    probe: Probe
    task: Task
    key: tuple[int, int]
    monitor: Monitor
    step: int = 0
    batch_loss: float = field(default=float("nan"))
    begun: Saved | None = None

    @classmethod
    def of(cls, setting: Setting, problem: Problem, probe: Probe, begun: Saved | None = None) -> "Run":
        """A run about to start, or to go on from where ``Backend.saved`` found it."""
        spec, variant = setting.spec, problem.variant
        run = cls(
            problem=problem,
            probe=probe,
            task=task(spec, variant.labels, variant.classes, probe.seed, probe.n, variant.inputs),
            key=order_key(spec.seed, probe.seed, probe.n),
            monitor=Monitor(StopRules.of(spec, variant, probe.n, probe.short)),
            begun=begun,
        )
        if begun is not None:
            run.step = int(begun["step"])
            run.monitor.record(begun["checks"][:, 0], begun["checks"][:, 1], probe.n)
        return run

    def saved(self) -> dict[str, np.ndarray]:
        """What any backend's ``saved`` has of a run."""
        return {"step": np.array(self.step), "checks": self.monitor.checks(self.probe.n)}

    def taken(self) -> Saved | None:
        """``begun``, which is not kept."""
        begun, self.begun = self.begun, None
        return begun

    def initial_weights(self, setting: Setting) -> dict[str, np.ndarray]:
        """Its initial parameters, float64, by name."""
        return draw_weights(
            self.problem.variant,
            setting.in_shape,
            scan_seed=setting.spec.seed,
            seed=self.probe.seed,
            n=self.probe.n,
        )

    def batches(self, steps: int) -> np.ndarray:
        """Sample indices int64 [steps, B] of its coming steps (minibatch training only)."""
        size = self.problem.variant.batch_size
        return minibatches(self.probe.n, size, self.step, self.step + steps, self.key)

    def check_due(self, limit: int) -> int:
        """Steps to its next check, at most ``limit``."""
        return min(limit, self.monitor.rules.next_check(self.step) - self.step)

    @property
    def at_check(self) -> bool:
        """Whether it has just come to a check."""
        rules = self.monitor.rules
        return self.step > 0 and self.step == rules.next_check(self.step - 1)

    def observe_all(self, checks: np.ndarray) -> ProbeResult | None:
        """``observe`` for all checks of a run that has come to its last one.

        Args:
            checks: float64 [K, 2], mean loss and number of samples not strictly right; only the last may end the run.
        """
        self.monitor.record(checks[:-1, 0], checks[:-1, 1], self.probe.n)
        return self.observe(float(checks[-1, 0]), int(checks[-1, 1]))

    def observe(self, loss: float, wrong: int) -> ProbeResult | None:
        """Tells the monitor what a check found; the result if this ended the run."""
        outcome = self.monitor.observe(self.step, loss, wrong, self.probe.n)
        if outcome is None:
            return None
        steps, train_loss, train_error = self.monitor.last
        return ProbeResult(
            probe=self.probe,
            outcome=outcome,
            steps=steps,
            fit_step=steps if outcome is Outcome.FITTED else -1,
            train_loss=train_loss,
            train_error=train_error,
            history=self.monitor.history(),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What ``run`` did.

    Attributes:
        ended: (position in ``state.runs``, result) of the runs that ended; they are no longer stepped.
        model_steps: optimizer steps made, summed over the runs.
        check_seconds: time that the evaluations for checks took; 0 where they are a part of the kernels that train.
        launches: kernels that the triton backend launched.
        seconds: that it took, where the caller may have waited for others too; else 0.
    """

    ended: list[tuple[int, ProbeResult]]
    model_steps: int
    check_seconds: float = 0.0
    launches: int = 0
    seconds: float = 0.0


class State(Protocol):
    """Runs that train together. ``clock`` counts the steps of the whole."""

    runs: list[Run]
    clock: int


OPTIONS: dict[str, Callable[[Variant], object]] = {
    "Nesterov momentum": lambda variant: variant.nesterov,
    "weight decay": lambda variant: variant.weight_decay,
    "schedule": lambda variant: variant.schedule != "constant",
    "warm-up": lambda variant: variant.warmup,
    "gradient clipping": lambda variant: variant.clip,
    "label smoothing": lambda variant: variant.label_smoothing,
}
"""What training may have on top of an optimizer and a constant learning rate, and whether a variant asks for it."""


def lacking(variant: Variant, optimizers: Collection[str], options: Collection[str]) -> str | None:
    """Why a backend with these optimizers and ``OPTIONS`` cannot train a variant, or None if it can."""
    if variant.optimizer not in optimizers:
        return f"it has no optimizer {variant.optimizer}"
    for option, asked in OPTIONS.items():
        if asked(variant) and option not in options:
            return f"it has no {option}"
    return None


S = TypeVar("S", bound=State)


class Backend(Protocol, Generic[S]):
    """Trains the runs of one bucket together: those that ``together`` gives one key.

    A run's result depends on the run alone, bit for bit: not on the others in the state, their order, or when it
    was inserted.

    Attributes:
        name: as in a spec.
        most_together: None where company makes a step cheaper: all runs of a bucket share one state, and states take
            turns. Otherwise the runs a state should hold at most; several threads may then run several states.
        in_threads: whether several threads may step several states, of other buckets than each other, and it is worth
            it: where an operation takes long beside what Python adds to it.
        checks_a_turn: checks that a state should make before another one takes its turn: more than one where asking
            whether a run has ended costs much.
        lanes: states of one bucket that should train side by side, each with a backend of its own.
    """

    name: str
    most_together: int | None
    in_threads: bool
    checks_a_turn: int
    lanes: int

    def init(self, runs: Sequence[Run]) -> S:
        """A state with these runs, at step 0 or where they have begun; at least one."""

    def run(self, state: S, until_step: int) -> Report:
        """Steps all runs, checking each on its whole training set where its rules say so.

        Returns when ``state.clock`` is ``until_step``, or at a check before it at which a run ended. A run that ended
        earlier than the others stands still until then.
        """

    def select(self, state: S, keep: Sequence[int]) -> S:
        """The state with the runs at these positions only, in this order; at least one. The given one is used up."""

    def insert(self, state: S, runs: Sequence[Run]) -> S:
        """The state with these runs, as of ``init``, behind the others. The given one is used up."""

    def parameters(self, state: S, position: int) -> dict[str, np.ndarray]:
        """The parameters of one run as they are now, float64, by name."""

    def saved(self, state: S) -> list[dict[str, np.ndarray]]:
        """Of each run all that ``init`` and ``insert`` need to go on with it, in the types that it trains in."""
