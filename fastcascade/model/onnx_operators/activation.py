"""Functions of each element, and softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcascade.model.onnx_operators.node import Node, numbers
from fastcascade.model.onnx_operators.registry import operator

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "HardSwish": F.hardswish,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Silu": F.silu,
    "Softplus": F.softplus,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}


@operator(*_FUNCTIONS)
def function(node: Node, x: Tensor) -> Tensor:
    """A function of one value without attributes."""
    return _FUNCTIONS[node.kind](x)


@operator("Clip")
def clip(node: Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """Clamping; the bounds are inputs, or attributes in older opsets."""
    bounds = [numbers(given) or numbers(node.get(name)) for given, name in ((low, "min"), (high, "max"))]
    least, most = (float(bound[0]) if bound else None for bound in bounds)
    if least is None and most is None:
        return x
    return torch.clamp(x, least, most)


@operator("LeakyRelu")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    """max(x, alpha·x)."""
    return F.leaky_relu(x, node.get("alpha", 0.01))


@operator("Elu")
def elu(node: Node, x: Tensor) -> Tensor:
    """ELU."""
    return F.elu(x, node.get("alpha", 1.0))


@operator("Selu")
def selu(node: Node, x: Tensor) -> Tensor:
    """A scaled ELU."""
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return F.elu(x, alpha).mul(gamma)


@operator("Celu")
def celu(node: Node, x: Tensor) -> Tensor:
    """alpha·ELU(x/alpha)."""
    alpha = node.get("alpha", 1.0)
    return F.elu(x / alpha).mul(alpha)


@operator("PRelu")
def prelu(node: Node, x: Tensor, slope: Any) -> Tensor:
    """ReLU with a slope per channel below zero."""
    if not isinstance(slope, Tensor):
        return F.leaky_relu(x, slope)
    if slope.numel() not in (1, x.shape[1]):
        node.refuse(f"slopes of shape {tuple(slope.shape)}; expected one, or one per channel")
    return F.prelu(x, slope.reshape(-1))


@operator("HardSigmoid")
def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    """Clamping of alpha·x + beta to [0, 1]."""
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


@operator("Gelu")
def gelu(node: Node, x: Tensor) -> Tensor:
    """GELU, exact or by the hyperbolic tangent."""
    return F.gelu(x, approximate=node.get("approximate", "none"))


@operator("Softmax", "LogSoftmax")
def softmax(node: Node, x: Tensor) -> Tensor:
    """Softmax along an axis; before opset 13, over this axis and all later ones together."""
    apply = F.softmax if node.kind == "Softmax" else F.log_softmax
    if node.opset >= 13:
        return apply(x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.ndim
    return apply(x.flatten(axis), axis).reshape(x.shape)
