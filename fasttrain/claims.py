"""The five claims of Shwartz-Ziv et al. 2024 as comparisons that are fixed before they are measured.

"Just How Flexible are Neural Networks in Practice?" (arXiv 2406.11463) claims five things about EMC. Each is a
``Claim`` here: a hypothesis, scans that are stated in full, and a rule that turns their results into a verdict. Nothing
in a rule looks at the data before it is applied. docs/study.md has the designs in words.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fasttrain.analysis import Results, json_value, load
from fasttrain.comparison import Comparison, adjusted, associated, compare
from fasttrain.errors import UserError
from fasttrain.measured import measured
from fasttrain.run import Progress, resume, scan
from fasttrain.spec import ScanSpec

LEVEL = 0.05
"""Adjusted p-values below it decide."""
CONTENT = 0.95
"""Of the intervals of findings."""
_ARCHITECTURES = ("mlp", "cnn", "vit")
_ACTIVATIONS = ("tanh", "sigmoid", "gelu", "silu", "leaky_relu")
_MOST_SCALE = 1000.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One estimate that a verdict rests on.

    Attributes:
        what: what was estimated.
        estimate: its value; NaN where it cannot be had.
        low: lower end of its interval.
        high: upper end of its interval.
        p: two-sided p-value of no effect, corrected for the comparisons of the claim; NaN without a test.
        test: name of the test; empty without one.
        verdict: ``"supported"``, ``"not supported"`` or ``"undecided"``.
    """

    what: str
    estimate: float
    low: float
    high: float
    p: float
    test: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a claim.

    Attributes:
        claim: its name.
        hypothesis: as stated before.
        design: what was run, and the rule.
        runs: training runs behind it.
        findings: the estimates.
        verdict: ``"supported"``, ``"not supported"`` or ``"undecided"``, at this scale.
        notes: what else to know.
    """

    claim: str
    hypothesis: str
    design: str
    runs: int
    findings: tuple[Finding, ...]
    verdict: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values for JSON; NaN and infinity are ``None``."""
        return {field.name: json_value(getattr(self, field.name)) for field in dataclasses.fields(self)}


@dataclass(frozen=True, slots=True)
class Claim:
    """A hypothesis with its design and its rule, all fixed before.

    Attributes:
        name: in one word.
        hypothesis: what the paper claims, as it is tested here.
        design: what is run, and the rule, in words.
        scans: names of the scans that it takes, of ``scans_of``.
        decide: from their results to the findings and notes.
    """

    name: str
    hypothesis: str
    design: str
    scans: tuple[str, ...]
    decide: Callable[[Mapping[str, Results]], tuple[list[Finding], list[str]]]


def scans_of(scale: float = 1.0, seed: int = 0) -> dict[str, ScanSpec]:
    """The scans of the study by name.

    Args:
        scale: of the effort: the budget of a run grows with it, and the tolerance falls with its square root. A step of
            cnn or vit costs a hundred of those of a small mlp: the three architectures have half of the others' budget.
        seed: base of all randomness.
    """
    steps, fewer = (max(round(most * scale), 20) for most in (2_000, 1_000))
    common: dict[str, Any] = {
        "data": "digits",
        "steps": steps,
        "check_every": max(20, steps // 100),
        "tolerance": 0.15 / math.sqrt(scale),
        "max_probes": round(96 * max(1.0, scale)),
        "seeds": round(16 * max(1.0, scale)),
        "elasticity": False,
        "seed": seed,
    }
    mlp = {**common, "arch": ("mlp",), "widths": (8, 12, 16, 24)}
    costly = {
        **common,
        "steps": fewer,
        "check_every": max(20, fewer // 100),
        "tolerance": 0.2 / math.sqrt(scale),
        "lr": (0.003, 0.01),
    }
    sgd = {**mlp, "optimizer": ("sgd",), "lr": (0.03, 0.1, 0.3), "batch_size": (64, 0)}
    samples = {key: value for key, value in sgd.items() if key != "steps"}
    narrow = {**mlp, "widths": (2, 3, 4, 5, 6), "activation": ("relu", "tanh")}
    held_out = {"search": "grid", "n": (40,), "seeds": 32, "max_probes": None}
    return {
        # Parameter counts within 5 % of each other: those of the vit are 920, 1146, 1396 and 2290.
        "vit": ScanSpec(**costly, arch=("vit",), widths=(7, 8, 9, 12)),
        "cnn": ScanSpec(**costly, arch=("cnn",), depths=(2,), widths=(9, 10, 11, 15)),
        "mlp": ScanSpec(**costly, arch=("mlp",), widths=(12, 15, 18, 30)),
        "equal-steps": ScanSpec(**sgd),
        "equal-samples": ScanSpec(**samples, budget=f"{64 * steps}samples"),
        "labels": ScanSpec(**{**narrow, "labels": ("true", "random")}),
        "accuracy": ScanSpec(**{**narrow, "labels": ("true",), **held_out}),
        "activations": ScanSpec(**{**mlp, "activation": ("relu", *_ACTIVATIONS), "lr": costly["lr"]}),
    }


def study(
    out: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    seed: int = 0,
    on_scan: Callable[[str, ScanSpec], Callable[[Progress], None] | None] | None = None,
) -> list[Verdict]:
    """Runs the scans of the study and decides on its claims.

    A scan that a file in ``out`` holds already, of the same spec, is not made again; one that was stopped goes on.

    Args:
        out: folder for the scans' files and ``findings.json``; made if there is none.
        scale: of the effort, see ``scans_of``; more than 0.
        seed: base of all randomness.
        on_scan: called before each scan that is made with its name and its spec; gives what its progress is told to.

    Raises:
        UserError: ``out`` cannot be used, or holds another file under the name of a scan.
    """
    if not 0.0 < scale <= _MOST_SCALE:
        raise UserError("scale", scale, f"expected a number above 0, at most {_MOST_SCALE:g}")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("out", out, f"is no folder that can be used ({error.strerror})") from None
    specs = scans_of(scale, seed)
    done = {name: _stored(folder / f"{name}.h5", spec) for name, spec in specs.items()}
    results: dict[str, Results] = {}
    for name, spec in specs.items():
        found = done[name]
        if found is None:
            on_progress = on_scan(name, spec) if on_scan is not None else None
            path = folder / f"{name}.h5"
            found = (
                resume(path, on_progress=on_progress)
                if path.exists()
                else scan(spec, out=path, on_progress=on_progress)
            )
        results[name] = found
    verdicts = [decided(claim, results) for claim in CLAIMS]
    said = {
        "scale": scale,
        "seed": seed,
        "level": LEVEL,
        "fasttrain_version": next(iter(results.values())).attrs.get("fasttrain_version"),
        "claims": [verdict.to_dict() for verdict in verdicts],
    }
    (folder / "findings.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return verdicts


def decided(claim: Claim, results: Mapping[str, Results]) -> Verdict:
    """The verdict on a claim from the results of its scans."""
    findings, notes = claim.decide(results)
    verdicts = {finding.verdict for finding in findings}
    if verdicts == {"supported"}:
        verdict = "supported"
    else:
        verdict = "not supported" if "not supported" in verdicts else "undecided"
    runs = sum(len(results[name].probes) for name in claim.scans)
    return Verdict(claim.name, claim.hypothesis, claim.design, runs, tuple(findings), verdict, tuple(notes))


def _stored(path: Path, spec: ScanSpec) -> Results | None:
    """The results of a scan that was made before; None if it is to be made, or to go on."""
    if not path.exists():
        return None
    found = load(path)
    if found.spec != spec:
        raise UserError("out", path, "holds another scan; give another folder, or remove the file")
    return found if found.attrs.get("status") == "complete" else None


# The rules


def _parameters(results: Mapping[str, Results]) -> tuple[list[Finding], list[str]]:
    """Of every variant, EMC / params against 1."""
    findings = []
    told = [measured(results[name], CONTENT) for name in _ARCHITECTURES]
    missing = [line for _, lines in told for line in lines]
    for one in (one for variants, _ in told for one in variants):
        found, params = one.estimate, one.params
        low, high = found.emc50_low / params, found.emc50_high / params
        verdict = "supported" if high < 1.0 else "not supported" if low >= 1.0 else "undecided"
        what = f"EMC50 / parameters, {one.row['arch']} of width {one.row['width']} ({params} parameters)"
        findings.append(Finding(what, found.emc50 / params, low, high, math.nan, "", verdict))
    return findings, missing


def _architectures(results: Mapping[str, Results]) -> tuple[list[Finding], list[str]]:
    pairs = [
        (f"EMC50 of cnn over {other}, matched parameters", results[other], "", results["cnn"], "")
        for other in ("mlp", "vit")
    ]
    return _ratios(pairs, match="params")


def _batches(results: Mapping[str, Results]) -> tuple[list[Finding], list[str]]:
    pairs = [
        (
            f"EMC50 of minibatches over the full batch, {held}",
            results[name],
            "batch_size=full",
            results[name],
            f"{select}",
        )
        for held, name, select in (
            ("equal steps", "equal-steps", "batch_size=64"),
            ("equal samples seen", "equal-samples", "batch_size=64"),
        )
    ]
    return _ratios(pairs)


def _activations(results: Mapping[str, Results]) -> tuple[list[Finding], list[str]]:
    one = results["activations"]
    return _ratios(
        [(f"EMC50 of relu over {other}", one, f"activation={other}", one, "activation=relu") for other in _ACTIVATIONS]
    )


def _ratios(
    pairs: Sequence[tuple[str, Results, str, Results, str]], match: str = "width"
) -> tuple[list[Finding], list[str]]:
    """Mean ratios over matched variants, each against 1, corrected for their number (Holm)."""
    compared: list[tuple[str, Comparison | None]] = []
    notes: list[str] = []
    for what, a, select_a, b, select_b in pairs:
        try:
            found = compare(
                a,
                b if b is not a else None,
                select_a=select_a or (),
                select_b=select_b or (),
                match=match,
                interval=CONTENT,
            )
        except UserError as error:
            compared.append((what, None))
            notes.append(f"{what}: {error}")
            continue
        compared.append((what, found))
        notes += [f"{what}: {line}" for line in found.unmatched]
    overall = [found.overall if found is not None else None for _, found in compared]
    p = adjusted(np.array([one.p if one is not None else math.nan for one in overall]), "holm")
    findings = []
    for (what, _), one, corrected in zip(compared, overall, p.tolist(), strict=True):
        if one is None:
            notes.append(f"{what}: fewer than two pairs have a value")
            findings.append(Finding(what, math.nan, 0.0, math.inf, math.nan, "", "undecided"))
            continue
        if one.left_out:
            notes.append(f"{what}: {one.left_out} pairs without a value of EMC50 are left out")
        sign = "supported" if one.ratio > 1.0 else "not supported"
        findings.append(
            Finding(
                f"{what}, mean of {one.pairs} pairs",
                one.ratio,
                one.low,
                one.high,
                corrected,
                "random-effects t test of the log ratio, Holm",
                sign if corrected < LEVEL else "undecided",
            )
        )
    return findings, notes


def _generalisation(results: Mapping[str, Results]) -> tuple[list[Finding], list[str]]:
    """The gap of EMC between true and random labels against held-out accuracy, over models."""
    found = compare(
        results["labels"], select_a="labels=random", select_b="labels=true", match="width", interval=CONTENT
    )
    probes = results["accuracy"].probes
    accuracy = probes[probes["outcome"] == "fitted"].groupby(["width", "activation"])["test_accuracy"].mean()
    pairs = found.pairs
    both = pd.DataFrame(
        {
            "gap": pairs["log_ratio"].where(np.isfinite(pairs["ratio"])),
            "accuracy": [accuracy.get(key, math.nan) for key in zip(pairs["width"], pairs["activation"], strict=True)],
        }
    ).dropna()
    what = "Kendall's tau of ln EMC50(true) - ln EMC50(random) and held-out accuracy"
    told = associated(
        both["gap"].to_numpy(), both["accuracy"].to_numpy(), "test_accuracy", CONTENT, len(pairs) - len(both)
    )
    beyond = pairs[pairs["bound"] == "at least"]
    names = ", ".join(
        f"{name}, width {width}" for width, name in zip(beyond["width"], beyond["activation"], strict=True)
    )
    notes = [f"{told.points} models with both; {told.left_out} left out", *found.unmatched]
    notes += [f"left out for an EMC50 on true labels beyond the data, and so a large gap: {names}"] if names else []
    if told.kendall is None or told.pearson is None:
        return [Finding(what, math.nan, -1.0, 1.0, math.nan, "", "undecided")], [*notes, told.reason]
    tau, r = told.kendall, told.pearson
    notes.append(f"Pearson's r {r.value:.2f} [{r.low:.2f}, {r.high:.2f}], p = {r.p:.2g}")
    sign = "supported" if tau.value > 0.0 else "not supported"
    verdict = sign if tau.p < LEVEL else "undecided"
    return [Finding(what, tau.value, tau.low, tau.high, tau.p, "Kendall's test of independence", verdict)], notes


CLAIMS = (
    Claim(
        "parameters",
        "A standard optimizer fits far fewer random labels than there are parameters: EMC50 / parameters is below 1.",
        "Adam at the better of two learning rates, random labels of 10 classes, mlp, cnn and vit of four sizes from "
        "about 920 to 2,300 parameters. "
        "Supported if every 95 % interval lies below 1, not supported if any lies at or above 1.",
        _ARCHITECTURES,
        _parameters,
    ),
    Claim(
        "architectures",
        "Convolutional networks fit more samples per parameter than mlp and vit, even on random labels.",
        "The same runs; the better of two learning rates for each model, confirmed on fresh seeds; pairs with "
        "parameter counts within 5 %. Supported if the mean ratio of cnn to each of the two is above 1 (p < 0.05, "
        "Holm), not supported if either is below 1.",
        _ARCHITECTURES,
        _architectures,
    ),
    Claim(
        "minibatches",
        "Stochastic gradient descent fits more samples than full-batch gradient descent.",
        "SGD with momentum 0.9, the best of three learning rates for each width and batch size, batches of 64 and of "
        "all n; once at equal steps, once at equal samples seen. Supported if the mean ratio is above 1 in both "
        "(p < 0.05, Holm), not supported if it is below 1 in either.",
        ("equal-steps", "equal-samples"),
        _batches,
    ),
    Claim(
        "generalisation",
        "The more EMC on true labels exceeds that on random ones, the better a model generalises.",
        "mlp of widths 2 to 6 with ReLU and tanh, Adam at 0.01, true and random labels. The gap of ln EMC50 of each "
        "model against "
        "its mean accuracy on held-out samples after fitting 40 true-labelled samples. Supported if Kendall's tau is "
        "above 0 (p < 0.05), not supported if it is below.",
        ("labels", "accuracy"),
        _generalisation,
    ),
    Claim(
        "activations",
        "Networks with ReLU fit more samples than those with other activations.",
        f"Adam, mlp of widths 8, 12, 16, 24, the better of two learning rates; ReLU against {', '.join(_ACTIVATIONS)}. "
        "Supported if every mean ratio is above 1 (p < 0.05, Holm), not supported if any is below 1.",
        ("activations",),
        _activations,
    ),
)
"""What is tested, in the order in which it is reported."""


def as_frame(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row a finding, with the claim and its verdict."""
    rows = [
        {"claim": one.claim, "claim_verdict": one.verdict, "runs": one.runs, **dataclasses.asdict(finding)}
        for one in verdicts
        for finding in one.findings
    ]
    return pd.DataFrame(rows)


__all__ = ["CLAIMS", "Claim", "Finding", "Verdict", "as_frame", "decided", "scans_of", "study"]
