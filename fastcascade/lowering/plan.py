"""The plan: a cascade as plain data, which every backend can lower to a program.

For each stage, a plan holds a list of operations on numbered values with folded weights, the weights of the
selector, and the cost. It needs no Python code of the model, so it can be printed, saved, and run elsewhere.

A stage that operations cannot express is *opaque*. It holds the torch module and the reason, runs in torch,
and cannot be saved.

All shapes are per instance, without a batch axis: an image or feature map is (C, H, W), a vector (F,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fastcascade.errors import InvalidArgument
from fastcascade.kernels.reference import MLPWeights, features, mlp_score, threshold_score
from fastcascade.lowering.operations import Op, Shape, ValueType, require, require_tensor
from fastcascade.lowering.quantized_operations import QuantizedConv2d, QuantizedLinear
from fastcascade.storage.codec import NOT_SAVED
from fastcascade.types import (
    Combine,
    InputSpec,
    OperatingPoint,
    OperatingPointLike,
    checked_combine,
    resolve_thresholds,
    stage_weights,
)

__all__ = ["Plan", "SelectorPlan", "StagePlan"]


SIZE_LIMIT = 2**20
"""Largest kernel, stride, padding or axis in a plan. Offsets then fit in 64 bits."""

ELEMENT_LIMIT = 2**31 - 1
"""Most elements of a value per instance, or of a weight."""


@dataclass(frozen=True, eq=False, repr=False)
class SelectorPlan:
    """The selector of one exit.

    ``kind`` is one of

    - "mlp": the score is w2·relu(w1·((features − mean)/std) + b1) + b2. ``features`` names its inputs, as in
      :func:`fastcascade.kernels.reference.features`.
    - "max_prob", "margin", "entropy": a confidence score without weights, as in
      :func:`fastcascade.kernels.reference.threshold_score`.
    - "opaque": the score is ``module(k, log_probs, previous_label)``.
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
        """The weights in the form that kernels take; None unless ``kind`` is "mlp"."""
        if self.kind != "mlp":
            return None
        return MLPWeights(*(cast(Tensor, getattr(self, name)) for name in MLPWeights._fields))

    def score(self, k: int, log_probs: Tensor, previous_label: Tensor, own_label: Tensor) -> Tensor:
        """(n,) stop scores after stage k, from log q_k (n, C), argmax p_{k−1} and argmax p_k (n,)."""
        if self.module is not None:
            return cast(Tensor, self.module(k, log_probs, previous_label))
        if self.weights is None:
            return threshold_score(self.kind, log_probs)
        agreement = (own_label == previous_label).to(log_probs.dtype)
        return mlp_score(features(cast(str, self.features), log_probs, agreement), self.weights)

    def check(self, num_classes: int) -> None:
        """Raise InvalidArgument unless kind, features and weights are consistent."""
        require(
            (self.module is not None) == (self.kind == "opaque"),
            f"selector of kind {self.kind} {'has a' if self.module else 'lacks a'} module",
        )
        if self.kind != "mlp":
            return
        width = num_classes if self.features == "probs" else 4
        require(self.features is not None, "an mlp selector must name its features")
        require(self.features != "topk" or num_classes >= 3, "features 'topk' need at least 3 classes")
        require(self.w1 is not None and self.w1.ndim == 2, "an mlp selector needs w1 of 2 axes")
        hidden = cast(Tensor, self.w1).shape[0]
        shapes: list[Shape] = [(width,), (width,), (hidden, width), (hidden,), (hidden,), ()]
        for name, shape in zip(MLPWeights._fields, shapes, strict=True):
            value = getattr(self, name)
            require(value is not None, f"an mlp selector lacks {name}")
            require_tensor(value, shape, f"selector {name}")

    def __str__(self) -> str:
        return f"mlp on {self.features}" if self.kind == "mlp" else self.kind


@dataclass(frozen=True, eq=False, repr=False)
class StagePlan:
    """One stage: operations from its input to its features and logits, or an opaque module.

    Attributes:
        macs: cost of the stage with its exit, without its selector and the stages before it.
        shapes: shape of each value.
        features: number of the value that the next stage reads if its ``input`` is "previous".
        logits: number of the value (num_classes,) that the exit head reads.
        module: maps a batch to (features, logits); for an opaque stage only.
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

    @property
    def is_quantized(self) -> bool:
        """Whether any operation computes in int8."""
        return bool(self.layer_errors)

    @property
    def layer_errors(self) -> list[float]:
        """The error of every int8 layer by itself; see ``quantized_operations``."""
        return [op.error for op in self.ops if isinstance(op, QuantizedConv2d | QuantizedLinear)]

    @property
    def precision(self) -> Literal["fp32", "int8"]:
        """ "int8" where any operation computes in it, else "fp32"."""
        return "int8" if self.is_quantized else "fp32"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the operations' weights, or of the opaque module's parameters and buffers."""
        tensors = [tensor for op in self.ops for tensor in op.tensors.values()]
        if self.module is not None:
            tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def last_reads(self) -> list[tuple[int, ...]]:
        """For each operation, the values that no later operation reads, so that their memory can be freed.

        Features and logits are never among them.
        """
        last = {value: position for position, op in enumerate(self.ops) for value in (*op.reads, op.output)}
        kept = {self.features, self.logits}
        return [
            tuple(v for v in dict.fromkeys((*op.reads, op.output)) if last[v] == position and v not in kept)
            for position, op in enumerate(self.ops)
        ]

    def check(self, num_classes: int) -> None:
        """Raise InvalidArgument unless every value is defined before use and has the right shape."""
        require(self.macs >= 0 and self.selector_macs >= 0, f"stage {self.name!r} has a negative cost")
        has_module = self.module is not None
        require(
            has_module >= bool(self.opaque_reason) and not (has_module and self.ops),
            f"stage {self.name!r} must have either operations or a module; only a module takes a reason",
        )
        require(all(len(shape) in (1, 3) for shape in self.shapes), f"stage {self.name!r}: bad value shape")
        if self.module is None:
            self._check_ops(num_classes)

    def _check_ops(self, num_classes: int) -> None:
        require(len(self.shapes) == len(self.ops) + 1, f"stage {self.name!r} needs one shape per value")
        defined = {0}
        types: dict[int, ValueType] = {0: "f32"}
        for op in self.ops:
            what = f"stage {self.name!r}, {type(op).__name__} v{op.output}"  # repr needs valid fields
            require(set(op.reads) <= defined, f"{what}: reads a value that is not defined before it")
            require(op.output not in defined and 0 < op.output < len(self.shapes), f"{what}: bad output")
            try:
                shape = op.output_shape(*(self.shapes[value] for value in op.reads))
                types[op.output] = op.output_type(*(types[value] for value in op.reads))
            except InvalidArgument as error:
                raise InvalidArgument(f"{what}: {error}") from error
            require(shape == self.shapes[op.output], f"{what}: shape {self.shapes[op.output]}, not {shape}")
            defined.add(op.output)
            require(max(op.sizes) <= SIZE_LIMIT, f"{what}: a number above {SIZE_LIMIT}")
        for shape in self.shapes:
            require(
                all(1 <= size <= SIZE_LIMIT for size in shape) and math.prod(shape) <= ELEMENT_LIMIT,
                f"stage {self.name!r} has a value of shape {shape}; expected sizes of 1 … {SIZE_LIMIT}",
            )
        require({self.features, self.logits} <= defined, f"stage {self.name!r}: features or logits undefined")
        require(
            types[self.features] == types[self.logits] == "f32",
            f"stage {self.name!r}: features or logits are bytes; expected float32",
        )
        require(
            self.shapes[self.logits] == (num_classes,),
            f"stage {self.name!r} returns logits {self.shapes[self.logits]}; expected ({num_classes},)",
        )

    def __str__(self) -> str:
        head = f"stage {self.name!r} reads {self.input}, {self.macs:,} MACs"
        head += ", int8" if self.is_quantized else ""
        tail = [] if self.selector is None else [f"  selector {self.selector}, {self.selector_macs:,} MACs"]
        if self.opaque_reason is not None:
            return "\n".join([f"{head}, opaque: {self.opaque_reason}", *tail])
        lines = [f"  {op!r} → {'×'.join(map(str, self.shapes[op.output]))}" for op in self.ops]
        return "\n".join([head, *lines, f"  features v{self.features}, logits v{self.logits}", *tail])

    __repr__ = __str__


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """A whole cascade as data; ``stages[-1].selector`` is None.

    ``default_thresholds`` (K−1,) is None if the selector has no defaults, as for confidence thresholds.
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
        require(bool(self.stages), "a plan needs at least one stage")
        require(
            2 <= self.num_classes <= SIZE_LIMIT, f"num_classes is {self.num_classes}; expected at least 2"
        )
        require(self.dense_macs >= 0, f"dense_macs is {self.dense_macs}; expected at least 0")
        require(
            self.classes is None or len(self.classes) == self.num_classes,
            f"{len(self.classes or ())} class names for {self.num_classes} classes",
        )
        exits = len(self.stages) - 1
        if self.default_thresholds is not None:
            require_tensor(self.default_thresholds, (exits,), "default_thresholds")
        for name, point in self.operating_points.items():
            require(
                len(point.thresholds) == exits and len(point.exit_shares) == exits + 1,
                f"operating point {name!r} does not have {exits} thresholds and {exits + 1} exit shares",
            )
        checked_combine(self.combine, len(self.stages))
        self._check_stages()

    def _check_stages(self) -> None:
        features: Shape = ()
        for k, stage in enumerate(self.stages):
            require(k > 0 or stage.input == "image", "the first stage must read the image")
            require(
                (stage.selector is None) == (k == len(self.stages) - 1),
                f"stage {k} of {len(self.stages)} {'has a' if stage.selector else 'lacks a'} selector; "
                "every stage but the last must have one",
            )
            source = self.input.shape if stage.input == "image" else features
            require(
                stage.module is not None or stage.shapes[:1] == (source,),
                f"stage {stage.name!r} reads shape {stage.shapes[:1]}, but its input has shape {source}",
            )
            stage.check(self.num_classes)
            if stage.selector is not None:
                stage.selector.check(self.num_classes)
            features = stage.shapes[stage.features] if stage.shapes else ()

    @property
    def precision(self) -> tuple[Literal["fp32", "int8"], ...]:
        """(K,) precision of the stages."""
        return tuple(stage.precision for stage in self.stages)

    @property
    def is_quantized(self) -> bool:
        """Whether any stage computes in int8."""
        return any(stage.is_quantized for stage in self.stages)

    @property
    def stage_weights(self) -> tuple[float | None, ...]:
        """(K,) weights of the stages in the combined probabilities; None for combine="last"."""
        return stage_weights(self.combine, len(self.stages))

    @property
    def exit_macs(self) -> Tensor:
        """(K,) int64 cost of stopping at each exit: stages 0…k and selectors 0…min(k, K−2)."""
        stages = torch.tensor([stage.macs for stage in self.stages]).cumsum(0)
        selectors = torch.tensor([stage.selector_macs for stage in self.stages]).cumsum(0)
        return stages + selectors

    def thresholds(
        self, operating_point: OperatingPointLike = None, precision: tuple[str, ...] | None = None
    ) -> Tensor:
        """(K−1,) float32 stop thresholds; see :meth:`fastcascade.Cascade.thresholds`.

        Args:
            precision: (K,) in which the stages run, as operating points record it; None for the plan's own.
        """
        return resolve_thresholds(
            operating_point,
            self.operating_points,
            self.default_thresholds,
            len(self.stages),
            self.recorded_precision if precision is None else precision,
        )

    def usable_points(self, precision: tuple[str, ...] | None = None) -> dict[str, OperatingPoint]:
        """The operating points that were measured at a precision; None for the plan's own."""
        wanted = self.recorded_precision if precision is None else precision
        return {name: p for name, p in self.operating_points.items() if p.precision == wanted}

    @cached_property  # every call with thresholds of its own asks
    def recorded_precision(self) -> tuple[str, ...]:
        """(K,) as operating points record it; () where all stages are in fp32."""
        return self.precision if self.is_quantized else ()

    def save(self, directory: str | Path, overwrite: bool = False) -> str:
        """Save as JSON and safetensors; see :func:`fastcascade.load_plan`.

        Returns:
            sha256 of the plan, structure and weights.

        Raises:
            LoweringError: a stage or selector is opaque and cannot be saved without its Python code.
            InvalidArgument: the directory holds a plan and ``overwrite`` is False.
            SaveError: the operating system reported an error; the previous contents are intact.
        """
        from fastcascade.lowering.plan_file import save_plan

        return save_plan(self, directory, overwrite=overwrite)

    def __str__(self) -> str:
        size = "×".join(map(str, self.input.shape))
        pixels = "float" if self.input.preprocess is None else "uint8 or float"
        points = ", ".join(sorted(self.operating_points)) or "none"
        head = (
            f"plan: {len(self.stages)} stages, {size} {pixels} images, {self.num_classes} classes, "
            f"combine {self.combine}, dense {self.dense_macs:,} MACs, operating points: {points}"
        )
        return "\n".join([head, *map(str, self.stages)])

    def __repr__(self) -> str:
        """One line; ``str`` lists every operation."""
        size = "×".join(map(str, self.input.shape))
        opaque = sum(stage.module is not None for stage in self.stages)
        note = f", {opaque} opaque" if opaque else ""
        return (
            f"<Plan: {len(self.stages)} stages{note}, {size} → {self.num_classes} classes, "
            f"{self.dense_macs / 1e6:.1f} M MACs dense>"
        )
