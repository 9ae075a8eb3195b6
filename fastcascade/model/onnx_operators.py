"""ONNX operators in torch, for opsets 11 and later.

A value is a tensor, or a numpy array where the graph computes with shapes and other numbers that are known
without the image. Such an array holds Python numbers, because the size of the batch is symbolic while a stage
is exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastcascade.errors import LoweringError

__all__ = ["ARRAY_INPUTS", "KNOWN", "Node", "run_node"]

Array: TypeAlias = NDArray[Any]
Value: TypeAlias = Tensor | Array | None


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


Operator = Callable[..., Any]

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
    on_arrays = _ON_ARRAYS.get(node.kind)
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


def numbers(value: Any) -> list[Any]:
    """The numbers of an array, of an attribute, or of a single number."""
    return np.asarray(value, object).reshape(-1).tolist() if value is not None else []


def axes_of(node: Node, given: Any) -> list[int]:
    """Axes as an input, or as an attribute in older opsets."""
    return numbers(given if given is not None else node.get("axes"))


# ---- windows ----


def _sides(node: Node, sizes: Sequence[int], reach: Sequence[int], stride: Sequence[int]) -> list[list[int]]:
    """(before, after) padding per axis, for windows that span ``reach`` cells."""
    how = node.get("auto_pad", "NOTSET")
    if how == "VALID":
        return [[0, 0] for _ in sizes]
    if how in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((math.ceil(n / s) - 1) * s + r - n, 0) for n, r, s in zip(sizes, reach, stride, strict=True)
        ]
        small = [[t // 2, t - t // 2] for t in totals]
        return small if how == "SAME_UPPER" else [pair[::-1] for pair in small]
    pads = node.get("pads") or [0] * 2 * len(sizes)
    return [[pads[i], pads[i + len(sizes)]] for i in range(len(sizes))]


def _padded(x: Tensor, sides: Sequence[Sequence[int]], value: float = 0.0) -> Tensor:
    flat = [n for pair in reversed(sides) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


@operator("Conv")
def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution in one or two dimensions; uneven padding is a Pad before it."""
    rank = weight.ndim - 2
    if rank not in (1, 2):
        node.refuse(f"it has {rank} spatial axes; expected 1 or 2")
    stride, dilation = (node.get(name) or [1] * rank for name in ("strides", "dilations"))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    sides = _sides(node, x.shape[2:], reach, stride)
    even = all(before == after for before, after in sides)
    padding = [before for before, _ in sides] if even else [0] * rank
    function = F.conv2d if rank == 2 else F.conv1d
    data = x if even else _padded(x, sides)
    return function(data, weight, bias, stride, padding, dilation, node.get("group", 1))


class _Windows:
    """The windows of a pooling node: their sizes, the padding, and how far the last ones overhang."""

    def __init__(self, node: Node, x: Tensor) -> None:
        self.kernel = list(node.get("kernel_shape"))
        if len(self.kernel) != 2:
            node.refuse(f"it has {len(self.kernel)} spatial axes; expected 2")
        self.stride = node.get("strides") or [1, 1]
        self.dilation = node.get("dilations") or [1, 1]
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        self.sides = _sides(node, x.shape[2:], reach, self.stride)
        self.ceil = bool(node.get("ceil_mode", 0))
        overhangs = []
        for n, r, s, (before, after) in zip(x.shape[2:], reach, self.stride, self.sides, strict=True):
            room = n + before + after - r
            count = (math.ceil(room / s) if self.ceil else room // s) + 1
            count -= (count - 1) * s >= n + before  # a window must start inside the image
            overhangs.append([0, max((count - 1) * s + r - n - before - after, 0)])
        self.overhangs = overhangs
        even = all(before == after for before, after in self.sides)
        self.padding = [before for before, _ in self.sides]
        self.plain = even and all(2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True))


@operator("MaxPool")
def max_pool(node: Node, x: Tensor) -> Tensor:
    """Maximum over windows."""
    if len(node.outputs) > 1:
        node.refuse("its second output, the indices, is not supported")
    w = _Windows(node, x)
    if w.plain:
        return F.max_pool2d(x, w.kernel, w.stride, w.padding, w.dilation, w.ceil)
    sides = [[before, after + over] for (before, after), (_, over) in zip(w.sides, w.overhangs, strict=True)]
    return F.max_pool2d(_padded(x, sides, -math.inf), w.kernel, w.stride, 0, w.dilation)


@operator("AveragePool")
def average_pool(node: Node, x: Tensor) -> Tensor:
    """Average over windows."""
    w, counts_padding = _Windows(node, x), bool(node.get("count_include_pad", 0))
    if w.dilation != [1, 1]:
        node.refuse(f"dilations {w.dilation}")
    if w.plain:
        return F.avg_pool2d(x, w.kernel, w.stride, w.padding, w.ceil, counts_padding)
    cells = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    cells = _padded(_padded(cells, w.sides, float(counts_padding)), w.overhangs)
    sums, counts = (
        F.avg_pool2d(values, w.kernel, w.stride)
        for values in (_padded(_padded(x, w.sides), w.overhangs), cells)
    )
    return sums * counts.reciprocal()


@operator("GlobalAveragePool")
def global_average_pool(node: Node, x: Tensor) -> Tensor:
    """The mean of every channel."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(node: Node, x: Tensor) -> Tensor:
    """The maximum of every channel."""
    return x.amax(list(range(2, x.ndim)), keepdim=True)


# ---- products and norms ----


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


@operator("BatchNormalization")
def batch_normalization(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    """Batch norm with the stored statistics, in training mode as well."""
    if node.get("training_mode", 0):
        node.refuse("training_mode, which mixes images")
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, node.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalisation over the pixels of each channel."""
    return F.group_norm(x, x.shape[1], scale, bias, node.get("epsilon", 1e-5))


@operator("GroupNormalization")
def group_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalisation over the pixels and channels of each group."""
    return F.group_norm(x, node.get("num_groups"), scale, bias, node.get("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Normalisation over the last axes."""
    axis = node.get("axis", -1) % x.ndim
    return F.layer_norm(x, x.shape[axis:], scale, bias, node.get("epsilon", 1e-5))


# ---- elementwise ----

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


@operator("Cast")
def cast(node: Node, x: Tensor) -> Tensor:
    """A conversion between floating types, which all are float32 here."""
    if node.get("to") not in (1, 10, 11, 16):  # float, half, double, bfloat16
        node.refuse(f"a cast of data to ONNX type {node.get('to')}; only floating types are supported")
    return x


# ---- reductions ----


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


# ---- shapes ----


@operator("Shape")
def shape(node: Node, x: Tensor) -> Array:
    """The sizes of a tensor."""
    sizes = list(x.shape)[node.get("start", 0) : node.get("end")]
    return np.array([*sizes, None], object)[:-1]  # None keeps numpy from asking for the type of a symbol


@operator("Flatten")
def flatten(node: Node, x: Tensor) -> Tensor:
    """All axes but the batch as one."""
    axis = node.get("axis", 1) % (x.ndim + 1)
    if axis != 1:
        node.refuse(f"from axis {axis}; expected 1, after the batch")
    return x.flatten(1)


@operator("Reshape")
def reshape(node: Node, x: Tensor, target: Array) -> Tensor:
    """The same elements under another shape. The batch stays first, whatever size the model was made for."""
    sizes = numbers(target)
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(_with_batch(node, x, sizes))


def _with_batch(node: Node, x: Tensor, sizes: list[Any]) -> list[Any]:
    """``sizes`` with the first one equal to the batch's, if that is what the model means."""
    rest = sizes[1:]
    per_image = math.prod(x.shape[1:]) if all(isinstance(n, int) for n in x.shape[1:]) else None
    known = all(isinstance(n, int) and n > 0 for n in rest)
    keeps = (known and math.prod(rest) == per_image) or (
        isinstance(sizes[0], int) and sizes[0] == node.fixed_batch and rest.count(-1) == 1
    )
    return [x.shape[0], *rest] if keeps and len(sizes) > 1 else sizes


@operator("Expand")
def expand(node: Node, x: Tensor, target: Array) -> Tensor:
    """Axes of size 1 stretched."""
    sizes = numbers(target)
    missing = len(sizes) - x.ndim
    own = [1] * missing + list(x.shape)
    if missing < 0:
        sizes = [1] * -missing + sizes
    wanted = [n if isinstance(m, int) and m == 1 else m for m, n in zip(own, sizes, strict=True)]
    return x.expand(wanted)


@operator("Squeeze")
def squeeze(node: Node, x: Tensor, given: Any = None) -> Tensor:
    """Axes of size 1 removed."""
    axes = axes_of(node, given) or [i for i, n in enumerate(x.shape) if i > 0 and n == 1]
    dropped = {axis % x.ndim for axis in axes}
    if 0 in dropped:
        node.refuse("it removes the batch axis")
    return x.reshape([n for i, n in enumerate(x.shape) if i not in dropped])


@operator("Unsqueeze")
def unsqueeze(node: Node, x: Tensor, given: Any = None) -> Tensor:
    """New axes of size 1."""
    axes = axes_of(node, given)
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def transpose(node: Node, x: Tensor) -> Tensor:
    """Axes in another order."""
    return x.permute(node.get("perm") or list(range(x.ndim))[::-1])


@operator("Concat")
def concat(node: Node, *values: Tensor) -> Tensor:
    """Values one after the other along an axis."""
    return torch.cat(values, node.get("axis"))


@operator("Split")
def split(node: Node, x: Tensor, given: Any = None) -> list[Tensor]:
    """Consecutive parts along an axis."""
    axis, parts = node.get("axis", 0), len(node.outputs)
    sizes = numbers(given if given is not None else node.get("split"))
    if not sizes:
        each = -(-x.shape[axis] // parts)
        sizes = [each] * (parts - 1) + [x.shape[axis] - each * (parts - 1)]
    return list(torch.split(x, sizes, axis))


@operator("Slice")
def slice_(node: Node, x: Tensor, *given: Any) -> Tensor:
    """Ranges along some axes; a step of −1 is only supported over a whole axis."""
    inputs = [numbers(value) for value in (*given, None, None, None, None)[:4]]
    starts, ends = (inputs[i] or numbers(node.get(name)) for i, name in enumerate(("starts", "ends")))
    axes = inputs[2] or numbers(node.get("axes")) or list(range(len(starts)))
    steps = inputs[3] or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        if step < 0:
            if range(*slice(start, end, step).indices(size)) != range(size - 1, -1, -1):
                node.refuse(f"a step of {step} over a part of an axis")
            x = x.flip(axis)
        elif axis % x.ndim != 0 or (start, step) != (0, 1):
            if axis % x.ndim == 0:
                node.refuse("it selects images of the batch")
            first, last, _ = slice(start, end).indices(size)
            x = x[(slice(None),) * (axis % x.ndim) + (slice(first, last, step),)]
    return x


@operator("Gather")
def gather(node: Node, x: Tensor, indices: Any) -> Tensor:
    """Elements at constant positions along an axis."""
    if not isinstance(indices, np.ndarray):
        node.refuse("its indices depend on the image")
    axis = node.get("axis", 0) % x.ndim
    if axis == 0:
        node.refuse("it selects images of the batch")
    size = x.shape[axis]
    positions = [int(i) % size for i in numbers(indices)]
    if indices.ndim == 0:
        return x.select(axis, positions[0])
    if indices.ndim != 1:
        node.refuse(f"indices of {indices.ndim} axes; expected at most 1")
    if positions == list(range(size - 1, -1, -1)):
        return x.flip(axis)
    return torch.index_select(x, axis, torch.tensor(positions, device=x.device))


@operator("Pad")
def pad(node: Node, x: Tensor, given: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    """Padding by a constant, by mirrored or by repeated pixels; negative numbers crop."""
    pads = numbers(given if given is not None else node.get("pads"))
    named = [axis % x.ndim for axis in numbers(axes)] or list(range(x.ndim))
    half = len(pads) // 2
    sides = {axis: (pads[i], pads[i + half]) for i, axis in enumerate(named)}
    if any(sides.get(0, (0, 0))):
        node.refuse("it pads the batch")
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}
    mode = node.get("mode", "constant")
    if mode not in modes:
        node.refuse(f"mode {mode!r}; expected one of {sorted(modes)}")
    last = max((axis for axis, (before, after) in sides.items() if before or after), default=0)
    if last == 0:
        return x
    first = 1 if mode == "constant" else 2
    if any(any(sides.get(axis, (0, 0))) for axis in range(1, first)):
        node.refuse(f"{mode} padding of channels")
    flat = [n for axis in range(x.ndim - 1, first - 1, -1) for n in sides.get(axis, (0, 0))]
    constants = numbers(value) or numbers(node.get("value")) or [0.0]
    if mode == "constant":
        return F.pad(x, flat, value=float(constants[0]))
    return F.pad(x, flat, mode=modes[mode])


@operator("Resize", "Upsample")
def resize(node: Node, x: Tensor, *given: Any) -> Tensor:
    """Resampling as torch has it: nearest, or linear or cubic with half-pixel centres or aligned corners."""
    inputs = [numbers(value) for value in given]  # roi, scales, sizes; scales alone before opset 11
    scales = inputs[min(1, len(inputs) - 1)] if inputs else numbers(node.get("scales"))
    sizes = inputs[2] if len(inputs) > 2 else []
    axes = [axis % x.ndim for axis in numbers(node.get("axes"))] or list(range(x.ndim))
    target = list(x.shape)
    for i, axis in enumerate(axes):
        if sizes:
            target[axis] = sizes[i]
        elif scales[i] != 1:
            target[axis] = math.floor(x.shape[axis] * scales[i])
    if x.ndim != 4 or any(
        isinstance(t, int) and t != n for t, n in zip(target[1:2], x.shape[1:2], strict=True)
    ):
        node.refuse(
            f"it changes shape {tuple(x.shape)} to {tuple(target)}; expected maps, and their size only"
        )
    size, mode = [int(n) for n in target[2:]], node.get("mode", "nearest")
    centres = node.get(
        "coordinate_transformation_mode", "half_pixel" if node.kind == "Resize" else "asymmetric"
    )
    if mode == "nearest":
        rounding = node.get("nearest_mode", "round_prefer_floor" if node.kind == "Resize" else "floor")
        whole = all(m % n == 0 for m, n in zip(size, x.shape[2:], strict=True))
        if (centres, rounding) != ("asymmetric", "floor") and not (whole and _doubles(centres, rounding)):
            node.refuse(f"nearest with {centres!r} and {rounding!r}; expected 'asymmetric' and 'floor'")
        return F.interpolate(x, size, mode="nearest")
    antialias = bool(node.get("antialias", 0))
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    exact = mode == "bilinear" or (
        node.get("cubic_coeff_a", -0.75) == (-0.5 if antialias else -0.75)
        and bool(node.get("exclude_outside", 0)) == antialias
    )
    pixels = centres == "half_pixel" or (centres == "pytorch_half_pixel" and min(size) > 1)
    if mode not in ("bilinear", "bicubic") or not exact or not (pixels or centres == "align_corners"):
        node.refuse(f"mode {node.get('mode')!r} with {centres!r} centres, which torch does not have")
    return F.interpolate(x, size, mode=mode, align_corners=centres == "align_corners", antialias=antialias)


def _doubles(centres: str, rounding: str) -> bool:
    """Whether a whole multiple repeats every pixel equally often."""
    return centres in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round_prefer")


@operator("DepthToSpace")
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Channels as cells of pixels."""
    if node.get("mode", "DCR") != "CRD":
        node.refuse("mode 'DCR'; expected 'CRD', torch's pixel_shuffle")
    return F.pixel_shuffle(x, node.get("blocksize"))


@operator("SpaceToDepth")
def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Cells of pixels as channels, the place in a cell first."""
    n, c, h, w = x.shape
    b = node.get("blocksize")
    cells = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return cells.reshape(n, c * b * b, h // b, w // b)


# ---- the same operators on arrays of numbers ----


def _as_array(value: Any) -> Array:
    array = np.empty(np.shape(value), object)
    array[...] = value
    return array


def _quotient(a: Any, b: Any) -> Any:
    whole = all(not isinstance(v, float) for v in (*numbers(a), *numbers(b)))
    return a // b if whole else a / b


def _array_slice(node: Node, x: Array, *given: Any) -> Array:
    starts, ends, axes, steps = (numbers(value) for value in (*given, None, None, None, None)[:4])
    ranges = [slice(None)] * x.ndim
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        ranges[axes[i] if axes else i] = slice(start, end, steps[i] if steps else 1)
    return x[tuple(ranges)]


_ON_ARRAYS: dict[str, Callable[..., Array]] = {
    "Identity": lambda node, x: x,
    "Cast": lambda node, x: x,
    "Add": lambda node, a, b: _as_array(a + b),
    "Sub": lambda node, a, b: _as_array(a - b),
    "Mul": lambda node, a, b: _as_array(a * b),
    "Div": lambda node, a, b: _as_array(_quotient(a, b)),
    "Sqrt": lambda node, x: np.sqrt(x.astype(float)),
    "Floor": lambda node, x: _as_array(np.vectorize(math.floor, otypes=[object])(x)),
    "Equal": lambda node, a, b: np.equal(a, b).astype(object),
    "Where": lambda node, condition, a, b: _as_array(np.where(condition.astype(bool), a, b)),
    "Concat": lambda node, *values: np.concatenate([v.astype(object) for v in values], node.get("axis")),
    "Gather": lambda node, x, i: _as_array(np.take(x.astype(object), i.astype(int), node.get("axis", 0))),
    "Reshape": lambda node, x, target: x.reshape([int(n) for n in numbers(target)]),
    "Squeeze": lambda node, x, axes=None: np.squeeze(x, tuple(axes_of(node, axes)) or None),
    "Unsqueeze": lambda node, x, axes=None: np.expand_dims(x, tuple(axes_of(node, axes))),
    "Slice": _array_slice,
    "ConstantOfShape": lambda node, size: np.full([int(n) for n in size], node.get("value", 0.0), object),
    "ReduceProd": lambda node, x, axes=None: _as_array(math.prod(numbers(x))),
}
"""What models compute with shapes, on numbers that may be symbols."""

KNOWN = frozenset({*OPERATORS, *_ON_ARRAYS})
"""All operators that a model may have."""
