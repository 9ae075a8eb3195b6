"""Lowering of a stage's operations to the layers of the custom GPU kernels.

Packs the weights and turns shortcuts into residual reads of convolutions. Two stage runners take the layers:
:mod:`fastcascade.backends.gpu.per_layer_stage` launches one kernel for each,
:mod:`fastcascade.backends.gpu.persistent_stage` one kernel for all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcascade.kernels.layers import Conv, ConvShape, Elementwise, Layer, Pooling, View, pack_weight, padded
from fastcascade.lowering.operations import (
    Activation,
    Add,
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
from fastcascade.lowering.plan import StagePlan

__all__ = ["no_kernel_reason", "stage_layers"]

LARGE_IMAGE = 64
"""Largest height or width. Above it cuDNN's convolutions are faster, so the stage runs in torch."""

WITH_KERNELS = (Activation, Add, Conv2d, Flatten, Linear, Pad, Pool, ScaleShift, Slice)
ACTIVATIONS = ("none", "relu", "relu6")


def no_kernel_reason(
    stage: StagePlan, next_input: str | None, activations: Collection[str] = ACTIVATIONS
) -> str | None:
    """Why a stage cannot run in custom kernels; None if it can.

    Args:
        next_input: what the next stage reads; None for the last stage.
        activations: those that the kernels have.
    """
    if stage.opaque_reason is not None:
        return stage.opaque_reason
    image = stage.shapes[0]
    if len(image) != 3:
        return f"it reads vectors of shape {image}; a plain matrix product is faster"
    if max(image[1:]) > LARGE_IMAGE:
        limit = f"{LARGE_IMAGE}×{LARGE_IMAGE}"
        return f"images of {image[1]}×{image[2]}: cuDNN's convolutions are faster above {limit}"
    writers = {op.output: op for op in stage.ops}
    for op in stage.ops:
        reason = _op_reason(stage, op, activations)
        if reason is not None:
            return f"{op}: {reason}"
    if not isinstance(writers.get(stage.logits), Linear):
        return "its logits do not come from a linear layer"
    if any(stage.logits in op.reads for op in stage.ops):
        return "an operation reads its logits"
    if next_input == "previous" and len(stage.shapes[stage.features]) != 3:
        return f"the next stage reads features of shape {stage.shapes[stage.features]}, not a feature map"
    return None


def _op_reason(stage: StagePlan, op: Op, activations: Collection[str]) -> str | None:
    if reason := _missing_kernel(op, stage.shapes, activations):
        return reason
    if isinstance(op, Conv2d) and op.groups != 1:
        return f"groups={op.groups}"
    if isinstance(op, Slice) and min(op.step) < 1:
        return f"slice steps {op.step}"
    reads_image = stage.input == "image" and 0 in op.reads
    if reads_image and (not isinstance(op, Conv2d) or op.residual == 0):
        return "only convolutions read images"
    if isinstance(op, Flatten):
        readers = [reader for reader in stage.ops if op.output in reader.reads]
        if not all(isinstance(reader, Linear) for reader in readers):
            return "flattened features are read by something other than a linear layer"
        return "features are flattened" if stage.features == op.output else None
    if len(stage.shapes[op.output]) == 1 and not isinstance(op, Linear | Activation | Add | ScaleShift):
        return "reads a vector"
    return None


def _missing_kernel(op: Op, shapes: Sequence[Shape], activations: Collection[str]) -> str | None:
    """What the kernels lack for an operation of a stage whose values have these shapes; None if nothing."""
    activation = op.kind if isinstance(op, Activation) else getattr(op, "activation", "none")
    if not isinstance(op, WITH_KERNELS):
        return "no custom kernel"
    if activation not in activations:
        return f"no custom kernel for {activation}"
    if isinstance(op, Add) and shapes[op.input] != shapes[op.other]:
        return f"broadcasts {shapes[op.input]} and {shapes[op.other]}"
    if isinstance(op, Pad) and op.mode != "constant":
        return f"no custom kernel for {op.mode} padding"
    if isinstance(op, ScaleShift) and op.scale.ndim > 1:
        return "its constants vary within a channel"
    return None


def _map_shape(shape: Shape) -> tuple[int, int, int]:
    """(C, H, W); a vector is a map of one pixel."""
    return (shape[0], 1, 1) if len(shape) == 1 else cast(tuple[int, int, int], shape)


def stage_layers(stage: StagePlan, dtype: torch.dtype, device: torch.device) -> list[Layer]:
    """The layers of a stage for which :func:`no_kernel_reason` is None, with their weights on the device."""
    return _Lowering(stage, dtype, device).layers


class _Lowering:
    def __init__(self, stage: StagePlan, dtype: torch.dtype, device: torch.device) -> None:
        self.stage = stage
        self.dtype = dtype
        self.device = device
        self.aliases: dict[int, int] = {}  # flattened value → the map with the same elements
        self.writers = {op.output: op for op in stage.ops}
        self.views = self._shortcut_views()
        self.layers = [layer for op in stage.ops if (layer := self._lower(op)) is not None]

    def _shortcut_views(self) -> dict[int, tuple[int, View]]:
        """Values that need no memory: a Slice, or a Pad of one, read only as a residual (shortcut A)."""
        views: dict[int, tuple[int, View]] = {}
        for op in reversed(self.stage.ops):
            readers = [r for r in self.stage.ops if op.output in r.reads]
            as_residual = all(isinstance(r, Conv2d) and r.input != op.output for r in readers)
            if as_residual and readers and op.output != self.stage.features:
                view = self._view(op)
                if view is not None:
                    views[op.output] = view
        return views

    def _view(self, op: Op) -> tuple[int, View] | None:
        """(source, View) of a Slice of pixels, a zero Pad of channels or a Pad of a Slice, else None."""
        before, source = 0, op
        if isinstance(op, Pad):
            if op.value != 0 or any((*op.before[1:], *op.after[1:])):
                return None
            before, source = op.before[0], self.writers.get(op.input, op)
        value = op.input if isinstance(op, Pad | Slice) else None
        if value is None:
            return None
        start, step = (0, 0), (1, 1)
        if isinstance(source, Slice) and source.start[0] == 0 and source.step[0] == 1:
            channels = self.stage.shapes[source.input][0]
            if source.stop[0] < channels:
                return None
            value, start, step = source.input, source.start[1:], source.step[1:]
        elif isinstance(op, Slice):
            return None
        if value == 0 and self.stage.input == "image":
            return None
        channels, height, width = _map_shape(self.stage.shapes[value])
        return value, View(height, width, padded(channels), channels, start, step, before)

    def _lower(self, op: Op) -> Layer | None:
        """The layer of one operation; None if it needs no kernel."""
        if isinstance(op, Flatten):
            self.aliases[op.output] = op.input
            return None
        if op.output in self.views or self._only_inside_a_view(op):
            return None
        if isinstance(op, Linear):
            return self._conv(self._as_convolution(op))
        if isinstance(op, Conv2d):
            return self._conv(op)
        source, *rest = (self.aliases.get(value, value) for value in op.reads)
        vectors = self._affine(op) if isinstance(op, ScaleShift) else None
        work = self._pooling(op, source) if isinstance(op, Pool) else self._elementwise(op, source)
        return Layer(work, op.output, source, rest[0] if rest else None, None, vectors, str(op))

    def _only_inside_a_view(self, op: Op) -> bool:
        """Whether the operation is a Slice that is read only by Pads that became views."""
        readers = [r for r in self.stage.ops if op.output in r.reads]
        return (
            isinstance(op, Slice)
            and op.output != self.stage.features
            and all(r.output in self.views for r in readers)
        )

    def _stored(self, value: int) -> tuple[int, int, int]:
        """(H, W, stored channels) of a value."""
        channels, height, width = _map_shape(self.stage.shapes[value])
        return height, width, padded(channels)

    def _as_convolution(self, op: Linear) -> Conv2d:
        """A linear layer as a convolution whose kernel covers the whole map."""
        source = self.aliases.get(op.input, op.input)
        weight = op.weight.view(-1, *_map_shape(self.stage.shapes[source]))
        return Conv2d(op.output, source, weight, op.bias, activation=op.activation)

    def _conv(self, op: Conv2d) -> Layer:
        channels, height, width = _map_shape(self.stage.shapes[op.input])
        out_channels, out_height, out_width = _map_shape(self.stage.shapes[op.output])
        image = op.input == 0 and self.stage.input == "image"
        residual, view = op.residual, cast(View | None, None)
        if residual is not None:
            whole = View(out_height, out_width, padded(out_channels), out_channels)
            residual, view = self.views.get(residual, (residual, whole))
        shape = ConvShape(
            height,
            width,
            channels if image else padded(channels),
            out_height,
            out_width,
            out_channels,
            kernel=cast(tuple[int, int], tuple(op.weight.shape[2:])),
            stride=op.stride,
            dilation=op.dilation,
            corner=(op.padding[0], op.padding[2]),
        )
        writer = self.writers[op.output]
        label = f"{writer}, gathers images" if image else str(writer)
        if residual != op.residual:
            label += " through a strided, zero-padded view"
        return Layer(
            Conv(shape, view, op.activation, image, logits=op.output == self.stage.logits),
            op.output,
            op.input,
            residual,
            pack_weight(op.weight, shape.channels).to(self.device, self.dtype),
            F.pad(op.bias, (0, padded(out_channels) - out_channels)).to(self.device),
            label,
        )

    def _pooling(self, op: Pool, source: int) -> Pooling:
        return Pooling(
            self._stored(source),
            self._stored(op.output),
            op.kind,
            op.kernel,
            op.stride,
            op.padding,
            op.include_padding,
        )

    def _elementwise(self, op: Op, source: int) -> Elementwise:
        real = (_map_shape(self.stage.shapes[source])[0], _map_shape(self.stage.shapes[op.output])[0])
        work = Elementwise(self._stored(source), self._stored(op.output), real)
        if isinstance(op, Add):
            return work._replace(other=True, activation=op.activation)
        if isinstance(op, Activation):
            return work._replace(activation=op.kind)
        if isinstance(op, ScaleShift):
            return work._replace(affine=True)
        if isinstance(op, Slice):
            return work._replace(start=_hwc(op.start), step=_hwc(op.step))
        pad = cast(Pad, op)
        return work._replace(start=_hwc((-pad.before[0], -pad.before[1], -pad.before[2])), fill=pad.value)

    def _affine(self, op: ScaleShift) -> Tensor:
        channels = len(op.scale)
        return F.pad(torch.stack([op.scale, op.shift]), (0, padded(channels) - channels)).to(self.device)


def _hwc(chw: tuple[int, int, int]) -> tuple[int, int, int]:
    return chw[1], chw[2], chw[0]
