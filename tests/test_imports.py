"""Imports go one way, and importing the package needs nothing beyond its core dependencies."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastcascade

ROOT = Path(fastcascade.__file__).parent
KERNELS = Path(next(iter(__import__("fastcascade.kernels").kernels.__path__)))

LAYERS = (
    {"errors", "types", "files", "codec", "kernels", "_C"},
    {"cascade", "selector", "resnet", "cost", "augment"},
    {"plan", "plan_file", "translate", "fuse", "lower"},
    {"backends"},
    {"engine"},
    {"predict", "bench", "report", "cli", "plot"},
)
"""Each may import from its own layer and from those above it in this list."""

TRAINING = {
    "objective",
    "train",
    "calibrate",
    "evaluate",
    "risk",
    "refit",
    "checkpoint",
    "distributed",
    "progress",
}
"""Beside the plan and what runs it: neither side imports the other."""


def imported(path: Path) -> set[str]:
    """First parts below ``fastcascade`` of what a file imports anywhere; other packages by their name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "fastcascade":
            names.update(f"fastcascade.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def own(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("fastcascade.")}


def imported_on_load(path: Path) -> set[str]:
    """Like ``own``, for imports at the top of the file alone (those in functions break cycles on purpose)."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastcascade"):
            parts = (node.module or "").split(".")
            names.update([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
    return names


def layer_of(module: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if module in layer), None)


def modules(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py"))


def test_lower_layers_do_not_import_higher_ones() -> None:
    checked = 0
    for path in modules(ROOT):
        name = path.relative_to(ROOT).parts[0].removesuffix(".py")
        layer = layer_of(name)
        if layer is None or name == "kernels":
            continue
        checked += 1
        for other in imported_on_load(path):
            above = layer_of(other)
            assert above is None or above <= layer, f"{name} imports {other}, which builds on it"
            assert layer == len(LAYERS) - 1 or other not in TRAINING, f"{name} imports {other}"
    assert checked > 10


def test_training_does_not_import_what_runs_plans() -> None:
    for name in TRAINING:
        path = ROOT / f"{name}.py"
        for other in imported_on_load(path) if path.exists() else ():
            assert (layer_of(other) or 0) < 2, f"{name} imports {other}"


def test_kernels_import_no_other_part_of_the_package() -> None:
    allowed = {"torch", "triton", "cupy", "numpy"}  # and the standard library
    files = modules(KERNELS)
    assert files
    for path in files:
        assert own(path) <= {"kernels"}, f"{path.name} imports {own(path)}"
        outside = {name.split(".")[0] for name in imported(path)} - {"fastcascade"}
        unknown = outside - allowed - set(sys.stdlib_module_names)
        assert not unknown, f"{path.name} imports {unknown}"


def test_no_compiled_source_includes_a_torch_header() -> None:
    sources = ROOT.parent / "csrc"
    if not sources.is_dir():
        pytest.skip("sources are not beside the package: it runs from an installed wheel")
    for path in sources.rglob("*"):
        if path.suffix in (".cpp", ".h", ".inl"):
            assert "<torch/" not in path.read_text(), path.name


def test_the_package_imports_without_any_extra() -> None:
    """Nothing optional is imported, so nothing optional can be missing."""
    code = (
        "import sys\n"
        "for name in ('triton', 'cupy', 'pyarrow', 'PIL', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"  # an import of it raises ModuleNotFoundError
        "import fastcascade\n"
        "from fastcascade import backends\n"
        "print([backends.load_backend(n).unavailable_reason() for n in backends.NAMES])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "None" in done.stdout


def test_public_names_are_sorted_and_there() -> None:
    assert list(fastcascade.__all__) == sorted(fastcascade.__all__)
    assert all(hasattr(fastcascade, name) for name in fastcascade.__all__)
