"""Elementwise layers on NHWC rows: scale and shift, add, activation, slice, pad.

The number of rows is in device memory. Launches and tiles work as in ``conv.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastcascade.kernels.layers import Elementwise, power_of_two_divisor
from fastcascade.kernels.triton.activation import ACTIVATIONS, activate

__all__ = ["ElementwiseKind", "elementwise_kernel", "elementwise_kind", "elementwise_layer"]


class ElementwiseKind(NamedTuple):
    """The constexpr arguments of :func:`elementwise_tiles`, in its order."""

    h: int
    w: int
    stride: int
    channels: int
    out_h: int
    out_w: int
    out_stride: int
    out_channels: int
    start_h: int
    start_w: int
    start_c: int
    step_h: int
    step_w: int
    step_c: int
    fill: float
    scale: int
    other: int
    activation: int
    block_pixels: int
    block_channels: int


OUT_STRIDE_FIELD = tl.constexpr(ElementwiseKind._fields.index("out_stride"))


def elementwise_kind(work: Elementwise) -> ElementwiseKind:
    """The constants of one elementwise layer."""
    channels = power_of_two_divisor(work.out[2], 64)
    return ElementwiseKind(
        *work.source, work.channels[0], *work.out, work.channels[1], *work.start, *work.step, work.fill,
        int(work.affine), int(work.other), ACTIVATIONS.index(work.activation), 2048 // channels, channels,
    )  # fmt: skip


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

    Positions outside x read FILL; a Pad has negative starts. Computes every ``step``-th tile of the first
    ``rows`` rows, starting with tile ``first``.
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
def elementwise_layer(KIND: tl.constexpr, x, other, vectors, out, rows, first, step):
    """:func:`elementwise_tiles` with its constexpr arguments taken from KIND, an :class:`ElementwiseKind`.

    ``vectors`` holds the scale of every stored channel, then the shift.
    """
    elementwise_tiles(
        x, other, vectors, vectors + KIND[OUT_STRIDE_FIELD], out, rows, first, step,
        KIND[0], KIND[1], KIND[2], KIND[3], KIND[4], KIND[5], KIND[6], KIND[7], KIND[8], KIND[9], KIND[10],
        KIND[11], KIND[12], KIND[13], KIND[14], KIND[15], KIND[16], KIND[17], KIND[18], KIND[19],
    )  # fmt: skip


@triton.jit
def elementwise_kernel(x, other, vectors, out, count, KIND: tl.constexpr):
    elementwise_layer(KIND, x, other, vectors, out, tl.load(count), tl.program_id(0), tl.num_programs(0))
