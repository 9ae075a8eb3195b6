"""The int8 kernels for AVX-VNNI and AVX-512 VNNI on any x86-64, with their instructions emulated."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import driver
import pytest
from native import COMPILER

pytestmark = [
    COMPILER,
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are for x86-64"),
]
HEADER = Path(__file__).parents[1] / "helpers" / "emulated_vnni.h"


def emulate(source: Path) -> None:
    """Make a copy of the engine run its VNNI kernels without the instructions."""
    for name in ("avxvnni", "avx512vnni"):
        path = source / "isa" / f"int8_{name}.cpp"
        text = path.read_text().replace("<immintrin.h>", f'"{HEADER}"')
        text = re.sub(r'(target\(+)"[^"]*"', r'\1"avx2"', text)
        path.write_text(text.replace('"+v"', '"+m"'))
    dispatch = source / "dispatch.cpp"
    text = re.sub(r"(has_avx(512)?vnni\(\) \{)", r"\1 return true;", dispatch.read_text())
    dispatch.write_text(text)


def test_emulated_kernels_return_the_exact_bits(engine_objects: Sequence[Path], tmp_path: Path) -> None:
    source = tmp_path / "csrc"
    shutil.copytree(driver.SOURCE, source)
    emulate(source)
    units = [source / "dispatch.cpp", *(source / "isa" / f"int8_{n}.cpp" for n in ("avxvnni", "avx512vnni"))]
    ours = [driver.compile_file(unit, tmp_path, ("-O2", "-fPIC")) for unit in units]
    names = {target.name for target in ours}
    objects = [*ours, *(target for target in engine_objects if target.name not in names)]
    program = driver.link_driver("int8_fuzz", objects, ("-O2", "-fPIC"))
    done = subprocess.run([program, "10"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "avx512vnni avxvnni" in done.stdout
    assert int(done.stdout.split()[-3]) > 50, done.stdout
