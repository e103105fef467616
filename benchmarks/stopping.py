"""How often the plateau rule stops a run that would have fitted, and what it saves: runs that it may not stop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import beta

import fasttrain
from fasttrain import ScanSpec
from fasttrain.backends import base
from fasttrain.records import Outcome
from fasttrain.stopping import PLATEAU_AFTER, Monitor, StopRules

COLUMNS = (
    "optimizer",
    "width",
    "runs",
    "fits",
    "late_fits",
    "stopped_late_fits",
    "steps",
    "steps_saved",
)


@dataclass(slots=True)
class _Record:
    """Of one run that the rule did not end: where it would have, and how the run went on."""

    stop: int | None = None
    outcome: Outcome | None = None
    steps: int = 0


class _Watching(Monitor):
    """A monitor that notes a plateau and goes on."""

    records: list[_Record] = []  # noqa: RUF012, of the whole process on purpose

    def __init__(self, rules: StopRules) -> None:
        super().__init__(rules)
        self._record = _Record()
        self.records.append(self._record)

    def observe(self, step: int, loss: float, wrong: int, n: int) -> Outcome | None:
        outcome = super().observe(step, loss, wrong, n)
        if outcome is Outcome.PLATEAUED:
            self._record.stop = self._record.stop or step
            outcome = Outcome.OUT_OF_BUDGET if step >= self.rules.steps else None
        self._record.outcome, self._record.steps = outcome, step
        return outcome


def run(widths: Sequence[int], seeds: int, seed: int) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Runs around the threshold of every width and of two optimizers, each to its fit or to the end of its budget.

    Args:
        widths: of networks with one hidden layer, on digits with random labels.
        seeds: runs at each n.
        seed: of the scans.

    Returns:
        A row for each optimizer and width, and the whole: the share of those fits that outlived the first look which
        the rule would have prevented, with its exact 95 % bounds (Clopper & Pearson 1934), and the share of steps
        saved.
    """
    rows: list[dict[str, object]] = []
    original, base.Monitor = base.Monitor, _Watching  # type: ignore[misc]
    try:
        for optimizer, rate in (("adam", 0.01), ("sgd", 0.1)):
            for width in widths:
                _Watching.records = []
                fasttrain.scan(
                    ScanSpec(
                        widths=(width,),
                        optimizer=(optimizer,),
                        lr=(rate,),
                        backend="native",
                        tolerance=1e-4,  # never met: all probes go where a fit is neither sure nor hopeless
                        seeds=64,
                        max_probes=seeds,
                        seed=seed,
                        elasticity=False,
                    )
                )
                rows.append({"optimizer": optimizer, "width": width, **_row(_Watching.records)})
    finally:
        base.Monitor = original  # type: ignore[misc]
    late = sum(int(str(row["late_fits"])) for row in rows)
    wrong = sum(int(str(row["stopped_late_fits"])) for row in rows)
    steps, saved = (sum(int(str(row[name])) for row in rows) for name in ("steps", "steps_saved"))
    return rows, {
        "runs": sum(int(str(row["runs"])) for row in rows),
        "late_fits": late,
        "stopped_late_fits": wrong,
        "false_stops": wrong / late if late else math.nan,
        "false_stops_low": float(beta.ppf(0.025, wrong, late - wrong + 1)) if wrong else 0.0,
        "false_stops_high": float(beta.ppf(0.975, wrong + 1, late - wrong)) if wrong < late else 1.0,
        "steps_saved": saved / steps,
    }


def _row(records: Sequence[_Record]) -> dict[str, int]:
    fits = [record for record in records if record.outcome is Outcome.FITTED]
    late = [record for record in fits if record.steps > PLATEAU_AFTER * ScanSpec().steps]
    return {
        "runs": len(records),
        "fits": len(fits),
        "late_fits": len(late),
        "stopped_late_fits": sum(record.stop is not None for record in late),
        "steps": sum(record.steps for record in records),
        "steps_saved": sum(record.steps - record.stop for record in records if record.stop is not None),
    }
