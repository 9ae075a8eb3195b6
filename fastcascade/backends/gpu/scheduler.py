"""The schedule of the GPU backends: a stage over the whole active set, the exit head, compaction, the next.

The number of active rows stays on the device. Own kernels read it there, so between two stages that run as
own kernels the host waits for nothing. A stage that runs through torch needs the number once, to size its
batch. On NVIDIA GPUs the first stages may run in one launch, exits included
(:mod:`fastcascade.backends.gpu.resident_stage`); the schedule then begins with what they leave.

Feature rows are kept as (rows, H, W, C) or (rows, F), contiguous: one row is one instance, and a view with
the channels first is what torch calls channels_last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from fastcascade.backends.arithmetic import exact_float32
from fastcascade.backends.gpu.rows import architecture
from fastcascade.backends.interface import ExitResults, KernelChoice, StageReport
from fastcascade.errors import FastCascadeError
from fastcascade.kernels.reference import ExitTables, MLPWeights, exit_step, exit_tables
from fastcascade.lowering.interpreter import move_stage
from fastcascade.lowering.plan import Plan

__all__ = [
    "Active",
    "BreadthFirstProgram",
    "ExitKernels",
    "FirstStages",
    "StageRunner",
    "next_inputs",
]

MAX_ROWS = 65_536
"""Larger batches run in parts: row counts stay small for the compaction kernels, and buffers bounded."""


class ExitKernels(NamedTuple):
    """The exit head and compaction of one backend; signatures as in ``kernels/triton``."""

    name: str
    new_keep: Callable[..., Any]
    exit_head: Callable[..., None]
    compact_index: Callable[..., None]
    fill_holes: Callable[..., None]
    gather_rows: Callable[..., None]


@dataclass
class Active:
    """The instances that are still running.

    Attributes:
        index: (capacity,) int32 positions in the batch; the first ``count`` are active.
        count: (1,) int32 on the device.
        known: the count where the host knows it without asking the device.
        features: (capacity, …) what the previous stage left, where the next one reads it.
    """

    index: Tensor
    count: Tensor
    known: int | None
    features: Tensor | None = None


class StageRunner(Protocol):
    """One stage, lowered."""

    def run(self, images: Tensor, active: Active) -> tuple[Tensor, Tensor]:
        """Run the stage on the active rows.

        Args:
            images: (N, C, H, W) of the whole batch, uint8 or float32, any strides.
            active: ``active.features`` is there if the stage reads the previous one.

        Returns:
            features (rows, …) channels last and logits (rows, classes), with at least ``count`` rows each.
        """

    def report(self) -> StageReport:
        """For ``describe``, without the exit head."""


class FirstStages(Protocol):
    """The first stages with their exits, in one launch.

    Attributes:
        stages: how many.
    """

    stages: int

    def run(self, images: Tensor, tables: ExitTables, thresholds: Tensor) -> Any:
        """Run them on every image; returns the Keep of those that go on, None where no stage is left."""

    def reports(self, isa: str) -> list[StageReport]:
        """For ``describe``, exit heads included."""


def next_inputs(plan: Plan) -> list[str | None]:
    """What the stage after each one reads; None after the last."""
    return [*(stage.input for stage in plan.stages[1:]), None]


class BreadthFirstProgram:
    """A plan lowered to one runner per stage, with one backend's exit head between them.

    Args:
        runners: of the stages after ``first``.
        first: runs the stages before, if there are any.
        notes: of each stage, why it is not among those; None where there is nothing to say.
    """

    def __init__(
        self,
        plan: Plan,
        runners: list[StageRunner],
        kernels: ExitKernels,
        device: torch.device,
        first: FirstStages | None = None,
        notes: Sequence[str | None] = (),
    ) -> None:
        self.plan = plan
        self.first = first
        self.notes = notes or [None] * len(plan.stages)
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
            FastCascadeError: the device ran out of memory, or a stage failed; says which, or what to try.
        """
        limits = thresholds.to(self.device, non_blocking=True)
        try:
            parts = [self._run_part(part, limits) for part in x.split(MAX_ROWS)]
        except torch.OutOfMemoryError as error:
            raise FastCascadeError(
                f"a batch of {len(x)} images does not fit into the memory of {self.device}; "
                f"try batches of {max(min(len(x), MAX_ROWS) // 2, 1)}"
            ) from error
        if len(parts) == 1:
            return parts[0]
        return ExitResults(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _run_part(self, images: Tensor, thresholds: Tensor) -> ExitResults:
        n = len(images)
        tables = exit_tables(n, self.plan.num_classes, self.device)
        active = Active(
            index=torch.arange(n, dtype=torch.int32, device=self.device),
            count=torch.full((1,), n, dtype=torch.int32, device=self.device),
            known=n,
        )
        begin = 0
        if self.first is not None:
            with self._named(0):
                active = self._after_first(self.first, images, active, tables, thresholds)
            begin = self.first.stages
        for k, runner in enumerate(self.runners, begin):
            if active.known == 0:
                break
            with self._named(k):
                active = self._step(k, runner, images, active, tables, thresholds)
        return ExitResults(tables.log_probs, tables.label, tables.exit_stage)

    @contextmanager
    def _named(self, k: int) -> Iterator[None]:
        """Errors of the device name the stage."""
        try:
            yield
        except (torch.OutOfMemoryError, FastCascadeError):
            raise
        except (RuntimeError, ValueError) as error:
            raise FastCascadeError(
                f"stage {k} ({self.plan.stages[k].name}) failed on {self.device}: {error}. If this is a "
                "CUDA error the process cannot use the device any more: restart it, and set "
                "CUDA_LAUNCH_BLOCKING=1 to see which kernel failed"
            ) from error

    def _after_first(
        self, first: FirstStages, images: Tensor, active: Active, tables: ExitTables, thresholds: Tensor
    ) -> Active:
        """What the launch of the first stages leaves."""
        keep = first.run(images, tables, thresholds)
        if keep is None:
            return replace(active, known=0)
        index, survivors = torch.empty_like(active.index), torch.empty_like(active.count)
        self.kernels.compact_index(active.index, active.count, keep, index, survivors)
        return Active(index, survivors, None)

    def _step(
        self,
        k: int,
        runner: StageRunner,
        images: Tensor,
        active: Active,
        tables: ExitTables,
        thresholds: Tensor,
    ) -> Active:
        """Run one stage and its exit head; returns the survivors."""
        features, logits = runner.run(images, active)
        if active.known == 0:
            return active
        keep = self._exit(k, tables, logits, active, thresholds)
        if k + 1 == len(self.plan.stages):
            return active
        survivors = torch.empty_like(active.count)
        if self.plan.stages[k + 1].input == "previous":
            # The rows may be the stage's own input, which nobody reads any more: changed in place.
            self.kernels.fill_holes(features, active.index, active.count, keep, survivors)
            return Active(active.index, survivors, None, features)
        index = torch.empty_like(active.index)
        self.kernels.compact_index(active.index, active.count, keep, index, survivors)
        return Active(index, survivors, None)

    def _exit(self, k: int, tables: ExitTables, logits: Tensor, active: Active, thresholds: Tensor) -> Any:
        selector = self.selectors[k]
        keep = self.kernels.new_keep(len(logits), self.plan.num_classes, self.device)
        if selector is not None and selector.module is not None:
            _exit_through_torch(
                k, selector.module, self.plan.stage_weights[k], tables, logits, active, thresholds, keep
            )
            return keep
        self.kernels.exit_head(
            tables,
            logits,
            active.index,
            active.count,
            k,
            keep,
            stage_weight=self.plan.stage_weights[k],
            selector=None if selector is None else selector.features or selector.kind,
            weights=None if selector is None else _contiguous(selector.weights),
            threshold=None if selector is None else thresholds[k : k + 1],
        )
        return keep

    def describe(self) -> list[StageReport]:
        """One report per stage, the exit head and compaction included."""
        reports = [] if self.first is None else self.first.reports(architecture(self.device))
        for k, runner in enumerate(self.runners, len(reports)):
            report, note = runner.report(), self.notes[k]
            notes = () if note is None else (KernelChoice("resident kernel", f"not this stage: {note}"),)
            reports.append(replace(report, kernels=(*report.kernels, *notes, *self._exit_choices(k))))
        return reports

    def _exit_choices(self, k: int) -> list[KernelChoice]:
        selector = self.plan.stages[k].selector
        if selector is None:
            return [KernelChoice("exit head, last exit", f"{self.kernels.name} exit_head")]
        opaque = selector.kind == "opaque"
        move = "fill_holes" if self.plan.stages[k + 1].input == "previous" else "compact_index"
        return [
            KernelChoice(
                f"exit head, selector {selector}",
                "torch, one readback" if opaque else f"{self.kernels.name} exit_head",
            ),
            KernelChoice("compaction", f"{self.kernels.name} {move}"),
        ]


def _contiguous(weights: MLPWeights | None) -> MLPWeights | None:
    return None if weights is None else MLPWeights(*(w.contiguous() for w in weights))


def _exit_through_torch(
    k: int,
    module: nn.Module,
    stage_weight: float | None,
    tables: ExitTables,
    logits: Tensor,
    active: Active,
    thresholds: Tensor,
    keep: Any,
) -> None:
    """The exit head with a selector module of the user's own, on exactly the active rows."""
    n = active.known = int(active.count) if active.known is None else active.known
    stays = exit_step(
        tables,
        logits[:n],
        active.index[:n],
        k,
        stage_weight=stage_weight,
        score=lambda log_probs, previous, _: cast(Tensor, module(k, log_probs, previous)),
        threshold=thresholds[k].item(),
    )
    keep.flags[:n] = stays.to(keep.flags.dtype)
    keep.counts.zero_()
    block = torch.arange(n, device=stays.device) // keep.rows
    keep.counts.index_add_(0, block, stays.to(keep.counts.dtype))
