"""A stage runner that launches one custom kernel per layer, over the whole active set.

Each launch reads the number of active rows from device memory, so the host never has to wait for it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from fastcascade.backends.gpu.feature_layout import padded_rows
from fastcascade.backends.gpu.scheduler import Active
from fastcascade.backends.gpu.stage_report import architecture, kernel_name, weight_bytes
from fastcascade.backends.interface import KernelChoice, StageReport
from fastcascade.kernels.layers import Conv, Layer
from fastcascade.kernels.triton.layer_launch import run_layer
from fastcascade.lowering.plan import StagePlan
from fastcascade.types import InputSpec

__all__ = [
    "PerLayerStage",
]


class PerLayerStage:
    """One launch per layer.

    Args:
        stage: one for which :func:`fastcascade.backends.gpu.layer_lowering.no_kernel_reason` is None.
        layers: its layers, from :func:`fastcascade.backends.gpu.layer_lowering.stage_layers`.
        reason: why the stage does not run in a single launch, for the report.
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
        self.pixel_table = None if spec.preprocess is None else spec.preprocess.table().to(device)
        self.layers = layers
        self.last_reader = {value: i for i, layer in enumerate(self.layers) for value in layer.reads}

    def run(self, images: Tensor, active: Active) -> tuple[Tensor, Tensor]:
        """See :meth:`fastcascade.backends.gpu.scheduler.StageRunner.run`."""
        capacity = len(active.index)
        values: dict[int, Tensor] = {0: images}
        if self.stage.input == "previous":
            values[0] = padded_rows(cast(Tensor, active.features), self.stage, self.dtype)
            capacity = len(values[0])
        for i, layer in enumerate(self.layers):
            x, other = values[layer.source], None if layer.other is None else values[layer.other]
            values[layer.output] = out = self._buffer(layer, capacity)
            pixel_table = self.pixel_table if x.dtype == torch.uint8 else None
            run_layer(layer, x, other, active.count, out, index=active.index, pixel_table=pixel_table)
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
                KernelChoice("schedule", f"one launch per layer: {self.reason}"),
                *(KernelChoice(layer.label, f"triton {kernel_name(layer)}") for layer in self.layers),
            ),
            isa=architecture(self.device),
            weight_bytes=weight_bytes(self.layers),
            arena_bytes=3 * largest * self.dtype.itemsize,
        )
