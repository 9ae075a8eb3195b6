"""The int8 kernels for AVX-VNNI and AVX-512 VNNI on any x86-64, with their instructions emulated."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import driver
import pytest
from emulated import FLAGS, emulated_objects
from native import COMPILER, run

pytestmark = [
    COMPILER,
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are for x86-64"),
]


def test_emulated_kernels_return_the_exact_bits(engine_objects: Sequence[Path], tmp_path: Path) -> None:
    objects = emulated_objects(["int8_avxvnni.cpp", "int8_avx512vnni.cpp"], engine_objects, tmp_path)
    status, words = run([driver.link_driver("int8_fuzz", objects, FLAGS), "10"])
    assert status == 0, words
    assert "avx512vnni avxvnni" in words
    assert int(words.split()[-3]) > 50, words
