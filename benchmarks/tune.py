"""Tries launch configurations on the GPU at hand and writes the table that the kernels take theirs from."""

import csv
import dataclasses
import itertools
import statistics
from collections.abc import Iterator

import click
import torch

from benchmarks.gpu import _rate, _timed
from benchmarks.work import BLOCK, Case
from fasttrain.backends import together
from fasttrain.backends import triton as backend_module
from fasttrain.backends.triton import TritonBackend
from fasttrain.kernels import configurations

BY_PRECISION = {"ieee": "float32", "bf16x3": "bf16x3", "tf32": "tf32", "bf16": "bf16"}
# What a row is judged by: shapes of its class of widths, and how many models.
SHAPES = ((64, 500), (784, 500))


def candidates(precision: str, units: int) -> Iterator[dict]:
    """Rows to try. Products of many terms at once spill in ieee (docs/TRAPS.md)."""
    depths = (16,) if precision == "ieee" else (32, 64)
    for samples, inputs, terms, warps, stages in itertools.product((32, 64), (32, 64), depths, (4, 8), (2, 3)):
        yield {
            "precision": precision, "units": units, "BB": samples, "BK": 32, "BI": inputs, "BS": terms, "warps": warps,
            "stages": stages,
        }  # fmt: skip


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
        return _rate(lambda steps: backend.run(state, state.clock + steps), case.models, budget)
    except Exception as error:  # a tile that the compiler or the device refuses is a candidate that lost
        click.echo(f"  {row}: {type(error).__name__}")
        return 0.0


def run(budget: float) -> list[dict]:
    """The rows for this GPU's target: for each precision and block of units the fastest candidate."""
    major, minor = torch.cuda.get_device_capability()
    target = 10 * major + minor
    _timed(lambda: None)
    found = []
    for precision, units in itertools.product(BY_PRECISION, configurations.UNITS):
        cases = [Case(128, features, units, models=models, device="cuda") for features, models in SHAPES]
        speeds = []
        for row in candidates(precision, units):
            rates = [_speed(case, precision, row, False, budget) for case in cases]
            if min(rates) > 0:
                speeds.append((statistics.geometric_mean(rates), row))
        best, row = max(speeds, key=lambda pair: pair[0])
        found.append({"target": target, "whole_below": _whole_below(precision, row, budget), **row})
        click.echo(f"{precision} {units}: {best:,.0f} model-steps/s with {row}")
    return found


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
