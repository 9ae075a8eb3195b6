"""Operations of a plan as ONNX nodes (opset 20)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastcascade.errors import InvalidArgument, LoweringError
from fastcascade.lowering.operations import (
    Activation,
    ActivationKind,
    AdaptivePool,
    Add,
    ChannelReduce,
    Concat,
    Conv2d,
    Flatten,
    Flip,
    LayerNorm,
    Linear,
    Multiply,
    Op,
    Pad,
    Pool,
    Reorder,
    Reshape,
    Resize,
    ScaleShift,
    Shape,
    Slice,
    Softmax,
)
from fastcascade.lowering.plan import StagePlan

if TYPE_CHECKING:
    import onnx

__all__ = ["BOOL", "FLOAT", "INT32", "INT64", "OPSET", "UINT8", "GraphBuilder", "add_stage"]

OPSET = 20
"""The first with Gelu."""

FLOAT, UINT8, INT32, INT64, BOOL = 1, 2, 6, 7, 9
"""ONNX's numbers of the element types (``onnx.TensorProto.DataType``)."""


class GraphBuilder:
    """Nodes and constants of an ONNX graph. All graphs of one model share the counter of value names."""

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._numbers = itertools.count() if numbers is None else numbers

    def subgraph(self) -> GraphBuilder:
        """An empty graph for the branch of an If; it sees the values of this one."""
        return GraphBuilder(self._numbers)

    def new_name(self) -> str:
        """A name that no other value of the model has."""
        return f"v{next(self._numbers)}"

    def constant(self, value: Tensor | NDArray[Any] | Sequence[int] | float) -> str:
        """A constant: floating numbers as float32, integers as int64. Returns its name."""
        import onnx.numpy_helper

        array = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        name = self.new_name()
        self.constants.append(onnx.numpy_helper.from_array(array, name))
        return name

    def add(self, kind: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Add a node; returns the name of its first output, which is new unless ``outputs`` names them."""
        import onnx.helper

        names = list(outputs) or [self.new_name()]
        self.nodes.append(onnx.helper.make_node(kind, inputs, names, **attributes))
        return names[0]

    def reduce(self, kind: str, x: str, axes: Sequence[int]) -> str:
        """A reduction that keeps its axes, with size 1."""
        return self.add(kind, x, self.constant(list(axes)), keepdims=1)


def add_stage(graph: GraphBuilder, stage: StagePlan, x: str) -> tuple[str, str]:
    """Add a stage that reads the batch ``x``; returns the names of its features and logits.

    Raises:
        LoweringError: the stage is opaque.
    """
    if stage.module is not None:
        raise LoweringError(
            f"stage {stage.name!r} has no ONNX form: it is opaque ({stage.opaque_reason}); "
            "export its module with torch.onnx.export"
        )
    values = {0: x}
    for op in stage.ops:
        inputs = [values[v] for v in op.reads]
        shapes = [stage.shapes[v] for v in op.reads]
        values[op.output] = _add_op(graph, op, inputs, shapes, stage.shapes[op.output])
    return values[stage.features], values[stage.logits]


def _add_op(graph: GraphBuilder, op: Op, inputs: list[str], shapes: list[Shape], out: Shape) -> str:
    """Add one operation; shapes are per instance."""
    x, shape = inputs[0], shapes[0]
    match op:
        case Conv2d():
            return _add_conv(graph, op, inputs)
        case Pool():
            return _add_pool(graph, op, x, shape, out)
        case Linear():
            weight, bias = graph.constant(op.weight), graph.constant(op.bias)
            return _activate(graph, graph.add("Gemm", x, weight, bias, transB=1), op.activation)
        case Add():
            return _activate(graph, graph.add("Add", *inputs), op.activation)
        case Multiply():
            return graph.add("Mul", *inputs)
        case Activation():
            return _activate(graph, x, op.kind, op.parameter)
        case ScaleShift():
            axes = op.scale.shape if op.scale.ndim == len(shape) else (-1, *(1,) * (len(shape) - 1))
            scaled = graph.add("Mul", x, graph.constant(op.scale.reshape(axes)))
            return graph.add("Add", scaled, graph.constant(op.shift.reshape(axes)))
        case LayerNorm():
            return _add_layer_norm(graph, op, x, shape)
        case Softmax():
            parts = (op.parts, shape[0] // op.parts, *shape[1:])
            return _reshape(graph, graph.add("Softmax", _reshape(graph, x, parts), axis=1), shape)
        case ChannelReduce():
            return graph.reduce("ReduceMean" if op.kind == "mean" else "ReduceMax", x, [1])
        case Reorder():
            return graph.add("Gather", x, graph.constant(op.channels), axis=1)
        case Flip():
            return graph.add("Gather", x, graph.constant(range(shape[2] - 1, -1, -1)), axis=3)
        case Resize():
            return _add_resize(graph, op, x)
        case AdaptivePool():
            return _add_adaptive_pool(graph, op, x, shape)
        case Reshape():
            return _reshape(graph, x, op.shape)
        case Slice():
            bounds = [graph.constant(v) for v in (op.start, op.stop, (1, 2, 3), op.step)]
            return graph.add("Slice", x, *bounds)
        case Pad():
            modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
            pads = graph.constant((0, *op.before, 0, *op.after))
            return graph.add("Pad", x, pads, graph.constant(op.value), mode=modes[op.mode])
        case Concat():
            return graph.add("Concat", *inputs, axis=1)
        case Flatten():
            return graph.add("Flatten", x, axis=1)
    raise InvalidArgument(f"{type(op).__name__} has no ONNX form")


def _activate(graph: GraphBuilder, x: str, kind: ActivationKind, parameter: float = 0.0) -> str:
    match kind:
        case "none":
            return x
        case "relu6":
            return graph.add("Clip", x, graph.constant(0.0), graph.constant(6.0))
        case "leaky_relu":
            return graph.add("LeakyRelu", x, alpha=parameter)
        case "elu":
            return graph.add("Elu", x, alpha=parameter)
        case "hard_sigmoid":
            return graph.add("HardSigmoid", x, alpha=1 / 6, beta=0.5)
        case "silu":
            return graph.add("Mul", x, graph.add("Sigmoid", x))
        case "gelu":
            return graph.add("Gelu", x)
        case "gelu_tanh":
            return graph.add("Gelu", x, approximate="tanh")
    names = {
        "relu": "Relu",
        "sigmoid": "Sigmoid",
        "hard_swish": "HardSwish",
        "mish": "Mish",
        "tanh": "Tanh",
        "exp": "Exp",
        "sqrt": "Sqrt",
        "reciprocal": "Reciprocal",
    }
    return graph.add(names[kind], x)


def _reshape(graph: GraphBuilder, x: str, shape: Sequence[int]) -> str:
    return graph.add("Reshape", x, graph.constant((0, *shape)))  # 0 keeps the batch axis


def _add_conv(graph: GraphBuilder, op: Conv2d, inputs: list[str]) -> str:
    top, bottom, left, right = op.padding
    y = graph.add(
        "Conv",
        inputs[0],
        graph.constant(op.weight),
        graph.constant(op.bias),
        strides=op.stride,
        pads=(top, left, bottom, right),
        dilations=op.dilation,
        group=op.groups,
    )
    y = y if op.residual is None else graph.add("Add", y, inputs[1])
    return _activate(graph, y, op.activation)


def _add_pool(graph: GraphBuilder, op: Pool, x: str, shape: Shape, out: Shape) -> str:
    """A pool whose padding is explicit, because runtimes differ in what ceil_mode counts."""
    top, left = op.padding[::2]
    _, height, width = shape
    rows = max(0, (out[1] - 1) * op.stride[0] + op.kernel[0] - height - top)
    columns = max(0, (out[2] - 1) * op.stride[1] + op.kernel[1] - width - left)
    fill = -math.inf if op.kind == "max" else 0.0
    if any((top, left, rows, columns)):
        pads = graph.constant((0, 0, top, left, 0, 0, rows, columns))
        x = graph.add("Pad", x, pads, graph.constant(fill))
    window: dict[str, Any] = {"kernel_shape": op.kernel, "strides": op.stride}
    if op.kind == "max":
        return graph.add("MaxPool", x, **window)
    mean = graph.add("AveragePool", x, **window)
    before, after = (op.padding[::2], op.padding[1::2]) if op.include_padding else ((0, 0), (0, 0))
    counts = [
        _cells(out[1 + a], op.kernel[a], op.stride[a], op.padding[2 * a], shape[1 + a], before[a], after[a])
        for a in (0, 1)
    ]
    cells = np.outer(*counts)
    if (cells == math.prod(op.kernel)).all():
        return mean
    return graph.add("Mul", mean, graph.constant(math.prod(op.kernel) / cells))


def _cells(
    windows: int, kernel: int, stride: int, padding: int, size: int, before: int, after: int
) -> NDArray[np.int64]:
    """How many cells of an axis every window counts: those of the image and of the counted padding."""
    begin = np.arange(windows) * stride - padding
    return np.minimum(begin + kernel, size + after) - np.maximum(begin, -before)


def _add_layer_norm(graph: GraphBuilder, op: LayerNorm, x: str, shape: Shape) -> str:
    last = x if len(shape) == 1 else graph.add("Transpose", x, perm=(0, 2, 3, 1))
    scale, shift = graph.constant(op.scale), graph.constant(op.shift)
    y = graph.add("LayerNormalization", last, scale, shift, axis=-1, epsilon=op.eps)
    return y if len(shape) == 1 else graph.add("Transpose", y, perm=(0, 3, 1, 2))


def _add_resize(graph: GraphBuilder, op: Resize, x: str) -> str:
    # The batch axis keeps its size: axes and sizes name the other two.
    sizes = graph.constant(op.size)
    if op.kind == "nearest":
        how: dict[str, Any] = {"mode": "nearest", "nearest_mode": "floor"}
        centres = "asymmetric"
    else:
        how = {"mode": "cubic" if op.kind == "bicubic" else "linear", "antialias": int(op.antialias)}
        if op.kind == "bicubic":
            how |= {"cubic_coeff_a": -0.5, "exclude_outside": 1}
        centres = "align_corners" if op.align_corners else "half_pixel"
    return graph.add("Resize", x, "", "", sizes, axes=(2, 3), coordinate_transformation_mode=centres, **how)


def _add_adaptive_pool(graph: GraphBuilder, op: AdaptivePool, x: str, shape: Shape) -> str:
    """Pooling along rows, then along columns: as products with averaging matrices, or as maxima of slices."""
    if op.kind == "average":
        rows, columns = (graph.constant(_averages(n, m)) for n, m in zip(shape[1:], op.size, strict=True))
        return graph.add("MatMul", graph.add("MatMul", rows, x), graph.add("Transpose", columns))
    for axis, size, count in zip((2, 3), shape[1:], op.size, strict=True):
        maxima = []
        for begin, end in _adaptive_windows(size, count):
            bounds = [graph.constant([v]) for v in (begin, end, axis)]
            maxima.append(graph.reduce("ReduceMax", graph.add("Slice", x, *bounds), [axis]))
        x = graph.add("Concat", *maxima, axis=axis)
    return x


def _adaptive_windows(size: int, count: int) -> list[tuple[int, int]]:
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def _averages(size: int, count: int) -> NDArray[np.float32]:
    """(count, size): row i averages the cells of window i."""
    matrix = np.zeros((count, size), np.float32)
    for i, (begin, end) in enumerate(_adaptive_windows(size, count)):
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix
