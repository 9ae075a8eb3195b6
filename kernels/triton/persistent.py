"""A whole stage in one launch: a program takes an image from a queue and runs every layer of the stage on it.

Between layers the activations stay in the program's own scratch, small enough for L1 and L2, so that an image
costs the memory one read and a row of logits (and of features, where the next stage reads them). The stage is
a table of layers in device memory; each entry names one of the stage's few different kinds of layer, and only
the kinds are compiled: a network of any depth is one kernel of its width's size.

The logits go to memory for the exit head's own launch: 4 bytes a class, while the compaction needs the counts
that the exit head makes for blocks of rows, in an order that no queue could give.
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
from fastcascade.kernels.triton.conv import READS_IMAGE, Kind, conv_layer, elementwise_layer, kind, pool_layer
from fastcascade.kernels.triton.launch import launch

__all__ = ["LayerTable", "layer_table", "persistent"]

PROGRAMS_PER_UNIT = 1
"""Programs per multiprocessor: one of 256 threads, which need up to 255 registers (AMD: 512), fills it."""

THREADS = 256
NUM_STAGES = 2

# Where a value lies: row of the stage's input, the program's scratch, row of the features, row of the logits.
ROWS, SCRATCH, FEATURES, LOGITS = (tl.constexpr(i) for i in range(4))
CONV, POOL, ELEMENTWISE = (tl.constexpr(i) for i in range(3))
FIELDS = tl.constexpr(6)
"""Of an entry: its kind, and where source, other, output, weight and vectors begin, in units."""
UNIT = tl.constexpr(16)
"""Elements: positions are multiples of it, which the compiler must see to load 16 bytes at a time."""


@triton.jit
def place(SPACE: tl.constexpr, offset, rows, scratch, features, logits):
    """Where a value of the program's image begins."""
    if SPACE == ROWS:
        return rows
    elif SPACE == LOGITS:
        return logits
    elif SPACE == FEATURES:
        return features
    else:
        return scratch + offset * UNIT


@triton.jit
def run_layer(
    KIND: tl.constexpr, PLACES: tl.constexpr,
    entry, images, index, pixels, rows, scratch, features, logits, weights, vectors,
    x_image, x_row, x_column, x_channel,
):  # fmt: skip
    """All tiles of one layer on one image. PLACES: the operation, then where source, other, output lie."""
    OPERATION: tl.constexpr = PLACES[0]
    SOURCE: tl.constexpr = PLACES[1]
    OTHER: tl.constexpr = PLACES[2]
    OUT: tl.constexpr = PLACES[3]
    x = place(SOURCE, tl.load(entry + 1), rows, scratch, features, logits)
    other = place(OTHER, tl.load(entry + 2), rows, scratch, features, logits)
    out = place(OUT, tl.load(entry + 3), rows, scratch, features, logits)
    vector = vectors + tl.load(entry + 5) * UNIT
    if OPERATION == CONV:
        weight = weights + tl.load(entry + 4) * UNIT
        if KIND[READS_IMAGE]:
            conv_layer(
                KIND, images, weight, vector, other, index, pixels, out,
                x_image, x_row, x_column, x_channel, 1, 0, 1,
            )  # fmt: skip
        else:
            conv_layer(KIND, x, weight, vector, other, index, pixels, out, 0, 0, 0, 1, 1, 0, 1)
    elif OPERATION == POOL:
        pool_layer(KIND, x, out, 1, 0, 1)
    else:
        elementwise_layer(KIND, x, other, vector, out, 1, 0, 1)


@triton.jit
def persistent_kernel(
    images, index, count, pixels, rows, features, logits, entries, weights, vectors, scratch, queue,
    x_image, x_row, x_column, x_channel,
    LAYERS: tl.constexpr, KINDS: tl.constexpr, PLACES: tl.constexpr, SCRATCH_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr, FEATURES_SIZE: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    n = tl.load(count)
    own = scratch + tl.program_id(0).to(tl.int64) * SCRATCH_SIZE
    row = tl.atomic_add(queue, 1)
    while row < n:
        at = row.to(tl.int64)
        for layer in tl.range(0, LAYERS, num_stages=1):
            entry = entries + layer * FIELDS
            number = tl.load(entry)
            for i in tl.static_range(len(KINDS)):
                if number == i:
                    run_layer(
                        tl.constexpr(KINDS[i]), tl.constexpr(PLACES[i]), entry, images, index + at, pixels,
                        rows + at * INPUT_SIZE, own, features + at * FEATURES_SIZE, logits + at * CLASSES,
                        weights, vectors, x_image, x_row, x_column, x_channel,
                    )  # fmt: skip
            # The next layer reads what other threads wrote; after the last, the next image overwrites it.
            tl.debug_barrier()
        row = tl.atomic_add(queue, 1)


class LayerTable(NamedTuple):
    """A stage as the persistent kernel takes it.

    Attributes:
        entries: (layers, 6) int32.
        kinds: the sizes of the different kinds of layer, for float images and for bytes.
        places: of each kind, the operation and the spaces of source, other and output.
        weights, vectors: all layers', one after the other.
        scratch_size, input_size, features_size: elements per program and per row; 0 where there are none.
        num_classes: C.
    """

    entries: Tensor
    kinds: tuple[tuple[Kind, ...], tuple[Kind, ...]]
    places: tuple[tuple[int, ...], ...]
    weights: Tensor
    vectors: Tensor
    scratch_size: int
    input_size: int
    features_size: int
    num_classes: int


def layer_table(layers: Sequence[Layer], kept: int | None) -> LayerTable:
    """Lay out a stage: its values in scratch memory, its weights in a row, its layers in a table.

    Args:
        layers: in order; the last value that is marked as logits is the answer.
        kept: the value that the next stage reads, or None.
    """
    scratch, scratch_size = _scratch_offsets(layers, kept)
    spaces = {0: ROWS.value, **dict.fromkeys(scratch, SCRATCH.value)}
    if kept is not None:
        spaces[kept] = FEATURES.value
    logits = next(layer for layer in layers if isinstance(layer.work, Conv) and layer.work.logits)
    spaces[logits.output] = LOGITS.value

    numbers: dict[tuple[Work, tuple[int, ...]], int] = {}
    entries = []
    weights, vectors = [la.weight for la in layers], [la.vectors for la in layers]
    for layer, weight, vector in zip(layers, _starts(weights), _starts(vectors), strict=True):
        values = (layer.source, layer.source if layer.other is None else layer.other, layer.output)
        places = (_operation(layer.work), *(spaces[value] for value in values))
        number = numbers.setdefault((layer.work, places), len(numbers))
        begins = [*(scratch.get(value, 0) for value in values), weight, vector]
        entries.append([number, *(begin // UNIT.value for begin in begins)])
    weight_row = torch.cat([w.flatten() for w in weights if w is not None])
    return LayerTable(
        entries=torch.tensor(entries, dtype=torch.int32, device=weight_row.device),
        kinds=(_sizes(numbers, False), _sizes(numbers, True)),
        places=tuple(places for _, places in numbers),
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


def _sizes(kinds: Iterable[tuple[Work, tuple[int, ...]]], byte_images: bool) -> tuple[Kind, ...]:
    """Of every kind; a tile is no larger than the image."""
    return tuple(
        kind(work, byte_images, limit=max(triton.next_power_of_2(work.out[0] * work.out[1]), 16))
        for work, _ in kinds
    )


def _input_size(layers: Sequence[Layer]) -> int:
    """Elements of a row of value 0; 0 where it is images."""
    work = next((layer.work for layer in layers if layer.source == 0), None)
    if isinstance(work, Conv):
        shape = work.shape
        return 0 if work.image else shape.height * shape.width * shape.channels
    if work is not None:
        return math.prod(work.source)
    raise ValueError("no layer reads value 0, the stage's input")


def _starts(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where each tensor begins when all are put in a row; sizes are multiples of 16."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += 0 if tensor is None else tensor.numel()
    return starts


def _scratch_offsets(layers: Sequence[Layer], kept: int | None) -> tuple[dict[int, int], int]:
    """First fit: a value takes the lowest place that no value alive at the same time has.

    Returns:
        where each value of the scratch begins, and how large it is, in elements.
    """
    last = {value: i for i, layer in enumerate(layers) for value in (layer.output, *layer.reads)}
    offsets: dict[int, int] = {}
    taken: list[tuple[int, int, int]] = []  # (begin, end, last layer that needs it)
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
    pixels: Tensor | None = None,
) -> None:
    """Run a stage on the first ``count`` active rows; nothing synchronises.

    Args:
        table: from :func:`layer_table`, on the device.
        source: images (N, C, H, W), any strides, uint8 or float32, or padded rows (capacity, H, W, C) of the
            table's dtype where the stage reads the previous one's features.
        index: (capacity,) int32, which image each row reads; count: (1,) int32.
        features: (capacity, H, W, C) of the table's dtype, written; None where no stage reads them.
        logits: (capacity, classes) float32, written.
        pixels: (C, 256) float32, what each byte of an image means.

    Raises:
        ValueError: tensors that the kernel would misread.

    Example:
        persistent(layer_table(layers, None), images, active, count, None, logits)
    """
    _check(table, source, index, count, features, logits, pixels)
    capacity = len(logits)
    if capacity == 0:
        return
    device = source.device
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs = min(capacity, units * PROGRAMS_PER_UNIT)
    scratch = torch.empty(programs * table.scratch_size, dtype=table.weights.dtype, device=device)
    queue = torch.zeros(1, dtype=torch.int32, device=device)
    images = table.input_size == 0
    strides = (source.stride(0), source.stride(2), source.stride(3), source.stride(1)) if images else (0,) * 4
    launch(
        persistent_kernel, (programs,),
        source, index, count, queue if pixels is None else pixels, scratch if images else source,
        scratch if features is None else features, logits, table.entries, table.weights, table.vectors,
        scratch, queue, *strides,
        **constants(table, pixels is not None),
        num_warps=num_warps(hip=torch.version.hip is not None), num_stages=NUM_STAGES,
    )  # fmt: skip


def num_warps(hip: bool) -> int:
    """Of a program; AMD's have 64 threads.

    Example:
        >>> num_warps(hip=False), num_warps(hip=True)
        (8, 4)
    """
    return THREADS // (64 if hip else 32)


def constants(table: LayerTable, byte_images: bool) -> dict[str, object]:
    """What specialises the kernel for a stage."""
    return {
        "LAYERS": len(table.entries),
        "KINDS": table.kinds[int(byte_images)],
        "PLACES": table.places,
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
    pixels: Tensor | None,
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
        if (source.dtype == torch.uint8) != (pixels is not None):
            raise ValueError(f"images are {source.dtype} and a table of pixels is {pixels is not None}")
    else:
        _check_rows("source", source, table.input_size, capacity, table.weights.dtype)
    if (features is not None) != (table.features_size > 0):
        raise ValueError(f"the stage leaves {table.features_size} features a row; features is {features}")
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
