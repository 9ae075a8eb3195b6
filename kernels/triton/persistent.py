"""A whole stage in one launch: each program takes an image from a queue and runs every layer on it.

Activations stay in the program's own scratch memory, which fits in L1 and L2. Device memory sees one read of
the image and one write of its logits, plus the features if the next stage reads them.

The layers are a table in device memory. Each entry names one of the distinct kinds of layer in the stage, and
only the kinds are compiled, so a deep network needs no more code than a shallow one of the same widths.

The exit head runs in its own launch. It costs 4 bytes of logits per class and image. In return the exit head
can count survivors per block of rows, in row order; the queue has no such order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcascade.kernels.layers import Conv, Layer, Pooling, Work
from fastcascade.kernels.triton.conv import ConvKind, conv_layer
from fastcascade.kernels.triton.elementwise import elementwise_layer
from fastcascade.kernels.triton.launch import launch
from fastcascade.kernels.triton.layer_launch import Kind, kind
from fastcascade.kernels.triton.pool import pool_layer

__all__ = ["LayerTable", "layer_table", "persistent"]

PROGRAMS_PER_MULTIPROCESSOR = 1
"""A program of 256 threads with up to 255 registers each (AMD: 512) fills a multiprocessor."""

THREADS = 256
NUM_STAGES = 2

# Spaces: where a value is stored.
ROWS, SCRATCH, FEATURES, LOGITS = (tl.constexpr(i) for i in range(4))

# Operations.
CONV, POOL, ELEMENTWISE = (tl.constexpr(i) for i in range(3))

READS_IMAGES = tl.constexpr(ConvKind._fields.index("image"))


class Entry(NamedTuple):
    """One layer in the table; all offsets are in units of UNIT elements.

    Attributes:
        kind: number of the layer's kind.
        source, other, output: offsets of the values in scratch memory; 0 for a value in another space.
        weight, vectors: offsets in the stage's weights and vectors.
    """

    kind: int
    source: int
    other: int
    output: int
    weight: int
    vectors: int


ENTRY_KIND, ENTRY_SOURCE, ENTRY_OTHER, ENTRY_OUTPUT, ENTRY_WEIGHT, ENTRY_VECTORS = (
    tl.constexpr(i) for i in range(len(Entry._fields))
)
ENTRY_SIZE = tl.constexpr(len(Entry._fields))


class Placement(NamedTuple):
    """What a kind of layer does, and the spaces of the values that it reads and writes."""

    operation: int
    source: int
    other: int
    output: int


PLACED_OPERATION, PLACED_SOURCE, PLACED_OTHER, PLACED_OUTPUT = (
    tl.constexpr(i) for i in range(len(Placement._fields))
)

UNIT = tl.constexpr(16)
"""Alignment of every offset, in elements. The compiler must see it to emit 16-byte loads."""


@triton.jit
def place(SPACE: tl.constexpr, offset, rows, scratch, features, logits):
    """Pointer to a value of the current image."""
    if SPACE == ROWS:
        return rows
    elif SPACE == LOGITS:
        return logits
    elif SPACE == FEATURES:
        return features
    else:
        return scratch + offset * UNIT


@triton.jit
def run_table_entry(
    KIND: tl.constexpr, PLACEMENT: tl.constexpr,
    entry, images, index, pixel_table, rows, scratch, features, logits, weights, vectors,
    x_image, x_row, x_column, x_channel,
):  # fmt: skip
    """Run all tiles of one layer on one image."""
    x = place(PLACEMENT[PLACED_SOURCE], tl.load(entry + ENTRY_SOURCE), rows, scratch, features, logits)
    other = place(PLACEMENT[PLACED_OTHER], tl.load(entry + ENTRY_OTHER), rows, scratch, features, logits)
    out = place(PLACEMENT[PLACED_OUTPUT], tl.load(entry + ENTRY_OUTPUT), rows, scratch, features, logits)
    vector = vectors + tl.load(entry + ENTRY_VECTORS) * UNIT
    if PLACEMENT[PLACED_OPERATION] == CONV:
        weight = weights + tl.load(entry + ENTRY_WEIGHT) * UNIT
        if KIND[READS_IMAGES]:
            conv_layer(
                KIND, images, weight, vector, other, index, pixel_table, out,
                x_image, x_row, x_column, x_channel, 1, 0, 1,
            )  # fmt: skip
        else:
            conv_layer(KIND, x, weight, vector, other, index, pixel_table, out, 0, 0, 0, 1, 1, 0, 1)
    elif PLACEMENT[PLACED_OPERATION] == POOL:
        pool_layer(KIND, x, out, 1, 0, 1)
    else:
        elementwise_layer(KIND, x, other, vector, out, 1, 0, 1)


@triton.jit
def persistent_kernel(
    images, index, count, pixel_table, rows, features, logits, entries, weights, vectors, scratch, queue,
    x_image, x_row, x_column, x_channel,
    LAYERS: tl.constexpr, KINDS: tl.constexpr, PLACEMENTS: tl.constexpr, SCRATCH_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr, FEATURES_SIZE: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    n = tl.load(count)
    own = scratch + tl.program_id(0).to(tl.int64) * SCRATCH_SIZE
    row = tl.atomic_add(queue, 1)
    while row < n:
        at = row.to(tl.int64)
        for layer in tl.range(0, LAYERS, num_stages=1):
            entry = entries + layer * ENTRY_SIZE
            kind_number = tl.load(entry + ENTRY_KIND)
            for i in tl.static_range(len(KINDS)):
                if kind_number == i:
                    run_table_entry(
                        tl.constexpr(KINDS[i]), tl.constexpr(PLACEMENTS[i]),
                        entry, images, index + at, pixel_table,
                        rows + at * INPUT_SIZE, own, features + at * FEATURES_SIZE, logits + at * CLASSES,
                        weights, vectors, x_image, x_row, x_column, x_channel,
                    )  # fmt: skip
            # The next layer reads what other threads of this program wrote, and the next image overwrites it.
            tl.debug_barrier()
        row = tl.atomic_add(queue, 1)


class LayerTable(NamedTuple):
    """A stage in the form that the persistent kernel reads.

    Attributes:
        entries: (layers, 6) int32, one :class:`Entry` per layer.
        kinds: the constants of every kind of layer, for float images and for uint8 images.
        placements: one per kind.
        weights, vectors: those of all layers, concatenated.
        scratch_size: elements of scratch memory per program.
        input_size, features_size: elements per row of the stage's input and features; 0 without rows.
        num_classes: C.
    """

    entries: Tensor
    kinds: tuple[tuple[Kind, ...], tuple[Kind, ...]]
    placements: tuple[Placement, ...]
    weights: Tensor
    vectors: Tensor
    scratch_size: int
    input_size: int
    features_size: int
    num_classes: int


def layer_table(layers: Sequence[Layer], kept: int | None) -> LayerTable:
    """Assign scratch memory to a stage's values, concatenate its weights and build the table of its layers.

    Args:
        layers: in order; one convolution writes the logits.
        kept: the value that the next stage reads, or None.
    """
    scratch, scratch_size = _scratch_offsets(layers, kept)
    spaces = {0: ROWS.value, **dict.fromkeys(scratch, SCRATCH.value)}
    if kept is not None:
        spaces[kept] = FEATURES.value
    logits = next(layer for layer in layers if isinstance(layer.work, Conv) and layer.work.logits)
    spaces[logits.output] = LOGITS.value

    numbers: dict[tuple[Work, Placement], int] = {}
    entries = []
    weights, vectors = [la.weight for la in layers], [la.vectors for la in layers]
    for layer, weight, vector in zip(layers, _starts(weights), _starts(vectors), strict=True):
        other = layer.source if layer.other is None else layer.other
        placement = Placement(
            _operation(layer.work), spaces[layer.source], spaces[other], spaces[layer.output]
        )
        entry = Entry(
            kind=numbers.setdefault((layer.work, placement), len(numbers)),
            source=scratch.get(layer.source, 0) // UNIT.value,
            other=scratch.get(other, 0) // UNIT.value,
            output=scratch.get(layer.output, 0) // UNIT.value,
            weight=weight // UNIT.value,
            vectors=vector // UNIT.value,
        )
        entries.append(entry)
    weight_row = torch.cat([w.flatten() for w in weights if w is not None])
    return LayerTable(
        entries=torch.tensor(entries, dtype=torch.int32, device=weight_row.device),
        kinds=(_constants(numbers, False), _constants(numbers, True)),
        placements=tuple(placement for _, placement in numbers),
        weights=weight_row,
        vectors=torch.cat([v.flatten() for v in vectors if v is not None]),
        scratch_size=scratch_size,
        input_size=_input_size(layers),
        features_size=next((math.prod(la.work.out) for la in layers if la.output == kept), 0),
        num_classes=logits.work.out[2],
    )


def _operation(work: Work) -> int:
    code = CONV if isinstance(work, Conv) else (POOL if isinstance(work, Pooling) else ELEMENTWISE)
    return int(code.value)


def _constants(kinds: Iterable[tuple[Work, Placement]], byte_images: bool) -> tuple[Kind, ...]:
    """The constants of every kind, with tiles no larger than the image."""
    return tuple(
        kind(work, byte_images, max_pixels=max(triton.next_power_of_2(work.out[0] * work.out[1]), 16))
        for work, _ in kinds
    )


def _input_size(layers: Sequence[Layer]) -> int:
    """Elements per row of the stage's input; 0 if it reads images."""
    work = next((layer.work for layer in layers if layer.source == 0), None)
    if isinstance(work, Conv):
        shape = work.shape
        return 0 if work.image else shape.height * shape.width * shape.channels
    if work is not None:
        return math.prod(work.source)
    raise ValueError("no layer reads value 0, the stage's input")


def _starts(tensors: Sequence[Tensor | None]) -> list[int]:
    """Offsets of the tensors once concatenated; every size is a multiple of 16."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += 0 if tensor is None else tensor.numel()
    return starts


def _scratch_offsets(layers: Sequence[Layer], kept: int | None) -> tuple[dict[int, int], int]:
    """First fit: each value takes the lowest offset that does not overlap a value alive at the same time.

    Returns:
        the offset of each value in scratch memory, and the size of that memory, in elements.
    """
    last = {value: i for i, layer in enumerate(layers) for value in (layer.output, *layer.reads)}
    offsets: dict[int, int] = {}
    taken: list[tuple[int, int, int]] = []  # (begin, end, last layer that reads or writes it)
    size = 0
    for i, layer in enumerate(layers):
        if layer.output == kept or (isinstance(layer.work, Conv) and layer.work.logits):
            continue
        need, begin = math.prod(layer.work.out), 0
        for lower, upper, until in sorted(taken):
            if until >= i and lower < begin + need and begin < upper:
                begin = upper
        offsets[layer.output] = begin
        taken.append((begin, begin + need, last[layer.output]))
        size = max(size, begin + need)
    return offsets, size


def persistent(
    table: LayerTable,
    source: Tensor,
    index: Tensor,
    count: Tensor,
    features: Tensor | None,
    logits: Tensor,
    *,
    pixel_table: Tensor | None = None,
) -> None:
    """Run a stage on the first ``count`` active rows, without synchronising with the host.

    Args:
        table: from :func:`layer_table`, on the device.
        source: images (N, C, H, W), any strides, uint8 or float32, or padded rows (capacity, H, W, C) of the
            table's dtype where the stage reads the previous one's features.
        index: (capacity,) int32, the image that each row reads; count: (1,) int32.
        features: (capacity, H, W, C) of the table's dtype, written; None if no stage reads them.
        logits: (capacity, classes) float32, written.
        pixel_table: (C, 256) float32, the value of each byte; for uint8 images only.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device than stated.

    Example:
        persistent(layer_table(layers, None), images, active, count, None, logits)
    """
    _check(table, source, index, count, features, logits, pixel_table)
    capacity = len(logits)
    if capacity == 0:
        return
    device = source.device
    multiprocessors = 1
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = min(capacity, multiprocessors * PROGRAMS_PER_MULTIPROCESSOR)
    scratch = torch.empty(programs * table.scratch_size, dtype=table.weights.dtype, device=device)
    queue = torch.zeros(1, dtype=torch.int32, device=device)
    images = table.input_size == 0
    strides = (source.stride(0), source.stride(2), source.stride(3), source.stride(1)) if images else (0,) * 4
    launch(
        persistent_kernel, (programs,),
        source, index, count, queue if pixel_table is None else pixel_table, scratch if images else source,
        scratch if features is None else features, logits, table.entries, table.weights, table.vectors,
        scratch, queue, *strides,
        **constants(table, pixel_table is not None),
        num_warps=num_warps(hip=torch.version.hip is not None), num_stages=NUM_STAGES,
    )  # fmt: skip


def num_warps(hip: bool) -> int:
    """Warps per program; a warp has 64 threads on AMD and 32 on NVIDIA.

    Example:
        >>> num_warps(hip=False), num_warps(hip=True)
        (8, 4)
    """
    return THREADS // (64 if hip else 32)


def constants(table: LayerTable, byte_images: bool) -> dict[str, object]:
    """The constexpr arguments that specialise the kernel for a stage."""
    return {
        "LAYERS": len(table.entries),
        "KINDS": table.kinds[int(byte_images)],
        "PLACEMENTS": table.placements,
        "SCRATCH_SIZE": table.scratch_size,
        "INPUT_SIZE": table.input_size,
        "FEATURES_SIZE": table.features_size,
        "CLASSES": table.num_classes,
    }


def _check(
    table: LayerTable,
    source: Tensor,
    index: Tensor,
    count: Tensor,
    features: Tensor | None,
    logits: Tensor,
    pixel_table: Tensor | None,
) -> None:
    capacity = len(logits)
    if (
        logits.dtype != torch.float32
        or logits.shape[1:] != (table.num_classes,)
        or not logits.is_contiguous()
    ):
        raise ValueError(
            f"logits are {tuple(logits.shape)} {logits.dtype}, strides {logits.stride()}; "
            f"expected contiguous float32 with {table.num_classes} classes"
        )
    if index.dtype != torch.int32 or count.dtype != torch.int32 or len(index) < capacity:
        raise ValueError(
            f"index is {tuple(index.shape)} {index.dtype} and count {count.dtype}; "
            f"expected int32 and at least {capacity} entries"
        )
    if table.input_size == 0:
        if (source.dtype == torch.uint8) != (pixel_table is not None):
            given = "no pixel table" if pixel_table is None else "a pixel table"
            raise ValueError(f"got {source.dtype} images and {given}; only uint8 images take one")
    else:
        _check_rows("source", source, table.input_size, capacity, table.weights.dtype)
    if (features is not None) != (table.features_size > 0):
        given = "none" if features is None else f"a tensor of shape {tuple(features.shape)}"
        raise ValueError(f"the stage writes {table.features_size} features per row; got {given}")
    if features is not None:
        _check_rows("features", features, table.features_size, capacity, table.weights.dtype)
    devices = {t.device for t in (source, index, count, logits, table.weights)}
    if len(devices) > 1:
        raise ValueError(f"tensors are on {', '.join(sorted(map(str, devices)))}; expected one device")


def _check_rows(name: str, rows: Tensor, size: int, capacity: int, dtype: torch.dtype) -> None:
    if (
        not rows.is_contiguous()
        or rows.dtype != dtype
        or math.prod(rows.shape[1:]) != size
        or len(rows) < capacity
    ):
        raise ValueError(
            f"{name} is {tuple(rows.shape)} {rows.dtype}, strides {rows.stride()}; "
            f"expected {capacity} contiguous rows of {size} {dtype}"
        )
