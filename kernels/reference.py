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
