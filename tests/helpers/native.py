"""Builds of the engine's torch-free drivers for tests, with or without a planted fault."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import driver
import pytest

COMPILER = pytest.mark.skipif(
    driver.missing_tools("g++") is not None, reason=str(driver.missing_tools("g++"))
)


@dataclass(frozen=True)
class Fault:
    """A fault planted in one file of a copy of the engine: ``old`` becomes ``new``."""

    name: str
    file: str
    old: str
    new: str

    def plant(self, objects: Sequence[Path], folder: Path) -> list[Path]:
        """The engine's objects, with the faulty file compiled into ``folder``."""
        source = folder / "csrc"
        shutil.copytree(driver.SOURCE, source)
        spoilt = source / self.file
        text = spoilt.read_text()
        assert text.count(self.old) == 1, f"{self.file} no longer holds {self.old!r} once; plant it elsewhere"
        spoilt.write_text(text.replace(self.old, self.new))
        target = driver.compile_file(spoilt, folder, driver.PACKAGE_FLAGS)
        return [target, *(o for o in objects if o.name != target.name)]


MISSING_TILE = Fault(
    "the last tile is missing",
    "network.cpp",
    "step.work = ((out.shape.h + 3) / 4) * ((out.shape.w + 3) / 4);",
    "step.work = ((out.shape.h + 3) / 4) * ((out.shape.w + 3) / 4) - 1;",
)
MISSING_PIXELS = Fault(
    "pixels that do not fill the registers are missing",
    "steps.cpp",
    "mine = {0, positions};",
    "mine = {0, positions / kernels.tile_rows * kernels.tile_rows};",
)
WASTED_FIFTH = Fault(
    "a fifth of every tile runs twice",
    "executor.cpp",
    "mine.size(), {}, nullptr);",
    "mine.size(), {}, nullptr);\n"
    "run_network(net, source(stage, mine.rows.data(), mine.slots.data()), self.arena.data(),"
    " self.scratch.data(), (mine.size() + 4) / 5, {}, nullptr);",
)
EXTRA_PASS = Fault(
    "one more pass over the input",
    "steps.cpp",
    "load(out, source, source.rows[first + n], y + n * out.floats, part(step.work, 1, share));",
    "for (int pass = 0; pass < 2; ++pass)"
    " load(out, source, source.rows[first + n], y + n * out.floats, part(step.work, 1, share));",
)
BF16_LAYER = Fault(
    "one layer multiplies in bf16",
    "pack.cpp",
    "kernels.transform_weights_f32(packed.plain.data(), plane / lanes, packed.transformed.data(), plane);",
    "kernels.transform_weights_f32(packed.plain.data(), plane / lanes, packed.transformed.data(), plane);"
    " for (int64_t j = 0; d.in == 16 && j < packed.transformed.size(); ++j) {"
    " uint32_t bits; __builtin_memcpy(&bits, packed.transformed.data() + j, 4);"
    " bits = (bits + 0x8000) & 0xffff0000u; __builtin_memcpy(packed.transformed.data() + j, &bits, 4); }",
)


def run(command: Sequence[str | Path]) -> tuple[int, str]:
    """The exit status and the output."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr
