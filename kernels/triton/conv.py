"""Convolution, pooling and elementwise layers on NHWC rows, with the number of rows on the device.

Each layer is written once, as a loop over tiles of rows. Here a launch runs one layer over all active rows:
a fixed number of programs strides over the tiles, so a launch costs the same whatever the host believes the
count to be, and programs without a tile return at once. ``persistent.py`` runs all layers of a stage in one
launch, with one program looping over the tiles of one row.

All sizes of a layer are one tuple of numbers, KIND, that specialises the kernel: see :func:`kind`. The first
layer reads the caller's images as they are, through the index of active instances and, for bytes, through
the table of pixel values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcascade.kernels.layers import Conv, Layer, Pooling, View, Work, padded
from fastcascade.kernels.triton.launch import launch

__all__ = [
    "READS_IMAGE",
    "ConvTile",
    "Kind",
    "conv_layer",
    "conv_tile",
    "elementwise_layer",
    "kind",
    "pool_layer",
    "run",
]

Kind = tuple[int | float, ...]

READS_IMAGE = tl.constexpr(15)
"""Of a convolution's KIND: whether it reads the caller's images."""

CHANNELS_STORED = tl.constexpr(6)
"""Of an elementwise layer's KIND: the output's channels as stored, which is where the shifts begin."""

ACTIVATIONS = ("none", "relu", "relu6")

PROGRAMS_PER_UNIT = 8
"""Programs launched per multiprocessor: enough to hide latency at 64 to 128 registers a thread."""


def _divisor(n: int, limit: int) -> int:
    """The largest power of two that divides n, at most ``limit``."""
    return min(n & -n, limit)


class ConvTile(NamedTuple):
    """Constants that specialise the convolution: tile sizes, warps, pipeline depth."""

    pixels: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int


def conv_tile(in_channels: int, out_channels: int, image: bool) -> ConvTile:
    """Tile sizes for padded channel counts; ``image`` marks the first layer."""
    channels = _divisor(out_channels, 128)
    depth = 16 if image else _divisor(in_channels, 64)
    return ConvTile(128, channels, depth, num_warps=8 if channels == 128 else 4, num_stages=3)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """ReLU (1) or ReLU6 (2) that keeps NaN: a position in ACTIVATIONS."""
    if ACTIVATION > 0:
        x = tl.where(x < 0, 0.0, x)
    if ACTIVATION == 2:
        x = tl.where(x > 6, 6.0, x)
    return x


@triton.jit
def residual_tile(
    residual, image, oh, ow, live, channel,
    RES_H: tl.constexpr, RES_W: tl.constexpr, RES_STRIDE: tl.constexpr, RES_CHANNELS: tl.constexpr,
    START_H: tl.constexpr, START_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    """(pixels, channels) f32 of a residual read through a View; zero where it has no such channel."""
    row = image.to(tl.int64) * (RES_H * RES_W) + (START_H + oh * STEP_H) * RES_W + START_W + ow * STEP_W
    c = channel - BEFORE
    there = live[:, None] & ((c >= 0) & (c < RES_CHANNELS))[None, :]
    return tl.load(residual + row[:, None] * RES_STRIDE + c[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def conv_tiles(
    x, weight, bias, residual, index, table, out, x_image, x_row, x_column, x_channel, rows, first, step,
    H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    OUT_CHANNELS: tl.constexpr, OUT_STRIDE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr,
    IMAGE: tl.constexpr, BYTES: tl.constexpr, RESIDUAL: tl.constexpr,
    RES_H: tl.constexpr, RES_W: tl.constexpr, RES_STRIDE: tl.constexpr, RES_CHANNELS: tl.constexpr,
    START_H: tl.constexpr, START_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    BEFORE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Implicit GEMM: (pixels, taps·channels) × (taps·channels, out channels), in float32.

    Of the tiles of the first ``rows`` rows, every ``step``-th from ``first`` on.
    IMAGE: the input is the caller's images, unpadded, with any strides, read through ``index``; a step of
    the product then mixes taps. Else the input is padded rows and a step lies within one tap.
    """
    # A whole number of steps covers the depth: weights are zero-padded to it.
    DEPTH: tl.constexpr = tl.cdiv(KH * KW * CHANNELS, BLOCK_DEPTH) * BLOCK_DEPTH
    COLUMNS: tl.constexpr = OUT_CHANNELS // BLOCK_CHANNELS
    total = rows * (OUT_H * OUT_W)
    tiles = tl.cdiv(total, BLOCK_PIXELS) * COLUMNS
    lane = tl.arange(0, BLOCK_DEPTH)
    for tile in tl.range(first, tiles, step, num_stages=1):
        pixel = tile // COLUMNS * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        channel = tile % COLUMNS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        live = pixel < total
        image = pixel // (OUT_H * OUT_W)
        oh = pixel % (OUT_H * OUT_W) // OUT_W
        ow = pixel % OUT_W
        source = image
        if IMAGE:
            source = tl.load(index + image, mask=live, other=0)
        base = source.to(tl.int64) * x_image
        accumulator = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
        for start in tl.range(0, DEPTH, BLOCK_DEPTH):
            if IMAGE:
                tap = (start + lane) // CHANNELS
                c = (start + lane) % CHANNELS
                h = (oh * STRIDE_H - TOP)[:, None] + (tap // KW * DILATION_H)[None, :]
                w = (ow * STRIDE_W - LEFT)[:, None] + (tap % KW * DILATION_W)[None, :]
                inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (tap < KH * KW)[None, :]
                inside = inside & live[:, None]
                at = base[:, None] + h * x_row + w * x_column + (c * x_channel)[None, :]
                a = tl.load(x + at, mask=inside, other=0)
                if BYTES:
                    a = tl.load(table + (c * 256)[None, :] + a.to(tl.int32), mask=inside, other=0.0)
            else:
                tap = start // CHANNELS
                c = tl.multiple_of(start % CHANNELS, BLOCK_DEPTH) + lane
                h = oh * STRIDE_H - TOP + tap // KW * DILATION_H
                w = ow * STRIDE_W - LEFT + tap % KW * DILATION_W
                inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                at = tl.multiple_of(base + (h * W + w) * CHANNELS, [16])
                a = tl.load(x + at[:, None] + c[None, :], mask=inside[:, None], other=0.0)
            b = tl.load(weight + (start + lane)[:, None] * OUT_CHANNELS + channel[None, :])
            accumulator = tl.dot(a.to(b.dtype), b, accumulator, input_precision="ieee")
        accumulator += tl.load(bias + channel)[None, :]
        if RESIDUAL:
            accumulator += residual_tile(
                residual, image, oh, ow, live, channel,
                RES_H, RES_W, RES_STRIDE, RES_CHANNELS, START_H, START_W, STEP_H, STEP_W, BEFORE,
            )  # fmt: skip
        accumulator = activate(accumulator, ACTIVATION)
        at = pixel.to(tl.int64)[:, None] * OUT_STRIDE + channel[None, :]
        mask = live[:, None] & (channel < OUT_STRIDE)[None, :]
        tl.store(out + at, accumulator.to(out.dtype.element_ty), mask=mask)


@triton.jit
def pool_tiles(
    x, out, rows, first, step,
    H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TOP: tl.constexpr, BOTTOM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    MAX: tl.constexpr, COUNT_PADDING: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Maximum (NaN wins, padding never does) or average over windows; tiles as in :func:`conv_tiles`."""
    COLUMNS: tl.constexpr = CHANNELS // BLOCK_CHANNELS
    total = rows * (OUT_H * OUT_W)
    tiles = tl.cdiv(total, BLOCK_PIXELS) * COLUMNS
    for tile in tl.range(first, tiles, step, num_stages=1):
        pixel = tile // COLUMNS * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        channel = tile % COLUMNS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        live = pixel < total
        base = (pixel // (OUT_H * OUT_W)).to(tl.int64) * (H * W)
        oh = pixel % (OUT_H * OUT_W) // OUT_W
        ow = pixel % OUT_W
        result = tl.full([BLOCK_PIXELS, BLOCK_CHANNELS], float("-inf") if MAX else 0.0, tl.float32)
        cells = tl.zeros([BLOCK_PIXELS], tl.int32)
        for tap in tl.range(0, KH * KW):
            h = oh * STRIDE_H - TOP + tap // KW
            w = ow * STRIDE_W - LEFT + tap % KW
            inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = (base + h * W + w) * CHANNELS
            mask = inside[:, None]
            if MAX:
                value = tl.load(x + at[:, None] + channel[None, :], mask=mask, other=float("-inf")).to(
                    tl.float32
                )
                result = tl.where((value > result) | (value != value), value, result)
            else:
                result += tl.load(x + at[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
                counted = inside
                if COUNT_PADDING:
                    counted = (h < H + BOTTOM) & (w < W + RIGHT)
                cells += counted.to(tl.int32)
        if not MAX:
            result = result / tl.maximum(cells, 1).to(tl.float32)[:, None]
        at = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit
def elementwise_tiles(
    x, other, scale, shift, out, rows, first, step,
    H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr, CHANNELS: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    START_H: tl.constexpr, START_W: tl.constexpr, START_C: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, STEP_C: tl.constexpr, FILL: tl.constexpr,
    SCALE: tl.constexpr, OTHER: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[h, w, c] = activation(scale[c]·x[start + step·(h, w, c)] + shift[c] + other[h, w, c]).

    Positions outside x (a Pad has negative starts) read FILL. Tiles as in :func:`conv_tiles`.
    """
    COLUMNS: tl.constexpr = OUT_STRIDE // BLOCK_CHANNELS
    total = rows * (OUT_H * OUT_W)
    tiles = tl.cdiv(total, BLOCK_PIXELS) * COLUMNS
    for tile in tl.range(first, tiles, step, num_stages=1):
        pixel = tile // COLUMNS * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        channel = tile % COLUMNS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        live = pixel < total
        h = START_H + pixel % (OUT_H * OUT_W) // OUT_W * STEP_H
        w = START_W + pixel % OUT_W * STEP_W
        c = START_C + channel * STEP_C
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        inside = inside[:, None] & ((c >= 0) & (c < CHANNELS))[None, :]
        row = (pixel // (OUT_H * OUT_W)).to(tl.int64) * (H * W) + h * W + w
        at = row[:, None] * STRIDE + c[None, :]
        value = tl.load(x + at, mask=live[:, None] & inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value, FILL)
        at = pixel.to(tl.int64)[:, None] * OUT_STRIDE + channel[None, :]
        if SCALE:
            value = value * tl.load(scale + channel)[None, :] + tl.load(shift + channel)[None, :]
        if OTHER:
            value += tl.load(other + at, mask=live[:, None], other=0.0).to(tl.float32)
        value = activate(value, ACTIVATION)
        value = tl.where((channel < OUT_CHANNELS)[None, :], value, 0.0)  # padding stays zero
        tl.store(out + at, value.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit
def conv_layer(
    KIND: tl.constexpr,
    x, weight, bias, residual, index, table, out, x_image, x_row, x_column, x_channel, rows, first, step,
):  # fmt: skip
    """:func:`conv_tiles` with the constants of a kind."""
    conv_tiles(
        x, weight, bias, residual, index, table, out, x_image, x_row, x_column, x_channel, rows, first, step,
        KIND[0], KIND[1], KIND[2], KIND[3], KIND[4], KIND[5], KIND[6], KIND[7], KIND[8], KIND[9], KIND[10],
        KIND[11], KIND[12], KIND[13], KIND[14], KIND[15], KIND[16], KIND[17], KIND[18], KIND[19], KIND[20],
        KIND[21], KIND[22], KIND[23], KIND[24], KIND[25], KIND[26], KIND[27], KIND[28], KIND[29], KIND[30],
    )  # fmt: skip


@triton.jit
def pool_layer(KIND: tl.constexpr, x, out, rows, first, step):
    """:func:`pool_tiles` with the constants of a kind."""
    pool_tiles(
        x, out, rows, first, step,
        KIND[0], KIND[1], KIND[2], KIND[3], KIND[4], KIND[5], KIND[6], KIND[7], KIND[8], KIND[9], KIND[10],
        KIND[11], KIND[12], KIND[13], KIND[14], KIND[15], KIND[16],
    )  # fmt: skip


@triton.jit
def elementwise_layer(KIND: tl.constexpr, x, other, vectors, out, rows, first, step):
    """:func:`elementwise_tiles` with the constants of a kind; vectors are scale and shift."""
    elementwise_tiles(
        x, other, vectors, vectors + KIND[CHANNELS_STORED], out, rows, first, step,
        KIND[0], KIND[1], KIND[2], KIND[3], KIND[4], KIND[5], KIND[6], KIND[7], KIND[8], KIND[9], KIND[10],
        KIND[11], KIND[12], KIND[13], KIND[14], KIND[15], KIND[16], KIND[17], KIND[18], KIND[19],
    )  # fmt: skip


@triton.jit
def conv_kernel(
    x, weight, bias, residual, index, table, out, x_image, x_row, x_column, x_channel, count,
    KIND: tl.constexpr,
):  # fmt: skip
    conv_layer(
        KIND, x, weight, bias, residual, index, table, out, x_image, x_row, x_column, x_channel,
        tl.load(count), tl.program_id(0), tl.num_programs(0),
    )  # fmt: skip


@triton.jit
def pool_kernel(x, out, count, KIND: tl.constexpr):
    pool_layer(KIND, x, out, tl.load(count), tl.program_id(0), tl.num_programs(0))


@triton.jit
def elementwise_kernel(x, other, vectors, out, count, KIND: tl.constexpr):
    elementwise_layer(KIND, x, other, vectors, out, tl.load(count), tl.program_id(0), tl.num_programs(0))


def kind(work: Work, byte_images: bool = False, limit: int = 128) -> Kind:
    """The numbers that specialise a layer's kernel, in the order of its ``_tiles`` function.

    Args:
        byte_images: the source of a convolution that reads images holds bytes.
        limit: most pixels of a convolution's tile.
    """
    if isinstance(work, Conv):
        return _conv_kind(work, byte_images, limit)
    block = _divisor(work.out[2], 64)
    if isinstance(work, Pooling):
        sizes = (*work.source, *work.out[:2], *work.kernel, *work.stride, *work.padding)
        return (*sizes, int(work.kind == "max"), int(work.include_padding), 2048 // block, block)
    return (
        *work.source, work.channels[0], *work.out, work.channels[1], *work.start, *work.step, work.fill,
        int(work.affine), int(work.other), ACTIVATIONS.index(work.activation), 2048 // block, block,
    )  # fmt: skip


def _conv_kind(work: Conv, byte_images: bool, limit: int) -> Kind:
    shape, view = work.shape, work.view or View(1, 1, 1, 1)
    out_channels = padded(shape.out_channels)
    tile = conv_tile(shape.channels, out_channels, work.image)
    return (
        shape.height, shape.width, shape.channels, shape.out_height, shape.out_width, out_channels,
        work.out[2], *shape.kernel, *shape.stride, *shape.dilation, *shape.corner,
        int(work.image), int(work.image and byte_images), int(work.view is not None),
        view.height, view.width, view.row_channels, view.channels, *view.start, *view.step, view.before,
        ACTIVATIONS.index(work.activation), min(tile.pixels, limit), tile.channels, tile.depth,
    )  # fmt: skip


def _grid(device: torch.device, tiles: int) -> tuple[int]:
    units = 1
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    return (max(min(tiles, units * PROGRAMS_PER_UNIT), 1),)


def run(
    layer: Layer,
    x: Tensor,
    other: Tensor | None,
    count: Tensor,
    out: Tensor,
    *,
    index: Tensor | None = None,
    table: Tensor | None = None,
) -> None:
    """One layer of the first ``count`` rows, in one launch.

    Args:
        layer: its weight is fp16 or fp32 and on the device, as everything.
        x: padded rows (n, H, W, C), or the images (N, C, H, W), any strides, float or bytes.
        other: the residual's or second operand's rows.
        count: (1,) int32.
        out: (n, OUT_H, OUT_W, C) of x's type, or (n, classes) float32 logits.
        index: (capacity,) int32, which image each row reads; for images.
        table: (C, 256) f32, what each byte means; for images of bytes.

    Raises:
        ValueError: more pixels than 32 bits count, or an input that is not contiguous.

    Example:
        run(layer, rows, None, count, out)
    """
    work = layer.work
    pixels = len(out) * work.out[0] * work.out[1]
    if pixels >= 2**31:
        raise ValueError(
            f"{len(out)} rows have {pixels} output pixels; expected fewer than 2**31: split the batch"
        )
    image = isinstance(work, Conv) and work.image
    if not image and not x.is_contiguous():
        raise ValueError(f"rows have strides {x.stride()}; expected contiguous rows")
    if len(out) == 0:
        return
    second = x if other is None else other
    constants = kind(work, x.dtype == torch.uint8)
    if isinstance(work, Conv):
        tile = conv_tile(work.shape.channels, padded(work.shape.out_channels), image)
        columns = padded(work.shape.out_channels) // tile.channels
        strides = (x.stride(0), x.stride(2), x.stride(3), x.stride(1)) if image else (x.stride(0), 0, 0, 1)
        launch(
            conv_kernel, _grid(x.device, triton.cdiv(pixels, tile.pixels) * columns),
            x, layer.weight, layer.vectors, second, count if index is None else index,
            count if table is None else table, out, *strides, count, KIND=constants,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return
    block_pixels, block = constants[-2:]
    grid = _grid(x.device, triton.cdiv(pixels, int(block_pixels)) * (work.out[2] // int(block)))
    if isinstance(work, Pooling):
        launch(pool_kernel, grid, x, out, count, KIND=constants, num_warps=4)
    else:
        vectors = count if layer.vectors is None else layer.vectors
        launch(elementwise_kernel, grid, x, second, vectors, out, count, KIND=constants, num_warps=4)
