"""A lowered stage as a list of launches of own kernels: one per operation, shortcuts joined to convolutions.

Lowering happens once: weights are packed, every operation becomes a :class:`Launch`. Running allocates the
values' buffers and launches; the host never learns how many rows are active.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcascade.backends import KernelChoice, StageReport
from fastcascade.backends.breadth_first import Active
from fastcascade.kernels.triton import conv as kernels
from fastcascade.kernels.triton.conv import ConvShape, View, padded
from fastcascade.plan import (
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
    StagePlan,
)
from fastcascade.types import InputSpec

__all__ = ["FusedStage", "unfused_reason"]

LARGE_IMAGE = 64
"""Above this height or width cuDNN's convolutions are the faster ones, so the stage runs through torch."""

Values = dict[int, Tensor]


@dataclass(frozen=True)
class Launch:
    """One kernel launch: ``run(values, count, out)`` writes value ``output``; ``reads`` are its inputs."""

    output: int
    reads: tuple[int, ...]
    kernel: str
    operation: str
    run: Callable[[Values, Tensor, Tensor], None]


def unfused_reason(stage: StagePlan, next_input: str | None) -> str | None:
    """Why a stage cannot run as own kernels; None if it can.

    Args:
        next_input: what the next stage reads; None at the last.
    """
    if stage.opaque_reason is not None:
        return stage.opaque_reason
    image = stage.shapes[0]
    if len(image) != 3:
        return f"it reads vectors of shape {image}, which one matrix product serves best"
    if max(image[1:]) > LARGE_IMAGE:
        limit = f"{LARGE_IMAGE}×{LARGE_IMAGE}"
        return f"images of {image[1]}×{image[2]}: cuDNN's convolutions are faster above {limit}"
    writers = {op.output: op for op in stage.ops}
    for op in stage.ops:
        reason = _unfused_op(stage, op, writers)
        if reason is not None:
            return f"{op}: {reason}"
    if not isinstance(writers.get(stage.logits), Linear):
        return "its logits do not come from a linear layer"
    if any(stage.logits in op.reads for op in stage.ops):
        return "other operations read its logits"
    if next_input == "previous" and len(stage.shapes[stage.features]) != 3:
        return f"the next stage reads features of shape {stage.shapes[stage.features]}, not a feature map"
    return None


def _unfused_op(stage: StagePlan, op: Op, writers: dict[int, Op]) -> str | None:
    if not isinstance(op, Conv2d | Pool | Linear | Add | Activation | ScaleShift | Slice | Pad | Flatten):
        return "no own kernel"
    if isinstance(op, Conv2d) and op.groups != 1:
        return f"groups={op.groups}"
    if isinstance(op, Slice) and min(op.step) < 1:
        return f"steps {op.step}"
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


def _map_shape(shape: Shape) -> tuple[int, int, int]:
    """(C, H, W), a vector being a map of one pixel."""
    return (shape[0], 1, 1) if len(shape) == 1 else cast(tuple[int, int, int], shape)


class FusedStage:
    """A stage for which :func:`unfused_reason` is None."""

    def __init__(
        self, stage: StagePlan, spec: InputSpec, device: torch.device, dtype: torch.dtype, num_classes: int
    ) -> None:
        self.stage = stage
        self.device = device
        self.dtype = dtype
        self.num_classes = num_classes
        self.table = None if spec.preprocess is None else spec.preprocess.table().to(device)
        self.weight_bytes = 0
        self.aliases: dict[int, int] = {}  # flattened values and the maps that they are
        self.writers = {op.output: op for op in stage.ops}
        self.views = self._shortcut_views()
        self.launches = [launch for op in stage.ops if (launch := self._lower(op)) is not None]
        self.last_reader = {value: i for i, launch in enumerate(self.launches) for value in launch.reads}

    def _shortcut_views(self) -> dict[int, tuple[int, View]]:
        """Values that need no memory: a Slice, or a Pad of one, that only convolutions add (shortcut A)."""
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
        """(source value, View) of a zero Pad of channels over a Slice of pixels, or of either alone."""
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

    def _lower(self, op: Op) -> Launch | None:
        """The launch of one operation; None where it costs nothing."""
        if isinstance(op, Flatten):
            self.aliases[op.output] = op.input
            return None
        if op.output in self.views or self._only_inside_a_view(op):
            return None
        reads = tuple(self.aliases.get(value, value) for value in op.reads)
        if isinstance(op, Conv2d | Linear):
            return self._lower_conv(op)
        if isinstance(op, Pool):
            run = partial(_run_pool, reads[0], op)
            return Launch(op.output, reads, "pool", str(op), run)
        return Launch(op.output, reads, "elementwise", str(op), self._elementwise(op, reads))

    def _only_inside_a_view(self, op: Op) -> bool:
        """A Slice that only viewed Pads read."""
        readers = [r for r in self.stage.ops if op.output in r.reads]
        return (
            isinstance(op, Slice)
            and op.output != self.stage.features
            and all(r.output in self.views for r in readers)
        )

    def _lower_conv(self, op: Conv2d | Linear) -> Launch:
        source = self.aliases.get(op.input, op.input)
        channels, height, width = _map_shape(self.stage.shapes[source])
        out_channels, out_height, out_width = _map_shape(self.stage.shapes[op.output])
        if isinstance(op, Linear):  # a convolution whose kernel covers the whole map
            weight = op.weight.view(-1, channels, height, width)
            conv = Conv2d(op.output, source, weight, op.bias, activation=op.activation)
        else:
            conv = op
        image = source == 0 and self.stage.input == "image"
        stored = channels if image else padded(channels)
        weight = kernels.pack_weight(conv.weight, stored, self.dtype, image).to(self.device)
        bias = F.pad(conv.bias, (0, padded(out_channels) - out_channels)).to(self.device)
        self.weight_bytes += weight.numel() * weight.element_size() + bias.numel() * 4
        shape = ConvShape(
            height,
            width,
            stored,
            out_height,
            out_width,
            out_channels,
            kernel=cast(tuple[int, int], tuple(conv.weight.shape[2:])),
            stride=conv.stride,
            dilation=conv.dilation,
            corner=(conv.padding[0], conv.padding[2]),
        )
        residual, view = None, None
        if conv.residual is not None:
            whole = View(out_height, out_width, padded(out_channels), out_channels)
            residual, view = self.views.get(conv.residual, (conv.residual, whole))
        reads = (source,) if residual is None else (source, residual)
        words = f"{op}, gather" if image else str(op)
        if view is not None and residual != conv.residual:
            words += " through a strided, zero-padded view"

        def run(values: Values, count: Tensor, out: Tensor) -> None:
            kernels.conv(
                values[source],
                weight,
                bias,
                count,
                out,
                shape,
                index=values.get(INDEX) if image else None,
                table=self.table if image and values[source].dtype == torch.uint8 else None,
                residual=None if residual is None else values[residual],
                view=view,
                activation=conv.activation,
            )

        return Launch(op.output, reads, "conv", words, run)

    def _elementwise(self, op: Op, reads: tuple[int, ...]) -> Callable[[Values, Tensor, Tensor], None]:
        source = reads[0]
        real = (_map_shape(self.stage.shapes[source])[0], _map_shape(self.stage.shapes[op.output])[0])
        launch = partial(_run_elementwise, source, reads[1] if len(reads) > 1 else None, real)
        if isinstance(op, Add):
            return partial(launch, activation=op.activation)
        if isinstance(op, Activation):
            return partial(launch, activation=op.kind)
        if isinstance(op, ScaleShift):
            fill = padded(real[1]) - real[1]
            scale, shift = (F.pad(t, (0, fill)).to(self.device) for t in (op.scale, op.shift))
            return partial(launch, affine=(scale, shift))
        if isinstance(op, Slice):
            return partial(launch, start=_hwc(op.start), step=_hwc(op.step))
        pad = cast(Pad, op)
        return partial(launch, start=_hwc((-pad.before[0], -pad.before[1], -pad.before[2])), fill=pad.value)

    def run(self, images: Tensor, active: Active) -> tuple[Tensor, Tensor]:
        """See :meth:`fastcascade.backends.breadth_first.StageRunner.run`."""
        capacity = len(active.index)
        values: Values = {INDEX: active.index, 0: images}
        if self.stage.input == "previous":
            values[0] = self._padded_rows(cast(Tensor, active.features))
            capacity = len(values[0])
        for i, launch in enumerate(self.launches):
            out = self._buffer(launch.output, capacity)
            launch.run(values, active.count, out)
            values[launch.output] = out
            for value in launch.reads:
                if self.last_reader[value] == i and value != self.stage.features:
                    values.pop(value, None)
        return values.get(self.stage.features, values[self.stage.logits]), values[self.stage.logits]

    def _padded_rows(self, rows: Tensor) -> Tensor:
        """Features as own kernels store them; another backend's stage may have left them unpadded."""
        channels = padded(self.stage.shapes[0][0])
        return F.pad(rows, (0, channels - rows.shape[-1])).to(self.dtype).contiguous()

    def _buffer(self, value: int, capacity: int) -> Tensor:
        channels, height, width = _map_shape(self.stage.shapes[value])
        if value == self.stage.logits:
            return torch.empty(capacity, self.num_classes, device=self.device)
        return torch.empty(capacity, height, width, padded(channels), device=self.device, dtype=self.dtype)

    def report(self) -> StageReport:
        """One line per launch."""
        largest = [math.prod(_map_shape(s)[1:]) * padded(s[0]) for s in self.stage.shapes[1:]]
        return StageReport(
            name=self.stage.name,
            opaque_reason=None,
            kernels=tuple(
                KernelChoice(launch.operation, f"triton {launch.kernel}") for launch in self.launches
            ),
            isa=architecture(self.device),
            weight_bytes=self.weight_bytes,
            arena_bytes=3 * max(largest) * self.dtype.itemsize,
        )


INDEX = -1
"""The entry of the values that holds the index of active instances."""


def architecture(device: torch.device) -> str:
    """The device's architecture in the compiler's terms."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}")


def _hwc(chw: tuple[int, int, int]) -> tuple[int, int, int]:
    return chw[1], chw[2], chw[0]


def _run_pool(source: int, op: Pool, values: Values, count: Tensor, out: Tensor) -> None:
    kernels.pool(
        values[source],
        count,
        out,
        kind=op.kind,
        kernel=op.kernel,
        stride=op.stride,
        padding=op.padding,
        include_padding=op.include_padding,
    )


def _run_elementwise(
    source: int,
    other: int | None,
    channels: tuple[int, int],
    values: Values,
    count: Tensor,
    out: Tensor,
    *,
    activation: str = "none",
    start: tuple[int, int, int] = (0, 0, 0),
    step: tuple[int, int, int] = (1, 1, 1),
    fill: float = 0.0,
    affine: tuple[Tensor, Tensor] | None = None,
) -> None:
    kernels.elementwise(
        values[source],
        count,
        out,
        channels,
        start=start,
        step=step,
        fill=fill,
        affine=affine,
        other=None if other is None else values[other],
        activation=activation,
    )
