"""A node of an ONNX graph, and the numbers in its inputs and attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastcascade.errors import LoweringError

__all__ = ["Array", "Node", "Value", "axes_of", "numbers"]

Array: TypeAlias = NDArray[Any]
Value: TypeAlias = Tensor | Array | None
"""A tensor, or an array where the graph computes with numbers that are known without the image; None for an
input that is left out."""


@dataclass(frozen=True)
class Node:
    """A call of an operator.

    Attributes:
        inputs: names of values; "" for an input that is left out.
        opset: of the model.
        fixed_batch: the size of the batch, where the model was exported for one size only.
        dead: values that no later node reads.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 0
    fixed_batch: int | None = None
    dead: tuple[str, ...] = ()

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def refuse(self, detail: str) -> NoReturn:
        """Raise LoweringError: the node cannot be run."""
        raise LoweringError(f"ONNX operator {self.kind} (node {self.name!r}): {detail}")


def numbers(value: Any) -> list[Any]:
    """The numbers of an array, of an attribute, or of a single number."""
    return np.asarray(value, object).reshape(-1).tolist() if value is not None else []


def axes_of(node: Node, given: Any) -> list[int]:
    """Axes as an input, or as an attribute in older opsets."""
    return numbers(given if given is not None else node.get("axes"))
