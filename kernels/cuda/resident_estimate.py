"""Estimates of the resident kernel's speed. Nothing here is measured; reports say "estimated".

For each step: the cycles that tensor cores, shared memory with L1, and L2 of a multiprocessor need per image.
For each stage: those of its steps, and the time in which a block waits, which the other blocks on the
multiprocessor use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastcascade.kernels.cuda.machine import Machine
from fastcascade.kernels.cuda.resident_steps import Step

__all__ = ["StageEstimate", "StepCounts", "estimate_stage", "step_counts"]

SHARED_BYTES_PER_CYCLE = 128
WAIT_LAYER, WAIT_IMAGE, WAIT_HEAD = 700, 3000, 12000
"""Cycles per layer, image and exit in which a block uses no tensor core; guesses, not measurements."""


class StepCounts(NamedTuple):
    """Warp-wide instructions of one run of a step, and their passes through shared memory and L1."""

    mma: int = 0
    load_matrix: int = 0
    load_matrix_passes: int = 0
    wide_loads: int = 0
    other_passes: int = 0

    @property
    def passes(self) -> int:
        """Passes of 128 bytes through shared memory and L1."""
        return self.load_matrix_passes + self.other_passes + 4 * self.wide_loads


class StageEstimate(NamedTuple):
    """One stage on one image: cycles of a multiprocessor, images/s of the GPU, and the bound.

    ``demand``: cycles that its steps need if nothing waits. They overlap across the blocks of a
    multiprocessor; with a single block, each step takes as long as its slowest resource.
    """

    tensor: float
    shared: float
    l2: float
    wait: float
    demand: float
    rate: float
    bound: str


class _Cycles(NamedTuple):
    """Cycles per image of each resource."""

    tensor: float
    shared: float
    l2: float


def step_counts(step: Step, warps: int) -> StepCounts:
    """The counts of one run, on ``step.images`` images. ``tests/gpu`` compares them with the emulator's."""
    if step.kind not in ("conv", "stem"):
        return StepCounts()
    groups = step.groups(warps)
    units = step.units(groups)
    if step.kind == "stem":
        steps = -(-step.kernel * step.kernel // 2)
        loads = units * steps * step.tiles
        epilogue = _epilogue_passes(step, units, groups)
        return StepCounts(2 * loads, loads, loads * 4 * _conflicts(step), units * steps, epilogue)
    rows = (step.tiles - 1) * step.stride + step.kernel
    if step.kernel < step.stride:
        rows = step.tiles
    steps = step.into.channels // 16 * step.kernel
    batch = step.kernel * groups
    loads = units * steps * rows * step.images
    keeps = steps <= 3 and step.out.channels == 16 * groups and batch == 3 and units > warps
    return StepCounts(
        2 * units * steps * batch * step.tiles * step.images,
        loads,
        loads * 4 * _conflicts(step),
        warps * steps * batch if keeps else units * steps * batch,
        _epilogue_passes(step, units, groups),
    )


def _conflicts(step: Step) -> int:
    """Passes of shared memory for 8 rows of ldmatrix, given 8 groups of banks of 16 bytes."""
    pixels = [
        divmod(p, step.columns)[0] * step.tiles * step.stride * (step.into.width + 1)
        + p % step.columns * step.stride
        for p in range(8)
    ]
    groups = [pixel % 8 for pixel in set(pixels)]
    return max(map(groups.count, groups))


def _epilogue_passes(step: Step, units: int, groups: int) -> int:
    """Passes that store the result and load the residual, one for every 8 pixels × 8 channels."""
    tiles = units * groups * step.tiles * step.images
    stores = tiles if step.pooled else 4 * tiles
    return stores + (0 if step.residual is None else 4 * tiles)


def _step_cycles(step: Step, warps: int, machine: Machine) -> _Cycles:
    counts = step_counts(step, warps)
    weights = 0 if step.weight is None else step.weight.numel() * 2
    return _Cycles(
        counts.mma / 4 * machine.mma_cycles / step.images,
        counts.passes * 128 / SHARED_BYTES_PER_CYCLE / step.images,
        weights / (machine.l2_bytes / machine.multiprocessors / machine.clock) / step.images,
    )


def estimate_stage(steps: Sequence[Step], warps: int, blocks: int, machine: Machine) -> StageEstimate:
    """Estimate one stage that runs alone, with ``blocks`` blocks of ``warps`` warps on a multiprocessor."""
    cycles = [_step_cycles(step, warps, machine) for step in steps]
    total = _Cycles(*map(sum, zip(*cycles, strict=True)))
    waits = {"image": WAIT_IMAGE, "head": WAIT_HEAD}
    wait = sum(waits.get(step.kind, WAIT_LAYER) / step.images for step in steps)
    parts = {"tensor cores": total.tensor, "shared memory": total.shared, "L2": total.l2}
    bound = max(parts, key=lambda name: parts[name])
    demand = parts[bound] if blocks > 1 else sum(map(max, cycles))
    rate = _throughput(demand, wait, blocks) * machine.multiprocessors * machine.clock
    return StageEstimate(*total, wait, demand, rate, bound)


def _throughput(demand: float, wait: float, customers: int) -> float:
    """Images per cycle of blocks that share one resource and wait in between, by mean-value analysis."""
    queue = rate = 0.0
    for n in range(1, customers + 1):
        response = demand * (1 + queue)
        rate = n / (response + wait)
        queue = rate * response
    return rate
