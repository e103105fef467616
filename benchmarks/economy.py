"""What the adaptive search costs beside fixed grids of (n, seeds), at equal interval width: simulated and real runs.

Costs are sample-updates, counted and not timed: the steps that each run took, times the samples of a step.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

import fasttrain
from benchmarks import calibration
from benchmarks.calibration import STEPS, Curve, Trial, many
from fasttrain import ScanSpec
from fasttrain.estimate import estimate, posterior
from fasttrain.machine import cores
from fasttrain.records import Estimate, Problem

COLUMNS = ("probes", "design", "ratio", "seeds", "half_width", "runs", "sample_updates", "times_adaptive")
_FIRST, _LAST = 0.12, 1.1
"""Of the parameters: a grid must reach from below the smallest EMC50 that may come to above the largest."""
_RATIOS = (1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.45)
_SEEDS = (*range(1, 13), *range(14, 33, 2), 36, 40, 44, 48)
_SLOPES = (6.0, 10.0, 16.0, 25.0, 40.0)

Probes = Mapping[tuple[int, int], tuple[bool, float]]
"""By (n, seed): whether the run fitted, and the steps that it took."""

Done = tuple[float, int, float]
"""Half-width, runs and steps of a design."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A fixed design: n from ``_FIRST`` to ``_LAST`` times the parameters by a ratio, so many seeds at each."""

    ratio: float
    seeds: int

    def ns(self, params: int) -> list[int]:
        """The n for a model with so many parameters."""
        count = math.ceil(math.log(_LAST / _FIRST) / math.log(self.ratio)) + 1
        return sorted({round(params * _FIRST * self.ratio**k) for k in range(count)})


def half_width(found: Estimate) -> float:
    """Of the interval, as a share of EMC50; infinite where it is not bounded."""
    share = (found.emc50_high - found.emc50_low) / (2.0 * found.emc50)
    return share if math.isfinite(share) else math.inf


def from_grid(grid: Grid, at: Problem, run: Callable[[int, int], tuple[bool, float]]) -> Done:
    """Half-width, runs and steps of a fixed design; ``run`` gives the verdict and the steps at (n, seed)."""
    ns, fits, steps = grid.ns(at.params), [], 0.0
    for n in ns:
        done = [run(n, seed) for seed in range(grid.seeds)]
        fits.append(sum(fitted for fitted, _ in done))
        steps += sum(took for _, took in done)
    fails = [grid.seeds - fit for fit in fits]
    post = posterior(ns, fits, fails, n_min=at.n_min, n_max=at.n_max)
    return half_width(estimate(at, post, ScanSpec().interval)), len(ns) * grid.seeds, steps


def simulated(runs: int) -> Iterator[dict[str, object]]:
    """Rows for the adaptive search and for the cheapest grid of every ratio that is at least as precise.

    The truths have EMC50 between 0.15 and 1 times the parameters and slopes from 6 to 40. Two designs are equally
    precise when the medians of their half-widths are equal.
    """
    found = many(_adaptive, runs)
    ours, cost = _precision(found), _cost(found)
    yield _row("simulated", "adaptive", math.nan, 0, ours, _probes(found), cost, cost)
    single = many(_one_at_a_time, runs)
    yield _row(
        "simulated", "one probe at a time", math.nan, 0, _precision(single), _probes(single), _cost(single), cost
    )
    at = calibration.problem()
    with ProcessPoolExecutor(cores()) as workers:
        for ratio in _RATIOS:
            yield from _cheapest(
                "simulated",
                ratio,
                lambda seeds, ratio=ratio: list(
                    workers.map(partial(_one_grid, Grid(ratio, seeds), at), range(runs), chunksize=8)
                ),
                ours,
                cost,
            )


def _cheapest(
    probes: str, ratio: float, played: Callable[[int], Sequence[Done]], ours: float, cost: float
) -> Iterator[dict[str, object]]:
    """The grid of a ratio that is as precise as the adaptive search; none if no number of seeds is.

    Between two numbers of seeds on either side of that precision, ln half-width is taken as linear in ln seeds: a grid
    is not charged for the whole seed that it needs a part of.
    """
    before: tuple[int, float, float, float] | None = None
    for seeds in _SEEDS:
        done = played(seeds)
        width = float(np.median([share for share, _, _ in done]))
        runs, steps = (float(np.mean([one[i] for one in done])) for i in (1, 2))
        if width > ours:
            before = seeds, width, runs, steps
            continue
        part = 1.0
        if before is not None and math.isfinite(before[1]) and before[1] > width:
            part = math.log(before[1] / ours) / math.log(before[1] / width)
            start = before[0]
            exact = start * (seeds / start) ** part
            part = (exact - start) / (seeds - start)
            runs, steps = before[2] + part * (runs - before[2]), before[3] + part * (steps - before[3])
            yield _row(probes, "grid", ratio, round(exact, 2), ours, runs, steps, cost)
        else:
            yield _row(probes, "grid", ratio, seeds, width, runs, steps, cost)
        return


def _precision(trials: Sequence[Trial]) -> float:
    return float(np.median([half_width(trial.found) for trial in trials]))


def _cost(trials: Sequence[Trial]) -> float:
    return float(np.mean([trial.samples for trial in trials]))


def _probes(trials: Sequence[Trial]) -> float:
    return float(np.mean([trial.found.n_probes for trial in trials]))


def _curve(key: int) -> Curve:
    rng = np.random.default_rng([key, 3])
    emc = 1210 * math.exp(float(rng.uniform(math.log(0.15), 0.0)))
    return Curve(emc, float(rng.choice(_SLOPES)), 0.02)


def _adaptive(key: int) -> Trial:
    return calibration.play(_curve(key), [key, 4], short=False)


def _one_at_a_time(key: int) -> Trial:
    calibration.single_probes()
    return _adaptive(key)


def _one_grid(grid: Grid, at: Problem, key: int) -> Done:
    return from_grid(grid, at, _simulator(key))


def _simulator(key: int) -> Callable[[int, int], tuple[bool, float]]:
    curve = _curve(key)

    def run(n: int, seed: int) -> tuple[bool, float]:
        step = curve.fit_step(n, float(np.random.default_rng([key, 5, n, seed]).random()))
        return step <= STEPS, min(step, STEPS)

    return run


def real(spec: ScanSpec, scans: int) -> Iterator[dict[str, object]]:
    """As ``simulated``, from runs of a real spec: adaptive scans under several seeds, grids cut out of one large grid.

    Args:
        spec: of the adaptive scans; its variants are what is measured.
        scans: adaptive scans, under seeds of their own.
    """
    batch = spec.batch_size[0]
    widths, counts, costs = [], [], []
    for seed in range(scans):
        found = fasttrain.scan(replace(spec, seed=1000 + seed))
        widths += [_share(row) for row in found.curves.to_dict("records")]
        counts.append(len(found.probes) / len(found.curves))
        costs.append(float(found.probes["steps"].sum()) * batch / len(found.curves))
    ours, cost = float(np.median(widths)), float(np.mean(costs))
    yield _row("real", "adaptive", math.nan, 0, ours, float(np.mean(counts)), cost, cost)
    yield from _real_grids(spec, found, ours, cost)


def _real_grids(spec: ScanSpec, found: "fasttrain.Results", ours: float, cost: float) -> Iterator[dict[str, object]]:
    batch, most = spec.batch_size[0], max(_SEEDS)
    problems = [
        Problem(row["variant"], variant, row["params"], row["n_min"], row["n_max"])
        for row, variant in zip(found.curves.to_dict("records"), spec.variants(10), strict=True)
    ]
    for ratio in _RATIOS:
        stored: dict[int, Probes] = {}

        def played(seeds: int, ratio: float = ratio, stored: dict[int, Probes] = stored) -> list[Done]:
            done = []
            for at in problems:
                grid = _Cut(ratio, seeds)
                ns = grid.ns(at.params)
                if (ns[0], seeds - 1) not in stored.get(at.index, {}):
                    stored[at.index] = _measured(spec, at, ns, min(most, max(2 * seeds, 4)))
                done.append(from_grid(grid, at, partial(_stored, stored[at.index])))
            return [(share, runs, steps * batch) for share, runs, steps in done]

        yield from _cheapest("real", ratio, played, ours, cost)


def _stored(probes: Probes, n: int, seed: int) -> tuple[bool, float]:
    return probes[n, seed]


class _Cut(Grid):
    """A grid that ends at the samples that there are."""

    def ns(self, params: int) -> list[int]:
        """As of ``Grid``, up to the size of the data set."""
        return [n for n in super().ns(params) if n <= 1797]


def _measured(spec: ScanSpec, at: Problem, ns: Sequence[int], seeds: int) -> Probes:
    grid = replace(spec, widths=(at.variant.width,), search="grid", n=tuple(ns), seeds=seeds, max_probes=None, seed=5)
    probes = fasttrain.scan(grid).probes
    return {
        (int(row["n"]), int(row["seed"])): (row["outcome"] == "fitted", float(row["steps"]))
        for row in probes.to_dict("records")
    }


def _share(row: Mapping[str, float]) -> float:
    share = (row["emc50_high"] - row["emc50_low"]) / (2.0 * row["emc50"])
    return share if math.isfinite(share) else math.inf


def _row(
    probes: str, design: str, ratio: float, seeds: float, width: float, runs: float, cost: float, ours: float
) -> dict[str, object]:
    return {
        "probes": probes,
        "design": design,
        "ratio": ratio,
        "seeds": seeds,
        "half_width": round(width, 4),
        "runs": round(runs, 1),
        "sample_updates": round(cost),
        "times_adaptive": round(cost / ours, 3),
    }


def run(quick: bool, runs: int, scans: int) -> list[dict[str, object]]:
    """All rows: simulated, and real ones of networks on digits with random labels."""
    spec = ScanSpec(widths=(8,) if quick else (8, 12, 16, 24), elasticity=False, backend="native")
    if quick:
        spec, runs, scans = replace(spec, steps=300, max_probes=40), 4, 1
    rows = []
    for row in itertools.chain(simulated(runs), real(spec, scans)):
        rows.append(row)
        print(row, flush=True)
    return rows
