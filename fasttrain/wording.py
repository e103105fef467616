"""Variants and what was found of them in words and short numbers, for tables and reports."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fasttrain.spec import FULL_BATCH

if TYPE_CHECKING:
    import pandas

Row = Mapping[str, Any]

SETTINGS = {
    "arch": "arch",
    "width": "width",
    "depth": "depth",
    "activation": "activation",
    "norm": "norm",
    "heads": "heads",
    "patch": "patch",
    "init_scale": "init scale",
    "optimizer": "optimizer",
    "lr": "lr",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "weight_decay": "decay",
    "schedule": "schedule",
    "warmup": "warm-up",
    "clip": "clip",
    "label_smoothing": "smoothing",
    "batch_size": "batch",
    "inputs": "inputs",
    "labels": "labels",
    "classes": "classes",
}
_DEFAULTS = {
    "norm": "none",
    "heads": 0,
    "patch": 0,
    "init_scale": 1.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup": 0,
    "clip": 0.0,
    "label_smoothing": 0.0,
    "inputs": "real",
}
"""Settings that say nothing at these values: they are not mentioned where all variants have them."""
_DERIVED = ("heads", "momentum")
"""Settings that follow from others, and are not mentioned where they differ."""
BEYOND = {"above": "above n-max", "below": "below n-min"}
LOSERS = ("dropped", "lost")


def varying_settings(rows: Sequence[Row]) -> list[str]:
    """The settings that a table must show: width and depth, and what differs between the variants."""
    return [
        name
        for name in SETTINGS
        if name in ("width", "depth") or (name not in _DERIVED and len(_distinct(rows, name)) > 1)
    ]


def shared_settings(rows: Sequence[Row]) -> list[str]:
    """The settings that all variants share, in words."""
    words = {"lr": "lr {}", "batch_size": "batch {}", "labels": "{} labels", "classes": "{} classes"}
    words |= {"inputs": "{} inputs", "nesterov": "Nesterov", "norm": "{} norm"}
    words |= {name: f"{SETTINGS[name]} {{}}" for name in _DEFAULTS if name not in words}
    shown = [name for name in SETTINGS if name not in ("width", "depth", *_DERIVED)]
    return [
        words.get(name, "{}").format(setting_text(rows_of[0], name))
        for name in shown
        if len(rows_of := _distinct(rows, name)) == 1
        and not (name in _DEFAULTS and rows_of[0][name] == _DEFAULTS[name])
    ]


def setting_text(row: Row, name: str) -> str:
    """One setting of a variant, as it would be typed; ``-`` where it means nothing."""
    value = row[name]
    if meaningless(row, name):
        return "-"
    if name == "batch_size" and value == FULL_BATCH:
        return "full"
    return f"{value:g}" if isinstance(value, float) else str(value)


def emc_text(emc50: float, low: float, high: float, censored: str) -> tuple[str, str]:
    """EMC50 and its interval: ``662`` and ``[641, 683]``; ``> 1797`` without one if it was out of reach."""
    if censored == "above":
        return f"> {low:.0f}", ""
    if censored == "below":
        return f"< {high:.0f}", ""
    if math.isnan(emc50):
        return "-", ""
    if math.isnan(low) or math.isnan(high):
        return digits(emc50, emc50), ""
    upper = "inf)" if math.isinf(high) else f"{digits(high, emc50)}]"
    return digits(emc50, emc50), f"[{digits(low, emc50)}, {upper}"


def headings(settings: Sequence[str]) -> list[str]:
    """The settings as column headings."""
    return [SETTINGS.get(name, name) for name in settings]


def _per_param(row: Row) -> str:
    params = row["params"]
    if not params:
        return "-"
    sign, value = {
        "above": ("> ", row["emc50_low"]),
        "below": ("< ", row["emc50_high"]),
    }.get(row["censored"], ("", row["emc50"]))
    return f"{sign}{value / params:#.3g}" if math.isfinite(value) else "-"


def _elasticity(row: Row) -> str:
    """Of EMC50 in the budget, with its interval."""
    if not math.isfinite(row["elasticity"]):
        return "-"
    return f"{row['elasticity']:.2f} [{row['elasticity_low']:.2f}, {row['elasticity_high']:.2f}]"


def _but_lr(row: Row) -> tuple[Any, ...]:
    """What the rows of one race share."""
    return tuple(row[name] for name in SETTINGS if name != "lr")


def _notes(row: Row, rates: Sequence[str], beyond: Mapping[str, str]) -> list[str]:
    """What is to be said of a row; ``rates`` are the learning rates of its race."""
    notes = [beyond[row["censored"]]] if row["censored"] in beyond else []
    if row["budget_spent"]:
        notes.append("runs used up")
    if row.get("budget_limited"):
        notes.append("budget-limited")
    if row.get("misfit"):
        notes.append("misfit")
    if not row["finished"]:
        notes.append("unfinished")
    if race := row.get("race"):
        words = {"running": "lr in a race of {}", "dropped": "lr dropped", "lost": "lr lost", "won": "lr won of {}"}
        notes.append(words[race].format(",".join(rates)))
    return notes


def digits(number: float, scale: float) -> str:
    """A number with the decimals that suit one of size ``scale``: three digits, no decimals from 100."""
    return f"{number:.{0 if scale >= 99.95 else 1 if scale >= 9.995 else 2}f}"


def meaningless(row: Row, name: str) -> bool:
    """Whether a setting says nothing of a variant: the width of a linear classifier."""
    return name in ("width", "activation") and row["depth"] == 0


def _distinct(rows: Sequence[Row], name: str) -> list[Row]:
    """One row for each value of a setting, where it means something."""
    return list({row[name]: row for row in rows if not meaningless(row, name)}.values())


def curve_cells(
    frame: "pandas.DataFrame", losers: bool = False, title: str = "EMC50", beyond: Mapping[str, str] = BEYOND
) -> tuple[list[str], list[list[str]], dict[str, str]]:
    """Names of columns, a row of text a variant, and titles of columns; settings that all variants share are left out.

    Args:
        frame: ``Results.curves``.
        losers: whether there is a line for the learning rates that were dropped from a race or lost it.
        title: heading of ``emc50``.
        beyond: what is to be said of a censored row.
    """
    rows: list[dict[str, Any]] = frame.to_dict("records")
    settings = varying_settings(rows)
    contents = {row["interval"] for row in rows if "interval" in row}
    interval = f"{100 * contents.pop():g}% interval" if len(contents) == 1 else "interval"
    shown = [row for row in rows if losers or row.get("race") not in LOSERS]
    rises = title == "EMC50" and any(math.isfinite(row.get("elasticity", math.nan)) for row in shown)
    columns = [
        *settings,
        "params",
        "EMC50",
        "interval",
        "EMC/param",
        *(["elasticity"] if rises else []),
        "runs",
        "notes",
    ]
    cells = []
    rates: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        rates.setdefault(_but_lr(row), []).append(setting_text(row, "lr"))
    for row in shown:
        value, bounds = emc_text(row["emc50"], row["emc50_low"], row["emc50_high"], row["censored"])
        cells.append(
            [
                *(setting_text(row, name) for name in settings),
                str(row["params"]),
                value,
                bounds,
                _per_param(row),
                *([_elasticity(row)] if rises else []),
                str(row["n_probes"]),
                ", ".join(_notes(row, rates[_but_lr(row)], beyond)),
            ]
        )
    return columns, cells, {"interval": interval, "EMC50": title}
