"""What a scan measures: a frozen, validated specification and the variants that it spans."""

import dataclasses
import hashlib
import itertools
import json
import math
import operator
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from fasttrain.activations import ACTIVATIONS
from fasttrain.errors import UserError
from fasttrain.factories import register

ARCHITECTURES = ("mlp", "linear", "cnn", "vit")
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "shampoo", "muon")
MOMENTUM = ("sgd", "muon")
"""Of these, those that take ``momentum`` and ``nesterov``; the others have their own constants."""
LABELS = ("random", "true", "corrupted:SHARE")
INPUTS = ("real", "shuffled", "gaussian")
SCHEDULES = ("constant", "cosine", "linear")
SCALINGS = ("product", "compound")
NORMS = ("none", "batch")
LR_SEARCHES = ("race", "all")
SEARCHES = ("adaptive", "paper", "grid")
BACKENDS = ("auto", "loop", "vmap", "stacked", "native", "triton")
PRECISIONS = ("auto", "float32", "float64", "bf16x3", "tf32", "bf16")
ROUNDED = ("bf16x3", "tf32", "bf16")
"""Of these, those in which numbers are float32 and the factors of products are rounded further."""
CONFIRM = 2**20
"""Seed of the first probe that confirms the winner of a race; ``ScanSpec.seeds`` stays below it."""
SHORT = 2**21
"""Seed of the first probe that may take only a third of the budget."""
FULL_BATCH = 0
"""The ``batch_size`` of full-batch training; written ``full`` in a spec and on the command line."""

# Longer lists are a typing error (1:10000000), not a scan, and would fill the memory before it is checked.
_MOST_VALUES = 100_000
_STEPS = 10_000
# Largest counts of a budget. Epochs times samples must stay below 2^63.
_MOST_UNITS = {"steps": 10**18, "epochs": 10**9, "samples": 10**18}
_BUDGETS = "a whole number and its unit, such as 300epochs, 1e6samples or 10000steps"
_INTEGERS = "whole numbers such as 4,8,16 or a range 4:64:4 or 2^3:2^8 (both ends included)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One point of a scan: a model family member and the procedure that trains it.

    Attributes:
        arch: architecture family, or ``module:name`` of a user's factory.
        width: hidden units a layer, channels (cnn) or embedding (vit); 0 for the linear classifier (depth 0).
        depth: hidden layers or blocks.
        activation: name in ``ACTIVATIONS``; ``"none"`` for the linear classifier.
        optimizer: a name in ``OPTIMIZERS``.
        lr: learning rate, the largest of its schedule.
        momentum: of those in ``MOMENTUM``; 0 for the others.
        batch_size: samples a step; ``FULL_BATCH`` (0) takes all n.
        labels: ``"random"``, ``"true"`` or ``"corrupted:SHARE"``.
        classes: C, the number of labels.
        norm: ``"none"`` or ``"batch"``, of cnn.
        heads: of vit; 0 elsewhere.
        patch: side of a patch of vit in pixels; 0 elsewhere and for the rule of ``models.vit``.
        inputs: ``"real"``, ``"shuffled"`` or ``"gaussian"``.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: coupled (added to the gradient) or, in adamw and muon, decoupled.
        schedule: of the learning rate after the warm-up.
        warmup: steps in which it rises from 0.
        clip: largest norm of a model's gradient; 0 for no limit.
        label_smoothing: share of a label's weight that is spread over all classes.
        init_scale: factor on the initial weights.
    """

    arch: str
    width: int
    depth: int
    activation: str
    optimizer: str
    lr: float
    momentum: float
    batch_size: int
    labels: str
    classes: int
    norm: str = "none"
    heads: int = 0
    patch: int = 0
    inputs: str = "real"
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    clip: float = 0.0
    label_smoothing: float = 0.0
    init_scale: float = 1.0


EXTENDED = (
    "arch",
    "widths",
    "depths",
    "activation",
    "inputs",
    "labels",
    "classes",
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "batch_size",
    "n",
    "seeds",
    "n_min",
    "n_max",
    "tolerance",
    "max_probes",
)
"""Fields of ``ScanSpec`` of which a scan may be asked for more later: they decide which runs are made, and of none what
comes of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanSpec:
    """Everything that decides the numbers of a scan.

    Lists make a product; a single value stands for a list of one.

    Attributes:
        arch: architecture families: names in ``ARCHITECTURES``, or a factory of your own: a callable
            ``(width, depth, in_shape, classes) -> nn.Module``, or ``"package.module:name"`` of one.
        widths: hidden units a layer (mlp), channels (cnn) or embedding (vit), each >= 1. Also text: ``"4,8,16"``,
            ``"4:64:4"``, ``"2^3:2^8"``.
        depths: hidden layers or blocks, each >= 0; 0 is the linear classifier, which has no widths and no activations.
        scaling: ``"product"`` pairs every width with every depth; ``"compound"`` the first with the first and so on.
        match_params: whether ``widths`` are those of the first architecture, and every other one takes widths at
            which its parameter counts are within 5 % of the first one's.
        activation: names in ``ACTIVATIONS``.
        norm: ``"none"``, or ``"batch"`` for batch normalisation in cnn: then a sample's output depends on the others
            of its minibatch, checks use running averages, and only the loop backend can train it.
        heads: attention heads of vit, a divisor of every width; ``None`` takes the largest of 4, 2 and 1 that is one.
        patch: side of the patches of vit in pixels; ``None`` takes the largest that cuts each side into at least 4.
        data: name of a data set (``fasttrain data list``), or the path of a file.
        inputs: ``"real"``; ``"shuffled"``, the same permutation of the features for all samples; and/or
            ``"gaussian"``, normal with the mean and variance of every feature.
        labels: ``"random"`` (uniform over the classes), ``"true"``, and/or ``"corrupted:SHARE"``, true labels of which
            that share is replaced by random ones.
        classes: numbers of classes, each >= 2; ``None`` takes the data set's (10 for gaussian).
        optimizer: names in ``OPTIMIZERS``.
        lr: learning rates, each > 0 and finite.
        lr_search: with several learning rates, ``"race"`` drops those that are clearly worse and confirms the winner on
            fresh seeds; ``"all"`` measures each to the end, as variants of their own, as do searches but ``"adaptive"``
            whatever is said here.
        momentum: of sgd and muon, in [0, 1).
        nesterov: whether that is Nesterov's; needs a momentum above 0.
        weight_decay: each >= 0.
        schedule: of the learning rate over the budget: ``"constant"``, ``"cosine"`` and/or ``"linear"`` (both to 0).
        warmup: steps in which the learning rate rises linearly from 0 before that.
        clip: largest norm of a model's gradient; ``None`` for no limit.
        label_smoothing: share of a label's weight that is spread over all classes, in [0, 1); in training only.
        init_scale: factor on the initial weights, > 0; biases stay zero.
        batch_size: samples a step, each >= 1, or ``"full"``.
        steps: optimizer steps a probe may take (the budget); of no account with a ``budget``.
        budget: the same in epochs or in samples seen, ``"300epochs"`` or ``"1e6samples"``: a probe may take as many
            steps as ``budget_steps`` says. ``"10000steps"`` is another way to set ``steps``; it is ``None`` then.
        check_every: steps between evaluations on the whole training set; the last step is always followed by one. With
            a ``budget``, at most: ``stopping.StopRules.of``.
        elasticity: of adaptive, whether short probes measure EMC50 at a third of the budget too.
        early_stop: whether runs that no longer get on (``plateaued``) are ended before their budget is used.
        search: which runs are made: ``"adaptive"``, those that tell most of EMC50; ``"paper"``, for every seed a
            growing n until the first failure (Shwartz-Ziv et al. 2024); ``"grid"``, all ``seeds`` at every ``n``.
        growth: of paper, factor from one n to the next, > 1; n grows by at least 1.
        n: of grid, the numbers of samples; ascending.
        seeds: at most so many probes at one n of one variant; of paper, as many ladders; of grid, as many at every n.
        n_min: smallest n tried; ``None`` is 2; of paper an eighth of the parameters, or of ``n_max`` where that is
            less; of grid the first ``n``.
        n_max: largest n tried; ``None`` is the number of samples there are, or 4 times the parameters where any number
            can be drawn; of grid the last ``n``.
        interval: probability content of the reported interval, in (0, 1).
        tolerance: of adaptive, a variant is done when its interval's half-width is at most this share of EMC50.
        max_probes: of adaptive and paper, at most so many probes a variant; ``None`` is 96, of paper 100 a seed. Of
            adaptive, as many again may confirm the winner of a race, and as many short ones may follow.
        seed: base of all randomness of the scan.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        backend: a name in ``BACKENDS``.
        precision: ``"auto"`` (float32), ``"float32"``, ``"float64"``, or float32 with products in ``"bf16x3"``,
            ``"tf32"`` or ``"bf16"``, which the triton backend has.

    Raises:
        UserError: a value is out of its range; the message names the field, the value and what is accepted.
    """

    arch: tuple[str, ...] = ("mlp",)
    widths: tuple[int, ...] = (4, 8, 16, 24)
    depths: tuple[int, ...] = (1,)
    scaling: str = "product"
    match_params: bool = False
    activation: tuple[str, ...] = ("relu",)
    norm: str = "none"
    heads: int | None = None
    patch: int | None = None
    data: str = "digits"
    inputs: tuple[str, ...] = ("real",)
    labels: tuple[str, ...] = ("random",)
    classes: tuple[int, ...] | None = None
    optimizer: tuple[str, ...] = ("adam",)
    lr: tuple[float, ...] = (0.01,)
    lr_search: str = "race"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: tuple[float, ...] = (0.0,)
    schedule: tuple[str, ...] = ("constant",)
    warmup: int = 0
    clip: float | None = None
    label_smoothing: float = 0.0
    init_scale: float = 1.0
    batch_size: tuple[int, ...] = (64,)
    steps: int = _STEPS
    budget: str | None = None
    check_every: int = 100
    early_stop: bool = True
    elasticity: bool = True
    search: str = "adaptive"
    growth: float = 1.1
    n: tuple[int, ...] | None = None
    seeds: int = 16
    n_min: int | None = None
    n_max: int | None = None
    interval: float = 0.9
    tolerance: float = 0.1
    max_probes: int = None  # type: ignore[assignment]  # a number once validated
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name, value in _validated(self).items():
            object.__setattr__(self, name, value)

    @property
    def shortens(self) -> bool:
        """Whether EMC50 is measured at a third of the budget too."""
        return self.elasticity and self.search == "adaptive"

    @property
    def races(self) -> bool:
        """Whether variants race that differ in their learning rate alone."""
        return self.lr_search == "race" and self.search == "adaptive"

    def variants(self, classes: int) -> tuple[Variant, ...]:
        """The product of all lists, in the order of the fields, without repeats.

        Args:
            classes: the number of classes where the spec leaves it to the data set.
        """
        seen: dict[Variant, None] = {}
        if self.scaling == "compound":
            shapes = list(zip(self.depths, self.widths, strict=True))
        else:
            shapes = list(itertools.product(self.depths, self.widths))
        axes: Iterable[Any] = itertools.product(
            self.arch,
            shapes,
            self.activation,
            self.inputs,
            self.labels,
            self.classes or (classes,),
            self.optimizer,
            self.weight_decay,
            self.schedule,
            self.lr,
            self.batch_size,
        )
        for arch, (depth, width), activation, inputs, labels, n_classes, optimizer, decay, schedule, lr, batch in axes:
            linear = arch == "linear" or (arch == "mlp" and depth == 0)
            moves = optimizer in MOMENTUM
            variant = Variant(
                arch=arch,
                width=0 if linear else width,
                depth=0 if linear else depth,
                activation="none" if linear or arch not in ARCHITECTURES else activation,
                norm=self.norm if arch == "cnn" else "none",
                heads=(self.heads or default_heads(width)) if arch == "vit" else 0,
                patch=(self.patch or 0) if arch == "vit" else 0,
                inputs=inputs,
                labels=labels,
                classes=n_classes,
                optimizer=optimizer,
                lr=lr,
                momentum=self.momentum if moves else 0.0,
                nesterov=self.nesterov and moves,
                weight_decay=decay,
                schedule=schedule,
                warmup=self.warmup,
                clip=self.clip or 0.0,
                label_smoothing=self.label_smoothing,
                init_scale=self.init_scale,
                batch_size=batch,
            )
            seen.setdefault(variant)
        return tuple(seen)

    def to_json(self) -> str:
        """The spec as JSON text with every field; ``from_json`` gives an equal spec back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ScanSpec":
        """The spec that ``to_json`` wrote.

        Raises:
            UserError: the text is no JSON object, or a field is unknown or out of its range.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError("spec", text[:40], f"not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise UserError("spec", text[:40], "expected a JSON object with the fields of ScanSpec")
        if fields.get("steps") == _STEPS:  # as to_json writes it, beside a budget too
            del fields["steps"]
        return cls.from_mapping(fields)

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> "ScanSpec":
        """A spec from named fields (``check_every`` or ``check-every``); what is left out takes its default.

        Raises:
            UserError: a field is unknown or out of its range, or both ``steps`` and ``budget`` are given.
        """
        return cls(**spec_fields(fields))

    def options(self, only: Collection[str] | None = None) -> list[str]:
        """The options with which ``fasttrain scan`` makes this spec.

        Args:
            only: of these fields; by default those that are not at their defaults.
        """
        plain = json.loads(self.to_json())
        default = json.loads(ScanSpec().to_json())
        # What the number of runs would be if nothing were said of it depends on the search.
        likewise = {name: value for name, value in plain.items() if name != "max_probes" and name != "steps"}
        default["max_probes"] = ScanSpec.from_mapping(likewise).max_probes
        out = []
        for name, value in plain.items():
            option = f"--{name.replace('_', '-')}"
            if value == default[name] if only is None else name not in only or value is None:
                continue
            if isinstance(value, bool):
                out.append(option if value else option.replace("--", "--no-", 1))
                continue
            values = value if isinstance(value, list) else [value]
            if name == "batch_size":
                values = ["full" if one == FULL_BATCH else one for one in values]
            out += [option, ",".join(map(str, values))]
        return out

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the spec: equal for equal specs, on any machine."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def budget_steps(spec: ScanSpec, variant: Variant, n: int, short: bool = False) -> int:
    """Optimizer steps that one run may take, at least 1.

    ``steps`` as they are; E epochs are ceil(E n / B) steps and S samples ceil(S / B), with B the batch size, n for the
    full batch. A short run may take a third of these, to the nearest whole number (a third is never half-way).

    Args:
        spec: the scan.
        variant: what is trained.
        n: training samples.
        short: whether it is a ``records.Probe`` that is ``short``.
    """
    steps = spec.steps
    if spec.budget is not None:
        count, unit = _parsed_budget(spec.budget)
        batch = n if variant.batch_size == FULL_BATCH else variant.batch_size
        steps = -(-count * (n if unit == "epochs" else 1) // batch)
    return max(1, (steps + 1) // 3) if short else steps


def early_tells(check_every: int, steps: int) -> bool:
    """Whether a full run's checks show if it had fitted within a third of its budget: ten of them or more by then.

    Args:
        check_every: steps between checks.
        steps: budget of a full run; 0 if that depends on n, and then checks are dense enough.
    """
    return steps == 0 or 10 * check_every <= (steps + 1) // 3


def budget_text(spec: ScanSpec) -> str:
    """The budget of a full run as ``--budget`` takes it: ``10000steps``, ``300epochs``, ``1000000samples``."""
    return spec.budget or f"{spec.steps}steps"


def default_heads(width: int) -> int:
    """The largest of 4, 2 and 1 that divides a width."""
    return next(heads for heads in (4, 2, 1) if width % heads == 0)


def spec_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields under their Python names.

    Raises:
        UserError: a name that ``ScanSpec`` does not have, one given twice (``n-max`` and ``n_max``), or both ``steps``
            and ``budget``.
    """
    known = [field.name for field in dataclasses.fields(ScanSpec)]
    out: dict[str, Any] = {}
    for key, value in fields.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UserError("spec", key, f"no such field; the fields are {', '.join(known)}")
        if name in out:
            raise UserError("spec", key, "given twice")
        out[name] = value
    if out.get("budget") is not None and "steps" in out:
        raise _both(out["budget"], out["steps"])
    return out


def read_toml(path: str | Path) -> dict[str, Any]:
    """The fields of a TOML spec file, under their Python names, not yet checked for their values.

    Raises:
        UserError: the file cannot be read, is no TOML, or has an unknown field.
    """
    try:
        with open(path, "rb") as file:
            fields = tomllib.load(file)
    except OSError as error:
        raise UserError("spec", path, f"cannot be read ({error.strerror}); give a TOML file") from None
    except (ValueError, RecursionError) as error:
        # TOMLDecodeError and UnicodeDecodeError, but also a number of too many digits, are ValueErrors.
        raise UserError("spec", path, f"is not TOML ({error})") from None
    try:
        return spec_fields(fields)
    except UserError as error:
        raise UserError("spec", path, f"{error.value}: {error.expected}") from None


def parse_integers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers from text: lists ``4,8``, ranges ``4:64:4`` and ``4:8``, powers ``2^3:2^8``.

    Ranges include both ends.

    Raises:
        UserError: the text is none of these, or a range runs backwards.
    """
    out: list[int] = []
    for item in text.split(","):
        item = item.strip()
        if match := re.fullmatch(r"(\d{1,18})", item):
            out.append(int(item))
        elif match := re.fullmatch(r"(\d{1,18}):(\d{1,18})(?::(\d{1,18}))?", item):
            first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
            if last < first or step < 1:
                raise UserError(option, item, f"a range runs upwards, first:last:step; expected {_INTEGERS}")
            if (last - first) // step >= _MOST_VALUES:
                raise UserError(option, item, f"more than {_MOST_VALUES} values; expected {_INTEGERS}")
            out.extend(range(first, last + 1, step))
        elif match := re.fullmatch(r"(\d{1,3})\^(\d{1,2})(?::\1\^(\d{1,2}))?", item):
            base, low, high = int(match[1]), int(match[2]), int(match[3] or match[2])
            if high < low:
                raise UserError(option, item, f"a range runs upwards; expected {_INTEGERS}")
            out.extend(base**exponent for exponent in range(low, high + 1))
        else:
            raise UserError(option, item or repr(text), f"expected {_INTEGERS}")
    return tuple(out)


def _values(option: str, value: object) -> tuple[Any, ...]:
    """A list of one or more values from a single value, comma-separated text or a list."""
    if isinstance(value, str):
        items: Iterable[Any] = [item.strip() for item in value.split(",")]
    elif isinstance(value, Iterable):
        items = value
    else:
        items = [value]
    out = tuple(items)
    if not out:
        raise UserError(option, "(empty)", "expected at least one value")
    return out


def _unique(items: Iterable[Any]) -> tuple[Any, ...]:
    """The items in their order, without repeats."""
    return tuple(dict.fromkeys(items))


def _integer(option: str, value: object, least: int, what: str | None = None) -> int:
    if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value.strip()):
        value = int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    try:
        index = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        index = -1
    if index < least:
        raise UserError(option, value, f"expected {what or f'a whole number of at least {least}'}")
    if index > 10**18:
        raise UserError(option, value, "expected a whole number of at most 10^18")
    return index


def _number(option: str, value: object, low: float, high: float, what: str) -> float:
    """A float strictly inside (low, high)."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low < number < high:
        raise UserError(option, value, f"expected {what}")
    return number


def _choice(option: str, value: object, accepted: Iterable[str]) -> str:
    accepted = list(accepted)
    if value not in accepted:
        raise UserError(option, value, f"expected one of {', '.join(accepted)}")
    return str(value)


def _flag(option: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    return _choice(option, str(value).lower(), ("true", "false")) == "true"


def _arch(value: object) -> str:
    """A family's name, or the name of a factory; a callable is registered under its own."""
    if callable(value):
        return register(value)
    if isinstance(value, str) and re.fullmatch(r"[\w.]+:[\w.<>]+(#\d+)?", value):
        return value
    if value not in ARCHITECTURES:
        raise UserError("arch", value, f"expected one of {', '.join(ARCHITECTURES)}, or package.module:factory")
    return str(value)


def _labels(value: object) -> str:
    if isinstance(value, str) and (match := re.fullmatch(r"corrupted:([0-9.eE+-]+)", value)):
        share = _number("labels", match[1], 0.0, 1.0, "corrupted:SHARE with a share between 0 and 1")
        return f"corrupted:{share:g}"
    if value not in LABELS[:2]:
        raise UserError("labels", value, f"expected one of {', '.join(LABELS)}")
    return str(value)


def _integers(option: str, value: object, least: int) -> tuple[int, ...]:
    items: list[Any] = []
    for item in [value] if isinstance(value, str) else _values(option, value):
        items.extend(parse_integers(option, item) if isinstance(item, str) else [item])
    return _unique(_integer(option, item, least, _whole_from(least)) for item in items)


def _whole_from(least: int) -> str:
    return f"{_INTEGERS}, each at least {least}"


def _both(budget: object, steps: object) -> UserError:
    return UserError("budget", budget, f"steps={steps} is given too; expected one of the two")


def _parsed_budget(value: object) -> tuple[int, str]:
    """A number of at least 1, and ``"steps"``, ``"epochs"`` or ``"samples"``."""
    pattern = r"\s*(\d{1,19}(?:\.\d{1,18})?(?:[eE]\+?\d{1,2})?)\s*(step|epoch|sample)s?\s*"
    match = re.fullmatch(pattern, value) if isinstance(value, str) else None
    count = Fraction(match[1]) if match else Fraction(0)
    if match is None or count < 1 or count.denominator != 1:
        raise UserError("budget", value, f"expected {_BUDGETS}")
    unit = f"{match[2]}s"
    if count > _MOST_UNITS[unit]:
        raise UserError("budget", value, f"expected at most {_MOST_UNITS[unit]:,} {unit}")
    return count.numerator, unit


def _batch(value: object) -> int:
    if value in ("full", FULL_BATCH) and not isinstance(value, bool):
        return FULL_BATCH
    return _integer("batch_size", value, 1, "a whole number of at least 1, or full")


def _validated(spec: ScanSpec) -> dict[str, Any]:
    """The fields of a spec in their final types.

    Raises:
        UserError: for the first field that is out of its range.
    """
    device = spec.device
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise UserError("device", device, "expected auto, cpu, cuda or cuda:N")
    if not isinstance(spec.data, str) or not spec.data:
        raise UserError("data", spec.data, "expected the name of a data set, digits or gaussian:D")
    lr = "a number above 0, such as 0.01"
    # The ends of _number are open: the largest number below 0 lets 0 in. Adding 0.0 turns -0.0 into 0.0.
    low, what = math.nextafter(0.0, -1.0), "a number from 0 up to, not including, 1"
    momentum = _number("momentum", spec.momentum, low, 1.0, what) + 0.0
    n_min = None if spec.n_min is None else _integer("n_min", spec.n_min, 1)
    n_max = None if spec.n_max is None else _integer("n_max", spec.n_max, 2)
    if n_min is not None and n_max is not None and n_min >= n_max:
        raise UserError("n_min", n_min, f"expected less than n-max, which is {n_max}")
    steps, budget = _integer("steps", spec.steps, 1), None
    if spec.budget is not None:
        count, unit = _parsed_budget(spec.budget)
        if steps != _STEPS:
            raise _both(spec.budget, steps)
        steps, budget = (count, None) if unit == "steps" else (steps, f"{count}{unit}")
    check_every = _integer("check_every", spec.check_every, 1)
    seeds = _integer("seeds", spec.seeds, 1)
    if seeds >= CONFIRM:
        raise UserError("seeds", seeds, f"expected at most {CONFIRM - 1}; later seeds confirm learning rates")
    search = _choice("search", spec.search, SEARCHES)
    n = _grid(spec.n, search, n_min, n_max)
    probes = {"adaptive": 96, "paper": 100 * seeds, "grid": len(n or ()) * seeds}[search]
    arch = [spec.arch] if callable(spec.arch) else _values("arch", spec.arch)
    zero_up = "a number of at least 0, such as 0.0005"
    nesterov = _flag("nesterov", spec.nesterov)
    if nesterov and momentum == 0.0:
        raise UserError("nesterov", "true", "needs a momentum above 0")
    warmup = _integer("warmup", spec.warmup, 0)
    if budget is None and warmup >= steps and warmup > 0:
        raise UserError("warmup", warmup, f"expected less than steps, which is {steps}")
    fields = {
        "arch": _unique(map(_arch, arch)),
        "widths": _integers("widths", spec.widths, 1),
        "depths": _integers("depths", spec.depths, 0),
        "scaling": _choice("scaling", spec.scaling, SCALINGS),
        "match_params": _flag("match_params", spec.match_params),
        "activation": _unique(
            _choice("activation", name, ACTIVATIONS) for name in _values("activation", spec.activation)
        ),
        "norm": _choice("norm", spec.norm, NORMS),
        "heads": None if spec.heads is None else _integer("heads", spec.heads, 1),
        "patch": None if spec.patch is None else _integer("patch", spec.patch, 1),
        "inputs": _unique(_choice("inputs", name, INPUTS) for name in _values("inputs", spec.inputs)),
        "labels": _unique(map(_labels, _values("labels", spec.labels))),
        "classes": None if spec.classes is None else _integers("classes", spec.classes, 2),
        "optimizer": _unique(_choice("optimizer", name, OPTIMIZERS) for name in _values("optimizer", spec.optimizer)),
        "lr": _unique(_number("lr", value, 0.0, math.inf, lr) for value in _values("lr", spec.lr)),
        "lr_search": _choice("lr_search", spec.lr_search, LR_SEARCHES),
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": _unique(
            _number("weight_decay", value, low, math.inf, zero_up) + 0.0
            for value in _values("weight_decay", spec.weight_decay)
        ),
        "schedule": _unique(_choice("schedule", name, SCHEDULES) for name in _values("schedule", spec.schedule)),
        "warmup": warmup,
        "clip": None if spec.clip is None else _number("clip", spec.clip, 0.0, math.inf, "a number above 0, such as 1"),
        "label_smoothing": _number("label_smoothing", spec.label_smoothing, low, 1.0, what) + 0.0,
        "init_scale": _number("init_scale", spec.init_scale, 0.0, math.inf, "a number above 0, such as 1"),
        "batch_size": _unique(_batch(value) for value in _values("batch_size", spec.batch_size)),
        "steps": steps,
        "budget": budget,
        "check_every": check_every,
        "early_stop": _flag("early_stop", spec.early_stop),
        "elasticity": _flag("elasticity", spec.elasticity),
        "search": search,
        "growth": _number("growth", spec.growth, 1.0, math.inf, "a number above 1, such as 1.1"),
        "n": n,
        "seeds": seeds,
        "n_min": n_min,
        "n_max": n_max,
        "interval": _number("interval", spec.interval, 0.0, 1.0, "a number between 0 and 1, such as 0.9"),
        "tolerance": _number("tolerance", spec.tolerance, 0.0, math.inf, "a number above 0, such as 0.1"),
        "max_probes": probes if spec.max_probes is None else _integer("max_probes", spec.max_probes, 1),
        "seed": _integer("seed", spec.seed, 0),
        "backend": _choice("backend", spec.backend, BACKENDS),
        "precision": _choice("precision", spec.precision, PRECISIONS),
    }
    _shapes(fields)
    lists = {name: len(value) for name, value in fields.items() if isinstance(value, tuple) and name != "n"}
    if math.prod(lists.values()) > _MOST_VALUES:
        longest = max(lists, key=lists.__getitem__)
        raise UserError(
            longest,
            f"({lists[longest]} values)",
            f"the lists span {math.prod(lists.values())} variants; expected at most {_MOST_VALUES}",
        )
    return fields


def _grid(given: object, search: str, n_min: int | None, n_max: int | None) -> tuple[int, ...] | None:
    """The n of a grid, ascending, all within the bounds; None for other searches."""
    if search != "grid":
        if given is not None:
            raise UserError("n", given, f"goes with --search grid only, and the search is {search}")
        return None
    if given is None:
        raise UserError("search", search, "needs --n, the numbers of samples to try, such as --n 100,200,300")
    n = tuple(sorted(_integers("n", given, 1)))
    for value in n:
        if n_min is not None and value < n_min:
            raise UserError("n", value, f"expected at least n-min, which is {n_min}")
        if n_max is not None and value > n_max:
            raise UserError("n", value, f"expected at most n-max, which is {n_max}")
    return n


def _shapes(fields: Mapping[str, Any]) -> None:
    """Whether widths, depths and architectures go together."""
    widths, depths = fields["widths"], fields["depths"]
    if fields["scaling"] == "compound" and len(widths) != len(depths):
        raise UserError("depths", f"({len(depths)} values)", f"compound scaling pairs them with {len(widths)} widths")
    for arch in fields["arch"]:
        if arch in ("cnn", "vit") and 0 in depths:
            raise UserError("depths", 0, f"{arch} has at least one block; expected 1 or more")
    if "vit" in fields["arch"] and fields["heads"] is not None and not fields["match_params"]:
        for width in widths:
            if width % fields["heads"]:
                raise UserError("heads", fields["heads"], f"does not divide the width {width}")
    if fields["match_params"] and len(fields["arch"]) < 2:
        raise UserError("match_params", "true", "expected at least two architectures to match")
