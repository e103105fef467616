"""What rounded products do to EMC50: default scans on a CPU whose products have the factors of bf16x3, tf32 or bf16.

Forward, dX and dW of training are rounded as a GPU's tensor cores would round them, with sums in float32; the checks
are made in float32. It says what a precision changes in the result, not how fast it is.
"""

import contextlib
import math
import time
from collections.abc import Iterator

import click
import torch

import fasttrain

KEPT = {"float32": None, "bf16x3": 16, "tf32": 13, "bf16": 16}
"""Low bits of a float32 that a factor loses."""


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 to the nearest with so many low bits zero, halves upwards."""
    return (((x.contiguous().view(torch.int32) + (1 << (bits - 1))) >> bits) << bits).view(torch.float32)


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """torch's batched products with rounded factors."""
    bmm, baddbmm, bits = torch.bmm, torch.baddbmm, KEPT[precision]

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if bits is None:
            return bmm(a, b)
        high_a, high_b = rounded(a, bits), rounded(b, bits)
        out = bmm(high_a, high_b)
        if precision == "bf16x3":
            out += bmm(high_a, rounded(b - high_b, bits))
            out += bmm(rounded(a - high_a, bits), high_b)
        return out

    def with_sum(start, a, b, *, beta=1, out=None):
        found = product(a, b)
        if beta:
            found += start
        return found if out is None else out.copy_(found)

    def plain(a, b, *, out=None):
        found = product(a, b)
        return found if out is None else out.copy_(found)

    torch.bmm, torch.baddbmm = plain, with_sum
    try:
        yield
    finally:
        torch.bmm, torch.baddbmm = bmm, baddbmm


def run(widths: tuple[int, ...], tolerance: float, max_probes: int) -> list[dict]:
    """EMC50 with its interval for each width and precision, and z, its distance from float32's in standard errors."""
    rows: list[dict] = []
    for precision in KEPT:
        spec = fasttrain.ScanSpec(
            widths=widths, tolerance=tolerance, max_probes=max_probes, backend="stacked", device="cpu"
        )
        begin = time.perf_counter()
        with products(precision):
            results = fasttrain.scan(spec)
        for curve in results.curves.itertuples():
            # Half of a 90 % interval of ln EMC50 is 1.645 standard errors.
            error = (math.log(curve.emc50_high) - math.log(curve.emc50_low)) / 2 / 1.645
            row = {
                "precision": precision, "width": curve.width, "emc50": curve.emc50, "low": curve.emc50_low,
                "high": curve.emc50_high, "probes": curve.n_probes, "standard_error_of_ln": error,
            }  # fmt: skip
            plain = next(r for r in [*rows, row] if r["width"] == curve.width)
            apart = math.log(row["emc50"] / plain["emc50"])
            row["z"] = apart / math.hypot(error, plain["standard_error_of_ln"])
            rows.append(row)
            click.echo(
                f"{precision:8} width {curve.width:3}: EMC50 {curve.emc50:7.1f} [{row['low']:.1f}, {row['high']:.1f}] "
                f"from {curve.n_probes} probes, {100 * apart:+.1f} % of float32, z {row['z']:+.1f}"
            )
        click.echo(f"{precision}: {time.perf_counter() - begin:.0f} s")
    return rows
