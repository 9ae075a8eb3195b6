"""Translation of an exported graph to plan operations, one operator at a time.

An operator of the graph computes a batched value, computes a constant from weights and other constants, or
renames a value. Shapes are taken from the graph, so views need no shape inference. Constants are float64
here; :mod:`fastcascade.lowering.fusion` rounds them once, at the end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.node import map_arg

from fastcascade.errors import LoweringError
from fastcascade.lowering.operations import (
    Activation,
    ActivationKind,
    Add,
    Concat,
    Conv2d,
    Flatten,
    Linear,
    Op,
    Pad,
    Pool,
    ScaleShift,
    Shape,
    Slice,
)

__all__ = ["Graph", "translate"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Value:
    """A batched value: its number in the plan and its shape per instance.

    It may be a row-major view of the plan's value, with another shape. An operation that needs the plan's
    shape calls :meth:`_Translator.plain`.
    """

    number: int
    shape: Shape


@dataclass
class Graph:
    """Operations with float64 weights in order of execution, shapes by value, and (features, logits)."""

    ops: list[Op]
    shapes: dict[int, Shape]
    outputs: tuple[int, int]


def translate(program: ExportedProgram) -> Graph:
    """Translate the operators on which the outputs (features, logits) of an exported stage depend.

    Args:
        program: has no in-place operators, and one input whose first axis is a dynamic batch.

    Raises:
        LoweringError: no plan operation expresses an operator; names the first such operator.
    """
    for spec in program.graph_signature.output_specs:
        if spec.kind is OutputKind.BUFFER_MUTATION:
            raise LoweringError(f"the forward pass modifies the module's buffer {spec.target!r}")
    nodes = {node.name: node for node in program.graph.nodes}
    wanted = [
        nodes[spec.arg.name]
        for spec in program.graph_signature.output_specs
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    translator = _Translator(program)
    needed = _ancestors(wanted)
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


Handler = Callable[..., Any]
_HANDLERS: dict[Any, Handler] = {}


def _lowers(*operators: Any) -> Callable[[Handler], Handler]:
    """Register a handler, which is called with the translator and the operator's arguments by name."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(operators, handler))
        return handler

    return register


class _Translator:
    """The state of one translation.

    Attributes:
        results: for each graph node, a :class:`Value`, a constant tensor, a list of these, or a number.
        node: the operator being translated; None while the outputs are read.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.ops: list[Op] = []
        self.shapes: dict[int, Shape] = {}
        self.results: dict[Node, Any] = {}
        self.node: Node | None = None
        tensors = {**program.state_dict, **program.constants}
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        for spec in program.graph_signature.input_specs:
            node = placeholders[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                example = node.meta["val"]
                self.batch, self.dtype = example.shape[0], example.dtype
                self.results[node] = Value(0, self.instance_shape(example))
            else:
                self.results[node] = tensors[str(spec.target)].detach()
        self.shapes[0] = next(r.shape for r in self.results.values() if isinstance(r, Value))

    def visit(self, node: Node) -> None:
        """Translate one operator call."""
        self.node = node
        if node.target is operator.getitem:
            source, index = node.args
            self.results[node] = self.results[source][index]  # type: ignore[index]
            return
        if isinstance(node.meta.get("val"), int | torch.SymInt):
            self.results[node] = node.meta["val"]  # size arithmetic; shapes are taken from the graph
            return
        arguments = self.arguments(node)
        handler = _HANDLERS.get(getattr(node.target, "overloadpacket", None))
        if not any(_holds_value(argument) for argument in arguments.values()):
            self.results[node] = self.constant(node)
        elif handler is None:
            self.refuse()
        else:
            self.results[node] = handler(self, **arguments)

    def arguments(self, node: Node) -> dict[str, Any]:
        """The call's arguments by name, with defaults; ``self`` becomes ``input``."""
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

    def refuse(self, detail: str = "") -> NoReturn:
        """Raise LoweringError: the current operator cannot be lowered."""
        what = "the output" if self.node is None else f"operator {self.node.target}"
        raise LoweringError(f"{what}: {detail}" if detail else what)

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

    def emit(self, kind: type[Op], shape: Shape, /, **fields: Any) -> Value:
        """Append an operation, its tensors converted to float64."""
        number = len(self.shapes)
        tensors = {n: t.to("cpu", torch.float64) for n, t in fields.items() if isinstance(t, Tensor)}
        self.ops.append(kind(number, **{**fields, **tensors}))
        self.shapes[number] = shape
        return Value(number, shape)

    def plain(self, value: Any) -> Value:
        """The operand in the shape that it has in the plan; a vector view of a map becomes a Flatten."""
        if not isinstance(value, Value):
            self.refuse("it reads a constant where only a batched value is supported")
        if value.shape == self.shapes[value.number] and len(value.shape) in (1, 3):
            return value
        if len(value.shape) == 1 and len(self.shapes[value.number]) == 3:
            return self.emit(Flatten, value.shape, input=value.number)
        self.refuse(f"it reads a view of shape {value.shape} per instance")

    def image(self, value: Any) -> Value:
        """The operand, which must be a map (C, H, W)."""
        plain = self.plain(value)
        if len(plain.shape) != 3:
            self.refuse(f"it reads shape {plain.shape} per instance; only (C, H, W) is supported")
        return plain


def _holds_value(argument: Any) -> bool:
    return isinstance(argument, Value) or (
        isinstance(argument, list | tuple) and any(_holds_value(item) for item in argument)
    )


def _two(numbers: Any) -> tuple[int, int]:
    """A spatial argument of torch, which is one number for both axes or two numbers."""
    if isinstance(numbers, int):
        return numbers, numbers
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


# ---- convolution and linear ----


@_lowers(aten.conv2d, aten.convolution)
def _conv2d(
    t: _Translator,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    transposed: bool = False,
    output_padding: Any = None,
) -> Value:
    value = t.image(input)
    if transposed or not isinstance(weight, Tensor) or isinstance(bias, Value):
        t.refuse("transposed" if transposed else "its weight or bias depends on the input")
    spread, kernel = _two(dilation), (weight.shape[2], weight.shape[3])
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        sides = (reach[0] // 2, reach[0] - reach[0] // 2, reach[1] // 2, reach[1] - reach[1] // 2)
    else:
        rows, columns = (0, 0) if padding == "valid" else _two(padding)
        sides = (rows, rows, columns, columns)
    return t.emit(
        Conv2d,
        t.result_shape(),
        input=value.number,
        weight=weight,
        bias=torch.zeros(weight.shape[0]) if bias is None else bias,
        stride=_two(stride),
        padding=sides,
        dilation=spread,
        groups=groups,
    )


@_lowers(aten.linear)
def _linear(t: _Translator, input: Any, weight: Any, bias: Any) -> Value:
    value = t.plain(input)
    if len(value.shape) != 1:
        t.refuse(f"it reads shape {value.shape} per instance; only vectors are supported")
    if not isinstance(weight, Tensor) or isinstance(bias, Value):
        t.refuse("its weight or bias depends on the input")
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    return t.emit(Linear, t.result_shape(), input=value.number, weight=weight, bias=bias)


@_lowers(aten.matmul, aten.mm)
def _matmul(t: _Translator, input: Any, **other: Any) -> Value:
    (weight,) = other.values()
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        t.refuse("only a vector times a constant matrix is supported")
    return _linear(t, input, weight.T, None)  # type: ignore[no-any-return]


@_lowers(aten.addmm)
def _addmm(t: _Translator, input: Any, mat1: Any, mat2: Any, beta: float, alpha: float) -> Value:
    if not isinstance(mat2, Tensor) or not isinstance(input, Tensor) or (beta, alpha) != (1, 1):
        t.refuse("only a constant matrix and bias are supported")
    return _linear(t, mat1, mat2.T, input.expand(mat2.shape[1]))  # type: ignore[no-any-return]


# ---- arithmetic ----


@_lowers(aten.batch_norm, aten._native_batch_norm_legit_no_training)
def _batch_norm(
    t: _Translator,
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    eps: float,
    training: bool = False,
    **_: Any,
) -> Any:
    if training or running_mean is None:
        t.refuse("it uses batch statistics, which mix instances")
    mean, var = running_mean.double(), running_var.double()
    scale = (var + eps).rsqrt() if weight is None else weight.double() * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias.double() - mean * scale
    value = t.plain(input)
    result = t.emit(ScaleShift, value.shape, input=value.number, scale=scale, shift=shift)
    return [result] if isinstance(t.node.meta["val"], list | tuple) else result  # type: ignore[union-attr]


def _scale_shift(t: _Translator, input: Value, scale: Any = 1.0, shift: Any = 0.0) -> Value:
    """scale·input + shift, for numbers or tensors that vary only along channels."""
    value = t.plain(input)
    channels = value.shape[0]

    def per_channel(constant: Any) -> Tensor:
        tensor = torch.as_tensor(constant, dtype=torch.float64)
        axes = (1,) * (1 + len(value.shape) - tensor.ndim) + tuple(tensor.shape)
        if len(axes) != 1 + len(value.shape) or axes[1] not in (1, channels) or axes.count(1) < len(axes) - 1:
            t.refuse(f"a constant of shape {tuple(tensor.shape)} is not one number per channel")
        if axes[1] == 1 and tensor.numel() != 1:
            t.refuse(f"a constant of shape {tuple(tensor.shape)} is not one number per channel")
        return tensor.reshape(-1).expand(channels)

    return t.emit(
        ScaleShift, value.shape, input=value.number, scale=per_channel(scale), shift=per_channel(shift)
    )


@_lowers(aten.add, aten.sub)
def _add(t: _Translator, input: Any, other: Any, alpha: float) -> Value:
    assert t.node is not None
    sign = -1.0 if t.node.target.overloadpacket is aten.sub else 1.0  # type: ignore[union-attr]
    factor = sign * float(alpha)
    if not isinstance(other, Value):
        return _scale_shift(t, input, shift=torch.as_tensor(other, dtype=torch.float64) * factor)
    if not isinstance(input, Value):
        return _scale_shift(t, other, scale=factor, shift=input)
    left, right = t.plain(input), t.plain(other)
    if left.shape != right.shape:
        t.refuse(f"it adds shapes {left.shape} and {right.shape}")
    right = right if factor == 1 else _scale_shift(t, right, scale=factor)
    return t.emit(Add, left.shape, input=left.number, other=right.number)


@_lowers(aten.rsub)
def _rsub(t: _Translator, input: Any, other: Any, alpha: float) -> Value:
    return _scale_shift(t, input, scale=-float(alpha), shift=other)


@_lowers(aten.mul)
def _mul(t: _Translator, input: Any, other: Any) -> Value:
    value, constant = (input, other) if isinstance(input, Value) else (other, input)
    if isinstance(constant, Value):
        t.refuse("it multiplies two values")
    return _scale_shift(t, value, scale=constant)


@_lowers(aten.div)
def _div(t: _Translator, input: Any, other: Any, rounding_mode: Any = None) -> Value:
    if isinstance(other, Value) or rounding_mode is not None:
        t.refuse("only exact division by a constant is supported")
    return _scale_shift(t, input, scale=1 / torch.as_tensor(other, dtype=torch.float64))


def _activation(t: _Translator, input: Any, kind: ActivationKind) -> Value:
    value = t.plain(input)
    return t.emit(Activation, value.shape, input=value.number, kind=kind)


@_lowers(aten.relu)
def _relu(t: _Translator, input: Any) -> Value:
    return _activation(t, input, "relu")


@_lowers(aten.relu6)
def _relu6(t: _Translator, input: Any) -> Value:
    return _activation(t, input, "relu6")


@_lowers(aten.hardtanh, aten.clamp, aten.clamp_min)
def _clamp(t: _Translator, input: Any, **limits: Any) -> Value:
    low, high = [*limits.values(), None][:2]
    if not isinstance(low, int | float) or low != 0 or high not in (None, 6):
        t.refuse(f"it clamps to [{low}, {high}]; only [0, ∞) and [0, 6] are supported")
    return _activation(t, input, "relu" if high is None else "relu6")


# ---- pooling ----


def _pool(t: _Translator, value: Value, shape: Shape, kernel: Any, stride: Any, **fields: Any) -> Value:
    size, step = _two(kernel), _two(stride or kernel)
    return t.emit(Pool, shape, input=value.number, kernel=size, stride=step, **fields)


@_lowers(aten.max_pool2d, aten.max_pool2d_with_indices)
def _max_pool2d(
    t: _Translator, input: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Any:
    assert t.node is not None
    if _two(dilation) != (1, 1):
        t.refuse(f"dilation {dilation}")
    example = t.node.meta["val"]
    with_indices = isinstance(example, list | tuple)
    shape = t.instance_shape(example[0] if with_indices else example)
    rows, columns = _two(padding)
    sides = (rows, rows, columns, columns)
    result = _pool(
        t, t.image(input), shape, kernel_size, stride, kind="max", padding=sides, ceil_mode=ceil_mode
    )
    return [result] if with_indices else result


@_lowers(aten.avg_pool2d)
def _avg_pool2d(
    t: _Translator,
    input: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Value:
    if divisor_override is not None:
        t.refuse("divisor_override")
    rows, columns = _two(padding)
    return _pool(
        t,
        t.image(input),
        t.result_shape(),
        kernel_size,
        stride,
        kind="average",
        padding=(rows, rows, columns, columns),
        ceil_mode=ceil_mode,
        include_padding=count_include_pad,
    )


@_lowers(aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d)
def _adaptive_pool2d(t: _Translator, input: Any, output_size: Any) -> Any:
    assert t.node is not None
    example = t.node.meta["val"]
    with_indices = isinstance(example, list | tuple)
    value, shape = t.image(input), t.instance_shape(example[0] if with_indices else example)
    if value.shape[1] % shape[1] or value.shape[2] % shape[2]:
        t.refuse(f"windows of unequal size ({value.shape[1:]} to {shape[1:]})")
    kernel = (value.shape[1] // shape[1], value.shape[2] // shape[2])
    result = _pool(t, value, shape, kernel, kernel, kind="max" if with_indices else "average")
    return [result] if with_indices else result


@_lowers(aten.mean, aten.amax)
def _reduce(t: _Translator, input: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    assert t.node is not None
    value = t.image(input)
    axes = {axis % 4 for axis in (dim or ())}
    if not axes or not axes <= {2, 3}:
        t.refuse(f"over axes {dim}; only height and width are supported")
    kernel = (value.shape[1] if 2 in axes else 1, value.shape[2] if 3 in axes else 1)
    shape = (value.shape[0], value.shape[1] // kernel[0], value.shape[2] // kernel[1])
    kind = "max" if t.node.target.overloadpacket is aten.amax else "average"  # type: ignore[union-attr]
    pooled = _pool(t, value, shape, kernel, kernel, kind=kind)
    return Value(pooled.number, t.result_shape())


# ---- shape ----


@_lowers(
    aten.alias,
    aten.clone,
    aten.contiguous,
    aten.detach,
    aten.flatten,
    aten.lift_fresh_copy,
    aten.reshape,
    aten.squeeze,
    aten.unflatten,
    aten.unsqueeze,
    aten.view,
    aten._unsafe_view,
    aten.to,
    aten._to_copy,
)
def _view(t: _Translator, input: Value, **_: Any) -> Value:
    """A row-major view of the input, or the input itself."""
    return Value(input.number, t.result_shape())


@_lowers(aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)
def _dropout(t: _Translator, input: Value, train: bool, **_: Any) -> Value:
    if train:
        t.refuse("it is not disabled in eval mode")
    return input


@_lowers(aten.pad, aten.constant_pad_nd)
def _pad(t: _Translator, input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Value:
    image = t.image(input)
    if mode != "constant":
        t.refuse(f"mode {mode!r}")
    numbers = [*pad, *[0] * (8 - len(pad))]
    before, after = (numbers[4], numbers[2], numbers[0]), (numbers[5], numbers[3], numbers[1])
    if any(numbers[6:]):
        t.refuse("it pads the batch")
    cropped = tuple(n + min(b, 0) + min(a, 0) for n, b, a in zip(image.shape, before, after, strict=True))
    if cropped != image.shape:
        start = tuple(max(-b, 0) for b in before)
        stop = tuple(b + n for b, n in zip(start, cropped, strict=True))
        image = t.emit(Slice, cropped, input=image.number, start=start, stop=stop, step=(1, 1, 1))
    return t.emit(
        Pad,
        t.result_shape(),
        input=image.number,
        before=tuple(max(b, 0) for b in before),
        after=tuple(max(a, 0) for a in after),
        value=float(value or 0.0),
    )


def _slice_axis(t: _Translator, value: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
    """input[start:stop:step] along one axis of (C, H, W)."""
    starts, stops, steps = [0, 0, 0], list(value.shape), [1, 1, 1]
    starts[axis], stops[axis], steps[axis] = start, stop, step
    shape = list(value.shape)
    shape[axis] = len(range(start, stop, step))
    if tuple(shape) == value.shape:
        return value
    if 0 in shape:
        t.refuse("an empty slice")
    fields = {"start": tuple(starts), "stop": tuple(stops), "step": tuple(steps)}
    return t.emit(Slice, tuple(shape), input=value.number, **fields)


@_lowers(aten.slice)
def _slice(t: _Translator, input: Value, dim: int, start: Any, end: Any, step: int) -> Value:
    if dim == 0 and not start and step == 1 and isinstance(end, int) and end == 2**63 - 1:
        return input
    value = t.image(input)
    axis = dim % 4 - 1
    if axis < 0:
        t.refuse("it slices the batch")
    return _slice_axis(t, value, axis, *slice(start, end, step).indices(value.shape[axis]))


@_lowers(aten.narrow)
def _narrow(t: _Translator, input: Any, dim: int, start: int, length: int) -> Value:
    return _slice(t, input, dim, start, start + length, 1)  # type: ignore[no-any-return]


@_lowers(aten.chunk, aten.split, aten.split_with_sizes)
def _split(t: _Translator, input: Any, dim: int, **_: Any) -> list[Value]:
    assert t.node is not None
    value = t.image(input)
    if dim % 4 == 0:
        t.refuse("it splits the batch")
    parts, start = [], 0
    for example in t.node.meta["val"]:
        stop = start + example.shape[dim]
        parts.append(_slice_axis(t, value, dim % 4 - 1, start, stop))
        start = stop
    return parts


@_lowers(aten.cat)
def _cat(t: _Translator, tensors: Any, dim: int) -> Value:
    values = [t.plain(value) for value in tensors]
    if dim % (1 + len(values[0].shape)) != 1:
        t.refuse(f"along axis {dim}; only channels are supported")
    return t.emit(Concat, t.result_shape(), inputs=tuple(value.number for value in values))
