"""The resident kernel in the emulator of ``gpu/emulator``: compiled for some plans, started like a kernel."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from host_threads import COMPILER, missing_compiler

from fastcascade.kernels.cuda import launch
from fastcascade.kernels.cuda.resident import (
    ResidentCascade,
    ResidentExit,
    ResidentLaunch,
    images_taken,
    preamble,
)
from fastcascade.kernels.cuda.resident_plan import ResidentPlan
from fastcascade.kernels.cuda.resident_table import ENTRY_INTS, ResidentTable, resident_table

FOLDER = Path(__file__).parents[1] / "gpu" / "emulator"
COUNTS = "mma load_matrix load_matrix_passes shared shared_passes wide_loads barriers races deadlocks".split()


def missing_emulator() -> str | None:
    """Why the emulator cannot be built here; None if it can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator's fibers are for x86-64, not {platform.machine()}"
    return missing_compiler()


class Options(ctypes.Structure):
    """The struct of the same name in ``emulator.hpp``."""

    _fields_ = tuple(
        (name, ctypes.c_int) for name in ("backward", "trace", "left_out", "stop_at_race", "swap_b")
    )


def build(folder: Path, table: ResidentTable, *changes: tuple[str, str]) -> ctypes.CDLL:
    """Compile the kernel and the emulator for a table's layers.

    Args:
        changes: (old, new) in the kernel's source: planted faults. Each old text must occur.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = preamble(table) + launch.source("resident.cuh")
    for old, new in changes:
        assert old in text, f"the kernel has no {old!r}"
        text = text.replace(old, new)
    (folder / "resident.cuh").write_text("#pragma once\n" + text)
    library = folder / "resident.so"
    options = "-std=c++20 -O1 -march=native -shared -fPIC -pthread -Wall -Wextra -Werror -Wno-unknown-pragmas"
    command = [COMPILER, *options.split(), f"-I{folder}", str(FOLDER / "resident.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    sizes = (ctypes.c_int * 3)()
    loaded.sizes_of_structs(sizes)
    assert list(sizes) == [4 * ENTRY_INTS, ctypes.sizeof(ResidentExit), ctypes.sizeof(ResidentCascade)]
    return loaded


def union(plans: Iterable[ResidentPlan]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers and heads of several plans, which one compilation can hold."""
    types: dict[str, None] = {}
    heads: dict[str, None] = {}
    for plan in plans:
        own_types, own_heads = plan.type_names()
        types |= dict.fromkeys(own_types)
        heads |= dict.fromkeys(own_heads)
    return tuple(types), tuple(heads)


def shared_table(plan: ResidentPlan, types: Sequence[str], heads: Sequence[str]) -> ResidentTable:
    """A plan's table for a compilation that it shares."""
    return resident_table(plan, types, heads)


@dataclass
class EmulatedResident(ResidentLaunch):
    """Starts the kernel in the emulator.

    Attributes:
        blocks: one OS thread each.
        backward … swap_b: see ``Options`` in ``emulator.hpp``.
        counts: of the last launch.
    """

    library: ctypes.CDLL
    blocks: int = 1
    backward: bool = False
    trace: bool = False
    left_out: int = -1
    stop_at_race: bool = False
    swap_b: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device("cpu")

    def start(self, table: ResidentTable, cascade: ResidentCascade) -> None:
        """See :meth:`fastcascade.kernels.cuda.resident.ResidentLaunch.start`."""
        cascade.taken = images_taken(table, cascade.count, self.blocks)
        options = Options(self.backward, self.trace, self.left_out, self.stop_at_race, self.swap_b)
        counts = (ctypes.c_longlong * len(COUNTS))()
        self.library.run_cascade_emulated(
            ctypes.byref(cascade), table.plan.shared_bytes, self.blocks, ctypes.byref(options), counts
        )
        self.counts = dict(zip(COUNTS, counts, strict=True))
