"""Views of a value: how the axes that a graph sees map to the axes that a plan stores.

Networks reshape, split and transpose without touching an element: channel shuffles, NHWC blocks, split
attention. Each axis of such a view is a row-major product of *factors*, and each factor steps through one
axis of the stored value. Reshaping splits and regroups factors; transposing reorders axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Axis",
    "Factor",
    "channel_order",
    "is_row_major",
    "regroup",
    "size_of",
    "stored_axes",
    "to_stored_order",
    "with_channels_in_order",
]


@dataclass(frozen=True)
class Factor:
    """Part of a stored axis: positions 0, step, 2·step, …, (size − 1)·step.

    Attributes:
        axis: which axis of the stored value, 0 for channels.
        size: at least 2; an axis of size 1 has no factors.
        step: the distance of neighbours along that axis.
    """

    axis: int
    size: int
    step: int = 1


Axis = tuple[Factor, ...]
"""The factors of one axis of a view, the slowest first; empty for size 1."""


def stored_axes(shape: Sequence[int]) -> tuple[Axis, ...]:
    """The view that is the stored value itself.

    Example:
        >>> stored_axes((8, 1, 3))
        ((Factor(axis=0, size=8, step=1),), (), (Factor(axis=2, size=3, step=1),))
    """
    return tuple((Factor(axis, size),) if size > 1 else () for axis, size in enumerate(shape))


def size_of(axis: Axis) -> int:
    """The number of positions along an axis."""
    return math.prod(factor.size for factor in axis)


def regroup(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...] | None:
    """The same elements in the same order under another shape; None if an axis would end inside a step.

    Example:
        >>> [len(axis) for axis in regroup(stored_axes((6, 4)), (2, 12)) or ()]
        [1, 2]
    """
    pending = [factor for axis in axes for factor in axis]
    grouped: list[Axis] = []
    for size in shape:
        axis: list[Factor] = []
        while size > 1:
            if not pending:
                return None
            head = pending.pop(0)
            if size % head.size == 0:
                axis.append(head)
                size //= head.size
            elif head.size % size == 0:
                inner = head.size // size
                axis.append(Factor(head.axis, size, head.step * inner))
                pending.insert(0, Factor(head.axis, inner, head.step))
                size = 1
            else:
                return None
        grouped.append(_merged(axis))
    return None if pending else tuple(grouped)


def _merged(axis: Sequence[Factor]) -> Axis:
    """Neighbours that step through one stored axis without a gap become one factor."""
    merged: list[Factor] = []
    for factor in axis:
        last = merged[-1] if merged else None
        if last and last.axis == factor.axis and last.step == factor.step * factor.size:
            merged[-1] = Factor(factor.axis, last.size * factor.size, factor.step)
        else:
            merged.append(factor)
    return tuple(merged)


def channel_order(axes: Sequence[Axis]) -> NDArray[np.int64]:
    """The stored channels in the order in which the view runs through them: an array with one axis per view
    axis, of size 1 where the view axis holds no channels."""
    order = np.zeros((1,) * len(axes), np.int64)
    for position, axis in enumerate(axes):
        along = np.zeros(1, np.int64)
        for factor in axis:
            if factor.axis == 0:
                along = (along[:, None] + np.arange(factor.size) * factor.step).reshape(-1)
        order = order + along.reshape([-1 if i == position else 1 for i in range(len(axes))])
    return order


def with_channels_in_order(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The view of a value whose channels are stored in the order in which ``axes`` run through them."""
    step = math.prod(factor.size for axis in axes for factor in axis if factor.axis == 0)
    ordered = []
    for axis in axes:
        factors = []
        for factor in axis:
            if factor.axis == 0:
                step //= factor.size
                factors.append(Factor(0, factor.size, step))
            else:
                factors.append(factor)
        ordered.append(tuple(factors))
    return tuple(ordered)


def to_stored_order(constant: Tensor, axes: Sequence[Axis], shape: Sequence[int]) -> Tensor:
    """A constant that broadcasts against a view, as one that broadcasts against the stored value.

    Args:
        constant: at most as many axes as the view; each is 1 or the view's size.
        axes: the view. shape: of the stored value.

    Returns:
        as many axes as ``shape``; 1 along stored axes on which the constant does not depend.

    Example:
        >>> nhwc = (stored_axes((4, 5, 6))[1], stored_axes((4, 5, 6))[2], stored_axes((4, 5, 6))[0])
        >>> import torch
        >>> to_stored_order(torch.zeros(4), nhwc, (4, 5, 6)).shape
        torch.Size([4, 1, 1])
    """
    aligned = constant.reshape((1,) * (len(axes) - constant.ndim) + tuple(constant.shape))
    split: list[int] = []
    factors: list[Factor] = []
    for length, axis in zip(aligned.shape, axes, strict=True):
        split += [1 if length == 1 else factor.size for factor in axis]
        factors += axis
    order = sorted(range(len(factors)), key=lambda i: (factors[i].axis, -factors[i].step))
    ordered = aligned.reshape(split).permute(order) if factors else aligned.reshape(())
    sizes = [ordered.shape[position] for position in range(len(order))]
    stored: list[int] = []
    expanded: list[int] = []
    position = 0
    for stored_axis in range(len(shape)):
        count = sum(factor.axis == stored_axis for factor in factors)
        lengths = sizes[position : position + count]
        full = [factors[order[position + i]].size for i in range(count)]
        depends = any(n > 1 for n in lengths)
        expanded += full if depends else [1] * count
        stored.append(math.prod(full) if depends else 1)
        position += count
    return ordered.expand(expanded).reshape(stored)


def is_row_major(axes: Sequence[Axis]) -> bool:
    """Whether the view runs through the stored value in the stored order."""
    factors = [factor for axis in axes for factor in axis]
    return all((a.axis, -a.step) < (b.axis, -b.step) for a, b in pairwise(factors))
