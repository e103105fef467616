"""C kernels, one model after the other: a model's data stays in the cache of a core for a whole block of steps."""

import ctypes
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fasttrain.backends.base import Report, Run, Setting, lacking
from fasttrain.kernels import native
from fasttrain.models import is_perceptron
from fasttrain.models.mlp import layer_sizes
from fasttrain.spec import FULL_BATCH, Variant

OPTIONS: tuple[str, ...] = ()
"""Those of ``base.OPTIONS`` that the kernels have."""


@dataclass(slots=True, eq=False)
class _Model:
    """A run's model as the kernels see it, and the arrays that it points to."""

    struct: native.Model
    params: np.ndarray  # [P], in the kernels' own layout
    state: np.ndarray  # [k, P]
    kept: tuple[np.ndarray, ...]


@dataclass(slots=True, eq=False)
class NativeState:
    """Runs of any shape side by side."""

    runs: list[Run]
    models: list[_Model]
    clock: int = field(default=0)


class NativeBackend:
    """``Backend`` with compiled kernels, on a CPU; a model never meets another one.

    Raises:
        Unavailable: when made; there is no C compiler.
    """

    name = "native"
    most_together: int | None = 1
    in_threads = True
    checks_a_turn = 1
    lanes = 1

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._dtype = np.dtype(str(setting.dtype).removeprefix("torch."))
        self._library = native.library(self._dtype.name)
        self._scratch = threading.local()

    def init(self, runs: Sequence[Run]) -> NativeState:
        """See ``Backend``."""
        return NativeState(list(runs), [self._model(run) for run in runs])

    def select(self, state: NativeState, keep: Sequence[int]) -> NativeState:
        """See ``Backend``."""
        return NativeState([state.runs[i] for i in keep], [state.models[i] for i in keep], state.clock)

    def insert(self, state: NativeState, runs: Sequence[Run]) -> NativeState:
        """See ``Backend``."""
        new = self.init(runs)
        return NativeState([*state.runs, *new.runs], [*state.models, *new.models], state.clock)

    def parameters(self, state: NativeState, position: int) -> dict[str, np.ndarray]:
        """See ``Backend``."""
        model, variant = state.models[position], state.runs[position].problem.variant
        sizes = layer_sizes(variant, self._setting.features)
        flat = np.empty(sum((fan_in + 1) * fan_out for fan_in, fan_out in sizes))
        self._library.unpack(ctypes.byref(model.struct), flat.ctypes.data)
        out, at = {}, 0
        for layer, (fan_in, fan_out) in enumerate(sizes):
            for name, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
                size = int(np.prod(shape))
                out[f"layers.{layer}.{name}"] = flat[at : at + size].reshape(shape)
                at += size
        return out

    def saved(self, state: NativeState) -> list[dict[str, np.ndarray]]:
        """See ``Backend``."""
        return [
            run.saved() | {"params": model.params.copy(), "optimizer": model.state.copy()}
            for run, model in zip(state.runs, state.models, strict=True)
        ]

    def run(self, state: NativeState, until_step: int) -> Report:
        """See ``Backend``."""
        model_steps, checking = 0, 0.0
        while state.clock < until_step:
            steps = min(run.check_due(until_step - state.clock) for run in state.runs)
            ended = []
            for position, (run, model) in enumerate(zip(state.runs, state.models, strict=True)):
                scratch = self._space(model.struct)
                self._library.train(ctypes.byref(model.struct), steps, scratch)
                run.step += steps
                run.batch_loss = model.struct.loss
                if run.at_check:
                    begin = time.perf_counter()
                    self._library.evaluate(ctypes.byref(model.struct), scratch)
                    checking += time.perf_counter() - begin
                    result = run.observe(model.struct.mean_loss, model.struct.wrong)
                    if result is not None:
                        ended.append((position, result))
            state.clock += steps
            model_steps += steps * len(state.runs)
            if ended:
                return Report(ended, model_steps, checking)
        return Report([], model_steps, checking)

    def _evaluate(self, state: NativeState) -> tuple[list[float], list[int]]:
        """Mean loss and number of samples not strictly right of every run, over its whole training set."""
        for model in state.models:
            self._library.evaluate(ctypes.byref(model.struct), self._space(model.struct))
        return [m.struct.mean_loss for m in state.models], [m.struct.wrong for m in state.models]

    def _model(self, run: Run) -> _Model:
        variant = run.problem.variant
        pool = run.task.standardised(self._dtype)
        rows, labels = (np.ascontiguousarray(a, dtype=np.int64) for a in (run.task.rows, run.task.y))
        struct = native.Model(
            features=self._setting.features,
            width=variant.width,
            depth=variant.depth,
            classes=variant.classes,
            batch=0 if variant.batch_size == FULL_BATCH else variant.batch_size,
            activation=native.ACTIVATIONS.index(_activation(variant)),
            optimizer=list(native.OPTIMIZERS).index(variant.optimizer),
            n=run.probe.n,
            step=run.step,
            key=run.key,
            lr=variant.lr,
            momentum=variant.momentum,
            pool=pool.ctypes.data,
            rows=rows.ctypes.data,
            labels=labels.ctypes.data,
        )
        size = self._library.parameters_size(ctypes.byref(struct))
        params = native.zeros(size, self._dtype)
        state = native.zeros(size * native.OPTIMIZERS[variant.optimizer], self._dtype)
        struct.params, struct.state = params.ctypes.data, state.ctypes.data
        begun = run.taken()
        if begun is not None:
            params[:], state[:] = begun["params"], begun["optimizer"]
        else:
            drawn = run.initial_weights(self._setting)
            flat = np.concatenate([value.ravel() for value in drawn.values()])
            self._library.pack(ctypes.byref(struct), flat.ctypes.data)
        return _Model(struct, params, state, (pool, rows, labels))

    def _space(self, struct: native.Model) -> int:
        """Address of this thread's scratch memory, which grows as models ask for it."""
        size = self._library.scratch_size(ctypes.byref(struct))
        if getattr(self._scratch, "size", 0) < size:
            self._scratch.array, self._scratch.size = native.zeros(size, self._dtype), size
        return self._scratch.array.ctypes.data


def unavailable(setting: Setting, variant: Variant) -> str | None:
    """Why this backend cannot train a variant here, or None if it can."""
    if setting.device.type != "cpu":
        return "it runs on a CPU only"
    if not is_perceptron(variant):
        return f"it has no architecture {variant.arch}"
    if _activation(variant) not in native.ACTIVATIONS:
        return f"it has no activation {variant.activation}"
    if (missing := lacking(variant, native.OPTIMIZERS, OPTIONS)) is not None:
        return missing
    try:
        native.library(str(setting.dtype).removeprefix("torch."))
    except native.Unavailable as error:
        return str(error)
    return None


def _activation(variant: Variant) -> str:
    """The linear classifier has none."""
    return variant.activation if variant.depth else "identity"
