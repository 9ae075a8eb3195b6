"""The int8 kernels in plain torch: the definition of their bits.

Quantised values are integers in a floating tensor, which float64 convolves exactly. What follows the sum
rounds to float32 after every operation. A value that is not finite becomes NaN, and stays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Epilogue", "conv2d", "dequantize", "finish", "linear", "quantize"]


class Epilogue(NamedTuple):
    """What follows the exact sum; see ``lowering.quantized_operations.QuantizedConv2d``.

    ``multiplier`` and ``bias`` are (out,) float32, ``residual`` holds bytes of the output's shape or is None.
    """

    multiplier: Tensor
    bias: Tensor
    residual: Tensor | None
    residual_scale: float
    residual_zero_point: int
    low: float
    high: float
    output_zero_point: int | None


def quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Any shape, rounded to float32 first → the same shape, integers 0 … 255 or NaN, float32.

    Example:
        >>> quantize(torch.tensor([-1.0, 0.26, 1.3, 1e9]), scale=0.5, zero_point=0)
        tensor([  0.,   1.,   3., 255.])
    """
    x = x.float()
    steps = x * torch.tensor(scale, dtype=torch.float32, device=x.device).reciprocal()
    q = steps.clamp(-zero_point, 255 - zero_point).round() + zero_point
    return torch.where(x.isfinite(), q, torch.nan)


def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """(q − zero_point) · scale, float32."""
    return (q.float() - zero_point) * torch.tensor(scale, dtype=torch.float32, device=q.device)


def conv2d(
    q: Tensor,
    weight: Tensor,
    zero_point: int,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    epilogue: Epilogue,
) -> Tensor:
    """Bytes (n, C, H, W), weights (out, C/groups, kh, kw) → bytes or float32 (n, out, H', W'), as float32."""
    top, bottom, left, right = padding
    centred = F.pad(q.double() - zero_point, (left, right, top, bottom))
    sums = F.conv2d(centred, weight.double(), None, stride, 0, dilation, groups)
    return finish(sums, epilogue)


def linear(q: Tensor, weight: Tensor, zero_point: int, epilogue: Epilogue) -> Tensor:
    """Bytes (n, in), weights (out, in) → bytes or float32 (n, out), as float32."""
    return finish(F.linear(q.double() - zero_point, weight.double()), epilogue)


def finish(sums: Tensor, e: Epilogue) -> Tensor:
    """From exact sums (n, out, …), float64, to the output, float32."""
    axes = (-1, *(1,) * (sums.ndim - 2))
    y = sums.float() * e.multiplier.float().reshape(axes)
    y = y + e.bias.float().reshape(axes)
    if e.residual is not None:
        y = y + dequantize(e.residual, e.residual_scale, e.residual_zero_point)
    y = y.clamp(e.low, e.high)
    return y if e.output_zero_point is None else y.round() + e.output_zero_point
