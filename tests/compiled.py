"""Compiles what a training step launches for GPUs that are not there, and reads the result: for test_compile.py."""

import dataclasses
import itertools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fasttrain.kernels import fused, rows
from fasttrain.kernels.configurations import configuration

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Case:
    """What is launched: a shape, the width of its models, their precision, and the GPU."""

    target: int
    precision: str
    width: int = 16
    features: int = 64
    classes: int = 10
    depth: int = 2
    activation: str = "relu"
    optimizer: str = "adam"
    batch: int = 128
    dtype: str = "float32"
    inputs: str | None = None
    whole: bool | None = None


@dataclass
class Kernel:
    """One compiled kernel.

    Attributes:
        name: of its function.
        constants: its constexprs.
        registers: of a thread.
        spilled: bytes of spill stores and loads, of the kernel itself and of each function that it calls.
        shared: bytes of shared memory.
        warps: of a program.
        counts: SASS instructions by kind.
    """

    name: str
    constants: dict
    registers: int
    spilled: dict[str, int]
    shared: int
    warps: int
    counts: dict = field(default_factory=dict)
    ptx: str = field(default="", repr=False)


class _Recorder(fused.Models):
    """Records launches instead of making them."""

    def _start(self, kernel, programs, *args, warps, registers, **constants):
        key = (kernel.fn.__name__, *sorted(constants.items()))
        self.__dict__.setdefault("recorded", {})[key] = (kernel, args, constants, warps, registers)


def launches(case: Case) -> tuple[list, int]:
    """Each different kernel that a step and its check launch, with its arguments; and the stages of its loops."""
    shape = fused.Shape(
        features=case.features, classes=case.classes, depth=case.depth, activation=case.activation,
        optimizer=case.optimizer, batch=case.batch, precision=case.precision, plateau_ratio=0.9,
        plateau_loss=0.3,
    )  # fmt: skip
    config = configuration(
        width=case.width, features=case.features, classes=case.classes, depth=case.depth, batch=case.batch,
        precision=case.precision, target=case.target,
    )  # fmt: skip
    recorded = {}
    sizes = [case.features, *[case.width] * case.depth, case.classes]
    weights = [(np.zeros((o, i)), np.zeros(o)) for i, o in itertools.pairwise(sizes)]
    model = fused.Model(
        case.width, np.zeros((64, case.features)), np.arange(64), np.zeros(64, int), (1, 2), (0.1, 0.9, 0.0), weights,
        budget=1000, check_every=100, plateau_after=100,
    )  # fmt: skip
    for whole in (False, True) if case.whole is None else (case.whole,):
        one = _Recorder(
            shape, dataclasses.replace(config, whole=whole), torch.device("cpu"), getattr(torch, case.dtype),
            getattr(torch, case.inputs) if case.inputs else None,
        )  # fmt: skip
        one.add([model])
        if whole:
            one._whole_steps(1)
        else:
            one._launch(1, (0,))
        recorded.update(one.recorded)
    return list(recorded.values()), config.stages


def compile_case(case: Case) -> list[Kernel]:
    """All kernels of a case, for its target."""
    found, stages = launches(case)
    return [_compile(*launch, stages, case.target) for launch in found]


def compile_rows(target: int) -> list[Kernel]:
    """The fused update, head and check of the vmap path."""
    values, sums = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    sizes = {"CLASSES": 10, "BB": 32, "BC": 16}
    return [
        _compile(rows.update_kernel, (*[values] * 6, 1024), {"OPTIMIZER": name, "BLOCK": rows.BLOCK}, 4, 0, 3, target)
        for name in ("sgd", "adam")
    ] + [
        _compile(rows.head_kernel, (*[values] * 5, 128), sizes, 4, 0, 3, target),
        _compile(rows.check_kernel, (*[values] * 3, sums, 64, 128), sizes, 4, 0, 3, target),
    ]


def _compile(kernel, args, constants, warps, registers, stages, target) -> Kernel:
    names = kernel.arg_names
    signature, aligned = dict.fromkeys(names, "constexpr"), {}
    for place, (name, value) in enumerate(zip(names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not kernel.params[place].do_not_specialize:
                aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if registers:
        options["maxnreg"] = registers
    out = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(out.asm["ptx"])
        # The very flags of Triton's own call, and its report of registers and spills, which a cubin does not keep.
        name = f"sm_{target}a" if target >= 90 else f"sm_{target}"
        command = [TOOLS / "ptxas", "-v", "--fmad=false", f"--gpu-name={name}", ptx, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    spilled = {}
    for function, properties in re.findall(r"Function properties for (\S+)\n(.*)", log):
        spilled[function] = sum(int(n) for n in re.findall(r"(\d+) bytes spill", properties))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    kinds = {kind: rf"\b{kind}" for kind in ("HGMMA", "HMMA", "DMMA", "FFMA", "LDGSTS")}
    kinds["wide"] = r"\bLDGSTS\.\S*128"
    kinds["wide loads"] = r"\bLDG\.\S*128"
    return Kernel(
        name=kernel.fn.__name__,
        constants=constants,
        registers=registers,
        spilled=spilled,
        shared=out.metadata.shared,
        warps=warps,
        counts={kind: len(re.findall(pattern, sass)) for kind, pattern in kinds.items()},
        ptx=out.asm["ptx"],
    )


def quiet_worker() -> None:
    """For a pool: one thread each, no interpreter."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
