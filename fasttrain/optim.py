"""Optimizers over stacked parameters, with hyper-parameters and step counts of each model's own.

Only operations that round once (no lerp, addcmul or add with alpha): whether a compiler contracts those to a fused
multiply-add depends on where an element lies in the array, and so on the models beside it.
"""

from typing import Protocol

import torch


class Optimizer(Protocol):
    """One update of all models; state arrays have the shape [E, P] of the parameters and start at zero."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the state arrays."""

    def tables(self, step: torch.Tensor, lr: torch.Tensor, momentum: torch.Tensor) -> list[torch.Tensor]:
        """Per-model coefficients of the coming updates.

        Args:
            step: int64 [S, E], 1 for a model's first update.
            lr: float64 [E].
            momentum: float64 [E].

        Returns:
            float64 tensors [S, E]; ``update`` takes a row of each as [E, 1] in the dtype of the parameters.
        """

    def accumulator(self, state: list[torch.Tensor], row: list[torch.Tensor]) -> torch.Tensor | None:
        """The state array that the coming gradient is to be added to, ready for it; None if there is none.

        To be called once before ``update``.
        """

    def update(
        self, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
    ) -> None:
        """Updates ``params`` and ``state`` [E, P] in place.

        ``grads`` is the gradient, or with an ``accumulator`` any memory; it may be overwritten.
        """


class SGD:
    """SGD with (heavy-ball) momentum as torch.optim.SGD has it: buf = momentum buf + g; p -= lr buf."""

    state_names = ("momentum_buffer",)

    def tables(self, step: torch.Tensor, lr: torch.Tensor, momentum: torch.Tensor) -> list[torch.Tensor]:
        """Learning rate and momentum, constant over the steps."""
        return [lr.expand(step.shape), momentum.expand(step.shape)]

    def accumulator(self, state: list[torch.Tensor], row: list[torch.Tensor]) -> torch.Tensor:
        """The momentum buffer."""
        return state[0].mul_(row[1])

    def update(
        self, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
    ) -> None:
        """One step."""
        params.sub_(torch.mul(state[0], row[0], out=grads))


class Adam:
    """Adam (Kingma and Ba 2015) as torch.optim.Adam has it: epsilon outside of the corrected root."""

    state_names = ("exp_avg", "exp_avg_sq")
    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def tables(self, step: torch.Tensor, lr: torch.Tensor, momentum: torch.Tensor) -> list[torch.Tensor]:
        """Bias-corrected step size, and the factor that corrects the root of the second moment."""
        # Python's power: the bits of torch's depend on where in the array an element lies.
        at, where = torch.unique(step, return_inverse=True)
        first = torch.tensor([1 - self.beta1**t for t in at.tolist()], dtype=torch.float64)
        second = torch.tensor([(1 - self.beta2**t) ** -0.5 for t in at.tolist()], dtype=torch.float64)
        return [lr / first[where], second[where]]

    def accumulator(self, state: list[torch.Tensor], row: list[torch.Tensor]) -> None:
        """None: the gradient's square is needed too."""

    def update(
        self, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
    ) -> None:
        """One step."""
        mean, square = state
        step_size, correction = row
        mean.mul_(self.beta1).add_(grads * (1 - self.beta1))
        square.mul_(self.beta2).add_(grads.mul_(grads).mul_(1 - self.beta2))
        denominator = torch.sqrt(square, out=grads).mul_(correction).add_(self.eps)
        params.sub_(torch.div(mean, denominator, out=grads).mul_(step_size))


OPTIMIZERS: dict[str, Optimizer] = {"sgd": SGD(), "adam": Adam()}
