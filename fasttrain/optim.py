"""Optimizers over stacked parameters, with rates and step counts of each model's own.

Only operations that round once (no lerp, addcmul or add with alpha): whether a compiler contracts those to a fused
multiply-add depends on where an element lies in the array, and so on the models beside it. For the same reason roots
of single numbers are ``rsqrt``, whose vector and scalar code both round exactly. Products and eigenvalue problems are
batched, one matrix a model, of two models at least (``ensemble.capacity``). docs/training.md has all rules.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch

from fasttrain.ensemble import Layout
from fasttrain.spec import Variant

# The epsilon of Gupta et al. (2018): the statistics start at epsilon times the identity. Until its roots are renewed, a
# direction that the gradient takes for the first time is stretched by epsilon^(-1/2): at 1e-4 (a hundredfold), training
# blew up from a learning rate of 0.3 on, at 1e-2 it did not, as with new roots in every step (docs/training.md).
SHAMPOO_EPS = 1e-2
SHAMPOO_EVERY = 10  # steps between new inverse roots, counted by each model for itself
SHAMPOO_LARGEST = 1024  # of a larger dimension only the diagonal of the statistic is kept
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. (2024)
NEWTON_SCHULZ_STEPS = 5
MUON_EPS = 1e-7
MUON_SCALE = 0.2  # Liu et al. (2025), section 2.2: the size of AdamW's updates


def lr_factor(schedule: str, warmup: int, budget: int, done: int) -> float:
    """The factor on the learning rate in the step after ``done`` completed ones.

    ``(done + 1) / warmup`` while ``done < warmup``. Then, with k = done - warmup and K = budget - warmup: 1 (constant),
    (1 + cos(pi k / K)) / 2 (cosine; Loshchilov and Hutter 2017), or 1 - k / K (linear), and what they are at K beyond
    it. It is what torch's LinearLR(start_factor=1 / warmup, total_iters=warmup - 1), then CosineAnnealingLR(T_max=K)
    or LinearLR(1, 0, K), make in a SequentialLR with the milestone ``warmup``. A budget of at most ``warmup`` ends
    before the warm-up does.

    Args:
        schedule: ``"constant"``, ``"cosine"`` or ``"linear"``.
        warmup: steps.
        budget: steps that the run may take, T.
        done: steps that were made before, from 0.
    """
    if done < warmup:
        return (done + 1) / warmup
    share = min(1.0, (done - warmup) / max(1, budget - warmup))
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    return 1.0 - share if schedule == "linear" else 1.0


class Rates(NamedTuple):
    """What may differ between the models of a bucket, each float64 [E]; the budget is int64 [E], in steps."""

    lr: torch.Tensor
    momentum: torch.Tensor
    weight_decay: torch.Tensor
    budget: torch.Tensor

    @classmethod
    def of(cls, models: Iterable[tuple[Variant, int]]) -> "Rates":
        """Those of models, each given by its variant and its budget."""
        table = [(v.lr, v.momentum, v.weight_decay, budget) for v, budget in models]
        *rates, budgets = zip(*table, strict=True)
        lr, momentum, decay = (torch.tensor(column, dtype=torch.float64) for column in rates)
        return cls(lr, momentum, decay, torch.tensor(budgets))


class Optimizer(ABC):
    """One update of all models of a bucket: clipping, weight decay, and the ``rule`` of a subclass.

    Args:
        variant: a variant of the bucket; its lr and momentum, and how large its weight decay is, are not used.
        layout: of the parameters.

    Attributes:
        state_names: names of the state arrays.
        decoupled: whether weight decay shrinks the parameters instead of being added to the gradient.
        accumulates: whether ``accumulator`` gives an array.
    """

    state_names: tuple[str, ...] = ()
    decoupled = False

    def __init__(self, variant: Variant, layout: Layout) -> None:
        self._layout = layout
        self._schedule, self._warmup = variant.schedule, variant.warmup
        self._clip, self._decays, self._nesterov = variant.clip, variant.weight_decay != 0.0, variant.nesterov
        self.accumulates = False

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """S of each state array [E, S]; they start at zero."""
        return (self._layout.size,) * len(self.state_names)

    def tables(self, step: torch.Tensor, rates: Rates) -> list[torch.Tensor]:
        """Per-model coefficients of the coming updates.

        Args:
            step: int64 [S, E], 1 for a model's first update.
            rates: of the models.

        Returns:
            float64 tensors [S, E]; ``update`` takes a row of each as [E, 1] in the dtype of the parameters.
        """
        lr = rates.lr.expand(step.shape)
        if self._warmup or self._schedule != "constant":
            lr = lr * self._lr_factors(step, rates.budget)
        columns = self.columns(step, lr, rates.momentum.expand(step.shape))
        if self._decays:
            decay = rates.weight_decay.expand(step.shape)
            columns.append(1.0 - lr * decay if self.decoupled else decay)
        return columns

    def _lr_factors(self, step: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
        """``lr_factor`` in the steps [S, E] of models with these budgets [E]; once for each (step, budget) there is."""
        budgets, which = torch.unique(budget, return_inverse=True)
        span = int(step.max()) + 1
        pairs, where = torch.unique(which * span + step, return_inverse=True)
        factors = [
            lr_factor(self._schedule, self._warmup, int(budgets[pair // span]), pair % span - 1)
            for pair in pairs.tolist()
        ]
        return torch.tensor(factors, dtype=torch.float64)[where]

    def accumulator(self, state: list[torch.Tensor], row: list[torch.Tensor]) -> torch.Tensor | None:
        """The state array that the coming gradient is to be added to, ready for it; None if there is none.

        To be called once before ``update``.
        """
        return None

    def update(
        self, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
    ) -> None:
        """Updates ``params`` [E, P] and ``state`` in place.

        ``grads`` [E, P] is the gradient, zero between the parameters, or with an ``accumulator`` any memory; it may be
        overwritten.
        """
        if self._clip:
            clip_(grads, self._clip)
        if self._decays:
            *row, decay = row
            if self.decoupled:
                params.mul_(decay)
            else:
                grads.add_(params * decay)
        self.rule(params, grads, state, row)

    @abstractmethod
    def columns(self, step: torch.Tensor, lr: torch.Tensor, momentum: torch.Tensor) -> list[torch.Tensor]:
        """The coefficients that ``rule`` takes, from float64 tensors [S, E]."""

    @abstractmethod
    def rule(
        self, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
    ) -> None:
        """``update`` behind clipping and weight decay."""


class SGD(Optimizer):
    """SGD with momentum as torch.optim.SGD has it: buf = momentum buf + g; p -= lr buf.

    Nesterov's: p -= lr (g + momentum buf).
    """

    state_names = ("momentum_buffer",)

    def __init__(self, variant: Variant, layout: Layout) -> None:
        super().__init__(variant, layout)
        # The others need the gradient by itself.
        self.accumulates = not (self._clip or self._decays or self._nesterov)

    def columns(self, step: torch.Tensor, lr: torch.Tensor, momentum: torch.Tensor) -> list[torch.Tensor]:
        """Learning rate and momentum."""
        return [lr, momentum]

    def accumulator(self, state: list[torch.Tensor], row: list[torch.Tensor]) -> torch.Tensor | None:
        """The momentum buffer, where nothing else is done with the gradient."""
        return state[0].mul_(row[1]) if self.accumulates else None

    def rule(
        self, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
    ) -> None:
        """One step."""
        lr, momentum = row
        if not self.accumulates:
            state[0].mul_(momentum).add_(grads)
        if self._nesterov:
            params.sub_(grads.add_(state[0] * momentum).mul_(lr))
        else:
            params.sub_(torch.mul(state[0], lr, out=grads))


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015) as torch.optim.Adam has it: epsilon outside of the corrected root."""

    state_names = ("exp_avg", "exp_avg_sq")

    def columns(self, step: torch.Tensor, lr: torch.Tensor, momentum: torch.Tensor) -> list[torch.Tensor]:
        """Bias-corrected step size, and the factor that corrects the root of the second moment."""
        return _adam_columns(step, lr)

    def rule(
        self, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
    ) -> None:
        """One step."""
        _adam(params, grads, state[0], state[1], row[0], row[1])


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) as torch.optim.AdamW: p *= 1 - lr decay first."""

    decoupled = True


class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton 2012) as torch.optim.RMSprop: alpha 0.99, epsilon 1e-8 outside of the root."""

    state_names = ("square_avg",)
    alpha, eps = 0.99, 1e-8

    def columns(self, step: torch.Tensor, lr: torch.Tensor, momentum: torch.Tensor) -> list[torch.Tensor]:
        """The learning rate."""
        return [lr]

    def rule(
        self, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
    ) -> None:
        """One step."""
        square = state[0].mul_(self.alpha).add_((grads * grads).mul_(1 - self.alpha))
        params.sub_(grads.div_(square.sqrt().add_(self.eps)).mul_(row[0]))


class Shampoo(Optimizer):
    """Shampoo (Gupta, Koren and Singer 2018, arXiv 1802.09568, algorithms 1 and 2), without momentum.

    A matrix G [m, n] (a convolution's kernel as [out, rest]) has the statistics L = eps I + sum G G^T and R = eps I +
    sum G^T G, and steps by -lr L^(-1/4) G R^(-1/4): an order of k = 2, the exponent -1 / (2 k). A vector (k = 1) has
    H = eps I + sum g g^T, and steps by -lr H^(-1/2) g. Of a dimension above ``SHAMPOO_LARGEST`` only the statistic's
    diagonal is kept, whose root is new in every step; the others' roots are new in a model's steps 1, 11, 21, ...

    A statistic that is no longer finite has a root of NaN: the model has diverged.
    """

    state_names = ("statistics", "inverse_roots")

    def __init__(self, variant: Variant, layout: Layout) -> None:
        super().__init__(variant, layout)
        statistics: dict[str, tuple[int, ...]] = {}
        for name, shape in layout.shapes.items():
            for side, size in enumerate(_matrix(shape)):
                statistics[f"{name}.{side}"] = (size,) if size > SHAMPOO_LARGEST else (size, size)
        self._statistics = Layout(statistics)
        self._roots = Layout({name: shape for name, shape in statistics.items() if len(shape) == 2})

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Of the statistics without eps I, and of the roots."""
        return self._statistics.size, self._roots.size

    def columns(self, step: torch.Tensor, lr: torch.Tensor, momentum: torch.Tensor) -> list[torch.Tensor]:
        """The learning rate, and 1 where a model's roots are due."""
        return [lr, ((step - 1) % SHAMPOO_EVERY == 0).to(torch.float64)]

    def rule(
        self, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
    ) -> None:
        """One step."""
        statistics, roots = self._statistics.views(state[0]), self._roots.views(state[1])
        due = row[1][:, 0].nonzero()[:, 0]
        if len(due) == 1:
            due = due.expand(2)  # a batched product of one matrix takes another path
        views = self._layout.views(grads)
        for name, shape in self._layout.shapes.items():
            sides = _matrix(shape)
            grad = views[name].reshape(len(grads), sides[0], -1)
            for side in range(len(sides)):
                key = f"{name}.{side}"
                unfolded = grad if side == 0 else grad.mT
                if key in roots:
                    torch.baddbmm(statistics[key], unfolded, unfolded.mT, out=statistics[key])
                    if len(due):
                        roots[key][due] = _inverse_root(statistics[key][due], len(sides))
                else:
                    statistics[key].add_((unfolded * unfolded).sum(2))
            for side in range(len(sides)):
                key = f"{name}.{side}"
                unfolded = grad if side == 0 else grad.mT
                if key in roots:
                    unfolded = torch.bmm(roots[key], unfolded)
                else:
                    unfolded = unfolded * _power(statistics[key] + SHAMPOO_EPS, len(sides))[:, :, None]
                grad = unfolded if side == 0 else unfolded.mT
            views[name].copy_(grad.reshape(views[name].shape))
        params.sub_(grads.mul_(row[0]))


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) with the scale and the decay of Liu et al. (2025, arXiv 2502.16982).

    For a matrix (a convolution's kernel as [out, rest]): buf = momentum buf + g; u = buf, or g + momentum buf with
    Nesterov's; X = u / (|u| + 1e-7), |u| its own Frobenius norm; 5 times X = a X + (b A + c A^2) X with A = X X^T
    (of the transpose, if there are more rows than columns), in the precision of the parameters;
    p = p (1 - lr decay) - lr 0.2 sqrt(max(rows, columns)) X.

    Muon is made for matrices: vectors take AdamW's step (betas 0.9 and 0.999, epsilon 1e-8) at the same learning rate
    and decay, as the factor 0.2 sqrt(...) gives a matrix's step the size that AdamW's has.
    """

    state_names = ("momentum_buffer", "exp_avg_sq")
    decoupled = True

    def __init__(self, variant: Variant, layout: Layout) -> None:
        super().__init__(variant, layout)
        self._vectors = Layout({name: shape for name, shape in layout.shapes.items() if len(_matrix(shape)) == 1})

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Of the buffers (first moments of vectors), and of the vectors' second moments."""
        return self._layout.size, self._vectors.size

    def columns(self, step: torch.Tensor, lr: torch.Tensor, momentum: torch.Tensor) -> list[torch.Tensor]:
        """Learning rate, momentum, and Adam's two."""
        return [lr, momentum, *_adam_columns(step, lr)]

    def rule(
        self, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
    ) -> None:
        """One step."""
        lr, momentum, size, correction = row
        buffers, squares = self._layout.views(state[0]), self._vectors.views(state[1])
        values, views = self._layout.views(params), self._layout.views(grads)
        for name, shape in self._layout.shapes.items():
            p, g, buffer = (x[name].reshape(len(params), -1) for x in (values, views, buffers))
            if name in squares:
                _adam(p, g, buffer, squares[name].reshape(len(params), -1), size, correction)
                continue
            buffer.mul_(momentum).add_(g)
            moved = (buffer * momentum).add_(g) if self._nesterov else buffer
            rows, columns = _matrix(shape)
            x = orthogonal(moved.reshape(-1, rows, columns)).reshape(len(params), -1)
            p.sub_((x * (MUON_SCALE * max(rows, columns) ** 0.5)).mul_(lr))


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSprop,
    "shampoo": Shampoo,
    "muon": Muon,
}


def make_optimizer(variant: Variant, layout: Layout) -> Optimizer:
    """The optimizer of a bucket, given a variant of it and the layout of its parameters."""
    return OPTIMIZERS[variant.optimizer](variant, layout)


def clip_(grads: torch.Tensor, limit: float) -> None:
    """Scales each model's gradient [E, P] to a norm of at most ``limit``, as torch's clip_grad_norm_ does."""
    norm = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
    grads.mul_(norm.add_(1e-6).reciprocal_().mul_(limit).clamp_(max=1.0))


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About U V^T of each matrix U S V^T of [E, m, n], by ``NEWTON_SCHULZ_STEPS`` steps in their precision."""
    a, b, c = NEWTON_SCHULZ
    norm = torch.linalg.vector_norm(matrices.flatten(1), dim=1)
    x = matrices / norm.add_(MUON_EPS)[:, None, None]
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A parameter's shape as a matrix (m, n), or as a vector (n,)."""
    if len(shape) < 2:
        return (math.prod(shape),)
    return shape[0], math.prod(shape[1:])


def _power(values: torch.Tensor, order: int) -> torch.Tensor:
    """values^(-1 / (2 order)) for an order of 1 or 2."""
    return values.rsqrt() if order == 1 else values.rsqrt().rsqrt_().reciprocal_()


def _inverse_root(statistics: torch.Tensor, order: int) -> torch.Tensor:
    """(H + eps I)^(-1 / (2 order)) of each statistic H of [E, n, n]; NaN where it is not finite."""
    finite = torch.isfinite(statistics).all(2).all(1)[:, None, None]
    # One matrix that is not would be an error for all. H has no eigenvalue below zero but for rounding.
    values, vectors = torch.linalg.eigh(torch.where(finite, statistics, 0.0))
    scale = _power(values.clamp_(min=0.0).add_(SHAMPOO_EPS), order)
    return torch.where(finite, torch.bmm(vectors * scale[:, None, :], vectors.mT), torch.nan)


_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


def _adam_columns(step: torch.Tensor, lr: torch.Tensor) -> list[torch.Tensor]:
    # Python's power: the bits of torch's depend on where in the array an element lies.
    at, where = torch.unique(step, return_inverse=True)
    first = torch.tensor([1 - _BETA1**t for t in at.tolist()], dtype=torch.float64)
    second = torch.tensor([(1 - _BETA2**t) ** -0.5 for t in at.tolist()], dtype=torch.float64)
    return [lr / first[where], second[where]]


def _adam(
    params: torch.Tensor,
    grads: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    step_size: torch.Tensor,
    correction: torch.Tensor,
) -> None:
    mean.mul_(_BETA1).add_(grads * (1 - _BETA1))
    square.mul_(_BETA2).add_(grads.mul_(grads).mul_(1 - _BETA2))
    denominator = torch.sqrt(square, out=grads).mul_(correction).add_(_EPS)
    params.sub_(torch.div(mean, denominator, out=grads).mul_(step_size))
