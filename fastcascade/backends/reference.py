"""The reference backend: a plan in plain torch, on any device that torch supports.

It runs breadth-first: a stage over the whole active set, the exit head, compaction, the next stage. The other
backends are tested against it, and it runs the plans that they cannot.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from fastcascade.backends.float32_precision import exact_float32
from fastcascade.backends.interface import ExitResults, KernelChoice, Precision, StageReport
from fastcascade.backends.torch_module import module_kernel
from fastcascade.errors import InvalidArgument
from fastcascade.kernels.reference import (
    ExitTables,
    compact_index,
    exit_head,
    exit_step,
    exit_tables,
    fill_holes,
)
from fastcascade.lowering.interpreter import move_stage, run_stage
from fastcascade.lowering.plan import Plan, StagePlan

__all__ = [
    "BACKEND",
    "ReferenceProgram",
]


class ReferenceProgram:
    """A plan with its weights on one device."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = replace(
            plan, stages=tuple(move_stage(stage, device, torch.float32) for stage in plan.stages)
        )
        self.device = device

    @torch.no_grad()
    @exact_float32()
    def run(self, x: Tensor, thresholds: Tensor) -> ExitResults:
        """Classify a batch; see :meth:`fastcascade.backends.interface.Program.run`."""
        plan = self.plan
        images = rows = plan.input.to_float(x)
        tables = exit_tables(len(x), plan.num_classes, self.device)
        index = torch.arange(len(x), device=self.device)
        for k, (stage, threshold) in enumerate(
            zip(plan.stages, [*thresholds.tolist(), -math.inf], strict=True)
        ):
            features, logits = run_stage(stage, images[index] if stage.input == "image" else rows)
            keep = self._exit(tables, logits, index, k, threshold)
            if k + 1 < len(plan.stages) and plan.stages[k + 1].input == "previous":
                rows = features.contiguous()
                survivors = fill_holes(rows, index, keep)
                rows, index = rows[:survivors], index[:survivors]
            else:
                index = compact_index(index, keep)
            if len(index) == 0:
                break
        return ExitResults(tables.log_probs, tables.label, tables.exit_stage)

    def _exit(self, tables: ExitTables, logits: Tensor, index: Tensor, k: int, threshold: float) -> Tensor:
        selector = self.plan.stages[k].selector
        if selector is not None and selector.module is not None:
            module = selector.module
            return exit_step(
                tables,
                logits,
                index,
                k,
                stage_weight=self.plan.stage_weights[k],
                score=lambda log_probs, previous, _: cast(Tensor, module(k, log_probs, previous)),
                threshold=threshold,
            )
        return exit_head(
            tables,
            logits,
            index,
            k,
            stage_weight=self.plan.stage_weights[k],
            selector=None if selector is None else selector.features or selector.kind,
            weights=None if selector is None else selector.weights,
            threshold=threshold,
        )

    def describe(self) -> list[StageReport]:
        """One report per stage."""
        return [_report(stage) for stage in self.plan.stages]


def _report(stage: StagePlan) -> StageReport:
    selector = "last exit" if stage.selector is None else f"selector {stage.selector}"
    module = () if stage.module is None else (KernelChoice("module", module_kernel(stage.module)),)
    return StageReport(
        name=stage.name,
        opaque_reason=stage.opaque_reason,
        kernels=(
            *module,
            *(KernelChoice(str(op), "torch") for op in stage.ops),
            KernelChoice(f"exit head, {selector}", "torch"),
        ),
        isa="torch",
        weight_bytes=stage.weight_bytes,
        arena_bytes=0,
    )


class ReferenceBackend:
    """Plain torch; runs every plan."""

    name = "reference"

    def unavailable_reason(self) -> str | None:
        """None: torch is always available."""
        return None

    def unsupported_reason(
        self, plan: Plan | None, *, precision: Precision, device: torch.device
    ) -> str | None:
        """The precision is neither fp32 nor int8, or torch cannot use the device."""
        if precision not in ("fp32", "int8"):
            return f"it runs fp32 and int8, not {precision}"
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            return f"torch cannot use {device}: {str(error).splitlines()[0]}"
        return None

    def lower(
        self, plan: Plan, *, precision: Precision, device: torch.device, threads: int | None
    ) -> ReferenceProgram:
        """Copy the plan's weights to the device."""
        if threads is not None:
            raise InvalidArgument(
                f"threads={threads}: the reference backend runs on torch's own threads; "
                "omit threads and call torch.set_num_threads"
            )
        return ReferenceProgram(plan, device)


BACKEND = ReferenceBackend()
