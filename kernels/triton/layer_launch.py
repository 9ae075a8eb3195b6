"""One launch per layer: runs a convolution, pooling or elementwise layer over the active rows."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastcascade.kernels.layers import Conv, Layer, Pooling, Work, padded
from fastcascade.kernels.triton.conv import ConvKind, conv_kernel, conv_kind, conv_tile
from fastcascade.kernels.triton.elementwise import ElementwiseKind, elementwise_kernel, elementwise_kind
from fastcascade.kernels.triton.launch import launch
from fastcascade.kernels.triton.pool import PoolKind, pool_kernel, pool_kind

__all__ = ["Kind", "kind", "run_layer"]

Kind = ConvKind | PoolKind | ElementwiseKind
"""The constexpr arguments that specialise a layer's kernel."""

PROGRAMS_PER_MULTIPROCESSOR = 8
"""Enough to hide latency at 64 to 128 registers a thread."""


def kind(work: Work, byte_images: bool = False, max_pixels: int = 128) -> Kind:
    """The constexpr arguments for a layer.

    Args:
        byte_images: the images that a convolution reads are uint8.
        max_pixels: most output pixels per tile of a convolution.
    """
    if isinstance(work, Conv):
        return conv_kind(work, byte_images, max_pixels)
    return pool_kind(work) if isinstance(work, Pooling) else elementwise_kind(work)


def _grid(device: torch.device, tiles: int) -> tuple[int]:
    multiprocessors = 1
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return (max(min(tiles, multiprocessors * PROGRAMS_PER_MULTIPROCESSOR), 1),)


def run_layer(
    layer: Layer,
    x: Tensor,
    other: Tensor | None,
    count: Tensor,
    out: Tensor,
    *,
    index: Tensor | None = None,
    pixel_table: Tensor | None = None,
) -> None:
    """Run one layer on the first ``count`` rows, in one launch.

    Args:
        layer: its weight is fp16 or fp32, on the same device as every other tensor.
        x: padded rows (n, H, W, C), or the images (N, C, H, W) with any strides, float or uint8.
        other: rows of the residual or of the second operand.
        count: (1,) int32.
        out: (n, OUT_H, OUT_W, C) of x's dtype, or (n, classes) float32 logits.
        index: (capacity,) int32, the image that each row reads; for images only.
        pixel_table: (C, 256) float32, the value of each byte; for uint8 images only.

    Raises:
        ValueError: the output has 2³¹ pixels or more, or rows are not contiguous.

    Example:
        run_layer(layer, rows, None, count, out)
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
            count if pixel_table is None else pixel_table, out, *strides, count, KIND=constants,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return
    columns = work.out[2] // constants.block_channels
    grid = _grid(x.device, triton.cdiv(pixels, constants.block_pixels) * columns)
    if isinstance(work, Pooling):
        launch(pool_kernel, grid, x, out, count, KIND=constants, num_warps=4)
    else:
        vectors = count if layer.vectors is None else layer.vectors
        launch(elementwise_kernel, grid, x, second, vectors, out, count, KIND=constants, num_warps=4)
