"""The options of ``fasttrain scan``: one for each field of ``ScanSpec``, whose defaults they show."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from fasttrain import ScanSpec
from fasttrain.activations import ACTIVATIONS
from fasttrain.spec import (
    ARCHITECTURES,
    BACKENDS,
    EXTENDED,
    FULL_BATCH,
    INPUTS,
    LABELS,
    LR_SEARCHES,
    NORMS,
    OPTIMIZERS,
    PRECISIONS,
    SCALINGS,
    SCHEDULES,
    SEARCHES,
)

EXAMPLES = """\b
Examples:
  fasttrain scan --widths 4,8,16,24
  fasttrain scan --widths 2^3:2^6 --depths 1,2 --activation relu,tanh --out shapes.h5
  fasttrain scan --depths 0 --data gaussian:64 --classes 2 --optimizer sgd --lr 1 --batch-size full
  fasttrain scan --spec scan.toml --tolerance 0.05 --dry-run
  fasttrain show emc.h5
"""


@dataclass(frozen=True, slots=True)
class _Help:
    """How one field of ``ScanSpec`` appears in ``--help``.

    Attributes:
        group: heading that it stands under.
        metavar: what its value looks like.
        text: what it means, in a sentence.
        default: words for a default of ``None``, which the library fills in later.
    """

    group: str
    metavar: str
    text: str
    default: str | None = None


def _one_of(names: Any) -> str:
    return "|".join(names)


_MODEL, _TASK, _TRAINING, _SEARCH, _MACHINE = "Models", "Task", "Training", "Search", "Machine"
FIELDS: dict[str, _Help] = {
    "arch": _Help(
        _MODEL,
        "LIST",
        f"Architecture families: {', '.join(ARCHITECTURES)}; or package.module:factory of your own, which is imported "
        "and run.",
    ),
    "widths": _Help(_MODEL, "LIST", "Hidden units a layer, channels (cnn) or embedding (vit): numbers or ranges."),
    "depths": _Help(_MODEL, "LIST", "Hidden layers or blocks; 0 is the linear classifier, which has no width."),
    "scaling": _Help(_MODEL, _one_of(SCALINGS), "Every width with every depth, or the first with the first and so on."),
    "match_params": _Help(
        _MODEL,
        "",
        "Take the widths of the first architecture; for the others, those with parameter counts within 5 % of it.",
    ),
    "activation": _Help(_MODEL, "LIST", f"Activation functions: {', '.join(ACTIVATIONS)}."),
    "norm": _Help(
        _MODEL,
        _one_of(NORMS),
        "Batch normalisation in cnn: outputs then depend on the other samples of a minibatch, and only the loop "
        "backend can train it.",
    ),
    "heads": _Help(_MODEL, "N", "Attention heads of vit.", "the largest of 4, 2, 1 that divides the width"),
    "patch": _Help(_MODEL, "N", "Side of the patches of vit, in pixels.", "the largest with 4 or more along each side"),
    "init_scale": _Help(_MODEL, "NUMBER", "Factor on the initial weights."),
    "data": _Help(
        _TASK,
        "NAME|FILE",
        "Data set (fasttrain data list), gaussian:D for standard normal inputs of D dimensions, or a file.",
    ),
    "inputs": _Help(
        _TASK, _one_of(INPUTS), "Inputs as they are, with their features permuted, or normal with their moments."
    ),
    "labels": _Help(
        _TASK, _one_of(LABELS), "Labels: drawn at random, those of the data set, or a share of those drawn anew."
    ),
    "classes": _Help(_TASK, "LIST", "Numbers of classes, at least 2.", "the data set's, 10 for gaussian"),
    "optimizer": _Help(_TRAINING, "LIST", f"Optimizers: {', '.join(OPTIMIZERS)}."),
    "lr": _Help(_TRAINING, "LIST", "Learning rates; of several, the best is searched for."),
    "lr_search": _Help(
        _TRAINING,
        _one_of(LR_SEARCHES),
        "Of several learning rates, drop the worse and confirm the best on fresh seeds; or measure all to the end.",
    ),
    "momentum": _Help(_TRAINING, "NUMBER", "Momentum of sgd and muon, from 0 up to, not including, 1."),
    "nesterov": _Help(_TRAINING, "", "Nesterov's momentum."),
    "weight_decay": _Help(_TRAINING, "LIST", "Weight decay; decoupled in adamw and muon."),
    "schedule": _Help(_TRAINING, "LIST", f"Learning rate over the steps: {', '.join(SCHEDULES)}."),
    "warmup": _Help(_TRAINING, "N", "Steps in which the learning rate rises from 0."),
    "clip": _Help(_TRAINING, "NUMBER", "Largest norm of a model's gradient.", "no limit"),
    "label_smoothing": _Help(_TRAINING, "SHARE", "Share of a label's weight spread over all classes."),
    "batch_size": _Help(_TRAINING, "LIST", "Samples a step, or full for all n."),
    "steps": _Help(_TRAINING, "N", "Optimizer steps that a training run may take."),
    "budget": _Help(
        _TRAINING,
        "NUMBER+UNIT",
        "The same in epochs or in samples seen, in place of --steps: 300epochs, 1e6samples.",
        "that of --steps",
    ),
    "check_every": _Help(_TRAINING, "N", "Steps between checks on the whole training set, at most."),
    "early_stop": _Help(_TRAINING, "", "Whether runs whose loss no longer falls are ended before the budget is used."),
    "elasticity": _Help(
        _TRAINING, "", "Whether EMC50 is measured at a third of the budget too, with runs of their own."
    ),
    "search": _Help(
        _SEARCH,
        _one_of(SEARCHES),
        "Runs that tell most of EMC50; for every seed a growing n until the first failure; or all seeds at every --n.",
    ),
    "growth": _Help(_SEARCH, "FACTOR", "With --search paper, from one n to the next; at least 1 sample more."),
    "n": _Help(_SEARCH, "LIST", "With --search grid, numbers of training samples: numbers or ranges.", "none"),
    "seeds": _Help(
        _SEARCH,
        "N",
        "At most so many training runs at one n of one variant; as many ladders (paper), as many at every n (grid).",
    ),
    "n_min": _Help(
        _SEARCH,
        "N",
        "Smallest number of training samples tried.",
        "2; paper: an eighth of the parameters or of n-max, the smaller; grid: the smallest --n",
    ),
    "n_max": _Help(
        _SEARCH,
        "N",
        "Largest number of training samples tried.",
        "the samples there are, 4 times the parameters for gaussian; grid: the largest --n",
    ),
    "interval": _Help(_SEARCH, "P", "Probability content of the reported interval of EMC50."),
    "tolerance": _Help(
        _SEARCH,
        "SHARE",
        "With --search adaptive, a variant is done when its interval's half-width is at most this share of EMC50.",
    ),
    "max_probes": _Help(
        _SEARCH, "N", "At most so many training runs a variant; not with --search grid.", "96; paper: 100 for each seed"
    ),
    "seed": _Help(_SEARCH, "N", "Base of all randomness of the scan."),
    "device": _Help(_MACHINE, "NAME", "Device to train on: auto, cpu, cuda or cuda:N."),
    "backend": _Help(
        _MACHINE,
        _one_of(BACKENDS),
        "How the models are trained; auto is native on a CPU and triton on CUDA, or the next that can.",
    ),
    "precision": _Help(
        _MACHINE,
        _one_of(PRECISIONS),
        "Number format of the training; auto is float32. The last three are float32 with rounded products, on a GPU.",
    ),
}


class _SpecOption(click.Option):
    """An option that stands for a field of ``ScanSpec``; its value is text, which ``ScanSpec`` checks."""

    group: str


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option for each field of ``ScanSpec``."""
    # Decorators apply from the last to the first, and click lists options in the order in which they stand.
    for field in reversed(dataclasses.fields(ScanSpec)):
        command = _option(field)(command)
    return command


def extension_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of which a scan may be asked for more."""
    for field in reversed([field for field in dataclasses.fields(ScanSpec) if field.name in EXTENDED]):
        command = _option(field, "that of the file")(command)
    return command


def _option(
    field: "dataclasses.Field[Any]", default: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    about = FIELDS[field.name]

    class Option(_SpecOption):
        group = about.group

    name = field.name.replace("_", "-")
    if field.default is True:
        both, text = f"--{name}/--no-{name}", f"{about.text}  [default: {name}]"
        return click.option(both, field.name, cls=Option, default=True, help=text)
    if field.default is False:
        return click.option(f"--{name}", field.name, cls=Option, is_flag=True, help=about.text)
    several = isinstance(field.default, tuple) or field.name in ("classes", "n")
    return click.option(
        f"--{name}",
        field.name,
        cls=Option,
        type=str,
        multiple=several,
        metavar=about.metavar,
        help=f"{about.text}  [default: {default or default_text(field)}]",
    )


def default_text(field: "dataclasses.Field[Any]") -> str:
    """The default of a field of ``ScanSpec`` as it would be typed, or words where there is no fixed one."""
    if field.default is None:
        words = FIELDS[field.name].default
        assert words is not None
        return words
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    if field.name == "batch_size":
        values = tuple("full" if value == FULL_BATCH else value for value in values)
    return ",".join(str(value) for value in values)


def given_fields(context: click.Context) -> dict[str, str | bool]:
    """The fields of ``ScanSpec`` that the command line itself gives; a list may be given in parts."""
    given: dict[str, str | bool] = {}
    for name in FIELDS:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            value = context.params[name]
            given[name] = ",".join(value) if isinstance(value, tuple) else value
    return given


class GroupedCommand(click.Command):
    """A command whose help lists its options under headings."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those of ``ScanSpec`` first."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None and not isinstance(parameter, click.Argument):
                heading = parameter.group if isinstance(parameter, _SpecOption) else "Run"
                sections.setdefault(heading, []).append(record)
        for heading, records in sorted(sections.items(), key=lambda section: section[0] == "Run"):
            with formatter.section(heading):
                formatter.write_dl(records, col_max=34)
