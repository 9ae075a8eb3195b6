"""Convolutions and matrix products with constant weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcascade.lowering.operations import Conv2d, Linear
from fastcascade.lowering.translator import Translator, Value, lowers, pair

aten = torch.ops.aten


@lowers(aten.conv2d, aten.convolution)
def conv2d(
    t: Translator,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    transposed: bool = False,
    output_padding: Any = None,
) -> Value:
    """Convolution of a map; of a row of numbers, if the graph has decomposed a conv1d."""
    if transposed or not isinstance(weight, Tensor) or isinstance(bias, Value):
        t.refuse("transposed" if transposed else "its weight or bias depends on the input")
    if weight.ndim == 3:
        return conv1d(t, input, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
    value = t.image(input)
    spread, kernel = pair(dilation), (weight.shape[2], weight.shape[3])
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        sides = (reach[0] // 2, reach[0] - reach[0] // 2, reach[1] // 2, reach[1] - reach[1] // 2)
    else:
        rows, columns = (0, 0) if padding == "valid" else pair(padding)
        sides = (rows, rows, columns, columns)
    return t.emit(
        Conv2d,
        t.result_shape(),
        input=value.number,
        weight=weight,
        bias=torch.zeros(weight.shape[0]) if bias is None else bias,
        stride=pair(stride),
        padding=sides,
        dilation=spread,
        groups=groups,
    )


@lowers(aten.conv1d)
def conv1d(
    t: Translator,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Value:
    """Convolution along one axis: of (C, L), as a map of one row."""
    if not isinstance(input, Value) or not isinstance(weight, Tensor) or isinstance(bias, Value):
        t.refuse("its weight or bias depends on the input")
    if isinstance(padding, str):
        t.refuse(f"padding {padding!r}")
    channels, length = input.shape
    row = t.image(t.reshaped(input, (channels, 1, length), None))
    (side,), (step,), (spread,) = padding, stride, dilation
    out, _, kernel = weight.shape
    result = t.emit(
        Conv2d,
        (out, 1, t.result_shape()[1]),
        input=row.number,
        weight=weight.reshape(out, -1, 1, kernel),
        bias=torch.zeros(out) if bias is None else bias,
        stride=(1, step),
        padding=(0, 0, side, side),
        dilation=(1, spread),
        groups=groups,
    )
    return t.reshaped(result, t.result_shape(), result.storage)


@lowers(aten.linear)
def linear(t: Translator, input: Any, weight: Any, bias: Any) -> Value:
    """A product along the last axis: of a vector, or of every pixel of an NHWC map."""
    if not isinstance(weight, Tensor) or isinstance(bias, Value):
        t.refuse("its weight or bias depends on the input")
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    value = t.pixels(input) if isinstance(input, Value) and len(input.shape) > 1 else None
    if value is None:
        vector = t.plain(input)
        if len(vector.shape) != 1:
            t.refuse(f"it reads shape {vector.shape} per instance, whose last axis is not the channels")
        return t.emit(Linear, t.result_shape(), input=vector.number, weight=weight, bias=bias)
    shape = t.shapes[value.number]
    if len(shape) == 1:
        t.refuse(f"it reads a view of shape {value.shape} of a vector")
    result = t.emit(
        Conv2d, (weight.shape[0], *shape[1:]), input=value.number, weight=weight[:, :, None, None], bias=bias
    )
    return t.with_channels(value, result.number)


@lowers(aten.matmul, aten.mm)
def matmul(t: Translator, input: Any, **other: Any) -> Value:
    """A product with a constant matrix."""
    (weight,) = other.values()
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        t.refuse("only a product with a constant matrix is supported")
    return linear(t, input, weight.T, None)  # type: ignore[no-any-return]


@lowers(aten.addmm)
def addmm(t: Translator, input: Any, mat1: Any, mat2: Any, beta: float, alpha: float) -> Value:
    """A product with a constant matrix, plus a constant bias."""
    if not isinstance(mat2, Tensor) or not isinstance(input, Tensor) or (beta, alpha) != (1, 1):
        t.refuse("only a constant matrix and bias are supported")
    return linear(t, mat1, mat2.T, input.expand(mat2.shape[1]))  # type: ignore[no-any-return]
