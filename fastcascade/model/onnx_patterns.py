"""Activations that ONNX models write as several nodes, as single ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from fastcascade.model.onnx_operators.node import Node

__all__ = ["merge_patterns"]


def merge_patterns(nodes: Sequence[Node], constants: Mapping[str, NDArray[Any]]) -> list[Node]:
    """Replace the last node of each pattern by one of Gelu, Silu, HardSwish or Mish.

    The other nodes of a pattern stay for later values. The caller drops those that nothing reads.
    """
    return _Merger(nodes, constants).run()


class _Merger:
    def __init__(self, nodes: Sequence[Node], constants: Mapping[str, NDArray[Any]]) -> None:
        self.nodes, self.constants = nodes, constants
        self.made = {name: node for node in nodes for name in node.outputs}
        self.readers = Counter(name for node in nodes for name in node.inputs)

    def run(self) -> list[Node]:
        return [self.merged(node) if node.kind == "Mul" else node for node in self.nodes]

    def merged(self, node: Node) -> Node:
        """A product as the activation that it computes, or as it is."""
        a, b = node.inputs
        for x, gate in ((a, b), (b, a)):
            kind = self.gated(x, self.made.get(gate))
            if kind is not None:
                return replace(node, kind=kind, inputs=(x,), attributes={})
        argument = self.gelu(node)
        return node if argument is None else replace(node, kind="Gelu", inputs=(argument,), attributes={})

    def gated(self, x: str, gate: Node | None) -> str | None:
        """x · gate(x)."""
        if gate is None:
            return None
        if gate.kind == "Tanh":
            inner = self.made.get(gate.inputs[0])
            return "Mish" if inner is not None and inner.kind == "Softplus" and inner.inputs[0] == x else None
        if gate.inputs[0] != x:
            return None
        if gate.kind == "HardSigmoid":
            sixth = abs(gate.get("alpha", 0.2) - 1 / 6) < 1e-6 and gate.get("beta", 0.5) == 0.5
            return "HardSwish" if sixth else None
        return "Silu" if gate.kind == "Sigmoid" else None

    def gelu(self, node: Node) -> str | None:
        """The x of x/2 · (1 + erf(x/√2)), in any order of the factors; None for another product."""
        factors = self.factors(node.outputs[0])
        numbers = [value for value in map(self.number, factors) if value is not None]
        values = [name for name in factors if self.number(name) is None]
        if len(values) != 2 or not math.isclose(math.prod(numbers), 0.5, rel_tol=1e-3):
            return None
        for x, rest in (values, values[::-1]):
            if self.is_one_plus_erf(rest, x):
                return x
        return None

    def factors(self, name: str) -> list[str]:
        """The operands of a product, through nested products that nothing else reads."""
        product = self.made[name]
        found: list[str] = []
        for operand in product.inputs:
            inner = self.made.get(operand)
            nested = inner is not None and inner.kind == "Mul" and self.readers[operand] == 1
            found += self.factors(operand) if nested else [operand]
        return found

    def is_one_plus_erf(self, name: str, x: str) -> bool:
        """Whether a value is 1 + erf(x/√2)."""
        total = self.made.get(name)
        if total is None or total.kind != "Add" or 1.0 not in map(self.number, total.inputs):
            return False
        erf = next((self.made[n] for n in total.inputs if n in self.made), None)
        scaled = self.made.get(erf.inputs[0]) if erf is not None and erf.kind == "Erf" else None
        if scaled is None or scaled.kind not in ("Mul", "Div") or x not in scaled.inputs:
            return False
        number = next((value for value in map(self.number, scaled.inputs) if value is not None), 0.0)
        wanted = math.sqrt(0.5) if scaled.kind == "Mul" else math.sqrt(2)
        return math.isclose(number, wanted, rel_tol=1e-3) and scaled.inputs.index(x) <= (scaled.kind == "Mul")

    def number(self, name: str) -> float | None:
        """A constant of one number."""
        constant = self.constants.get(name)
        return float(constant.reshape(-1)[0]) if constant is not None and constant.size == 1 else None
