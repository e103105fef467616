"""What leaves a file: other formats with every digit, and the file itself in the hands of other programs."""

import json
import shutil
import subprocess

import h5py
import netCDF4
import numpy as np
import pandas as pd
import pytest
import xarray
from pyarrow import parquet

import fasttrain
from fasttrain import ScanSpec, UserError, export
from fasttrain.cli import main
from fasttrain.schema import CURVES, GROUPS, PROBES

SMALL = {"data": "gaussian:8", "classes": 2, "steps": 300, "check_every": 20, "max_probes": 24, "seed": 4}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """With a variant beyond its range, whose EMC50 is NaN and whose interval is infinite, and with weights."""
    path = tmp_path_factory.mktemp("export") / "emc.h5"
    found = fasttrain.scan(ScanSpec(**SMALL, widths=(2, 5), n_max=15), out=path, save_weights=True, curvature=1)
    assert np.isnan(found.curves["emc50"]).any()
    assert np.isinf(found.curves["emc50_high"]).any()
    return found


TABLES = ("curves", "probes", "curvature")


@pytest.mark.parametrize("table", TABLES)
def test_csv_keeps_every_digit(results, tmp_path, table):
    assert export(results, tmp_path / "a.csv", table) == len(getattr(results, table))
    read = pd.read_csv(tmp_path / "a.csv", keep_default_na=False, na_values=[""])
    wanted = getattr(results, table)
    for name in wanted:
        if wanted[name].dtype == "str":
            assert read[name].astype(object).fillna("").astype(str).tolist() == wanted[name].tolist()
        else:
            np.testing.assert_array_equal(read[name].to_numpy(), wanted[name].to_numpy())


@pytest.mark.parametrize("table", TABLES)
def test_parquet_keeps_types_units_and_conditions(results, tmp_path, table):
    export(results, tmp_path / "a.parquet", table)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a.parquet"), getattr(results, table), check_exact=True)
    schema = parquet.read_schema(tmp_path / "a.parquet")
    for column in GROUPS[table]:
        about = schema.field(column.name).metadata
        assert (about[b"description"].decode(), about[b"units"].decode()) == (column.description, column.units)
    assert ScanSpec.from_json(schema.metadata[b"fasttrain.spec"].decode()) == results.spec
    assert json.loads(schema.metadata[b"fasttrain.attributes"])["device"] == "cpu"


def test_json_lines_are_json_with_every_digit(results, tmp_path):
    export(results, tmp_path / "a.jsonl")
    text = (tmp_path / "a.jsonl").read_text()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    for row, wanted in zip(rows, results.curves.to_dict("records"), strict=True):
        for name, value in wanted.items():
            lost = isinstance(value, float) and not np.isfinite(value)
            assert row[name] == (None if lost else value), name


def test_training_curves_with_their_runs(results, tmp_path):
    whole = results.histories()
    for probe in results.probes["probe"]:
        own = whole[whole["probe"] == probe].drop(columns="probe").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, results.history(probe), check_exact=True)
    some = results.histories([5, 2])
    assert some["probe"].drop_duplicates().tolist() == [5, 2]
    pd.testing.assert_frame_equal(
        some[some["probe"] == 2].drop(columns="probe").reset_index(drop=True), results.history(2), check_exact=True
    )
    assert results.histories([]).columns.tolist() == whole.columns.tolist()
    with pytest.raises(UserError, match="no such probe"):
        results.histories([10**6])
    export(results, tmp_path / "h.csv", "history", selection="width=5")
    read = pd.read_csv(tmp_path / "h.csv")
    assert set(read["probe"]) == set(results.probes.query("width == 5")["probe"])


def test_what_cannot_be_exported_is_named(results, tmp_path):
    for arguments, what in (
        (("a.xls",), "expected a name that ends in .csv, .parquet, .jsonl"),
        (("a.csv", "weights"), "table=weights: no such table; expected one of curves, probes, history, curvature"),
    ):
        with pytest.raises(UserError, match=what):
            export(results, tmp_path / arguments[0], *arguments[1:])
    with pytest.raises(UserError, match="width=9: no variant has it"):
        export(results, tmp_path / "a.csv", selection="width=9")
    assert list(tmp_path.iterdir()) == []
    export(results, tmp_path / "a.csv")
    with pytest.raises(UserError, match="exists"):
        export(results, tmp_path / "a.csv")
    assert export(results, tmp_path / "a.csv", "probes", overwrite=True) == len(results.probes)


@pytest.mark.parametrize("table", [*TABLES, "history"])
def test_xarray_gets_the_same_from_us_and_from_the_file(results, table):
    mine = results.to_xarray(table)
    index = GROUPS[table][0].name
    with xarray.open_dataset(results.path, engine="h5netcdf", group=table) as theirs:
        assert theirs.sizes == mine.sizes == {index: theirs.sizes[index]}
        np.testing.assert_array_equal(theirs[index], mine[index])
        for name, array in mine.items():
            if name == "probe" and table == "history":
                continue  # the file has where each curve starts instead
            np.testing.assert_array_equal(theirs[name].to_numpy(), array.to_numpy())
            assert array.attrs == {"long_name": theirs[name].attrs["description"], "units": theirs[name].attrs["units"]}
    assert mine.attrs["fasttrain_version"] == fasttrain.__version__


def test_xarray_selects_by_value(results):
    data = results.to_xarray("probes")
    wide = data.where(data["width"] == 5, drop=True)
    assert wide.sizes["probe"] == (results.probes["width"] == 5).sum()


def test_the_file_is_netcdf_4(results):
    with netCDF4.Dataset(results.path) as file:
        assert set(file.groups) >= set(GROUPS)
        for group, columns in GROUPS.items():
            held = file.groups[group]
            assert list(held.dimensions) == [columns[0].name]
            for column in columns:
                assert held[column.name].dimensions == (columns[0].name,)
                assert held[column.name].getncattr("units") == column.units
        np.testing.assert_array_equal(np.ma.getdata(file.groups["curves"]["emc50_low"][:]), results.curves["emc50_low"])
        assert list(file.groups["curves"]["arch"][:]) == results.curves["arch"].tolist()


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump (Debian's hdf5-tools) is not installed")
def test_h5dump_prints_it(results):
    done = subprocess.run(
        ["h5dump", "-d", "/curves/params", str(results.path)], capture_output=True, text=True, check=True
    )
    assert f"(0): {results.curves['params'][0]}, {results.curves['params'][1]}" in done.stdout
    assert subprocess.run(["h5dump", str(results.path)], capture_output=True, check=True).stderr == b""


@pytest.mark.skipif(shutil.which("ncdump") is None, reason="ncdump (Debian's netcdf-bin) is not installed")
def test_ncdump_prints_it(results):
    done = subprocess.run(
        ["ncdump", "-v", "curves/params", str(results.path)], capture_output=True, text=True, check=True
    )
    assert f"params = {results.curves['params'][0]}, {results.curves['params'][1]} ;" in done.stdout


def test_whoever_knows_only_arrays_reads_it(results):
    """As MATLAB's h5read and R's rhdf5 do: a path, a whole data set, no dimension scales."""
    with h5py.File(results.path) as file:
        for group, columns in (("curves", CURVES), ("probes", PROBES)):
            for column in columns:
                data = file[f"{group}/{column.name}"]
                values = data.asstr()[()] if column.kind is str else data[()]
                np.testing.assert_array_equal(values, getattr(results, group)[column.name])


def test_show_selects_and_sorts(results, capsys):
    path = str(results.path)
    assert main(["show", path, "--sort", "-params"]) == 0
    widths = [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:5]]
    assert widths == ["5", "2"]
    assert main(["show", path, "--select", "width=2"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()[2:-2]) == 2
    assert main(["show", path, "--json", "--sort", "emc50", "--select", "width=5,2"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["probes"] == len(results.probes)
    assert ScanSpec.from_mapping(found["spec"]) == results.spec
    assert [row["width"] for row in found["curves"]] == [2, 5]
    assert found["curves"][1]["emc50"] is None
    for options, what in (
        ("--select width=7", "--select width=7: no variant has it; there are 2, 5"),
        ("--sort colour", "--sort colour: no such column of /curves"),
        ("--sort emc50 --curvature", "--sort true: goes with the table of EMC50 alone"),
        ("--json --follow", "--follow true: shows the table"),
    ):
        assert main(["show", path, *options.split()]) == 2
        assert what in capsys.readouterr().err


def test_from_the_command_line(results, tmp_path, capsys):
    out = tmp_path / "runs.csv"
    assert main(["export", str(results.path), "--table", "probes", "--select", "width=5", "--out", str(out)]) == 0
    rows = int((results.probes["width"] == 5).sum())
    assert capsys.readouterr().out == f"{out}: {rows} rows of probes\n"
    assert len(pd.read_csv(out)) == rows
    assert main(["export", str(results.path), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_what_fails_half_way_leaves_the_file_of_before(results, tmp_path, monkeypatch):
    def full(temporary, path, contents, new=False):
        raise OSError(28, "No space left on device")

    for name, write in (("a.csv", export), ("a.png", lambda found, out, **how: fasttrain.plot(found, out=out, **how))):
        out = tmp_path / name
        write(results, out)
        before = out.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("fasttrain.store.replace_file", full)
            with pytest.raises(UserError, match=r"cannot be written \(No space left"):
                write(results, out, overwrite=True)
        assert out.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.csv", "a.png"]
