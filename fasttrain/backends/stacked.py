"""The step written out over stacked arrays, without autograd: operations that fused kernels can replace one for one."""

import torch

from fasttrain.backends.base import Setting
from fasttrain.backends.vmap import VmapBackend, VmapState
from fasttrain.kernels import reference
from fasttrain.models import is_perceptron
from fasttrain.spec import Variant


def carries(variant: Variant) -> bool:
    """Whether there is a derivative for what a variant asks for."""
    return is_perceptron(variant) and (variant.depth == 0 or variant.activation in reference.ACTIVATIONS)


class _Space:
    """Memory of one pass over E models with B samples each, used again by every pass of that shape.

    Attributes:
        x: [E, B, I].
        onehot: [E, C, B].
        outputs: of each hidden layer, [E, B, H].
        logits: [E, C, B].
        slopes: of each hidden layer's activation, [E, B, H].
        delta: gradient with respect to a hidden layer's output, [E, B, H]; two, written in turn.
    """

    def __init__(self, variant: Variant, features: int, models: int, batch: int, like: torch.Tensor) -> None:
        def empty(size: int) -> torch.Tensor:
            return torch.empty(models, batch, size, dtype=like.dtype, device=like.device)

        self.x = empty(features)
        self.logits = torch.empty(models, variant.classes, batch, dtype=like.dtype, device=like.device)
        self.onehot = torch.empty_like(self.logits)
        self.outputs = [empty(variant.width) for _ in range(variant.depth)]
        self.slopes = [empty(variant.width) for _ in range(variant.depth)]
        self.delta = [empty(variant.width) for _ in range(min(2, variant.depth))]


class StackedBackend(VmapBackend):
    """``Backend`` for multilayer perceptrons; stacks runs as ``VmapBackend`` does, and differs in the gradient."""

    name = "stacked"
    _keeps_pixels = False  # its own gather writes into memory of the working type

    def __init__(self, setting: Setting, variant: Variant) -> None:
        super().__init__(setting, variant)
        self._classes = torch.arange(variant.classes, device=setting.device)[:, None]
        self._space: tuple[tuple[int, int], _Space] | None = None

    def _batch_gradient(
        self,
        state: VmapState,
        rows: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor,
        into: torch.Tensor | None,
    ) -> torch.Tensor:
        space, stack = self._memory(weight), state.stack
        torch.index_select(state.pool, 0, rows.reshape(-1), out=space.x.view(-1, space.x.shape[-1]))
        torch.eq(labels[:, None, :], self._classes, out=space.onehot)
        if smoothing := self._variant.label_smoothing:
            space.onehot.mul_(1 - smoothing).add_(smoothing / self._variant.classes)
        target = stack.grads if into is None else into
        return self._pass(stack.params, target, space.x, space.onehot, weight, add=into is not None)

    def _gradient(self, *args: torch.Tensor) -> torch.Tensor:
        params, grads, x, onehot, weight = args
        return self._pass(params, grads, x, self._memory(weight).onehot.copy_(onehot.mT), weight, add=False)

    def _memory(self, weight: torch.Tensor) -> _Space:
        shape = (weight.shape[0], weight.shape[1])
        if self._space is None or self._space[0] != shape:
            self._space = (shape, _Space(self._variant, self._setting.features, *shape, weight))
        return self._space[1]

    def _pass(
        self,
        params: torch.Tensor,
        grads: torch.Tensor,
        x: torch.Tensor,
        onehot: torch.Tensor,
        weight: torch.Tensor,
        add: bool,
    ) -> torch.Tensor:
        """Forward and backward: the losses [E]; the gradient into ``grads`` or added to it."""
        p, g = (list(self._layout.views(rows).values()) for rows in (params, grads))
        space, last = self._memory(weight), self._variant.depth
        inputs = [x, *space.outputs]
        for layer in range(last):
            reference.linear(inputs[layer], p[2 * layer], p[2 * layer + 1], out=inputs[layer + 1])
            reference.activate_(self._variant.activation, inputs[layer + 1], space.slopes[layer])
        reference.logits(inputs[last], p[2 * last], p[2 * last + 1], out=space.logits)
        losses, delta = reference.head(space.logits, onehot, weight)
        for layer in range(last, -1, -1):
            reference.linear_gradient(delta, inputs[layer], g[2 * layer], g[2 * layer + 1], add=add)
            if layer:
                back = torch.bmm(delta.mT, p[2 * layer], out=space.delta[layer % len(space.delta)])
                delta = back.mul_(space.slopes[layer - 1]).mT
        return losses
