"""Plain-torch mathematics of layers, activations, head and optimizers; the reference that fused kernels are held to."""

import torch


def cross_entropy(logits: torch.Tensor, onehot: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each sample, in nats.

    A product with the one-hot labels rather than a gather: under vmap, the gather's backward is a scatter.

    Args:
        logits: [..., C].
        onehot: [..., C], 1 at the label and 0 elsewhere, in the dtype of the logits.

    Returns:
        [...], the dtype of the logits; NaN where a logit is NaN or plus infinity, or another one than the label's
        minus infinity.
    """
    return -(torch.log_softmax(logits, -1) * onehot).sum(-1)


def strictly_right(logits: torch.Tensor, onehot: torch.Tensor) -> torch.Tensor:
    """Whether the label's logit is larger than every other one; a tie or a NaN is wrong.

    Args:
        logits: [..., C].
        onehot: [..., C], 1 at the label and 0 elsewhere.

    Returns:
        bool [...].
    """
    label = onehot > 0
    others = logits.masked_fill(label, -torch.inf).amax(-1)
    own = torch.where(label, logits, 0).sum(-1)  # summing the one kept value; a NaN elsewhere is caught by `others`
    return own > others


def activate_(name: str, z: torch.Tensor, slope: torch.Tensor) -> None:
    """An activation and its derivative, elementwise; at a kink the derivative that torch's autograd takes.

    Args:
        name: as in ``fasttrain.activations``.
        z: any shape; replaced by the activation.
        slope: of the shape and dtype of z; the derivative is written to it.

    Raises:
        KeyError: the name is unknown.
    """
    ACTIVATIONS[name](z, slope)


def _relu(z: torch.Tensor, slope: torch.Tensor) -> None:
    torch.gt(z, 0, out=slope)
    z.relu_()


def _leaky_relu(z: torch.Tensor, slope: torch.Tensor) -> None:
    slope.fill_(0.01).masked_fill_(z > 0, 1.0)
    z.mul_(slope)


def _gelu(z: torch.Tensor, slope: torch.Tensor) -> None:
    below = torch.erf(z * 0.5**0.5).add_(1.0).mul_(0.5)
    torch.mul(z, z, out=slope).mul_(-0.5).exp_().mul_((2 * torch.pi) ** -0.5).mul_(z).add_(below)
    z.mul_(below)


def _silu(z: torch.Tensor, slope: torch.Tensor) -> None:
    s = torch.sigmoid(z)
    z.mul_(s)
    slope.fill_(1.0).sub_(s).mul_(z).add_(s)


def _tanh(z: torch.Tensor, slope: torch.Tensor) -> None:
    z.tanh_()
    torch.mul(z, z, out=slope).neg_().add_(1.0)


def _sigmoid(z: torch.Tensor, slope: torch.Tensor) -> None:
    z.sigmoid_()
    slope.fill_(1.0).sub_(z).mul_(z)


def _identity(z: torch.Tensor, slope: torch.Tensor) -> None:
    slope.fill_(1.0)


ACTIVATIONS = {
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "gelu": _gelu,
    "silu": _silu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "identity": _identity,
}
"""The activations that have a derivative here, by name."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b of each model.

    Args:
        x: [E, B, I].
        weight: [E, O, I].
        bias: [E, O].
        out: [E, B, O], written if given.

    Returns:
        [E, B, O].
    """
    return torch.baddbmm(bias[:, None, :], x, weight.mT, out=out)


def logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """As ``linear``, transposed: softmax over few classes is fast where the samples lie side by side.

    Args:
        x: [E, B, I].
        weight: [E, C, I].
        bias: [E, C].
        out: [E, C, B], written if given.

    Returns:
        [E, C, B].
    """
    return torch.baddbmm(bias[:, :, None], weight, x.mT, out=out)


def head(logits: torch.Tensor, onehot: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy of each model and its gradient with respect to the logits.

    Args:
        logits: [E, C, B].
        onehot: [E, C, B], 1 at the label and 0 elsewhere, or any shares of the classes that sum to 1.
        weight: [E, B], of each sample in its model's loss.

    Returns:
        The losses [E] in nats, and (softmax - onehot) weight [E, C, B].
    """
    log_p = torch.log_softmax(logits, 1)
    losses = -((log_p * onehot).sum(1) * weight).sum(-1)
    return losses, log_p.exp_().sub_(onehot).mul_(weight[:, None, :])


def update(
    optimizer: str,
    params: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor | None,
    rates: tuple[float, float, float],
    step: int,
) -> None:
    """One step of an optimizer as torch.optim has it: SGD with momentum, Adam, and AdamW (Loshchilov and Hutter 2019).

    Args:
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        params: any shape; updated.
        grad: of that shape.
        first: momentum or first moment; updated.
        second: second moment; updated. None for SGD.
        rates: learning rate, momentum (of SGD), weight decay.
        step: 1 for the first.
    """
    lr, momentum, decay = rates
    if optimizer == "adamw":
        params.mul_(1 - lr * decay)
    else:
        grad = grad + params * decay
    if optimizer == "sgd":
        first.mul_(momentum).add_(grad)
        params.sub_(first * lr)
        return
    assert second is not None
    first.mul_(0.9).add_(grad * (1 - 0.9))
    second.mul_(0.999).add_(grad * grad * (1 - 0.999))
    root = second.sqrt() * (1 - 0.999**step) ** -0.5
    params.sub_(first / (root + 1e-8) * (lr / (1 - 0.9**step)))


def linear_gradient(
    delta: torch.Tensor, x: torch.Tensor, weight_grad: torch.Tensor, bias_grad: torch.Tensor, add: bool = False
) -> None:
    """The gradients of ``linear`` with respect to W and b, into what is given or added to it.

    Args:
        delta: [E, O, B], the gradient with respect to the output, transposed.
        x: [E, B, I].
        weight_grad: [E, O, I], written.
        bias_grad: [E, O], written.
        add: add to what is there, for instance a momentum buffer.
    """
    torch.baddbmm(weight_grad, delta, x, beta=int(add), out=weight_grad)
    if add:
        bias_grad.add_(delta.sum(2))
    else:
        torch.sum(delta, 2, out=bias_grad)
