"""Which driver takes a model, with what tiles: a pure function of the model's own shape, the precision and the target.

Never of how many models there are or which: another tile adds in another order and gives other bits. The sizes are in
``configurations.csv``, which ``python -m benchmarks tune`` writes anew on a GPU.
"""

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

UNITS = (16, 32, 64)
"""Blocks of units: a model takes the least that holds its width, or several of the largest."""
WIDTHS = (*UNITS, 256, 1024)
"""Largest widths of the classes of models that share launches."""
TABLE = Path(__file__).with_name("configurations.csv")
_SAMPLES = (64, 32, 16)  # blocks of samples to choose from, as the classes of the head leave room


@dataclass(frozen=True, slots=True)
class Configuration:
    """The driver, and the sizes of its tiles.

    Attributes:
        whole: whether a program takes a model through whole steps, or one tile of one stage.
        BB: samples of a block.
        BH: units of a block.
        BC: classes, a power of two that holds all.
        BK: inputs of a product taken at once.
        CK: the same, of the head's product.
        BI: inputs of a block of weights.
        BO: classes of a block of the head's weights.
        BS: samples of its sum taken at once.
        warps: of a program.
        head_warps: of a program that holds logits.
        stages: of a pipelined loop.
        registers: that a thread may take, 0 for what the assembler likes. Left to itself it spills a word or two to fit
            one more program on a multiprocessor.
        head_registers: the same, of a program that holds logits.
        whole_registers: the same, of a program that makes whole steps.
    """

    whole: bool
    BB: int
    BH: int
    BC: int
    BK: int
    CK: int
    BI: int
    BO: int
    BS: int
    warps: int
    head_warps: int
    stages: int
    registers: int
    head_registers: int
    whole_registers: int

    def __str__(self) -> str:
        tiles = " ".join(f"{name}={getattr(self, name)}" for name in ("BB", "BH", "BC", "BK", "CK", "BI", "BO", "BS"))
        return (
            f"{'whole' if self.whole else 'stages'} {tiles} warps={self.warps},{self.head_warps} stages={self.stages} "
            f"registers={self.registers},{self.head_registers},{self.whole_registers}"
        )


def width_class(width: int) -> int:
    """The largest width of the models that share launches with those of this one.

    Raises:
        ValueError: it is above ``WIDTHS``.
    """
    for most in WIDTHS:
        if width <= most:
            return most
    raise ValueError(f"width {width} is above {WIDTHS[-1]}")


def configuration(
    *, width: int, features: int, classes: int, depth: int, batch: int, precision: str, target: int
) -> Configuration:
    """For models of a width, of which only its class counts.

    Programs that make whole steps suit models of few parameters: they need no launch a stage, and one program is
    enough for the work of a step. Full batches, of any number of samples, are always cut into stages, and so is what
    has more than 64 classes: its head wants more warps than the rest, and a program has one number of them.

    Args:
        width: of the hidden layers; 0 without.
        features: I, inputs of a sample.
        classes: C.
        depth: L, hidden layers.
        batch: samples of a step, 0 for all.
        precision: ``"ieee"``, ``"bf16x3"``, ``"tf32"`` or ``"bf16"``.
        target: compute capability, 90 for 9.0; between two of the table, and above it, the lower one's row holds.

    Raises:
        KeyError: the table has no such precision, or nothing for so low a target.
    """
    most = width_class(width)
    units = min(most, UNITS[-1])
    wanted = (precision, units)
    known = [row for row in rows() if row["target"] <= target and (row["precision"], row["units"]) == wanted]
    if not known:
        raise KeyError(f"no configuration for {precision} on compute capability {target}")
    row = max(known, key=lambda row: row["target"])
    weights = features * most + (depth - 1) * most * most + most * classes if depth else features * classes
    held = max(16, 1 << (classes - 1).bit_length())
    # The logits of a block of samples stay in registers: with many classes, of fewer samples and more warps.
    room = _SAMPLES[0] if held <= 16 else _SAMPLES[1] if held <= 256 else _SAMPLES[2]
    return Configuration(
        whole=bool(batch) and held <= 64 and weights <= row["whole_below"],
        BB=min(row["BB"], room),
        BH=units,
        BC=held,
        BK=row["BK"],
        CK=row["BK"] if held <= 128 else 16,
        BI=row["BI"],
        BO=min(held, 64),
        BS=row["BS"],
        warps=row["warps"],
        head_warps=row["warps"] if held <= 64 else 8 if held <= 512 else 16,
        stages=row["stages"] if held <= 128 else 2,
        # With many classes the head, and float32 products, want more than leaves room for three programs.
        registers=row["registers"] if held <= 32 or precision != "ieee" else 0,
        head_registers=row["registers"] if held <= 32 else 0,
        whole_registers=row["whole_registers"],
    )


@functools.cache
def rows() -> tuple[dict, ...]:
    """The rows of the table: whole numbers, but for the precision."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return tuple(
            {name: value if name == "precision" else int(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        )
