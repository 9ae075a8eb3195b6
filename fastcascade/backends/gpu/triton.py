"""The triton backend: exit head, compaction and lowered stages as Triton kernels, on NVIDIA and AMD GPUs.

Under ``TRITON_INTERPRET=1`` it runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from fastcascade.backends.gpu.scheduler import BreadthFirstProgram, ExitKernels, StageRunner, next_inputs
from fastcascade.backends.gpu.stage_ways import VARIABLE, cannot_obey, forced_way
from fastcascade.backends.gpu.torch_stage import TorchStage
from fastcascade.backends.interface import Precision
from fastcascade.errors import InvalidArgument
from fastcascade.lowering.plan import Plan, StagePlan
from fastcascade.types import InputSpec

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


def stage_runner(
    stage: StagePlan,
    next_input: str | None,
    spec: InputSpec,
    kernels: ExitKernels,
    device: torch.device,
    dtype: torch.dtype,
) -> StageRunner:
    """The first of: one launch for the stage, a launch per layer, torch. Reasons end up in the report.

    Raises:
        BackendUnavailable: the environment wants a way that this stage cannot take.
    """
    from fastcascade.backends.gpu.layers import no_kernel_reason, stage_layers
    from fastcascade.backends.gpu.per_layer_stage import PerLayerStage
    from fastcascade.backends.gpu.persistent_stage import PersistentStage, per_layer_reason
    from fastcascade.kernels.triton.persistent import layer_table

    way = forced_way()
    reason = no_kernel_reason(stage, next_input)
    if way == "torch":
        return TorchStage(stage, f"{VARIABLE}=torch", spec, kernels, device, dtype)
    if way == "resident":
        raise cannot_obey(way, stage.name, "only the cuda backend has the resident kernel")
    if reason is not None:
        if way is not None:
            raise cannot_obey(way, stage.name, reason)
        return TorchStage(stage, reason, spec, kernels, device, dtype)
    layers = stage_layers(stage, dtype, device)
    table = layer_table(layers, stage.features if next_input == "previous" else None)
    reason = f"{VARIABLE}=layers" if way == "layers" else per_layer_reason(stage, layers, table)
    if reason is not None and way == "persistent":
        raise cannot_obey(way, stage.name, reason)
    if reason is not None:
        return PerLayerStage(stage, spec, layers, device, dtype, reason)
    return PersistentStage(stage, spec, layers, table)


class TritonBackend:
    """Own kernels for what a plan expresses, torch for the rest."""

    name = "triton"

    def unavailable_reason(self) -> str | None:
        """No triton, or neither a GPU nor the interpreter."""
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and not _interpreted():
            return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
        return None

    def unsupported_reason(self, plan: Plan, *, precision: Precision, device: torch.device) -> str | None:
        """A precision other than fp32 and fp16, or a device that triton does not reach."""
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
        """Move weights to the device and choose how each stage runs."""
        if threads is not None:
            raise InvalidArgument(f"threads={threads}: the triton backend has no CPU threads; leave it out")
        kernels = exit_kernels()
        dtype = DTYPES[precision]
        runners = [
            stage_runner(stage, next_input, plan.input, kernels, device, dtype)
            for stage, next_input in zip(plan.stages, next_inputs(plan), strict=True)
        ]
        return BreadthFirstProgram(plan, runners, kernels, device)


BACKEND = TritonBackend()
