"""torch.func over stacked parameters: all models of a bucket in one vmapped gradient, recorded once as a graph."""

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, grad_and_value, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fasttrain.backends.base import Report, Run, Setting
from fasttrain.ensemble import Layout, Stack, padded_index
from fasttrain.kernels.reference import cross_entropy, strictly_right
from fasttrain.models import build, elementwise_sizes, input_shape, is_perceptron, sample_elements
from fasttrain.optim import OPTIMIZERS, Optimizer, Rates, make_optimizer
from fasttrain.spec import FULL_BATCH, Variant

_CHUNK = 128  # samples a pass over a whole training set takes at once; a constant, so that no bit depends on the others
# Elements of a hidden layer that a model must fill for an approximated activation to treat it alike wherever it lies:
# two AVX-512 registers of float32 for each of two threads (docs/decisions/0002-bitwise-on-cpu.md).
_WHOLE = 64
_MODELS = 4  # of a family with costly steps that one recorded graph takes: recording one for every number takes seconds
_RECORDING = threading.Lock()  # torch patches itself while it records
_PASS_BYTES = 64 * 2**20  # inputs and activations of one pass


@dataclass(slots=True, eq=False)
class _Chunk:
    """Rows of the whole training sets that are worked on at once: _CHUNK samples of each of some models."""

    positions: list[int]
    index: torch.Tensor  # int64 [K], the positions and spare ones
    rows: torch.Tensor  # int64 [K, _CHUNK], rows of the pool
    labels: torch.Tensor  # int64 [K, _CHUNK]
    weight: torch.Tensor  # [K, _CHUNK], 1 / n for a sample, 0 for padding


@dataclass(slots=True, eq=False)
class VmapState:
    """Stacked runs of one bucket."""

    runs: list[Run]
    stack: Stack
    pool: torch.Tensor  # [R, I], the inputs of all runs; pixels as they are where all runs share them
    affine: tuple[torch.Tensor, torch.Tensor] | None  # what to subtract from pixels and multiply them with, float64 [I]
    offsets: list[int]  # where each run's own pool starts in it
    chunks: list[_Chunk]
    clock: int = field(default=0)


class VmapBackend:
    """``Backend`` with torch.func; makes one bucket's states only."""

    name = "vmap"
    _keeps_pixels = True
    most_together: int | None = None
    in_threads = False
    checks_a_turn = 1
    lanes = 1

    def __init__(self, setting: Setting, variant: Variant) -> None:
        self._setting = setting
        self._variant = variant
        self._full = variant.batch_size == FULL_BATCH
        self._spare_rows = -variant.batch_size % _row_multiple(variant, setting.in_shape)
        self._fused = _kernels_run(setting.device, variant.classes)
        self._model = build(variant, setting.in_shape, batched=True).to(setting.device, setting.dtype)
        self.in_threads = setting.device.type == "cpu" and not is_perceptron(variant)
        self._at_once = _MODELS if self.in_threads else None
        self._input = input_shape(variant, setting.in_shape)
        self._elements = sample_elements(variant, setting.in_shape)
        self._layout = Layout({name: tuple(p.shape) for name, p in self._model.named_parameters()})
        made = _fused_optimizer if self._fused else make_optimizer
        self._optimizer = made(variant, self._layout)
        self._eye = torch.eye(variant.classes, device=setting.device, dtype=setting.dtype)
        smoothing = variant.label_smoothing
        self._targets = self._eye * (1 - smoothing) + smoothing / variant.classes if smoothing else self._eye
        self._graphs: dict[tuple[str, int], Callable[..., torch.Tensor]] = {}
        self._numpy_type = np.dtype(str(setting.dtype).removeprefix("torch."))
        self._shared: tuple[list[np.ndarray], torch.Tensor] | None = None

    def init(self, runs: Sequence[Run]) -> VmapState:
        """See ``Backend``."""
        begun = [run.taken() for run in runs]
        rows = [
            self._layout.pack(run.initial_weights(self._setting)) if saved is None else saved["params"].astype(float)
            for run, saved in zip(runs, begun, strict=True)
        ]
        stack = Stack.of(self._tensor(np.stack(rows)), self._optimizer.state_sizes)
        for row, saved in enumerate(begun):
            if saved is not None:
                for number, tensor in enumerate(stack.optim):
                    tensor[row] = self._tensor(saved[f"optimizer{number}"])
        return self._state(list(runs), stack.take(range(len(runs))), clock=0)

    def select(self, state: VmapState, keep: Sequence[int]) -> VmapState:
        """See ``Backend``."""
        return self._state([state.runs[i] for i in keep], state.stack.take(keep), state.clock)

    def insert(self, state: VmapState, runs: Sequence[Run]) -> VmapState:
        """See ``Backend``."""
        new = self.init(runs)
        stack = state.stack.join(len(state.runs), new.stack, len(runs))
        return self._state([*state.runs, *runs], stack, state.clock)

    def parameters(self, state: VmapState, position: int) -> dict[str, np.ndarray]:
        """See ``Backend``."""
        views = self._layout.views(state.stack.params)
        return {name: view[position].double().cpu().numpy() for name, view in views.items()}

    def saved(self, state: VmapState) -> list[dict[str, np.ndarray]]:
        """See ``Backend``."""
        kept = {"params": state.stack.params.cpu().numpy()}
        kept |= {f"optimizer{number}": rows.cpu().numpy() for number, rows in enumerate(state.stack.optim)}
        return [
            run.saved() | {name: rows[position].copy() for name, rows in kept.items()}
            for position, run in enumerate(state.runs)
        ]

    def run(self, state: VmapState, until_step: int) -> Report:
        """See ``Backend``."""
        model_steps, checking = 0, 0.0
        with torch.no_grad():
            while state.clock < until_step:
                steps = min(run.check_due(until_step - state.clock) for run in state.runs)
                self._train(state, steps)
                state.clock += steps
                model_steps += steps * len(state.runs)
                due = [position for position, run in enumerate(state.runs) if run.at_check]
                if due:
                    begin = time.perf_counter()
                    losses, wrong = self._evaluate(state)
                    checking += time.perf_counter() - begin
                    found = [(i, state.runs[i].observe(float(losses[i]), int(wrong[i]))) for i in due]
                    if ended := [(i, result) for i, result in found if result is not None]:
                        return Report(ended, model_steps, checking)
        return Report([], model_steps, checking)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values).to(self._setting.device, self._setting.dtype)

    def _state(self, runs: list[Run], stack: Stack, clock: int) -> VmapState:
        first = runs[0].task
        shared = all(run.task.pool is first.pool and run.task.shift is first.shift for run in runs)
        affine = None
        if self._keeps_pixels and shared and first.shift is not None and first.scale is not None:
            device = self._setting.device
            affine = torch.as_tensor(first.shift, device=device), torch.as_tensor(first.scale, device=device)
        pool, offsets = self._pool(runs, pixels=affine is not None)
        return VmapState(runs, stack, pool, affine, offsets, self._chunks(runs, offsets), clock)

    def _pool(self, runs: list[Run], pixels: bool) -> tuple[torch.Tensor, list[int]]:
        """The inputs of all runs, one array after the other, each once, and where those of each run start."""
        arrays = [run.task.pool if pixels else run.task.standardised(self._numpy_type) for run in runs]
        different = list({id(array): array for array in arrays}.values())
        starts = np.cumsum([0, *map(len, different)]).tolist()
        at = {id(array): start for array, start in zip(different, starts, strict=False)}
        offsets = [at[id(array)] for array in arrays]
        shared = self._shared
        if shared is not None and list(map(id, shared[0])) == list(map(id, different)):
            return shared[1], offsets
        joined = different[0] if len(different) == 1 else np.concatenate(different)
        pool = torch.as_tensor(joined).to(self._setting.device) if pixels else self._tensor(joined)
        # Where each run has inputs of its own, the next state has others.
        self._shared = (different, pool) if len(different) < len(runs) or len(runs) == 1 else None
        return pool, offsets

    def _chunks(self, runs: list[Run], offsets: list[int]) -> list[_Chunk]:
        """The whole training sets in passes of _CHUNK samples, each over the models that have so many."""
        device = self._setting.device
        models = self._at_once or max(2, _PASS_BYTES // (_CHUNK * self._elements * 8))
        chunks = []
        for start in range(0, max(run.probe.n for run in runs), _CHUNK):
            having = [i for i, run in enumerate(runs) if run.probe.n > start]
            for first in range(0, len(having), models):
                positions = having[first : first + models]
                index = padded_index(positions, device)
                rows = np.zeros((len(index), _CHUNK), dtype=np.int64)
                labels = np.zeros((len(index), _CHUNK), dtype=np.int64)
                weight = np.zeros((len(index), _CHUNK))
                for k, i in enumerate(index.tolist()):
                    own = runs[i].task
                    some = own.rows[start : start + _CHUNK]
                    rows[k] = offsets[i] + own.rows[0]  # padding of its own: it weighs nothing, but 0 times inf is NaN
                    rows[k, : len(some)] = offsets[i] + some
                    labels[k, : len(some)] = own.y[start : start + _CHUNK]
                    weight[k, : len(some)] = 1.0 / runs[i].probe.n
                where = torch.as_tensor(rows, device=device)
                label = torch.as_tensor(labels, device=device)
                chunks.append(_Chunk(positions, index, where, label, self._tensor(weight)))
        return chunks

    def _gather(
        self, state: VmapState, rows: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [E, B, I] and rows [E, B, C] of ``targets`` [C, C] at rows and labels [E, B]."""
        x = state.pool.index_select(0, rows.reshape(-1)).view(*rows.shape, -1)
        if state.affine is not None:
            # In float64 and rounded once, as a pool that is standardised beforehand: the same bits in any company.
            x = x.double().sub_(state.affine[0]).mul_(state.affine[1]).to(self._setting.dtype)
        onehot = targets.index_select(0, labels.reshape(-1)).view(*labels.shape, -1)
        return x, onehot

    def _train(self, state: VmapState, steps: int) -> None:
        stack, runs = state.stack, state.runs
        spare = len(stack.params) - len(runs)
        device = self._setting.device
        models = [*runs, *[runs[0]] * spare]
        table = self._coefficients(models, steps)
        if not self._full:
            drawn = [self._whole(run.batches(steps)) for run in runs]
            rows = [o + run.task.rows[b] for o, run, b in zip(state.offsets, runs, drawn, strict=True)]
            labels = [run.task.y[b] for run, b in zip(runs, drawn, strict=True)]
            all_rows = torch.as_tensor(np.stack(rows + [rows[0]] * spare, axis=1), device=device)
            all_labels = torch.as_tensor(np.stack(labels + [labels[0]] * spare, axis=1), device=device)
            size = self._variant.batch_size
            weight = torch.zeros(len(models), size + self._spare_rows, device=device, dtype=self._setting.dtype)
            weight[:, :size] = 1.0 / size
        loss = torch.empty(0)
        for step in range(steps):
            row = [column[step] for column in table]
            into = self._optimizer.accumulator(stack.optim, row)
            if self._full:
                loss = self._full_gradient(state)
                if into is not None:
                    into.add_(stack.grads)
            else:
                loss = self._batch_gradient(state, all_rows[step], all_labels[step], weight, into)
            self._optimizer.update(stack.params, stack.grads, stack.optim, row)
        for run, value in zip(runs, loss.tolist(), strict=False):
            run.step += steps
            run.batch_loss = value

    def _batch_gradient(
        self,
        state: VmapState,
        rows: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor,
        into: torch.Tensor | None,
    ) -> torch.Tensor:
        """The gradient over minibatches, into the stack's or added to what is given; the losses [E]."""
        x, onehot = self._gather(state, rows, labels, self._targets)
        loss = self._gradient(state.stack.params, state.stack.grads, x, onehot, weight)
        if into is not None:
            into.add_(state.stack.grads)
        return loss

    def _whole(self, batches: np.ndarray) -> np.ndarray:
        """Minibatches [S, B] with their first sample again in the spare rows, which weigh nothing."""
        return np.concatenate([batches, np.repeat(batches[:, :1], self._spare_rows, axis=1)], axis=1)

    def _coefficients(self, models: list[Run], steps: int) -> list[torch.Tensor]:
        """The optimizer's coefficients of the coming steps, each [S, E, 1]."""
        begun = torch.tensor([run.step for run in models])
        rates = Rates.of((run.problem.variant, run.monitor.rules.steps) for run in models)
        tables = self._optimizer.tables(begun + torch.arange(1, steps + 1)[:, None], rates)
        return [t.to(self._setting.device, self._setting.dtype)[:, :, None] for t in tables]

    def _full_gradient(self, state: VmapState) -> torch.Tensor:
        """The gradient over the whole training sets, into the stack's; the losses [E]."""
        stack = state.stack
        stack.grads.zero_()
        losses = torch.zeros(len(stack.params), device=stack.params.device, dtype=stack.params.dtype)
        for chunk in state.chunks:
            x, onehot = self._gather(state, chunk.rows, chunk.labels, self._targets)
            some = stack.params[chunk.index]
            grads = torch.zeros_like(some)
            loss = self._gradient(some, grads, x, onehot, chunk.weight)
            count = len(chunk.positions)
            stack.grads.index_add_(0, chunk.index[:count], grads[:count])
            losses.index_add_(0, chunk.index[:count], loss[:count])
        stack.grads[len(state.runs) :] = stack.grads[0]
        return losses

    def _evaluate(self, state: VmapState) -> tuple[list[float], list[int]]:
        """Mean loss and number of samples not strictly right of every run, over its whole training set."""
        device = self._setting.device
        losses = torch.zeros(len(state.runs), dtype=torch.float64, device=device)
        wrong = torch.zeros(len(state.runs), dtype=torch.float64, device=device)
        for chunk in state.chunks:
            x, onehot = self._gather(state, chunk.rows, chunk.labels, self._eye)
            found = self._traced("check", self._check, state.stack.params[chunk.index], x, onehot, chunk.weight)
            count = len(chunk.positions)
            losses.index_add_(0, chunk.index[:count], found[0, :count])
            wrong.index_add_(0, chunk.index[:count], found[1, :count])
        return losses.tolist(), wrong.tolist()

    def _gradient(self, *args: torch.Tensor) -> torch.Tensor:
        one_hot = self._targets is self._eye  # the fused head knows no other targets
        function = self._loss_and_fused_gradient if self._fused and one_hot else self._loss_and_gradient
        models, most = len(args[0]), self._at_once
        if most is None or models <= most:
            return self._traced("gradient", function, *args)
        losses = args[0].new_empty(models)
        for begin in range(0, models, most):
            # The last ones overlap with those before, whose gradient is the same again.
            some = slice(min(begin, models - most), min(begin + most, models))
            losses[some] = self._traced("gradient", function, *(arg[some] for arg in args))
        return losses

    def _traced(self, name: str, function: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
        """The function through a graph recorded at its first call with so many models (vmap's own layer is slow)."""
        key = (name, *args[-1].shape)
        if key not in self._graphs:
            with _RECORDING:
                self._graphs[key] = _tidy(make_fx(lambda *a: function(*a))(*args))
        return self._graphs[key](*args)

    def _loss_and_gradient(
        self,
        params: torch.Tensor,
        grads: torch.Tensor,
        x: torch.Tensor,
        onehot: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        def loss(p: dict, x: torch.Tensor, onehot: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return (cross_entropy(self._one(p, x), onehot) * weight).sum()

        found, losses = vmap(grad_and_value(loss))(self._layout.views(params), x, onehot, weight)
        for name, view in self._layout.views(grads).items():
            view.copy_(found[name])
        return losses

    def _loss_and_fused_gradient(
        self,
        params: torch.Tensor,
        grads: torch.Tensor,
        x: torch.Tensor,
        onehot: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """The same, with loss and gradient of the logits in one kernel between the passes through the module."""
        logits, pull_back = vjp(lambda p: self._logits(p, x), self._layout.views(params))  # type: ignore[misc]
        losses, delta = torch.ops.fasttrain.head(logits, onehot, weight)
        (found,) = pull_back(delta)
        for name, view in self._layout.views(grads).items():
            view.copy_(found[name])
        return losses

    def _logits(self, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return vmap(self._one)(p, x)

    def _one(self, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of one model's inputs [B, I]."""
        return functional_call(self._model, p, (x.unflatten(-1, self._input),))

    def _check(self, params: torch.Tensor, x: torch.Tensor, onehot: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = self._logits(self._layout.views(params), x)
        if self._fused:
            return torch.ops.fasttrain.check(out, onehot, weight)
        loss = cross_entropy(out.double(), onehot.double())
        valid = weight > 0
        wrong = valid & ~strictly_right(out, onehot)
        mean = torch.where(valid, loss, 0.0).sum(1) * weight[:, 0].double()
        return torch.stack([mean, wrong.double().sum(1)])


def _kernels_run(device: torch.device, classes: int) -> bool:
    """Whether the fused head and update can be had: on CUDA, or under Triton's interpreter."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        from fasttrain.kernels import rows
    except ImportError:
        return False
    return classes <= rows.MOST_CLASSES


_FUSED_RULES = {"sgd": "sgd", "adam": "adam", "adamw": "adam"}  # AdamW decays first, and then steps as Adam


def _fused_optimizer(variant: Variant, layout: Layout) -> Optimizer:
    """The optimizer with its rule in one kernel where there is one; the same bits."""
    if variant.optimizer not in _FUSED_RULES or variant.nesterov:
        return make_optimizer(variant, layout)
    from fasttrain.kernels import rows

    plain: Any = OPTIMIZERS[variant.optimizer]

    class Fused(plain):
        def accumulator(self, state: list[torch.Tensor], row: list[torch.Tensor]) -> None:
            """None: the kernel reads the gradient."""

        def rule(
            self, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
        ) -> None:
            """One step."""
            rows.update(_FUSED_RULES[variant.optimizer], params, grads, state, row)

    return Fused(variant, layout)


def _row_multiple(variant: Variant, in_shape: tuple[int, ...]) -> int:
    """What the rows of a minibatch are filled up to a multiple of."""
    return math.lcm(1, *(_WHOLE // math.gcd(size, _WHOLE) for size in elementwise_sizes(variant, in_shape)))


def _tidy(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Takes out what vmap records but does nothing: views and expansions to the same shape, products with 1."""
    aten = torch.ops.aten
    shapes = (aten.expand.default, aten.view.default, aten._unsafe_view.default)
    for node in list(graph.graph.nodes):
        if node.target in shapes:
            idle = node.args[0].meta["val"].shape == node.meta["val"].shape
        else:
            idle = node.target is aten.mul.Scalar and node.args[1] == 1
        if idle:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph
