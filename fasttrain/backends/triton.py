"""Fused Triton kernels: models of many widths in the same launches, which check and stop them by themselves."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fasttrain.backends.base import Report, Run, Setting, lacking
from fasttrain.kernels import fused
from fasttrain.kernels.configurations import Configuration, configuration, width_class
from fasttrain.models import is_perceptron
from fasttrain.spec import FULL_BATCH, Variant
from fasttrain.stopping import PLATEAU_RATIO, plateau_loss

PRODUCTS = {"auto": "ieee", "float32": "ieee", "float64": "ieee", "bf16x3": "bf16x3", "tf32": "tf32", "bf16": "bf16"}
"""What the products are made of, by the precision of a spec."""
OPTIONS = ("weight decay",)
"""Those of ``base.OPTIONS`` that the kernels have; clipping needs the whole gradient before any of it is used."""


@dataclass(slots=True, eq=False)
class TritonState:
    """Runs whose models train in the same launches."""

    runs: list[Run]
    models: fused.Models
    clock: int = field(default=0)


class TritonBackend:
    """``Backend`` in fused kernels for multilayer perceptrons of one width class (``group``), on CUDA.

    A state is changed in place: after ``select`` and ``insert`` the one that was given is the one returned.
    """

    name = "triton"
    most_together: int | None = None
    in_threads = False
    checks_a_turn = 4
    lanes = 1

    def __init__(self, setting: Setting, variant: Variant) -> None:
        self._setting = setting
        self._numpy_type = np.dtype(str(setting.dtype).removeprefix("torch."))
        self._shape = fused.Shape(
            features=setting.features,
            classes=variant.classes,
            depth=variant.depth,
            activation=_activation(variant),
            optimizer=variant.optimizer,
            batch=0 if variant.batch_size == FULL_BATCH else variant.batch_size,
            precision=PRODUCTS[setting.spec.precision],
            plateau_ratio=PLATEAU_RATIO,
            plateau_loss=plateau_loss(variant.classes),
        )
        self._configuration = configured(setting, variant)

    def init(self, runs: Sequence[Run]) -> TritonState:
        """See ``Backend``."""
        models = fused.Models(self._shape, self._configuration, self._setting.device, self._setting.dtype)
        models.add([self._model(run) for run in runs])
        return TritonState(list(runs), models)

    def select(self, state: TritonState, keep: Sequence[int]) -> TritonState:
        """See ``Backend``."""
        state.models.keep(keep)
        state.runs = [state.runs[i] for i in keep]
        return state

    def insert(self, state: TritonState, runs: Sequence[Run]) -> TritonState:
        """See ``Backend``."""
        state.models.add([self._model(run) for run in runs])
        state.runs = [*state.runs, *runs]
        return state

    def parameters(self, state: TritonState, position: int) -> dict[str, np.ndarray]:
        """See ``Backend``."""
        out = {}
        for layer, (weight, bias) in enumerate(state.models.weights(position)):
            out[f"layers.{layer}.weight"], out[f"layers.{layer}.bias"] = weight, bias
        return out

    def saved(self, state: TritonState) -> list[dict[str, np.ndarray]]:
        """See ``Backend``."""
        positions = range(len(state.runs))
        out = []
        for run, position, checks in zip(state.runs, positions, state.models.history(positions), strict=True):
            params, *optimizer = state.models.rows(position)
            kept = {"params": params} | {f"optimizer{k}": rows for k, rows in enumerate(optimizer)}
            # The kernels keep the checks: the monitor learns of them at the end.
            out.append(run.saved() | {"checks": checks} | kept)
        return out

    def run(self, state: TritonState, until_step: int) -> Report:
        """Steps all runs until ``state.clock`` is ``until_step``; one that a check ends stands still from there on."""
        left = max(run.monitor.rules.steps - run.step for run in state.runs)
        steps, launches = until_step - state.clock, state.models.launches
        state.models.run(min(steps, left))
        state.clock = until_step
        ended = np.flatnonzero(state.models.ended()).tolist()
        before = sum(run.step for run in state.runs)
        for run, loss in zip(state.runs, state.models.last_step()[0].tolist(), strict=True):
            run.step = min(run.step + steps, run.monitor.rules.steps)
            run.batch_loss = loss
        results = []
        for position, checks in zip(ended, state.models.history(ended), strict=True):
            run = state.runs[position]
            run.step = run.monitor.rules.step_of(len(checks))
            result = run.observe_all(checks)
            assert result is not None, "a kernel ended a run that the stop rules let go on"
            results.append((position, result))
        return Report(
            ended=results,
            model_steps=sum(run.step for run in state.runs) - before,
            launches=state.models.launches - launches,
        )

    def _model(self, run: Run) -> fused.Model:
        variant, rules = run.problem.variant, run.monitor.rules
        drawn = list(run.initial_weights(self._setting).values())
        saved = run.taken()
        begun = None
        if saved is not None:
            names = ["params", *(f"optimizer{k}" for k in range(fused.OPTIMIZERS[variant.optimizer]))]
            begun = fused.Begun(run.step, [saved[name] for name in names], saved["checks"])
        return fused.Model(
            width=variant.width,
            inputs=run.task.standardised(np.float64 if run.task.shift is None else self._numpy_type),
            rows=run.task.rows,
            labels=run.task.y,
            key=run.key,
            rates=(variant.lr, variant.momentum, variant.weight_decay),
            weights=list(zip(drawn[::2], drawn[1::2], strict=True)),
            budget=rules.steps,
            check_every=rules.check_every,
            plateau_after=rules.plateau_after,
            begun=begun,
        )


def group(variant: Variant) -> int:
    """The width that stands for all whose models share launches with those of a variant."""
    return width_class(variant.width) if variant.depth else 0


def configured(setting: Setting, variant: Variant) -> Configuration:
    """The launch configuration of a variant that ``unavailable`` has nothing against."""
    return configuration(
        width=variant.width,
        features=setting.features,
        classes=variant.classes,
        depth=variant.depth,
        batch=0 if variant.batch_size == FULL_BATCH else variant.batch_size,
        precision=PRODUCTS[setting.spec.precision],
        target=_target(setting.device),
    )


def unavailable(setting: Setting, variant: Variant) -> str | None:
    """Why this backend cannot train a variant here, or None if it can."""
    if setting.device.type != "cuda" and not fused.INTERPRETED:
        return "it needs a CUDA device"
    if not is_perceptron(variant):
        return f"it has no architecture {variant.arch}"
    if _activation(variant) not in fused.ACTIVATIONS:
        return f"it has no activation {variant.activation}"
    if (missing := lacking(variant, fused.OPTIMIZERS, OPTIONS)) is not None:
        return missing
    for what, size, most in (
        ("width", variant.width, fused.MOST_WIDTH),
        ("number of classes", variant.classes, fused.MOST_CLASSES),
    ):
        if size > most:
            return f"its largest {what} is {most:,}, not {size:,}"
    if setting.device.type == "cuda" and torch.cuda.get_device_capability(setting.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def _target(device: torch.device) -> int:
    """Compute capability times ten; of what the interpreter stands in for, 9.0."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _activation(variant: Variant) -> str:
    """The linear classifier has none."""
    return variant.activation if variant.depth else "identity"
