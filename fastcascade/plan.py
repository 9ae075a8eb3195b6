"""The plan: a cascade as plain data, which every backend lowers to a program of its own.

A plan holds, per stage, a list of operations on numbered values, folded weights, the exit head, the
selector's weights and the cost. It refers to no Python code of the model, so it can be printed, saved and
run elsewhere. A stage that cannot be expressed as operations is *opaque*: it carries the torch module and
the reason, runs through torch, and cannot be saved.

All shapes are per instance (no batch axis): an image or feature map is (C, H, W), a vector (F,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fastcascade.codec import NOT_SAVED
from fastcascade.errors import InvalidArgument
from fastcascade.kernels.reference import MLPWeights
from fastcascade.types import (
    Combine,
    InputSpec,
    OperatingPoint,
    OperatingPointLike,
    checked_combine,
    resolve_thresholds,
    stage_weights,
)

__all__ = [
    "Activation",
    "Add",
    "Concat",
    "Conv2d",
    "Flatten",
    "Linear",
    "Op",
    "Pad",
    "Plan",
    "Pool",
    "ScaleShift",
    "SelectorPlan",
    "Slice",
    "StagePlan",
]

ActivationKind = Literal["none", "relu", "relu6"]
Shape = tuple[int, ...]

SIZE_LIMIT = 2**20
"""Largest kernel, stride, padding or axis of a plan, so that backends may compute offsets in 64 bits."""

ELEMENT_LIMIT = 2**31 - 1
"""Most elements of one value per instance, or of one weight."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidArgument(message)


def _require_map(shape: Shape, what: str) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise InvalidArgument(f"{what} reads a value of shape {shape}; expected (C, H, W)")
    return shape[0], shape[1], shape[2]


def _require_tensor(tensor: Tensor, shape: Shape, what: str) -> None:
    _require(
        tuple(tensor.shape) == shape and tensor.dtype == torch.float32 and tensor.is_contiguous(),
        f"{what} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected contiguous float32 {shape}",
    )


def _windows(size: int, kernel: int, stride: int, before: int, after: int, ceil: bool = False) -> int:
    """How many windows fit along an axis; in ceil mode the last may overhang but must start on the image."""
    room = size + before + after - kernel
    count = (-(-room // stride) if ceil else room // stride) + 1
    return count - 1 if ceil and (count - 1) * stride >= size + before else count


def _integers(value: object) -> list[int]:
    """The sizes in a field of an operation: an integer, a tuple of them, or a tensor's axes."""
    numbers = value if isinstance(value, tuple) else getattr(value, "shape", (value,))
    return [n for n in numbers if isinstance(n, int)]


def _pair(numbers: tuple[int, int]) -> str:
    return str(numbers[0]) if numbers[0] == numbers[1] else f"{numbers[0]}×{numbers[1]}"


def _named(activation: ActivationKind) -> list[str]:
    return [] if activation == "none" else [activation]


@dataclass(frozen=True, eq=False, repr=False)
class Op(ABC):
    """One operation: reads values by number, writes value ``output``. Value 0 is the stage's input."""

    output: int

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that this operation reads."""
        names = ("input", "other", "residual")
        found = (getattr(self, name, None) for name in names)
        return tuple(value for value in found if value is not None)

    @abstractmethod
    def output_shape(self, *inputs: Shape) -> Shape:
        """Shape of the output for inputs of these shapes, in the order of ``reads``.

        Raises:
            InvalidArgument: the operation cannot read such values, or its own fields contradict each other.
        """

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The operation's weights by field name."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in pairs if isinstance(value, Tensor)}

    @abstractmethod
    def __str__(self) -> str:
        """In words, for reports: "conv 3×3 16→32, stride 2, +residual, relu"."""

    def __repr__(self) -> str:
        return f"v{self.output} = {self}({', '.join(f'v{value}' for value in self.reads)})"


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

    def output_shape(self, *inputs: Shape) -> Shape:
        channels, height, width = _require_map(inputs[0], "conv2d")
        _require(
            self.weight.ndim == 4, f"conv2d weight has shape {tuple(self.weight.shape)}; expected 4 axes"
        )
        out, per_group, kernel_h, kernel_w = self.weight.shape
        _require_tensor(self.weight, (out, per_group, kernel_h, kernel_w), "conv2d weight")
        _require_tensor(self.bias, (out,), "conv2d bias")
        _require(
            self.groups >= 1 and out % self.groups == 0 and channels == per_group * self.groups,
            f"conv2d of {per_group} channels in each of {self.groups} groups, {out} out, reads {channels}",
        )
        sizes = (*self.stride, *self.dilation, kernel_h, kernel_w, out)
        _require(min(sizes) >= 1 and min(self.padding) >= 0, "conv2d with a size below 1 or negative padding")
        top, bottom, left, right = self.padding
        reach_h, reach_w = (self.dilation[0] * (kernel_h - 1) + 1, self.dilation[1] * (kernel_w - 1) + 1)
        shape = (
            out,
            _windows(height, reach_h, self.stride[0], top, bottom),
            _windows(width, reach_w, self.stride[1], left, right),
        )
        _require(
            self.residual is None or inputs[1] == shape,
            f"conv2d answers {shape} but its residual has shape {inputs[-1]}",
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
    """Max or average over windows. Max ignores padding and propagates NaN.

    ``padding`` (top, bottom, left, right). ``include_padding``: padded zeros count in an average's divisor;
    cells past the declared padding (``ceil_mode`` windows) never count.
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
        _require(min(*self.kernel, *self.stride) >= 1, "pool with a kernel or stride below 1")
        _require(
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
        _require(
            self.weight.ndim == 2, f"linear weight has shape {tuple(self.weight.shape)}; expected 2 axes"
        )
        out, width = self.weight.shape
        _require_tensor(self.weight, (out, width), "linear weight")
        _require_tensor(self.bias, (out,), "linear bias")
        _require(inputs[0] == (width,), f"linear reads {inputs[0]}; expected ({width},)")
        return (out,)

    def __str__(self) -> str:
        out, width = self.weight.shape
        return ", ".join([f"linear {width}→{out}", *_named(self.activation)])


@dataclass(frozen=True, eq=False, repr=False)
class Add(Op):
    """activation(input + other), same shapes."""

    input: int
    other: int
    activation: ActivationKind = "none"

    def output_shape(self, *inputs: Shape) -> Shape:
        _require(inputs[0] == inputs[1], f"add reads shapes {inputs[0]} and {inputs[1]}; expected equal ones")
        return inputs[0]

    def __str__(self) -> str:
        return ", ".join(["add", *_named(self.activation)])


@dataclass(frozen=True, eq=False, repr=False)
class Activation(Op):
    """An activation that could not be fused into the operation before it."""

    input: int
    kind: ActivationKind

    def output_shape(self, *inputs: Shape) -> Shape:
        return inputs[0]

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True, eq=False, repr=False)
class ScaleShift(Op):
    """scale[c]·input + shift[c]: a batch norm with no convolution before it; both (C,) f32."""

    input: int
    scale: Tensor
    shift: Tensor

    def output_shape(self, *inputs: Shape) -> Shape:
        _require_tensor(self.scale, inputs[0][:1], "scale")
        _require_tensor(self.shift, inputs[0][:1], "shift")
        return inputs[0]

    def __str__(self) -> str:
        return "scale and shift"


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
        _require(
            all(0 <= start < stop <= size and step >= 1 for size, start, stop, step in ranges),
            f"slice {self.start}:{self.stop}:{self.step} does not lie in a value of shape {shape}",
        )
        return tuple(len(range(start, stop, step)) for _, start, stop, step in ranges)

    def __str__(self) -> str:
        ranges = zip(self.start, self.stop, self.step, strict=True)
        return "slice " + " ".join(f"{start}:{stop}:{step}" for start, stop, step in ranges)


@dataclass(frozen=True, eq=False, repr=False)
class Pad(Op):
    """Constant padding; ``before`` and ``after`` along (C, H, W), never negative."""

    input: int
    before: tuple[int, int, int]
    after: tuple[int, int, int]
    value: float = 0.0

    def output_shape(self, *inputs: Shape) -> Shape:
        shape = _require_map(inputs[0], "pad")
        _require(min(*self.before, *self.after) >= 0, f"negative padding {self.before}, {self.after}")
        return tuple(b + n + a for b, n, a in zip(self.before, shape, self.after, strict=True))

    def __str__(self) -> str:
        sides = zip(self.before, self.after, strict=True)
        return f"pad with {self.value:g} " + " ".join(f"{before}+{after}" for before, after in sides)


@dataclass(frozen=True, eq=False, repr=False)
class Concat(Op):
    """Concatenation along channels."""

    inputs: tuple[int, ...]

    @property
    def reads(self) -> tuple[int, ...]:
        return self.inputs

    def output_shape(self, *inputs: Shape) -> Shape:
        _require(len(inputs) >= 1, "concat of nothing")
        rest = {shape[1:] for shape in inputs}
        _require(len(rest) == 1, f"concat reads shapes {inputs}; expected equal ones but for channels")
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


@dataclass(frozen=True, eq=False, repr=False)
class SelectorPlan:
    """How one exit scores stopping.

    ``kind`` "mlp": u = w2·relu(w1·((features − mean)/std) + b1) + b2, with ``features`` one of DESIGN's three
    sets; "max_prob" | "margin" | "entropy": that score, no weights; "opaque": ``module`` is called as
    ``module(k, log_probs, previous_label)``.
    """

    kind: Literal["mlp", "max_prob", "margin", "entropy", "opaque"]
    features: Literal["stats", "topk", "probs"] | None = None
    mean: Tensor | None = None  # (F,) f32
    std: Tensor | None = None  # (F,) f32
    w1: Tensor | None = None  # (hidden, F) f32
    b1: Tensor | None = None  # (hidden,) f32
    w2: Tensor | None = None  # (hidden,) f32
    b2: Tensor | None = None  # () f32
    module: nn.Module | None = field(default=None, metadata=NOT_SAVED)

    @property
    def weights(self) -> MLPWeights | None:
        """The weights as the kernels take them; None unless ``kind`` is "mlp"."""
        if self.kind != "mlp":
            return None
        return MLPWeights(*(cast(Tensor, getattr(self, name)) for name in MLPWeights._fields))

    def check(self, num_classes: int) -> None:
        """Raise InvalidArgument unless kind, features and weights fit together."""
        _require(
            (self.module is not None) == (self.kind == "opaque"),
            f"selector of kind {self.kind} {'has a' if self.module else 'lacks its'} module",
        )
        if self.kind != "mlp":
            return
        width = num_classes if self.features == "probs" else 4
        _require(self.features is not None, "an mlp selector names no features")
        _require(self.features != "topk" or num_classes >= 3, "features 'topk' need at least 3 classes")
        _require(self.w1 is not None and self.w1.ndim == 2, "an mlp selector needs w1 of 2 axes")
        hidden = cast(Tensor, self.w1).shape[0]
        shapes: list[Shape] = [(width,), (width,), (hidden, width), (hidden,), (hidden,), ()]
        for name, shape in zip(MLPWeights._fields, shapes, strict=True):
            value = getattr(self, name)
            _require(value is not None, f"an mlp selector lacks {name}")
            _require_tensor(value, shape, f"selector {name}")

    def __str__(self) -> str:
        return f"mlp on {self.features}" if self.kind == "mlp" else self.kind


@dataclass(frozen=True, eq=False, repr=False)
class StagePlan:
    """One stage: operations from its input to its features and logits, or an opaque module.

    ``shapes[v]`` is value v's shape. ``features`` is the value that the next stage reads if its ``input`` is
    "previous", ``logits`` the value (num_classes,) that the exit head reads. ``macs`` is the cost of this
    stage alone, its exit included, its selector not. ``module``, for an opaque stage only, maps a batch to
    (features, logits).
    """

    name: str
    input: Literal["image", "previous"]
    macs: int
    selector_macs: int
    selector: SelectorPlan | None
    shapes: tuple[Shape, ...] = ()
    ops: tuple[Op, ...] = ()
    features: int = 0
    logits: int = 0
    opaque_reason: str | None = field(default=None, metadata=NOT_SAVED)
    module: nn.Module | None = field(default=None, metadata=NOT_SAVED)

    def last_reads(self) -> list[tuple[int, ...]]:
        """Per operation, the values that nothing reads after it: their memory is free from there on.

        Features and logits are never among them.
        """
        last = {value: position for position, op in enumerate(self.ops) for value in (*op.reads, op.output)}
        kept = {self.features, self.logits}
        return [
            tuple(v for v in dict.fromkeys((*op.reads, op.output)) if last[v] == position and v not in kept)
            for position, op in enumerate(self.ops)
        ]

    def check(self, num_classes: int) -> None:
        """Raise InvalidArgument unless every value is defined before use and has the shape it must have."""
        _require(self.macs >= 0 and self.selector_macs >= 0, f"stage {self.name!r} has a negative cost")
        has_module = self.module is not None
        _require(
            has_module >= bool(self.opaque_reason) and not (has_module and self.ops),
            f"stage {self.name!r} must have either operations or a module; a reason needs a module",
        )
        _require(all(len(shape) in (1, 3) for shape in self.shapes), f"stage {self.name!r}: bad value shape")
        if self.module is None:
            self._check_ops(num_classes)

    def _check_ops(self, num_classes: int) -> None:
        _require(len(self.shapes) == len(self.ops) + 1, f"stage {self.name!r} needs one shape per value")
        defined = {0}
        for op in self.ops:
            what = f"stage {self.name!r}, {type(op).__name__} v{op.output}"  # its repr needs valid fields
            _require(set(op.reads) <= defined, f"{what}: reads a value that is not defined before it")
            _require(op.output not in defined and 0 < op.output < len(self.shapes), f"{what}: bad output")
            try:
                shape = op.output_shape(*(self.shapes[value] for value in op.reads))
            except InvalidArgument as error:
                raise InvalidArgument(f"{what}: {error}") from error
            _require(shape == self.shapes[op.output], f"{what}: shape {self.shapes[op.output]}, not {shape}")
            defined.add(op.output)
            numbers = [n for f in fields(op) for n in _integers(getattr(op, f.name))]
            _require(max(numbers) <= SIZE_LIMIT, f"{what}: a number above {SIZE_LIMIT}")
        for shape in self.shapes:
            _require(
                all(1 <= size <= SIZE_LIMIT for size in shape) and math.prod(shape) <= ELEMENT_LIMIT,
                f"stage {self.name!r} has a value of shape {shape}; expected sizes of 1 … {SIZE_LIMIT}",
            )
        _require(
            {self.features, self.logits} <= defined, f"stage {self.name!r}: features or logits undefined"
        )
        _require(
            self.shapes[self.logits] == (num_classes,),
            f"stage {self.name!r} answers {self.shapes[self.logits]}; expected ({num_classes},) logits",
        )

    def __str__(self) -> str:
        head = f"stage {self.name!r} reads {self.input}, {self.macs:,} MACs"
        tail = [] if self.selector is None else [f"  selector {self.selector}, {self.selector_macs:,} MACs"]
        if self.opaque_reason is not None:
            return "\n".join([f"{head}, opaque: {self.opaque_reason}", *tail])
        lines = [f"  {op!r} → {'×'.join(map(str, self.shapes[op.output]))}" for op in self.ops]
        return "\n".join([head, *lines, f"  features v{self.features}, logits v{self.logits}", *tail])

    __repr__ = __str__


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """A whole cascade as data; ``stages[-1].selector`` is None.

    ``default_thresholds`` (K−1,) is None where the selector has none (confidence thresholds).
    """

    stages: tuple[StagePlan, ...]
    input: InputSpec
    num_classes: int
    combine: Combine
    dense_macs: int
    default_thresholds: Tensor | None
    classes: tuple[str, ...] | None = None
    operating_points: dict[str, OperatingPoint] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(bool(self.stages), "a plan needs at least one stage")
        _require(
            2 <= self.num_classes <= SIZE_LIMIT, f"num_classes is {self.num_classes}; expected at least 2"
        )
        _require(self.dense_macs >= 0, f"dense_macs is {self.dense_macs}; expected at least 0")
        _require(
            self.classes is None or len(self.classes) == self.num_classes,
            f"{len(self.classes or ())} class names for {self.num_classes} classes",
        )
        exits = len(self.stages) - 1
        if self.default_thresholds is not None:
            _require_tensor(self.default_thresholds, (exits,), "default_thresholds")
        for name, point in self.operating_points.items():
            _require(
                len(point.thresholds) == exits and len(point.exit_shares) == exits + 1,
                f"operating point {name!r} does not have {exits} thresholds and {exits + 1} exit shares",
            )
        checked_combine(self.combine, len(self.stages))
        self._check_stages()

    def _check_stages(self) -> None:
        features: Shape = ()
        for k, stage in enumerate(self.stages):
            _require(k > 0 or stage.input == "image", "the first stage has nothing before it to read")
            _require(
                (stage.selector is None) == (k == len(self.stages) - 1),
                f"stage {k} of {len(self.stages)} {'has a' if stage.selector else 'lacks its'} selector; "
                "all stages have one but the last",
            )
            source = self.input.shape if stage.input == "image" else features
            _require(
                stage.module is not None or stage.shapes[:1] == (source,),
                f"stage {stage.name!r} reads {stage.shapes[:1]}; the value it is given has shape {source}",
            )
            stage.check(self.num_classes)
            if stage.selector is not None:
                stage.selector.check(self.num_classes)
            features = stage.shapes[stage.features] if stage.shapes else ()

    @property
    def stage_weights(self) -> tuple[float | None, ...]:
        """(K,) weights of the stages in the combined probabilities; None where a stage answers alone."""
        return stage_weights(self.combine, len(self.stages))

    @property
    def exit_macs(self) -> Tensor:
        """(K,) int64: the accumulated cost of stopping at each exit (stages 0…k, selectors 0…min(k, K−2))."""
        stages = torch.tensor([stage.macs for stage in self.stages]).cumsum(0)
        selectors = torch.tensor([stage.selector_macs for stage in self.stages]).cumsum(0)
        return stages + selectors

    def thresholds(self, operating_point: OperatingPointLike = None) -> Tensor:
        """(K−1,) float32 stop thresholds; see :meth:`fastcascade.Cascade.thresholds`."""
        return resolve_thresholds(
            operating_point, self.operating_points, self.default_thresholds, len(self.stages)
        )

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Save as JSON and safetensors; see :func:`fastcascade.load_plan`.

        Raises:
            LoweringError: a stage or selector is opaque and cannot be saved without its Python code.
            InvalidArgument: the directory holds a plan and ``overwrite`` is False.
            SaveError: the operating system refused; what was there before is intact.
        """
        from fastcascade.plan_file import save_plan

        save_plan(self, directory, overwrite=overwrite)

    def __str__(self) -> str:
        size = "×".join(map(str, self.input.shape))
        pixels = "float" if self.input.preprocess is None else "uint8 or float"
        points = ", ".join(sorted(self.operating_points)) or "none"
        head = (
            f"plan: {len(self.stages)} stages, {size} {pixels} images, {self.num_classes} classes, "
            f"combine {self.combine}, dense {self.dense_macs:,} MACs, operating points: {points}"
        )
        return "\n".join([head, *map(str, self.stages)])

    __repr__ = __str__
