"""Tries launch configurations on the GPU at hand and writes the table that the kernels take theirs from."""

import csv
import dataclasses
import itertools
import statistics
from collections.abc import Iterator

import click
import torch
import triton

from benchmarks.gpu import _rate, advance, data_drawn_once
from benchmarks.work import BLOCK, Case
from fasttrain.backends import together
from fasttrain.backends import triton as backend_module
from fasttrain.backends.triton import TritonBackend
from fasttrain.kernels import configurations

BY_PRECISION = {"ieee": "float32", "bf16x3": "bf16x3", "tf32": "tf32", "bf16": "bf16"}
# What a row is judged by: shapes of its class of widths, and how many models.
SHAPES = ((64, 500), (784, 500))


def candidates(start: dict) -> Iterator[dict]:
    """Single sizes to try in place of those of a row. Products of many terms at once spill in ieee (docs/TRAPS.md)."""
    terms = (16,) if start["precision"] == "ieee" else (16, 32, 64)
    for name, values in (("BB", (32, 64)), ("BI", (32, 64)), ("BS", terms), ("warps", (4, 8)), ("stages", (2, 3, 4))):
        yield from ({name: value} for value in values if value != start[name])


def _state(case: Case, precision: str, row: dict, whole: bool):
    setting = case.setting(torch.float32, 10**9, BY_PRECISION[precision])
    key = together("triton", setting.spec.variants(10)[0])
    base = backend_module.configured(setting, key)
    tiles = {name: row[name] for name in ("BB", "BK", "BI", "BS", "warps", "stages")}
    backend = TritonBackend(setting, key)
    backend._configuration = dataclasses.replace(base, whole=whole, CK=row["BK"], head_warps=row["warps"], **tiles)
    return backend, backend.init(case.runs(setting, case.models))


def _speed(case: Case, precision: str, row: dict, whole: bool, budget: float) -> float:
    """Model-steps/s; 0 where it does not run."""
    try:
        backend, state = _state(case, precision, row, whole)
        backend.run(state, BLOCK)
        return _rate(lambda steps: advance(state.models, steps), case.models, budget)
    except (triton.CompilationError, triton.OutOfResources) as error:
        click.echo(f"  {row}: {type(error).__name__}")
        return 0.0


def run(budget: float) -> list[dict]:
    """The rows for this GPU's target: for each precision and block of units the fastest candidate."""
    major, minor = torch.cuda.get_device_capability()
    target = 10 * major + minor
    with data_drawn_once():
        return [
            {"target": target, **_best(precision, units, budget)}
            for precision, units in itertools.product(BY_PRECISION, configurations.UNITS)
        ]


def _best(precision: str, units: int, budget: float) -> dict:
    """The row of a precision and a block of units: from the one that there is, one size at a time."""
    cases = [Case(128, features, units, models=models, device="cuda") for features, models in SHAPES]

    def speed(row: dict) -> float:
        rates = [_speed(case, precision, row, False, budget) for case in cases]
        return statistics.geometric_mean(rates) if min(rates) > 0 else 0.0

    known = [row for row in configurations.rows() if (row["precision"], row["units"]) == (precision, units)]
    best = {name: value for name, value in known[-1].items() if name not in ("target", "whole_below")}
    rate = speed(best)
    for change in candidates(best):
        other = speed({**best, **change})
        if other > rate:
            best, rate = {**best, **change}, other
    click.echo(f"{precision} {units}: {rate:,.0f} model-steps/s with {best}")
    return {"whole_below": _whole_below(precision, best, budget), **best}


def _whole_below(precision: str, row: dict, budget: float) -> int:
    """Weights up to which whole steps are faster than stages, among shapes of the class."""
    most = 0
    for features in (16, 32, 64, 128, 256, 512, 784):
        case = Case(128, features, row["units"], models=500, device="cuda")
        whole, stages = (_speed(case, precision, row, one, budget) for one in (True, False))
        if whole < stages:
            break
        most = (features + 10) * row["units"]
    return most


def write(rows: list[dict]) -> None:
    """Puts the rows into the table in place of those of the same target."""
    kept = [row for row in configurations.rows() if row["target"] != rows[0]["target"]]
    names = list(kept[0] if kept else configurations.rows()[0])
    ordered = sorted([*kept, *rows], key=lambda row: row["target"])
    with configurations.TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    configurations.rows.cache_clear()
