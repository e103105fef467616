"""Many multilayer perceptrons in Triton kernels: their arrays, tables and work lists, and the launches of their steps.

What a caller sees of ``drivers.py`` and ``tiles.py``. Models come and go; each has a width, a training set, rates, a
budget and a step count of its own and shares the rest (``Shape``).
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton

from fasttrain.kernels import drivers, tiles
from fasttrain.kernels.configurations import WIDTHS, Configuration

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid", "identity")
"""The activations that the kernels know."""
OPTIMIZERS = {"sgd": 1, "adam": 2, "adamw": 2}
"""The optimizers that the kernels know, and how many state arrays each has."""
PRECISIONS = ("ieee", "bf16x3", "tf32", "bf16")
"""What products are made of."""
INTERPRETED: bool = tiles.INTERPRETED.value
"""Whether the kernels were defined for Triton's interpreter, which runs them on the CPU (``TRITON_INTERPRET=1``)."""
MOST_CLASSES = 1024
MOST_WIDTH = WIDTHS[-1]

_KEEPS_SLOPES = ("gelu", "silu")  # activations whose derivative cannot be had from their value
_MOST_STEPS = 2**31 - 1  # of a launch; a larger number would be another type, and compile another kernel
_PASS_ROWS = 256  # samples of a model that a check takes at once
_FIELDS, _RATES = tiles.FIELDS.value, tiles.RATES.value
_FUSED_CLASSES = tiles.FUSED_CLASSES.value
_STEP, _STOPPED = tiles.STEP.value, tiles.STOPPED.value
_BUDGET, _FLAT_AFTER = tiles.BUDGET.value, tiles.FLAT_AFTER.value


@dataclass(frozen=True, slots=True)
class Shape:
    """What models share that are trained in the same launches.

    Attributes:
        features: I, inputs a sample.
        classes: C.
        depth: L, hidden layers.
        activation: one of ``ACTIVATIONS``; of no account without hidden layers.
        optimizer: one of ``OPTIMIZERS``.
        batch: samples of a step, or 0 for all of a model's.
        precision: one of ``PRECISIONS``.
        plateau_ratio: least loss so far over that at half of the steps, above which it is flat.
        plateau_loss: least loss so far up to which it is not, in nats.
    """

    features: int
    classes: int
    depth: int
    activation: str
    optimizer: str
    batch: int
    precision: str
    plateau_ratio: float
    plateau_loss: float


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A model in training, to go on with.

    Attributes:
        step: steps taken.
        rows: its parameters and each array of optimizer state, as ``Models.rows`` gives them.
        checks: float64 [K, 2], what its checks have found.
    """

    step: int
    rows: Sequence[np.ndarray]
    checks: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model to be trained.

    Attributes:
        width: of its hidden layers.
        inputs: [R, I]; models may share one array, which is then kept once.
        rows: int64 [N], its samples' rows in the inputs.
        labels: int64 [N].
        key: two 32-bit words that key its sample order, as in ``fasttrain.sampling``.
        rates: learning rate, momentum, weight decay.
        weights: (W [O, I], b [O]) of every layer, float64.
        budget: steps after which it ends.
        check_every: steps between its checks.
        plateau_after: steps from which on a check may call it flat.
        begun: where it goes on, if it is not to start.
    """

    width: int
    inputs: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    key: tuple[int, int]
    rates: tuple[float, float, float]
    weights: Sequence[tuple[np.ndarray, np.ndarray]]
    budget: int
    check_every: int
    plateau_after: int
    begun: "Begun | None" = None

    @property
    def checks(self) -> int:
        """How many it has if it uses its whole budget."""
        return -(-self.budget // self.check_every)


def pitch(columns: int) -> int:
    """Elements from one row of weights or activations to the next."""
    return -(-columns // 4) * 4


class _Arena:
    """A tensor that grows along its first dimension, from which pieces are taken and to which they are given back."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *columns: int) -> None:
        self.tensor = torch.zeros(0, *columns, dtype=dtype, device=device)
        self._free: dict[int, list[int]] = {}
        self._used = 0

    @staticmethod
    def _room(size: int) -> int:
        """Sizes are rounded up by less than an eighth, so that a piece given back fits the next model."""
        grain = 1 << max(4, size.bit_length() - 4)
        return -(-size // grain) * grain

    def take(self, size: int) -> int:
        """Where a piece begins; at a multiple of 16. What is in it is left from before."""
        room = self._room(size)
        if self._free.get(room):
            return self._free[room].pop()
        at, self._used = self._used, self._used + room
        held = len(self.tensor)
        if self._used > held:
            grown = self.tensor.new_zeros(max(self._used, held * 5 // 4), *self.tensor.shape[1:])
            grown[:held] = self.tensor
            self.tensor = grown
        return at

    def give(self, at: int, size: int) -> None:
        """Gives a piece back."""
        self._free.setdefault(self._room(size), []).append(at)


@dataclass(slots=True, eq=False)
class _Inputs:
    """An array of inputs in the pool, and how many models use it."""

    array: np.ndarray
    at: int
    users: int = 0


@dataclass(frozen=True, slots=True)
class _Place:
    """A model's pieces of the arenas: (offset, size) each."""

    inputs: _Inputs
    width: int
    n: int
    batch: int
    room: int
    params: tuple[int, int]
    acts: tuple[int, int]
    rows: tuple[int, int]
    drawn: tuple[int, int]


@dataclass(slots=True, eq=False)
class _Slot:
    """A row of the tables, and the tiles that the work lists have for it: enough for the models that it ever held.

    Attributes:
        units: blocks of units of a hidden layer.
        blocks: blocks of samples of a step.
        passes: blocks of samples of a pass of a check.
        place: of the model in it; None while it is free.
        begun: steps that the model has taken.
        budget: steps that it may take.
        every: steps between its checks.
    """

    units: int
    blocks: int
    passes: int
    place: _Place | None = None
    begun: int = 0
    budget: int = 0
    every: int = 1


class Models:
    """Models in training on a device; positions are those of the models, in the order in which they came.

    Args:
        shape: what they share.
        config: the driver and its tiles, of the width class that all models belong to.
        device: a CUDA device; a CPU under Triton's interpreter.
        dtype: of the parameters, float32 or float64.
        inputs: of the inputs, if not that of the parameters: for instance uint8, which is converted as it is loaded.

    Attributes:
        launches: kernels launched so far.
    """

    def __init__(
        self,
        shape: Shape,
        config: Configuration,
        device: torch.device,
        dtype: torch.dtype,
        inputs: torch.dtype | None = None,
    ) -> None:
        self.shape, self.config = shape, config
        self.launches = 0
        self._dtype, self._device = dtype, device
        self._params, self._acts = _Arena(dtype, device), _Arena(dtype, device)
        self._state = [_Arena(dtype, device) for _ in range(OPTIMIZERS[shape.optimizer])]
        self._rows, self._labels = _Arena(torch.int32, device), _Arena(torch.int32, device)
        self._drawn = _Arena(torch.int32, device)
        self._pool = _Arena(inputs or dtype, device, shape.features)
        self._inputs: dict[int, _Inputs] = {}
        self._slots: list[_Slot] = []
        self._order: list[int] = []  # the slot of each position
        self._corrections = _corrections(shape.optimizer, dtype, device)
        self._table = torch.zeros(0, _FIELDS, dtype=torch.int64, device=device)
        self._rates = torch.zeros(0, _RATES, dtype=dtype, device=device)
        self._history = torch.zeros(0, 0, 3, dtype=torch.float64, device=device)
        self._work: dict[str, torch.Tensor] = {}
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, int]] = {}

    def __len__(self) -> int:
        return len(self._order)

    # ---- models come and go ----

    def add(self, models: Sequence[Model]) -> None:
        """Models behind the others, at step 0 or where they have begun."""
        c = self.config
        before = [arena.tensor.data_ptr() for arena in self._arenas()]
        table = np.zeros((len(models), _FIELDS), dtype=np.int64)
        rates = np.zeros((len(models), _RATES))
        free = [k for k, slot in enumerate(self._slots) if slot.place is None]
        added = []
        for row, rate, model in zip(table, rates, models, strict=True):
            place = self._take(model)
            a = math.isqrt(place.n - 1) + 1
            row[: _FLAT_AFTER + 1] = (
                place.width, place.n, place.batch, place.room,
                place.params[0], place.acts[0], place.rows[0], place.drawn[0],
                *model.key, a, -(-place.n // a), 12 if place.n > 6 else 24, model.begun.step if model.begun else 0, 0,
                model.budget, model.check_every, model.plateau_after,
            )  # fmt: skip
            rate[:3] = model.rates
            need = _Slot(-(-place.width // c.BH), -(-place.batch // c.BB), -(-min(place.n, place.room) // c.BB))
            fits = [
                k
                for k in free
                if self._slots[k].units >= need.units
                and self._slots[k].blocks >= need.blocks
                and self._slots[k].passes >= need.passes
            ]
            # The tightest: a large slot is wanted by large models, and a new one voids what was recorded.
            k = min(fits, key=lambda k: (self._slots[k].units, self._slots[k].passes), default=len(self._slots))
            if k == len(self._slots):
                self._slots.append(need)
            else:
                free.remove(k)
            slot = self._slots[k]
            slot.place, slot.begun = place, model.begun.step if model.begun else 0
            slot.budget, slot.every = model.budget, model.check_every
            added.append(k)
        self._order += added
        if len(self._slots) > len(self._table):
            more = len(self._slots) - len(self._table)
            self._table = torch.cat([self._table, self._table.new_zeros(more, _FIELDS)])
            self._rates = torch.cat([self._rates, self._rates.new_zeros(more, _RATES)])
            self._plan()
        slots, checks = self._history.shape[:2]
        most = max([checks, *(model.checks for model in models)])
        if (slots, checks) != (len(self._slots), most):
            grown = self._history.new_zeros(len(self._slots), most, 3)
            grown[:slots, :checks] = self._history
            grown[:slots, checks:] = math.nan
            self._history = grown
            self._graphs.clear()
        if before != [arena.tensor.data_ptr() for arena in self._arenas()]:
            self._graphs.clear()
        where = torch.as_tensor(added, device=self._device)
        self._table[where] = torch.as_tensor(table, device=self._device)
        self._rates[where] = torch.as_tensor(rates, device=self._device).to(self._dtype)
        self._history[where] = math.nan
        for k, model in zip(added, models, strict=True):
            if model.begun is not None:
                known = model.begun.checks
                known = np.column_stack([known, np.minimum.accumulate(known[:, 0])])
                self._history[k, : len(known)] = torch.as_tensor(known, device=self._device)

    def keep(self, positions: Sequence[int]) -> None:
        """Leaves only the models at these positions, in this order. Their slots wait for others."""
        kept = [self._order[position] for position in positions]
        gone = sorted(set(self._order) - set(kept))
        for k in gone:
            place = self._slots[k].place
            assert place is not None
            for arena in (self._params, *self._state):
                arena.give(*place.params)
            self._acts.give(*place.acts)
            for arena in (self._rows, self._labels):
                arena.give(*place.rows)
            self._drawn.give(*place.drawn)
            self._release(place.inputs)
            self._slots[k].place = None
        self._order = kept
        if len(kept) < len(self._slots) // 2:  # programs that find nothing to do cost too
            self._slots = [self._slots[k] for k in kept]
            where = torch.as_tensor(kept, device=self._device)
            self._table, self._rates, self._history = self._table[where], self._rates[where], self._history[where]
            self._order = list(range(len(kept)))
            self._plan()
        elif gone:
            self._table[torch.as_tensor(gone, device=self._device), _STOPPED] = 1

    def rows(self, position: int) -> list[np.ndarray]:
        """The parameters of a model and each array of its optimizer state, [P], as they are kept."""
        at, size = self._place(self._order[position]).params
        return [arena.tensor[at : at + size].cpu().numpy().copy() for arena in (self._params, *self._state)]

    def weights(self, position: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(W [O, I], b [O]) of every layer of a model, float64."""
        place = self._place(self._order[position])
        at, size = place.params
        flat = self._params.tensor[at : at + size].double().cpu().numpy()
        out, begin = [], 0
        for fan_in, fan_out in self._layers(place.width):
            ld = pitch(fan_out)
            block = flat[begin : begin + (fan_in + 1) * ld].reshape(fan_in + 1, ld)[:, :fan_out]
            out.append((block[:-1].T.copy(), block[-1].copy()))
            begin += (fan_in + 1) * ld
        return out

    def _arenas(self) -> list[_Arena]:
        return [self._params, *self._state, self._acts, self._rows, self._labels, self._drawn, self._pool]

    def _place(self, slot: int) -> _Place:
        place = self._slots[slot].place
        assert place is not None
        return place

    def _layers(self, width: int) -> list[tuple[int, int]]:
        return list(itertools.pairwise([self.shape.features, *[width] * self.shape.depth, self.shape.classes]))

    def _take(self, model: Model) -> _Place:
        """Pieces of the arenas for a model, and what it begins with in them."""
        shape = self.shape
        n = len(model.rows)
        batch = shape.batch or n
        room = max(batch, self._room)
        flat = [np.zeros((fan_in + 1, pitch(fan_out))) for fan_in, fan_out in self._layers(model.width)]
        for block, (w, b) in zip(flat, model.weights, strict=True):
            block[:-1, : len(b)], block[-1, : len(b)] = w.T, b
        params = np.concatenate([block.ravel() for block in flat])
        size = len(params)
        at = self._params.take(size)
        begin = model.begun.rows if model.begun is not None else (params, *[np.zeros(size)] * len(self._state))
        for arena, values in zip((self._params, *self._state), begin, strict=True):
            same = at if arena is self._params else arena.take(size)
            assert same == at  # they are asked for the same sizes in the same order
            arena.tensor[at : at + size] = torch.as_tensor(values).to(self._device, self._dtype)
        rows = self._rows.take(n)
        labels = self._labels.take(n)
        assert labels == rows
        inputs = self._share(model.inputs)
        for arena, values in ((self._rows, inputs.at + model.rows), (self._labels, model.labels)):
            arena.tensor[rows : rows + n] = torch.as_tensor(values.astype(np.int32)).to(self._device)
        kinds = 3 if shape.activation in _KEEPS_SLOPES else 2
        acts = room * (kinds * shape.depth * pitch(model.width) + pitch(shape.classes))
        return _Place(
            inputs=inputs,
            width=model.width,
            n=n,
            batch=batch,
            room=room,
            params=(at, size),
            acts=(self._acts.take(acts), acts),
            rows=(rows, n),
            drawn=(self._drawn.take(2 * batch), 2 * batch),
        )

    def _share(self, array: np.ndarray) -> _Inputs:
        """Inputs in the pool, put there by the first model that has them."""
        found = self._inputs.get(id(array))
        if found is None:
            found = self._inputs[id(array)] = _Inputs(array, self._pool.take(len(array)))
            rows = torch.as_tensor(np.ascontiguousarray(array)).to(self._device, self._pool.tensor.dtype)
            self._pool.tensor[found.at : found.at + len(array)] = rows
        found.users += 1
        return found

    def _release(self, inputs: _Inputs) -> None:
        inputs.users -= 1
        if not inputs.users:
            del self._inputs[id(inputs.array)]
            self._pool.give(inputs.at, len(inputs.array))

    def _plan(self) -> None:
        """Work lists of the stages; what was recorded is void."""
        c, shape, slots = self.config, self.shape, self._slots
        self._graphs.clear()
        device = self._device
        most = max((slot.passes for slot in slots), default=0)
        blocks = max((slot.blocks for slot in slots), default=0)
        self._found = torch.zeros(len(slots), blocks, 2, dtype=self._dtype, device=device)
        self._check_losses = torch.zeros(len(slots), most, dtype=torch.float64, device=device)
        self._check_wrong = torch.zeros(len(slots), most, dtype=torch.int64, device=device)
        if c.whole:
            return
        lists: dict[str, list[tuple[int, ...]]] = {"hidden": [], "head": [], "weights": [], "pass": [], "check": []}
        for e, slot in enumerate(slots):
            lists["hidden"] += [(e, b, u) for b in range(slot.blocks) for u in range(slot.units)]
            lists["head"] += [(e, b) for b in range(slot.blocks)]
            lists["pass"] += [(e, b, u) for b in range(slot.passes) for u in range(slot.units)]
            lists["check"] += [(e, b) for b in range(slot.passes)]
            for layer, (fan_in, fan_out) in enumerate(self._layers(slot.units * c.BH)):
                side = c.BO if layer == shape.depth else c.BH
                inputs, outputs = -(-fan_in // c.BI), -(-fan_out // side)
                lists["weights"] += [(e, layer, i, h) for i in range(inputs) for h in range(outputs)]
        self._work = {
            name: torch.as_tensor(np.array(rows, dtype=np.int32), device=device) for name, rows in lists.items()
        }

    # ---- training ----

    def run(self, steps: int) -> None:
        """So many steps of every model, fewer of one that a check ends; without waiting for the device."""
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            while steps:
                some = min(steps, _MOST_STEPS) if self.config.whole else self._block(steps)
                (self._whole_steps if self.config.whole else self._stages)(some)
                steps -= some

    def ended(self) -> np.ndarray:
        """bool [E]: whether a check has ended each model. Waits for the device."""
        return self._table[:, _STOPPED].cpu().numpy()[self._order] != 0

    def history(self, positions: Sequence[int]) -> list[np.ndarray]:
        """What the checks of some models found, each float64 [K, 2]: mean loss in nats, samples not strictly right."""
        if not positions:
            return []
        where = torch.as_tensor([self._order[position] for position in positions], device=self._device)
        found = self._history[where].cpu().numpy()
        # A loss may be NaN; a number of samples is one once a check was made.
        return [checks[~np.isnan(checks[:, 1]), :2] for checks in found]

    def last_step(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each model's last minibatch, float64 [E]: mean loss in nats, and samples strictly right. Waits for the
        device."""
        places = [self._place(k) for k in self._order]
        used = np.array([-(-place.batch // self.config.BB) for place in places], dtype=int)
        found = self._found.double().cpu().numpy()[self._order]
        sums = np.where((np.arange(found.shape[1]) < used[:, None])[..., None], found, 0.0).sum(1)
        return sums[:, 0] / np.array([place.batch for place in places]), sums[:, 1]

    def _stages(self, steps: int) -> None:
        """So many steps in stages, on CUDA as a graph recorded at the first call with checks at the same steps."""
        checks = self._check_steps(steps)
        if self._device.type != "cuda":
            self._launch(steps, checks)
        else:
            key = (steps, self._passes(), *checks)
            if key not in self._graphs:
                self._graphs[key] = self._record(steps, checks)
            graph, launches = self._graphs[key]
            graph.replay()
            self.launches += launches
        self._advance(steps)

    @property
    def _room(self) -> int:
        """Samples of a model that a pass of a check takes at once; with full batches, all of them."""
        return max(self.shape.batch, _PASS_ROWS)

    def _passes(self) -> int:
        """Of a check, for the model that needs most."""
        if not self.shape.batch:
            return 1
        return max((-(-self._place(k).n // self._room) for k in self._order), default=0)

    def _paces(self) -> set[tuple[int, int, int]]:
        """Of the models that may take steps: steps taken, budget, and steps between checks."""
        slots = [self._slots[k] for k in self._order]
        return {(slot.begun, slot.budget, slot.every) for slot in slots if slot.begun < slot.budget}

    def _block(self, steps: int) -> int:
        """How many of the coming steps are to be launched at once, so that few different graphs are recorded."""
        paces = self._paces()
        cadences = {every for _, _, every in paces}
        if len(cadences) <= 1:
            # From check to check: the launches are the same each time.
            return min(steps, *cadences, max((budget for _, budget, _ in paces), default=steps))
        # To the next check of any, in powers of two: which checks fall into a longer block is hardly ever the same.
        gap = min(steps, *(min(every - begun % every, budget - begun) for begun, budget, every in paces))
        return 1 << (gap.bit_length() - 1)

    def _check_steps(self, steps: int) -> tuple[int, ...]:
        """After which of the coming steps, from 0, some model is checked."""
        due: set[int] = set()
        for begun, budget, every in self._paces():
            due.update(range(every - begun % every, min(steps, budget - begun) + 1, every))
            if budget - begun <= steps:
                due.add(budget - begun)
        return tuple(sorted(s - 1 for s in due))

    def _record(self, steps: int, checks: tuple[int, ...]) -> tuple[torch.cuda.CUDAGraph, int]:
        """The launches as a CUDA graph, and their number."""
        before = self.launches
        # Every kernel must be compiled and loaded before it is recorded; with models that have stopped they do nothing.
        table = self._table
        self._table = table.clone()
        self._table[:, _STOPPED] = 1
        self._launch(1, (0,))
        self._table = table
        torch.cuda.synchronize(self._device)
        self.launches = 0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(self._device)):
            self._launch(steps, checks)
        count, self.launches = self.launches, before
        return graph, count

    def _advance(self, steps: int) -> None:
        self._table[:, _STEP] = torch.minimum(self._table[:, _STEP] + steps, self._table[:, _BUDGET])
        for slot in self._slots:
            slot.begun = min(slot.begun + steps, slot.budget)

    def _launch(self, steps: int, checks: tuple[int, ...]) -> None:
        for s in range(steps):
            self._step(s)
            if s in checks:
                self._check(s)

    def _start(
        self, kernel: triton.JITFunction, programs: int, *args: object, warps: int, registers: int, **constants: object
    ) -> None:
        self.launches += 1
        limit = {"maxnreg": registers} if registers else {}
        kernel[(programs,)](
            *args, **constants, num_warps=warps, num_stages=self.config.stages, enable_fp_fusion=False, **limit
        )

    def _step(self, s: int) -> None:
        """One step of all models: 2 L + 1 launches, 2 without hidden layers, one more with many classes."""
        shape, c, work = self.shape, self.config, self._work
        params, acts = self._params.tensor, self._acts.tensor
        data = (self._pool.tensor, self._rows.tensor, self._labels.tensor, self._drawn.tensor, params, acts)
        for layer in range(shape.depth):
            self._hidden(layer, "hidden", s, 0, train=True)
        self._start(
            drivers.head_stage, len(work["head"]), self._table, work["head"], *data,
            self._found, self._found.shape[1], s,
            FULL=not shape.batch, FEATURES=shape.features, DEPTH=shape.depth, CLASSES=shape.classes,
            ACTIVATION=shape.activation, KEEP=self._keep, BB=c.BB, BH=c.BH, BC=c.BC, CK=c.CK,
            PRECISION=shape.precision, warps=c.head_warps, registers=c.head_registers,
        )  # fmt: skip
        if shape.depth and c.BC > _FUSED_CLASSES:
            self._back(shape.depth, s)
        for layer in range(shape.depth - 1, 0, -1):
            self._back(layer, s)
        self._start(
            drivers.weights_stage, len(work["weights"]), self._table, work["weights"],
            self._pool.tensor, self._drawn.tensor, *self._optimized, acts, s,
            FEATURES=shape.features, DEPTH=shape.depth, CLASSES=shape.classes, KEEP=self._keep,
            OPTIMIZER=shape.optimizer, BI=c.BI, BH=c.BH, BO=c.BO, BS=c.BS, PRECISION=shape.precision, warps=c.warps,
            registers=c.registers,
        )  # fmt: skip

    def _hidden(self, layer: int, work: str, s: int, begin: int, train: bool) -> None:
        shape, c = self.shape, self.config
        self._start(
            drivers.hidden_stage, len(self._work[work]), self._table, self._work[work], self._pool.tensor,
            self._rows.tensor, self._labels.tensor, self._drawn.tensor, self._params.tensor, self._acts.tensor,
            layer, s, begin,
            FIRST=layer == 0, TRAIN=train, FULL=not shape.batch, FEATURES=shape.features, DEPTH=shape.depth,
            ACTIVATION=shape.activation, KEEP=self._keep, BB=c.BB, BH=c.BH, BK=c.BK, PRECISION=shape.precision,
            warps=c.warps, registers=c.registers,
        )  # fmt: skip

    def _back(self, layer: int, s: int) -> None:
        shape, c, work = self.shape, self.config, self._work["hidden"]
        self._start(
            drivers.back_stage, len(work), self._table, work, self._params.tensor, self._acts.tensor, layer, s,
            LAST=layer == shape.depth, FEATURES=shape.features, DEPTH=shape.depth,
            CLASSES=shape.classes, ACTIVATION=shape.activation, KEEP=self._keep, BB=c.BB, BH=c.BH, BK=c.BK,
            PRECISION=shape.precision, warps=c.warps, registers=c.registers,
        )  # fmt: skip

    def _check(self, s: int) -> None:
        """The check of all models for which it is due after step s."""
        shape, c, work = self.shape, self.config, self._work
        for begin in range(0, self._passes() * self._room, self._room):
            for layer in range(shape.depth):
                self._hidden(layer, "pass", s, begin, train=False)
            self._start(
                drivers.check_stage, len(work["check"]), self._table, work["check"], self._pool.tensor,
                self._rows.tensor, self._labels.tensor, self._drawn.tensor, self._params.tensor, self._acts.tensor,
                self._check_losses, self._check_wrong, self._check_losses.shape[1], s, begin,
                FEATURES=shape.features, DEPTH=shape.depth, CLASSES=shape.classes,
                BB=c.BB, BC=c.BC, CK=c.CK, PRECISION=shape.precision, warps=c.head_warps, registers=c.head_registers,
            )  # fmt: skip
        self._start(
            drivers.decide_stage, len(self._slots), self._table, self._check_losses, self._check_wrong,
            self._check_losses.shape[1], self._history, self._history.shape[1], s,
            RATIO=shape.plateau_ratio, FLOOR=shape.plateau_loss, BB=c.BB, warps=1, registers=0,
        )  # fmt: skip

    def _whole_steps(self, steps: int) -> None:
        shape, c = self.shape, self.config
        self._start(
            drivers.whole_steps, len(self._slots), self._table, self._pool.tensor, self._rows.tensor,
            self._labels.tensor, self._drawn.tensor, *self._optimized, self._acts.tensor,
            self._found, self._found.shape[1], self._history, self._history.shape[1], steps,
            FULL=not shape.batch, FEATURES=shape.features, DEPTH=shape.depth, CLASSES=shape.classes,
            ACTIVATION=shape.activation, KEEP=self._keep, OPTIMIZER=shape.optimizer,
            BB=c.BB, BH=c.BH, BC=c.BC, BK=c.BK, CK=c.CK, BI=c.BI, BO=c.BO, BS=c.BS,
            RATIO=shape.plateau_ratio, FLOOR=shape.plateau_loss, PRECISION=shape.precision,
            warps=c.head_warps, registers=c.whole_registers,
        )  # fmt: skip
        self._advance(steps)

    @property
    def _optimized(self) -> tuple[torch.Tensor, ...]:
        """Parameters, two state arrays (the first again where there is one), rates and corrections."""
        first, second = self._state[0].tensor, self._state[-1].tensor
        return self._params.tensor, first, second, self._rates, self._corrections

    @property
    def _keep(self) -> bool:
        return self.shape.activation in _KEEPS_SLOPES


@functools.cache
def _corrections(optimizer: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[., 2]: what Adam's step size and the root of its second moment are multiplied with at each step.

    Of the later steps, the last row holds: both corrections are one then.
    """
    if optimizer == "sgd":
        return torch.zeros(1, 2, dtype=dtype, device=device)
    t = np.arange(1, tiles.CORRECTED.value + 1, dtype=np.float64)
    columns = np.stack([1.0 / (1.0 - 0.9**t), (1.0 - 0.999**t) ** -0.5], axis=1)
    return torch.as_tensor(columns, device=device).to(dtype)
