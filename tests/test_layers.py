"""The imports run one way, and heavy libraries stay where they are needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fasttrain
from fasttrain import ScanSpec, UserError, spec
from fasttrain.backends import choose, make_backend
from fasttrain.backends.base import Setting
from fasttrain.optim import OPTIMIZERS

ROOT = Path(__file__).parent.parent

# Lower ones first. A module imports from its own layer (without circles) and from those below.
LAYERS = [
    {"errors", "activations", "kernels", "factories", "journal"},
    {"spec"},
    {"records", "wording"},
    {"schema", "checkpoints"},
    {"sampling", "data", "models", "ensemble", "optim", "stopping"},
    {"plan", "search", "designs", "store", "estimate", "estimators", "machine", "analysis"},
    {"measured"},
    {"comparison"},
    {"scaling", "plots", "exporting"},
    {"reporting"},
    {"backends"},
    {"heldout", "curvature"},
    {"trainer"},
    {"prepare", "signals"},
    {"run"},
    {"repeat", "claims", "merging", "doctor"},
    {"extending"},
    {"cli"},
]
FOLDERS = {"kernels": ROOT / "kernels", "cli": ROOT / "cli"}


def files() -> dict[str, list[Path]]:
    """The source files of every part: a module, or a folder of them."""
    found: dict[str, list[Path]] = {name: sorted(folder.rglob("*.py")) for name, folder in FOLDERS.items()}
    for path in sorted((ROOT / "fasttrain").iterdir()):
        if path.suffix == ".py" and path.stem != "__init__":
            found[path.stem] = [path]
        elif (path / "__init__.py").exists():
            found[path.name] = sorted(path.rglob("*.py"))
    return found


FILES = files()


def imported(path: Path) -> set[str]:
    """Full names of all that a file imports, at any place in it: modules, and names from modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            # A user's own model comes from a module that only its name tells.
            dynamic = name in ("import_module", "__import__") and path.name != "factories.py"
            assert not dynamic, f"{path}: an import that this test cannot see"
    return found


IMPORTS = {part: set().union(*(imported(path) for path in paths)) for part, paths in FILES.items()}


def surface_uses(path: Path) -> set[str]:
    """What a file takes from the package itself, as in ``fasttrain.scan``."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fasttrain"
    }


def parts_of(part: str) -> set[str]:
    """The other parts of the package that a part imports."""
    names = {name.split(".")[1] for name in IMPORTS[part] if name.startswith("fasttrain.")}
    return names - {part}


def test_every_part_has_a_layer_and_every_layer_exists() -> None:
    listed = [part for layer in LAYERS for part in layer]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(FILES)
    assert all(FILES.values())


@pytest.mark.parametrize("part", sorted(set(FILES) - {"cli"}))
def test_imports_go_down(part: str) -> None:
    level = next(k for k, layer in enumerate(LAYERS) if part in layer)
    allowed = set().union(*LAYERS[: level + 1])
    assert parts_of(part) <= allowed, part


def test_there_are_no_circles() -> None:
    edges = {part: parts_of(part) & set(FILES) for part in FILES}
    while edges:
        free = {part for part, needs in edges.items() if not needs}
        assert free, f"circle among {sorted(edges)}"
        edges = {part: needs - free for part, needs in edges.items() if part not in free}


def test_the_package_itself_is_imported_for_its_version_only() -> None:
    """The library below the command line must not lean on its own public surface."""
    for part in set(FILES) - {"cli"}:
        for path in FILES[part]:
            assert surface_uses(path) <= {"__version__"}, path
        exported = {f"fasttrain.{name}" for name in fasttrain.__all__}
        assert not IMPORTS[part] & exported, part


def test_kernels_are_a_leaf() -> None:
    ours = {name for name in IMPORTS["kernels"] if name.split(".")[0] in ("fasttrain", "kernels")}
    assert all(name.startswith("fasttrain.kernels.") for name in ours), ours


def test_kernels_are_imported_by_backends_alone_and_triton_by_kernels_alone() -> None:
    assert {part for part in FILES if "kernels" in parts_of(part)} == {"backends", "heldout", "models"}
    users = {part for part, names in IMPORTS.items() if {name.split(".")[0] for name in names} & {"triton"}}
    assert users <= {"kernels"}
    bare = {part for part, names in IMPORTS.items() if {name.split(".")[0] for name in names} & {"kernels", "cli"}}
    assert not bare


def test_the_command_line_uses_the_public_surface() -> None:
    public = {f"fasttrain.{name}" for name in fasttrain.__all__}
    for name in IMPORTS["cli"]:
        if name.split(".")[0] == "fasttrain" and name != "fasttrain":
            own = name.startswith(
                (
                    "fasttrain.cli.",
                    "fasttrain.spec.",
                    "fasttrain.activations.",
                    "fasttrain.data.",
                    "fasttrain.errors.",
                    "fasttrain.wording.",
                )
            )
            assert own or name in public, name
    for path in FILES["cli"]:
        assert surface_uses(path) <= {*fasttrain.__all__, "__version__"}, path


def test_only_these_name_torch() -> None:
    users = {part for part, names in IMPORTS.items() if {name.split(".")[0] for name in names} & {"torch"}}
    assert users == {
        "models",
        "optim",
        "ensemble",
        "machine",
        "kernels",
        "backends",
        "heldout",
        "curvature",
        "prepare",
        "doctor",
    }


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages in a fresh interpreter after these imports."""
    code = "import sys\n" + "".join(f"import {name}\n" for name in modules)
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_the_search_and_the_store_do_not_load_torch() -> None:
    modules = ["spec", "records", "sampling", "data", "stopping", "plan", "estimate", "search", "designs", "store"]
    modules += ["analysis", "estimators"]
    loaded = loaded_by(*(f"fasttrain.{name}" for name in modules))
    assert {"fasttrain", "numpy", "h5py"} <= loaded
    assert not loaded & {"torch", "triton", "sklearn"}


def test_a_spec_loads_nothing_heavy() -> None:
    heavy = {"torch", "triton", "numpy", "scipy", "sklearn", "pandas", "h5py"}
    assert not loaded_by("fasttrain", "fasttrain.spec", "fasttrain.activations") & heavy
    assert not loaded_by("fasttrain.cli") & (heavy - {"numpy"})


def test_the_names_in_the_spec_are_those_of_the_modules() -> None:
    assert set(spec.OPTIMIZERS) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", spec.BACKENDS)
def test_every_backend_of_the_spec_can_be_built(name: str) -> None:
    one = ScanSpec()
    (variant, *_) = one.variants(10)
    setting = Setting(one, 64, torch.device("cpu"), torch.float32)
    if name == "triton":
        with pytest.raises(UserError, match="it needs a CUDA device; expected auto, stacked, vmap or loop here"):
            choose(name, setting, variant)
        return
    chosen = choose(name, setting, variant)
    assert chosen != "auto"
    backend = make_backend(chosen, setting, variant)
    assert backend.name == chosen
    for method in ("init", "run", "select", "insert", "parameters"):
        assert callable(getattr(backend, method))


def test_the_public_surface_is_there() -> None:
    for name in fasttrain.__all__:
        assert getattr(fasttrain, name).__name__ == name
        assert callable(getattr(fasttrain, name))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        fasttrain.nothing_like_it  # noqa: B018
