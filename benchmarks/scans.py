"""A whole scan against a sequential script, and what a scan costs as variants are added."""

import time
from collections.abc import Mapping
from typing import Any

import click
import torch

import fasttrain
from fasttrain.backends import make_backend
from fasttrain.backends.base import Run, Setting
from fasttrain.records import Probe, Problem


def script_seconds(
    results: fasttrain.Results, budget: float, device: torch.device | None = None
) -> tuple[dict, int, int]:
    """Plain PyTorch on probes of each variant in random order until the budget is spent, scaled by model-steps.

    Returns:
        seconds for all probes by the sample, verdicts that agree, probes sampled.
    """
    spec = results.spec
    setting = Setting(spec, 64, device or torch.device("cpu"), torch.float32)
    total = {}
    agree = count = 0
    variants = spec.variants(10)
    for index, variant in enumerate(variants):
        mine = results.probes[results.probes.variant == index]
        backend = make_backend("loop", setting, variant)
        begin, steps = time.perf_counter(), 0
        for row in mine.sample(frac=1, random_state=0).itertuples():
            state = backend.init([Run.of(setting, Problem(index, variant, 1, 1, 1), Probe(index, row.n, row.seed))])
            result = None
            while result is None:
                report = backend.run(state, state.clock + spec.check_every)
                if report.ended:
                    ((_, result),) = report.ended
            steps += result.steps
            agree += str(result.outcome) == row.outcome and result.fit_step == row.fit_step
            count += 1
            if time.perf_counter() - begin > budget / len(variants):
                break
        total[variant.width] = (time.perf_counter() - begin) / steps * mine.steps.sum()
    return total, agree, count


def occupancy_until_dry(results: fasttrain.Results) -> float:
    """Share of the slots that held a probe, in time, until the search had given its last one to a slot."""
    probes = results.probes
    dry = probes.started.max()
    held = (probes.finished.clip(upper=dry) - probes.started).sum()
    return float(held / (dry * results.attrs["slots"]))


def check_share(attrs: Mapping[str, Any]) -> float:
    """Time of the evaluations for checks over that of the training between them."""
    return float(attrs["check_seconds"] / (attrs["step_seconds"] - attrs["check_seconds"]))


def search_share(attrs: Mapping[str, Any]) -> float:
    """Processor time of the search, which runs on one core beside the workers, over that of all cores."""
    return float(attrs["search_seconds"] / attrs["seconds"] / attrs["threads"])


def run(quick: bool, budget: float) -> dict:
    """The default scan, the script, and the growth with variants."""
    spec = (
        fasttrain.ScanSpec(widths=(4, 8, 16, 24))
        if not quick
        else fasttrain.ScanSpec(widths=4, steps=300, max_probes=8)
    )
    fasttrain.scan(fasttrain.ScanSpec(widths=4, steps=100, max_probes=2))  # imports, and the kernels if not yet built
    begin = time.perf_counter()
    results = fasttrain.scan(spec)
    wall = time.perf_counter() - begin
    attrs = results.attrs
    click.echo(
        f"scan: {wall:.2f} s, {attrs['model_steps']:,} model-steps, {attrs['steps_per_second']:,.0f}/s, "
        f"{len(results.probes)} probes, backend {attrs['backend']}, occupancy of {attrs['slots']} slots "
        f"{occupancy_until_dry(results):.0%} until the search ran dry and {attrs['occupancy']:.0%} to the end, "
        f"workers busy {attrs['step_seconds'] / attrs['seconds'] / attrs['threads']:.0%}, checks "
        f"{check_share(attrs):.1%} of training; search {attrs['search_seconds'] / attrs['seconds']:.1%} of the wall "
        f"time on one core, {search_share(attrs):.1%} of the time of all"
    )
    torch.set_num_threads(1)
    by_width, agree, count = script_seconds(results, budget)
    script = sum(by_width.values())
    click.echo(
        f"sequential script: {script:,.0f} s estimated from {count} of {len(results.probes)} probes; "
        f"same verdict at the same step in {agree} of {count}; ratio {script / wall:.1f}x"
    )
    grown = []
    for variants in (1, 4, 16, 64, 256) if not quick else (1, 2):
        rates = tuple(0.01 * (1 + k / 1000) for k in range(variants))
        small = fasttrain.ScanSpec(widths=8, lr=rates, steps=500, max_probes=16)
        begin = time.perf_counter()
        found = fasttrain.scan(small)
        took = time.perf_counter() - begin
        row = {
            "variants": variants,
            "ms_per_probe": 1e3 * took / len(found.probes),
            "us_per_model_step": 1e6 * took / found.attrs["model_steps"],
            "search_share": search_share(found.attrs),
        }
        grown.append(row)
        click.echo(
            f"{variants:4} variants: {row['ms_per_probe']:.2f} ms a probe, "
            f"{row['us_per_model_step']:.1f} us a model-step, search {row['search_share']:.1%}"
        )
    return {
        "scan_seconds": wall,
        "script_seconds": script,
        "ratio": script / wall,
        "agree": agree,
        "sampled": count,
        "occupancy": float(attrs["occupancy"]),
        "occupancy_until_dry": occupancy_until_dry(results),
        "check_share": check_share(attrs),
        "search_seconds": float(attrs["search_seconds"]),
        "search_share": search_share(attrs),
        "workers_busy": float(attrs["step_seconds"] / attrs["seconds"] / attrs["threads"]),
        "growth": grown,
    }
