"""The launcher of the resident kernel (``resident.cuh``), which runs a whole cascade in one launch.

``resident_plan.py`` plans stages, ``resident_table.py`` makes the table and the packed weights that the
kernel reads, :func:`resident` launches it. NVRTC compiles it through CuPy at the first launch, for the plan's
types of layers.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastcascade.kernels.argument_checks import Keep
from fastcascade.kernels.cuda.exit_head import BLOCK_ROWS, SELECTORS
from fastcascade.kernels.cuda.launch import COMPILE_OPTIONS, by_value, on_current_stream, source
from fastcascade.kernels.cuda.resident_table import ResidentTable
from fastcascade.kernels.reference import ExitTables, MLPWeights

__all__ = [
    "DeviceResident",
    "ResidentCascade",
    "ResidentExit",
    "ResidentLaunch",
    "images_taken",
    "resident",
    "resident_exits",
    "resident_source",
]

KERNEL = "resident_cascade"


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
        *((name, ctypes.c_void_p) for name in ("layers", "stages", "weights", "vectors", "exits")),
        *((name, ctypes.c_void_p) for name in ("images", "pixel_table", "thresholds")),
        *((name, ctypes.c_void_p) for name in ("log_sum", "weight_sum", "previous_label")),
        *((name, ctypes.c_void_p) for name in ("log_probs", "label", "exit_stage")),
        *((name, ctypes.c_void_p) for name in ("keep", "block_counts", "queue")),
        ("strides", ctypes.c_longlong * 4),
        *((name, ctypes.c_int) for name in ("stage_count", "count", "classes", "taken")),
    )


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
        """Run a cascade; ``cascade`` has addresses on the device, and everything but ``taken``."""


def images_taken(table: ResidentTable, count: int, blocks: int) -> int:
    """How many images a block takes from the queue at once: the first stage's group, if there are enough."""
    return max(1, min(table.plan.groups[0].images, count // blocks))


class DeviceResident(ResidentLaunch):
    """Launches on torch's current stream of an NVIDIA GPU; nothing synchronises."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device
        self.functions: dict[str, Any] = {}

    def start(self, table: ResidentTable, cascade: ResidentCascade) -> None:
        """See :meth:`ResidentLaunch.start`."""
        plan = table.plan
        blocks = min(cascade.count, self.multiprocessors * plan.blocks)
        cascade.taken = images_taken(table, cascade.count, blocks)
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
        **{name: getattr(table, name) for name in ("layers", "stages", "weights", "vectors")},
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
        stage_count=len(table.stages),
        count=n,
        classes=classes,
    )
    if n > 0:
        launch.start(table, cascade)
