"""The engine's kernels for AVX-512, BF16 and VNNI on any x86-64, with their instructions emulated."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import driver
from native import Fault

HEADER = Path(__file__).with_name("emulated_avx512.h")
TARGETS = {
    "avx512.cpp": "avx2,fma",
    "bf16_avx512.cpp": "avx2,fma",
    "int8_avx512vnni.cpp": "avx2",  # fused multiply-adds would round once where the kernels round twice
    "int8_avxvnni.cpp": "avx2",
}
FLAGS = ("-O1", "-fno-tree-sra", "-fno-math-errno", "-fPIC")


def emulated_objects(
    units: Sequence[str], objects: Sequence[Path], folder: Path, fault: Fault | None = None
) -> list[Path]:
    """The engine's objects, with emulated files of ``csrc/isa/`` and a CPU that has all instructions.

    Args:
        fault: planted in one of the units, in what they include, or in another file of the engine.
    """
    source = folder / "csrc"
    shutil.copytree(driver.SOURCE, source)
    files = {source / "dispatch.cpp", *(source / "isa" / unit for unit in units)}
    if fault is not None:
        spoilt = fault.spoil(source)
        files |= {spoilt} if spoilt.suffix == ".cpp" else set()
    for unit, target in TARGETS.items():
        path = source / "isa" / unit
        text = path.read_text().replace("<immintrin.h>", f'"{HEADER}"')
        text = re.sub(r'(target\(+)"[^"]*"', rf'\1"{target}"', text)
        path.write_text(text)
    for path in [*(source / "isa" / unit for unit in TARGETS), *(source / "isa").glob("*.inl")]:
        path.write_text(path.read_text().replace('"+v"', '"+m"'))  # emulated vectors are in memory
    dispatch = source / "dispatch.cpp"
    text = re.sub(r"(bool has_avx(512|vnni)\w*\(\) \{)", r"\1 return true;", dispatch.read_text())
    dispatch.write_text(text)
    ours = [driver.compile_file(path, folder, FLAGS) for path in sorted(files)]
    names = {target.name for target in ours}
    return [*ours, *(target for target in objects if target.name not in names)]
