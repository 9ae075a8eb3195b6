"""The operations of a plan in plain torch: the definition that every backend is tested against."""

from __future__ import annotations

import copy
import math
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcascade.errors import InvalidArgument
from fastcascade.kernels import reference_int8
from fastcascade.lowering.operations import (
    Activation,
    ActivationKind,
    AdaptivePool,
    Add,
    ChannelReduce,
    Concat,
    Conv2d,
    Flatten,
    Flip,
    LayerNorm,
    Linear,
    Multiply,
    Op,
    Pad,
    Pool,
    Reorder,
    Reshape,
    Resize,
    ScaleShift,
    Slice,
    Softmax,
)
from fastcascade.lowering.plan import SelectorPlan, StagePlan
from fastcascade.lowering.quantized_operations import Dequantize, Quantize, QuantizedConv2d, QuantizedLinear

__all__ = ["move_stage", "run_op", "run_stage"]


def activate(x: Tensor, kind: ActivationKind, parameter: float = 0.0) -> Tensor:
    """Apply an activation; NaN stays NaN."""
    match kind:
        case "none":
            return x
        case "relu":
            return x.relu()
        case "relu6":
            return x.clamp(0, 6)
        case "leaky_relu":
            return F.leaky_relu(x, parameter)
        case "elu":
            return F.elu(x, parameter)
        case "sigmoid":
            return x.sigmoid()
        case "hard_sigmoid":
            return ((x + 3) / 6).clamp(0, 1)
        case "silu":
            return x * x.sigmoid()
        case "hard_swish":
            return x * ((x + 3) / 6).clamp(0, 1)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "mish":
            return F.mish(x)
        case "tanh":
            return x.tanh()
        case "exp":
            return x.exp()
        case "sqrt":
            return x.sqrt()
        case "reciprocal":
            return x.reciprocal()
    raise InvalidArgument(f"unknown activation {kind!r}")


def pool(op: Pool, x: Tensor, height: int, width: int) -> Tensor:
    """The windows of a :class:`Pool`, (n, C, H, W) → (n, C, height, width).

    The image is first padded to exactly the cells that the windows cover, because torch's pooling has only
    symmetric padding.
    """
    top, bottom, left, right = op.padding
    rows = (height - 1) * op.stride[0] + op.kernel[0] - x.shape[2] - top
    columns = (width - 1) * op.stride[1] + op.kernel[1] - x.shape[3] - left
    sides = (left, columns, top, rows)  # a negative number crops cells that no window covers
    if op.kind == "max":
        return F.max_pool2d(F.pad(x, sides, value=-math.inf), op.kernel, op.stride)
    window_sum = partial(F.avg_pool2d, kernel_size=op.kernel, stride=op.stride, divisor_override=1)
    ones = torch.ones_like(x[:1, :1])
    if op.include_padding:
        ones = F.pad(ones, (left, right, top, bottom), value=1.0)
        cells = F.pad(ones, (0, columns - right, 0, rows - bottom))
    else:
        cells = F.pad(ones, sides)
    return window_sum(F.pad(x, sides)) / window_sum(cells)


def run_op(op: Op, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Run one operation on a batch.

    Args:
        inputs: the values that it reads, (n, …), in the order of ``op.reads``, in the dtype of the weights.
        shape: the output's shape per instance.
    """
    x = inputs[0]
    match op:
        case Conv2d():
            top, bottom, left, right = op.padding
            # F.conv2d pads symmetrically; F.pad adds the rest to one side.
            both = (min(top, bottom), min(left, right))
            extra = (left - both[1], right - both[1], top - both[0], bottom - both[0])
            padded = F.pad(x, extra) if any(extra) else x
            y = F.conv2d(padded, op.weight, op.bias, op.stride, both, op.dilation, op.groups)
            return activate(y if op.residual is None else y + inputs[1], op.activation)
        case Pool():
            return pool(op, x, *shape[1:])
        case Linear():
            return activate(F.linear(x, op.weight, op.bias), op.activation)
        case Add():
            return activate(x + inputs[1], op.activation)
        case Multiply():
            return x * inputs[1]
        case Activation():
            return activate(x, op.kind, op.parameter)
        case ScaleShift():
            axes = op.scale.shape if op.scale.ndim == x.ndim - 1 else (-1, *(1,) * (x.ndim - 2))
            return x * op.scale.reshape(axes) + op.shift.reshape(axes)
        case LayerNorm():
            pixels = F.layer_norm(x.movedim(1, -1), op.scale.shape, op.scale, op.shift, op.eps)
            return pixels.movedim(-1, 1)
        case Softmax():
            parts = x.reshape(len(x), op.parts, -1, *x.shape[2:])
            return parts.softmax(1).reshape(x.shape)
        case ChannelReduce():
            return x.mean(1, keepdim=True) if op.kind == "mean" else x.amax(1, keepdim=True)
        case Reorder():
            return x[:, list(op.channels)]
        case Flip():
            return x.flip(3)
        case Resize():
            if op.kind == "nearest":
                return F.interpolate(x, op.size, mode="nearest")
            return F.interpolate(
                x, op.size, mode=op.kind, align_corners=op.align_corners, antialias=op.antialias
            )
        case AdaptivePool():
            pooled = F.adaptive_max_pool2d if op.kind == "max" else F.adaptive_avg_pool2d
            return pooled(x, op.size)
        case Reshape():
            return x.reshape(len(x), *op.shape)
        case Slice():
            ranges = [slice(*numbers) for numbers in zip(op.start, op.stop, op.step, strict=True)]
            return x[:, ranges[0], ranges[1], ranges[2]]
        case Pad():
            sides = [n for pair in zip(op.before, op.after, strict=True) for n in pair]
            if op.mode != "constant":
                return F.pad(x, [*sides[4:], *sides[2:4]], mode=op.mode)
            return F.pad(x, [*sides[4:], *sides[2:4], *sides[:2]], value=op.value)
        case Concat():
            return torch.cat(inputs, 1)
        case Flatten():
            return x.flatten(1)
        case Quantize():
            return reference_int8.quantize(x, op.scale, op.zero_point).to(x.dtype)
        case Dequantize():
            return reference_int8.dequantize(x, op.scale, op.zero_point).to(x.dtype)
        case QuantizedConv2d():
            window = (op.zero_point, op.stride, op.padding, op.dilation, op.groups)
            residual = None if op.residual is None else inputs[1]
            return reference_int8.conv2d(x, op.weight, *window, _epilogue(op, residual)).to(x.dtype)
        case QuantizedLinear():
            return reference_int8.linear(x, op.weight, op.zero_point, _epilogue(op, None)).to(x.dtype)
    raise InvalidArgument(f"the interpreter has no {type(op).__name__}")


def _epilogue(op: QuantizedConv2d | QuantizedLinear, residual: Tensor | None) -> reference_int8.Epilogue:
    return reference_int8.Epilogue(
        op.multiplier,
        op.bias,
        residual,
        getattr(op, "residual_scale", 0.0),
        getattr(op, "residual_zero_point", 0),
        op.low,
        op.high,
        op.output_zero_point,
    )


def run_stage(stage: StagePlan, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run one stage, opaque or not: (n, …) → features (n, …) and logits (n, C), in x's dtype."""
    if stage.module is not None:
        return cast(tuple[Tensor, Tensor], stage.module(x))
    values = {0: x}
    for op, dead in zip(stage.ops, stage.last_reads(), strict=True):
        inputs = [values[value] for value in op.reads]
        values[op.output] = run_op(op, inputs, stage.shapes[op.output])
        for value in dead:
            del values[value]
    return values[stage.features], values[stage.logits]


Part = TypeVar("Part", Op, StagePlan, SelectorPlan)


def move_stage(stage: StagePlan, device: torch.device, dtype: torch.dtype) -> StagePlan:
    """A copy of a stage with its weights and modules on a device; those that float are of this dtype."""

    def moved(part: Part) -> Part:
        changes: dict[str, Any] = {}
        for f in fields(part):
            value = getattr(part, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = value.to(device, dtype if value.is_floating_point() else value.dtype)
            elif isinstance(value, nn.Module):
                changes[f.name] = copy.deepcopy(value).to(device, dtype)
        return replace(part, **changes)

    selector = None if stage.selector is None else moved(stage.selector)
    return replace(moved(stage), ops=tuple(moved(op) for op in stage.ops), selector=selector)
