"""Convolution, pooling and elementwise kernels on NHWC rows, with the number of rows on the device.

Every grid is a fixed number of programs that stride over the tiles of the rows that are active, so a launch
costs the same whatever the host believes the count to be, and programs without a tile return at once.

Rows hold channels padded with zeros to a multiple of 16: loads are 16 bytes wide and products have whole
tensor-core tiles. The first layer reads the caller's images as they are, through the index of active
instances and, for bytes, through the table of pixel values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["ConvShape", "View", "conv", "conv_tile", "elementwise", "padded", "pool"]

PROGRAMS_PER_UNIT = 8
"""Programs launched per multiprocessor: enough to hide latency at 64 to 128 registers a thread."""


def padded(channels: int) -> int:
    """Channels as rows store them: the next multiple of 16."""
    return -(-channels // 16) * 16


def _divisor(n: int, limit: int) -> int:
    """The largest power of two that divides n, at most ``limit``."""
    return min(n & -n, limit)


class ConvShape(NamedTuple):
    """Sizes of a convolution; ``corner`` is the padding on top and on the left."""

    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    corner: tuple[int, int] = (0, 0)


class View(NamedTuple):
    """Where a residual comes from: every ``step``-th pixel of rows (height, width, channels), from ``start``;
    its first channel is added to output channel ``before``, and only ``channels`` channels are there."""

    height: int
    width: int
    row_channels: int
    channels: int
    start: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)
    before: int = 0


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
    """ReLU or ReLU6 that keeps NaN."""
    if ACTIVATION != "none":
        x = tl.where(x < 0, 0.0, x)
    if ACTIVATION == "relu6":
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
def conv_kernel(
    x, weight, bias, residual, index, count, table, out,
    x_image, x_row, x_column, x_channel,
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

    IMAGE: the input is the caller's images, unpadded, with any strides, read through ``index``; a step of
    the product then mixes taps. Else the input is padded rows and a step lies within one tap.
    """
    # A whole number of steps covers the depth: weights are zero-padded to it.
    DEPTH: tl.constexpr = tl.cdiv(KH * KW * CHANNELS, BLOCK_DEPTH) * BLOCK_DEPTH
    COLUMNS: tl.constexpr = OUT_CHANNELS // BLOCK_CHANNELS
    total = tl.load(count) * (OUT_H * OUT_W)
    tiles = tl.cdiv(total, BLOCK_PIXELS) * COLUMNS
    lane = tl.arange(0, BLOCK_DEPTH)
    tile = tl.program_id(0)
    while tile < tiles:
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
        tile += tl.num_programs(0)


@triton.jit
def pool_kernel(
    x, count, out,
    H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TOP: tl.constexpr, BOTTOM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    MAX: tl.constexpr, COUNT_PADDING: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Maximum (NaN wins, padding never does) or average over windows."""
    COLUMNS: tl.constexpr = CHANNELS // BLOCK_CHANNELS
    total = tl.load(count) * (OUT_H * OUT_W)
    tiles = tl.cdiv(total, BLOCK_PIXELS) * COLUMNS
    tile = tl.program_id(0)
    while tile < tiles:
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
        tile += tl.num_programs(0)


@triton.jit
def elementwise_kernel(
    x, other, scale, shift, count, out, fill,
    H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr, CHANNELS: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    START_H: tl.constexpr, START_W: tl.constexpr, START_C: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, STEP_C: tl.constexpr,
    SCALE: tl.constexpr, OTHER: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[h, w, c] = activation(scale[c]·x[start + step·(h, w, c)] + shift[c] + other[h, w, c]).

    Positions outside x (a Pad has negative starts) read ``fill``.
    """
    COLUMNS: tl.constexpr = OUT_STRIDE // BLOCK_CHANNELS
    total = tl.load(count) * (OUT_H * OUT_W)
    tiles = tl.cdiv(total, BLOCK_PIXELS) * COLUMNS
    tile = tl.program_id(0)
    while tile < tiles:
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
        value = tl.where(inside, value, fill)
        at = pixel.to(tl.int64)[:, None] * OUT_STRIDE + channel[None, :]
        if SCALE:
            value = value * tl.load(scale + channel)[None, :] + tl.load(shift + channel)[None, :]
        if OTHER:
            value += tl.load(other + at, mask=live[:, None], other=0.0).to(tl.float32)
        value = activate(value, ACTIVATION)
        value = tl.where((channel < OUT_CHANNELS)[None, :], value, 0.0)  # padding stays zero
        tl.store(out + at, value.to(out.dtype.element_ty), mask=live[:, None])
        tile += tl.num_programs(0)


def _grid(device: torch.device, tiles: int) -> tuple[int]:
    units = 1
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    return (max(min(tiles, units * PROGRAMS_PER_UNIT), 1),)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    count: Tensor,
    out: Tensor,
    shape: ConvShape,
    *,
    index: Tensor | None = None,
    table: Tensor | None = None,
    residual: Tensor | None = None,
    view: View | None = None,
    activation: str = "none",
) -> None:
    """activation(conv(x) + bias + residual) for the first ``count`` rows.

    Args:
        x: padded rows (n, H, W, C), or with ``index`` the images (N, C, H, W), any strides, float or bytes.
        weight: (depth, O) from :func:`pack_weight`, fp16 or fp32: the product's type; bias (O,) f32; O a
            multiple of 16.
        count: (1,) int32 on the device.
        out: (n, OUT_H, OUT_W, O), or (n, classes ≤ O) float32 where the output is one pixel of logits.
        index: (capacity,) int32, which image each row reads.
        table: (C, 256) f32, for bytes.
        residual: rows that are added before the activation; ``view`` says how they are read.

    Raises:
        ValueError: more pixels than 32 bits count, or an input that is not contiguous.

    Example:
        conv(images, weight, bias, count, out, shape, index=active, table=pixels, activation="relu")
    """
    pixels = len(out) * shape.out_height * shape.out_width
    if pixels >= 2**31:
        raise ValueError(
            f"{len(out)} rows have {pixels} output pixels; expected fewer than 2**31: split the batch"
        )
    image = index is not None
    if not image and not x.is_contiguous():
        raise ValueError(f"rows have strides {x.stride()}; expected contiguous rows")
    if len(out) == 0:
        return
    out_channels = len(bias)
    tile = conv_tile(shape.channels, out_channels, image)
    strides = (x.stride(0), x.stride(2), x.stride(3), x.stride(1)) if image else (x.stride(0), 0, 0, 1)
    view = view or View(1, 1, 1, 1)
    tiles = triton.cdiv(pixels, tile.pixels) * (out_channels // tile.channels)
    conv_kernel[_grid(x.device, tiles)](
        x, weight, bias, x if residual is None else residual, count if index is None else index, count,
        bias if table is None else table, out, *strides,
        **conv_constants(shape, out_channels, out.shape[-1], view, residual is not None, activation),
        IMAGE=image, BYTES=table is not None, BLOCK_PIXELS=tile.pixels, BLOCK_CHANNELS=tile.channels,
        BLOCK_DEPTH=tile.depth, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def conv_constants(
    shape: ConvShape, out_channels: int, out_stride: int, view: View, residual: bool, activation: str
) -> dict[str, int | str | bool]:
    """The sizes of a convolution as the kernel's constants."""
    return {
        "H": shape.height,
        "W": shape.width,
        "CHANNELS": shape.channels,
        "OUT_H": shape.out_height,
        "OUT_W": shape.out_width,
        "OUT_CHANNELS": out_channels,
        "OUT_STRIDE": out_stride,
        "KH": shape.kernel[0],
        "KW": shape.kernel[1],
        "STRIDE_H": shape.stride[0],
        "STRIDE_W": shape.stride[1],
        "DILATION_H": shape.dilation[0],
        "DILATION_W": shape.dilation[1],
        "TOP": shape.corner[0],
        "LEFT": shape.corner[1],
        "RESIDUAL": residual,
        "RES_H": view.height,
        "RES_W": view.width,
        "RES_STRIDE": view.row_channels,
        "RES_CHANNELS": view.channels,
        "START_H": view.start[0],
        "START_W": view.start[1],
        "STEP_H": view.step[0],
        "STEP_W": view.step[1],
        "BEFORE": view.before,
        "ACTIVATION": activation,
    }


def pack_weight(weight: Tensor, in_channels: int, dtype: torch.dtype, image: bool) -> Tensor:
    """(O, I, kh, kw) → (taps·in_channels, padded O), the order in which the kernel walks; zeros elsewhere.

    Args:
        in_channels: channels per tap as the input stores them: padded, or I where the input is an image.
        image: then the depth is filled up to a whole number of the kernel's steps.
    """
    out, channels, height, width = weight.shape
    packed = weight.new_zeros(height * width, in_channels, padded(out))
    packed[:, :channels, :out] = weight.permute(2, 3, 1, 0).reshape(height * width, channels, out)
    flat = packed.reshape(-1, padded(out))
    step = conv_tile(in_channels, padded(out), image).depth
    return torch.nn.functional.pad(flat, (0, 0, 0, -len(flat) % step)).to(dtype).contiguous()


def pool(
    x: Tensor,
    count: Tensor,
    out: Tensor,
    *,
    kind: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    include_padding: bool,
) -> None:
    """Max or average pooling of padded rows (n, H, W, C) into (n, OUT_H, OUT_W, C); see ``plan.Pool``."""
    if len(out) == 0:
        return
    channels = x.shape[3]
    block = _divisor(channels, 64)
    pixels = len(out) * out.shape[1] * out.shape[2]
    block_pixels = 2048 // block
    pool_kernel[_grid(x.device, triton.cdiv(pixels, block_pixels) * (channels // block))](
        x, count, out, H=x.shape[1], W=x.shape[2], CHANNELS=channels, OUT_H=out.shape[1], OUT_W=out.shape[2],
        KH=kernel[0], KW=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        TOP=padding[0], BOTTOM=padding[1], LEFT=padding[2], RIGHT=padding[3],
        MAX=kind == "max", COUNT_PADDING=include_padding,
        BLOCK_PIXELS=block_pixels, BLOCK_CHANNELS=block, num_warps=4,
    )  # fmt: skip


def elementwise(
    x: Tensor,
    count: Tensor,
    out: Tensor,
    channels: tuple[int, int],
    *,
    start: tuple[int, int, int] = (0, 0, 0),
    step: tuple[int, int, int] = (1, 1, 1),
    fill: float = 0.0,
    affine: tuple[Tensor, Tensor] | None = None,
    other: Tensor | None = None,
    activation: str = "none",
) -> None:
    """out[h, w, c] = activation(scale[c]·x[start + step·(h, w, c)] + shift[c] + other[h, w, c]).

    Args:
        x, out, other: padded rows (n, H, W, C).
        channels: how many of x's and of out's channels are real; out's others become zero.
        start, step: along (h, w, c); positions outside x read ``fill``.
        affine: scale and shift, (C,) f32, padded.
    """
    if len(out) == 0:
        return
    scale, shift = affine or (count, count)
    block = _divisor(out.shape[3], 64)
    block_pixels = 2048 // block
    pixels = len(out) * out.shape[1] * out.shape[2]
    elementwise_kernel[_grid(x.device, triton.cdiv(pixels, block_pixels) * (out.shape[3] // block))](
        x, x if other is None else other, scale, shift, count, out, float(fill),
        H=x.shape[1], W=x.shape[2], STRIDE=x.shape[3], CHANNELS=channels[0],
        OUT_H=out.shape[1], OUT_W=out.shape[2], OUT_STRIDE=out.shape[3], OUT_CHANNELS=channels[1],
        START_H=start[0], START_W=start[1], START_C=start[2],
        STEP_H=step[0], STEP_W=step[1], STEP_C=step[2],
        SCALE=affine is not None, OTHER=other is not None, ACTIVATION=activation,
        BLOCK_PIXELS=block_pixels, BLOCK_CHANNELS=block, num_warps=4,
    )  # fmt: skip
