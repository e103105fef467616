"""``fasttrain plot``: figures of one or several files."""

from pathlib import Path

import click

import fasttrain
from fasttrain.cli.tables import plain

_EXAMPLES = """\b
Examples:
  fasttrain plot emc.h5
  fasttrain plot emc.h5 --kind fit --select width=8,16 --out fit.pdf
  fasttrain plot relu.h5 tanh.h5 --kind width --out activations.svg
"""


@click.command("plot", epilog=_EXAMPLES, short_help="Draw EMC curves, fits, training curves.")
@click.argument("files", nargs=-1)
@click.option(
    "--kind",
    default="params",
    show_default=True,
    metavar="|".join(("params", "width", "depth", "fit", "history", "budget", "gap")),
    help="EMC50 against parameters, width, depth or budget; share of runs that fit, or generalisation gap, against n; "
    "training curves.",
)
@click.option(
    "--select", "selection", multiple=True, metavar="NAME=VALUE", help="Variants to take, such as width=8,16."
)
@click.option("--by", metavar="LIST", help="Settings that tell series apart.  [default: all that differ]")
@click.option("--probe", "probes", multiple=True, metavar="ID", help="With --kind history, the runs to draw.")
@click.option("--columns", default="1", show_default=True, metavar="1|2", help="Width, in columns of a paper.")
@click.option("--title", default="", metavar="TEXT", help="Title of the figure.")
@click.option("--out", metavar="FILE", help="A .png, .svg or .pdf file.  [default: named after FILE and KIND]")
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
def plot_command(
    files: tuple[str, ...],
    kind: str,
    selection: tuple[str, ...],
    by: str | None,
    probes: tuple[str, ...],
    columns: str,
    title: str,
    out: str | None,
    overwrite: bool,
) -> int:
    """Draw a figure of one or several files, overlaid: colour-blind safe, and sized for a two-column paper.

    Points with intervals are estimates; open triangles are bounds, of variants whose EMC50 is out of range.
    """
    if not files:
        raise fasttrain.UserError("files", 0, "expected one file or more")
    for probe in (one for text in probes for one in text.split(",")):
        if not probe.isdecimal() or len(probe) > 18:
            raise fasttrain.UserError("probe", probe, "expected the index of a run, 0 or more")
    path = out if out is not None else f"{Path(files[0]).stem}-{kind}.png"
    fasttrain.plot(
        [fasttrain.load(file) for file in files],
        kind,
        selection=selection,
        by=by,
        probes=[int(one) for text in probes for one in text.split(",")],
        columns=int(columns) if columns in ("1", "2") else columns,  # type: ignore[arg-type]
        title=title,
        out=path,
        overwrite=overwrite,
    )
    click.echo(plain(f"{path}: {kind} of {', '.join(files)}"))
    return 0
