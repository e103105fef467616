"""How a scan gets on: a table that redraws itself on a terminal, lines of a log anywhere else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

import click

from fasttrain.cli.tables import (
    count,
    number_text,
    seconds_text,
)
from fasttrain.wording import emc_text, headings, setting_text, varying_settings

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fasttrain import Progress

LOG_SECONDS = 5.0
"""Shortest time between two lines of the log that report nothing but progress."""

_STATES = ("running", "done", "waiting")
"""Of a variant, in the order in which they are worth a line."""

Report = Callable[["Progress"], None]


@contextmanager
def reporter(quiet: bool, stream: TextIO | None = None) -> Iterator[Report | None]:
    """What ``fasttrain.scan`` is to call with its progress; ``None`` if nothing is to be shown.

    Args:
        quiet: whether to show nothing.
        stream: where to; standard error by default.
    """
    stream = sys.stderr if stream is None else stream
    if quiet:
        yield None
    elif stream.isatty():
        with _live(stream) as report:
            yield report
    else:
        yield Log(stream).report


class Log:
    """Progress as lines: one for each variant that is done, and one on the whole every few seconds.

    Args:
        stream: where ``report`` writes them.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._reported: set[int] = set()
        self._next = 0.0

    def report(self, progress: "Progress") -> None:
        """Write the lines that a snapshot adds to the log."""
        for line in self.lines(progress):
            click.echo(line, file=self._stream)

    def lines(self, progress: "Progress") -> list[str]:
        """The lines that a snapshot adds to the log."""
        clock = f"[{seconds_text(progress.elapsed)}]"
        settings = varying_settings([asdict(variant) for variant in progress.variants])
        lines = []
        for index, estimate in enumerate(progress.estimates):
            if estimate.finished and index not in self._reported:
                self._reported.add(index)
                row = asdict(progress.variants[index])
                names = [
                    f"{heading} {setting_text(row, name)}"
                    for heading, name in zip(headings(settings), settings, strict=True)
                    if setting_text(row, name) != "-"
                ]
                lines.append(
                    f"{clock} {', '.join(names)}: EMC50 {_emc(estimate)}, "
                    f"{count(estimate.n_probes, 'run')}{_reason(estimate)}"
                )
        if progress.elapsed >= self._next or progress.finished:
            self._next = progress.elapsed + LOG_SECONDS
            lines.append(f"{clock} {'; '.join(summary(progress)[1:])}")
        return lines


def summary(progress: "Progress") -> list[str]:
    """The state of the whole scan: the clock, what is done, how fast it goes."""
    left = progress.seconds_left
    remaining = "" if progress.finished or left is None else f", about {seconds_text(left)} left"
    return [
        f"{seconds_text(progress.elapsed)} elapsed",
        f"{progress.variants_done}/{count(len(progress.variants), 'variant')} done, "
        f"{count(progress.probes_done, 'run')} done, {progress.probes_committed} kept, "
        f"{progress.probes_running} running{remaining}"
        + (f", curvature of {progress.measured}/{count(progress.to_measure, 'run')}" if progress.to_measure else ""),
        f"{number_text(progress.steps_per_second)} model-steps/s, "
        f"{progress.slots_used}/{count(progress.slots, 'slot')} in use, "
        f"occupancy {100 * progress.occupancy:.0f}%",
    ]


def render(progress: "Progress", height: int) -> "RenderableType":
    """A snapshot as a table of variants and two lines below it, in at most ``height`` lines.

    Where the variants do not all fit, those under way come first, then those that are done.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = [asdict(variant) for variant in progress.variants]
    settings = varying_settings(rows)
    states = [_state(estimate) for estimate in progress.estimates]
    shown, hidden = visible(states, height - 4)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in (*headings(settings), "params", "EMC50", "runs", "state"):
        left = heading in ("EMC50", "state", "activation", "optimizer", "labels", "arch")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True, header_style="bold")
    for index in shown:
        estimate = progress.estimates[index]
        table.add_row(
            *(setting_text(rows[index], name) for name in settings),
            str(progress.params[index]),
            _emc(estimate),
            str(estimate.n_probes),
            states[index] + _reason(estimate),
            style="dim" if states[index] == "waiting" else "",
        )
    elapsed, done, speed = summary(progress)
    below = [more_text(hidden, states)] if hidden else []
    below += [f"{done}", f"{speed}, {elapsed}"]
    lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in below]
    return Group(*([table] if shown else []), *lines)


def visible(states: list[str], room: int) -> tuple[list[int], list[int]]:
    """The variants to show in so many lines, and those that are left out, as indices.

    Args:
        states: of every variant: ``running``, ``done`` or ``waiting``.
        room: lines; the one that says how many are left out does not count.
    """
    everything = list(range(len(states)))
    if len(states) <= room:
        return everything, []
    ranked = sorted(everything, key=lambda index: _STATES.index(states[index]))
    return ranked[: max(room, 0)], ranked[max(room, 0) :]


def more_text(hidden: list[int], states: list[str]) -> str:
    """What the variants that are left out do: ``... and 180 more (12 done, 168 waiting)``."""
    numbers = {name: sum(states[index] == name for index in hidden) for name in _STATES}
    parts = ", ".join(f"{number} {name}" for name, number in numbers.items() if number)
    return f"... and {len(hidden)} more ({parts})"


@contextmanager
def _live(stream: TextIO) -> Iterator[Report]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    if console.is_dumb_terminal:
        yield Log(stream).report
        return
    # The scan reports from this thread, so nothing needs redrawing in between. A transient display leaves the
    # final table, or an error, alone on the screen.
    with Live(Text("Starting"), console=console, auto_refresh=False, transient=True) as live:
        yield lambda progress: live.update(render(progress, console.size.height), refresh=True)


def _state(estimate: Any) -> str:
    if estimate.finished:
        return "done"
    return "running" if estimate.n_probes or estimate.race == "won" else "waiting"


def _reason(estimate: Any) -> str:
    """Why a variant ended without the tolerance met, if so, and where its learning rate stands in its race."""
    race = str(estimate.race)
    if not estimate.finished:
        return ", lr won, confirming" if race == "won" else ""
    words = {"above": ", above n-max", "below": ", below n-min"}
    ended = words.get(str(estimate.censored), "") + (", runs used up" if estimate.budget_spent else "")
    return ended + (f", lr {race}" if race else "")


def _emc(estimate: Any) -> str:
    value, bounds = emc_text(estimate.emc50, estimate.emc50_low, estimate.emc50_high, str(estimate.censored))
    return f"{value} {bounds}".rstrip()
