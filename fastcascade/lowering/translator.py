"""The state of one translation, and the table of operators that it can translate.

A handler translates one operator of ``torch.export``'s graph. It is registered with :func:`lowers` and called
with the translator and the operator's arguments by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

from fastcascade.errors import LoweringError
from fastcascade.lowering.axes import (
    Axis,
    Factor,
    channel_order,
    is_row_major,
    regroup,
    size_of,
    stored_axes,
    to_stored_order,
    with_channels_in_order,
)
from fastcascade.lowering.operations import Concat, Flatten, Op, Reorder, Reshape, Shape, Slice

__all__ = ["InPlaceOnView", "Translator", "Value", "is_in_place", "lowers", "pair"]

aten = torch.ops.aten

Handler = Callable[..., Any]
_HANDLERS: dict[Any, Handler] = {}


def lowers(*operators: Any) -> Callable[[Handler], Handler]:
    """Register a handler for these operators."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(operators, handler))
        return handler

    return register


class InPlaceOnView(Exception):
    """An in-place operator changes memory that other values may share; functionalise the graph first."""


@dataclass(frozen=True)
class Value:
    """A batched value: a view of a value of the plan.

    Attributes:
        number: of the plan's value.
        axes: the view's axes per instance, in terms of the stored ones.
        storage: equal for views of the same memory in the graph; None if it may be memory of its own.
    """

    number: int
    axes: tuple[Axis, ...]
    storage: int | None

    @property
    def shape(self) -> Shape:
        """The view's shape per instance."""
        return tuple(size_of(axis) for axis in self.axes)


class Translator:
    """The state of one translation.

    Attributes:
        ops, shapes: the operations so far, and the shape of every value of the plan.
        results: for each graph node, a :class:`Value`, a constant tensor, a list of these, or a number.
        node: the operator being translated; None while the outputs are read.
        shared: storages that values of storage None may be views of.
        buffers: names of parameters and buffers, by graph node.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.ops: list[Op] = []
        self.shapes: dict[int, Shape] = {}
        self.results: dict[Node, Any] = {}
        self.node: Node | None = None
        self.storages = 0
        self.buffers: dict[Node, str] = {}
        self.shared: set[int | None] = {None}
        tensors = {**program.state_dict, **program.constants}
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        for spec in program.graph_signature.input_specs:
            node = placeholders[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                example = node.meta["val"]
                self.batch, self.dtype = example.shape[0], example.dtype
                self.shapes[0] = self.instance_shape(example)
                self.results[node] = self.stored(0)
            else:
                self.results[node] = tensors[str(spec.target)].detach()
                self.buffers[node] = str(spec.target)

    # ---- calls ----

    def visit(self, node: Node) -> None:
        """Translate one call."""
        self.node = node
        if node.target is operator.getitem:
            source, index = node.args
            self.results[node] = self.results[source][index]  # type: ignore[index]
            return
        if isinstance(node.meta.get("val"), int | torch.SymInt):
            self.results[node] = node.meta["val"]  # size arithmetic: every shape is taken from the graph
            return
        arguments = self.arguments(node)
        if is_in_place(node) and node.all_input_nodes[0] in self.buffers:
            buffer = self.buffers[node.all_input_nodes[0]]
            raise LoweringError(f"the forward pass modifies the module's buffer {buffer!r}")
        if not any(_holds_value(argument) for argument in arguments.values()):
            self.results[node] = self.constant(node)
            return
        packet = node.target.overloadpacket  # type: ignore[union-attr]
        in_place = is_in_place(node)
        handler = _HANDLERS.get(
            getattr(aten, packet.__name__.removesuffix("_"), None) if in_place else packet
        )
        if handler is None:
            self.refuse()
        self.results[node] = handler(self, **arguments)
        if in_place:
            self.overwrite(arguments["input"], self.results[node])

    def overwrite(self, before: Any, after: Any) -> None:
        """An in-place operator turned ``before`` into ``after``: so did every view of the same memory."""
        same_view = isinstance(before, Value) and isinstance(after, Value) and after.axes == before.axes
        if not same_view or before.storage in self.shared:
            raise InPlaceOnView(str(self.node))
        for node, result in self.results.items():
            if isinstance(result, Value) and result.storage == before.storage:
                self.results[node] = replace(result, number=after.number)
        assert self.node is not None
        self.results[self.node] = replace(after, storage=before.storage)

    def arguments(self, node: Node) -> dict[str, Any]:
        """The call's arguments by name, defaults filled in; ``self`` is called ``input``."""
        if not isinstance(node.target, torch._ops.OpOverload):
            self.refuse()
        args, kwargs = self.resolved(node)
        bound = {}
        for position, argument in enumerate(node.target._schema.arguments):
            name = "input" if argument.name == "self" else argument.name
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            bound[name] = argument.default_value if given is None else given
        return bound

    def resolved(self, node: Node) -> Any:
        """The call's (args, kwargs), with nodes replaced by their results."""
        return map_arg((node.args, node.kwargs), self.results.__getitem__)

    def constant(self, node: Node) -> Any:
        """Evaluate an operator that reads no batched value."""
        args, kwargs = self.resolved(node)
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # a size depends on the batch, or the operator has no CPU kernel
            self.refuse("its result depends on the batch size")

    def calls(self, operator: Any) -> bool:
        """Whether the current operator is this one, in place or not."""
        packet = getattr(self.node.target, "overloadpacket", None) if self.node is not None else None
        return packet in (operator, getattr(aten, f"{operator.__name__}_", None))

    def refuse(self, detail: str = "") -> NoReturn:
        """Raise LoweringError: the current operator cannot be lowered."""
        what = "the output" if self.node is None else f"operator {self.node.target}"
        reason = f"{what}: {detail}" if detail else what
        raise LoweringError(reason if self.node is None else f"{reason} ({_place(self.node)})")

    # ---- shapes ----

    def instance_shape(self, example: Tensor) -> Shape:
        """The shape of a graph value without its batch axis, which must be first and unchanged."""
        sizes: tuple[Any, ...] = tuple(example.shape)
        batch, *rest = sizes
        same = getattr(batch, "node", None) and batch.node.expr == self.batch.node.expr
        if not same or not all(isinstance(size, int) for size in rest):
            self.refuse(f"it returns shape {tuple(example.shape)}, which does not keep the batch axis first")
        if example.dtype != self.dtype:
            self.refuse(f"it returns {example.dtype} in a network of {self.dtype}")
        return tuple(rest)

    def result_shape(self) -> Shape:
        """The shape per instance of the current operator's result."""
        assert self.node is not None
        return self.instance_shape(self.node.meta["val"])

    def axis(self, dim: int, value: Value) -> int:
        """A dimension of the graph as an axis of the view; the batch is refused."""
        axis = dim % (1 + len(value.axes)) - 1
        if axis < 0:
            self.refuse("it works along the batch")
        return axis

    # ---- values ----

    def emit(self, kind: type[Op], shape: Shape, /, **fields: Any) -> Value:
        """Append an operation."""
        number = len(self.shapes)
        tensors = {n: t.cpu() for n, t in fields.items() if isinstance(t, Tensor)}
        self.ops.append(kind(number, **{**fields, **tensors}))
        self.shapes[number] = shape
        return self.stored(number)

    def emit_elementwise(self, kind: type[Op], value: Value, /, **fields: Any) -> Value:
        """Append an operation that keeps every element in its place, whatever the view."""
        result = self.emit(kind, self.shapes[value.number], input=value.number, **fields)
        return replace(result, axes=value.axes)

    def stored(self, number: int) -> Value:
        """The plan's value itself."""
        self.storages += 1
        return Value(number, stored_axes(self.shapes[number]), self.storages)

    def reshaped(self, value: Value, shape: Shape, storage: int | None) -> Value:
        """The same elements under another shape; a view if possible."""
        axes = regroup(value.axes, shape)
        if axes is None:
            self.refuse(
                f"it reshapes {value.shape} to {shape} across the axes of {self.shapes[value.number]}"
            )
        return Value(value.number, axes, storage)

    def perhaps_shared(self, result: Value, source: Value) -> Value:
        """``result``, which torch may have made as a view of ``source``'s memory."""
        self.shared.add(source.storage)
        return replace(result, storage=None)

    def moved(self, value: Value, source: int, destination: int) -> Value:
        """The view with one axis in another place."""
        axes = list(value.axes)
        axes.insert(destination, axes.pop(source))
        return replace(value, axes=tuple(axes))

    def channels_reordered(self, value: Value) -> Value:
        """The same view of a value whose channels are stored in the order in which the view meets them."""
        order = channel_order(value.axes).reshape(-1)
        if all(i == channel for i, channel in enumerate(order)):
            return value
        shape = (len(order), *self.shapes[value.number][1:])
        reordered = self.emit(Reorder, shape, input=value.number, channels=tuple(map(int, order)))
        return replace(reordered, axes=with_channels_in_order(value.axes))

    def cells_to_channels(self, value: Value) -> Value:
        """The view of a map whose pixels were cut into cells, with the places in a cell as channels.

        Space to depth: each place becomes a strided slice, and all slices are concatenated.
        """
        shape = self.shapes[value.number]
        if len(shape) != 3:
            return value
        cell = []
        for axis in (1, 2):
            factors = [factor for view_axis in value.axes for factor in view_axis if factor.axis == axis]
            size = min((factor.step for factor in factors if factor.step > 1), default=1)
            whole = {Factor(axis, shape[axis] // size, size), Factor(axis, size)}
            if size > 1 and set(factors) != whole:
                return value
            cell.append(size)
        rows, columns = cell
        if rows == columns == 1:
            return value
        smaller = (shape[0], shape[1] // rows, shape[2] // columns)
        places = [
            self.emit(
                Slice,
                smaller,
                input=value.number,
                start=(0, row, column),
                stop=shape,
                step=(1, rows, columns),
            ).number
            for row in range(rows)
            for column in range(columns)
        ]
        joined = self.emit(Concat, (len(places) * shape[0], *smaller[1:]), inputs=tuple(places))
        moved = {
            Factor(1, rows): Factor(0, rows, columns * shape[0]),
            Factor(2, columns): Factor(0, columns, shape[0]),
            Factor(1, smaller[1], rows): Factor(1, smaller[1]),
            Factor(2, smaller[2], columns): Factor(2, smaller[2]),
        }
        axes = tuple(tuple(moved.get(factor, factor) for factor in axis) for axis in value.axes)
        return replace(joined, axes=axes)

    def plain(self, value: Any) -> Value:
        """The operand as a value of the plan that has the view's shape: a map (C, H, W) or a vector (F,)."""
        if not isinstance(value, Value):
            self.refuse("it reads a constant where only a batched value is supported")
        view = value
        if not is_row_major(view.axes):
            view = self.channels_reordered(self.cells_to_channels(view))
        if not is_row_major(view.axes):
            self.refuse(f"it reads a transposed view of shape {view.shape} per instance")
        shape = view.shape
        if shape == self.shapes[view.number]:
            return view
        if len(shape) == 1:
            return self.emit(Flatten, shape, input=view.number)
        if len(shape) == 3:
            return self.emit(Reshape, shape, input=view.number, shape=shape)
        self.refuse(f"it reads a view of shape {shape} per instance")

    def image(self, value: Any) -> Value:
        """The operand, which must be a map (C, H, W)."""
        plain = self.plain(value)
        if len(plain.shape) != 3:
            self.refuse(f"it reads shape {plain.shape} per instance; only (C, H, W) is supported")
        return plain

    def pixels(self, value: Any) -> Value | None:
        """The operand if its last axis is all channels of a stored value, in order; None otherwise.

        Vectors, NHWC maps and sequences of tokens are such views: an operator on their last axis acts on
        every pixel.
        """
        if not isinstance(value, Value) or not value.axes:
            return None
        if any(factor.axis == 0 for axis in value.axes[:-1] for factor in axis):
            return None
        value = self.channels_reordered(value)
        last = stored_axes(self.shapes[value.number])[0]
        return value if value.axes[-1] == last else None

    def with_channels(self, value: Value, number: int) -> Value:
        """A view like ``value``, whose last axis is all channels, of another value with the same pixels."""
        return replace(self.stored(number), axes=(*value.axes[:-1], stored_axes(self.shapes[number])[0]))

    def constant_for(self, constant: Any, value: Value) -> Tensor:
        """A constant that broadcasts against a view, float64, in the layout of the stored value."""
        tensor = torch.as_tensor(constant, dtype=torch.float64).cpu()
        if tensor.ndim == 1 + len(value.axes) and tensor.shape[0] == 1:
            tensor = tensor[0]
        fits = tensor.ndim <= len(value.axes) and all(
            n in (1, m) for n, m in zip(tensor.shape[::-1], value.shape[::-1], strict=False)
        )
        if not fits:
            self.refuse(f"a constant of shape {tuple(tensor.shape)} widens a value of shape {value.shape}")
        return to_stored_order(tensor, value.axes, self.shapes[value.number])


def _place(node: Node) -> str:
    """The graph's name of a call, and the path of the innermost module that made it."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    path = stack[-1].removeprefix("stage.").removeprefix("module").removeprefix(".") if stack else ""
    return f"node {node.name}, module {path!r}" if path else f"node {node.name}"


def is_in_place(node: Node) -> bool:
    """Whether a call changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _holds_value(argument: Any) -> bool:
    return isinstance(argument, Value) or (
        isinstance(argument, list | tuple) and any(_holds_value(item) for item in argument)
    )


def pair(numbers: int | Sequence[int]) -> tuple[int, int]:
    """A spatial argument of torch, which is one number for both axes or two numbers."""
    if isinstance(numbers, int):
        return numbers, numbers
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])
