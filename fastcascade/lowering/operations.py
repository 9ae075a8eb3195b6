"""The operations of a plan, which read and write numbered values.

All shapes are per instance, without a batch axis: an image or feature map is (C, H, W), a vector (F,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastcascade.errors import InvalidArgument
from fastcascade.storage.codec import ADDED

__all__ = [
    "PARAMETRIC",
    "Activation",
    "ActivationKind",
    "AdaptivePool",
    "Add",
    "ChannelReduce",
    "Concat",
    "Conv2d",
    "Flatten",
    "Flip",
    "LayerNorm",
    "Linear",
    "Multiply",
    "Op",
    "Pad",
    "Pool",
    "Reorder",
    "Reshape",
    "Resize",
    "ScaleShift",
    "Shape",
    "Slice",
    "Softmax",
    "ValueType",
    "conv_shape",
    "require",
    "require_tensor",
]

ActivationKind = Literal[
    "none",
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "sigmoid",
    "hard_sigmoid",
    "silu",
    "hard_swish",
    "gelu",
    "gelu_tanh",
    "mish",
    "tanh",
    "exp",
    "sqrt",
    "reciprocal",
]
"""Elementwise functions, named as in torch. "gelu" is exact (erf), "gelu_tanh" its approximation."""

PARAMETRIC = ("leaky_relu", "elu")
"""Activations with a parameter: the negative slope, or alpha. They stay operations of their own."""


Shape = tuple[int, ...]

ValueType = Literal["f32", "u8"]
"""How a value is stored: float32, or the bytes of a quantised value (see ``quantized_operations``)."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidArgument(message)


def _require_map(shape: Shape, what: str) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise InvalidArgument(f"{what} reads a value of shape {shape}; expected (C, H, W)")
    return shape[0], shape[1], shape[2]


def require_tensor(tensor: Tensor, shape: Shape, what: str) -> None:
    require(
        tuple(tensor.shape) == shape and tensor.dtype == torch.float32 and tensor.is_contiguous(),
        f"{what} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected contiguous float32 {shape}",
    )


def _windows(size: int, kernel: int, stride: int, before: int, after: int, ceil: bool = False) -> int:
    """Number of windows along an axis; in ceil mode the last may overhang, but starts inside the image."""
    room = size + before + after - kernel
    require(room >= 0, f"a window of {kernel} is larger than the {size + before + after} cells along an axis")
    count = (-(-room // stride) if ceil else room // stride) + 1
    return count - 1 if ceil and (count - 1) * stride >= size + before else count


def _sizes(value: object) -> list[int]:
    """The integers in a field of an operation: a number, a tuple of numbers, or the sizes of a tensor."""
    numbers = value if isinstance(value, tuple) else getattr(value, "shape", (value,))
    return [n for n in numbers if isinstance(n, int)]


def _pair(numbers: tuple[int, int]) -> str:
    return str(numbers[0]) if numbers[0] == numbers[1] else f"{numbers[0]}×{numbers[1]}"


def _named(activation: ActivationKind) -> list[str]:
    return [] if activation == "none" else [activation]


@dataclass(frozen=True, eq=False, repr=False)
class Op(ABC):
    """One operation, which reads values and writes value ``output``. Value 0 is the input of the stage."""

    output: int

    operands: ClassVar[tuple[str, ...]] = ("input",)
    """The fields with the numbers of the values to read, in order; each is a number, a tuple or None."""

    @property
    def reads(self) -> tuple[int, ...]:
        """Numbers of the values that the operation reads."""
        values: list[int] = []
        for name in self.operands:
            value = getattr(self, name)
            values += value if isinstance(value, tuple) else [] if value is None else [value]
        return tuple(values)

    def renumbered(self, number: Mapping[int, int]) -> Op:
        """A copy with its values renumbered."""
        changes: dict[str, Any] = {"output": number[self.output]}
        for name in self.operands:
            value = getattr(self, name)
            if isinstance(value, tuple):
                changes[name] = tuple(number[v] for v in value)
            elif value is not None:
                changes[name] = number[value]
        return replace(self, **changes)

    @property
    def sizes(self) -> list[int]:
        """All integers in the fields: value numbers, kernels, strides, the sizes of weights."""
        return [n for f in fields(self) for n in _sizes(getattr(self, f.name))]

    @abstractmethod
    def output_shape(self, *inputs: Shape) -> Shape:
        """Shape of the output for inputs of these shapes, in the order of ``reads``.

        Raises:
            InvalidArgument: the operation cannot read such values, or its fields contradict each other.
        """

    def output_type(self, *inputs: ValueType) -> ValueType:
        """Type of the output for inputs of these types, in the order of ``reads``.

        Raises:
            InvalidArgument: the operation cannot read such values.
        """
        require("u8" not in inputs, f"{type(self).__name__} reads bytes; expected float32")
        return "f32"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights, by field name."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in pairs if isinstance(value, Tensor)}

    @abstractmethod
    def __str__(self) -> str:
        """The operation in words, for reports: "conv 3×3 16→32, stride 2, +residual, relu"."""

    def __repr__(self) -> str:
        return f"v{self.output} = {self}({', '.join(f'v{value}' for value in self.reads)})"


def conv_shape(
    image: Shape,
    weight: Shape,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Shape:
    """Shape of a convolution's output; ``weight`` is (out, in/groups, kh, kw).

    Raises:
        InvalidArgument: the shapes do not fit each other.
    """
    channels, height, width = _require_map(image, "conv2d")
    out, per_group, kernel_h, kernel_w = weight
    require(
        groups >= 1 and out % groups == 0 and channels == per_group * groups,
        f"conv2d of {per_group} channels in each of {groups} groups, {out} out, reads {channels}",
    )
    sizes = (*stride, *dilation, kernel_h, kernel_w, out)
    require(min(sizes) >= 1 and min(padding) >= 0, "conv2d with a size below 1 or negative padding")
    top, bottom, left, right = padding
    reach_h, reach_w = (dilation[0] * (kernel_h - 1) + 1, dilation[1] * (kernel_w - 1) + 1)
    return (
        out,
        _windows(height, reach_h, stride[0], top, bottom),
        _windows(width, reach_w, stride[1], left, right),
    )


@dataclass(frozen=True, eq=False, repr=False)
class Conv2d(Op):
    """activation(conv(input) + bias + residual); batch norm is folded into weight and bias.

    ``weight`` (out, in/groups, kh, kw) f32; ``bias`` (out,) f32; ``padding`` (top, bottom, left, right) of
    zeros; ``residual`` a value of the output's shape, or None.
    """

    input: int
    weight: Tensor
    bias: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: int | None = None
    activation: ActivationKind = "none"

    operands = ("input", "residual")

    def output_shape(self, *inputs: Shape) -> Shape:
        require(self.weight.ndim == 4, f"conv2d weight has shape {tuple(self.weight.shape)}; expected 4 axes")
        weight = tuple(self.weight.shape)
        require_tensor(self.weight, weight, "conv2d weight")
        require_tensor(self.bias, weight[:1], "conv2d bias")
        shape = conv_shape(inputs[0], weight, self.stride, self.padding, self.dilation, self.groups)
        require(
            self.residual is None or inputs[1] == shape,
            f"conv2d returns shape {shape}, but its residual has shape {inputs[-1]}",
        )
        return shape

    def __str__(self) -> str:
        out, per_group, kernel_h, kernel_w = self.weight.shape
        words = [f"conv {kernel_h}×{kernel_w} {per_group * self.groups}→{out}"]
        words += [f"stride {_pair(self.stride)}"] * (self.stride != (1, 1))
        words += [f"dilation {_pair(self.dilation)}"] * (self.dilation != (1, 1))
        words += [f"groups {self.groups}"] * (self.groups != 1)
        words += ["+residual"] * (self.residual is not None)
        return ", ".join([*words, *_named(self.activation)])


@dataclass(frozen=True, eq=False, repr=False)
class Pool(Op):
    """Maximum or average over windows. The maximum ignores padding and propagates NaN.

    ``padding`` is (top, bottom, left, right). ``include_padding``: the divisor of an average counts the
    padding. Cells beyond the padding, which ``ceil_mode`` windows reach, never count.
    """

    input: int
    kind: Literal["max", "average"]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    ceil_mode: bool = False
    include_padding: bool = True

    def output_shape(self, *inputs: Shape) -> Shape:
        channels, height, width = _require_map(inputs[0], "pool")
        top, bottom, left, right = self.padding
        require(min(*self.kernel, *self.stride) >= 1, "pool with a kernel or stride below 1")
        require(
            min(self.padding) >= 0
            and max(top, bottom) <= self.kernel[0] // 2
            and max(left, right) <= self.kernel[1] // 2,
            f"pool with padding {self.padding} of kernel {self.kernel}; expected at most half the kernel",
        )
        return (
            channels,
            _windows(height, self.kernel[0], self.stride[0], top, bottom, self.ceil_mode),
            _windows(width, self.kernel[1], self.stride[1], left, right, self.ceil_mode),
        )

    def output_type(self, *inputs: ValueType) -> ValueType:
        # The largest byte is that of the largest value.
        require(self.kind == "max" or inputs == ("f32",), "an average pool reads bytes; expected float32")
        return inputs[0]

    def __str__(self) -> str:
        return f"{self.kind} pool {self.kernel[0]}×{self.kernel[1]}, stride {_pair(self.stride)}"


@dataclass(frozen=True, eq=False, repr=False)
class Linear(Op):
    """activation(weight · input + bias); ``weight`` (out, in) f32, ``bias`` (out,) f32; input (in,)."""

    input: int
    weight: Tensor
    bias: Tensor
    activation: ActivationKind = "none"

    def output_shape(self, *inputs: Shape) -> Shape:
        require(self.weight.ndim == 2, f"linear weight has shape {tuple(self.weight.shape)}; expected 2 axes")
        out, width = self.weight.shape
        require_tensor(self.weight, (out, width), "linear weight")
        require_tensor(self.bias, (out,), "linear bias")
        require(inputs[0] == (width,), f"linear reads {inputs[0]}; expected ({width},)")
        return (out,)

    def __str__(self) -> str:
        out, width = self.weight.shape
        return ", ".join([f"linear {width}→{out}", *_named(self.activation)])


def _broadcast(a: Shape, b: Shape, what: str) -> Shape:
    """The common shape of two operands; an axis of size 1 stretches, the number of axes must agree."""
    pairs = list(zip(a, b, strict=False))
    require(
        len(a) == len(b) and all(m == n or 1 in (m, n) for m, n in pairs),
        f"{what} reads shapes {a} and {b}; expected equal sizes, or 1, along each axis",
    )
    return tuple(max(m, n) for m, n in pairs)


@dataclass(frozen=True, eq=False, repr=False)
class Add(Op):
    """activation(input + other). Axes of size 1 broadcast."""

    input: int
    other: int
    activation: ActivationKind = "none"

    operands = ("input", "other")

    def output_shape(self, *inputs: Shape) -> Shape:
        return _broadcast(inputs[0], inputs[1], "add")

    def __str__(self) -> str:
        return ", ".join(["add", *_named(self.activation)])


@dataclass(frozen=True, eq=False, repr=False)
class Multiply(Op):
    """input · other: a squeeze-and-excitation gate, an attention map, a square. Axes of size 1 broadcast."""

    input: int
    other: int

    operands = ("input", "other")

    def output_shape(self, *inputs: Shape) -> Shape:
        return _broadcast(inputs[0], inputs[1], "multiply")

    def __str__(self) -> str:
        return "multiply"


@dataclass(frozen=True, eq=False, repr=False)
class Activation(Op):
    """An elementwise function that does not join the operation before it.

    ``parameter`` is the negative slope of "leaky_relu" and the alpha of "elu"; 0 for all others.
    """

    input: int
    kind: ActivationKind
    parameter: float = 0.0

    def output_shape(self, *inputs: Shape) -> Shape:
        require(
            math.isfinite(self.parameter) and (self.parameter == 0 or self.kind in PARAMETRIC),
            f"{self.kind} with parameter {self.parameter}",
        )
        return inputs[0]

    def __str__(self) -> str:
        return f"{self.kind} {self.parameter:g}" if self.kind in PARAMETRIC else self.kind


@dataclass(frozen=True, eq=False, repr=False)
class ScaleShift(Op):
    """scale·input + shift; both f32, (C,) or, where constants vary within a channel, of the input's shape."""

    input: int
    scale: Tensor
    shift: Tensor

    def output_shape(self, *inputs: Shape) -> Shape:
        shape = inputs[0][:1] if self.scale.ndim == 1 else inputs[0]
        require_tensor(self.scale, shape, "scale")
        require_tensor(self.shift, shape, "shift")
        return inputs[0]

    def __str__(self) -> str:
        return "scale and shift"


@dataclass(frozen=True, eq=False, repr=False)
class LayerNorm(Op):
    """Normalisation over the channels of each pixel, then scale and shift, both (C,) f32."""

    input: int
    scale: Tensor
    shift: Tensor
    eps: float

    def output_shape(self, *inputs: Shape) -> Shape:
        require_tensor(self.scale, inputs[0][:1], "layer norm scale")
        require_tensor(self.shift, inputs[0][:1], "layer norm shift")
        require(self.eps >= 0, f"layer norm with eps {self.eps}; expected at least 0")
        return inputs[0]

    def __str__(self) -> str:
        return "layer norm over channels"


@dataclass(frozen=True, eq=False, repr=False)
class Softmax(Op):
    """Softmax over ``parts`` equal runs of channels: output c competes with channels c ± i·C/parts.

    With ``parts`` = C it is the softmax over all channels; split attention uses fewer.
    """

    input: int
    parts: int

    def output_shape(self, *inputs: Shape) -> Shape:
        require(
            1 <= self.parts <= inputs[0][0] and inputs[0][0] % self.parts == 0,
            f"softmax over {self.parts} parts of {inputs[0][0]} channels",
        )
        return inputs[0]

    def __str__(self) -> str:
        return f"softmax over {self.parts} parts"


@dataclass(frozen=True, eq=False, repr=False)
class ChannelReduce(Op):
    """Mean or maximum over channels, (C, H, W) → (1, H, W); a vector (F,) → (1,)."""

    input: int
    kind: Literal["mean", "max"]

    def output_shape(self, *inputs: Shape) -> Shape:
        return (1, *inputs[0][1:])

    def __str__(self) -> str:
        return f"{self.kind} over channels"


@dataclass(frozen=True, eq=False, repr=False)
class Reorder(Op):
    """Output channel i is input channel ``channels[i]``: shuffles and selections of channels."""

    input: int
    channels: tuple[int, ...]

    def output_shape(self, *inputs: Shape) -> Shape:
        require(
            len(self.channels) > 0 and min(self.channels) >= 0 and max(self.channels) < inputs[0][0],
            f"reorder names channels outside 0 … {inputs[0][0] - 1}",
        )
        return (len(self.channels), *inputs[0][1:])

    def __str__(self) -> str:
        return f"reorder {len(self.channels)} channels"


@dataclass(frozen=True, eq=False, repr=False)
class Flip(Op):
    """The mirror image: columns from right to left."""

    input: int

    def output_shape(self, *inputs: Shape) -> Shape:
        return _require_map(inputs[0], "flip")

    def __str__(self) -> str:
        return "flip"


@dataclass(frozen=True, eq=False, repr=False)
class Resize(Op):
    """Resampling to ``size`` (height, width), with half-pixel centres or aligned corners.

    ``antialias`` widens the filter where the map shrinks, as Pillow does; "bicubic" is always antialiased.
    """

    input: int
    kind: Literal["nearest", "bilinear", "bicubic"]
    size: tuple[int, int]
    align_corners: bool = False
    antialias: bool = field(default=False, metadata=ADDED)

    def output_shape(self, *inputs: Shape) -> Shape:
        channels, _, _ = _require_map(inputs[0], "resize")
        require(not (self.align_corners and self.kind == "nearest"), "nearest resize with aligned corners")
        require(
            self.antialias if self.kind == "bicubic" else not self.antialias or self.kind == "bilinear",
            f"{self.kind} resize {'with' if self.antialias else 'without'} antialiasing",
        )
        require(not (self.align_corners and self.antialias), "antialiased resize with aligned corners")
        return (channels, *self.size)

    def __str__(self) -> str:
        return f"{self.kind} resize to {self.size[0]}×{self.size[1]}"


@dataclass(frozen=True, eq=False, repr=False)
class AdaptivePool(Op):
    """Pooling to ``size`` with windows of unequal extent: window i spans ⌊i·n/m⌋ … ⌈(i+1)·n/m⌉."""

    input: int
    kind: Literal["max", "average"]
    size: tuple[int, int]

    def output_shape(self, *inputs: Shape) -> Shape:
        channels, _, _ = _require_map(inputs[0], "adaptive pool")
        return (channels, *self.size)

    def __str__(self) -> str:
        return f"adaptive {self.kind} pool to {self.size[0]}×{self.size[1]}"


@dataclass(frozen=True, eq=False, repr=False)
class Reshape(Op):
    """The same elements in row-major order under another shape."""

    input: int
    shape: tuple[int, ...]

    def output_shape(self, *inputs: Shape) -> Shape:
        require(
            len(self.shape) in (1, 3) and math.prod(self.shape) == math.prod(inputs[0]),
            f"reshape of {inputs[0]} to {self.shape}",
        )
        return self.shape

    def __str__(self) -> str:
        return f"reshape to {'×'.join(map(str, self.shape))}"


@dataclass(frozen=True, eq=False, repr=False)
class Slice(Op):
    """input[start:stop:step] along each of (C, H, W)."""

    input: int
    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    step: tuple[int, int, int]

    def output_shape(self, *inputs: Shape) -> Shape:
        shape = _require_map(inputs[0], "slice")
        ranges = list(zip(shape, self.start, self.stop, self.step, strict=True))
        require(
            all(0 <= start < stop <= size and step >= 1 for size, start, stop, step in ranges),
            f"slice {self.start}:{self.stop}:{self.step} is out of range for a value of shape {shape}",
        )
        return tuple(len(range(start, stop, step)) for _, start, stop, step in ranges)

    def __str__(self) -> str:
        ranges = zip(self.start, self.stop, self.step, strict=True)
        return "slice " + " ".join(f"{start}:{stop}:{step}" for start, stop, step in ranges)


@dataclass(frozen=True, eq=False, repr=False)
class Pad(Op):
    """Padding; ``before`` and ``after`` along (C, H, W), never negative. "reflect" leaves channels alone."""

    input: int
    before: tuple[int, int, int]
    after: tuple[int, int, int]
    value: float = 0.0
    mode: Literal["constant", "reflect", "replicate"] = "constant"

    def output_shape(self, *inputs: Shape) -> Shape:
        shape = _require_map(inputs[0], "pad")
        require(min(*self.before, *self.after) >= 0, f"negative padding {self.before}, {self.after}")
        require(
            self.mode == "constant" or self.before[0] == self.after[0] == 0,
            f"{self.mode} padding of channels",
        )
        require(
            self.mode != "reflect"
            or all(max(b, a) < n for b, a, n in zip(self.before, self.after, shape, strict=True)),
            f"reflect padding {self.before}, {self.after} of shape {shape}; expected less than the size",
        )
        return tuple(b + n + a for b, n, a in zip(self.before, shape, self.after, strict=True))

    def __str__(self) -> str:
        sides = zip(self.before, self.after, strict=True)
        fill = f"{self.value:g}" if self.mode == "constant" else self.mode
        return f"pad with {fill} " + " ".join(f"{before}+{after}" for before, after in sides)


@dataclass(frozen=True, eq=False, repr=False)
class Concat(Op):
    """Concatenation along channels."""

    inputs: tuple[int, ...]

    operands = ("inputs",)

    def output_shape(self, *inputs: Shape) -> Shape:
        require(len(inputs) >= 1, "concat without inputs")
        rest = {shape[1:] for shape in inputs}
        require(len(rest) == 1, f"concat reads shapes {inputs}; expected shapes that differ only in channels")
        return (sum(shape[0] for shape in inputs), *inputs[0][1:])

    def __str__(self) -> str:
        return f"concat of {len(self.inputs)}"


@dataclass(frozen=True, eq=False, repr=False)
class Flatten(Op):
    """(C, H, W) → (C·H·W,), in NCHW order."""

    input: int

    def output_shape(self, *inputs: Shape) -> Shape:
        return (math.prod(inputs[0]),)

    def __str__(self) -> str:
        return "flatten"
