"""Shampoo and Muon for one model, straight from the papers: what the stacked ones of ``optim.py`` are held to.

They share no code with those, and are made to be read, not to be fast. torch.optim.Muon is no oracle: it rounds
Newton-Schulz to bfloat16.
"""

from collections.abc import Iterable

import torch


def _unfold(grad: torch.Tensor) -> torch.Tensor:
    """A kernel [out, in, ...] as a matrix [out, rest]."""
    return grad if grad.dim() < 2 else grad.flatten(1)


class Shampoo(torch.optim.Optimizer):
    """Gupta, Koren and Singer (2018, arXiv 1802.09568): algorithm 2 for tensors of order 1 and 2.

    Args:
        params: parameters.
        lr: learning rate.
        weight_decay: added to the gradient, times the parameter.
        eps: the statistics start at this times the identity.
        every: steps between new inverse roots of whole statistics.
        largest: of a larger dimension only the diagonal of the statistic is kept.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        weight_decay: float = 0.0,
        eps: float = 1e-2,
        every: int = 10,
        largest: int = 1024,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "eps": eps, "every": every, "largest": largest}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                grad = _unfold(p.grad + group["weight_decay"] * p)
                state = self.state[p]
                order = grad.dim()
                preconditioned = grad
                for i in range(order):
                    size = grad.shape[i]
                    if f"H{i}" not in state:
                        diagonal = torch.full((size,), group["eps"], dtype=p.dtype, device=p.device)
                        state[f"H{i}"] = diagonal if size > group["largest"] else torch.diag(diagonal)
                    # G_(i), the matrix whose rows belong to dimension i.
                    unfolded = grad.movedim(i, 0).reshape(size, -1)
                    gram = unfolded @ unfolded.T
                    if size > group["largest"]:
                        state[f"H{i}"] += gram.diagonal()
                        root = torch.diag(state[f"H{i}"] ** (-1 / (2 * order)))
                    else:
                        state[f"H{i}"] += gram
                        if state.get("step", 0) % group["every"] == 0:
                            state[f"root{i}"] = _inverse_root(state[f"H{i}"], 2 * order, group["eps"])
                        root = state[f"root{i}"]
                    preconditioned = torch.tensordot(root, preconditioned, dims=([1], [i])).movedim(0, i)
                state["step"] = state.get("step", 0) + 1
                p -= group["lr"] * preconditioned.reshape(p.shape)


def _inverse_root(h: torch.Tensor, power: int, eps: float) -> torch.Tensor:
    """H^(-1 / power); no eigenvalue of H is below eps but for rounding. NaN where H is not finite."""
    if not torch.isfinite(h).all():
        return torch.full_like(h, torch.nan)
    values, vectors = torch.linalg.eigh(h)
    return vectors @ torch.diag(values.clamp(min=eps) ** (-1 / power)) @ vectors.T


class Muon(torch.optim.Optimizer):
    """Jordan et al. (2024), scaled and decayed as by Liu et al. (2025, arXiv 2502.16982, eq. 4); AdamW for vectors.

    Args:
        params: parameters.
        lr: learning rate of matrices and vectors.
        momentum: of matrices.
        nesterov: whether it is Nesterov's.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["t"], state["m"], state["v"] = 0, torch.zeros_like(p), torch.zeros_like(p)
                state["t"] += 1
                p *= 1 - lr * group["weight_decay"]
                if p.dim() < 2:
                    state["m"] = 0.9 * state["m"] + 0.1 * p.grad
                    state["v"] = 0.999 * state["v"] + 0.001 * p.grad**2
                    mean, square = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
                    p -= lr * mean / (square.sqrt() + 1e-8)
                    continue
                state["m"] = momentum * state["m"] + p.grad
                u = p.grad + momentum * state["m"] if group["nesterov"] else state["m"]
                update = newton_schulz(u.flatten(1))
                p -= lr * 0.2 * max(update.shape) ** 0.5 * update.reshape(p.shape)


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    """Five steps towards U V^T of a matrix U S V^T, in its precision."""
    x = g / (g.norm() + 1e-7)
    if g.shape[0] > g.shape[1]:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x
