"""Plain-torch mathematics of the classification head; the reference that fused kernels are held to."""

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


def activate(name: str, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An activation and its derivative, elementwise; at a kink the derivative that torch's autograd takes.

    Args:
        name: as in ``fasttrain.activations``.
        z: any shape.

    Returns:
        Both of the shape and dtype of z.

    Raises:
        KeyError: the name is unknown.
    """
    return ACTIVATIONS[name](z)


def _relu(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.relu(z), (z > 0).to(z.dtype)


def _leaky_relu(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    slope = torch.full_like(z, 0.01).masked_fill_(z > 0, 1.0)
    return z * slope, slope


def _gelu(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    below = torch.erf(z * 0.5**0.5).add_(1.0).mul_(0.5)
    density = torch.exp((z * z).mul_(-0.5)).mul_((2 * torch.pi) ** -0.5)
    return z * below, below + density.mul_(z)


def _silu(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.sigmoid(z)
    a = z * s
    return a, s + a * (1 - s)


def _tanh(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.tanh(z)
    return a, 1 - a * a


def _sigmoid(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.sigmoid(z)
    return a, a * (1 - a)


ACTIVATIONS = {
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "gelu": _gelu,
    "silu": _silu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "identity": lambda z: (z, torch.ones_like(z)),
}
"""The activations that have a derivative here, by name."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x W^T + b of each model.

    Args:
        x: [E, B, I].
        weight: [E, O, I].
        bias: [E, O].

    Returns:
        [E, B, O].
    """
    return torch.baddbmm(bias[:, None, :], x, weight.mT)


def head(logits: torch.Tensor, onehot: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy of each model and its gradient with respect to the logits.

    Args:
        logits: [E, B, C].
        onehot: [E, B, C], 1 at the label and 0 elsewhere.
        weight: [E, B], of each sample in its model's loss.

    Returns:
        The losses [E] in nats, and (softmax - onehot) weight [E, B, C].
    """
    log_p = torch.log_softmax(logits, -1)
    losses = -((log_p * onehot).sum(-1) * weight).sum(-1)
    return losses, torch.exp_(log_p).sub_(onehot).mul_(weight[:, :, None])


def linear_gradient(delta: torch.Tensor, x: torch.Tensor, weight_grad: torch.Tensor, bias_grad: torch.Tensor) -> None:
    """The gradients of ``linear`` with respect to W and b, into what is given.

    Args:
        delta: [E, B, O], the gradient with respect to the output.
        x: [E, B, I].
        weight_grad: [E, O, I], written.
        bias_grad: [E, O], written.
    """
    torch.bmm(delta.mT, x, out=weight_grad)
    torch.sum(delta, 1, out=bias_grad)
