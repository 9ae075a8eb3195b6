"""The resident kernel's table of layers and packed weights, from a plan.

``resident_table.cuh`` has the structs that the kernel reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastcascade.kernels.cuda.resident_plan import MOST_WARPS, Entry, ResidentPlan

__all__ = ["ENTRY_INTS", "ResidentTable", "fragments", "resident_table"]

ENTRY_INTS = 12 + MOST_WARPS
"""Size of a ResidentLayer in ``resident_table.cuh``."""

SLACK = 16 * 32 * 8
"""Padding after the last weights, in fp16 numbers: a layer loads its first fragments unconditionally."""


@dataclass(frozen=True)
class ResidentTable:
    """The stages in the form that the kernel reads.

    Attributes:
        layers: (entries, ENTRY_INTS) int32.
        stages: (stages, 4) int32: of each stage, its first entry, its first deep one, its head, its group.
        weights: fp16 fragments.
        vectors: float32 biases and linear layers.
        types, heads: the compiled templates. An entry begins with an index into one of them.
    """

    plan: ResidentPlan
    layers: Tensor
    stages: Tensor
    weights: Tensor
    vectors: Tensor
    types: tuple[str, ...]
    heads: tuple[str, ...]

    def to(self, device: torch.device) -> ResidentTable:
        """A copy on a device."""
        names = ("layers", "stages", "weights", "vectors")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def weight_bytes(self) -> int:
        """Bytes of table, weights and biases."""
        return sum(t.numel() * t.element_size() for t in (self.layers, self.weights, self.vectors))


def resident_table(
    plan: ResidentPlan, types: Sequence[str] | None = None, heads: Sequence[str] | None = None
) -> ResidentTable:
    """Make the table and pack the weights.

    Args:
        types, heads: templates that include the plan's own, so that tests compile once for many plans.
    """
    own_types, own_heads = plan.type_names()
    types, heads = tuple(types or own_types), tuple(heads or own_heads)
    rows, weights, vectors = [], [], []
    weight_end = vector_end = 0
    for entry in plan.entries:
        step = entry.step
        names = heads if step.kind == "head" else types
        packed, firsts = _packed(entry, plan.warps)
        vector = _vector(entry)
        rows.append(
            [
                names.index(step.type_name(plan.warps)),
                names.index(step.type_name(plan.warps, step.images)),
                entry.source,
                entry.output,
                entry.residual,
                entry.source_step,
                entry.output_step,
                entry.residual_step,
                entry.flags,
                vector_end,
                *_window(entry),
                *(weight_end // 8 + first for first in firsts),
            ]
        )
        weights.append(packed)
        vectors.append(vector)
        weight_end += packed.numel()
        vector_end += vector.numel()
    return ResidentTable(
        plan,
        layers=torch.tensor(rows, dtype=torch.int32),
        stages=torch.tensor(_stages(plan), dtype=torch.int32),
        weights=torch.cat([*weights, torch.zeros(SLACK, dtype=torch.float16)]),
        vectors=torch.cat(vectors).float(),
        types=types,
        heads=heads,
    )


def _stages(plan: ResidentPlan) -> list[list[int]]:
    """Of each stage: its first entry, the first that runs on a group, its head, the size of its group."""
    rows, first = [], 0
    for k, group in enumerate(plan.groups):
        head = first + len(plan.stage(k)) - 1
        rows.append([first, first + group.deep if group.images > 1 else head, head, group.images])
        first = head + 1
    return rows


def _packed(entry: Entry, warps: int) -> tuple[Tensor, list[int]]:
    """Fragments of a step, and the position of each warp's first fragment, in units of 16 bytes."""
    step, firsts = entry.step, [0] * MOST_WARPS
    if step.weight is None or step.kind == "head":
        return torch.empty(0, dtype=torch.float16), firsts
    if step.kind == "stem":
        return pack_stem(step.weight).flatten(), firsts
    groups = step.groups(warps)
    packed = pack_conv(step.weight, groups)
    stream = packed[0].numel() // 8
    firsts = [min(warp // step.column_passes, len(packed) - 1) * stream for warp in range(MOST_WARPS)]
    return packed.flatten(), firsts


def _vector(entry: Entry) -> Tensor:
    """Biases. A head has a row of classes per channel after them."""
    step = entry.step
    if step.bias is None:
        return torch.empty(0)
    if step.kind == "head":
        assert step.weight is not None
        return torch.cat([step.bias[None], step.weight]).flatten()
    return step.bias.flatten()


def _window(entry: Entry) -> tuple[int, int]:
    """Sizes of a pooling's window, one byte each."""
    work = entry.step.window
    if work is None or entry.step.kind != "pool":
        return 0, 0
    first, second = (
        sum(n << 8 * i for i, n in enumerate(numbers))
        for numbers in ((*work.kernel, *work.stride), work.padding)
    )
    return first, second


def fragments(blocks: Tensor) -> Tensor:
    """B fragments of mma.m16n8k16: (…, 16 k, 16 n) → (…, 32 lanes, 8) fp16: b0, b1 of n < 8, of n ≥ 8."""
    lane = torch.arange(32)
    n, k = lane // 4, lane % 4 * 2
    parts = [
        blocks[..., k + pair + half * 8, n + side * 8]
        for side in (0, 1)
        for half in (0, 1)
        for pair in (0, 1)
    ]
    return torch.stack(parts, -1).half()


def pack_conv(weight: Tensor, groups: int) -> Tensor:
    """(kernel, kernel, in, out) → (units, fragments, 32, 8), by 16 inputs, kernel column, row, group."""
    kernel, _, inputs, outputs = weight.shape
    blocks = weight.reshape(kernel, kernel, inputs // 16, 16, outputs // (16 * groups), groups, 16)
    # ky, kx, c, k, unit, g, n → unit, c, kx, ky, g, k, n
    return fragments(blocks.permute(4, 2, 1, 0, 5, 3, 6).reshape(outputs // (16 * groups), -1, 16, 16))


def pack_stem(weight: Tensor) -> Tensor:
    """(kernel, kernel, in, out) → (groups, steps, 32, 8): two taps of 8 channels a step."""
    kernel, _, inputs, outputs = weight.shape
    taps = weight.new_zeros(-(-kernel * kernel // 2) * 2, 8, outputs)
    taps[: kernel * kernel, :inputs] = weight.reshape(kernel * kernel, inputs, outputs)
    return fragments(taps.reshape(-1, 16, outputs // 16, 16).permute(2, 0, 1, 3))
