"""Batch norm with stored statistics, layer norm over channels, and norms of vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastcascade.lowering.operations import Activation, Add, Conv2d, LayerNorm, Multiply
from fastcascade.lowering.operators.arithmetic import binary, scale_shift
from fastcascade.lowering.operators.pooling import mean, positions
from fastcascade.lowering.translator import Translator, Value, lowers

aten = torch.ops.aten


@lowers(aten.batch_norm, aten._native_batch_norm_legit_no_training)
def batch_norm(
    t: Translator,
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    eps: float,
    training: bool = False,
    **_: Any,
) -> Any:
    """Batch norm in eval mode: one scale and one shift per channel."""
    if training or running_mean is None:
        t.refuse("it uses batch statistics, which mix instances")
    mean, var = running_mean.double(), running_var.double()
    scale = (var + eps).rsqrt() if weight is None else weight.double() * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias.double() - mean * scale
    ones = (1,) * (len(input.axes) - 1)
    result = scale_shift(t, input, scale.reshape(-1, *ones), shift.reshape(-1, *ones))
    return [result] if isinstance(t.node.meta["val"], list | tuple) else result  # type: ignore[union-attr]


@lowers(aten.layer_norm)
def layer_norm(
    t: Translator, input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float, **_: Any
) -> Value:
    """Layer norm over the channels of every pixel, or over a vector."""
    value = t.pixels(input)
    if value is None or len(normalized_shape) != 1:
        t.refuse(
            f"over the last axes {tuple(normalized_shape)} of {input.shape}; only channels are supported"
        )
    channels = normalized_shape[0]
    result = t.emit(
        LayerNorm,
        t.shapes[value.number],
        input=value.number,
        scale=torch.ones(channels) if weight is None else weight,
        shift=torch.zeros(channels) if bias is None else bias,
        eps=float(eps),
    )
    return replace(result, axes=value.axes)


@lowers(aten.group_norm)
def group_norm(
    t: Translator, input: Any, num_groups: int, weight: Any, bias: Any, eps: float, **_: Any
) -> Value:
    """Normalisation over the pixels and channels of each group, in two passes: mean, then variance."""
    value = t.image(input)
    centred = binary(t, Add, value, scale_shift(t, _group_mean(t, value, num_groups), scale=-1.0))
    variance = _group_mean(t, binary(t, Multiply, centred, centred), num_groups)
    deviation = t.emit_elementwise(Activation, scale_shift(t, variance, shift=eps), kind="sqrt")
    gain = t.emit_elementwise(Activation, deviation, kind="reciprocal")
    result = binary(t, Multiply, centred, gain)
    scale, shift = (c if c is None else c.reshape(-1, 1, 1) for c in (weight, bias))
    return scale_shift(t, result, 1.0 if scale is None else scale, 0.0 if shift is None else shift)


def _group_mean(t: Translator, value: Value, groups: int) -> Value:
    """(C, H, W) → (C, 1, 1): for every channel the mean of its group. A convolution averages the channels."""
    means = t.plain(mean(t, value, [2, 3], keepdim=True))
    channels, width = value.shape[0], value.shape[0] // groups
    if width == 1:
        return means
    return t.emit(
        Conv2d,
        (channels, 1, 1),
        input=means.number,
        weight=torch.full((channels, width, 1, 1), 1 / width, dtype=torch.float64),
        bias=torch.zeros(channels),
        groups=groups,
    )


@lowers(aten.linalg_vector_norm)
def vector_norm(
    t: Translator, input: Any, ord: float, dim: Any, keepdim: bool = False, dtype: Any = None
) -> Value:
    """The Euclidean norm over pixels or channels: √(n · mean of squares)."""
    if ord != 2 or dim is None:
        t.refuse(f"of order {ord} over axes {dim}; only order 2 over given axes is supported")
    squares = mean(t, binary(t, Multiply, input, input), dim, keepdim)
    return t.emit_elementwise(
        Activation, scale_shift(t, squares, scale=positions(t, input, dim)), kind="sqrt"
    )
