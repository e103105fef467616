"""``fasttrain data``: which data sets there are, what one has, and fetching one ahead of a scan."""

import click


@click.group("data", short_help="List, inspect and fetch data sets.")
def data_commands() -> None:
    """Data sets: which there are, what one has, and fetching one ahead of a scan."""


@data_commands.command("list")
def _list() -> int:
    """List the data sets that have a name, and whether they are here."""
    from fasttrain.data import describe
    from fasttrain.data.sources import KNOWN, cache_folder, here

    rows = [("name", "inputs", "classes", "samples", "test", "here", "what it is")]
    for name, known in KNOWN.items():
        info = describe(name)
        shape = "x".join(map(str, info.shape))
        test = f"{info.test_size:,}" + ("" if info.official else "*")
        rows.append(
            (name, shape, str(info.classes), f"{info.size:,}", test, "yes" if here(name) else "no", known.about)
        )
    rows.append(("gaussian:D", "D", "any", "any", "-", "yes", "standard normal inputs; gaussian:CxHxW for images"))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if 1 < k < 5 else f"{cell:<{width}}"
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())
    click.echo(f"\n* held out of the samples where labels are true. Those fetched are kept in {cache_folder()}.")
    return 0


@data_commands.command("info")
@click.argument("name", metavar="NAME|FILE")
def _info(name: str) -> int:
    """Print what a data set has; a file is read and checked, nothing is fetched."""
    from fasttrain.data import describe, provenance
    from fasttrain.data.sources import KNOWN, folder_of, here
    from fasttrain.spec import ScanSpec

    info = describe(name)
    kind = "channels x height x width" if info.image else "features"
    lines = {
        "name": name,
        "inputs": f"{'x'.join(map(str, info.shape))} ({kind})",
        "classes": "any" if info.size is None else f"{info.classes:,}",
        "samples": "any" if info.size is None else f"{info.size:,}",
    }
    if info.size is not None:
        how = "its own test part" if info.official else "held out of the samples where labels are true"
        lines["test"] = f"{info.test_size:,}, {how}"
    if name in KNOWN and not here(name):
        lines["source"] = (
            f"not here yet: fasttrain data fetch {name}, or put {KNOWN[name].files} into {folder_of(name)}"
        )
    else:
        labels = ("random",) if info.size is None else ("random", "true")
        told = provenance(ScanSpec(data=name, labels=labels))
        lines |= {"source": str(told["data_source"]), "sha256": str(told["data_sha256"]) or "-"}
        lines["preparation"] = str(told["data_preparation"])
    for key, value in lines.items():
        click.echo(f"{key:<12} {_plain(value)}")
    return 0


@data_commands.command("fetch")
@click.argument("name")
def _fetch(name: str) -> int:
    """Fetch a data set that has a name, check it and keep it; if it is here, check it."""
    from fasttrain.data.sources import KNOWN, load
    from fasttrain.errors import UserError

    if name not in KNOWN:
        raise UserError("data", name, f"expected one of {', '.join(KNOWN)}")
    found = load(name, again=True)
    click.echo(f"{name}: {len(found.y):,} samples, from {_plain(found.source)}")
    return 0


def _plain(text: str) -> str:
    """Text that any terminal can show: names of files and columns may hold control characters."""
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return printable.encode(errors="backslashreplace").decode()
