"""The step written out over stacked arrays, without autograd: operations that fused kernels can replace one for one."""

import torch

from fasttrain.backends.base import Setting
from fasttrain.backends.vmap import VmapBackend
from fasttrain.kernels import reference
from fasttrain.spec import Variant


def carries(variant: Variant) -> bool:
    """Whether there is a derivative for what a variant asks for."""
    return variant.depth == 0 or variant.activation in reference.ACTIVATIONS


class StackedBackend(VmapBackend):
    """``Backend`` for multilayer perceptrons; stacks runs as ``VmapBackend`` does, and differs in the gradient."""

    name = "stacked"

    def __init__(self, setting: Setting, variant: Variant) -> None:
        super().__init__(setting, variant)
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        self._views: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def _gradient(self, *args: torch.Tensor) -> torch.Tensor:
        params, grads, x, onehot, weight = args
        if self._seen is None or self._seen[0] is not params or self._seen[1] is not grads:
            self._seen = (params, grads)
            self._views = tuple(list(self._layout.views(rows).values()) for rows in self._seen)  # type: ignore[assignment]
        p, g = self._views
        inputs, slopes = [x], []
        for layer in range(self._variant.depth):
            z = reference.linear(inputs[layer], p[2 * layer], p[2 * layer + 1])
            a, slope = reference.activate(self._variant.activation, z)
            inputs.append(a)
            slopes.append(slope)
        last = self._variant.depth
        losses, delta = reference.head(reference.linear(inputs[last], p[2 * last], p[2 * last + 1]), onehot, weight)
        for layer in range(last, -1, -1):
            reference.linear_gradient(delta, inputs[layer], g[2 * layer], g[2 * layer + 1])
            if layer:
                delta = torch.bmm(delta, p[2 * layer]).mul_(slopes[layer - 1])
        return losses
