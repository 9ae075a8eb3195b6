"""Builds of the engine without Python, with the package's flags or a sanitizer, and its drivers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "csrc"
PACKAGE_FLAGS = ("-O3", "-fno-math-errno", "-fPIC")  # those of setup.py


def missing_tools(*names: str) -> str | None:
    """The programs that are not installed, as a reason to skip; None if all are."""
    missing = [name for name in names if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def compile_engine(folder: Path, flags: Sequence[str] = PACKAGE_FLAGS, source: Path = SOURCE) -> list[Path]:
    """Compile the engine without its Python module; returns the objects, sorted by name."""
    sources = sorted([*source.glob("*.cpp"), *source.glob("isa/*.cpp")])
    engine = [path for path in sources if path.name != "module.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda path: compile_file(path, folder, flags), engine))


def compile_file(source: Path, folder: Path, flags: Sequence[str]) -> Path:
    """Compile one file into a folder; returns the object."""
    target = folder / f"{source.stem}.o"
    subprocess.run(["g++", "-std=c++17", *flags, "-c", source, "-o", target], check=True)
    return target


def link_driver(name: str, objects: Sequence[Path], flags: Sequence[str] = PACKAGE_FLAGS) -> Path:
    """Compile csrc/driver/NAME.cpp and link it with the engine's objects; returns the program."""
    folder = objects[0].parent
    target = folder / name
    driver = compile_file(SOURCE / "driver" / f"{name}.cpp", folder, flags)
    subprocess.run(["g++", *flags, *objects, driver, "-pthread", "-o", target], check=True)
    return target
