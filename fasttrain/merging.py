"""Files of one spec joined into one: the runs of all of them, and what the search makes of these."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fasttrain.analysis import Results, load
from fasttrain.checkpoints import drop
from fasttrain.errors import UserError
from fasttrain.prepare import Prepared, check_same, make_search, prepare, same_value, stored_results
from fasttrain.records import History, Probe, ProbeResult
from fasttrain.schema import TIMING_ATTRIBUTES
from fasttrain.spec import ScanSpec
from fasttrain.store import RESERVED, Attribute, HDF5Store, check_output

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
        if one.spec != first.spec or one.earlier != first.earlier:
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
    kept = {name: value for name, value in first.attrs.items() if name not in _OWN}
    write(HDF5Store(out, overwrite), first.spec, first.earlier, prepared, kept, list(taken.values()))
    return load(out)


def write(
    store: HDF5Store,
    spec: ScanSpec,
    earlier: Sequence[ScanSpec],
    prepared: Prepared,
    attributes: Mapping[str, Attribute],
    runs: Sequence[tuple[Results, int, ProbeResult]],
) -> None:
    """Writes a whole file from runs of others, and closes it.

    Args:
        store: of the file.
        spec: what the scan is asked for.
        earlier: what it was asked for before it was extended.
        prepared: the same scan as it would be done here.
        attributes: its conditions.
        runs: for each run where it comes from, its row there, and itself with the variant that it has in ``prepared``.
    """
    search = make_search(spec, prepared.problems, earlier)
    try:
        search.tell([result for _, _, result in runs])
    except ValueError as error:
        raise UserError("file", runs[0][0].path, f"is damaged: {error}") from None
    try:
        store.begin(spec, prepared.problems, attributes)
        drop(store.path)
        for start in range(0, len(runs), _APPENDED):
            store.append([_complete(*one) for one in runs[start : start + _APPENDED]])
        store.put_curves(search.estimates())
        done = search.done and not attributes.get("curvature_runs")
        store.finish("complete" if done else "interrupted", {"model_steps": sum(result.steps for _, _, result in runs)})
    finally:
        store.close()


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
