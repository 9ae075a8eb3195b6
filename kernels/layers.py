"""The layers of a lowered stage: the data types that the layer kernels and their twins take.

A layer reads one or two numbered values and writes one. Value 0 is the input of the stage: the caller's
images, or rows. A value is rows (n, H, W, C), one row per instance. Its channels are zero-padded to a
multiple of 16, for 16-byte loads and whole tensor-core tiles.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

__all__ = ["Conv", "ConvShape", "Elementwise", "Layer", "Pooling", "View", "Work", "pack_weight", "padded"]


def padded(channels: int) -> int:
    """The number of stored channels: the next multiple of 16.

    Example:
        >>> padded(3), padded(16), padded(17)
        (16, 16, 32)
    """
    return -(-channels // 16) * 16


def power_of_two_divisor(n: int, limit: int) -> int:
    """The largest power of two that divides n and is at most ``limit``, itself a power of two.

    Example:
        >>> power_of_two_divisor(48, 64), power_of_two_divisor(256, 64)
        (16, 64)
    """
    return min(n & -n, limit)


class ConvShape(NamedTuple):
    """Sizes of a convolution; ``corner`` is the padding at the top and at the left."""

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
    """A strided, zero-padded view of rows (height, width, row_channels), read as a residual.

    The view has every ``step``-th pixel, beginning with ``start``. Its ``channels`` channels are added to the
    output channels from ``before`` on.
    """

    height: int
    width: int
    row_channels: int
    channels: int
    start: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)
    before: int = 0


class Conv(NamedTuple):
    """activation(conv(source) + bias + residual).

    ``view`` describes the residual, None without one. ``image``: the source is the caller's images.
    ``logits``: the output is (n, out_channels) float32.
    """

    shape: ConvShape
    view: View | None
    activation: str
    image: bool = False
    logits: bool = False

    @property
    def out(self) -> tuple[int, int, int]:
        """(H, W, stored channels) of the output."""
        channels = self.shape.out_channels
        return self.shape.out_height, self.shape.out_width, channels if self.logits else padded(channels)


class Pooling(NamedTuple):
    """Maximum or average over windows.

    ``source`` and ``out`` are (H, W, stored channels); ``padding`` is (top, bottom, left, right).
    ``include_padding``: the divisor of an average counts the padding.
    """

    source: tuple[int, int, int]
    out: tuple[int, int, int]
    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    include_padding: bool


class Elementwise(NamedTuple):
    """out[h, w, c] = activation(scale[c]·source[start + step·(h, w, c)] + shift[c] + other[h, w, c]).

    ``source`` and ``out`` are (H, W, stored channels); ``channels`` counts those that are not padding, of
    each. Positions outside the source read ``fill``. ``affine``: there are scale and shift. ``other``: there
    is a second operand.
    """

    source: tuple[int, int, int]
    out: tuple[int, int, int]
    channels: tuple[int, int]
    start: tuple[int, int, int] = (0, 0, 0)
    step: tuple[int, int, int] = (1, 1, 1)
    fill: float = 0.0
    affine: bool = False
    other: bool = False
    activation: str = "none"


Work = Conv | Pooling | Elementwise
"""The computation of a layer, with all sizes."""


class Layer(NamedTuple):
    """One operation of a stage.

    Attributes:
        work: the computation.
        output, source, other: numbers of the values; other is a residual or a second operand, or None.
        weight: of a convolution, from :func:`pack_weight`. Products are computed in its dtype.
        vectors: float32 bias (O,) of a convolution, or scale and shift (2, C); None without either.
        label: the operation in words, for reports.
    """

    work: Work
    output: int
    source: int
    other: int | None
    weight: Tensor | None
    vectors: Tensor | None
    label: str

    @property
    def reads(self) -> tuple[int, ...]:
        """Numbers of the values that the layer reads."""
        return (self.source,) if self.other is None else (self.source, self.other)


def pack_weight(weight: Tensor, in_channels: int) -> Tensor:
    """Pack a convolution's weight for the implicit GEMM: (O, I, kh, kw) → (depth, padded O).

    Args:
        in_channels: stored channels of the source: padded, or I for an image.

    Returns:
        row tap·in_channels + c holds the weights of channel c at that tap. The depth is rounded up to a
        multiple of 16; all padding is zero.
    """
    out, channels, height, width = weight.shape
    packed = weight.new_zeros(height * width, in_channels, padded(out))
    packed[:, :channels, :out] = weight.permute(2, 3, 1, 0).reshape(height * width, channels, out)
    flat = packed.reshape(-1, padded(out))
    return F.pad(flat, (0, 0, 0, -len(flat) % 16)).contiguous()
