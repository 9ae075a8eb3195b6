"""Sums, products, extremes and reductions; casts, and values that pass as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcascade.model.onnx_operators.node import Node, Value, axes_of
from fastcascade.model.onnx_operators.registry import operator


@operator("Identity", "Dropout")
def identity(node: Node, x: Value, *_: Any) -> Value:
    """The value itself."""
    return x


@operator("Add", "Sub", "Mul", "Div", "Pow")
def arithmetic(node: Node, a: Any, b: Any) -> Any:
    """Two operands that broadcast."""
    functions: dict[str, Callable[..., Any]]
    functions = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Pow": torch.pow}
    if not isinstance(a, Tensor):
        if node.kind == "Sub":
            return torch.rsub(b, a)
        if node.kind == "Div":
            return torch.reciprocal(b) * a
        a, b = (b, a) if node.kind in ("Add", "Mul") else (torch.as_tensor(a, dtype=b.dtype), b)
    return functions[node.kind](a, b)


@operator("Sum")
def total(node: Node, *values: Any) -> Any:
    """The sum of all operands."""
    return reduce(torch.add, values)


@operator("Max", "Min")
def extremum(node: Node, *values: Any) -> Any:
    """The larger or smaller of two values, one of which may be a number."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    bounds = [v for v in values if not isinstance(v, Tensor)]
    combine = torch.maximum if node.kind == "Max" else torch.minimum
    result = reduce(combine, tensors)
    for bound in bounds:
        result = result.clamp(min=bound) if node.kind == "Max" else result.clamp(max=bound)
    return result


@operator("Gemm")
def gemm(node: Node, a: Tensor, b: Tensor, c: Any = None) -> Tensor:
    """alpha·A·B + beta·C, where the rows of A are the batch."""
    if node.get("transA", 0):
        node.refuse("transA, which moves the batch")
    weight = b if node.get("transB", 0) else b.t()
    if node.get("alpha", 1.0) != 1:
        weight = weight * node.get("alpha")
    if c is not None and node.get("beta", 1.0) != 1:
        c = c * node.get("beta")
    if isinstance(c, Tensor) and c.ndim == 2 and c.shape[0] == 1:
        c = c[0]
    if isinstance(c, Tensor) and c.ndim == 1 and len(c) == len(weight):
        return F.linear(a, weight, c)
    product = F.linear(a, weight)
    return product if c is None else product + c


@operator("MatMul")
def matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Matrix product."""
    return torch.matmul(a, b)


@operator("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")
def reduction(node: Node, x: Tensor, given: Any = None) -> Tensor:
    """A reduction over axes; over all but the batch if none are given."""
    axes, keep = axes_of(node, given), bool(node.get("keepdims", 1))
    if not axes:
        node.refuse("over all axes, the batch included; expected axes")
    if node.kind == "ReduceL2":
        return torch.linalg.vector_norm(x, 2, axes, keep)  # type: ignore[no-any-return]
    functions: dict[str, Callable[..., Tensor]]
    functions = {
        "ReduceMean": torch.mean,
        "ReduceSum": torch.sum,
        "ReduceMax": torch.amax,
        "ReduceMin": torch.amin,
    }
    return functions[node.kind](x, axes, keep)


@operator("Cast")
def cast(node: Node, x: Tensor) -> Tensor:
    """A conversion between floating types, which all are float32 here."""
    if node.get("to") not in (1, 10, 11, 16):  # float, half, double, bfloat16
        node.refuse(f"a cast of data to ONNX type {node.get('to')}; only floating types are supported")
    return x
