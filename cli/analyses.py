"""``fasttrain compare`` and ``fasttrain fit``: what is said of results that are there."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

import fasttrain
from fasttrain.cli.tables import aligned, count, plain
from fasttrain.wording import digits, emc_text, headings, setting_text, varying_settings

if TYPE_CHECKING:
    from fasttrain import Comparison, Scaling

Row = Mapping[str, Any]

_INTERVAL = click.option(
    "--interval", metavar="P", help="Probability content of the intervals.  [default: that of the file]"
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, for scripts.")


@click.command(
    "compare",
    short_help="Compare measured variants in pairs: ratios, tests, effect sizes.",
    epilog="""\b
Examples:
  fasttrain compare emc.h5 --a optimizer=sgd --b optimizer=adam
  fasttrain compare mlp.h5 cnn.h5 --match params --per-param
  fasttrain compare emc.h5 --a labels=random --b labels=true --against test_accuracy
  fasttrain compare before.h5 after.h5 --match settings --json
""",
)
@click.argument("a", metavar="A.h5")
@click.argument("b", metavar="[B.h5]", required=False)
@click.option("--a", "select_a", multiple=True, metavar="NAME=VALUE", help="Of A, only variants with this setting.")
@click.option(
    "--b", "select_b", multiple=True, metavar="NAME=VALUE", help="Of B, or of the one file, only those with this one."
)
@click.option(
    "--match",
    default="width",
    show_default=True,
    metavar="width|params|settings",
    help="Pairs have equal width and depth, parameter counts within 5 %, or all settings equal that --a and --b do not "
    "name.",
)
@click.option("--per-param", is_flag=True, help="Compare EMC50 per parameter.")
@_INTERVAL
@click.option(
    "--correction",
    default="holm",
    show_default=True,
    metavar="holm|bh",
    help="Of the p-values for their number: Holm, or Benjamini-Hochberg.",
)
@click.option(
    "--against",
    metavar="COLUMN",
    help="Correlate the gap ln EMC(b) - ln EMC(a) with test_accuracy of B's fitted runs, or a column of its /curves.",
)
@_JSON
def compare_command(
    a: str,
    b: str | None,
    select_a: tuple[str, ...],
    select_b: tuple[str, ...],
    match: str,
    per_param: bool,
    interval: str | None,
    correction: str,
    against: str | None,
    as_json: bool,
) -> int:
    """Compare the EMC50 of two files, or of two selections of one, pair by pair.

    A pair agrees in all settings but those that --a and --b name, and those of which the two sides have no value in
    common. Several may be given at once (width=8,16,labels=true): values of one name are alternatives.
    """
    found = fasttrain.compare(
        fasttrain.load(a),
        fasttrain.load(b) if b is not None else None,
        select_a=select_a,
        select_b=select_b,
        match=match,
        per_param=per_param,
        interval=_content(interval),
        correction=correction,
        against=against,
    )
    _print(found.to_dict() if as_json else comparison_text(found, a, b or a))
    return 0


@click.command(
    "fit",
    short_help="Fit EMC = a params^alpha to the variants of a file.",
    epilog="""\b
Examples:
  fasttrain fit emc.h5
  fasttrain fit emc.h5 --by optimizer,depth --interval 0.95
  fasttrain fit emc.h5 --json
""",
)
@click.argument("file")
@click.option(
    "--by", metavar="LIST", help="Settings that part the variants into groups.  [default: all settings but width]"
)
@_INTERVAL
@_JSON
def fit_command(file: str, by: str | None, interval: str | None, as_json: bool) -> int:
    """Fit EMC = a params^alpha to each group of variants, censored ones included as bounds.

    Prints the exponent with its interval, how well the line fits, a warning where it bends, and EMC50 per parameter of
    every variant.
    """
    fits = fasttrain.fit_scaling(fasttrain.load(file), by=by, interval=_content(interval))
    _print(fits.to_dict() if as_json else scaling_text(fits, file))
    return 0


def comparison_text(found: "Comparison", a: str, b: str) -> list[str]:
    """The pairs, what holds over all of them, and what to know of it."""
    rows = found.pairs.to_dict("records")
    percent = f"{100 * found.interval:g}%"
    differs = [f"{name} ({', '.join(one)} against {', '.join(two)})" for name, (one, two) in found.differs.items()]
    settings = [name for name in found.pairs.columns if name in _varying(rows)]
    columns = {
        **dict(zip(settings, _pair_headings(settings), strict=True)),
        "emc_a": "a",
        "emc_b": "b",
        "ratio": "b/a",
        "interval": f"{percent} interval",
        "p": "p",
        "p_adjusted": f"p {found.correction}",
        "effect": "effect",
        "effect_interval": f"{percent} interval",
        "superiority": "P(b>a)",
        "notes": "notes",
    }
    cells = []
    for row in rows:
        ratio, interval = _ratio_text(row)
        cells.append(
            [
                *(_pair_setting(row, name) for name in settings),
                *(_emc(row, side) for side in "ab"),
                ratio,
                interval,
                _p_text(row["p"]),
                _p_text(row["p_adjusted"]),
                _number(row["effect"]),
                _bounds(row["effect_low"], row["effect_high"]),
                _number(row["superiority"]),
                row["notes"],
            ]
        )
    return [
        f"{found.quantity}, a: {a}, b: {b}; {count(len(rows), 'pair')}, matched by {found.match}",
        f"compared: {'; '.join(differs) or 'nothing differs'}",
        "",
        *aligned(list(columns), cells, columns),
        "",
        *_overall_text(found, percent),
        *_association_text(found, percent),
        f"p: {found.test}; corrected for {count(sum(not math.isnan(row['p']) for row in rows), 'test')} by "
        f"{found.correction}",
        "effect: ln(b/a) over the spread of the threshold from run to run; P(b>a): a run of b fits a larger n",
        *(f"note: {line}" for line in found.notes),
        *(f"not compared: {line}" for line in found.unmatched),
    ]


def scaling_text(fits: "Scaling", path: str) -> list[str]:
    """The fits, then the variants of all groups."""
    percent = f"{100 * fits.interval:g}%"
    groups = fits.fits.to_dict("records")
    rows = fits.variants.to_dict("records")
    named = [name for name in fits.by if len({group[name] for group in groups}) > 1]
    titles = dict(zip(named, headings(named), strict=True))
    titles |= {"interval": f"{percent} interval", "a_interval": f"{percent} interval", "r2": "R2", "fit_p": "fit p"}
    columns = [*named, "variants", "alpha", "interval", "a", "a_interval", "tau", "R2", "fit p", "bend", "bend p"]
    cells = []
    for group in groups:
        a, a_low, a_high = (math.exp(group[name]) for name in ("log_a", "log_a_low", "log_a_high"))
        censored = f" ({group['censored']} censored)" if group["censored"] else ""
        cells.append(
            [
                *(setting_text(group, name) if name in rows[0] else str(group[name]) for name in named),
                f"{group['variants']}{censored}",
                _number(group["alpha"]),
                _bounds(group["alpha_low"], group["alpha_high"]),
                _number(a),
                _bounds(a_low, a_high),
                _number(group["tau"]),
                "-" if math.isnan(group["r2"]) else f"{group['r2']:.4f}",
                _p_text(group["deviance_p"]),
                _number(group["bend"]),
                _p_text(group["bend_p"]),
            ]
        )
    settings = [name for name in varying_settings(rows) if name not in named]
    shown = [*named, *settings, "params", "EMC50", "emc_interval", "fitted", "EMC/param", "efficiency_interval"]
    variant_titles = titles | {"emc_interval": f"{percent} interval", "efficiency_interval": f"{percent} interval"}
    variant_cells = []
    for row in rows:
        emc, bounds = emc_text(row["emc50"], row["emc50_low"], row["emc50_high"], row["censored"])
        one, two = (f"{row['params']}", "-" if math.isnan(row["fitted"]) else digits(row["fitted"], row["fitted"]))
        value, ends = _efficiency(row)
        variant_cells.append(
            [*(setting_text(row, name) for name in (*named, *settings)), one, emc, bounds, two, value, ends]
        )
    return [
        f"EMC = a params^alpha, {path}: {count(len(groups), 'group')}, {count(len(rows), 'variant')}",
        "",
        *aligned(columns, cells, titles),
        "",
        *aligned(shown, variant_cells, variant_titles),
        "",
        *(f"warning: {line}" for line in fits.warnings),
        "fit p: whether the intervals alone explain the scatter about the line; bend: coefficient of (ln params)^2",
        *(f"left out: {line}" for line in fits.unmatched),
    ]


def _content(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise fasttrain.UserError(
            "interval", text, "expected a probability content between 0 and 1, such as 0.9"
        ) from None


def _print(what: dict[str, Any] | list[str]) -> None:

    # json escapes what no terminal can show.
    text = json.dumps(what, indent=2) if isinstance(what, dict) else plain("\n".join(what))
    click.echo(text)


def _varying(rows: Sequence[Row]) -> list[str]:
    """The columns of settings that a table of pairs must show."""
    out = []
    for name in rows[0]:
        base = name.removesuffix("_a").removesuffix("_b")
        if base in ("width", "depth", "params") or (base in _SETTING_NAMES and len({row[name] for row in rows}) > 1):
            out.append(name)
    return out


_SETTING_NAMES = (
    *(name for name in fasttrain.Variant.__dataclass_fields__ if name not in ("heads", "momentum")),
    *("data", "steps_budget", "check_every"),
)


def _pair_headings(names: Sequence[str]) -> list[str]:
    out = []
    for name in names:
        base, side = (name[:-2], f" {name[-1]}") if name.endswith(("_a", "_b")) else (name, "")
        out.append(f"{headings([base])[0]}{side}")
    return out


def _pair_setting(row: Row, name: str) -> str:
    if name.endswith(("_a", "_b")):
        side = name[-2:]
        own = {key.removesuffix(side): value for key, value in row.items() if key.endswith(side)}
        return setting_text({**row, **own}, name.removesuffix(side))
    return setting_text({**row, "depth": row.get("depth", row.get("depth_a"))}, name)


def _emc(row: Row, side: str) -> str:
    emc, low, high = (row[f"emc_{side}{end}"] for end in ("", "_low", "_high"))
    censored = row[f"censored_{side}"]
    sign, value = {"above": ("> ", low), "below": ("< ", high)}.get(censored, ("", emc))
    return f"{sign}{_number(value)}" if math.isfinite(value) else "-"


def _ratio_text(row: Row) -> tuple[str, str]:
    """The ratio and its interval, or what is known of a censored one: ``> 1.31`` without an interval."""
    low, high = row["ratio_low"], row["ratio_high"]
    one_sided = {"at least": f"> {_number(low)}", "at most": f"< {_number(high)}", "unknown": "not known"}
    if row["bound"] in one_sided:
        return one_sided[row["bound"]], ""
    return _number(row["ratio"]), _bounds(low, high)


def _overall_text(found: "Comparison", percent: str) -> list[str]:
    overall = found.overall
    if overall is None:
        return ["overall: fewer than two pairs have a ratio"]
    left_out = f"; {count(overall.left_out, 'pair')} without a value not in it" if overall.left_out else ""
    return [
        f"overall b/a {_number(overall.ratio)}, {percent} interval {_bounds(overall.low, overall.high)}, "
        f"p {_p_text(overall.p)}: random effects over {count(overall.pairs, 'pair')}, t interval of Hartung and Knapp"
        f"{left_out}",
        f"from pair to pair the log ratio varies by {_number(overall.spread)} (sd); one ratio for all: Q test, "
        f"p {_p_text(overall.heterogeneity_p)}",
    ]


def _association_text(found: "Comparison", percent: str) -> list[str]:
    about = found.association
    if about is None:
        return []
    head = f"gap ln(b/a) against {about.column} of b, {count(about.points, 'pair')}"
    if about.left_out:
        head += f" ({about.left_out} left out: no value)"
    if about.kendall is None or about.pearson is None:
        return [f"{head}: {about.reason}"]
    parts = [
        f"{name} {_number(it.value)}, {percent} interval {_bounds(it.low, it.high)}, p {_p_text(it.p)}"
        for name, it in (("Kendall's tau", about.kendall), ("Pearson's r", about.pearson))
    ]
    return [f"{head}: {'; '.join(parts)}"]


def _efficiency(row: Row) -> tuple[str, str]:
    low, high = row["efficiency_low"], row["efficiency_high"]
    if row["censored"] == "above":
        return f"> {_number(low)}", ""
    if row["censored"] == "below":
        return f"< {_number(high)}", ""
    return _number(row["efficiency"]), "" if math.isnan(row["efficiency"]) else _bounds(low, high)


def _number(value: float) -> str:
    """Three significant digits; ``-`` for what is not there."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".removesuffix(".")


def _bounds(low: float, high: float) -> str:
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"[{_number(low)}, {'inf)' if math.isinf(high) else f'{_number(high)}]'}"


def _p_text(p: float) -> str:
    if math.isnan(p):
        return "-"
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"
