"""The breadth-first schedule of the GPU backends: each stage runs over the whole active set.

Exit head and compaction follow every stage.

The number of active rows stays on the device, where the custom kernels read it. Between two stages that run
in custom kernels the host waits for nothing. A stage that runs in torch reads the number back once, to size
its batch. On NVIDIA GPUs the first stages may run in one launch together with their exits
(:mod:`fastcascade.backends.gpu.resident_stage`); the schedule then begins with the images that they leave.

Feature rows are contiguous (rows, H, W, C) or (rows, F), one row per instance. The view with the channels
first is what torch calls channels_last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from fastcascade.backends.float32_precision import exact_float32
from fastcascade.backends.gpu.stage_report import architecture
from fastcascade.backends.interface import ExitResults, KernelChoice, StageReport
from fastcascade.errors import FastCascadeError
from fastcascade.kernels.reference import ExitTables, MLPWeights, exit_step, exit_tables
from fastcascade.lowering.interpreter import move_stage
from fastcascade.lowering.plan import Plan
from fastcascade.types import InputSpec

__all__ = [
    "Active",
    "BreadthFirstProgram",
    "ExitKernels",
    "FirstStages",
    "LoweringContext",
    "StageRunner",
    "next_inputs",
]

MAX_ROWS = 65_536
"""Larger batches run in parts. This bounds the buffers and the row counts of the compaction kernels."""


class ExitKernels(NamedTuple):
    """The exit head and compaction of one backend; signatures as in ``kernels/triton``."""

    name: str
    new_keep: Callable[..., Any]
    exit_head: Callable[..., None]
    compact_index: Callable[..., None]
    fill_holes: Callable[..., None]
    gather_rows: Callable[..., None]


class LoweringContext(NamedTuple):
    """What all stages of one program have in common.

    Attributes:
        spec: the images that the program takes.
        kernels: the backend's exit head and compaction.
        device, dtype: where the stages run, and in which precision.
    """

    spec: InputSpec
    kernels: ExitKernels
    device: torch.device
    dtype: torch.dtype


@dataclass
class Active:
    """The active set.

    Attributes:
        index: (capacity,) int32 positions in the batch; the first ``count`` are active.
        count: (1,) int32 on the device.
        known: the count, if the host knows it.
        features: (capacity, …) of the previous stage, if the next stage reads them.
    """

    index: Tensor
    count: Tensor
    known: int | None
    features: Tensor | None = None


class StageRunner(Protocol):
    """One lowered stage."""

    def run(self, images: Tensor, active: Active) -> tuple[Tensor, Tensor]:
        """Run the stage on the active rows.

        Args:
            images: (N, C, H, W), the whole batch, uint8 or float32, any strides.
            active: has ``features`` if the stage reads the previous one.

        Returns:
            features (rows, …) channels last and logits (rows, classes), with at least ``count`` rows each.
        """

    def report(self) -> StageReport:
        """The stage's report, without the exit head."""


class FirstStages(Protocol):
    """The first stages with their exits, in one launch.

    Attributes:
        stages: how many.
    """

    stages: int

    def run(self, images: Tensor, tables: ExitTables, thresholds: Tensor) -> Any:
        """Run them on every image; returns which images stay active, or None if no stage is left."""

    def reports(self, isa: str) -> list[StageReport]:
        """The stages' reports, exit heads included."""


def next_inputs(plan: Plan) -> list[str | None]:
    """For each stage, what the stage after it reads; None for the last."""
    return [*(stage.input for stage in plan.stages[1:]), None]


@dataclass
class _Batch:
    """The state of one batch on its way through the stages."""

    images: Tensor
    thresholds: Tensor  # (K−1,) on the device
    tables: ExitTables
    active: Active


class BreadthFirstProgram:
    """A lowered plan: one runner per stage, with the backend's exit head and compaction in between.

    Args:
        runners: one for each stage after ``first``.
        first: runs the stages before them; None if every stage has a runner.
        reasons: for each stage, why it is not in ``first``; None if there is nothing to report.
    """

    def __init__(
        self,
        plan: Plan,
        runners: list[StageRunner],
        kernels: ExitKernels,
        device: torch.device,
        first: FirstStages | None = None,
        reasons: Sequence[str | None] = (),
    ) -> None:
        self.plan = plan
        self.first = first
        self.reasons = reasons or [None] * len(plan.stages)
        self.runners = runners
        self.kernels = kernels
        self.device = device
        moved = [move_stage(replace(s, ops=(), module=None), device, torch.float32) for s in plan.stages]
        self.selectors = [stage.selector for stage in moved]

    @torch.no_grad()
    @exact_float32()
    def run(self, x: Tensor, thresholds: Tensor) -> ExitResults:
        """Classify a batch on the current stream; see :meth:`fastcascade.backends.interface.Program.run`.

        Raises:
            FastCascadeError: the device ran out of memory, or a stage failed; names the stage or a remedy.
        """
        limits = thresholds.to(self.device, non_blocking=True)
        try:
            x = self.plan.input.to_float(x) if x.is_floating_point() else x
            parts = [self._run_part(part, limits) for part in x.split(MAX_ROWS)]
        except torch.OutOfMemoryError as error:
            raise FastCascadeError(
                f"a batch of {len(x)} images does not fit in the memory of {self.device}; "
                f"try batches of {max(min(len(x), MAX_ROWS) // 2, 1)}"
            ) from error
        if len(parts) == 1:
            return parts[0]
        return ExitResults(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _run_part(self, images: Tensor, thresholds: Tensor) -> ExitResults:
        n = len(images)
        active = Active(
            index=torch.arange(n, dtype=torch.int32, device=self.device),
            count=torch.full((1,), n, dtype=torch.int32, device=self.device),
            known=n,
        )
        tables = exit_tables(n, self.plan.num_classes, self.device)
        batch = _Batch(images, thresholds, tables, active)
        begin = 0
        if self.first is not None:
            begin = self.first.stages
            with self._errors_name(0):
                self._run_first(self.first, batch)
        for k, runner in enumerate(self.runners, begin):
            if batch.active.known == 0:
                break
            with self._errors_name(k):
                self._step(k, runner, batch)
        return ExitResults(tables.log_probs, tables.label, tables.exit_stage)

    @contextmanager
    def _errors_name(self, k: int) -> Iterator[None]:
        """Errors of the device name stage k."""
        try:
            yield
        except (torch.OutOfMemoryError, FastCascadeError):
            raise
        except (RuntimeError, ValueError) as error:
            raise FastCascadeError(
                f"stage {k} ({self.plan.stages[k].name}) failed on {self.device}: {error}. After a CUDA "
                "error the process cannot use the device any more: restart it, and set "
                "CUDA_LAUNCH_BLOCKING=1 to see which kernel failed"
            ) from error

    def _run_first(self, first: FirstStages, batch: _Batch) -> None:
        """Run the first stages in their one launch, then compact the active set."""
        active = batch.active
        keep = first.run(batch.images, batch.tables, batch.thresholds)
        if keep is None:
            active.known = 0
            return
        index, survivors = torch.empty_like(active.index), torch.empty_like(active.count)
        self.kernels.compact_index(active.index, active.count, keep, index, survivors)
        batch.active = Active(index, survivors, None)

    def _step(self, k: int, runner: StageRunner, batch: _Batch) -> None:
        """Run stage k and its exit head, then compact the active set."""
        active = batch.active
        features, logits = runner.run(batch.images, active)
        if active.known == 0:
            return
        keep = self._exit(k, batch, logits)
        if k + 1 == len(self.plan.stages):
            return
        survivors = torch.empty_like(active.count)
        if self.plan.stages[k + 1].input == "previous":
            # The rows may be the stage's own input. Nothing reads it any more, so it may change in place.
            self.kernels.fill_holes(features, active.index, active.count, keep, survivors)
            batch.active = Active(active.index, survivors, None, features)
        else:
            index = torch.empty_like(active.index)
            self.kernels.compact_index(active.index, active.count, keep, index, survivors)
            batch.active = Active(index, survivors, None)

    def _exit(self, k: int, batch: _Batch, logits: Tensor) -> Any:
        """Run the exit head of stage k; returns which rows stay active."""
        selector = self.selectors[k]
        if selector is not None and selector.module is not None:
            return self._exit_with_module(k, selector.module, batch, logits)
        keep = self.kernels.new_keep(len(logits), self.plan.num_classes, self.device)
        self.kernels.exit_head(
            batch.tables,
            logits,
            batch.active.index,
            batch.active.count,
            k,
            keep,
            stage_weight=self.plan.stage_weights[k],
            selector=None if selector is None else selector.features or selector.kind,
            weights=None if selector is None else _contiguous(selector.weights),
            threshold=None if selector is None else batch.thresholds[k : k + 1],
        )
        return keep

    def _exit_with_module(self, k: int, module: nn.Module, batch: _Batch, logits: Tensor) -> Any:
        """Run the exit head in torch, on exactly the active rows, with the user's own selector module."""
        active = batch.active
        n = active.known = int(active.count) if active.known is None else active.known
        stays = exit_step(
            batch.tables,
            logits[:n],
            active.index[:n],
            k,
            stage_weight=self.plan.stage_weights[k],
            score=lambda log_probs, previous, _: cast(Tensor, module(k, log_probs, previous)),
            threshold=batch.thresholds[k].item(),
        )
        keep = self.kernels.new_keep(len(logits), self.plan.num_classes, self.device)
        keep.flags[:n] = stays.to(keep.flags.dtype)
        keep.counts.zero_()
        block = torch.arange(n, device=stays.device) // keep.rows
        keep.counts.index_add_(0, block, stays.to(keep.counts.dtype))
        return keep

    def describe(self) -> list[StageReport]:
        """One report per stage, exit head and compaction included."""
        reports = [] if self.first is None else self.first.reports(architecture(self.device))
        for k, runner in enumerate(self.runners, len(reports)):
            report, reason = runner.report(), self.reasons[k]
            if reason is not None:
                against = KernelChoice("resident kernel", f"not this stage: {reason}")
                report = replace(report, kernels=(*report.kernels, against))
            reports.append(replace(report, kernels=(*report.kernels, *self._exit_choices(k))))
        return reports

    def _exit_choices(self, k: int) -> list[KernelChoice]:
        selector = self.plan.stages[k].selector
        if selector is None:
            return [KernelChoice("exit head, last exit", f"{self.kernels.name} exit_head")]
        opaque = selector.kind == "opaque"
        compaction = "fill_holes" if self.plan.stages[k + 1].input == "previous" else "compact_index"
        return [
            KernelChoice(
                f"exit head, selector {selector}",
                "torch, one readback" if opaque else f"{self.kernels.name} exit_head",
            ),
            KernelChoice("compaction", f"{self.kernels.name} {compaction}"),
        ]


def _contiguous(weights: MLPWeights | None) -> MLPWeights | None:
    return None if weights is None else MLPWeights(*(w.contiguous() for w in weights))
