"""A scan that is asked for more than before: further variants, seeds or samples, narrower intervals."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fasttrain import checkpoints
from fasttrain.analysis import EXTENDED_FROM, Results, load
from fasttrain.errors import UserError
from fasttrain.journal import journal_path
from fasttrain.merging import write
from fasttrain.prepare import check_same, prepare, stages, stated_conditions, stored_results, unchanged
from fasttrain.run import Progress, check_seconds, resume
from fasttrain.schema import SCHEMA_VERSION
from fasttrain.spec import EXTENDED, ScanSpec, spec_fields
from fasttrain.store import HDF5Store, check_output

_RISES, _FALLS = ("seeds", "max_probes", "n_max"), ("tolerance", "n_min")


def extend(
    path: str | os.PathLike[str],
    changes: Mapping[str, Any],
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    time_limit: float | None = None,
    checkpoint: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Results:
    """Goes on with a scan that is asked for more, with every run that its file has.

    The search of each variant of before goes on from the rounds that it has, first to the end of what was asked for
    before, where it was not there yet; variants that are new begin anew. So the runs still follow from what was asked
    for, in the order in which it was: the same calls make the same file, whether or not they were interrupted.

    Args:
        path: the file of a scan, complete or not.
        changes: fields of ``ScanSpec`` with their new values, of those in ``EXTENDED``: lists hold the values of before
            and more; ``seeds``, ``max_probes`` and ``n_max`` rise, ``tolerance`` and ``n_min`` fall.
        out: another file to write; by default the file itself is replaced.
        overwrite: whether ``out`` may replace a file.
        time_limit: as of ``scan``.
        checkpoint: as of ``scan``.
        on_progress: as of ``scan``.

    Raises:
        UserError: there is no such file, another process writes it, a change asks for something else than more, or
            this installation would not go on as the scan began; nothing is changed then.
        KeyboardInterrupt: as of ``scan``.
        Terminated: as of ``scan``.
    """
    check_seconds("time_limit", time_limit)
    check_seconds("checkpoint", checkpoint)
    path = Path(path)
    target = path if out is None else Path(out)
    if out is not None:
        if target.resolve() == path.resolve():
            raise UserError("out", out, "is the file itself; leave it out")
        check_output(out, overwrite)
    before = load(path)
    spec = asked_for(before.spec, changes)
    if spec == before.spec:
        raise UserError("file", path, f"has all of that already; expected more of one of {', '.join(EXTENDED)}")
    if before.attrs["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            "file", path, f"has schema version {before.attrs['schema_version']}; only {SCHEMA_VERSION} can be extended"
        )
    prepared = prepare(spec)
    earlier = (*before.earlier, before.spec)
    then = stages(earlier, spec, prepared.problems)[-1]
    own = list(then.problems.values())
    check_same(prepared, before, own)
    attributes = {
        **stated_conditions(prepared),
        "save_weights": before.attrs.get("save_weights", 0),
        "curvature_runs": before.attrs.get("curvature_runs", 0),
        "slots": prepared.slots,
        EXTENDED_FROM: _differences(earlier, spec),
    }
    if out is None:
        held, written = HDF5Store.reopened(path), path.with_name(f".{path.name[:200]}.extended")
    else:
        held, written = None, target
    try:
        before = unchanged(before)  # the file is ours only now
        runs = []
        for row, one in enumerate(stored_results(before)):
            probe = dataclasses.replace(one.probe, variant=own[one.probe.variant].index)
            runs.append((before, row, dataclasses.replace(one, probe=probe)))
        write(HDF5Store(written, overwrite or out is None), spec, earlier, prepared, attributes, runs)
        if out is None:
            os.replace(written, path)
            checkpoints.drop(path)  # of the scan as it was
    except BaseException:
        if out is None:
            for left in (written, journal_path(written)):
                left.unlink(missing_ok=True)
        raise
    finally:
        if held is not None:
            held.leave()
    return resume(target, time_limit=time_limit, checkpoint=checkpoint, on_progress=on_progress)


def asked_for(spec: ScanSpec, changes: Mapping[str, Any]) -> ScanSpec:
    """A spec that asks for more.

    Raises:
        UserError: it asks for something else.
    """
    changes = spec_fields(changes)
    for name in changes:
        if name not in EXTENDED:
            raise UserError(name, changes[name], f"cannot be extended; expected one of {', '.join(EXTENDED)}")
    fields = {name: value for name, value in json.loads(spec.to_json()).items() if name != "steps" or not spec.budget}
    plain = {name: value for name, value in fields.items() if name != "max_probes"}
    if ScanSpec.from_mapping(plain).max_probes == spec.max_probes:
        fields = plain  # its default may follow the seeds
    new = ScanSpec.from_mapping({**fields, **changes})
    for name in changes:
        now, held = getattr(new, name), getattr(spec, name)
        if isinstance(held, tuple) and not set(held) <= set(now):
            raise UserError(name, changes[name], f"expected all values of before, {_listed(held)}, and more")
        if held is None or now is None or isinstance(held, tuple):
            continue
        if (name in _RISES and now < held) or (name in _FALLS and now > held):
            raise UserError(name, changes[name], f"expected {'more' if name in _RISES else 'less'} than before, {held}")
    return new


def _listed(values: tuple[Any, ...]) -> str:
    return ",".join(map(str, values))


def _differences(earlier: tuple[ScanSpec, ...], spec: ScanSpec) -> str:
    """What earlier specs have otherwise, as ``Results.earlier`` reads it."""
    now = json.loads(spec.to_json())
    each = [json.loads(one.to_json()) for one in earlier]
    return json.dumps([{name: value for name, value in one.items() if value != now[name]} for one in each])
