"""Ways to batch convolutions and attention over models, and whole batched steps of cnn and vit against the loop."""

import functools
import statistics
import time
import warnings
from collections.abc import Callable

import click
import numpy as np
import torch
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fasttrain.backends import make_backend
from fasttrain.backends.base import Run, Setting
from fasttrain.kernels.convolve import METHODS, convolve, method
from fasttrain.records import Probe, Problem
from fasttrain.spec import ScanSpec

COLUMNS = ("what", "case", "way", "chosen", "milliseconds a model", "lowest", "highest", "over eager loop")
CONVOLUTIONS = [(1, 4, 8), (1, 16, 8), (3, 16, 32), (4, 4, 8), (8, 8, 8), (16, 16, 8), (32, 32, 8), (64, 64, 4)]
"""Channels in and out, side of the image."""
ATTENTION = [(8, 4), (16, 4), (32, 4), (64, 4)]
"""Embedding and heads, with 16 tokens."""
STEPS = [("cnn", 8, 1), ("cnn", 16, 2), ("cnn", 32, 2), ("vit", 8, 1), ("vit", 16, 1), ("vit", 32, 2)]
"""Architecture, width, depth on digits."""
MODELS, BATCH = 16, 64

Way = Callable[[], object]


def run(quick: bool, repeats: int, device: str) -> tuple[list[dict], bool]:
    """The rows of the table on a device, and whether all ways agree with the eager loop."""
    on = torch.device(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows: list[dict] = []
        good = True
        for channels, width, side in CONVOLUTIONS[:2] if quick else CONVOLUTIONS:
            name = f"{channels} to {width} channels, {side} x {side}"
            ways = _convolutions(channels, width, side, on)
            good &= _agree(name, ways, _convolutions(channels, width, side, on, torch.float64)["eager loop"])
            rows += _measure("convolution", name, ways, repeats, method(on, channels))
        for width, heads in ATTENTION[:1] if quick else ATTENTION:
            name = f"width {width}, {heads} heads"
            ways = _attention(width, heads, on)
            good &= _agree(name, ways, _attention(width, heads, on, torch.float64)["eager loop"])
            rows += _measure("attention", name, ways, repeats, "products")
        for arch, width, depth in STEPS[:1] if quick else STEPS:
            rows += _measure(
                "step", f"{arch}, width {width}, depth {depth}", _steps(arch, width, depth, on), repeats, "vmap"
            )
    finally:
        torch.set_num_threads(threads)
    return rows, good


def _measure(what: str, case: str, ways: dict[str, Way], repeats: int, chosen: str) -> list[dict]:
    """Interleaved; the median of the times, and of the ratios within a repeat."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - begin) / MODELS)
    rows = []
    for name, taken in seconds.items():
        ratio = statistics.median(loop / own for loop, own in zip(seconds["eager loop"], taken, strict=True))
        figures = [1e3 * statistics.median(taken), 1e3 * min(taken), 1e3 * max(taken), ratio]
        rows.append(dict(zip(COLUMNS, [what, case, name, name == chosen, *(f"{x:.4g}" for x in figures)], strict=True)))
        click.echo(f"{what:12}{case:34}{name:12}{figures[0]:9.3f} ms a model, {ratio:5.2f}x the eager loop")
    return rows


def _agree(name: str, ways: dict[str, Way], truth: Way) -> bool:
    """Whether all ways err as the eager loop does, to a factor of four, against the same in float64 (RMS)."""
    exact = _flat(truth())

    def error(way: Way) -> float:
        return float(np.sqrt(np.mean((_flat(way()) - exact) ** 2)))

    allowed = 4 * error(ways["eager loop"])
    bad = {way: error(function) for way, function in ways.items() if not error(function) <= allowed}
    for way, found in bad.items():
        click.echo(f"conformance failed: {way}, {name}: {found:.2g}, allowed {allowed:.2g}")
    return not bad


def _flat(grads: object) -> np.ndarray:
    return torch.cat([g.double().reshape(-1) for g in grads]).cpu().numpy()  # type: ignore[attr-defined]


def _batched(loss: Callable[..., torch.Tensor], args: tuple[torch.Tensor, ...], first: int) -> Way:
    """Gradients with respect to the arguments from ``first`` on, recorded once as the vmap backend does."""
    together = vmap(grad(loss, argnums=tuple(range(first, len(args)))))
    graph = make_fx(lambda *some: together(*some))(*args)
    return lambda: graph(*args)


def _eager(loss: Callable[..., torch.Tensor], args: tuple[torch.Tensor, ...], first: int) -> Way:
    models = [[a[k].clone().requires_grad_(i >= first) for i, a in enumerate(args)] for k in range(MODELS)]

    def step() -> list[torch.Tensor]:
        found = [torch.autograd.grad(loss(*model), model[first:]) for model in models]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    return step


def _convolutions(
    channels: int, width: int, side: int, on: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Way]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(MODELS, BATCH, channels, side, side, generator=rng)
    w, b = torch.randn(MODELS, width, channels, 3, 3, generator=rng), torch.randn(MODELS, width, generator=rng)
    x, w, b = (t.to(on, dtype) for t in (x, w, b))

    def loss(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, how: str) -> torch.Tensor:
        return convolve(x, w, b, how).square().sum() * 1e-3

    first = int(channels < 4)  # images: a first layer gives no gradient to its inputs
    ways = {how: _batched(functools.partial(loss, how=how), (x, w, b), first) for how in METHODS}
    return {**ways, "eager loop": _eager(functools.partial(loss, how="grouped"), (x, w, b), first)}


def _attention(width: int, heads: int, on: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Way]:
    rng = torch.Generator().manual_seed(0)
    qkv = tuple(torch.randn(MODELS, BATCH, heads, 16, width // heads, generator=rng).to(on, dtype) for _ in range(3))

    def products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v).square().sum()

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v).square().sum()

    with warnings.catch_warnings():
        # vmap says that it loops over fused attention, which is what is to be measured.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        looped = _batched(fused, qkv, 0)
    return {"products": _batched(products, qkv, 0), "fused": looped, "eager loop": _eager(products, qkv, 0)}


def _steps(arch: str, width: int, depth: int, on: torch.device) -> dict[str, Way]:
    """Ten steps of whole models with Adam, minibatches of 64 of 300 samples of digits."""
    spec = ScanSpec(arch=arch, widths=width, depths=depth, batch_size=BATCH, check_every=10**6, steps=10**6)
    (variant,) = spec.variants(10)
    setting = Setting(spec, 64, on, torch.float32, (1, 8, 8))

    def way(name: str) -> Way:
        backend = make_backend(name, setting, variant)
        state = backend.init(
            [Run.of(setting, Problem(0, variant, 1, 1, 1797), Probe(0, 300, k)) for k in range(MODELS)]
        )
        return lambda: [backend.run(state, state.clock + 1) for _ in range(10)]

    return {"vmap": way("vmap"), "eager loop": way("loop")}
