"""Where the time of a step goes."""

import ctypes
import time

import click
import torch

from benchmarks.work import Case
from fasttrain.backends import choose, make_backend
from fasttrain.kernels import native

PHASES = ("sample order", "gather", "forward", "head", "backward and update")


def run(case: Case, name: str, steps: int) -> dict[str, float]:
    """Seconds by part: set-up, steps, one evaluation; ``native`` also by phase, torch backends by operation."""
    setting = case.setting(torch.float32, 10**9)
    (variant,) = setting.spec.variants(10)
    chosen = choose(name, setting, variant)
    torch.set_num_threads(1)
    backend = make_backend(chosen, setting, variant)
    begin = time.perf_counter()
    state = backend.init(case.runs(setting, case.models))
    made = time.perf_counter()
    backend.run(state, steps)
    warm = time.perf_counter()
    backend.run(state, 2 * steps)
    stepped = time.perf_counter()
    for _ in range(3):
        checked = time.perf_counter()
        if chosen != "loop":
            backend._evaluate(state)
        evaluated = time.perf_counter() - checked
    parts = {"set-up": made - begin, "steps": stepped - warm, "one evaluation": evaluated}
    click.echo(f"{chosen}, {case.name}, {steps} steps, one thread")
    for part, seconds in parts.items():
        click.echo(f"  {part:16}{1e3 * seconds:9.2f} ms")
    click.echo(f"  a model-step    {1e6 * parts['steps'] / steps / case.models:9.2f} us")
    click.echo(f"  evaluation every 100 steps is {evaluated * steps / 100 / parts['steps']:.1%} of training")
    if chosen == "native":
        backend._library = native.library("float32", "PHASES")
        backend.run(state, 3 * steps)
        seconds = list((ctypes.c_double * len(PHASES)).in_dll(backend._library, "phase_seconds"))
        for phase, taken in zip(PHASES, seconds, strict=True):
            click.echo(f"  {phase:20}{taken / sum(seconds):6.1%}")
            parts[phase] = taken
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            backend.run(state, 2 * steps + min(steps, 50))
        click.echo(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))
    return parts
