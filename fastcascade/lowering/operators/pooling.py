"""Windows over maps, and reductions over pixels or channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastcascade.lowering.axes import Axis, stored_axes
from fastcascade.lowering.operations import AdaptivePool, Add, ChannelReduce, Pool, Resize, Shape
from fastcascade.lowering.operators.arithmetic import binary, scale_shift
from fastcascade.lowering.operators.shape import parts_along
from fastcascade.lowering.translator import Translator, Value, lowers, pair

aten = torch.ops.aten


def _pool(t: Translator, value: Value, shape: Shape, kernel: Any, stride: Any, **fields: Any) -> Value:
    size, step = pair(kernel), pair(stride or kernel)
    return t.emit(Pool, shape, input=value.number, kernel=size, stride=step, **fields)


def _result(t: Translator) -> tuple[Shape, bool]:
    """The shape of the current operator's first result, and whether there are several."""
    assert t.node is not None
    returned = t.node.meta["val"]
    several = isinstance(returned, list | tuple)
    return t.instance_shape(returned[0] if several else returned), several


@lowers(aten.max_pool2d, aten.max_pool2d_with_indices)
def max_pool2d(
    t: Translator, input: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Any:
    """Maximum over windows."""
    if pair(dilation) != (1, 1):
        t.refuse(f"dilation {dilation}")
    shape, several = _result(t)
    rows, columns = pair(padding)
    sides = (rows, rows, columns, columns)
    result = _pool(
        t, t.image(input), shape, kernel_size, stride, kind="max", padding=sides, ceil_mode=ceil_mode
    )
    return [result] if several else result


@lowers(aten.avg_pool2d)
def avg_pool2d(
    t: Translator,
    input: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Value:
    """Average over windows; a fixed divisor is a scale after it, if no window overhangs."""
    rows, columns = pair(padding)
    if divisor_override is not None and ceil_mode:
        t.refuse("divisor_override with ceil_mode")
    result = _pool(
        t,
        t.image(input),
        t.result_shape(),
        kernel_size,
        stride,
        kind="average",
        padding=(rows, rows, columns, columns),
        ceil_mode=ceil_mode,
        include_padding=count_include_pad or divisor_override is not None,
    )
    if divisor_override is None:
        return result
    height, width = pair(kernel_size)
    return scale_shift(t, result, scale=height * width / divisor_override)


@lowers(aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d)
def adaptive_pool2d(t: Translator, input: Any, output_size: Any) -> Any:
    """Pooling to a given size."""
    shape, several = _result(t)
    value = t.image(input)
    kind = "max" if several else "average"
    if value.shape[1] % shape[1] or value.shape[2] % shape[2]:
        result = t.emit(AdaptivePool, shape, input=value.number, kind=kind, size=shape[1:])
    else:
        kernel = (value.shape[1] // shape[1], value.shape[2] // shape[2])
        result = _pool(t, value, shape, kernel, kernel, kind=kind)
    return [result] if several else result


@lowers(aten.adaptive_avg_pool1d)
def adaptive_avg_pool1d(t: Translator, input: Any, output_size: Any) -> Value:
    """The mean along the last axis; other sizes are refused."""
    if t.result_shape()[-1] != 1:
        t.refuse(f"to size {t.result_shape()[-1]}; only 1 is supported")
    return mean(t, input, [-1], keepdim=True)  # type: ignore[no-any-return]


@lowers(aten.mean)
def mean(t: Translator, input: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    """The mean over pixels, or over channels or a part of them."""
    return _reduce(t, input, dim, keepdim, "mean")


@lowers(aten.amax)
def amax(t: Translator, input: Any, dim: Any = None, keepdim: bool = False) -> Value:
    """The maximum over pixels or channels."""
    return _reduce(t, input, dim, keepdim, "max")


@lowers(aten.max)
def maximum(t: Translator, input: Any, dim: Any = None, keepdim: bool = False) -> list[Value]:
    """The values, not the indices, of the maximum along one axis."""
    if not isinstance(dim, int):
        t.refuse("over all axes, or of two values")
    return [_reduce(t, input, [dim], keepdim, "max")]


@lowers(aten.sum)
def total(t: Translator, input: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    """The sum over pixels or channels: the mean times their number."""
    if not isinstance(input, Value) or not dim:
        t.refuse(f"over axes {dim}")
    return scale_shift(t, _reduce(t, input, dim, keepdim, "mean"), scale=positions(t, input, dim))


def positions(t: Translator, value: Value, dims: Sequence[int]) -> float:
    """How many numbers a reduction over these dimensions takes together."""
    return float(math.prod(value.shape[t.axis(dim, value)] for dim in dims))


def _reduce(t: Translator, input: Any, dim: Any, keepdim: bool, kind: str) -> Value:
    """A mean or maximum over axes of a view."""
    if not isinstance(input, Value) or not dim:
        t.refuse(f"over axes {dim}")
    reduced = {t.axis(d, input) for d in dim}
    gone = {factor for axis in reduced for factor in input.axes[axis]}
    shape = t.shapes[input.number]
    whole = [set(axis) for axis in stored_axes(shape)]
    covered = [axis for axis, factors in enumerate(whole) if factors and factors <= gone]
    kept = tuple(
        () if position in reduced else axis
        for position, axis in enumerate(input.axes)
        if keepdim or position not in reduced
    )
    if gone == set().union(*(whole[axis] for axis in covered)):
        return _reduce_stored(t, input, covered, kept, kind)
    if len(reduced) == 1 and all(factor.axis == 0 for factor in gone) and kind == "mean":
        (axis,) = reduced
        parts = parts_along(t, input, axis)
        result = parts[0]
        for part in parts[1:]:
            result = binary(t, Add, result, part)
        result = scale_shift(t, result, scale=1 / len(parts))
        target = tuple(n for i, n in enumerate(input.shape) if i != axis)
        if keepdim:
            target = (*input.shape[:axis], 1, *input.shape[axis + 1 :])
        return t.reshaped(result, target, result.storage)
    t.refuse(f"over axes {dim} of a view of shape {input.shape} per instance")


def _reduce_stored(
    t: Translator, value: Value, covered: list[int], kept: tuple[Axis, ...], kind: str
) -> Value:
    """A mean or maximum over whole axes of the stored value."""
    shape, number = t.shapes[value.number], value.number
    if spatial := [axis for axis in covered if axis > 0]:
        kernel = (shape[1] if 1 in spatial else 1, shape[2] if 2 in spatial else 1)
        shape = (shape[0], shape[1] // kernel[0], shape[2] // kernel[1])
        pooled = "max" if kind == "max" else "average"
        number = t.emit(Pool, shape, input=number, kernel=kernel, stride=kernel, kind=pooled).number
    if 0 in covered:
        number = t.emit(ChannelReduce, (1, *shape[1:]), input=number, kind=kind).number
    stored = t.stored(number)
    return Value(number, kept, stored.storage)


_INTERPOLATIONS = {
    aten.upsample_nearest2d: ("nearest", False),
    aten.upsample_bilinear2d: ("bilinear", False),
    aten._upsample_bilinear2d_aa: ("bilinear", True),
    aten._upsample_bicubic2d_aa: ("bicubic", True),
}
"""Operator → kind, and whether it antialiases."""


@lowers(*_INTERPOLATIONS)
def resize(t: Translator, input: Any, align_corners: bool = False, **arguments: Any) -> Value:
    """Resampling to another size."""
    value, shape = t.image(input), t.result_shape()
    given = arguments.get("scale_factors") or (arguments.get("scales_h"), arguments.get("scales_w"))
    for scale, before, after in zip(given, value.shape[1:], shape[1:], strict=True):
        if scale is not None and abs(before * scale - after) > 1e-6:
            t.refuse(f"a scale of {scale}, which does not take {before} to {after} exactly")
    kind, antialias = next(how for operator, how in _INTERPOLATIONS.items() if t.calls(operator))
    if antialias and align_corners:
        t.refuse("antialiased with aligned corners")
    return t.emit(
        Resize,
        shape,
        input=value.number,
        kind=kind,
        size=shape[1:],
        align_corners=bool(align_corners),
        antialias=antialias,
    )
