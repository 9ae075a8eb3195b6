"""The operations of an int8 stage.

A value is float32, or *quantised*: a byte q from 0 to 255 that stands for (q − zero_point) · scale. The zero
point is a byte as well, so 0 is always exact. Weights are signed bytes from −127 to 127 with a scale per
output channel.

Products are summed as integers, without rounding. The sum then becomes a float32, and every step after it
rounds to float32, so that all kernels return the same bits: ``kernels/reference_int8.py`` defines them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcascade.lowering.operations import (
    Op,
    Shape,
    ValueType,
    conv_shape,
    require,
    require_tensor,
)

__all__ = ["MAX_SUM", "Dequantize", "Quantize", "QuantizedConv2d", "QuantizedLinear"]

BYTES = range(256)

MAX_SUM = 2**31 - 1
"""Largest sum of products that an int32 holds."""


def _require_grid(scale: float, zero_point: int, what: str) -> None:
    require(
        0 < scale < math.inf and zero_point in BYTES,
        f"{what} with scale {scale} and zero point {zero_point}; expected a positive scale and 0 to 255",
    )


@dataclass(frozen=True, eq=False, repr=False)
class Quantize(Op):
    """Float32 → bytes: clamp(round(input / scale), −zero_point, 255 − zero_point) + zero_point.

    Halves round to even. A value that is not finite makes the whole instance invalid: every float32 value
    that is computed from bytes becomes NaN.
    """

    input: int
    scale: float
    zero_point: int

    def output_shape(self, *inputs: Shape) -> Shape:
        _require_grid(self.scale, self.zero_point, "quantize")
        return inputs[0]

    def output_type(self, *inputs: ValueType) -> ValueType:
        require(inputs == ("f32",), "quantize reads bytes")
        return "u8"

    def __str__(self) -> str:
        return f"quantize, scale {self.scale:.4g}"


@dataclass(frozen=True, eq=False, repr=False)
class Dequantize(Op):
    """Bytes → float32: (input − zero_point) · scale."""

    input: int
    scale: float
    zero_point: int

    def output_shape(self, *inputs: Shape) -> Shape:
        _require_grid(self.scale, self.zero_point, "dequantize")
        return inputs[0]

    def output_type(self, *inputs: ValueType) -> ValueType:
        require(inputs == ("u8",), "dequantize reads float32")
        return "f32"

    def __str__(self) -> str:
        return f"dequantize, scale {self.scale:.4g}"


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedConv2d(Op):
    """A convolution of bytes.

    y = clamp(sum · multiplier + bias + (residual − residual_zero_point) · residual_scale, low, high), where
    sum = Σ weight · (input − zero_point) is exact and padding adds 0. With an ``output_zero_point``, y is in
    units of the output's scale and the output is round(y) + output_zero_point, a byte; without, it is y.

    ``weight`` (out, in/groups, kh, kw) int8; ``multiplier`` and ``bias`` (out,) f32; ``error``: root mean
    square of what quantisation changed, over that of the float32 output, on the calibration images.
    """

    input: int
    weight: Tensor
    multiplier: Tensor
    bias: Tensor
    zero_point: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: int | None = None
    residual_scale: float = 0.0
    residual_zero_point: int = 0
    low: float = -math.inf
    high: float = math.inf
    output_zero_point: int | None = None
    error: float = 0.0

    operands = ("input", "residual")

    def output_shape(self, *inputs: Shape) -> Shape:
        require(self.weight.ndim == 4, f"conv2d weight has shape {tuple(self.weight.shape)}; expected 4 axes")
        _check_sums(self)
        require(
            math.isfinite(self.residual_scale) and self.residual_zero_point in BYTES,
            f"int8 conv with residual scale {self.residual_scale}, zero point {self.residual_zero_point}",
        )
        shape = conv_shape(
            inputs[0], tuple(self.weight.shape), self.stride, self.padding, self.dilation, self.groups
        )
        require(
            self.residual is None or inputs[1] == shape,
            f"conv2d returns shape {shape}, but its residual has shape {inputs[-1]}",
        )
        return shape

    def output_type(self, *inputs: ValueType) -> ValueType:
        require(set(inputs) == {"u8"}, f"int8 conv reads values of types {inputs}; expected bytes")
        return "f32" if self.output_zero_point is None else "u8"

    def __str__(self) -> str:
        out, per_group, kernel_h, kernel_w = self.weight.shape
        words = [f"int8 conv {kernel_h}×{kernel_w} {per_group * self.groups}→{out}"]
        words += [f"stride {self.stride[0]}×{self.stride[1]}"] * (self.stride != (1, 1))
        words += [f"groups {self.groups}"] * (self.groups != 1)
        words += ["+residual"] * (self.residual is not None)
        return ", ".join([*words, *_range_words(self), f"error {self.error:.1%}"])


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedLinear(Op):
    """A linear layer of bytes; fields as in :class:`QuantizedConv2d`, ``weight`` (out, in) int8."""

    input: int
    weight: Tensor
    multiplier: Tensor
    bias: Tensor
    zero_point: int
    low: float = -math.inf
    high: float = math.inf
    output_zero_point: int | None = None
    error: float = 0.0

    def output_shape(self, *inputs: Shape) -> Shape:
        require(self.weight.ndim == 2, f"linear weight has shape {tuple(self.weight.shape)}; expected 2 axes")
        _check_sums(self)
        out, width = self.weight.shape
        require(inputs[0] == (width,), f"linear reads {inputs[0]}; expected ({width},)")
        return (out,)

    def output_type(self, *inputs: ValueType) -> ValueType:
        require(inputs == ("u8",), f"int8 linear reads values of types {inputs}; expected bytes")
        return "f32" if self.output_zero_point is None else "u8"

    def __str__(self) -> str:
        out, width = self.weight.shape
        return ", ".join([f"int8 linear {width}→{out}", *_range_words(self), f"error {self.error:.1%}"])


def _check_sums(op: QuantizedConv2d | QuantizedLinear) -> None:
    """Raise InvalidArgument unless weights are int8, sums fit in an int32 and constants are finite."""
    require(
        op.weight.dtype == torch.int8 and op.weight.is_contiguous() and bool((op.weight != -128).all()),
        f"int8 weights are {op.weight.dtype}; expected contiguous int8 from -127 to 127",
    )
    out = op.weight.shape[0]
    require(out >= 1 and op.weight.numel() >= 1, f"int8 weights of shape {tuple(op.weight.shape)}")
    require_tensor(op.multiplier, (out,), "multiplier")
    require_tensor(op.bias, (out,), "bias")
    require(
        bool(op.multiplier.isfinite().all() and op.bias.isfinite().all()),
        "the multiplier or bias of an int8 layer is not finite",
    )
    largest = 255 * int(op.weight.flatten(1).long().abs().sum(1).max())
    require(largest <= MAX_SUM, f"sums of an int8 layer may reach {largest}; expected at most {MAX_SUM}")
    output = op.output_zero_point
    lowest, highest = (-math.inf, math.inf) if output is None else (-output, 255 - output)
    require(
        op.zero_point in BYTES
        and (output is None or output in BYTES)
        and lowest <= op.low <= op.high <= highest,
        f"int8 layer with zero points {op.zero_point} and {output}, clamped to {op.low} … {op.high}; "
        f"expected 0 to 255, and limits within {lowest} … {highest}",
    )


def _range_words(op: QuantizedConv2d | QuantizedLinear) -> list[str]:
    return ["to float32"] if op.output_zero_point is None else []
