"""The launcher of the resident kernel (``resident.cuh``), which runs a whole cascade in one launch.

:func:`resident_table` turns a plan of stages (``resident_plan.py``) into the integer table and the packed
weights that the kernel reads; :func:`resident` launches it. NVRTC compiles it through CuPy at the first
launch, for the plan's types of layers.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastcascade.kernels.argument_checks import Keep
from fastcascade.kernels.cuda.exit_head import BLOCK_ROWS, SELECTORS
from fastcascade.kernels.cuda.launch import COMPILE_OPTIONS, by_value, on_current_stream, source
from fastcascade.kernels.cuda.resident_plan import (
    MOST_WARPS,
    Entry,
    ResidentPlan,
    pack_conv,
    pack_stem,
)
from fastcascade.kernels.reference import ExitTables, MLPWeights

__all__ = [
    "DeviceResident",
    "ResidentCascade",
    "ResidentExit",
    "ResidentLaunch",
    "ResidentTable",
    "resident",
    "resident_exits",
    "resident_source",
    "resident_table",
]

KERNEL = "resident_cascade"
ENTRY_INTS = 8 + MOST_WARPS
"""Size of a ResidentLayer in ``resident.cuh``."""

SLACK = 16 * 32 * 8
"""Padding after the last weights, in fp16 numbers: a layer loads its first fragments unconditionally."""


class ResidentExit(ctypes.Structure):
    """The struct of the same name in ``resident.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in MLPWeights._fields),
        ("selector", ctypes.c_int),
        ("hidden", ctypes.c_int),
        ("stage_weight", ctypes.c_float),
        ("unused", ctypes.c_int),
    )


class ResidentCascade(ctypes.Structure):
    """The struct of the same name in ``resident.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "begins", "weights", "vectors", "exits")),
        *((name, ctypes.c_void_p) for name in ("images", "pixel_table", "thresholds")),
        *((name, ctypes.c_void_p) for name in ("log_sum", "weight_sum", "previous_label")),
        *((name, ctypes.c_void_p) for name in ("log_probs", "label", "exit_stage")),
        *((name, ctypes.c_void_p) for name in ("keep", "block_counts", "queue")),
        ("strides", ctypes.c_longlong * 4),
        *((name, ctypes.c_int) for name in ("stages", "count", "classes", "unused")),
    )


@dataclass(frozen=True)
class ResidentTable:
    """The stages in the form that the kernel reads.

    Attributes:
        layers: (entries, 16) int32.
        begins: (stages + 1,) int32, the first entry of each stage, and the number of entries.
        weights: fp16 fragments.
        vectors: float32 biases and linear layers.
        types, heads: the compiled templates. An entry begins with an index into one of them.
    """

    plan: ResidentPlan
    layers: Tensor
    begins: Tensor
    weights: Tensor
    vectors: Tensor
    types: tuple[str, ...]
    heads: tuple[str, ...]

    def to(self, device: torch.device) -> ResidentTable:
        """A copy on a device."""
        names = ("layers", "begins", "weights", "vectors")
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
    rows, weights, vectors, begins = [], [], [], []
    weight_end = vector_end = 0
    for i, entry in enumerate(plan.entries):
        if i == 0 or entry.stage != plan.entries[i - 1].stage:
            begins.append(i)
        step = entry.step
        names = heads if step.kind == "head" else types
        packed, firsts = _packed(entry, plan.warps)
        vector = _vector(entry)
        rows.append(
            [
                names.index(step.type_name(plan.warps)),
                entry.source,
                entry.output,
                entry.residual,
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
        begins=torch.tensor([*begins, len(rows)], dtype=torch.int32),
        weights=torch.cat([*weights, torch.zeros(SLACK, dtype=torch.float16)]),
        vectors=torch.cat(vectors).float(),
        types=types,
        heads=heads,
    )


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


def resident_source(table: ResidentTable) -> str:
    """The source that is compiled for a table."""
    return preamble(table) + source("resident.cu")


def preamble(table: ResidentTable) -> str:
    """The macros that ``resident.cuh`` needs."""

    def cases(name: str, types: Sequence[str]) -> str:
        return f"#define {name}(CASE)" + "".join(f" \\\n  CASE({i}, {t})" for i, t in enumerate(types)) + "\n"

    numbers = f"#define FC_WARPS {table.plan.warps}\n#define FC_BLOCKS {table.plan.blocks}\n"
    return numbers + cases("FC_LAYERS", table.types) + cases("FC_HEADS", table.heads)


def resident_exits(
    selectors: Sequence[tuple[str | None, MLPWeights | None]], stage_weights: Sequence[float | None]
) -> Tensor:
    """The exits of the stages as the kernel reads them, on the CPU. The caller keeps the weights alive.

    Args:
        selectors: for each stage, a built-in selector, or None at the last exit, and the weights of an MLP
            (contiguous float32, on the device).
        stage_weights: as the exit head's twin takes them.
    """
    exits = (ResidentExit * len(selectors))()
    for exit, (name, weights), stage_weight in zip(exits, selectors, stage_weights, strict=True):
        exit.selector = SELECTORS.index(name)
        exit.stage_weight = 0.0 if stage_weight is None else stage_weight
        if weights is not None:
            exit.hidden = len(weights.b1)
            for field, tensor in weights._asdict().items():
                setattr(exit, field, tensor.data_ptr())
    return torch.frombuffer(bytearray(exits), dtype=torch.uint8)


class ResidentLaunch(ABC):
    """Launches the resident kernel on one device."""

    device: torch.device

    @abstractmethod
    def start(self, table: ResidentTable, cascade: ResidentCascade) -> None:
        """Run a cascade; ``cascade`` has addresses on the device."""


class DeviceResident(ResidentLaunch):
    """Launches on torch's current stream of an NVIDIA GPU; nothing synchronises."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device
        self.functions: dict[str, Any] = {}

    def start(self, table: ResidentTable, cascade: ResidentCascade) -> None:
        """See :meth:`ResidentLaunch.start`."""
        plan = table.plan
        blocks = min(cascade.count, self.multiprocessors * plan.blocks)
        with on_current_stream(self.device, KERNEL):
            function = self._function(table)
            function((blocks,), (plan.threads,), by_value(cascade), shared_mem=plan.shared_bytes)

    @cached_property
    def multiprocessors(self) -> int:
        """Number of multiprocessors."""
        count: int = torch.cuda.get_device_properties(self.device).multi_processor_count
        return count

    def _function(self, table: ResidentTable) -> Any:
        """The kernel for the table's types of layers. CuPy caches compiled code on disk."""
        import cupy

        text = resident_source(table)
        if text not in self.functions:
            function = cupy.RawModule(code=text, options=COMPILE_OPTIONS).get_function(KERNEL)
            self.functions[text] = function
        function = self.functions[text]
        function.max_dynamic_shared_size_bytes = table.plan.shared_bytes
        function.preferred_shared_memory_carveout = 100
        return function


def resident(
    launch: ResidentLaunch,
    table: ResidentTable,
    exits: Tensor,
    images: Tensor,
    tables: ExitTables,
    thresholds: Tensor,
    *,
    pixel_table: Tensor | None = None,
    keep: Keep | None = None,
) -> None:
    """Run the stages of a table, exits included, on every image, without synchronising.

    Args:
        table: on the device.
        exits: from :func:`resident_exits`, on the device.
        images: (N, C, H, W) uint8 or float32, any strides.
        tables: of the batch, before its first stage.
        thresholds: (at least the number of selectors,) float32 on the device.
        pixel_table: (C, 256) fp16, the value of each byte; for uint8 images only.
        keep: written; its counts must be zero. None if no stage follows those in the table.

    Raises:
        ValueError: a tensor has the wrong dtype, shape, strides or device.
        RuntimeError: the launch failed.

    Example:
        resident(launch, table, exits, images, exit_tables(len(images), 10, "cuda"), thresholds)
    """
    n, channels, height, width = images.shape
    first = table.plan.entries[0].step
    classes = tables.log_probs.shape[1]
    if (channels, height, width) != (first.into.channels, first.into.height, first.into.width):
        raise ValueError(f"images are {(channels, height, width)}; expected {first.into}")
    if images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"images are {images.dtype}; expected uint8 or float32")
    if (images.dtype == torch.uint8) != (pixel_table is not None):
        given = "no pixel table" if pixel_table is None else "a pixel table"
        raise ValueError(f"{images.dtype} images with {given}; uint8 images need one, float32 images none")
    if classes != table.plan.classes:
        raise ValueError(f"tables hold {classes} classes; expected {table.plan.classes}")
    table_shape = (channels, 256)
    if pixel_table is not None and (pixel_table.dtype != torch.float16 or pixel_table.shape != table_shape):
        raise ValueError(
            f"pixel_table is {pixel_table.dtype} {tuple(pixel_table.shape)}; expected float16 {table_shape}"
        )
    if thresholds.dtype != torch.float32 or not thresholds.is_contiguous():
        raise ValueError(f"thresholds are {thresholds.dtype}; expected contiguous float32")
    if keep is not None and (keep.rows != BLOCK_ROWS or len(keep.flags) < n):
        raise ValueError(f"keep is not from new_keep({n}, …)")
    present: dict[str, Tensor] = {
        **{name: getattr(table, name) for name in ("layers", "begins", "weights", "vectors")},
        "exits": exits,
        "images": images,
        "thresholds": thresholds,
        **tables._asdict(),
        "queue": torch.zeros(1, dtype=torch.int32, device=images.device),
    }
    if pixel_table is not None:
        present["pixel_table"] = pixel_table
    if keep is not None:
        present |= {"keep": keep.flags, "block_counts": keep.counts}
    for name, tensor in present.items():
        if tensor.device != launch.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {launch.device}")
    cascade = ResidentCascade(
        **{name: tensor.data_ptr() for name, tensor in present.items()},
        strides=(ctypes.c_longlong * 4)(*images.stride()),
        stages=len(table.begins) - 1,
        count=n,
        classes=classes,
    )
    if n > 0:
        launch.start(table, cascade)
