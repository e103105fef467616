"""3x3 convolutions of many models at once, each with weights and inputs of its own, for torch.func.vmap.

Left to itself, vmap makes one grouped convolution of them, which is slow at many sizes and gives a model other bits in
other company. Here each model keeps its own sums: by a loop over models inside of one operator, without autograd's and
Python's costs for each, or by one batched product with the patches of the inputs.
"""

import torch
from torch.nn import functional as F

METHODS = ("loop", "product", "grouped")


def method(device: torch.device, channels: int) -> str:
    """How convolutions are batched: a rule of the device and of the input channels, never of the number of models.

    On a CPU the loop, but for one channel (the first layer of a grey image), where a product is as fast or faster
    (benchmarks/results/batching.csv). On CUDA a loop would be bound by its launches, and it is products
    always; that has not been measured on a GPU yet.
    """
    return "loop" if device.type == "cpu" and channels > 1 else "product"


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, how: str) -> torch.Tensor:
    """3x3 convolution with padding 1 of one model, or under vmap of many.

    Args:
        x: [B, C, H, W].
        weight: [O, C, 3, 3].
        bias: [O].
        how: one of ``METHODS``.

    Returns:
        [B, O, H, W].
    """
    if how == "loop":
        return _Convolve.apply(x, weight, bias)
    if how == "grouped":
        return F.conv2d(x, weight, bias, padding=1)
    patches = F.unfold(x, 3, padding=1)  # [B, C * 9, H W]
    return (weight.flatten(1) @ patches + bias[:, None]).unflatten(-1, x.shape[-2:])


def _front(x: torch.Tensor, dim: int | None, models: int) -> torch.Tensor:
    """With the models first, also where they share it."""
    return x.expand(models, *x.shape) if dim is None else x.movedim(dim, 0)


class _Convolve(torch.autograd.Function):
    """A convolution whose batching rule is the loop."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.wants_x = ctx.needs_input_grad[0]

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        back, *own = _Backward.apply(grad, x, weight, ctx.wants_x)
        return back if ctx.wants_x else None, *own

    @staticmethod
    def vmap(info, in_dims, *args: torch.Tensor):  # type: ignore[no-untyped-def]
        stacked = [_front(a, dim, info.batch_size) for a, dim in zip(args, in_dims, strict=True)]
        return torch.ops.fasttrain.convolve(*stacked), 0


class _Backward(torch.autograd.Function):
    """Gradients with respect to input (empty if not wanted), weight and bias; has no derivative itself."""

    @staticmethod
    def forward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wants_x: bool) -> tuple[torch.Tensor, ...]:
        return tuple(g[0] for g in torch.ops.fasttrain.convolve_backward(grad[None], x[None], weight[None], wants_x))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def vmap(info, in_dims, grad, x, weight, wants_x):  # type: ignore[no-untyped-def]
        args = zip((grad, x, weight), in_dims[:3], strict=True)
        stacked = [_front(a, dim, info.batch_size) for a, dim in args]
        return torch.ops.fasttrain.convolve_backward(*stacked, wants_x), (0, 0, 0)


@torch.library.custom_op("fasttrain::convolve", mutates_args=())
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x [E, B, C, H, W], weight [E, O, C, 3, 3], bias [E, O]."""
    out = x.new_empty(*x.shape[:2], weight.shape[1], *x.shape[3:])
    for k in range(len(x)):
        out[k] = F.conv2d(x[k], weight[k], bias[k], padding=1)
    return out


@torch.library.custom_op("fasttrain::convolve_backward", mutates_args=())
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wants_x: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad [E, B, O, H, W], x [E, B, C, H, W], weight [E, O, C, 3, 3]."""
    back = torch.empty_like(x) if wants_x else x.new_empty(len(x), 0)
    own, bias = torch.empty_like(weight), weight.new_empty(weight.shape[:2])
    grad = grad.contiguous()
    for k in range(len(x)):
        found = torch.ops.aten.convolution_backward(
            grad[k], x[k], weight[k], [weight.shape[1]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [wants_x, True, True]
        )
        if wants_x:
            back[k] = found[0]
        own[k], bias[k] = found[1], found[2]
    return back, own, bias
