"""One run of a scan again: the same data, weights, order and backend, and so the same bits on the same hardware."""

import dataclasses
import itertools
import os
from dataclasses import dataclass

import pandas as pd

from fasttrain.analysis import Results, load
from fasttrain.curvature import check
from fasttrain.data import provenance
from fasttrain.errors import UserError
from fasttrain.prepare import numerics, own_sources, prepare, same_value
from fasttrain.records import Curvature, Probe, ProbeResult
from fasttrain.sampling import generator_digest

_COMPARED = ("outcome", "steps", "fit_step", "train_loss", "train_error", "test_accuracy")


@dataclass(frozen=True, slots=True, eq=False)
class Rerun:
    """A run made again.

    Attributes:
        result: what it gave, with its weights.
        history: its training curve, as ``Results.history`` gives it.
        differs: fields of the result that are not those in the file; empty on the same hardware with the same versions.
        curvature: gradient norm, slope of the loss and ends of the Hessian's spectrum where it ended, if asked for.
    """

    result: ProbeResult
    history: pd.DataFrame
    differs: tuple[str, ...]
    curvature: Curvature | None = None


def rerun(path: str | os.PathLike[str] | Results, probe: int, *, curvature: bool = False) -> Rerun:
    """Trains one probe of a file again, on the backend that trained it.

    Args:
        path: a file that ``scan`` wrote, or its results.
        probe: index of the probe, ``Results.probes["probe"]``.
        curvature: whether its curvature is measured (``fasttrain.curvature.measure``).

    Raises:
        UserError: there is no such file or probe, this installation draws other random numbers, or what the scan
            trained on (data, device, backend) is not here; or its curvature is asked for, of a model that cannot be
            differentiated twice.
    """
    results = path if isinstance(path, Results) else load(path)
    stored = results.history(probe)  # also says whether there is such a probe
    row = results.probes.iloc[probe]
    attrs = results.attrs
    if attrs.get("generator_digest") != generator_digest():
        made = attrs.get("numpy_version")
        raise UserError("file", results.path, f"this installation draws other random numbers than numpy {made} did")
    backends = str(attrs.get("variant_backends", "")).split(",")
    own = dataclasses.replace(results.spec, backend=backends[int(row["variant"])], device=str(attrs["device"]))
    prepared = prepare(dataclasses.replace(results.spec, device=own.device))
    if attrs.get("data_sha256") != provenance(results.spec)["data_sha256"]:
        raise UserError("data", results.spec.data, "is not the data that the scan was made with")
    if attrs.get("arch_source", "") != own_sources(results.spec):
        raise UserError("arch", ",".join(results.spec.arch), "is not the source that the scan was made with")
    setting = dataclasses.replace(prepared.setting, spec=own)
    mine = dataclasses.replace(prepared, setting=setting)
    if curvature:
        check(setting, [mine.problems[int(row["variant"])].variant])
    asked = Probe(int(row["variant"]), int(row["n"]), int(row["seed"]), int(row["round"]))
    with numerics(mine):
        [result] = itertools.chain.from_iterable(mine.again([asked]))
        [found] = mine.measured([result]) if curvature else [None]
    differs = [name for name in _COMPARED if not same_value(getattr(result, name), row[name])]
    curve = result.history
    history = pd.DataFrame({"step": curve.step, "train_loss": curve.train_loss, "train_accuracy": curve.train_accuracy})
    if not history.equals(stored.reset_index(drop=True)):
        differs.append("history")
    return Rerun(result, history, tuple(differs), found)


__all__ = ["Rerun", "rerun"]
