"""``fasttrain study findings``: the claims of the paper, measured and decided on."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

import fasttrain
from fasttrain.cli.tables import aligned, count, plain

if TYPE_CHECKING:
    from fasttrain import Progress, ScanSpec, Verdict


@click.group("study", short_help="Pre-registered comparisons that answer a question.")
def study_commands() -> None:
    """Comparisons whose hypotheses, designs and rules are fixed before anything is measured."""


@study_commands.command(
    "findings",
    epilog="""\b
Examples:
  fasttrain study findings --out findings
  fasttrain study findings --scale 5 --out findings-5
""",
)
@click.option("--out", default="findings", show_default=True, metavar="FOLDER", help="For the files of the scans.")
@click.option(
    "--scale",
    default="1",
    show_default=True,
    metavar="NUMBER",
    help="Of the effort: steps a run grow with it, the tolerance falls with its square root.",
)
@click.option("--seed", default="0", show_default=True, metavar="N", help="Base of all randomness.")
@click.option("--quiet", is_flag=True, help="Print the findings and errors only, no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON, for scripts.")
def findings_command(out: str, scale: str, seed: str, quiet: bool, as_json: bool) -> int:
    """Test the five claims of Shwartz-Ziv et al. 2024 (arXiv 2406.11463) at a small scale.

    For each: the hypothesis, the design and its rule, the estimates with intervals, and a verdict: supported, not
    supported or undecided, at this scale. Scans that the folder holds already are not made again, so that a study that
    was stopped goes on.
    """
    from fasttrain.cli.progress import reporter

    try:
        effort = float(scale)
    except ValueError:
        raise fasttrain.UserError("scale", scale, "expected a number above 0, such as 1") from None
    if not seed.isdecimal() or len(seed) > 18:
        raise fasttrain.UserError("seed", seed, "expected a whole number of at least 0")
    with ExitStack() as stack:
        showing: list[ExitStack] = []

        def on_scan(name: str, _spec: "ScanSpec") -> "Callable[[Progress], None] | None":
            for before in showing:
                before.close()
            showing[:] = [stack.enter_context(ExitStack())]
            if not quiet:
                click.echo(f"scan {name}", err=True)
            return showing[0].enter_context(reporter(quiet))

        try:
            verdicts = fasttrain.study(out, scale=effort, seed=int(seed), on_scan=on_scan)
        except OSError as error:
            raise click.ClickException(f"the study in {out} stopped: {error.strerror or error}") from None
    if as_json:
        click.echo(json.dumps([verdict.to_dict() for verdict in verdicts], indent=1))
    else:
        click.echo(plain("\n".join(findings_text(verdicts))))
        click.echo(
            plain(f"\n{out}/findings.json and the files of the scans: fasttrain show {out}/labels.h5, and so on.")
        )
    return 0


def findings_text(verdicts: "Sequence[Verdict]") -> list[str]:
    """The claims, one after the other: hypothesis, design, table and verdict."""
    lines: list[str] = []
    for one in verdicts:
        cells: list[Sequence[Any]] = [
            [found.what, *_numbers(found.estimate, found.low, found.high), _p(found.p), found.verdict]
            for found in one.findings
        ]
        tests = dict.fromkeys(found.test for found in one.findings if found.test)
        lines += [
            f"{one.claim}: {one.verdict.upper()}",
            f"  Hypothesis: {one.hypothesis}",
            f"  Design: {one.design}",
            f"  {count(one.runs, 'training run')}{''.join(f'; {test}' for test in tests)}",
            "",
            *(f"  {line}" for line in aligned(["estimate of", "value", "95% interval", "p", "finding"], cells, {})),
            *(f"  Note: {note}" for note in one.notes),
            "",
        ]
    return lines[:-1]


def _numbers(value: float, low: float, high: float) -> tuple[str, str]:
    shown = f"{value:.3g}" if math.isfinite(value) else "-"
    return shown, f"[{low:.3g}, {high:.3g}]" if math.isfinite(high) else f"[{low:.3g}, inf)"


def _p(p: float) -> str:
    if not math.isfinite(p):
        return "-"
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"
