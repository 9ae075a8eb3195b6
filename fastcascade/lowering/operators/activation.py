"""Elementwise functions of one value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastcascade.lowering.operations import PARAMETRIC, Activation, ActivationKind, Add, Softmax
from fastcascade.lowering.operators.arithmetic import binary, scale_shift
from fastcascade.lowering.translator import Translator, Value, lowers

aten = torch.ops.aten

_KINDS: dict[Any, ActivationKind] = {
    aten.relu: "relu",
    aten.relu6: "relu6",
    aten.sigmoid: "sigmoid",
    aten.hardsigmoid: "hard_sigmoid",
    aten.silu: "silu",
    aten.hardswish: "hard_swish",
    aten.mish: "mish",
    aten.tanh: "tanh",
    aten.exp: "exp",
    aten.sqrt: "sqrt",
    aten.reciprocal: "reciprocal",
}


def activation(t: Translator, value: Value, kind: ActivationKind, parameter: float = 0.0) -> Value:
    """An activation of a value in any view."""
    parameter = parameter if kind in PARAMETRIC else 0.0
    return t.emit_elementwise(Activation, value, kind=kind, parameter=parameter)


@lowers(*_KINDS)
def simple(t: Translator, input: Value) -> Value:
    """An activation without parameters."""
    return activation(t, input, next(kind for operator, kind in _KINDS.items() if t.calls(operator)))


@lowers(aten.gelu)
def gelu(t: Translator, input: Value, approximate: str) -> Value:
    """GELU, exact or by the hyperbolic tangent."""
    return activation(t, input, "gelu_tanh" if approximate == "tanh" else "gelu")


@lowers(aten.leaky_relu)
def leaky_relu(t: Translator, input: Value, negative_slope: float) -> Value:
    """max(x, slope·x), for slopes below 1."""
    return activation(t, input, "leaky_relu", float(negative_slope))


@lowers(aten.elu)
def elu(t: Translator, input: Value, alpha: float, scale: float, input_scale: float) -> Value:
    """ELU; SELU and CELU have other scales."""
    if (scale, input_scale) != (1, 1):
        t.refuse(f"scales {scale} and {input_scale}")
    return activation(t, input, "elu", float(alpha))


@lowers(aten.prelu)
def prelu(t: Translator, input: Value, weight: Any) -> Value:
    """relu(x) − slope·relu(−x), with one slope per channel."""
    if not isinstance(weight, Tensor):
        t.refuse("its slopes depend on the input")
    slopes = weight.reshape(-1, *(1,) * (len(input.axes) - 1))
    negative = activation(t, scale_shift(t, input, scale=-1.0), "relu")
    return binary(t, Add, activation(t, input, "relu"), scale_shift(t, negative, scale=-slopes))


@lowers(aten.rsqrt)
def rsqrt(t: Translator, input: Value) -> Value:
    """1/√x."""
    return activation(t, activation(t, input, "sqrt"), "reciprocal")


@lowers(aten.hardtanh, aten.clamp, aten.clamp_min)
def clamp(t: Translator, input: Value, **limits: Any) -> Value:
    """Clamping to [0, ∞), [0, 6], or [low, low + 6k] by scaling to the latter."""
    low, high = [*limits.values(), None][:2]
    if not isinstance(low, int | float) or isinstance(high, Tensor):
        t.refuse(f"it clamps to [{low}, {high}]; only numbers are supported, and a lower one is needed")
    if low != 0:
        input = scale_shift(t, input, shift=-float(low))
    if high is None or math.isinf(high):
        result = activation(t, input, "relu")
    elif high - low == 6:
        result = activation(t, input, "relu6")
    elif high > low:
        factor = 6.0 / (high - low)
        result = activation(t, scale_shift(t, input, scale=factor), "relu6")
        result = scale_shift(t, result, scale=1 / factor)
    else:
        t.refuse(f"it clamps to [{low}, {high}]")
    return result if low == 0 else scale_shift(t, result, shift=float(low))


@lowers(aten.softmax, aten._softmax)
def softmax(t: Translator, input: Value, dim: int, **_: Any) -> Value:
    """Softmax over an axis that runs through channels; over pixels, as attention has it, it is refused."""
    axis = t.axis(dim, input)
    if any(factor.axis != 0 for factor in input.axes[axis]):
        t.refuse("over pixels")
    moved = t.channels_reordered(t.moved(input, axis, 0))
    result = t.emit_elementwise(Softmax, moved, parts=moved.shape[0])
    return t.moved(result, 0, axis)
