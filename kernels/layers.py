"""The layers of a lowered stage, as the kernels and their twins take them.

A layer reads one or two values and writes one; values have numbers, 0 is the stage's input. A value is rows
(n, H, W, C), one row an instance, with the channels padded with zeros to a multiple of 16, so that loads are
16 bytes wide and products have whole tensor-core tiles. Value 0 may be the caller's images instead.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

__all__ = ["Conv", "ConvShape", "Elementwise", "Layer", "Pooling", "View", "Work", "pack_weight", "padded"]


def padded(channels: int) -> int:
    """Channels as rows store them: the next multiple of 16.

    Example:
        >>> padded(3), padded(16), padded(17)
        (16, 16, 32)
    """
    return -(-channels // 16) * 16


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


class Conv(NamedTuple):
    """activation(conv(source) + bias + residual); ``view`` reads the residual, None where there is none.

    ``image``: the source is the caller's images. ``logits``: the output is (n, out_channels) float32.
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
    """Maximum or average over windows; ``source`` and ``out`` are (H, W, stored channels).

    ``padding`` (top, bottom, left, right); ``include_padding``: padded zeros count in an average's divisor.
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

    ``source`` and ``out`` are (H, W, stored channels), ``channels`` how many of each are real; positions
    outside the source read ``fill``. ``affine``, ``other``: scale and shift, or the second operand, exist.
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
"""What a layer computes, with all its sizes."""


class Layer(NamedTuple):
    """One operation of a stage.

    Attributes:
        work: what is computed, and all sizes.
        output, source, other: numbers of the values; other is a residual or a second operand, or None.
        weight: of a convolution, from :func:`pack_weight`; its dtype is the arithmetic's.
        vectors: float32: a convolution's bias (O,), or scale and shift (2, C); None without either.
        label: in words, for reports.
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
        """The values that it reads."""
        return (self.source,) if self.other is None else (self.source, self.other)


def pack_weight(weight: Tensor, in_channels: int) -> Tensor:
    """(O, I, kh, kw) → (depth, padded O): rows are taps × channels in the order in which kernels walk.

    Args:
        in_channels: channels per tap as the source stores them: padded, or I where it is an image.

    Returns:
        depth is taps·in_channels, filled up to a multiple of 16; what is not a weight is zero.
    """
    out, channels, height, width = weight.shape
    packed = weight.new_zeros(height * width, in_channels, padded(out))
    packed[:, :channels, :out] = weight.permute(2, 3, 1, 0).reshape(height * width, channels, out)
    flat = packed.reshape(-1, padded(out))
    return F.pad(flat, (0, 0, 0, -len(flat) % 16)).contiguous()
