"""The first stages of a cascade in one launch of the resident kernel, exits included.

They are as many of the first stages as fit: the kernel has all their layers, and shared memory holds their
activations. The reason against a stage names the layer. The other stages run after the launch.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcascade.backends.gpu.layer_lowering import no_kernel_reason, stage_layers
from fastcascade.backends.interface import KernelChoice, StageReport
from fastcascade.kernels.cuda.exit_head import new_keep
from fastcascade.kernels.cuda.machine import BLOCK_RESERVE, Machine
from fastcascade.kernels.cuda.resident import ResidentLaunch, resident, resident_exits
from fastcascade.kernels.cuda.resident_plan import ResidentPlan, plan_resident
from fastcascade.kernels.cuda.resident_steps import (
    ACTIVATIONS,
    LARGEST_HALF,
    DoesNotFit,
    StageLayers,
    Step,
    stage_steps,
)
from fastcascade.kernels.cuda.resident_table import resident_table
from fastcascade.kernels.reference import ExitTables, MLPWeights
from fastcascade.lowering.interpreter import move_stage, run_op
from fastcascade.lowering.operations import Flip
from fastcascade.lowering.plan import Plan, SelectorPlan, StagePlan

__all__ = [
    "ResidentChoice",
    "ResidentStages",
    "choose_resident",
    "machine_of",
    "overflow_reasons",
    "without_mirror",
]

HEADROOM = 4.0
"""Factor by which activations on the probe images must stay below the largest fp16 number."""

PROBES = 8
"""Number of probe images."""


class ResidentChoice(NamedTuple):
    """The stages that run in one launch.

    Attributes:
        plan: the kernel's plan for them; None if not even the first stage fits.
        reasons: for each stage, why it is not among them; None if it is.
    """

    plan: ResidentPlan | None
    reasons: tuple[str | None, ...]

    @property
    def stages(self) -> int:
        """Number of stages in the launch."""
        return sum(reason is None for reason in self.reasons)


def machine_of(device: torch.device, template: Machine) -> Machine:
    """The planner's description of a GPU; rates that CUDA does not report are scaled from the template."""
    properties = torch.cuda.get_device_properties(device)
    share = properties.multi_processor_count / template.multiprocessors
    return template._replace(
        name=properties.name,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        shared_block=properties.shared_memory_per_multiprocessor - BLOCK_RESERVE,
        shared_multiprocessor=properties.shared_memory_per_multiprocessor,
        l2_bytes=template.l2_bytes * share,
    )


def choose_resident(
    plan: Plan,
    machine: Machine,
    images: Tensor | None = None,
    *,
    most_stages: int | None = None,
    why: str = "",
) -> ResidentChoice:
    """Choose as many of the first stages as fit.

    Args:
        images: a calibration batch for :func:`overflow_reasons`.
        most_stages: the limit, if any; why: the reason against the stages beyond it.
    """
    reasons: list[str | None] = []
    steps: list[list[Step]] = []
    lowered: list[StageLayers] = []
    best: ResidentPlan | None = None
    overflows = overflow_reasons(plan, images)
    for k, stage in enumerate(plan.stages):
        try:
            if len(steps) < k:
                raise DoesNotFit("a stage before it does not fit")
            if k == most_stages:
                raise DoesNotFit(why)
            lowered.append(_stage(plan, k))
            found = stage_steps(lowered[-1], plan.input.shape)
            if overflows[k] is not None:
                raise DoesNotFit(str(overflows[k]))
            best = plan_resident(
                [*steps, found],
                [s.kept for s in lowered],
                [s.previous for s in lowered],
                plan.num_classes,
                machine,
                [s.name for s in plan.stages[: k + 1]],
            )
            steps.append(found)
            reasons.append(None)
        except DoesNotFit as error:
            reasons.append(f"stage {stage.name!r}: {error}" if len(steps) == k else str(error))
    return _without_open_end(plan, machine, steps, lowered, reasons, best)


def _without_open_end(
    plan: Plan,
    machine: Machine,
    steps: list[list[Step]],
    lowered: list[StageLayers],
    reasons: list[str | None],
    best: ResidentPlan | None,
) -> ResidentChoice:
    """Drop last stages whose features a stage outside the launch reads: they stay in shared memory."""
    count = len(steps)
    while 0 < count < len(plan.stages) and plan.stages[count].input == "previous":
        count -= 1
        reasons[count] = (
            f"stage {plan.stages[count].name!r}: the next stage, which does not fit, reads its features"
        )
    if count == len(steps):
        return ResidentChoice(best, tuple(reasons))
    if count == 0:
        return ResidentChoice(None, tuple(reasons))
    kept, previous = [s.kept for s in lowered[:count]], [s.previous for s in lowered[:count]]
    names = [s.name for s in plan.stages[:count]]
    shorter = plan_resident(steps[:count], kept, previous, plan.num_classes, machine, names)
    return ResidentChoice(shorter, tuple(reasons))


def without_mirror(stage: StagePlan) -> tuple[StagePlan, bool]:
    """The stage on the mirror image of what it was on, and whether it begins by mirroring the image."""
    flips = [op for op in stage.ops if isinstance(op, Flip) and op.input == 0]
    readers = [op for op in stage.ops if 0 in op.reads]
    if stage.input != "image" or len(flips) != 1 or readers != flips or stage.features == flips[0].output:
        return stage, False
    flip = flips[0]
    ops = [op for op in stage.ops if op is not flip]
    moved = [
        replace(op, **{name: 0 for name in op.operands if getattr(op, name) == flip.output}) for op in ops
    ]
    return replace(stage, ops=tuple(moved)), True


def _stage(plan: Plan, k: int) -> StageLayers:
    stage, mirror = without_mirror(plan.stages[k])
    next_input = plan.stages[k + 1].input if k + 1 < len(plan.stages) else None
    if stage.selector is not None and stage.selector.kind == "opaque":
        raise DoesNotFit("its selector is a custom module")
    reason = no_kernel_reason(stage, next_input, tuple(ACTIVATIONS))
    if reason is not None:
        raise DoesNotFit(reason)
    layers = stage_layers(stage, torch.float32, torch.device("cpu"))
    kept = stage.features if next_input == "previous" else None
    return StageLayers(stage.name, layers, kept, stage.input == "previous", mirror)


def probe_images(plan: Plan) -> Tensor:
    """Images with large activations: noise, black, white, and stripes of both."""
    shape = plan.input.shape
    generator = torch.Generator().manual_seed(0)
    if plan.input.preprocess is None:
        return 3 * torch.randn(PROBES, *shape, generator=generator)
    noise = torch.randint(0, 256, (PROBES - 4, *shape), generator=generator).to(torch.uint8)
    stripes = torch.zeros(4, *shape, dtype=torch.uint8)
    stripes[1], stripes[2, :, ::2], stripes[3, :, :, ::4] = 255, 255, 255
    return torch.cat([noise, stripes])


@torch.no_grad()
def overflow_reasons(plan: Plan, images: Tensor | None = None) -> list[str | None]:
    """For each stage, which operation may overflow fp16, found by running the plan in fp32; None if none.

    Args:
        images: a calibration batch (N, C, H, W), whose values must fit. The default is a synthetic batch,
            whose values must fit with a factor of :data:`HEADROOM`.
    """
    limit = LARGEST_HALF / HEADROOM if images is None else LARGEST_HALF
    batch = probe_images(plan) if images is None else images
    x = plan.input.to_float(batch).float()
    reasons: list[str | None] = []
    previous = x
    for stage in plan.stages:
        if stage.module is not None:
            reasons += [None] * (len(plan.stages) - len(reasons))
            break
        values = {0: x if stage.input == "image" else previous}
        reason = None
        for op in stage.ops:
            values[op.output] = run_op(op, [values[v] for v in op.reads], stage.shapes[op.output])
            largest = float(values[op.output].abs().max())
            if reason is None and op.output != stage.logits and not largest <= limit:
                what = "the probe images" if images is None else "the calibration images"
                reason = f"{op}: values of up to {largest:,.0f} on {what}; fp16 ends at {LARGEST_HALF:,.0f}"
        reasons.append(reason)
        previous = values[stage.features]
    return reasons


class ResidentStages:
    """The stages of :func:`choose_resident`, ready to launch.

    Args:
        choice: has a plan.
        launch: starts the kernel.
    """

    def __init__(self, plan: Plan, choice: ResidentChoice, launch: ResidentLaunch) -> None:
        assert choice.plan is not None
        self.plan = plan
        self.stages = choice.stages
        self.layout = choice.plan
        self.launch = launch
        device = launch.device
        self.table = resident_table(choice.plan).to(device)
        self.selectors = [self._selector(stage, device) for stage in plan.stages[: self.stages]]
        self.exits = resident_exits(self.selectors, plan.stage_weights[: self.stages]).to(device)
        preprocess = plan.input.preprocess
        self.pixel_table = None if preprocess is None else preprocess.table().half().to(device)

    def _selector(self, stage: StagePlan, device: torch.device) -> tuple[str | None, MLPWeights | None]:
        moved: SelectorPlan | None = move_stage(stage, device, torch.float32).selector
        if moved is None:
            return None, None
        weights = moved.weights
        return (
            moved.features or moved.kind,
            None if weights is None else MLPWeights(*(w.contiguous() for w in weights)),
        )

    def run(self, images: Tensor, tables: ExitTables, thresholds: Tensor) -> Any:
        """Run the stages on every image; returns which stay active, or None if no stage is left.

        Args:
            images: (N, C, H, W) uint8 or float32, any strides; thresholds: on the device.
        """
        keep = None
        if self.stages < len(self.plan.stages):
            keep = new_keep(len(images), self.plan.num_classes, images.device)
            keep.counts.zero_()
        resident(
            self.launch,
            self.table,
            self.exits,
            images,
            tables,
            thresholds,
            pixel_table=self.pixel_table if images.dtype == torch.uint8 else None,
            keep=keep,
        )
        return keep

    def reports(self, isa: str) -> list[StageReport]:
        """One report per stage: the launch, its layers, its exit."""
        machine, layout = self.layout.machine, self.layout
        at_once = machine.multiprocessors * layout.blocks
        schedule = (
            f"resident: {self.stages} stage{'s' * (self.stages > 1)} with exits in one launch; an image has "
            f"{layout.warps} warps and {layout.shared_bytes >> 10} KiB of shared memory, and "
            f"{layout.blocks} run on a multiprocessor at once"
        )
        below = f"below {at_once:,} images some multiprocessors of {machine.name} are idle"
        reports = []
        for k, stage in enumerate(self.plan.stages[: self.stages]):
            entries, found = layout.stage(k), layout.estimate(k)
            rate = f"estimated: {found.rate / 1e6:.1f} M images/s, bound by {found.bound}"
            weights = sum(e.step.weight.numel() * 2 for e in entries if e.step.weight is not None)
            reports.append(
                StageReport(
                    name=stage.name,
                    opaque_reason=None,
                    kernels=(
                        KernelChoice(
                            "schedule", schedule if k == 0 else "resident: in the first stage's launch"
                        ),
                        KernelChoice("speed", f"{rate}; {below}"),
                        *(
                            KernelChoice(e.step.label, _kernel_name(e.step))
                            for e in entries
                            if e.step.kind != "image"
                        ),
                        KernelChoice(
                            "exit head, last exit"
                            if stage.selector is None
                            else f"exit head, selector {stage.selector}",
                            "cuda resident",
                        ),
                    ),
                    isa=isa,
                    weight_bytes=weights,
                    arena_bytes=layout.shared_bytes,
                )
            )
        return reports


def _kernel_name(step: Step) -> str:
    group = f", {step.images} images at once" if step.images > 1 else ""
    return f"cuda resident, {step.kind}{group}"


def missing_reason(device: torch.device) -> str | None:
    """Why the resident kernel cannot run on a device at all; None if it can."""
    if importlib.util.find_spec("cupy") is None:
        return "the package cupy is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs sm_80; this GPU is sm_{capability[0]}{capability[1]}"
    return None
