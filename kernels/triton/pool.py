"""Max and average pooling on NHWC rows, with the number of rows in device memory.

Launches and tiles work as in ``conv.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastcascade.kernels.layers import Pooling, power_of_two_divisor

__all__ = ["PoolKind", "pool_kernel", "pool_kind", "pool_layer"]


class PoolKind(NamedTuple):
    """The constexpr arguments of :func:`pool_tiles`, in its order."""

    h: int
    w: int
    channels: int
    out_h: int
    out_w: int
    kh: int
    kw: int
    stride_h: int
    stride_w: int
    top: int
    bottom: int
    left: int
    right: int
    max: int
    count_padding: int
    block_pixels: int
    block_channels: int


def pool_kind(work: Pooling) -> PoolKind:
    """The constants of one pooling layer."""
    channels = power_of_two_divisor(work.out[2], 64)
    return PoolKind(
        *work.source, *work.out[:2], *work.kernel, *work.stride, *work.padding,
        int(work.kind == "max"), int(work.include_padding), 2048 // channels, channels,
    )  # fmt: skip


@triton.jit
def pool_tiles(
    x, out, rows, first, step,
    H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TOP: tl.constexpr, BOTTOM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    MAX: tl.constexpr, COUNT_PADDING: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Maximum or average over windows. A NaN in a window makes its maximum NaN; padding is never the maximum.

    Computes every ``step``-th tile of the first ``rows`` rows, starting with tile ``first``.
    """
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
def pool_layer(KIND: tl.constexpr, x, out, rows, first, step):
    """:func:`pool_tiles` with its constexpr arguments taken from KIND, a :class:`PoolKind`."""
    pool_tiles(
        x, out, rows, first, step,
        KIND[0], KIND[1], KIND[2], KIND[3], KIND[4], KIND[5], KIND[6], KIND[7], KIND[8], KIND[9], KIND[10],
        KIND[11], KIND[12], KIND[13], KIND[14], KIND[15], KIND[16],
    )  # fmt: skip


@triton.jit
def pool_kernel(x, out, count, KIND: tl.constexpr):
    pool_layer(KIND, x, out, tl.load(count), tl.program_id(0), tl.num_programs(0))
