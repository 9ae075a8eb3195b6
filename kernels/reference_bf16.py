"""The bf16 layers in plain torch: float32 with both factors of each product rounded to bfloat16.

``vdpbf16ps`` multiplies and adds as here, but for two liberties that it takes:

- It adds products to a float32 sum one after the other, and rounds each time. The order is fixed by the
  layer's shape. Here the exact sum is rounded once. The kernel keeps partial sums of at most 256 terms, so a
  sum of n terms is off by at most (256 + n / 256) · 2⁻²⁴ times the sum of the products' magnitudes. Tests
  allow 5e-6 of the largest value, and demand the same bits where all partial sums are integers below 2²⁴.
- It takes factors and sums below 2⁻¹²⁶ for 0: an error of at most n · 2⁻¹²⁶ times the largest factor.

What follows the sum (bias, residual, activation) is that of a float32 layer.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["conv2d", "linear", "rounded"]


def rounded(x: Tensor) -> Tensor:
    """Any shape, float32 → the nearest bfloat16 numbers as float32; halves go to even, NaN stays.

    Example:
        >>> import torch
        >>> rounded(torch.tensor([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 3.4e38])).tolist()
        [1.0, 1.0, 1.015625, inf]
    """
    return x.float().bfloat16().float()


def conv2d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """(n, C, H, W), weights (out, C/groups, kh, kw) → sums (n, out, H', W'), float32.

    ``padding`` is (top, bottom, left, right).

    Example:
        >>> import torch
        >>> conv2d(torch.full((1, 1, 1, 1), 1.001), torch.ones(1, 1, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
        tensor([[[[1.]]]])
    """
    top, bottom, left, right = padding
    padded = F.pad(rounded(x).double(), (left, right, top, bottom))
    return F.conv2d(padded, rounded(weight).double(), None, stride, 0, dilation, groups).float()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(n, in), weights (out, in) → sums (n, out), float32."""
    return F.linear(rounded(x).double(), rounded(weight).double()).float()
