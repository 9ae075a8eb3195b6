"""Estimates of the speed of a stage. Nothing here is measured; reports say "estimated".

For the resident kernel: the cycles per image that tensor cores, shared memory with L1, and L2 of a
multiprocessor need, and the time in which a block waits, which other blocks on the multiprocessor use. For
the other ways: bytes and FLOPs over the peaks of the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastcascade.kernels.cuda.resident_plan import Entry, Machine, ResidentPlan, Step
from fastcascade.kernels.layers import Conv, Layer

__all__ = ["Estimate", "StageEstimate", "StepCounts", "estimate", "launch_rates", "step_counts"]

SHARED_BYTES_PER_CYCLE = 128
WAIT_LAYER, WAIT_IMAGE, WAIT_HEAD = 700, 3000, 12000
"""Cycles per layer, image and exit in which a block uses no tensor core; guesses, not measurements."""

TRITON_SHARE = 0.4
"""Share of the tensor cores' peak that a Triton convolution of these sizes reaches; a guess."""


class StepCounts(NamedTuple):
    """Warp-wide instructions of one step on one image, and their passes through shared memory and L1."""

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
    """One stage on one image: cycles of a multiprocessor, images/s of the GPU, and the bound."""

    tensor: float
    shared: float
    l2: float
    wait: float
    rate: float
    bound: str


@dataclass(frozen=True)
class Estimate:
    """The stages of a plan, each alone."""

    stages: tuple[StageEstimate, ...]


def step_counts(entry: Entry, warps: int) -> StepCounts:
    """The counts of one step. ``tests/gpu/test_resident.py`` compares them with the emulator's."""
    step = entry.step
    if step.kind not in ("conv", "stem"):
        return StepCounts()
    groups = step.groups(warps)
    units = step.units(groups)
    if step.kind == "stem":
        steps = -(-step.kernel * step.kernel // 2)
        loads = units * steps * step.tiles
        return StepCounts(
            2 * loads,
            loads,
            loads * 4 * _conflicts(step),
            units * steps,
            _epilogue_passes(entry, units),
        )
    rows = (step.tiles - 1) * step.stride + step.kernel
    if step.kernel < step.stride:
        rows = step.tiles
    steps = step.into.channels // 16 * step.kernel
    batch = step.kernel * groups
    loads = units * steps * rows
    keeps = steps <= 3 and step.out.channels == 16 * groups and batch == 3 and units > warps
    fragments = warps * steps * batch if keeps else units * steps * batch
    conflicts = _conflicts(step)
    return StepCounts(
        2 * units * steps * batch * step.tiles,
        loads,
        loads * 4 * conflicts,
        fragments,
        _epilogue_passes(entry, units),
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


def _epilogue_passes(entry: Entry, units: int) -> int:
    """Passes that store the result and load the residual, one for every 8 pixels × 8 channels."""
    step = entry.step
    tiles = units * step.groups(4) * step.tiles
    stores = tiles if step.pooled else 4 * tiles
    return stores + (0 if step.residual is None else 4 * tiles)


def estimate(plan: ResidentPlan) -> Estimate:
    """Estimate every stage of a plan, alone."""
    stages = max(entry.stage for entry in plan.entries) + 1
    return Estimate(tuple(_stage(plan, [e for e in plan.entries if e.stage == k]) for k in range(stages)))


def _stage(plan: ResidentPlan, entries: Sequence[Entry]) -> StageEstimate:
    machine = plan.machine
    counts = [step_counts(entry, plan.warps) for entry in entries]
    tensor = sum(c.mma for c in counts) / 4 * machine.mma_cycles
    shared = float(sum(c.passes for c in counts)) * 128 / SHARED_BYTES_PER_CYCLE
    weights = sum(e.step.weight.numel() * 2 for e in entries if e.step.weight is not None)
    l2 = weights / (machine.l2_bytes / machine.multiprocessors / machine.clock)
    wait = float(sum({"image": WAIT_IMAGE, "head": WAIT_HEAD}.get(e.step.kind, WAIT_LAYER) for e in entries))
    parts = {"tensor cores": tensor, "shared memory": shared, "L2": l2}
    bound = max(parts, key=lambda name: parts[name])
    rate = _throughput(parts[bound], wait, plan.blocks) * machine.multiprocessors * machine.clock
    return StageEstimate(tensor, shared, l2, wait, rate, bound)


def _throughput(demand: float, wait: float, customers: int) -> float:
    """Images per cycle of blocks that share one resource and wait in between, by mean-value analysis."""
    queue = rate = 0.0
    for n in range(1, customers + 1):
        response = demand * (1 + queue)
        rate = n / (response + wait)
        queue = rate * response
    return rate


def launch_rates(layers: Sequence[Layer], machine: Machine) -> dict[str, float]:
    """Images/s of the other ways to run a stage: "persistent" (one launch), "layers" (one for each).

    Both compute at :data:`TRITON_SHARE` of the tensor cores' peak and overlap nothing. A launch per layer
    moves every activation through device memory; one launch moves them, and the weights for every image,
    through L2.
    """
    flops = moved = weights = 0.0
    for layer in layers:
        out = math.prod(layer.work.out)
        if isinstance(layer.work, Conv):
            shape = layer.work.shape
            taps = shape.kernel[0] * shape.kernel[1] * max(shape.channels, 16)
            flops += (
                2.0
                * shape.out_height
                * shape.out_width
                * taps
                * max(out // shape.out_height // shape.out_width, 16)
            )
            moved += 2.0 * (shape.height * shape.width * shape.channels + out)
        else:
            moved += 2.0 * (math.prod(layer.work.source) + out)
        moved += 0.0 if layer.other is None else 2.0 * out
        weights += 0.0 if layer.weight is None else 2.0 * layer.weight.numel()
    # m16n8k16 is 4,096 FLOPs; at wgmma's rate, which is mma.sync's before Hopper.
    cycles = 4.0 if machine.capability >= (9, 0) else machine.mma_cycles
    compute = flops / (machine.multiprocessors * machine.clock * 4 * 4096 / cycles * TRITON_SHARE)
    return {
        "persistent": 1 / (compute + (moved + weights) / machine.l2_bytes),
        "layers": 1 / (compute + moved / machine.memory_bytes),
    }
