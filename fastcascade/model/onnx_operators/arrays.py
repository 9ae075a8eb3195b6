"""Operators on arrays of numbers: what models compute with shapes, on numbers that may be symbols."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastcascade.model.onnx_operators.node import Array, Node, axes_of, numbers

__all__ = ["ON_ARRAYS"]


def _as_array(value: Any) -> Array:
    array = np.empty(np.shape(value), object)
    array[...] = value
    return array


def _quotient(a: Any, b: Any) -> Any:
    whole = all(not isinstance(v, float) for v in (*numbers(a), *numbers(b)))
    return a // b if whole else a / b


def _array_slice(node: Node, x: Array, *given: Any) -> Array:
    starts, ends, axes, steps = (numbers(value) for value in (*given, None, None, None, None)[:4])
    ranges = [slice(None)] * x.ndim
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        ranges[axes[i] if axes else i] = slice(start, end, steps[i] if steps else 1)
    return x[tuple(ranges)]


ON_ARRAYS: dict[str, Callable[..., Array]] = {
    "Identity": lambda node, x: x,
    "Cast": lambda node, x: x,
    "Add": lambda node, a, b: _as_array(a + b),
    "Sub": lambda node, a, b: _as_array(a - b),
    "Mul": lambda node, a, b: _as_array(a * b),
    "Div": lambda node, a, b: _as_array(_quotient(a, b)),
    "Sqrt": lambda node, x: np.sqrt(x.astype(float)),
    "Floor": lambda node, x: _as_array(np.vectorize(math.floor, otypes=[object])(x)),
    "Equal": lambda node, a, b: np.equal(a, b).astype(object),
    "Where": lambda node, condition, a, b: _as_array(np.where(condition.astype(bool), a, b)),
    "Concat": lambda node, *values: np.concatenate([v.astype(object) for v in values], node.get("axis")),
    "Gather": lambda node, x, i: _as_array(np.take(x.astype(object), i.astype(int), node.get("axis", 0))),
    "Reshape": lambda node, x, target: x.reshape([int(n) for n in numbers(target)]),
    "Squeeze": lambda node, x, axes=None: np.squeeze(x, tuple(axes_of(node, axes)) or None),
    "Unsqueeze": lambda node, x, axes=None: np.expand_dims(x, tuple(axes_of(node, axes))),
    "Slice": _array_slice,
    "ConstantOfShape": lambda node, size: np.full([int(n) for n in size], node.get("value", 0.0), object),
    "ReduceProd": lambda node, x, axes=None: _as_array(math.prod(numbers(x))),
}
"""ONNX operator → a function of the node and its inputs, all of them arrays."""
