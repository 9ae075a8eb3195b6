"""Operators that rearrange, cut or join values. The batch stays the first axis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcascade.model.onnx_operators.node import Array, Node, axes_of, numbers
from fastcascade.model.onnx_operators.registry import operator


@operator("Shape")
def shape(node: Node, x: Tensor) -> Array:
    """The sizes of a tensor."""
    sizes = list(x.shape)[node.get("start", 0) : node.get("end")]
    return np.array([*sizes, None], object)[:-1]  # None keeps numpy from asking for the type of a symbol


@operator("Flatten")
def flatten(node: Node, x: Tensor) -> Tensor:
    """All axes but the batch as one."""
    axis = node.get("axis", 1) % (x.ndim + 1)
    if axis != 1:
        node.refuse(f"from axis {axis}; expected 1, after the batch")
    return x.flatten(1)


@operator("Reshape")
def reshape(node: Node, x: Tensor, target: Array) -> Tensor:
    """The same elements under another shape. The batch stays first, whatever size the model was made for."""
    sizes = numbers(target)
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(_with_batch(node, x, sizes))


def _with_batch(node: Node, x: Tensor, sizes: list[Any]) -> list[Any]:
    """``sizes`` with the first one equal to the batch's, if that is what the model means."""
    rest = sizes[1:]
    per_image = math.prod(x.shape[1:]) if all(isinstance(n, int) for n in x.shape[1:]) else None
    known = all(isinstance(n, int) and n > 0 for n in rest)
    keeps = (known and math.prod(rest) == per_image) or (
        isinstance(sizes[0], int) and sizes[0] == node.fixed_batch and rest.count(-1) == 1
    )
    return [x.shape[0], *rest] if keeps and len(sizes) > 1 else sizes


@operator("Expand")
def expand(node: Node, x: Tensor, target: Array) -> Tensor:
    """Axes of size 1 stretched."""
    sizes = numbers(target)
    missing = len(sizes) - x.ndim
    own = [1] * missing + list(x.shape)
    if missing < 0:
        sizes = [1] * -missing + sizes
    wanted = [n if isinstance(m, int) and m == 1 else m for m, n in zip(own, sizes, strict=True)]
    return x.expand(wanted)


@operator("Squeeze")
def squeeze(node: Node, x: Tensor, given: Any = None) -> Tensor:
    """Axes of size 1 removed."""
    axes = axes_of(node, given) or [i for i, n in enumerate(x.shape) if i > 0 and n == 1]
    dropped = {axis % x.ndim for axis in axes}
    if 0 in dropped:
        node.refuse("it removes the batch axis")
    return x.reshape([n for i, n in enumerate(x.shape) if i not in dropped])


@operator("Unsqueeze")
def unsqueeze(node: Node, x: Tensor, given: Any = None) -> Tensor:
    """New axes of size 1."""
    axes = axes_of(node, given)
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def transpose(node: Node, x: Tensor) -> Tensor:
    """Axes in another order."""
    return x.permute(node.get("perm") or list(range(x.ndim))[::-1])


@operator("Concat")
def concat(node: Node, *values: Tensor) -> Tensor:
    """Values one after the other along an axis."""
    return torch.cat(values, node.get("axis"))


@operator("Split")
def split(node: Node, x: Tensor, given: Any = None) -> list[Tensor]:
    """Consecutive parts along an axis."""
    axis, parts = node.get("axis", 0), len(node.outputs)
    sizes = numbers(given if given is not None else node.get("split"))
    if not sizes:
        each = -(-x.shape[axis] // parts)
        sizes = [each] * (parts - 1) + [x.shape[axis] - each * (parts - 1)]
    return list(torch.split(x, sizes, axis))


@operator("Slice")
def slice_(node: Node, x: Tensor, *given: Any) -> Tensor:
    """Ranges along some axes; a step of −1 is only supported over a whole axis."""
    inputs = [numbers(value) for value in (*given, None, None, None, None)[:4]]
    starts, ends = (inputs[i] or numbers(node.get(name)) for i, name in enumerate(("starts", "ends")))
    axes = inputs[2] or numbers(node.get("axes")) or list(range(len(starts)))
    steps = inputs[3] or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        if step < 0:
            if range(*slice(start, end, step).indices(size)) != range(size - 1, -1, -1):
                node.refuse(f"a step of {step} over a part of an axis")
            x = x.flip(axis)
        elif axis % x.ndim != 0 or (start, step) != (0, 1):
            if axis % x.ndim == 0:
                node.refuse("it selects images of the batch")
            first, last, _ = slice(start, end).indices(size)
            x = x[(slice(None),) * (axis % x.ndim) + (slice(first, last, step),)]
    return x


@operator("Gather")
def gather(node: Node, x: Tensor, indices: Any) -> Tensor:
    """Elements at constant positions along an axis."""
    if not isinstance(indices, np.ndarray):
        node.refuse("its indices depend on the image")
    axis = node.get("axis", 0) % x.ndim
    if axis == 0:
        node.refuse("it selects images of the batch")
    size = x.shape[axis]
    positions = [int(i) % size for i in numbers(indices)]
    if indices.ndim == 0:
        return x.select(axis, positions[0])
    if indices.ndim != 1:
        node.refuse(f"indices of {indices.ndim} axes; expected at most 1")
    if positions == list(range(size - 1, -1, -1)):
        return x.flip(axis)
    return torch.index_select(x, axis, torch.tensor(positions, device=x.device))
