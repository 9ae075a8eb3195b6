"""The cuda backend: CUDA C++ kernels, compiled by NVRTC through CuPy at the first launch.

In fp16, as many of the first stages as fit run in one launch of the resident kernel. Each stage after them is
followed by this backend's exit head and compaction. It runs in Triton kernels if triton is installed and has
kernels for it, in torch otherwise. Everything runs on torch's current stream, so the results can be used on
that stream without synchronising.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial

import torch

from fastcascade.backends.gpu.estimates import launch_rates
from fastcascade.backends.gpu.layer_lowering import stage_layers
from fastcascade.backends.gpu.resident_stage import (
    ResidentChoice,
    ResidentStages,
    choose_resident,
    machine_of,
    missing_reason,
)
from fastcascade.backends.gpu.scheduler import (
    BreadthFirstProgram,
    ExitKernels,
    LoweringContext,
    StageRunner,
    next_inputs,
)
from fastcascade.backends.gpu.stage_ways import VARIABLE, forced_way, impossible_way
from fastcascade.backends.gpu.torch_stage import TorchStage
from fastcascade.backends.gpu.triton import stage_runner
from fastcascade.backends.interface import Precision
from fastcascade.errors import InvalidArgument
from fastcascade.kernels.cuda import compact, exit_head
from fastcascade.kernels.cuda.launch import DeviceLaunch, Launch
from fastcascade.kernels.cuda.machine import A100, H100, Machine
from fastcascade.kernels.cuda.resident import DeviceResident, ResidentLaunch
from fastcascade.lowering.plan import Plan, StagePlan

__all__ = ["BACKEND", "CudaBackend", "Resident", "exit_kernels", "lower_with", "without_slower"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Resident:
    """The launcher of the resident kernel and its GPU; without a launcher, ``reason`` says why."""

    launch: ResidentLaunch | None
    machine: Machine
    reason: str | None = None


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
    """The resident kernel for the stages that fit; custom exit heads and compaction around the others."""

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

    def unsupported_reason(
        self, plan: Plan | None, *, precision: Precision, device: torch.device
    ) -> str | None:
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
        template = H100 if torch.cuda.get_device_capability(device) >= (9, 0) else A100
        reason = missing_reason(device)
        launch = DeviceResident(device) if reason is None else None
        resident = Resident(launch, machine_of(device, template), reason)
        triton = importlib.util.find_spec("triton") is not None
        return lower_with(DeviceLaunch(device), plan, precision, resident, triton=triton)


def lower_with(
    launch: Launch,
    plan: Plan,
    precision: Precision,
    resident: Resident | None = None,
    *,
    triton: bool = False,
) -> BreadthFirstProgram:
    """Lower a plan to a program whose kernels ``launch`` and ``resident`` start, on their device.

    Args:
        triton: stages that are not resident may run in Triton kernels.

    Raises:
        BackendUnavailable: the environment forces a way in which one of the stages cannot run.
    """
    kernels = exit_kernels(launch)
    context = LoweringContext(plan.input, kernels, launch.device, DTYPES[precision])
    choice = _choose(plan, precision, resident, triton)
    first = None
    if choice.stages and resident is not None and resident.launch is not None:
        first = ResidentStages(plan, choice, resident.launch)
    rest = list(zip(plan.stages, next_inputs(plan), strict=True))[choice.stages :]
    runners = [_stage_runner(context, stage, next_input, triton) for stage, next_input in rest]
    return BreadthFirstProgram(plan, runners, kernels, launch.device, first, choice.reasons)


def _choose(plan: Plan, precision: Precision, resident: Resident | None, triton: bool) -> ResidentChoice:
    """Which of the first stages run in one launch, and the reasons against the others."""
    way = forced_way()
    reason = None
    if resident is None:
        reason = "this program has no resident kernel"
    elif resident.reason is not None:
        reason = resident.reason
    elif precision != "fp16":
        reason = f"the resident kernel computes in fp16, not {precision}"
    elif way not in (None, "resident"):
        reason = f"{VARIABLE}={way}"
    if reason is not None or resident is None:
        if way == "resident":
            raise impossible_way(way, plan.stages[0].name, str(reason))
        return ResidentChoice(None, (reason,) * len(plan.stages))
    choice = choose_resident(plan, resident.machine)
    if way == "resident":
        if choice.stages < len(plan.stages):
            reasons = "; ".join(reason for reason in choice.reasons if reason is not None)
            raise impossible_way(way, plan.stages[choice.stages].name, reasons)
        return choice
    return without_slower(plan, choice, resident.machine) if triton else choice


def without_slower(plan: Plan, choice: ResidentChoice, machine: Machine) -> ResidentChoice:
    """Drop last stages that one launch per stage or per layer runs faster, as estimated."""
    while choice.plan is not None:
        k = choice.stages - 1
        stage = plan.stages[k]
        own = choice.plan.estimate(k)
        others = launch_rates(stage_layers(stage, torch.float16, torch.device("cpu")), machine)
        best = max(others, key=lambda way: others[way])
        independent = k + 1 == len(plan.stages) or plan.stages[k + 1].input == "image"
        if others[best] <= own.rate or stage.input != "image" or not independent:
            break
        why = (
            f"estimated: {own.rate / 1e6:.1f} M images/s resident, bound by {own.bound}, "
            f"and {others[best] / 1e6:.1f} M with {best}"
        )
        choice = choose_resident(plan, machine, most_stages=k, why=why)
    return choice


def _stage_runner(
    context: LoweringContext, stage: StagePlan, next_input: str | None, triton: bool
) -> StageRunner:
    """The runner of a stage that is not resident."""
    if triton:
        return stage_runner(context, stage, next_input)
    way = forced_way()
    if way in ("persistent", "layers"):
        raise impossible_way(way, stage.name, "the package triton is not installed")
    reason = f"{VARIABLE}=torch" if way == "torch" else "without triton only the resident kernel runs stages"
    return TorchStage(context, stage, stage.opaque_reason or reason)


BACKEND = CudaBackend()
