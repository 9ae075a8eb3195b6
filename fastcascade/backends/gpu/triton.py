"""The triton backend: exit head, compaction and stages in Triton kernels, on NVIDIA and AMD GPUs.

``TRITON_INTERPRET=1`` runs the kernels on the CPU: slow, and meant for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from fastcascade.backends.gpu.scheduler import (
    BreadthFirstProgram,
    ExitKernels,
    LoweringContext,
    StageRunner,
    next_inputs,
)
from fastcascade.backends.gpu.stage_ways import VARIABLE, forced_way, impossible_way
from fastcascade.backends.gpu.torch_stage import TorchStage
from fastcascade.backends.interface import Precision
from fastcascade.errors import InvalidArgument
from fastcascade.lowering.plan import Plan, StagePlan

__all__ = ["BACKEND", "TritonBackend"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def exit_kernels() -> ExitKernels:
    """The Triton exit head and compaction."""
    from fastcascade.kernels.triton import compact, exit_head

    return ExitKernels(
        name="triton",
        new_keep=exit_head.new_keep,
        exit_head=exit_head.exit_head,
        compact_index=compact.compact_index,
        fill_holes=compact.fill_holes,
        gather_rows=compact.gather_rows,
    )


def stage_runner(context: LoweringContext, stage: StagePlan, next_input: str | None) -> StageRunner:
    """The first that can run the stage: a persistent kernel, one launch per layer, torch.

    The report gives the reason against each that cannot.

    Raises:
        BackendUnavailable: the environment forces a way in which this stage cannot run.
    """
    from fastcascade.backends.gpu.layer_lowering import no_kernel_reason, stage_layers
    from fastcascade.backends.gpu.per_layer_stage import PerLayerStage
    from fastcascade.backends.gpu.persistent_stage import PersistentStage, per_layer_reason
    from fastcascade.kernels.triton.persistent import layer_table

    way = forced_way()
    if way == "torch":
        return TorchStage(context, stage, f"{VARIABLE}=torch")
    if way == "resident":
        raise impossible_way(way, stage.name, "only the cuda backend has the resident kernel")
    reason = no_kernel_reason(stage, next_input)
    if reason is not None:
        if way is not None:
            raise impossible_way(way, stage.name, reason)
        return TorchStage(context, stage, reason)
    spec, device, dtype = context.spec, context.device, context.dtype
    layers = stage_layers(stage, dtype, device)
    table = layer_table(layers, stage.features if next_input == "previous" else None)
    reason = f"{VARIABLE}=layers" if way == "layers" else per_layer_reason(stage, layers, table)
    if reason is not None and way == "persistent":
        raise impossible_way(way, stage.name, reason)
    if reason is not None:
        return PerLayerStage(stage, spec, layers, device, dtype, reason)
    return PersistentStage(stage, spec, layers, table)


class TritonBackend:
    """Custom kernels for stages that are operations, torch for the others."""

    name = "triton"

    def unavailable_reason(self) -> str | None:
        """Triton is missing, or there is neither a GPU nor the interpreter."""
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and not _interpreted():
            return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
        return None

    def unsupported_reason(
        self, plan: Plan | None, *, precision: Precision, device: torch.device
    ) -> str | None:
        """The precision is neither fp32 nor fp16, or Triton does not run on the device."""
        if precision not in DTYPES:
            return f"it runs fp32 and fp16, not {precision}"
        wanted = "cpu" if _interpreted() else "cuda"
        if device.type != wanted:
            why = "under TRITON_INTERPRET=1 it runs on the CPU" if _interpreted() else "it runs on GPUs"
            return f"{why}, not on {device}"
        return None

    def lower(
        self, plan: Plan, *, precision: Precision, device: torch.device, threads: int | None
    ) -> BreadthFirstProgram:
        """Move the weights to the device and choose a runner for each stage."""
        if threads is not None:
            raise InvalidArgument(f"threads={threads}: the triton backend has no CPU threads; omit threads")
        kernels = exit_kernels()
        context = LoweringContext(plan.input, kernels, device, DTYPES[precision])
        runners = [
            stage_runner(context, stage, next_input)
            for stage, next_input in zip(plan.stages, next_inputs(plan), strict=True)
        ]
        return BreadthFirstProgram(plan, runners, kernels, device)


BACKEND = TritonBackend()
