"""A stage runner that launches one persistent kernel: each program takes an image through all layers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastcascade.backends.gpu.feature_layout import padded_rows
from fastcascade.backends.gpu.scheduler import Active
from fastcascade.backends.gpu.stage_report import architecture, kernel_name, weight_bytes
from fastcascade.backends.interface import KernelChoice, StageReport
from fastcascade.kernels.layers import Layer
from fastcascade.kernels.triton.persistent import LayerTable, persistent
from fastcascade.lowering.plan import StagePlan
from fastcascade.types import InputSpec

__all__ = ["PersistentStage", "per_layer_reason"]

SCRATCH_LIMIT = 384 * 1024
"""Most bytes of activations per program. 132 programs, one per multiprocessor of an H100, then fit in its
50 MB of L2. An estimate, not a measurement."""

WEIGHT_LIMIT = 4 * 1024 * 1024
"""Most bytes of weights. The persistent kernel reads them from L2 for every image; with a launch per layer,
all images share one read. An estimate, not a measurement."""

KIND_LIMIT = 32
"""Most distinct layers in one kernel. Each is compiled on its own, which takes seconds."""


def per_layer_reason(stage: StagePlan, layers: list[Layer], table: LayerTable) -> str | None:
    """Why a stage with custom kernels needs a launch per layer; None if the persistent kernel can run it."""
    dtype = table.weights.dtype
    scratch, weights = table.scratch_size * dtype.itemsize, weight_bytes(layers)
    if stage.features == 0:
        return "its features are its input"
    if scratch > SCRATCH_LIMIT:
        return f"an image's activations take {scratch >> 10} KiB; the limit is {SCRATCH_LIMIT >> 10} KiB"
    if weights > WEIGHT_LIMIT:
        return f"its weights take {weights >> 10} KiB; the limit is {WEIGHT_LIMIT >> 10} KiB"
    if len(table.kinds[0]) > KIND_LIMIT:
        return f"it has {len(table.kinds[0])} distinct layers; the limit is {KIND_LIMIT}"
    return None


class PersistentStage:
    """One launch for the whole stage.

    Args:
        stage: one for which :func:`per_layer_reason` is None.
        layers: its layers, from :func:`fastcascade.backends.gpu.layer_lowering.stage_layers`.
        table: the same layers, from :func:`fastcascade.kernels.triton.persistent.layer_table`.
    """

    def __init__(self, stage: StagePlan, spec: InputSpec, layers: list[Layer], table: LayerTable) -> None:
        self.stage = stage
        self.layer_table = table
        self.device = table.weights.device
        self.dtype = table.weights.dtype
        self.labels = [(layer.label, kernel_name(layer)) for layer in layers]
        self.weight_bytes = weight_bytes(layers)
        self.feature_shape = next((la.work.out for la in layers if la.output == stage.features), None)
        self.pixel_table = None if spec.preprocess is None else spec.preprocess.table().to(self.device)

    def run(self, images: Tensor, active: Active) -> tuple[Tensor, Tensor]:
        """See :meth:`fastcascade.backends.gpu.scheduler.StageRunner.run`."""
        source, capacity = images, len(active.index)
        if self.stage.input == "previous":
            source = padded_rows(cast(Tensor, active.features), self.stage, self.dtype)
            capacity = len(source)
        logits = torch.empty(capacity, self.layer_table.num_classes, device=self.device)
        features = None
        if self.layer_table.features_size:
            shape = cast(tuple[int, int, int], self.feature_shape)
            features = torch.empty(capacity, *shape, dtype=self.dtype, device=self.device)
        pixel_table = self.pixel_table if source.dtype == torch.uint8 else None
        persistent(
            self.layer_table, source, active.index, active.count, features, logits, pixel_table=pixel_table
        )
        return logits if features is None else features, logits

    def report(self) -> StageReport:
        """One line for the launch, one per layer inside it."""
        return StageReport(
            name=self.stage.name,
            opaque_reason=None,
            kernels=(
                KernelChoice("schedule", "one launch, in which a program takes an image through all layers"),
                *(KernelChoice(label, f"triton persistent, {name}") for label, name in self.labels),
            ),
            isa=architecture(self.device),
            weight_bytes=self.weight_bytes,
            arena_bytes=self.layer_table.scratch_size * self.dtype.itemsize,
        )
