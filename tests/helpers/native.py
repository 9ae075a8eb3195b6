"""Builds of the engine's torch-free drivers for tests, with or without a planted fault."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import driver
import pytest

COMPILER = pytest.mark.skipif(
    driver.missing_tools("g++") is not None, reason=str(driver.missing_tools("g++"))
)


TESTS = Path(__file__).parents[1]
PLUGIN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastcascade._C", {path!r})
sys.modules["fastcascade._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fastcascade._C"])
"""


@dataclass(frozen=True)
class Fault:
    """A fault planted in one file of a copy of the engine: ``old`` becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    unit: str = ""  # the instruction set's file that includes ``file``; "" where it is compiled itself

    def plant(self, objects: Sequence[Path], folder: Path) -> list[Path]:
        """The engine's objects, with the faulty file compiled into ``folder``."""
        source = folder / "csrc"
        shutil.copytree(driver.SOURCE, source)
        spoilt = self.spoil(source)
        unit = source / "isa" / self.unit if self.unit else spoilt
        target = driver.compile_file(unit, folder, driver.PACKAGE_FLAGS)
        return [target, *(o for o in objects if o.name != target.name)]

    def spoil(self, source: Path) -> Path:
        """Plant the fault in a copy of the engine's sources; returns the file."""
        spoilt = source / self.file
        text = spoilt.read_text()
        assert text.count(self.old) == 1, f"{self.file} no longer holds {self.old!r} once; plant it elsewhere"
        spoilt.write_text(text.replace(self.old, self.new))
        return spoilt


MISSING_TILE = Fault(
    "the last tile is missing",
    "step_builder.cpp",
    "step.work_items = ((c.height + 3) / 4) * ((c.width + 3) / 4);",
    "step.work_items = ((c.height + 3) / 4) * ((c.width + 3) / 4) - 1;",
)
WIDE_EDGE = Fault(
    "a pixel at the right side of the map takes the taps of an inner one",
    "generic/pixel_runs.inl",
    "last / stride + 1",
    "last / stride + 2",
    "avx2.cpp",
)
MISSING_PIXELS = Fault(
    "the last rows and tiles of a thread's share are missing",
    "step_parts.cpp",
    "  const int64_t units = (count + unit - 1) / unit;",
    "  if (parts > 1) count = count / 6 * 6;\n  const int64_t units = (count + unit - 1) / unit;",
)
WASTED_FIFTH = Fault(
    "a fifth of every tile runs twice",
    "team_schedule.cpp",
    "buffers.scratch.data(), tile);",
    "buffers.scratch.data(), tile);\n"
    "run_steps(net, source(stage, first), buffers.arena.data(), buffers.scratch.data(), (tile + 4) / 5);",
)
LEFT_WAITING = Fault(
    "survivors that fill no tiles are left when a batch ends",
    "team_schedule.cpp",
    "if (stage == 0 || next_instance_ == run_.images.count) return waiting;",
    "if (stage == 0) return waiting;",
)
EXTRA_PASS = Fault(
    "one more pass over the input",
    "run_step.cpp",
    "load_lines(net, source, first + n,",
    "for (int pass = 0; pass < 2; ++pass) load_lines(net, source, first + n,",
)
BF16_LAYER = Fault(
    "one layer multiplies in bf16",
    "pack.cpp",
    "packed.transformed.data() + 36 * g * plane, plane);",
    "packed.transformed.data() + 36 * g * plane, plane);"
    " for (int64_t j = 0; m.in == 16 && j < packed.transformed.size(); ++j) {"
    " uint32_t bits; __builtin_memcpy(&bits, packed.transformed.data() + j, 4);"
    " bits = (bits + 0x8000) & 0xffff0000u; __builtin_memcpy(packed.transformed.data() + j, &bits, 4); }",
)
NARROWED_AFFINITY = Fault(
    "a helper keeps its narrowed affinity",
    "threads.cpp",
    "if (sched_setaffinity(0, sizeof allowed, &allowed) == 0) return;",
    "return;",
)
PART_TWICE = Fault(
    "two threads run the same part of a step",
    "team.cpp",
    "last >= member.phase ||",
    "last > member.phase ||",
)
PATIENT_TEAM = Fault(
    "threads wait for one that has lost its processor",
    "team.cpp",
    "closed_.store(true, std::memory_order_relaxed);",
    "",
)
SHORT_SQUEEZE = Fault(
    "a global pool leaves out the last row",
    "generic/pool.inl",
    "for (int64_t r = 1; r < rows; ++r)",
    "for (int64_t r = 1; r < rows - (rows > 5); ++r)",
    "avx2.cpp",
)
EARLY_GATE = Fault(
    "a gate comes before the activation",
    "generic/elementwise.inl",
    "    if (!lone_function) combine_pixels(c, run);\n",
    "    if (c.combine == Combine::multiply && c.activation.is_function()) {\n"
    "      apply_function(c.activation, run.a, run.y, c.pitch, count, c.pitch / kLanes);\n"
    "      run.a = run.y;\n"
    "      combine_pixels(c, run);\n"
    "      continue;\n"
    "    }\n"
    "    if (!lone_function) combine_pixels(c, run);\n",
    "avx2.cpp",
)
PADDED_SOFTMAX = Fault(
    "a softmax counts padded channels",
    "generic/channels.inl",
    "const V factor = broadcast(1.f / channel_sum(y, channels));",
    "const V factor = broadcast(1.f / channel_sum(y, (channels + kLanes - 1) / kLanes * kLanes));",
    "avx2.cpp",
)
UNCHECKED_CLASS = Fault(
    "the finite check skips the last class",
    "exit_head.cpp",
    "for (int64_t i = 0; i < n; ++i)\n    if (!std::isfinite(x[i])) return false;",
    "for (int64_t i = 0; i < n - 1; ++i)\n    if (!std::isfinite(x[i])) return false;",
)
LOST_CLASS = Fault(
    "log-sum-exp loses the last class where n % 8 == 1",
    "exit_head.cpp",
    "if (i != skip) sum += std::exp(x[i] - top);",
    "if (i != skip && !(n % 8 == 1 && i == n - 1)) sum += std::exp(x[i] - top);",
)
UNLIMITED_PIXELS = Fault(
    "pixels have no limit",
    "layout_steps.cpp",
    "return std::fabs(x) <= kMaxPixel ? x : nan;",
    "return std::isnan(x) ? nan : x;",
)

ZERO_BORDER = Fault(
    "padding of gathered bytes is 0, not the zero point",
    "generic/int8_terms.inl",
    "fill_terms(row, row_terms, c.zero_point);",
    "fill_terms(row, row_terms, 0);",
    "int8_avx2.cpp",
)
ZERO_ROWS = Fault(
    "padded rows of bytes are 0, not the zero point",
    "generic/int8_terms.inl",
    "fill_terms(to, row_terms, c.zero_point);",
    "fill_terms(to, row_terms, 0);",
    "int8_avx2.cpp",
)
ZERO_SIDES = Fault(
    "rows of bytes are padded by 0, not by the zero point",
    "generic/int8_terms.inl",
    "fill_terms(to + end, row_terms - end, c.zero_point);",
    "fill_terms(to + end, row_terms - end, 0);",
    "int8_avx2.cpp",
)
BYTE_WIDE_TILE = Fault(
    "tiles of Winograd on bytes end beyond an odd map",
    "generic/int8_winograd.inl",
    "right = at.x + 1 < width,",
    "right = true,",
    "int8_avx2.cpp",
)
SATURATED_PAIRS = Fault(
    "pairs of products saturate at 16 bits",
    "isa/int8_avx2.cpp",
    "const I product = _mm256_madd_epi16(x, w);",
    "const I most = _mm256_set1_epi32(32767), least = _mm256_set1_epi32(-32768);\n"
    "  const I product = _mm256_max_epi32(_mm256_min_epi32(_mm256_madd_epi16(x, w), most), least);",
)
ONE_MULTIPLIER = Fault(
    "one multiplier serves all output channels",
    "int8_steps.cpp",
    "step.int8.multiplier = s.multiplier;",
    "step.int8.multiplier.assign(s.multiplier.size(), s.multiplier[0]);",
)
SILENT_NAN = Fault(
    "a NaN becomes a byte, and nobody is told",
    "generic/int8_others.inl",
    "__atomic_store_n(invalid + instance, 1, __ATOMIC_RELAXED);",
    "__atomic_store_n(invalid + instance, 0, __ATOMIC_RELAXED);",
    "int8_avx2.cpp",
)
LOUD_NAN = Fault(
    "a NaN makes the image before it invalid, too",
    "generic/int8_others.inl",
    "for (int64_t k = i; k < end; ++k) rest[k - i] = x[k];",
    "for (int64_t k = i; k < i + kLanes; ++k) rest[k - i] = x[k];",
    "int8_avx2.cpp",
)
EQUAL_PIXELS = Fault(
    "joined pixels all have the weights of the first",
    "int8_steps.cpp",
    "(tap % runs.taps + pixel * runs.pixel_taps) * runs.tap_terms + i;",
    "(tap % runs.taps + 0 * pixel) * runs.tap_terms + i;",
)
UNFINISHED_BLOCK = Fault(
    "the last block of sums in tiles is not finished",
    "isa/int8_amx_tiles.inl",
    "~TileProducts() { finish_waiting(); }",
    "~TileProducts() {}",
    "int8_amx.cpp",
)
TRUNCATED_WEIGHTS = Fault(
    "weights are cut off to bf16, not rounded",
    "pack.cpp",
    "(bits + 0x7fff + (bits >> 16 & 1)) >> 16",
    "bits >> 16",
)
SWAPPED_PAIR = Fault(
    "the terms of a pair of weights are swapped",
    "pack.cpp",
    "+ (o - first) * terms + at % terms]",
    "+ (o - first) * terms + (terms - 1 - at % terms)]",
)
OPEN_PAIR = Fault(
    "the last pair of an odd number of channels ends in the next pixel's first",
    "generic/bf16.inl",
    "if (c.channels % 2)",
    "if (c.channels < 0)",
)
SPLIT_PAIR = Fault(
    "groups of odd numbers of channels count in pairs",
    "step_builder.cpp",
    "merged.groups == 1 || merged.in % 2 == 0;",
    "true;",
)
STALE_ROUNDING = Fault(
    "all layers read the first value that was rounded",
    "step_builder.cpp",
    "const auto known = rounded_.find(value);",
    "const auto known = rounded_.begin();",
)
BF16_LOGITS = Fault(
    "the layer that makes the logits multiplies in bf16",
    "step_builder.cpp",
    "&& op.output != net_.logits;",
    ";",
)


def run(command: Sequence[str | Path]) -> tuple[int, str]:
    """The exit status and the output."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def run_tests(objects: Sequence[Path], folder: Path, tests: str, name: str) -> tuple[int, str]:
    """Run the tests of one file whose names hold ``name`` on an engine made of these objects."""
    engine = folder / "_C.so"
    subprocess.run(["g++", "-shared", *objects, "-pthread", "-o", engine], check=True)
    (folder / "planted.py").write_text(PLUGIN.format(path=str(engine)))
    options = [
        "-x",
        "-p",
        "planted",
        "-p",
        "no:cacheprovider",
        "-c",
        TESTS.parent / "pyproject.toml",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", name, TESTS / "cpu" / tests],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    return done.returncode, done.stdout + done.stderr
