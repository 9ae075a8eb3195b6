"""The triton backend: exit head, compaction and lowered stages as Triton kernels, on NVIDIA and AMD GPUs.

Under ``TRITON_INTERPRET=1`` it runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from fastcascade.backends import Precision
from fastcascade.backends.breadth_first import BreadthFirstProgram, ExitKernels, StageRunner, TorchStage
from fastcascade.errors import InvalidArgument
from fastcascade.plan import Plan

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

        from fastcascade.backends.fused import FusedStage, unfused_reason

        inputs: list[str | None] = [*(stage.input for stage in plan.stages[1:]), None]
        runners: list[StageRunner] = []
        for stage, next_input in zip(plan.stages, inputs, strict=True):
            reason = unfused_reason(stage, next_input)
            if reason is None:
                runners.append(FusedStage(stage, plan.input, device, dtype, plan.num_classes))
            else:
                runners.append(TorchStage(stage, reason, plan.input, kernels, device, dtype))
        return BreadthFirstProgram(plan, runners, kernels, device)


BACKEND = TritonBackend()
