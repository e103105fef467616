"""Tables of results in other formats: CSV, Parquet, JSON lines."""

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from fasttrain.analysis import Results, json_value
from fasttrain.errors import UserError
from fasttrain.measured import select
from fasttrain.schema import Column
from fasttrain.store import check_output, write_whole


def export(
    results: Results,
    out: str | os.PathLike[str],
    table: str = "curves",
    *,
    selection: str | Sequence[str] = (),
    overwrite: bool = False,
) -> int:
    """Writes a table of some results to a file, in the format that its name ends in.

    - ``.csv``: every digit of a float64; NaN is empty, infinity ``inf``.
    - ``.parquet``: the types of the file, description and units with each column, the spec and the conditions with the
      table. Needs pyarrow.
    - ``.jsonl``: an object a row; NaN and infinity are ``null``.

    Args:
        results: from ``load`` or ``scan``.
        out: the file.
        table: ``"curves"``, ``"probes"``, ``"history"`` (training curves, with the probe of each row) or
            ``"curvature"``.
        selection: of which variants, as ``fasttrain compare --a`` has it.
        overwrite: whether ``out`` may replace a file.

    Returns:
        How many rows were written.

    Raises:
        UserError: there is no such table, format or variant, or ``out`` cannot be written.
    """
    path = Path(out)
    made = _FORMATS.get(path.suffix.lower())
    if made is None:
        raise UserError("out", path, f"expected a name that ends in {', '.join(_FORMATS)}")
    check_output(path, overwrite)
    frame, columns = results.table(table)
    if selection:
        curves, probes = select(results, selection, "select")
        kept = {"curves": ("variant", curves["variant"])}.get(table, ("probe", probes["probe"]))
        frame = frame[frame[kept[0]].isin(kept[1])]
    write_whole(path, made(frame.reset_index(drop=True), path, columns, results))
    return len(frame)


def _csv(frame: pd.DataFrame, path: Path, columns: Sequence[Column], results: Results) -> bytes:
    return frame.to_csv(index=False).encode()


def _jsonl(frame: pd.DataFrame, path: Path, columns: Sequence[Column], results: Results) -> bytes:
    # pandas writes 15 digits at most, which are two too few.
    return "".join(json.dumps(json_value(row)) + "\n" for row in frame.to_dict("records")).encode()


def _parquet(frame: pd.DataFrame, path: Path, columns: Sequence[Column], results: Results) -> bytes:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("out", path, f"pyarrow is missing ({error}); pip install pyarrow") from None
    meaning = {column.name: {"description": column.description, "units": column.units} for column in columns}
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    fields = [table.schema.field(name).with_metadata(meaning[name]) for name in table.column_names]
    about = {"fasttrain.spec": results.spec.to_json(), "fasttrain.attributes": json.dumps(json_value(results.attrs))}
    schema = pyarrow.schema(fields, metadata={**(table.schema.metadata or {}), **about})
    contents = io.BytesIO()
    parquet.write_table(table.cast(schema), contents)
    return contents.getvalue()


_FORMATS: dict[str, Callable[[pd.DataFrame, Path, Sequence[Column], Results], bytes]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl": _jsonl,
}
