"""The command line: it reads options, calls the library and prints. Entry point ``main``."""

import os
from collections.abc import Sequence
from typing import Any

import click

import fasttrain
from fasttrain.cli.datasets import data_commands
from fasttrain.cli.options import EXAMPLES, GroupedCommand, given_fields, spec_options

DEFAULT_OUT = "emc.h5"
INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells count it."""


def main(args: Sequence[str] | None = None) -> int:
    """Run ``fasttrain`` with some arguments, those of the process by default.

    Returns:
        The exit status: 0; 2 for input that cannot be used, after one line on standard error; 1 if the output
        could not be written; 130 after Ctrl-C.
    """
    try:
        status = _commands.main(args=args, prog_name="fasttrain", standalone_mode=False)
    except fasttrain.UserError as error:
        _complain(_user_line(error))
        return 2
    except click.Abort:
        _complain("interrupted")
        return INTERRUPTED
    except click.ClickException as error:
        _complain(error.format_message())
        return error.exit_code
    return status if isinstance(status, int) else 0


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXAMPLES,
)
@click.version_option(fasttrain.__version__, message="%(prog)s %(version)s")
@click.pass_context
def _commands(context: click.Context) -> None:
    """Measure EMC: the largest number of samples that a small network and its training fit to 100 %.

    Many networks train at once; every training run is kept in an HDF5 file.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@_commands.command(
    "scan", cls=GroupedCommand, epilog=EXAMPLES, short_help="Train and measure EMC50 of one or many variants."
)
@spec_options
@click.option("--spec", "spec_file", metavar="FILE", help="TOML file that gives any of the options above.")
@click.option("--out", default=DEFAULT_OUT, show_default=True, metavar="FILE", help="HDF5 file to write.")
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
@click.option("--save-weights", is_flag=True, help="Keep the parameters of every fitted run in the file.")
@click.option("--quiet", is_flag=True, help="Print the final table and errors only, no progress.")
@click.option("--dry-run", is_flag=True, help="Print the variants, memory and cost; train and write nothing.")
@click.pass_context
def _scan(
    context: click.Context,
    spec_file: str | None,
    out: str,
    overwrite: bool,
    save_weights: bool,
    quiet: bool,
    dry_run: bool,
    **_: Any,
) -> int:
    """Measure EMC50 of every variant: the n at which half of the training runs fit all n samples.

    Lists (4,8,16) make a product of variants. Whole numbers may also be ranges, both ends included: 4:64:4 or
    2^3:2^8. Options given here win over those in the --spec file.
    """
    if spec_file is not None:
        from fasttrain.spec import read_toml

        fields = read_toml(spec_file)
    else:
        fields = {}
    spec = fasttrain.ScanSpec(**{**fields, **given_fields(context)})
    if dry_run:
        from fasttrain.cli.tables import preview_text

        click.echo(_plain("\n".join(preview_text(fasttrain.preview(spec)))))
        return 0
    return _measure(spec, out, overwrite, quiet, save_weights)


@_commands.command("show")
@click.argument("file")
@click.option("--all", "losers", is_flag=True, help="Also the learning rates that were dropped or lost.")
def _show(file: str, losers: bool) -> int:
    """Print the table of a finished, interrupted or killed scan again.

    Of the learning rates that raced, it has the winner's line.
    """
    _print_results(fasttrain.load(file), file, losers)
    return 0


_commands.add_command(data_commands)


@_commands.command("rerun")
@click.argument("file")
@click.option("--probe", required=True, metavar="ID", help="Index of the run, the column probe of /probes.")
def _rerun(file: str, probe: str) -> int:
    """Train one run of a file again and show its training curve.

    On the same hardware with the same versions it gives the same numbers, and says whether it did.
    """
    from fasttrain.cli.tables import rerun_text

    if not probe.isdecimal() or len(probe) > 18:
        raise fasttrain.UserError("probe", probe, "expected the index of a run, 0 or more")
    results = fasttrain.load(file)
    again = fasttrain.rerun(results, int(probe))
    click.echo(_plain("\n".join(rerun_text(again, results, int(probe)))))
    return 0


def _measure(spec: "fasttrain.ScanSpec", out: str, overwrite: bool, quiet: bool, save_weights: bool) -> int:
    from fasttrain.cli.progress import reporter

    before = _identity(out)
    try:
        with reporter(quiet) as on_progress:
            results = fasttrain.scan(
                spec, out=out, overwrite=overwrite, save_weights=save_weights, on_progress=on_progress
            )
    except KeyboardInterrupt:
        click.echo(_plain(_kept(out, before)), err=True)
        return INTERRUPTED
    except OSError as error:
        # A full disk is no bug to trace. What was committed before it is in the file.
        what = " ".join(str(error.strerror or error).split())
        kept = "" if _identity(out) in (None, before) else f"; the runs finished before are in {out}"
        _complain(f"the scan to {out} stopped: {what}{kept}")
        return 1
    _print_results(results, out)
    return 0


def _print_results(results: "fasttrain.Results", path: str, losers: bool = False) -> None:
    from fasttrain.cli.tables import results_text

    click.echo(_plain("\n".join(results_text(results, path, losers))))


def _kept(out: str, before: tuple[int, ...] | None) -> str:
    """What a scan that Ctrl-C stopped has left behind."""
    now = _identity(out)
    if now is None:
        return "Interrupted: nothing was written."
    if now == before:
        return f"Interrupted: nothing was written; {out} is as it was."
    try:
        results = fasttrain.load(out)
    except fasttrain.UserError as error:
        return f"Interrupted: {out} cannot be read: {error.expected}"
    from fasttrain.cli.tables import count

    runs, variants = len(results.probes), int(results.probes["variant"].nunique())
    kept = f"{count(runs, 'finished run')} of {count(variants, 'variant')}"
    return f"Interrupted: {kept} {'is' if runs == 1 else 'are'} kept in {out} (fasttrain show {out})."


def _identity(path: str) -> tuple[int, ...] | None:
    """What changes when a file is written or replaced; ``None`` if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _user_line(error: "fasttrain.UserError") -> str:
    shown = error.value if str(error.value).strip() else repr(error.value)
    if error.option == "file":
        return f"FILE {shown}: {error.expected}"
    return fasttrain.UserError(error.option, shown, error.expected).as_option()


def _complain(message: str) -> None:
    click.echo(_plain(f"fasttrain: {' '.join(message.split())}"), err=True)


def _plain(text: str) -> str:
    """Text that any terminal can show: file names may hold control characters and bytes that are no UTF-8."""
    printable = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return printable.encode(errors="backslashreplace").decode()


__all__ = ["main"]
