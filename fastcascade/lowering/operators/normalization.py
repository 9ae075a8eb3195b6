"""Batch norm with stored statistics, layer norm over channels, and norms of vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastcascade.lowering.operations import Activation, LayerNorm, Multiply
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
