"""Convolution on NHWC rows as an implicit GEMM, with the number of rows in device memory.

The kernel is a loop over tiles of output pixels and channels. A launch of :func:`conv_kernel` runs one layer
over all active rows: a fixed number of programs strides over the tiles, and a program without a tile returns
    at
once. ``persistent.py`` calls the same loop for one row at a time.

The first layer of a stage reads the caller's images in place, through the index of the active set. Bytes are
converted through the pixel table.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastcascade.kernels.layers import Conv, View, padded, power_of_two_divisor
from fastcascade.kernels.triton.activation import ACTIVATIONS, activate

__all__ = ["ConvKind", "ConvTile", "conv_kernel", "conv_kind", "conv_layer", "conv_tile"]


class ConvTile(NamedTuple):
    """Tile sizes, warps and pipeline depth of a convolution."""

    pixels: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int


def conv_tile(in_channels: int, out_channels: int, image: bool) -> ConvTile:
    """Tile sizes for padded channel counts; ``image`` marks a layer that reads the caller's images."""
    channels = power_of_two_divisor(out_channels, 128)
    depth = 16 if image else power_of_two_divisor(in_channels, 64)
    return ConvTile(128, channels, depth, num_warps=8 if channels == 128 else 4, num_stages=3)


class ConvKind(NamedTuple):
    """The constexpr arguments of :func:`conv_tiles`, in its order: sizes, flags, residual view, tile."""

    h: int
    w: int
    channels: int
    out_h: int
    out_w: int
    out_channels: int
    out_stride: int
    kh: int
    kw: int
    stride_h: int
    stride_w: int
    dilation_h: int
    dilation_w: int
    top: int
    left: int
    image: int
    bytes: int
    residual: int
    res_h: int
    res_w: int
    res_stride: int
    res_channels: int
    start_h: int
    start_w: int
    step_h: int
    step_w: int
    before: int
    activation: int
    block_pixels: int
    block_channels: int
    block_depth: int


def conv_kind(work: Conv, byte_images: bool, max_pixels: int) -> ConvKind:
    """The constants of one convolution.

    Args:
        byte_images: the images that a layer reads are uint8; ignored for a layer that reads rows.
        max_pixels: most output pixels per tile.
    """
    shape, view = work.shape, work.view or View(1, 1, 1, 1)
    out_channels = padded(shape.out_channels)
    tile = conv_tile(shape.channels, out_channels, work.image)
    return ConvKind(
        shape.height, shape.width, shape.channels, shape.out_height, shape.out_width, out_channels,
        work.out[2], *shape.kernel, *shape.stride, *shape.dilation, *shape.corner,
        int(work.image), int(work.image and byte_images), int(work.view is not None),
        view.height, view.width, view.row_channels, view.channels, *view.start, *view.step, view.before,
        ACTIVATIONS.index(work.activation), min(tile.pixels, max_pixels), tile.channels, tile.depth,
    )  # fmt: skip


@triton.jit
def residual_tile(
    residual, image, oh, ow, live, channel,
    RES_H: tl.constexpr, RES_W: tl.constexpr, RES_STRIDE: tl.constexpr, RES_CHANNELS: tl.constexpr,
    START_H: tl.constexpr, START_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    """(pixels, channels) f32 tile of a residual read through a View; zero in channels that it lacks."""
    row = image.to(tl.int64) * (RES_H * RES_W) + (START_H + oh * STEP_H) * RES_W + START_W + ow * STEP_W
    c = channel - BEFORE
    there = live[:, None] & ((c >= 0) & (c < RES_CHANNELS))[None, :]
    return tl.load(residual + row[:, None] * RES_STRIDE + c[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def conv_tiles(
    x, weight, bias, residual, index, pixel_table, out, x_image, x_row, x_column, x_channel,
    rows, first, step,
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
    """Implicit GEMM: (pixels, taps·channels) × (taps·channels, out channels), accumulated in float32.

    Computes every ``step``-th tile of the first ``rows`` rows, starting with tile ``first``.
    IMAGE: the input is the caller's images, unpadded and with any strides, read through ``index``. A GEMM
    step then spans several taps. Otherwise the input is padded rows, and a step lies within one tap.
    """
    # Weights are zero-padded to a whole number of steps.
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
                    a = tl.load(pixel_table + (c * 256)[None, :] + a.to(tl.int32), mask=inside, other=0.0)
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
def conv_layer(
    KIND: tl.constexpr,
    x, weight, bias, residual, index, pixel_table, out, x_image, x_row, x_column, x_channel,
    rows, first, step,
):  # fmt: skip
    """:func:`conv_tiles` with its constexpr arguments taken from KIND, a :class:`ConvKind`."""
    conv_tiles(
        x, weight, bias, residual, index, pixel_table, out, x_image, x_row, x_column, x_channel,
        rows, first, step,
        KIND[0], KIND[1], KIND[2], KIND[3], KIND[4], KIND[5], KIND[6], KIND[7], KIND[8], KIND[9], KIND[10],
        KIND[11], KIND[12], KIND[13], KIND[14], KIND[15], KIND[16], KIND[17], KIND[18], KIND[19], KIND[20],
        KIND[21], KIND[22], KIND[23], KIND[24], KIND[25], KIND[26], KIND[27], KIND[28], KIND[29], KIND[30],
    )  # fmt: skip


@triton.jit
def conv_kernel(
    x, weight, bias, residual, index, pixel_table, out, x_image, x_row, x_column, x_channel, count,
    KIND: tl.constexpr,
):  # fmt: skip
    conv_layer(
        KIND, x, weight, bias, residual, index, pixel_table, out, x_image, x_row, x_column, x_channel,
        tl.load(count), tl.program_id(0), tl.num_programs(0),
    )  # fmt: skip
