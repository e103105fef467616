"""Fused kernels over stacked models of one shape, for the path that autograd takes through any module.

The optimizer's update in one pass over parameters, gradients and moments, where torch makes four (SGD) or nine
(Adam); softmax, cross-entropy and its gradient in one launch, and the losses and wrong samples of a check in another.
They compute what ``reference.py`` and ``optim.py`` do, the update with the same roundings. The latter two are custom
operators of torch, so that ``make_fx`` can record them in a graph.
"""

import torch
import triton
import triton.language as tl

from fasttrain.kernels.tiles import softmax, stepped

BLOCK = 1024  # parameters of a program
_ROWS = 32  # samples that a program takes at once, fewer with many classes
_MOST_LOGITS = 4096  # of a block of samples: they stay in registers
MOST_CLASSES = _MOST_LOGITS


@triton.jit
def update_kernel(params, grads, first, second, one, two, size, OPTIMIZER: tl.constexpr, BLOCK: tl.constexpr):
    """params, grads and moments [E, size]; a program a (model, block). ``one`` and ``two`` [E] are ``update``'s row."""
    e = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    to = e * size + at
    p = tl.load(params + to, mask=mask, other=0.0)
    g = tl.load(grads + to, mask=mask, other=0.0)
    m = tl.load(first + to, mask=mask, other=0.0)
    lr, other = tl.load(one + e), tl.load(two + e)
    if OPTIMIZER == "sgd":
        p, m, _ = stepped(p, g, m, m, lr, other, lr, lr, lr, OPTIMIZER, False)
    else:
        v = tl.load(second + to, mask=mask, other=0.0)
        # The step size is corrected already.
        p, m, v = stepped(p, g, m, v, lr, lr, lr, lr * 0 + 1.0, other, OPTIMIZER, False)
        tl.store(second + to, v, mask=mask)
    tl.store(first + to, m, mask=mask)
    tl.store(params + to, p, mask=mask)


def update(
    optimizer: str, params: torch.Tensor, grads: torch.Tensor, state: list[torch.Tensor], row: list[torch.Tensor]
) -> None:
    """One step of all models, in place; bit for bit that of ``fasttrain.optim``.

    Args:
        optimizer: ``"sgd"`` or ``"adam"``.
        params: [E, P], contiguous.
        grads: [E, P].
        state: momentum; or first and second moment; each [E, P].
        row: learning rate and momentum; or corrected step size and the correction of the root; each [E, 1].
    """
    models, size = params.shape
    one, two = (column.contiguous() for column in row)
    grid = (models, triton.cdiv(size, BLOCK))
    with torch.cuda.device_of(params):  # Triton launches on the current device
        update_kernel[grid](
            params, grads, state[0], state[-1], one, two, size, optimizer, BLOCK, num_warps=4, enable_fp_fusion=False
        )


@triton.jit
def head_kernel(logits, onehot, weight, losses, delta, batch, CLASSES: tl.constexpr, BB: tl.constexpr,
                BC: tl.constexpr):  # fmt: skip
    """logits, onehot and delta [E, B, C], weight [E, B], losses [E]; a program a model."""
    e = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    total = tl.zeros([], dtype=logits.dtype.element_ty)
    for b0 in range(0, batch, BB):
        z, own, b, valid, at = _block(logits, onehot, e, b0, batch, CLASSES, BB, BC)
        share, loss, _ = softmax(z, own, CLASSES, BC)
        w = tl.load(weight + e * batch + b, mask=valid, other=0.0)
        total += tl.sum(tl.where(valid, loss * w, 0.0), 0)
        gradient = (share - own.to(z.dtype)) * w[:, None]
        tl.store(delta + at, gradient, mask=valid[:, None] & (c < CLASSES)[None, :])
    tl.store(losses + e, total)


@triton.jit
def check_kernel(logits, onehot, weight, found, models, batch, CLASSES: tl.constexpr, BB: tl.constexpr,
                 BC: tl.constexpr):  # fmt: skip
    """found [2, E], float64: mean loss and samples not strictly right, of those that weigh something."""
    e = tl.program_id(0).to(tl.int64)
    total = tl.zeros([], dtype=tl.float64)
    wrong = tl.zeros([], dtype=tl.int64)
    for b0 in range(0, batch, BB):
        z, own, b, valid, _ = _block(logits, onehot, e, b0, batch, CLASSES, BB, BC)
        w = tl.load(weight + e * batch + b, mask=valid, other=0.0)
        counts = valid & (w > 0)
        _, loss, right = softmax(z.to(tl.float64), own, CLASSES, BC)
        total += tl.sum(tl.where(counts, loss * w.to(tl.float64), 0.0), 0)
        wrong += tl.sum((counts & ~right).to(tl.int64), 0)
    tl.store(found + e, total)
    tl.store(found + models + e, wrong.to(tl.float64))


@triton.jit
def _block(logits, onehot, e, b0, batch, CLASSES: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr):
    """Logits [BB, BC] of a model's samples from b0 on, minus infinity beyond the classes, with their places."""
    b = b0 + tl.arange(0, BB)
    c = tl.arange(0, BC)
    valid = b < batch
    at = (e * batch + b)[:, None] * CLASSES + c[None, :]
    mask = valid[:, None] & (c < CLASSES)[None, :]
    z = tl.load(logits + at, mask=mask, other=0.0)
    own = tl.load(onehot + at, mask=mask, other=0.0) > 0
    return tl.where((c < CLASSES)[None, :], z, float("-inf")), own, b, valid, at


def _sizes(classes: int) -> dict[str, int]:
    held = max(2, triton.next_power_of_2(classes))
    return {"CLASSES": classes, "BB": min(_ROWS, max(1, _MOST_LOGITS // held)), "BC": held, "num_warps": 4}


@torch.library.custom_op("fasttrain::head", mutates_args=())
def head(logits: torch.Tensor, onehot: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.head``, with the classes last.

    Args:
        logits: [E, B, C].
        onehot: [E, B, C], 1 at the label and 0 elsewhere.
        weight: [E, B], of each sample in its model's loss.

    Returns:
        The losses [E] in nats, and (softmax - onehot) weight [E, B, C].
    """
    models, batch, classes = logits.shape
    losses, delta = logits.new_empty(models), torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    given = logits.contiguous(), onehot.contiguous(), weight.contiguous()
    with torch.cuda.device_of(logits):
        head_kernel[(models,)](*given, losses, delta, batch, **_sizes(classes))
    return losses, delta


@head.register_fake
def _(logits: torch.Tensor, onehot: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape)


@torch.library.custom_op("fasttrain::check", mutates_args=())
def check(logits: torch.Tensor, onehot: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean loss and number of samples not strictly right of each model.

    Args:
        logits: [E, B, C].
        onehot: [E, B, C], 1 at the label and 0 elsewhere.
        weight: [E, B], of each sample in its model's mean; 0 for one that is not there.

    Returns:
        float64 [2, E].
    """
    models, batch, classes = logits.shape
    found = torch.empty(2, models, dtype=torch.float64, device=logits.device)
    given = logits.contiguous(), onehot.contiguous(), weight.contiguous()
    with torch.cuda.device_of(logits):
        check_kernel[(models,)](*given, found, models, batch, **_sizes(classes))
    return found


@check.register_fake
def _(logits: torch.Tensor, onehot: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(2, logits.shape[0], dtype=torch.float64)
