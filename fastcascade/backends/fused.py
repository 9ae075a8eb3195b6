"""A lowered stage as a list of launches of own kernels, one per layer, over the whole active set.

Running allocates the values' buffers and launches; the host never learns how many rows are active.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcascade.backends import KernelChoice, StageReport
from fastcascade.backends.breadth_first import Active
from fastcascade.kernels.layers import Conv, Elementwise, Layer, Pooling, padded
from fastcascade.kernels.triton import conv as kernels
from fastcascade.plan import StagePlan
from fastcascade.types import InputSpec

__all__ = ["FusedStage", "architecture", "kernel_name", "stored_rows", "weight_bytes"]


class FusedStage:
    """A stage for which :func:`fastcascade.backends.layers.unfused_reason` is None.

    Args:
        layers: of the stage, from :func:`fastcascade.backends.layers.stage_layers`.
        reason: why it does not run as one launch, for the report.
    """

    def __init__(
        self,
        stage: StagePlan,
        spec: InputSpec,
        layers: list[Layer],
        device: torch.device,
        dtype: torch.dtype,
        reason: str,
    ) -> None:
        self.stage = stage
        self.device = device
        self.dtype = dtype
        self.reason = reason
        self.table = None if spec.preprocess is None else spec.preprocess.table().to(device)
        self.layers = layers
        self.last_reader = {value: i for i, layer in enumerate(self.layers) for value in layer.reads}

    def run(self, images: Tensor, active: Active) -> tuple[Tensor, Tensor]:
        """See :meth:`fastcascade.backends.breadth_first.StageRunner.run`."""
        capacity = len(active.index)
        values: dict[int, Tensor] = {0: images}
        if self.stage.input == "previous":
            values[0] = stored_rows(cast(Tensor, active.features), self.stage, self.dtype)
            capacity = len(values[0])
        for i, layer in enumerate(self.layers):
            x, other = values[layer.source], None if layer.other is None else values[layer.other]
            values[layer.output] = out = self._buffer(layer, capacity)
            table = self.table if x.dtype == torch.uint8 else None
            kernels.run(layer, x, other, active.count, out, index=active.index, table=table)
            for value in layer.reads:
                if self.last_reader[value] == i and value != self.stage.features:
                    values.pop(value, None)
        return values.get(self.stage.features, values[self.stage.logits]), values[self.stage.logits]

    def _buffer(self, layer: Layer, capacity: int) -> Tensor:
        if isinstance(layer.work, Conv) and layer.work.logits:
            return torch.empty(capacity, layer.work.out[2], device=self.device)
        return torch.empty(capacity, *layer.work.out, device=self.device, dtype=self.dtype)

    def report(self) -> StageReport:
        """One line per launch."""
        largest = max(math.prod(layer.work.out) for layer in self.layers)
        return StageReport(
            name=self.stage.name,
            opaque_reason=None,
            kernels=(
                KernelChoice("schedule", f"a launch per layer: {self.reason}"),
                *(KernelChoice(layer.label, f"triton {kernel_name(layer)}") for layer in self.layers),
            ),
            isa=architecture(self.device),
            weight_bytes=weight_bytes(self.layers),
            arena_bytes=3 * largest * self.dtype.itemsize,
        )


def stored_rows(features: Tensor, stage: StagePlan, dtype: torch.dtype) -> Tensor:
    """Features as own kernels store them; a stage that ran through torch left them unpadded."""
    channels = padded(stage.shapes[0][0])
    return F.pad(features, (0, channels - features.shape[-1])).to(dtype).contiguous()


def kernel_name(layer: Layer) -> str:
    """The kernel that runs a layer."""
    names: dict[type, str] = {Conv: "conv", Pooling: "pool", Elementwise: "elementwise"}
    return names[type(layer.work)]


def weight_bytes(layers: list[Layer]) -> int:
    """Constant data of the layers."""
    tensors = [t for layer in layers for t in (layer.weight, layer.vectors) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def architecture(device: torch.device) -> str:
    """The device's architecture in the compiler's terms."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}")
