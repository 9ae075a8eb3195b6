"""Import directions between the folders of the package, and its required dependencies."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastcascade

ROOT = Path(fastcascade.__file__).parent
KERNELS = Path(next(iter(__import__("fastcascade.kernels").kernels.__path__)))

REPOSITORY = Path(__file__).parents[1]

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "text": set(),
    "types": {"errors"},
    "pixel_scale": {"errors", "types"},
    "storage": {"errors"},
    "model": {"errors", "types", "pixel_scale", "storage", "kernels"},
    "data": {"errors", "types", "storage"},
    "evaluation": set("errors text types storage kernels model data lowering engine".split()),
    "training": {"errors", "types", "storage", "kernels", "model", "data", "evaluation"},
    "lowering": {"errors", "types", "storage", "kernels", "model"},
    "interchange": {"errors", "types", "storage", "kernels", "lowering"},
    "scikit_learn": {"errors", "types", "model", "evaluation", "training", "engine"},
    "testing": {"errors", "types", "kernels", "model", "lowering"},
    "runtime": {"errors", "storage", "_C"},
    "backends": {"errors", "types", "kernels", "lowering", "_C"},
    "engine": {"errors", "text", "types", "pixel_scale", "model", "data", "lowering", "backends"},
    "prediction": set("errors text types storage data model lowering engine".split()),
    "benchmarking": set("errors text types storage model data evaluation lowering backends engine".split()),
}
"""For each folder or module of the package, the others that it may import. There is no cycle."""

ENTRANCES = {"__init__", "__main__", "cli"}
"""Modules that may import everything."""


def imported(path: Path) -> set[str]:
    """The names of all modules that a file imports anywhere, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "fastcascade":
            names.update(f"fastcascade.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def rooms_imported(path: Path) -> set[str]:
    """The folders or modules of the package that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("fastcascade.")}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py"))


@pytest.mark.parametrize("path", modules(ROOT), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_allowed_directions(path: Path) -> None:
    room = room_of(path)
    if room in ENTRANCES | {"kernels"}:
        return
    assert room in ROOMS, f"{path.name} is in {room}, which is not in ROOMS; add it"
    outward = rooms_imported(path) - ROOMS[room] - {room}
    assert not outward, f"{path.name} imports {sorted(outward)}; {room} may import {sorted(ROOMS[room])}"


def test_every_room_exists_and_there_is_no_cycle() -> None:
    present = {room_of(path) for path in modules(ROOT)}
    assert set(ROOMS) <= present, f"{sorted(set(ROOMS) - present)} are in ROOMS, but do not exist"
    settled: set[str] = {"kernels", "_C"}
    while ready := {room for room, needs in ROOMS.items() if needs <= settled} - settled:
        settled |= ready
    assert settled >= set(ROOMS), f"cycle among {sorted(set(ROOMS) - settled)}"


@pytest.mark.parametrize("package", [p.parent for p in modules(ROOT) if p.name == "__init__.py"], ids=str)
def test_every_package_has_a_docstring_of_one_line(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    assert docstring, package
    assert "\n" not in docstring.partition("\n\n")[0], package


def test_no_public_name_hides_a_module() -> None:
    for name in fastcascade.__all__:
        there = (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()
        assert not there, f"fastcascade.{name} is both a public name and a module"


def test_kernels_import_no_other_part_of_the_package() -> None:
    allowed = {"torch", "triton", "cupy", "numpy"}  # and the standard library
    files = modules(KERNELS)
    assert files
    for path in files:
        assert rooms_imported(path) <= {"kernels"}, f"{path.name} imports {rooms_imported(path)}"
        outside = {name.split(".")[0] for name in imported(path)} - {"fastcascade"}
        unknown = outside - allowed - set(sys.stdlib_module_names)
        assert not unknown, f"{path.name} imports {unknown}"


def test_no_compiled_source_includes_a_torch_header() -> None:
    sources = [p for p in (REPOSITORY / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".inl")]
    assert sources
    for path in sources:
        text = path.read_text()
        assert "<torch/" not in text, path.name
        assert "<ATen/" not in text, path.name


def test_the_package_imports_without_any_extra() -> None:
    """Importing the package and its backends works without any optional dependency."""
    code = (
        "import sys\n"
        "for name in ('triton', 'cupy', 'pyarrow', 'PIL', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"  # importing it raises ModuleNotFoundError
        "import fastcascade\n"
        "from fastcascade.backends.registry import NAMES, load_backend\n"
        "print([load_backend(n).unavailable_reason() for n in NAMES])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "None" in done.stdout


def test_public_names_exist_and_are_sorted() -> None:
    assert list(fastcascade.__all__) == sorted(fastcascade.__all__)
    assert all(hasattr(fastcascade, name) for name in fastcascade.__all__)


def test_the_design_page_names_every_module() -> None:
    page = (REPOSITORY / "docs" / "design.md").read_text()
    entrances = {"__init__.py", "__main__.py"}
    operators = ROOT / "lowering" / "operators"  # described as one
    files = [path for path in modules(ROOT) if path.name not in entrances and operators not in path.parents]
    missing = [str(p.relative_to(ROOT)) for p in files if p.name not in page and "kernels" not in p.parts]
    assert not missing, f"docs/design.md does not say what these hold: {missing}"
