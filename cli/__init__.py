"""The command line: it reads options, calls the library and prints. Entry point ``main``."""

import dataclasses
import difflib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

import fasttrain
from fasttrain.cli.analyses import compare_command, fit_command
from fasttrain.cli.datasets import data_commands
from fasttrain.cli.figures import export_command, plot_command, report_command
from fasttrain.cli.options import EXAMPLES, GroupedCommand, extension_options, given_fields, spec_options
from fasttrain.cli.studies import study_commands
from fasttrain.cli.tables import plain

if TYPE_CHECKING:
    from fasttrain.cli.progress import Report

DEFAULT_OUT = "emc.h5"
_ONE_BUDGET = {"steps", "budget"}  # two ways to say one thing: either wins over either in a file
INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells count it."""
TERMINATED = 143
"""Exit status after SIGTERM: 128 + SIGTERM."""
UNFINISHED = 75
"""Exit status of a scan that its time limit ended: EX_TEMPFAIL of sysexits.h, to be tried again."""
_RESUME_EXAMPLES = """\b
Examples:
  fasttrain resume emc.h5
  fasttrain resume emc.h5 --time-limit 11.5h
"""
_EXTEND_EXAMPLES = """\b
Examples:
  fasttrain extend emc.h5 --widths 4,8,16,24,32
  fasttrain extend emc.h5 --tolerance 0.05 --max-probes 400 --out narrow.h5
"""
FOLLOW_SECONDS = 1.0
"""Between two looks of ``show --follow``."""
_TIME_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def main(args: Sequence[str] | None = None) -> int:
    """Run ``fasttrain`` with some arguments, those of the process by default.

    Returns:
        The exit status: 0; 2 for input that cannot be used, after one line on standard error; 1 if the output
        could not be written; 130 after Ctrl-C, 143 after SIGTERM, 75 where the time limit ended a scan.
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


def run() -> int:
    """``main`` as a program. After a signal it leaves at once: all is on the disk, and torch takes a second to end."""
    status = main()
    if status in (INTERRUPTED, TERMINATED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


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


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What whatever trains can be told of its course."""
    limit = "Stop cleanly after so long: 3600s, 90m, 11.5h, 2d."
    keep = "Every so often put the runs under way on the disk too, so that resume goes on with them: for long runs."
    quiet = "Print the final table and errors only, no progress."
    for option in (
        click.option("--quiet", is_flag=True, help=quiet),
        click.option("--checkpoint", metavar="TIME", help=keep),
        click.option("--time-limit", metavar="TIME", help=limit),
    ):
        command = option(command)
    return command


@_commands.command(
    "scan", cls=GroupedCommand, epilog=EXAMPLES, short_help="Train and measure EMC50 of one or many variants."
)
@spec_options
@click.option("--spec", "spec_file", metavar="FILE", help="TOML file that gives any of the options above.")
@click.option("--out", default=DEFAULT_OUT, show_default=True, metavar="FILE", help="HDF5 file to write.")
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
@click.option("--save-weights", is_flag=True, help="Keep the parameters of every fitted run in the file.")
@click.option(
    "--curvature",
    default="0",
    show_default=True,
    metavar="K",
    help="After the search, train the K runs of each variant nearest to EMC50 once more, and keep the gradient norm, "
    "the slope of the loss and the extreme Hessian eigenvalues where they ended. No other number depends on them.",
)
@_run_options
@click.option("--dry-run", is_flag=True, help="Print the variants, memory and cost; train and write nothing.")
@click.pass_context
def _scan(
    context: click.Context,
    spec_file: str | None,
    out: str,
    overwrite: bool,
    save_weights: bool,
    curvature: str,
    time_limit: str | None,
    checkpoint: str | None,
    quiet: bool,
    dry_run: bool,
    **_: Any,
) -> int:
    """Measure EMC50 of every variant: the n at which half of the training runs fit all n samples.

    Lists (4,8,16) make a product of variants. Whole numbers may also be ranges, both ends included: 4:64:4 or
    2^3:2^8. Options given here win over those in the --spec file.
    """
    from fasttrain.spec import read_toml, spec_fields

    given = spec_fields(given_fields(context))
    fields = read_toml(spec_file) if spec_file is not None else {}
    if given.keys() & _ONE_BUDGET:
        fields = {name: value for name, value in fields.items() if name not in _ONE_BUDGET}
    spec = fasttrain.ScanSpec(**{**fields, **given})
    looked_at = _number("curvature", curvature, "expected a whole number of runs, 0 or more")
    seconds, between = _seconds("time_limit", time_limit), _seconds("checkpoint", checkpoint)
    if dry_run:
        from fasttrain.cli.tables import preview_text

        click.echo(plain("\n".join(preview_text(fasttrain.preview(spec)))))
        return 0
    return _running(
        out,
        quiet,
        lambda on_progress: fasttrain.scan(
            spec,
            out=out,
            overwrite=overwrite,
            save_weights=save_weights,
            curvature=looked_at,
            time_limit=seconds,
            checkpoint=between,
            on_progress=on_progress,
        ),
    )


@_commands.command("resume", epilog=_RESUME_EXAMPLES)
@click.argument("file")
@click.option("--spec", "spec_file", metavar="FILE", help="TOML file: an error if the scan was asked for another.")
@_run_options
def _resume(file: str, spec_file: str | None, time_limit: str | None, checkpoint: str | None, quiet: bool) -> int:
    """Go on with a scan that was killed, interrupted or stopped by its time limit.

    It ends with the probes, results and table of a scan that nobody stopped. A complete file is left as it is.
    """
    from fasttrain.spec import read_toml

    spec = fasttrain.ScanSpec(**read_toml(spec_file)) if spec_file is not None else None
    seconds, between = _seconds("time_limit", time_limit), _seconds("checkpoint", checkpoint)
    if fasttrain.load(file).attrs.get("status") == "complete":
        results = fasttrain.resume(file, spec=spec)
        _print_results(results, file)
        click.echo(plain(f"{file} is complete; nothing was changed."))
        return 0
    return _running(
        file,
        quiet,
        lambda on_progress: fasttrain.resume(
            file, spec=spec, time_limit=seconds, checkpoint=between, on_progress=on_progress
        ),
    )


@_commands.command("extend", cls=GroupedCommand, epilog=_EXTEND_EXAMPLES)
@click.argument("file")
@extension_options
@click.option("--out", metavar="FILE", help="Write another file; by default FILE itself is replaced.")
@click.option("--overwrite", is_flag=True, help="Replace the other file if it exists.")
@_run_options
@click.pass_context
def _extend(
    context: click.Context,
    file: str,
    out: str | None,
    overwrite: bool,
    time_limit: str | None,
    checkpoint: str | None,
    quiet: bool,
    **_: Any,
) -> int:
    """Ask more of a scan: further variants, seeds or samples, or narrower intervals.

    Every run of the file is used. Lists name the values of before and more; of the numbers, the tolerance and n-min
    fall, and the others rise.
    """
    from fasttrain.spec import spec_fields

    changes = spec_fields(given_fields(context))
    seconds, between = _seconds("time_limit", time_limit), _seconds("checkpoint", checkpoint)
    return _running(
        file if out is None else out,
        quiet,
        lambda on_progress: fasttrain.extend(
            file, changes, out=out, overwrite=overwrite, time_limit=seconds, checkpoint=between, on_progress=on_progress
        ),
    )


@_commands.command("show")
@click.argument("file")
@click.option("--all", "losers", is_flag=True, help="Also the learning rates that were dropped or lost.")
@click.option(
    "--estimator",
    metavar="emc50|paper|nakkiran",
    help="EMC computed anew from the runs: the n that half of them fit; the largest n before the first failure (needs "
    "--search paper); the largest n with an expected train error of at most --eps.",
)
@click.option("--eps", metavar="SHARE", help="Expected train error of --estimator nakkiran.  [default: 0.1]")
@click.option(
    "--budget",
    metavar="NUMBER+UNIT",
    help="EMC50 at a smaller budget than the scan's, from its runs: 3000steps, 100epochs, 1e5samples.",
)
@click.option("--curvature", is_flag=True, help="The runs that scan --curvature looked at, instead.")
@click.option("--select", "selection", multiple=True, metavar="NAME=VALUE", help="Of which variants: width=8,16.")
@click.option("--sort", metavar="COLUMN", help="By a column of /curves, such as emc50; -emc50 for the largest first.")
@click.option("--json", "as_json", is_flag=True, help="Print spec, conditions and variants as JSON, for scripts.")
@click.option("--follow", is_flag=True, help="Print it again as a scan adds to the file, until that scan has ended.")
def _show(
    file: str,
    losers: bool,
    estimator: str | None,
    eps: str | None,
    budget: str | None,
    curvature: bool,
    selection: tuple[str, ...],
    sort: str | None,
    as_json: bool,
    follow: bool,
) -> int:
    """Print the table of a finished, interrupted or killed scan again.

    Of the learning rates that raced, it has the winner's line.
    """
    if eps is not None and estimator is None:
        raise fasttrain.UserError("eps", eps, "goes with --estimator nakkiran")
    if budget is not None:
        estimator = estimator or "emc50"
    if curvature and estimator is not None:
        raise fasttrain.UserError("curvature", "true", "shows another table than --estimator; give one of the two")
    chosen = bool(selection or sort or as_json)
    if chosen and (estimator is not None or curvature):
        raise fasttrain.UserError(
            "select" if selection else "sort" if sort else "json", "true", "goes with the table of EMC50 alone"
        )
    if follow:
        if estimator is not None or curvature or chosen:
            raise fasttrain.UserError("follow", "true", "shows the table of estimates; give no other one with it")
        return _follow(file, losers)
    results = fasttrain.load(file)
    if chosen:
        from fasttrain.cli.tables import results_text

        curves = fasttrain.variants(results, selection, sort or "")
        if as_json:
            click.echo(json.dumps(results.to_dict(curves), indent=2))
        else:
            click.echo(plain("\n".join(results_text(results, file, losers, curves))))
        return 0
    if curvature:
        from fasttrain.cli.tables import curvature_text

        click.echo(plain("\n".join(curvature_text(results))))
    elif estimator is not None:
        from fasttrain.cli.tables import estimates_text

        share = None if eps is None else _share("eps", eps)
        found = fasttrain.estimates(results, estimator, eps=share, budget=budget)
        click.echo(plain("\n".join(estimates_text(results, found, file, losers))))
    else:
        _print_results(results, file, losers)
    return 0


def _follow(file: str, losers: bool) -> int:
    """The table, again and again; where there is no terminal only the runs that are kept, and the table at the end."""
    from fasttrain.cli.tables import count, results_text

    shown = -1
    while True:
        results = fasttrain.load(file)
        if not results.written:
            break
        if len(results.probes) != shown:
            shown = len(results.probes)
            if sys.stdout.isatty():
                click.clear()
                click.echo(plain("\n".join(results_text(results, file, losers))))
            else:
                click.echo(plain(f"{file}: {count(shown, 'run')} kept"))
        time.sleep(FOLLOW_SECONDS)
    if sys.stdout.isatty():
        click.clear()
    _print_results(results, file, losers)
    if results.attrs.get("status") != "complete":
        click.echo(plain(f"No scan writes it any more: fasttrain resume {file} goes on."), err=True)
    return 0


@_commands.command("merge")
@click.argument("files", nargs=-1)
@click.option("--out", required=True, metavar="FILE", help="HDF5 file to write.")
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
def _merge(files: tuple[str, ...], out: str, overwrite: bool) -> int:
    """Join the files of scans of one specification that were stopped, or ran on several machines of a kind.

    fasttrain resume goes on with the file where runs are missing.
    """
    results = fasttrain.merge(files, out, overwrite=overwrite)
    _print_results(results, out)
    if results.attrs.get("status") != "complete":
        click.echo(plain(f"Runs are missing: fasttrain resume {out} goes on."), err=True)
    return 0


_commands.add_command(compare_command)
_commands.add_command(fit_command)
_commands.add_command(plot_command)
_commands.add_command(export_command)
_commands.add_command(report_command)
_commands.add_command(data_commands)
_commands.add_command(study_commands)


@_commands.command("doctor", short_help="See whether all works on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON, for scripts.")
def _doctor(as_json: bool) -> int:
    """Versions, devices, what is available, and a self-test of about half a minute.

    Paste what it prints into a report of a bug. The exit status is 1 if something that should work does not.
    """

    def show(check: "fasttrain.doctor.Check") -> None:
        if not as_json:
            click.echo(plain(f"{check.status:8}{check.name}: {check.detail}"))

    checks = fasttrain.diagnose(show)
    failed = [check.name for check in checks if check.status == "failed"]
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    elif failed:
        click.echo(plain(f"Not all is well: {', '.join(failed)}."))
    else:
        click.echo("All is well: scans can be run here.")
    return 1 if failed else 0


_SHELLS = ("bash", "zsh", "fish")


@_commands.command("completion", short_help="Print a script that completes commands and options.")
@click.argument("shell")
def _completion(shell: str) -> int:
    """Print what completes commands, options and file names in SHELL: bash, zsh or fish.

    \b
    bash: fasttrain completion bash > ~/.local/share/bash-completion/completions/fasttrain
    zsh:  fasttrain completion zsh > a file named _fasttrain in a folder of $fpath
    fish: fasttrain completion fish > ~/.config/fish/completions/fasttrain.fish
    """
    if shell not in _SHELLS:
        raise fasttrain.UserError("shell", shell, f"expected one of {', '.join(_SHELLS)}")
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(_commands, {}, "fasttrain", "_FASTTRAIN_COMPLETE").source())
    return 0


@_commands.command("rerun")
@click.argument("file")
@click.option("--probe", required=True, metavar="ID", help="Index of the run, the column probe of /probes.")
@click.option("--curvature", is_flag=True, help="Also gradient norm and extreme Hessian eigenvalues where it ended.")
def _rerun(file: str, probe: str, curvature: bool) -> int:
    """Train one run of a file again and show its training curve.

    On the same hardware with the same versions it gives the same numbers, and says whether it did.
    """
    from fasttrain.cli.tables import rerun_text

    index = _number("probe", probe, "expected the index of a run, 0 or more")
    results = fasttrain.load(file)
    again = fasttrain.rerun(results, index, curvature=curvature)
    click.echo(plain("\n".join(rerun_text(again, results, index))))
    return 0


def _number(option: str, text: str, expected: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise fasttrain.UserError(option, text, expected)
    return int(text)


def _seconds(option: str, text: str | None) -> float | None:
    """A time such as 90m."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _TIME_UNITS else (text, "s")
    try:
        seconds = float(number) * _TIME_UNITS[unit]
    except ValueError:
        seconds = float("nan")
    if not 0.0 < seconds < 1e9:
        raise fasttrain.UserError(option, text, "expected a time above 0, such as 3600s, 90m, 11.5h or 2d")
    return seconds


def _running(out: str, quiet: bool, begin: "Callable[[Report | None], fasttrain.Results]") -> int:
    """Starts a scan or goes on with one, shows how it gets on, and says what it came to."""
    from fasttrain.cli.progress import reporter

    before = _identity(out)
    try:
        with reporter(quiet) as on_progress:
            results = begin(on_progress)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, fasttrain.Terminated)
        click.echo(plain(_kept(out, before, "Terminated" if terminated else "Interrupted")), err=True)
        return TERMINATED if terminated else INTERRUPTED
    except OSError as error:
        # A full disk is no bug to trace. What was committed before it is in the file.
        what = " ".join(str(error.strerror or error).split())
        kept = "" if _identity(out) in (None, before) else f"; the runs finished before are in {out}"
        _complain(f"the scan to {out} stopped: {what}{kept}")
        return 1
    _print_results(results, out)
    if results.attrs.get("status") == "complete":
        return 0
    click.echo(plain(f"The time limit came first: fasttrain resume {out} goes on."), err=True)
    return UNFINISHED


def _print_results(results: "fasttrain.Results", path: str, losers: bool = False) -> None:
    from fasttrain.cli.tables import results_text

    click.echo(plain("\n".join(results_text(results, path, losers))))


def _share(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise fasttrain.UserError(option, text, "expected a number between 0 and 1") from None


def _kept(out: str, before: tuple[int, ...] | None, how: str) -> str:
    """What a scan that a signal stopped has left behind."""
    now = _identity(out)
    if now is None:
        return f"{how}: nothing was written."
    if now == before:
        return f"{how}: nothing was written; {out} is as it was."
    try:
        results = fasttrain.load(out)
    except fasttrain.UserError as error:
        return f"{how}: {out} cannot be read: {error.expected}"
    from fasttrain.cli.tables import count

    runs, variants = len(results.probes), int(results.probes["variant"].nunique())
    kept = f"{count(runs, 'finished run')} of {count(variants, 'variant')}"
    verb = "is" if runs == 1 else "are"
    return f"{how}: {kept} {verb} kept in {out} (fasttrain show {out}); fasttrain resume {out} goes on."


def _identity(path: str) -> tuple[int, ...] | None:
    """What changes when a file is written or replaced; ``None`` if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _user_line(error: "fasttrain.UserError") -> str:
    shown = error.value if str(error.value).strip() else repr(error.value)
    if "expected" in error.expected:
        # A name that was mistyped is close to one that is accepted.
        accepted = re.findall(r"[a-z][\w-]+", error.expected.partition("expected")[2])
        near = difflib.get_close_matches(str(shown).rpartition(",")[2], accepted, 1, 0.7)
        if near and near[0] != shown:
            error = fasttrain.UserError(error.option, error.value, f"{error.expected} (did you mean {near[0]}?)")
    if error.option == "file":
        return f"FILE {shown}: {error.expected}"
    return fasttrain.UserError(error.option, shown, error.expected).as_option()


def _complain(message: str) -> None:
    click.echo(plain(f"fasttrain: {' '.join(message.split())}"), err=True)


__all__ = ["main", "run"]
