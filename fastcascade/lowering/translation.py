"""Translation of an exported graph to plan operations, one operator at a time.

An operator of the graph computes a batched value, computes a constant from weights and other constants, or
renames a value. Shapes are taken from the graph, so views need no shape inference. Scales and shifts are
float64 here; :mod:`fastcascade.lowering.fusion` rounds what folds into weights once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from fastcascade.errors import LoweringError
from fastcascade.lowering.operations import Op, Shape
from fastcascade.lowering.operators import activation, arithmetic, convolution, normalization, pooling, shape
from fastcascade.lowering.translator import InPlaceOnView, Translator, is_in_place

__all__ = ["HANDLERS", "Graph", "translate"]

HANDLERS = (activation, arithmetic, convolution, normalization, pooling, shape)
"""The modules whose handlers translate operators."""


@dataclass
class Graph:
    """Operations in order of execution with scales in float64, shapes by value, and (features, logits)."""

    ops: list[Op]
    shapes: dict[int, Shape]
    outputs: tuple[int, int]


def translate(program: ExportedProgram) -> Graph:
    """Translate the operators on which the outputs (features, logits) of an exported stage depend.

    Args:
        program: has one input whose first axis is a dynamic batch. In-place operators are translated where no
            other view of the memory can see them; else the graph is functionalised first, which is slow.

    Raises:
        LoweringError: no plan operation expresses an operator; names the first such operator.
    """
    try:
        return _translate(program)
    except InPlaceOnView:
        return _translate(program.run_decompositions({}))


def _translate(program: ExportedProgram) -> Graph:
    for spec in program.graph_signature.output_specs:
        if spec.kind is OutputKind.BUFFER_MUTATION:
            raise LoweringError(f"the forward pass modifies the module's buffer {spec.target!r}")
    nodes = {node.name: node for node in program.graph.nodes}
    wanted = [
        nodes[spec.arg.name]
        for spec in program.graph_signature.output_specs
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    translator = Translator(program)
    needed = _ancestors([*wanted, *filter(is_in_place, program.graph.nodes)])
    for node in program.graph.nodes:
        if node in needed and node.op == "call_function":
            translator.visit(node)
    translator.node = None
    features, logits = (translator.plain(translator.results[node]).number for node in wanted)
    return Graph(translator.ops, translator.shapes, (features, logits))


def _ancestors(nodes: Sequence[Node]) -> set[Node]:
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
