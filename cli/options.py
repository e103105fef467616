"""The options of ``fasttrain scan``: one for each field of ``ScanSpec``, whose defaults they show."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from fasttrain import ScanSpec
from fasttrain.activations import ACTIVATIONS
from fasttrain.spec import ARCHITECTURES, BACKENDS, FULL_BATCH, LABELS, OPTIMIZERS, PRECISIONS

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
    "arch": _Help(_MODEL, _one_of(ARCHITECTURES), "Architecture family."),
    "widths": _Help(_MODEL, "LIST", "Hidden units a layer: numbers or ranges."),
    "depths": _Help(_MODEL, "LIST", "Hidden layers; 0 is the linear classifier, which has no width."),
    "activation": _Help(_MODEL, "LIST", f"Activation functions: {', '.join(ACTIVATIONS)}."),
    "data": _Help(_TASK, "NAME", "Data set: digits, or gaussian:D, standard normal inputs of D dimensions."),
    "labels": _Help(_TASK, _one_of(LABELS), "Labels: drawn at random, or those of the data set; or both."),
    "classes": _Help(_TASK, "LIST", "Numbers of classes, at least 2.", "the data set's, 10 for gaussian"),
    "optimizer": _Help(_TRAINING, _one_of(OPTIMIZERS), "Optimizers, one or several."),
    "lr": _Help(_TRAINING, "LIST", "Learning rates, constant over the steps."),
    "momentum": _Help(_TRAINING, "NUMBER", "Momentum of SGD, from 0 up to, not including, 1."),
    "batch_size": _Help(_TRAINING, "LIST", "Samples a step, or full for all n."),
    "steps": _Help(_TRAINING, "N", "Optimizer steps that a training run may take."),
    "check_every": _Help(_TRAINING, "N", "Steps between checks on the whole training set."),
    "seeds": _Help(_SEARCH, "N", "At most so many training runs at one n of one variant."),
    "n_min": _Help(_SEARCH, "N", "Smallest number of training samples tried.", "2"),
    "n_max": _Help(
        _SEARCH,
        "N",
        "Largest number of training samples tried.",
        "the data set's size, 4 times the parameters for gaussian",
    ),
    "interval": _Help(_SEARCH, "P", "Probability content of the reported interval of EMC50."),
    "tolerance": _Help(
        _SEARCH, "SHARE", "A variant is done when its interval's half-width is at most this share of EMC50."
    ),
    "max_probes": _Help(_SEARCH, "N", "At most so many training runs a variant."),
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


def _option(field: "dataclasses.Field[Any]") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    about = FIELDS[field.name]

    class Option(_SpecOption):
        group = about.group

    several = isinstance(field.default, tuple) or field.name == "classes"
    return click.option(
        f"--{field.name.replace('_', '-')}",
        field.name,
        cls=Option,
        type=str,
        multiple=several,
        metavar=about.metavar,
        help=f"{about.text}  [default: {default_text(field)}]",
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


def given_fields(context: click.Context) -> dict[str, str]:
    """The fields of ``ScanSpec`` that the command line itself gives; a list may be given in parts."""
    given = {}
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
            if record is not None:
                heading = parameter.group if isinstance(parameter, _SpecOption) else "Run"
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=34)
