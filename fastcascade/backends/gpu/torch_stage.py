"""The stage runner for stages that run in torch and cuDNN, over exactly the active rows.

Only the device knows their number, so the host reads it back once per stage, except for the first.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import cast

import torch
from torch import Tensor

from fastcascade.backends.gpu.feature_layout import channels_first, channels_last
from fastcascade.backends.gpu.scheduler import Active, LoweringContext
from fastcascade.backends.interface import KernelChoice, StageReport
from fastcascade.backends.torch_module import in_best_layout, is_channels_last, module_kernel
from fastcascade.lowering.interpreter import move_stage, run_op, run_stage
from fastcascade.lowering.operations import Conv2d, Op
from fastcascade.lowering.plan import StagePlan

__all__ = ["TorchStage"]


class TorchStage:
    """A stage in torch: gathers exactly the active rows into one batch and runs the stage on it.

    Reads the number of active rows back once per call. The first stage needs no readback.

    Args:
        reason: why the stage runs in torch, for the report.
    """

    def __init__(self, context: LoweringContext, stage: StagePlan, reason: str) -> None:
        spec, device = context.spec, context.device
        if stage.module is not None:
            stage = replace(stage, module=in_best_layout(stage.module, stage.shapes[0]))
        moved = move_stage(stage, device, context.dtype)
        self.stage = replace(moved, ops=tuple(_with_channels_last_weight(op) for op in moved.ops))
        contiguous = stage.module is not None and not is_channels_last(stage.module)
        self.layout = torch.contiguous_format if contiguous else torch.channels_last
        self.reason = reason
        self.spec = spec
        self.pixel_table = None if spec.preprocess is None else spec.preprocess.table().to(device)
        self.kernels = context.kernels
        self.dtype = context.dtype

    def run(self, images: Tensor, active: Active) -> tuple[Tensor, Tensor]:
        """See :meth:`StageRunner.run`."""
        if active.known is None:
            active.known = int(active.count)  # the only synchronisation with the host
        n = active.known
        if n == 0:
            empty = images.new_empty((0, self.spec.shape[0]), dtype=self.dtype)
            return empty, empty
        reads_images = self.stage.input == "image"
        x = self._gather(images, active, n) if reads_images else cast(Tensor, active.features)[:n]
        rows, logits = self.forward(x)
        # Compaction works in place and must not change the caller's images.
        shared = rows.untyped_storage().data_ptr() == images.untyped_storage().data_ptr()
        return rows.clone() if shared else rows, logits

    def _gather(self, images: Tensor, active: Active, n: int) -> Tensor:
        if n == len(images):
            return images.permute(0, 2, 3, 1)
        rows = channels_last(images)
        bucket = rows.new_empty(n, *rows.shape[1:])
        scratch = active.index.new_empty(n), torch.empty_like(active.count)
        chunk = torch.zeros_like(active.count)
        self.kernels.gather_rows(rows, active.index, active.count, chunk, bucket, *scratch)
        return bucket

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n, …) images or features, channels last → features, channels last, and logits."""
        x = channels_first(rows)
        if self.stage.input == "image":
            x = self.spec.to_float(x, self.pixel_table)
        else:
            x = x[:, : self.stage.shapes[0][0]]  # custom kernels leave padded channels
        x = x.to(self.dtype)
        if x.ndim == 4:
            x = x.contiguous(memory_format=self.layout)
        features, logits = self._run_ops(x) if self.stage.module is None else run_stage(self.stage, x)
        return channels_last(features), logits.contiguous()

    def _run_ops(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`run_stage`, with cuDNN's fused convolutions where there is one for the operation."""
        stage = self.stage
        values = {0: x}
        for op, dead in zip(stage.ops, stage.last_reads(), strict=True):
            inputs = [values[value] for value in op.reads]
            if isinstance(op, Conv2d) and is_fusible(op) and has_fused_conv(x.device, x.dtype):
                values[op.output] = fused_conv(op, inputs)
            else:
                values[op.output] = run_op(op, inputs, stage.shapes[op.output])
            for value in dead:
                del values[value]
        return values[stage.features], values[stage.logits]

    def report(self) -> StageReport:
        """One line per operation, after a line that says when the row count is read back."""
        module = self.stage.module
        work = [KernelChoice(str(op), "torch") for op in self.stage.ops]
        if module is not None:
            work = [KernelChoice("module", module_kernel(module))]
        return StageReport(
            name=self.stage.name,
            opaque_reason=self.reason,
            kernels=(
                KernelChoice("readback of row count", "one, none at the first stage"),
                *work,
            ),
            isa="torch",
            weight_bytes=self.stage.weight_bytes,
            arena_bytes=0,
        )


def _with_channels_last_weight(op: Op) -> Op:
    """A convolution with its weight in the layout of the features; otherwise cuDNN transposes per call."""
    if not isinstance(op, Conv2d):
        return op
    return replace(op, weight=op.weight.contiguous(memory_format=torch.channels_last))


def is_fusible(op: Conv2d) -> bool:
    """Whether cuDNN's convolution with bias, residual and ReLU computes this operation."""
    top, bottom, left, right = op.padding
    return op.activation == "relu" and top == bottom and left == right


def fused_conv(op: Conv2d, inputs: list[Tensor]) -> Tensor:
    """relu(conv(x) + bias + residual) in one pass, by cuDNN."""
    size = op.stride, (op.padding[0], op.padding[2]), op.dilation, op.groups
    if op.residual is None:
        return torch.cudnn_convolution_relu(inputs[0], op.weight, op.bias, *size)
    # The factor of the residual comes before the bias.
    return torch.cudnn_convolution_add_relu(inputs[0], op.weight, inputs[1], 1.0, op.bias, *size)


@cache
def has_fused_conv(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has cuDNN's fused convolution and its ReLU propagates NaN; tries it on one image.

    An instance with a NaN must stay invalid.
    """
    if device.type != "cuda" or torch.version.hip is not None or dtype == torch.float64:
        return False
    x = torch.full((1, 16, 4, 4), torch.nan, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.ones(16, 16, 1, 1, device=device, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    op = Conv2d(1, 0, weight, torch.zeros(16, device=device, dtype=dtype), activation="relu")
    try:
        outputs = fused_conv(op, [x]), fused_conv(replace(op, residual=0), [x, x])
    except RuntimeError:
        return False
    return all(bool(output.isnan().all()) for output in outputs)
