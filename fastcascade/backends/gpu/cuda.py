"""The cuda backend: CUDA C++ kernels, compiled by NVRTC through CuPy when the first is launched.

In fp16 the first stages run as one launch of the resident kernel, as many as fit. What follows runs stage by
stage between this backend's exit head and compaction: as Triton kernels where triton is installed and the
stage has them, through torch otherwise. Everything runs on torch's current stream of the device, so what a
program leaves there can be used without waiting.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial

import torch

from fastcascade.backends.gpu.estimates import estimate, launch_rates
from fastcascade.backends.gpu.layers import stage_layers
from fastcascade.backends.gpu.resident_stage import (
    ResidentChoice,
    ResidentStages,
    choose_resident,
    machine_of,
    missing_reason,
    reasons_in_words,
)
from fastcascade.backends.gpu.scheduler import BreadthFirstProgram, ExitKernels, StageRunner, next_inputs
from fastcascade.backends.gpu.stage_ways import VARIABLE, cannot_obey, forced_way
from fastcascade.backends.gpu.torch_stage import TorchStage
from fastcascade.backends.gpu.triton import stage_runner
from fastcascade.backends.interface import Precision
from fastcascade.errors import InvalidArgument
from fastcascade.kernels.cuda import compact, exit_head
from fastcascade.kernels.cuda.launch import DeviceLaunch, Launch
from fastcascade.kernels.cuda.resident import DeviceResident, ResidentLaunch
from fastcascade.kernels.cuda.resident_plan import A100, H100, Machine
from fastcascade.lowering.plan import Plan, StagePlan

__all__ = ["BACKEND", "CudaBackend", "Resident", "exit_kernels", "lower_with", "without_slower"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Resident:
    """What the resident kernel is started with; ``reason`` says why there is none."""

    launch: ResidentLaunch | None
    machine: Machine
    reason: str | None = None


def exit_kernels(launch: Launch) -> ExitKernels:
    """The CUDA C++ exit head and compaction, started by ``launch``."""
    return ExitKernels(
        name="cuda",
        new_keep=exit_head.new_keep,
        exit_head=partial(exit_head.exit_head, launch),
        compact_index=partial(compact.compact_index, launch),
        fill_holes=partial(compact.fill_holes, launch),
        gather_rows=partial(compact.gather_rows, launch),
    )


class CudaBackend:
    """The resident kernel for what fits, own exit heads and compaction around the rest."""

    name = "cuda"

    def unavailable_reason(self) -> str | None:
        """No NVIDIA GPU, or no CuPy."""
        missing = []
        if torch.version.hip is not None:
            missing.append("this torch is built for AMD GPUs, and the kernels are for NVIDIA's")
        elif torch.version.cuda is None:
            missing.append("this torch is built without CUDA")
        elif not torch.cuda.is_available():
            missing.append("torch sees no NVIDIA GPU")
        if importlib.util.find_spec("cupy") is None:
            missing.append("the package cupy is not installed")
        return " and ".join(missing) or None

    def unsupported_reason(self, plan: Plan, *, precision: Precision, device: torch.device) -> str | None:
        """A precision other than fp32 and fp16, or a device that is no NVIDIA GPU."""
        if precision not in DTYPES:
            return f"it runs fp32 and fp16, not {precision}"
        if device.type != "cuda":
            return f"it runs on NVIDIA GPUs, not on {device}"
        return None

    def lower(
        self, plan: Plan, *, precision: Precision, device: torch.device, threads: int | None
    ) -> BreadthFirstProgram:
        """Move weights to the device; the kernels are compiled at the first launch."""
        if threads is not None:
            raise InvalidArgument(f"threads={threads}: the cuda backend has no CPU threads; leave it out")
        template = H100 if torch.cuda.get_device_capability(device) >= (9, 0) else A100
        reason = missing_reason(device)
        resident = Resident(
            DeviceResident(device) if reason is None else None, machine_of(device, template), reason
        )
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
    """A program whose kernels are started by ``launch`` and ``resident``, on their device.

    Raises:
        BackendUnavailable: the environment wants a way to run stages that one of them cannot take.
    """
    kernels = exit_kernels(launch)
    choice = _choice(plan, precision, resident, triton)
    first = None
    if choice.stages and resident is not None and resident.launch is not None:
        first = ResidentStages(plan, choice, resident.launch)
    inputs = next_inputs(plan)
    runners = [
        _runner(plan, plan.stages[k], inputs[k], kernels, launch.device, precision, triton)
        for k in range(choice.stages, len(plan.stages))
    ]
    return BreadthFirstProgram(plan, runners, kernels, launch.device, first, choice.reasons)


def _choice(plan: Plan, precision: Precision, resident: Resident | None, triton: bool) -> ResidentChoice:
    """Which of the first stages run in one launch, and why the others do not."""
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
            raise cannot_obey(way, plan.stages[0].name, str(reason))
        return ResidentChoice(None, (reason,) * len(plan.stages))
    choice = choose_resident(plan, resident.machine)
    if way == "resident":
        if choice.stages < len(plan.stages):
            raise cannot_obey(way, plan.stages[choice.stages].name, reasons_in_words(choice.reasons))
        return choice
    return without_slower(plan, choice, resident.machine) if triton else choice


def without_slower(plan: Plan, choice: ResidentChoice, machine: Machine) -> ResidentChoice:
    """Leave out last stages that a launch per stage or per layer is estimated to run faster."""
    while choice.plan is not None:
        k = choice.stages - 1
        stage = plan.stages[k]
        own = estimate(choice.plan).stages[k]
        others = launch_rates(stage_layers(stage, torch.float16, torch.device("cpu")), machine)
        best = max(others, key=lambda way: others[way])
        independent = k + 1 == len(plan.stages) or plan.stages[k + 1].input == "image"
        if others[best] <= own.rate or stage.input != "image" or not independent:
            break
        why = (
            f"estimated: {own.rate / 1e6:.1f} M images/s resident, bound by {own.bound}, "
            f"and {others[best] / 1e6:.1f} M with {best}"
        )
        choice = choose_resident(plan, machine, stages=k, why=why)
    return choice


def _runner(
    plan: Plan,
    stage: StagePlan,
    next_input: str | None,
    kernels: ExitKernels,
    device: torch.device,
    precision: Precision,
    triton: bool,
) -> StageRunner:
    """A stage outside the resident launch."""
    way, dtype = forced_way(), DTYPES[precision]
    if triton:
        return stage_runner(stage, next_input, plan.input, kernels, device, dtype)
    if way in ("persistent", "layers"):
        raise cannot_obey(way, stage.name, "the package triton is not installed")
    why = f"{VARIABLE}=torch" if way == "torch" else "without triton only the resident kernel runs stages"
    return TorchStage(stage, stage.opaque_reason or why, plan.input, kernels, device, dtype)


BACKEND = CudaBackend()
