"""ONNX operators in torch, for opsets 11 and later: a module for each family, and one registry.

A value is a tensor, or a numpy array where the graph computes with shapes and other numbers that are known
without the image. Such an array holds Python numbers, because the size of the batch is symbolic while a stage
is exported.
"""

from fastcascade.model.onnx_operators import activation, arithmetic, normalization, pixels, shape, windows
from fastcascade.model.onnx_operators.arrays import ON_ARRAYS
from fastcascade.model.onnx_operators.node import Node, Value
from fastcascade.model.onnx_operators.registry import ARRAY_INPUTS, OPERATORS, run_node

__all__ = ["ARRAY_INPUTS", "FAMILIES", "KNOWN", "Node", "Value", "run_node"]

FAMILIES = (activation, arithmetic, normalization, pixels, shape, windows)
"""The modules whose functions are in the registry."""

KNOWN = frozenset({*OPERATORS, *ON_ARRAYS})
"""All operators that a model may have."""
