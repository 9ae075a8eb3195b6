"""The operators that a model may have, and the run of one node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastcascade.model.onnx_operators.arrays import ON_ARRAYS
from fastcascade.model.onnx_operators.node import Array, Node, Value

__all__ = ["ARRAY_INPUTS", "OPERATORS", "operator", "run_node"]

Operator: TypeAlias = Callable[..., Any]

OPERATORS: dict[str, Operator] = {}
"""ONNX operator → a function of the node and its inputs, which returns one value, or a list of several."""

ARRAY_INPUTS: dict[str, tuple[int, ...]] = {
    "Clip": (1, 2),
    "Dropout": (1, 2),
    "Expand": (1,),
    "Gather": (1,),
    "Pad": (1, 2, 3),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
    **{f"Reduce{kind}": (1,) for kind in ("L2", "Max", "Mean", "Min", "Sum")},
}
"""Inputs that are numbers and not data: shapes, axes, bounds."""


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Register a function for these operators."""

    def register(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


def run_node(node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Run a node.

    Returns:
        one value per output, or fewer.

    Raises:
        LoweringError: the node uses an attribute or a form of input that is not supported.
    """
    present = [value for value in inputs if value is not None]
    on_arrays = ON_ARRAYS.get(node.kind)
    if on_arrays is not None and present and all(isinstance(value, np.ndarray) for value in present):
        return [on_arrays(node, *inputs)]
    if node.kind not in OPERATORS:
        node.refuse("of data that depends on the image; only numbers such as shapes are supported")
    data = [
        value
        if not isinstance(value, np.ndarray) or position in ARRAY_INPUTS.get(node.kind, ())
        else _operand(value, present)
        for position, value in enumerate(inputs)
    ]
    result = OPERATORS[node.kind](node, *data)
    return list(result) if isinstance(result, list) else [result]


def _operand(value: Array, present: Sequence[Value]) -> Any:
    """An array as an operand beside tensors: a number, or a tensor of their dtype."""
    if value.size == 1 and value.ndim == 0:
        return value.item()
    like = next((v for v in present if isinstance(v, Tensor)), torch.empty(0))
    return torch.as_tensor(value.tolist(), dtype=like.dtype, device=like.device)
