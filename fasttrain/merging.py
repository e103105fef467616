"""Files of one spec joined into one: the runs of all of them, and what the search makes of these."""

import os
from collections.abc import Sequence
from pathlib import Path

from fasttrain.analysis import Results, load
from fasttrain.errors import UserError
from fasttrain.prepare import check_same, make_search, prepare, same_value, stored_results
from fasttrain.records import History, Probe, ProbeResult
from fasttrain.schema import TIMING_ATTRIBUTES
from fasttrain.store import RESERVED, HDF5Store, check_output

_VERDICT = ("outcome", "steps", "fit_step", "train_loss", "train_error")
_OWN = {*RESERVED, *TIMING_ATTRIBUTES, "model_steps"}  # that a store or its end sets
_APPENDED = 256  # results at once


def merge(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, overwrite: bool = False) -> Results:
    """Joins the files of scans of one spec that were stopped, or ran on several machines of a kind.

    Each run is taken once, from the first file that has it, with its training curve and weights. What the search asks
    for beyond them is left to ``resume``: the file is complete if there is nothing. Curvature is left out.

    Args:
        paths: two files or more.
        out: the file to write.
        overwrite: whether ``out`` may replace a file.

    Raises:
        UserError: there are fewer than two files, one cannot be read, they differ in their spec or their conditions,
            the same run ended differently in two of them, or ``out`` cannot be written.
    """
    if len(paths) < 2:
        raise UserError("files", len(paths), "expected two files or more")
    if any(Path(path).resolve() == Path(out).resolve() for path in paths):
        raise UserError("out", out, "is one of the files that are joined; give another name")
    check_output(out, overwrite)
    files = [load(path) for path in paths]
    first = files[0]
    prepared = prepare(first.spec)
    for one in files:
        if one.spec != first.spec:
            raise UserError("file", one.path, f"has another spec than {first.path}")
        check_same(prepared, one)
    taken: dict[Probe, tuple[Results, int, ProbeResult]] = {}
    for one in files:
        for row, result in enumerate(stored_results(one)):
            key = result.probe
            if key not in taken:
                taken[key] = one, row, result
            elif different := [
                name for name in _VERDICT if not same_value(getattr(result, name), getattr(taken[key][2], name))
            ]:
                told = f"n {key.n}, seed {key.seed} of variant {key.variant}: {', '.join(different)}"
                raise UserError("file", one.path, f"has a run that ended otherwise in {taken[key][0].path} ({told})")
    search = make_search(first.spec, prepared.problems)
    search.tell([result for _, _, result in taken.values()])
    store = HDF5Store(out, overwrite)
    kept = {name: value for name, value in first.attrs.items() if name not in _OWN}
    try:
        store.begin(first.spec, prepared.problems, kept)
        whole = list(taken.values())
        for start in range(0, len(whole), _APPENDED):
            store.append([_complete(*one) for one in whole[start : start + _APPENDED]])
        store.put_curves(search.estimates())
        done = search.done and not first.attrs.get("curvature_runs")
        store.finish(
            "complete" if done else "interrupted", {"model_steps": sum(result.steps for _, _, result in whole)}
        )
    finally:
        store.close()
    return load(out)


def _complete(source: Results, row: int, result: ProbeResult) -> ProbeResult:
    """A run with its training curve and, where they were kept, its weights."""
    curve = source.history(row)
    history = History(*(curve[name].to_numpy() for name in ("step", "train_loss", "train_accuracy")))
    weights = source.weights(row) if result.fitted and source.attrs.get("save_weights") else None
    return ProbeResult(
        **{name: getattr(result, name) for name in result.__slots__ if name not in ("history", "weights")},
        history=history,
        weights=weights,
    )
