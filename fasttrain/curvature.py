"""Where training ended: gradient norm, slope of the loss, and the ends of the Hessian's spectrum. Diagnostics only.

Nothing in the search or in the estimates looks at them (docs/measuring.md, "Diagnostics").
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch.func import functional_call, vmap

from fasttrain.backends.base import Setting
from fasttrain.data import task
from fasttrain.errors import UserError
from fasttrain.factories import first_line
from fasttrain.models import build, input_shape, parameter_count, sample_elements, shaping
from fasttrain.records import Censored, Curvature, Estimate, History, ProbeResult
from fasttrain.sampling import Purpose, generator
from fasttrain.spec import ARCHITECTURES, Variant

TOLERANCE = 1e-5
"""Largest residual of an end of the spectrum that has converged, as a share of the Hessian's largest |eigenvalue|."""

_DENSE = 256  # parameters up to which the whole Hessian costs no more products than Lanczos often takes
_BASIS = 40  # Lanczos vectors: of 20, 40, 80 and 200, the fewest products over ten Hessians
_RESTARTS = 150
_LOOSER = (1.0, 1e2, 1e4)  # tolerances to fall back on, so that what has not converged still has a number
_POWER_STEPS = 10
_STEP = 1e-6  # of a difference of gradients; what it is off by is far below _NEAR unless a kink lies within
_NEAR = 1e-2
_PASS_NUMBERS = {"cpu": 2**19, "cuda": 2**26}  # activations of a pass: as many as a cache holds, or as fill a GPU
_PASS_ROWS = 32  # at least
_KEPT_BYTES = 2**30  # graphs of the gradient, Lanczos vectors and inputs, each
_COPIES = 5  # numbers that a graph of the gradient keeps for each that a forward pass keeps
_MOST_MODELS = 32

Product = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Ends:
    """The ends of the spectrum of a symmetric matrix, each with the norm of H v - lambda v for its unit vector v.

    Attributes:
        lambda_min: smallest eigenvalue.
        residual_min: of it.
        lambda_max: largest eigenvalue.
        residual_max: of it.
        converged: whether both residuals are at most ``TOLERANCE`` times the larger of the two in absolute value.
    """

    lambda_min: float = math.nan
    residual_min: float = math.nan
    lambda_max: float = math.nan
    residual_max: float = math.nan
    converged: bool = False


def choose(estimate: Estimate, results: Sequence[ProbeResult], count: int) -> list[ProbeResult]:
    """The runs of a variant to look at: those nearest to EMC50 in ln n, half of them fitted where possible.

    Of an odd number, one more is fitted. Where there are too few of a kind, the other kind takes their place. Ties go
    to the smaller n, then to the smaller seed. Where EMC50 is censored, its bound takes its place. Runs with a third of
    the budget are not among them: they ended elsewhere.

    Args:
        estimate: of the variant.
        results: its finished runs, in any order.
        count: how many, 0 or more.

    Returns:
        By ascending n, then seed; none where there is no estimate.
    """
    bounds = {Censored.ABOVE: estimate.emc50_low, Censored.BELOW: estimate.emc50_high}
    centre = bounds.get(estimate.censored, estimate.emc50)
    if not (math.isfinite(centre) and centre > 0):
        return []
    near = sorted(
        (result for result in results if not result.probe.short),
        key=lambda result: (abs(math.log(result.probe.n / centre)), result.probe.n, result.probe.seed),
    )
    fitted = [result for result in near if result.fitted]
    failed = [result for result in near if not result.fitted]
    half = min(len(fitted), max(-(-count // 2), count - len(failed)))
    taken = fitted[:half] + failed[: count - half]
    return sorted(taken, key=lambda result: (result.probe.n, result.probe.seed))


def loss_slope(history: History) -> float:
    """d ln loss / d ln step over the last half of a training curve, by least squares.

    Over its rows with step >= (last step) / 2, with u = ln step and w = ln loss:

        sum (u - mean u) (w - mean w) / sum (u - mean u)^2

    Returns:
        The slope; NaN where there are fewer than two such rows, or a loss that is not positive and finite.
    """
    if not len(history.step):
        return math.nan
    late = history.step >= history.step[-1] / 2
    step, loss = history.step[late].astype(np.float64), history.train_loss[late]
    if len(step) < 2 or not np.all(np.isfinite(loss) & (loss > 0)):
        return math.nan
    u, w = np.log(step), np.log(loss)
    return float(np.sum((u - u.mean()) * (w - w.mean())) / np.sum((u - u.mean()) ** 2))


def check(setting: Setting, variants: Sequence[Variant]) -> None:
    """Whether the models of a user's own have second derivatives, before anything is trained.

    A product with the Hessian is compared with a difference of gradients: PyTorch leaves out, without a word, what
    passes through a function whose backward pass has no derivative.

    Raises:
        UserError: one of them cannot be differentiated twice, or what PyTorch gives is no second derivative.
    """
    tried = {shaping(variant): variant for variant in variants if variant.arch not in ARCHITECTURES}
    for variant in tried.values():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module = build(variant, setting.in_shape).double().eval()
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(6, *input_shape(variant, setting.in_shape), generator=draw, dtype=torch.float64)
        parameters = list(module.parameters())
        direction = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in parameters]
        try:
            product = _flat(_product(_some_gradient(module, x), parameters, direction), models=1)
            _move(parameters, direction, _STEP)
            above = _flat(_some_gradient(module, x), models=1)
            _move(parameters, direction, -2 * _STEP)
            below = _flat(_some_gradient(module, x), models=1)
        except Exception as error:  # a module of the user's may raise anything
            raise UserError(
                "curvature", variant.arch, f"cannot be differentiated twice ({first_line(error)}); expected 0"
            ) from None
        difference = (above - below) / (2 * _STEP)
        if not float((product - difference).norm()) <= _NEAR * float(difference.norm() + above.norm()):
            raise UserError(
                "curvature", variant.arch, "cannot be differentiated twice: its gradient has no derivative; expected 0"
            )


def _some_gradient(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    loss = -torch.log_softmax(module(x), -1)[:, 0].sum()
    return torch.autograd.grad(loss, list(module.parameters()), create_graph=True)


@torch.no_grad()
def _move(parameters: Sequence[torch.Tensor], direction: Sequence[torch.Tensor], step: float) -> None:
    for p, d in zip(parameters, direction, strict=True):
        p.add_(d, alpha=step)


def measure(
    setting: Setting,
    variants: Sequence[Variant],
    results: Sequence[ProbeResult],
    *,
    batched: bool = True,
    between: Callable[[], None] = lambda: None,
) -> list[Curvature]:
    """Gradient norm, slope of the loss and ends of the Hessian's spectrum of several runs of one shape.

    All of the plain mean cross-entropy over the run's n samples, which checks report, at its parameters at the end:
    without label smoothing and weight decay, also where the run was trained with them; with batch normalisation at its
    running averages. With respect to all trained parameters, in float64. The Hessian is that of automatic
    differentiation: at a kink, as of ReLU, the second derivative is 0.

    Up to 256 parameters, the whole Hessian is computed and ``numpy.linalg.eigh`` finds its ends. Above, ARPACK does
    (implicitly restarted Lanczos, Lehoucq, Sorensen and Yang 1998; ``scipy.sparse.linalg.eigsh``), from a start vector
    keyed by (scan seed, seed, n), on products that are computed for several models at once. A residual bounds the
    distance to the nearest eigenvalue; that this is the end of the spectrum is not proved by any Lanczos method.

    A model's numbers depend on its company by the rounding of batched sums only: loss and gradient norm by that,
    eigenvalues by no more than their residuals while they converge, the number of products by some restarts.

    Args:
        setting: of the scan. Batches and memory follow from it and from the sizes, never from the machine's load.
        variants: of each run; of one shape, whatever their training.
        results: the runs, with ``weights``, which have running averages among them if there are any.
        batched: whether vmap may take several models at once; not true of all modules that the loop backend trains.
        between: called between products, from the calling thread; what it raises ends the measurement.

    Returns:
        One for each run, in order. All NaN where the parameters, the loss or a product is not finite.

    Raises:
        ValueError: a run has no weights, or another shape than the first.
    """
    if any(result.weights is None for result in results):
        raise ValueError("a run has no weights")
    if len({shaping(variant) for variant in variants}) > 1:
        raise ValueError("the runs are of several shapes")
    order = sorted(range(len(results)), key=lambda i: results[i].probe.n)
    found: list[Curvature | None] = [None] * len(results)
    while order:
        largest = results[order[-1]].probe.n
        some = order[-_at_once(setting, variants[0], largest, batched) :]
        del order[-len(some) :]
        models = _Models(setting, [variants[i] for i in some], [results[i] for i in some])
        seeds = [(setting.spec.seed, results[i].probe.seed, results[i].probe.n, Purpose.CURVATURE) for i in some]
        rngs = [generator(*seed) for seed in seeds]
        losses, norms = models.loss_and_gradient_norm()
        solved = _together(models, rngs, between)
        for i, loss, norm, (ends, products) in zip(some, losses, norms, solved, strict=True):
            found[i] = Curvature(
                loss=loss,
                gradient_norm=norm,
                loss_slope=loss_slope(results[i].history),
                lambda_min=ends.lambda_min,
                residual_min=ends.residual_min,
                lambda_max=ends.lambda_max,
                residual_max=ends.residual_max,
                products=products,
                converged=ends.converged,
            )
    return [curvature for curvature in found if curvature is not None]


def spectrum_ends(product: Product, size: int, rng: np.random.Generator) -> Ends:
    """The ends of the spectrum of a symmetric matrix of which only products with vectors are known.

    Args:
        product: v float64 [P] to H v float64 [P].
        size: P.
        rng: draws the start vector.

    Returns:
        NaN where a product is not finite.
    """
    if size <= _DENSE:
        matrix = np.stack([product(row) for row in np.eye(size)])
        if not np.isfinite(matrix).all():
            return Ends()
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        residuals = np.linalg.norm(matrix.T @ vectors[:, [0, -1]] - values[[0, -1]] * vectors[:, [0, -1]], axis=0)
        return _ends(values[[0, -1]], residuals)
    start = rng.standard_normal(size)
    vector, scale = start / np.linalg.norm(start), 0.0
    for _ in range(_POWER_STEPS):  # towards the largest |eigenvalue|, from below
        vector = product(vector)
        scale = float(np.linalg.norm(vector))
        if not math.isfinite(scale):
            return Ends()
        if scale == 0.0:  # of a random vector: so is the matrix
            return _ends(np.zeros(2), np.zeros(2))
        vector = vector / scale
    # ARPACK takes a pair for converged relative to its own eigenvalue, which for one near 0 asks for the impossible.
    # Divided by the scale and shifted by 4, all are of one size, and at most 5 times the largest of them before.
    shifted = LinearOperator((size, size), matvec=lambda v: product(v) / scale + 4.0 * v, dtype=np.float64)
    for looser in _LOOSER:
        try:
            values, vectors = eigsh(
                shifted,
                k=2,
                which="BE",
                ncv=_BASIS,
                tol=TOLERANCE * looser / 5.0,
                maxiter=_RESTARTS,
                v0=start,
                rng=rng,
            )
        except ArpackError:
            continue
        pairs = sorted(zip(((values - 4.0) * scale).tolist(), vectors.T, strict=True), key=lambda pair: pair[0])
        norms = [float(np.linalg.norm(product(v) - value * v)) for value, v in pairs]
        return _ends(np.array([value for value, _ in pairs]), np.array(norms))
    return Ends()


def _ends(values: np.ndarray, residuals: np.ndarray) -> Ends:
    low, high = values.tolist()
    first, last = residuals.tolist()
    return Ends(low, first, high, last, max(first, last) <= TOLERANCE * max(abs(low), abs(high)))


def _at_once(setting: Setting, variant: Variant, n: int, batched: bool) -> int:
    """Models whose products are computed together: as many as pay, a rule of the shape and of the largest n."""
    if not batched:
        return 1
    elements = sample_elements(variant, setting.in_shape)
    rows = min(n, _rows(setting, variant))
    # Larger passes are no faster for being batched.
    paying = _PASS_NUMBERS[setting.device.type] // (rows * elements)
    params = parameter_count(variant, setting.in_shape)
    room = _KEPT_BYTES // (8 * max((_BASIS + 8) * params, n * setting.features))
    return max(1, min(paying, room, _MOST_MODELS))


def _rows(setting: Setting, variant: Variant) -> int:
    """Samples of a pass: a rule of the shape, so that a model's sums have the same terms in any company."""
    return max(_PASS_ROWS, _PASS_NUMBERS[setting.device.type] // sample_elements(variant, setting.in_shape))


def _product(
    grads: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The derivative of (gradient, vector), which is the Hessian times the vector; the graph is kept."""
    return torch.autograd.grad(grads, parameters, vectors, retain_graph=True, materialize_grads=True)


@dataclass(slots=True, eq=False)
class _Graph:
    """The gradient of some models' loss over some samples, to be differentiated again."""

    parameters: list[torch.Tensor]  # [E, ...]
    losses: torch.Tensor  # [E]
    grads: tuple[torch.Tensor, ...]  # [E, ...]


class _Models:
    """Loss, gradient and products with the Hessian of models of one shape, in float64.

    The second backward pass runs over a graph of the first one: kept from product to product where memory allows, made
    again for every pass where not, with the same bits.
    """

    def __init__(self, setting: Setting, variants: Sequence[Variant], results: Sequence[ProbeResult]) -> None:
        device, variant = setting.device, variants[0]
        self._rows = _rows(setting, variant)
        self._module = build(variant, setting.in_shape).to(device, torch.float64).eval()
        names = [name for name, _ in self._module.named_parameters()]
        buffers = dict(self._module.named_buffers())
        weights = [result.weights or {} for result in results]
        self._parameters = [_stacked(weights, name, device) for name in names]
        self._buffers = {
            name: _stacked(weights, name, device)
            for name, b in buffers.items()
            if b.is_floating_point() and name in weights[0]
        }
        self._names = names
        self.size = sum(p[0].numel() for p in self._parameters)
        self._x, self._y = [], []
        for own, result in zip(variants, results, strict=True):
            probe = result.probe
            drawn = task(setting.spec, own.labels, own.classes, probe.seed, probe.n, own.inputs)
            x = torch.as_tensor(drawn.inputs(), dtype=torch.float64).view(-1, *input_shape(own, setting.in_shape))
            self._x.append(x.to(device))
            self._y.append(torch.as_tensor(drawn.y, device=device))
        self._eye = torch.eye(variant.classes, dtype=torch.float64, device=device)
        numbers = sample_elements(variant, setting.in_shape) * sum(map(len, self._y))
        self._keeps = 8 * _COPIES * numbers <= _KEPT_BYTES
        self._kept: tuple[list[int], list[_Graph]] = ([], [])

    def __len__(self) -> int:
        return len(self._x)

    def loss_and_gradient_norm(self) -> tuple[list[float], list[float]]:
        """Mean cross-entropy and norm of its gradient, of every model."""
        positions = list(range(len(self)))
        losses = torch.zeros(len(self), dtype=torch.float64)
        total = torch.zeros(len(self), self.size, dtype=torch.float64)
        for graph in self._graphs(positions):
            losses += graph.losses.detach().cpu()
            total += _flat(graph.grads, len(self)).cpu()
        return losses.tolist(), torch.linalg.vector_norm(total, dim=1).tolist()

    def products(self, positions: list[int], vectors: list[np.ndarray]) -> list[np.ndarray]:
        """The Hessian of each of these models times its vector [P]."""
        given = torch.as_tensor(np.stack(vectors)).to(self._eye.device)
        total = torch.zeros_like(given)
        for graph in self._graphs(positions):
            at, split = 0, []
            for p in graph.parameters:
                width = p[0].numel()
                split.append(given[:, at : at + width].view_as(p))
                at += width
            total += _flat(_product(graph.grads, graph.parameters, split), len(positions))
        return list(total.cpu().numpy())

    def _graphs(self, positions: list[int]) -> Iterator[_Graph]:
        if not self._keeps:
            yield from self._made(positions)
            return
        if self._kept[0] != positions:
            self._kept = ([], [])  # the old ones are gone before the new ones take their room
            self._kept = (list(positions), list(self._made(positions)))
        yield from self._kept[1]

    def _made(self, positions: list[int]) -> Iterator[_Graph]:
        """A graph for every pass over the samples; where the models' n differ, the smaller ones end in weights of 0."""
        for start in range(0, max(len(self._y[i]) for i in positions), self._rows):
            rows = min(self._rows, max(len(self._y[i]) for i in positions) - start)
            xs, labels, weights = [], [], []
            for i in positions:
                n = len(self._y[i])
                # What pads is a sample of the model's own, which is as finite as the others.
                index = torch.arange(start, start + rows, device=self._eye.device)
                some = torch.where(index < n, index, 0)
                xs.append(self._x[i][some])
                labels.append(self._eye[self._y[i][some]])
                weights.append((index < n).double() / n)
            parameters = [p[positions].requires_grad_(True) for p in self._parameters]
            buffers = {name: b[positions] for name, b in self._buffers.items()}
            named = dict(zip(self._names, parameters, strict=True))
            losses = self._losses(named, buffers, torch.stack(xs), torch.stack(labels), torch.stack(weights))
            # The models' losses are sums of their own terms: the gradient of the total has each model's own.
            grads = torch.autograd.grad(losses.sum(), parameters, create_graph=True)
            yield _Graph(parameters, losses, grads)

    def _losses(
        self,
        parameters: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        onehot: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        def one(p: dict, b: dict, x: torch.Tensor, onehot: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            logits = functional_call(self._module, {**p, **b}, (x,))
            return -((torch.log_softmax(logits, -1) * onehot).sum(-1) * weight).sum()

        if len(x) > 1:
            return vmap(one)(dict(parameters), dict(buffers), x, onehot, weight)
        # Without vmap, which not every module bears.
        p, b = ({name: value[0] for name, value in some.items()} for some in (parameters, buffers))
        return one(p, b, x[0], onehot[0], weight[0])[None]


def _stacked(weights: Sequence[Mapping[str, np.ndarray]], name: str, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(np.stack([own[name] for own in weights]), dtype=torch.float64).to(device)


def _flat(tensors: Sequence[torch.Tensor], models: int) -> torch.Tensor:
    """[E, ...] of every parameter as [E, P]."""
    return torch.cat([t.detach().reshape(models, -1) for t in tensors], dim=1)


class _Stopped(Exception):
    """Ends a solver whose products are no longer computed."""


class _Solver(threading.Thread):
    """The solver of one model: asks for products through a queue, and waits for each."""

    def __init__(self, position: int, size: int, rng: np.random.Generator, asked: "queue.SimpleQueue[_Solver]") -> None:
        super().__init__(name=f"fasttrain-curvature-{position}", daemon=True)
        self.position = position
        self.vector: np.ndarray | None = None  # to be multiplied; None once it has ended
        self.answers: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()  # None: stop
        self.ends = Ends()
        self.products = 0
        self.error: BaseException | None = None
        self._size, self._rng, self._asked = size, rng, asked

    def run(self) -> None:
        """Until the ends are found, or it is stopped."""
        try:
            self.ends = spectrum_ends(self._product, self._size, self._rng)
        except _Stopped:
            return
        except BaseException as error:
            self.error = error
        self.vector = None
        self._asked.put(self)

    def _product(self, vector: np.ndarray) -> np.ndarray:
        self.vector = np.array(vector, dtype=np.float64).reshape(-1)  # ARPACK writes over its own
        self.products += 1
        self._asked.put(self)
        answer = self.answers.get()
        if answer is None:
            raise _Stopped
        return answer


def _together(
    models: _Models, rngs: Sequence[np.random.Generator], between: Callable[[], None]
) -> list[tuple[Ends, int]]:
    """The ends and the number of products of every model: one solver a thread, their products in batches from here.

    Every batch has one vector of each solver that has not ended: which ones follows from the numbers, never from time.
    """
    asked: queue.SimpleQueue[_Solver] = queue.SimpleQueue()
    solvers = [_Solver(position, models.size, rng, asked) for position, rng in enumerate(rngs)]
    going = set(solvers)
    try:
        for solver in solvers:
            solver.start()
        while going:
            waiting = []
            for _ in range(len(going)):
                solver = asked.get()
                if solver.vector is not None:
                    waiting.append(solver)
                    continue
                going.discard(solver)
                if solver.error is not None:
                    raise solver.error
            if not waiting:
                continue
            waiting.sort(key=lambda solver: solver.position)
            vectors = [solver.vector for solver in waiting if solver.vector is not None]
            for solver, product in zip(
                waiting, models.products([solver.position for solver in waiting], vectors), strict=True
            ):
                solver.answers.put(product)
            between()
    finally:
        for solver in solvers:
            solver.answers.put(None)
        for solver in solvers:
            if solver.is_alive():
                solver.join()
    return [(solver.ends, solver.products) for solver in solvers]


__all__ = ["TOLERANCE", "Ends", "check", "choose", "loss_slope", "measure", "spectrum_ends"]
