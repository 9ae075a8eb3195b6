"""Reshaping, transposing, slicing, joining and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastcascade.lowering.axes import Factor, channel_order, stored_axes, with_channels_in_order
from fastcascade.lowering.operations import Concat, Flip, Pad, Reorder, Slice
from fastcascade.lowering.translator import Translator, Value, lowers

aten = torch.ops.aten


@lowers(aten.alias, aten.detach, aten.squeeze, aten.unflatten, aten.unsqueeze, aten.view, aten.view_as)
def view(t: Translator, input: Value, **_: Any) -> Value:
    """The same elements in row-major order under another shape, in the same memory."""
    return t.reshaped(input, t.result_shape(), input.storage)


@lowers(aten.reshape, aten.reshape_as, aten.flatten, aten.contiguous, aten.to, aten._unsafe_view)
def maybe_view(t: Translator, input: Value, **_: Any) -> Value:
    """Like a view, but maybe a copy."""
    return t.perhaps_shared(t.reshaped(input, t.result_shape(), None), input)


@lowers(aten.clone, aten._to_copy, aten.lift_fresh_copy)
def copy(t: Translator, input: Value, **_: Any) -> Value:
    """The same elements in memory of their own."""
    return t.reshaped(input, t.result_shape(), t.stored(input.number).storage)


@lowers(aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)
def dropout(t: Translator, input: Value, train: bool, **_: Any) -> Value:
    """Nothing, in eval mode."""
    if train:
        t.refuse("it is not disabled in eval mode")
    return input


@lowers(aten.permute)
def permute(t: Translator, input: Value, dims: Sequence[int]) -> Value:
    """Axes in another order; the batch stays first."""
    rank = 1 + len(input.axes)
    order = [dim % rank for dim in dims]
    if order[0] != 0:
        t.refuse("it moves the batch axis")
    return replace(input, axes=tuple(input.axes[dim - 1] for dim in order[1:]))


@lowers(aten.transpose, aten.swapaxes, aten.swapdims)
def transpose(t: Translator, input: Value, **dims: int) -> Value:
    """Two axes swapped."""
    first, second = (t.axis(dim, input) for dim in dims.values())
    axes = list(input.axes)
    axes[first], axes[second] = axes[second], axes[first]
    return replace(input, axes=tuple(axes))


@lowers(aten.movedim)
def movedim(t: Translator, input: Value, source: Sequence[int], destination: Sequence[int]) -> Value:
    """One axis moved to another place."""
    if len(source) != 1:
        t.refuse("it moves several axes at once")
    return t.moved(input, t.axis(source[0], input), t.axis(destination[0], input))


@lowers(aten.expand, aten.expand_as)
def expand(t: Translator, input: Value, **_: Any) -> Value:
    """Axes of size 1 stretched, for operators that would stretch them anyway."""
    assert t.node is not None
    if t.result_shape() == input.shape:
        return input
    elementwise = (aten.mul, aten.add, aten.sub, aten.div)
    packets = [getattr(user.target, "overloadpacket", None) for user in t.node.users]
    if not all(packet in elementwise for packet in packets):
        t.refuse("its result is read by more than sums and products")
    return input


@lowers(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(t: Translator, input: Value, groups: int) -> Value:
    """(groups, C/groups) transposed."""
    channels, height, width = input.shape
    split = t.reshaped(input, (groups, channels // groups, height, width), None)
    swapped = replace(split, axes=(split.axes[1], split.axes[0], *split.axes[2:]))
    return t.perhaps_shared(t.reshaped(swapped, input.shape, None), input)


# ---- slices ----


def take(t: Translator, value: Value, axis: int, indices: range) -> Value:
    """The elements at these positions along an axis of a view."""
    if indices == range(value.shape[axis]):
        return value
    return t.perhaps_shared(_taken(t, value, axis, indices), value)


def _taken(t: Translator, value: Value, axis: int, indices: range) -> Value:
    if len(indices) == 0:
        t.refuse("an empty slice")
    if all(factor.axis == 0 for factor in value.axes[axis]):
        return _take_channels(t, value, axis, indices)
    plain = t.plain(value)
    starts, stops, steps = [0, 0, 0], list(plain.shape), [1, 1, 1]
    starts[axis], stops[axis], steps[axis] = indices.start, indices.stop, indices.step
    shape = list(plain.shape)
    shape[axis] = len(indices)
    fields = {"start": tuple(starts), "stop": tuple(stops), "step": tuple(steps)}
    return t.emit(Slice, tuple(shape), input=plain.number, **fields)


def _take_channels(t: Translator, value: Value, axis: int, indices: Sequence[int]) -> Value:
    """The elements at these positions along an axis that runs through channels only."""
    shape = t.shapes[value.number]
    order = channel_order(value.axes).take(np.asarray(indices), axis).reshape(-1)
    first, last = int(order[0]), int(order[-1])
    gap = 1 if len(order) == 1 else int(order[1]) - first
    chosen = (len(order), *shape[1:])
    if len(shape) == 3 and gap > 0 and np.array_equal(order, np.arange(first, last + 1, gap)):
        bounds = {"start": (first, 0, 0), "stop": (last + 1, *shape[1:]), "step": (gap, 1, 1)}
        result = t.emit(Slice, chosen, input=value.number, **bounds)
    else:
        result = t.emit(Reorder, chosen, input=value.number, channels=tuple(map(int, order)))
    chosen_axes = list(value.axes)
    chosen_axes[axis] = (Factor(0, len(indices)),) if len(indices) > 1 else ()
    return replace(result, axes=with_channels_in_order(chosen_axes))


def parts_along(t: Translator, value: Value, axis: int) -> list[Value]:
    """The value at each position along an axis, without that axis."""
    parts = []
    for position in range(value.shape[axis]):
        part = take(t, value, axis, range(position, position + 1))
        parts.append(replace(part, axes=(*part.axes[:axis], *part.axes[axis + 1 :])))
    return parts


@lowers(aten.slice)
def slice_(t: Translator, input: Value, dim: int, start: Any, end: Any, step: int) -> Value:
    """input[start:end:step] along one axis."""
    if dim == 0 and not start and step == 1 and isinstance(end, int) and end == 2**63 - 1:
        return input
    axis = t.axis(dim, input)
    return take(t, input, axis, range(*slice(start, end, step).indices(input.shape[axis])))


@lowers(aten.index_select)
def index_select(t: Translator, input: Value, dim: int, index: Any) -> Value:
    """Channels at constant positions, in any order."""
    axis = t.axis(dim, input)
    if not isinstance(index, torch.Tensor) or any(factor.axis != 0 for factor in input.axes[axis]):
        t.refuse("only constant positions along channels are supported")
    return _take_channels(t, input, axis, index.tolist())


@lowers(aten.narrow)
def narrow(t: Translator, input: Value, dim: int, start: int, length: int) -> Value:
    """input[start:start + length] along one axis."""
    return take(t, input, t.axis(dim, input), range(start, start + length))


@lowers(aten.select)
def select(t: Translator, input: Value, dim: int, index: int) -> Value:
    """input[index] along one axis."""
    axis = t.axis(dim, input)
    position = index % input.shape[axis]
    part = take(t, input, axis, range(position, position + 1))
    return replace(part, axes=(*part.axes[:axis], *part.axes[axis + 1 :]))


@lowers(aten.chunk, aten.split, aten.split_with_sizes)
def split(t: Translator, input: Value, dim: int, **_: Any) -> list[Value]:
    """Consecutive parts along one axis."""
    assert t.node is not None
    axis, parts, start = t.axis(dim, input), [], 0
    for example in t.node.meta["val"]:
        stop = start + example.shape[dim]
        parts.append(take(t, input, axis, range(start, stop)))
        start = stop
    return parts


@lowers(aten.unbind)
def unbind(t: Translator, input: Value, dim: int) -> list[Value]:
    """Every position along one axis."""
    return parts_along(t, input, t.axis(dim, input))


@lowers(aten.flip)
def flip(t: Translator, input: Any, dims: Sequence[int]) -> Value:
    """The mirror image of a map."""
    value = t.image(input)
    if [t.axis(dim, value) for dim in dims] != [2]:
        t.refuse(f"along axes {tuple(dims)}; only the width is supported")
    return t.emit(Flip, value.shape, input=value.number)


# ---- joining and padding ----


@lowers(aten.cat)
def cat(t: Translator, tensors: Sequence[Any], dim: int) -> Value:
    """Concatenation along channels, of maps or of the last axis of NHWC views."""
    values = [t.pixels(value) for value in tensors]
    leading = {value.axes[:-1] if value is not None else None for value in values}
    rank = 1 + len(t.result_shape())
    if None not in leading and len(leading) == 1 and dim % rank == rank - 1 and rank != 2:
        joined = [value for value in values if value is not None]
        shape = t.shapes[joined[0].number]
        channels = sum(t.shapes[value.number][0] for value in joined)
        numbers = tuple(value.number for value in joined)
        result = t.emit(Concat, (channels, *shape[1:]), inputs=numbers)
        return t.with_channels(joined[0], result.number)
    plain = [t.plain(value) for value in tensors]
    if dim % rank != 1:
        t.refuse(f"along axis {dim}; only channels are supported")
    return t.emit(Concat, t.result_shape(), inputs=tuple(value.number for value in plain))


@lowers(aten.stack)
def stack(t: Translator, tensors: Sequence[Any], dim: int) -> Value:
    """A new axis: the channels of all values in a row, seen as parts."""
    values = [t.plain(value) for value in tensors]
    shape = values[0].shape
    axis = dim % (2 + len(shape)) - 1
    if axis < 0:
        t.refuse("it stacks along the batch")
    joined = (len(values) * shape[0], *shape[1:])
    result = t.emit(Concat, joined, inputs=tuple(value.number for value in values))
    axes = list(stored_axes(shape))
    axes.insert(axis, (Factor(0, len(values), shape[0]),) if len(values) > 1 else ())
    return replace(result, axes=tuple(axes))


@lowers(aten.pad, aten.constant_pad_nd)
def pad(t: Translator, input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Value:
    """Padding; negative numbers crop."""
    image = t.image(input)
    if mode not in ("constant", "reflect", "replicate"):
        t.refuse(f"mode {mode!r}")
    numbers = [*pad, *[0] * (8 - len(pad))]
    before, after = (numbers[4], numbers[2], numbers[0]), (numbers[5], numbers[3], numbers[1])
    if any(numbers[6:]):
        t.refuse("it pads the batch")
    cropped = tuple(n + min(b, 0) + min(a, 0) for n, b, a in zip(image.shape, before, after, strict=True))
    if cropped != image.shape:
        start = tuple(max(-b, 0) for b in before)
        stop = tuple(b + n for b, n in zip(start, cropped, strict=True))
        image = t.emit(Slice, cropped, input=image.number, start=start, stop=stop, step=(1, 1, 1))
    if max(*before, *after) <= 0:
        return image
    return t.emit(
        Pad,
        t.result_shape(),
        input=image.number,
        before=tuple(max(b, 0) for b in before),
        after=tuple(max(a, 0) for a in after),
        value=float(value or 0.0),
        mode=mode,
    )


@lowers(aten.reflection_pad2d, aten.replication_pad2d)
def pad_by_mode(t: Translator, input: Any, padding: Any) -> Value:
    """Padding by mirrored or repeated pixels."""
    mode = "reflect" if t.calls(aten.reflection_pad2d) else "replicate"
    return pad(t, input, padding, mode)  # type: ignore[no-any-return]
