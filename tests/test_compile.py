"""The Triton kernels compiled for GPUs that are not there: they fit, they spill nothing, they use what the GPU has."""

import concurrent.futures
import inspect
import itertools
import multiprocessing

import pytest
from compiled import Case, Kernel, compile_case, compile_rows, quiet_worker

from fasttrain.kernels import configurations, drivers, fused

pytestmark = pytest.mark.alone  # it compiles in two processes itself
TARGETS = (80, 90)
SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that a block may have, of an A100 and of an H100 or H200."""
BUDGETS = {16: 128, 32: 168, 64: 168}
"""Registers of a thread, by the block of units, of every stage with up to 32 classes: 168 leave room for three programs
of 128 threads. A kernel that needs more runs fewer at once: raise a number only with a measurement."""

CASES = [
    Case(80, "ieee", 16),
    Case(90, "bf16x3", 64),
    Case(90, "ieee", 64, whole=False),
    Case(80, "bf16x3", 64, whole=False),
    Case(90, "tf32", 16, whole=False),
    Case(80, "tf32", 64, depth=1, whole=False),
    Case(90, "bf16", 32, activation="gelu", optimizer="sgd", whole=False),
    Case(80, "bf16", 32, activation="silu", optimizer="adamw", depth=1, whole=False),
    Case(80, "ieee", 64, classes=1000, depth=1, whole=False),
    Case(90, "bf16x3", 64, classes=100, depth=0, whole=False),
    Case(90, "bf16x3", 16, features=784, inputs="uint8", batch=0, depth=1, whole=False),
    Case(90, "ieee", 16, features=7, dtype="float64", depth=1, whole=False),
]
# The kernel of whole steps takes as long to compile as all others together: once for each row of the table.
ALL = [
    *(
        Case(target, precision, width, activation=activation, optimizer=optimizer, whole=whole)
        for target, precision, width in itertools.product(TARGETS, fused.PRECISIONS, configurations.UNITS)
        for activation, optimizer, whole in (("relu", "sgd", False), ("gelu", "adamw", None))
    ),
    *(
        Case(target, precision, 64, classes=classes, depth=1, whole=False)
        for target, precision, classes in itertools.product(
            TARGETS, fused.PRECISIONS, (17, 40, 65, 129, 257, 513, 1024)
        )
    ),
]


def compiled(cases: list[Case]) -> dict[Case, list[Kernel]]:
    """In two processes, which takes half of the time on two cores."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context, initializer=quiet_worker) as pool:
        return dict(zip(cases, pool.map(compile_case, cases), strict=True))


@pytest.fixture(scope="module")
def kernels() -> dict[Case, list[Kernel]]:
    return compiled(CASES)


# Of the head's tile, called in the kernel of whole steps, since budgets are each model's own: no limit of registers
# from 128 to 255 and none of the smaller blocks that were tried was without it.
KNOWN = {(80, "ieee", 16): 16}


def fits(case: Case, kernel: Kernel) -> None:
    assert kernel.shared <= SHARED[case.target], kernel
    if kernel.name == "whole_steps":
        assert len(kernel.spilled) >= 5  # itself, and the tiles that it calls
        assert kernel.spilled["whole_steps"] == 0, kernel
        assert max(kernel.spilled.values()) <= KNOWN.get((case.target, case.precision, case.width), 0), kernel
    elif case.dtype == "float32":  # float64 is there to be compared with
        assert not any(kernel.spilled.values()), kernel
        if case.classes <= 32:
            assert kernel.registers <= BUDGETS[min(configurations.width_class(case.width), 64)], kernel


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_and_spills_nothing(case, kernels):
    names = set()
    for kernel in kernels[case]:
        fits(case, kernel)
        names.add(kernel.name)
    assert names >= {"head_stage", "weights_stage", "check_stage", "decide_stage"}
    assert ("hidden_stage" in names) == (case.depth > 0)
    assert ("whole_steps" in names) == (case.whole is not False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_made_of_what_their_precision_says(case, kernels):
    for kernel in kernels[case]:
        if kernel.name == "decide_stage":
            continue
        tensor = kernel.counts["HGMMA"] + kernel.counts["HMMA"]
        if case.dtype == "float64":
            assert kernel.counts["DMMA"] > 0 or "fma.rn.f64" in kernel.ptx
        elif case.precision == "ieee":
            assert tensor == 0
            assert kernel.counts["FFMA"] > 0
        else:
            assert tensor > 0, kernel.name
            # 64 rows and more on Hopper take its warp-group instructions.
            rows = kernel.constants.get("BB", kernel.constants.get("BI"))
            if case.target == 90 and rows >= 64 and kernel.warps >= 4:
                assert kernel.counts["HGMMA"] > 0, kernel.name
        if case.precision == "bf16x3":
            assert "bf16" in kernel.ptx


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "float32" and not case.inputs], ids=str)
def test_copies_are_wide(case, kernels):
    """Rows of inputs, activations and weights begin at 16 bytes and are copied 16 bytes at a time.

    Narrow are a few labels and row numbers, and on Hopper the factors that tf32 wants transposed.
    """
    for kernel in kernels[case]:
        if kernel.name in ("hidden_stage", "head_stage", "check_stage", "back_stage"):
            least = 0.4 if (case.target, case.precision) == (90, "tf32") else 0.6
            assert kernel.counts["wide"] >= least * kernel.counts["LDGSTS"] > 0, kernel


def test_the_barriers_between_phases_are_there(kernels):
    """Each of ``tl.debug_barrier`` is one in the kernel itself, beside those that the compiler puts into the tiles."""
    (whole,) = (kernel for kernel in kernels[CASES[0]] if kernel.name == "whole_steps")
    wanted = inspect.getsource(drivers.whole_steps.fn).count("debug_barrier")
    wanted += 2 * inspect.getsource(drivers._outputs.fn).count("debug_barrier")  # in training and in checks
    entry = whole.ptx[whole.ptx.index(".entry") :]
    assert wanted == 8 + 1
    assert entry[: entry.index("\n}")].count("bar.sync") >= wanted


def test_the_bounds_of_a_plateau_are_float64(kernels):
    """0.9 and 0.3 as float32 would end runs at other checks than the monitor's."""
    decide = [k for k in kernels[CASES[0]] if k.name == "decide_stage"]
    assert len(decide) == 1
    assert "0d3FECCCCCCCCCCCCD" in decide[0].ptx
    assert "0d3FD3333333333333" in decide[0].ptx


def test_a_kernel_serves_every_step():
    """Steps, budgets and layers are arguments: no launch but the first of its kind may compile anything."""
    for name in (
        "hidden_stage",
        "head_stage",
        "back_stage",
        "weights_stage",
        "check_stage",
        "decide_stage",
        "whole_steps",
    ):
        kernel = getattr(drivers, name)
        numbers = {p.name for p in kernel.params if p.name in drivers._NUMBERS}
        assert numbers
        assert all(p.do_not_specialize for p in kernel.params if p.name in numbers)


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_of_the_vmap_path_fit(target):
    sgd, adam, head, check = compile_rows(target)
    for kernel in (sgd, adam, head, check):
        assert not any(kernel.spilled.values()), kernel
        assert kernel.registers <= 128, kernel
    # Eight numbers of each array a thread, in loads of four.
    assert sgd.counts["wide loads"] == 2 * 3
    assert adam.counts["wide loads"] == 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_shipped_configuration_fits(target):
    for case, found in compiled([case for case in ALL if case.target == target]).items():
        for kernel in found:
            fits(case, kernel)


def test_the_table_has_every_row_once():
    keys = [(row["target"], row["precision"], row["units"]) for row in configurations.rows()]
    assert len(keys) == len(set(keys))
    assert set(keys) >= set(itertools.product(TARGETS, fused.PRECISIONS, configurations.UNITS))


def test_a_configuration_depends_on_the_width_class_alone(monkeypatch):
    rows = tuple({**row, "whole_below": 8192} for row in configurations.rows())  # whatever a GPU found best
    monkeypatch.setattr(configurations, "rows", lambda: rows)

    def of(width, target=90, **fields):
        given = {"features": 64, "classes": 10, "depth": 1, "batch": 64, "precision": "ieee", **fields}
        return configurations.configuration(width=width, target=target, **given)

    for most, next_one in itertools.pairwise((0, *configurations.WIDTHS)):
        assert {of(width) for width in range(most + 1, next_one + 1)} == {of(next_one)}
    assert of(16).BH == 16 < of(17).BH == 32 < of(33).BH == of(1024).BH == 64
    assert of(16).whole
    assert not of(16, batch=0).whole
    assert not of(300).whole
    assert of(16, classes=64).whole
    assert not of(16, classes=65).whole
    assert of(16, target=89) == of(16, target=80)
    assert of(16, target=120) == of(16, target=90)
    assert f"BB={of(16).BB} BH=16" in str(of(16))
    with pytest.raises(KeyError, match="capability 70"):
        of(16, target=70)
    with pytest.raises(ValueError, match="1025"):
        of(1025)
