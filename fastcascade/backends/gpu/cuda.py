"""The cuda backend: stages in torch and cuDNN, exit head and compaction in CUDA C++ kernels.

NVRTC compiles the kernels through CuPy at the first launch. They run on torch's current stream, so the
results can be used on that stream without synchronising.
"""

from __future__ import annotations

import importlib.util
from functools import partial

import torch

from fastcascade.backends.gpu.scheduler import (
    BreadthFirstProgram,
    ExitKernels,
    LoweringContext,
    next_inputs,
)
from fastcascade.backends.gpu.torch_stage import torch_stage
from fastcascade.backends.gpu.while_loops import LoopChoice, choose_loops
from fastcascade.backends.interface import Precision
from fastcascade.errors import InvalidArgument
from fastcascade.kernels.cuda import compact, exit_head
from fastcascade.kernels.cuda.launch import DeviceLaunch, Launch
from fastcascade.lowering.plan import Plan

__all__ = ["BACKEND", "CudaBackend", "exit_kernels"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def exit_kernels(launch: Launch) -> ExitKernels:
    """The CUDA C++ exit head and compaction, launched by ``launch``."""
    return ExitKernels(
        name="cuda",
        new_keep=exit_head.new_keep,
        exit_head=partial(exit_head.exit_head, launch),
        compact_index=partial(compact.compact_index, launch),
        fill_holes=partial(compact.fill_holes, launch),
        gather_rows=partial(compact.gather_rows, launch),
    )


class CudaBackend:
    """Custom kernels for exit heads and compaction; torch and cuDNN for the stages."""

    name = "cuda"

    def unavailable_reason(self) -> str | None:
        """There is no NVIDIA GPU, or CuPy is missing."""
        missing = []
        if torch.version.hip is not None:
            missing.append("this torch is built for AMD GPUs; the kernels need an NVIDIA GPU")
        elif torch.version.cuda is None:
            missing.append("this torch is built without CUDA")
        elif not torch.cuda.is_available():
            missing.append("torch sees no NVIDIA GPU")
        if importlib.util.find_spec("cupy") is None:
            missing.append("the package cupy is not installed")
        return " and ".join(missing) or None

    def unsupported_reason(self, plan: Plan, *, precision: Precision, device: torch.device) -> str | None:
        """The precision is neither fp32 nor fp16, or the device is not an NVIDIA GPU."""
        if precision not in DTYPES:
            return f"it runs fp32 and fp16, not {precision}"
        if device.type != "cuda":
            return f"it runs on NVIDIA GPUs, not on {device}"
        return None

    def lower(
        self, plan: Plan, *, precision: Precision, device: torch.device, threads: int | None
    ) -> BreadthFirstProgram:
        """Move the weights to the device; the kernels are compiled at the first launch."""
        if threads is not None:
            raise InvalidArgument(f"threads={threads}: the cuda backend has no CPU threads; omit threads")
        return lower_with(DeviceLaunch(device), plan, precision, choose_loops(device))


def lower_with(launch: Launch, plan: Plan, precision: Precision, loops: LoopChoice) -> BreadthFirstProgram:
    """Lower a plan to a program whose kernels ``launch`` starts, on its device."""
    kernels = exit_kernels(launch)
    context = LoweringContext(plan.input, kernels, launch.device, DTYPES[precision], loops)
    reason = "the cuda backend leaves stages to torch and cuDNN"
    runners = [
        torch_stage(context, stage, next_input, stage.opaque_reason or reason)
        for stage, next_input in zip(plan.stages, next_inputs(plan), strict=True)
    ]
    return BreadthFirstProgram(plan, runners, kernels, launch.device)


BACKEND = CudaBackend()
