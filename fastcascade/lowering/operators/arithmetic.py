"""Sums, products and quotients of values and constants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastcascade.lowering.operations import Activation, Add, Multiply, Op, ScaleShift
from fastcascade.lowering.translator import Translator, Value, lowers

aten = torch.ops.aten


def scale_shift(t: Translator, value: Value, scale: Any = 1.0, shift: Any = 0.0) -> Value:
    """scale·value + shift; the constants broadcast against the view."""
    shape = t.shapes[value.number]
    constants = [t.constant_for(constant, value) for constant in (scale, shift)]
    per_channel = all(constant.numel() == constant.shape[0] for constant in constants)
    wide = shape[:1] if per_channel else shape
    scale, shift = ((c.reshape(-1) if per_channel else c).expand(wide).contiguous() for c in constants)
    return t.emit_elementwise(ScaleShift, value, scale=scale, shift=shift)


def binary(t: Translator, kind: type[Op], left: Value, right: Value) -> Value:
    """An operation on two values; equal views stay views, others become plain values that may broadcast."""
    same_layout = t.shapes[left.number] == t.shapes[right.number] and left.axes == right.axes
    if same_layout:
        return t.emit_elementwise(kind, left, other=right.number)
    if broadcast := _gated(t, kind, left, right) or _gated(t, kind, right, left):
        return broadcast
    axes = max(len(left.axes), len(right.axes))
    left, right = (
        t.plain(t.reshaped(v, (1,) * (axes - len(v.axes)) + v.shape, v.storage)) for v in (left, right)
    )
    return t.emit(kind, t.result_shape(), input=left.number, other=right.number)


def _gated(t: Translator, kind: type[Op], value: Value, gate: Value) -> Value | None:
    """A view and a gate with one number per channel, or per pixel, where both mean the same stored axes."""
    shape, small = t.shapes[value.number], t.shapes[gate.number]
    padded: tuple[Any, ...] = ((),) * (len(value.axes) - len(gate.axes)) + gate.axes
    if len(shape) != len(small) or any(n not in (1, m) for m, n in zip(shape, small, strict=True)):
        return None
    kept = {axis for axis, size in enumerate(small) if size > 1}
    narrowed = tuple(tuple(factor for factor in axis if factor.axis in kept) for axis in value.axes)
    if len(padded) != len(value.axes) or narrowed != padded:
        return None
    result = t.emit(kind, shape, input=value.number, other=gate.number)
    return replace(result, axes=value.axes)


@lowers(aten.add, aten.sub)
def add(t: Translator, input: Any, other: Any, alpha: float = 1.0) -> Value:
    """input ± alpha·other."""
    factor = (-1.0 if t.calls(aten.sub) else 1.0) * float(alpha)
    if not isinstance(other, Value):
        return scale_shift(t, input, shift=torch.as_tensor(other, dtype=torch.float64) * factor)
    if not isinstance(input, Value):
        return scale_shift(t, other, scale=factor, shift=input)
    return binary(t, Add, input, other if factor == 1 else scale_shift(t, other, scale=factor))


@lowers(aten.rsub)
def rsub(t: Translator, input: Any, other: Any, alpha: float) -> Value:
    """other − alpha·input."""
    return scale_shift(t, input, scale=-float(alpha), shift=other)


@lowers(aten.neg)
def neg(t: Translator, input: Value) -> Value:
    """−input."""
    return scale_shift(t, input, scale=-1.0)


@lowers(aten.mul)
def mul(t: Translator, input: Any, other: Any) -> Value:
    """input · other."""
    if isinstance(input, Value) and isinstance(other, Value):
        return binary(t, Multiply, input, other)
    value, constant = (input, other) if isinstance(input, Value) else (other, input)
    return scale_shift(t, value, scale=constant)


@lowers(aten.div)
def div(t: Translator, input: Any, other: Any, rounding_mode: Any = None) -> Value:
    """input / other."""
    if rounding_mode is not None:
        t.refuse(f"rounding_mode {rounding_mode!r}")
    if not isinstance(other, Value):
        return scale_shift(t, input, scale=1 / torch.as_tensor(other, dtype=torch.float64))
    return mul(t, t.emit_elementwise(Activation, other, kind="reciprocal"), input)  # type: ignore[no-any-return]


@lowers(aten.pow)
def power(t: Translator, input: Any, exponent: Any) -> Value:
    """input to the power of 2, 1/2 or −1."""
    if not isinstance(input, Value) or exponent not in (2, 0.5, -1):
        t.refuse(f"exponent {exponent}; only 2, 0.5 and -1 are supported")
    if exponent == 2:
        return binary(t, Multiply, input, input)
    return t.emit_elementwise(Activation, input, kind="sqrt" if exponent == 0.5 else "reciprocal")


@lowers(aten.square)
def square(t: Translator, input: Value) -> Value:
    """input²."""
    return power(t, input, 2)  # type: ignore[no-any-return]


@lowers(aten.addcmul)
def addcmul(t: Translator, input: Any, tensor1: Any, tensor2: Any, value: float) -> Value:
    """input + value·tensor1·tensor2."""
    return add(t, input, mul(t, tensor1, tensor2), value)  # type: ignore[no-any-return]
