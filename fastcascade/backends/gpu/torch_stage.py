"""Stages that run through torch: over exactly the active rows, or over chunks of them that the device counts.

The first way asks the device how many rows there are. The second records the stage once for a chunk of fixed
size, and a WHILE node repeats it; at most a chunk's rows are wasted, and the host waits for nothing.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from fastcascade.backends.gpu.rows import channels_first, channels_last
from fastcascade.backends.gpu.scheduler import Active, ExitKernels, StageRunner
from fastcascade.backends.gpu.while_loops import VARIABLE, Choice, Loops
from fastcascade.backends.interface import KernelChoice, StageReport
from fastcascade.errors import BackendUnavailable
from fastcascade.lowering.interpreter import move_stage, run_stage
from fastcascade.lowering.plan import StagePlan
from fastcascade.types import InputSpec

__all__ = ["ChunkedStage", "TorchStage", "torch_stage"]

CHUNK = 256
"""Most rows of a chunk: fills a GPU with a network for images of 224×224. Estimated, not measured."""


class TorchStage:
    """A stage through torch: gather the active rows into a bucket of exactly their number, run, answer.

    Asks the device for the number of active rows, once per call, unless it is the first stage.

    Args:
        reason: why it runs through torch; counting: why it asks.
    """

    def __init__(
        self,
        stage: StagePlan,
        reason: str,
        spec: InputSpec,
        kernels: ExitKernels,
        device: torch.device,
        dtype: torch.dtype,
        counting: str,
    ) -> None:
        self.stage = move_stage(stage, device, dtype)
        self.reason = reason
        self.counting = counting
        self.spec = spec
        self.pixel_table = None if spec.preprocess is None else spec.preprocess.table().to(device)
        self.kernels = kernels
        self.dtype = dtype

    def run(self, images: Tensor, active: Active) -> tuple[Tensor, Tensor]:
        """See :meth:`StageRunner.run`."""
        if active.known is None:
            active.known = int(active.count)  # the one wait of a stage that runs through torch
        n = active.known
        if n == 0:
            empty = images.new_empty((0, self.spec.shape[0]), dtype=self.dtype)
            return empty, empty
        reads_images = self.stage.input == "image"
        x = self._gather(images, active, n) if reads_images else cast(Tensor, active.features)[:n]
        rows, logits = self.forward(x)
        # Rows are compacted in place, which must not reach the caller's images.
        shared = rows.untyped_storage().data_ptr() == images.untyped_storage().data_ptr()
        return rows.clone() if shared else rows, logits

    def _gather(self, images: Tensor, active: Active, n: int) -> Tensor:
        if n == len(images):
            return images.permute(0, 2, 3, 1)
        rows = channels_last(images)
        bucket = rows.new_empty(n, *rows.shape[1:])
        scratch = active.index.new_empty(n), torch.empty_like(active.count)
        chunk = torch.zeros_like(active.count)
        self.kernels.gather_rows(rows, active.index, active.count, chunk, bucket, *scratch)
        return bucket

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n, …) images or features, channels last → features, channels last, and logits."""
        x = channels_first(rows)
        if self.stage.input == "image":
            x = self.spec.to_float(x, self.pixel_table)
        else:
            x = x[:, : self.stage.shapes[0][0]]  # rows of own kernels are padded
        features, logits = run_stage(self.stage, x.to(self.dtype))
        return channels_last(features), logits.contiguous()

    def report(self) -> StageReport:
        """Torch does the work; the reason says why, and that the host waits."""
        tensors = [tensor for op in self.stage.ops for tensor in op.tensors.values()]
        if self.stage.module is not None:
            tensors = [*self.stage.module.parameters(), *self.stage.module.buffers()]
        work = self.stage.ops or ("module",)
        return StageReport(
            name=self.stage.name,
            opaque_reason=self.reason,
            kernels=(
                KernelChoice("readback of row count", f"one, none at the first stage: {self.counting}"),
                *(KernelChoice(str(op), "torch") for op in work),
            ),
            isa="torch",
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            arena_bytes=0,
        )


class ChunkedStage:
    """A stage through torch, over chunks; the first stage, whose rows the host knows, runs over all at once.

    A module that cannot be recorded, because the host waits for something in it or decides by it, runs as
    :class:`TorchStage` from then on. Otherwise its Python code runs while it is recorded and never again.

    Args:
        forced: it is an error instead.
        keeps_features: the next stage reads them.
    """

    def __init__(self, whole: TorchStage, loops: Loops, forced: bool, keeps_features: bool) -> None:
        self.whole = whole
        self.stage = whole.stage
        self.loops = loops
        self.forced = forced
        self.keeps_features = keeps_features
        self.refusal: str | None = None
        self.recorded = _Recorded()

    def run(self, images: Tensor, active: Active) -> tuple[Tensor, Tensor]:
        """See :meth:`fastcascade.backends.gpu.scheduler.StageRunner.run`.

        What it returns is overwritten by its next run on the same stream.

        Raises:
            BackendUnavailable: the stage cannot be recorded, and the environment wants it to be.
        """
        if active.known is not None or self.refusal is not None:
            return self.whole.run(images, active)
        reads_images = self.stage.input == "image"
        source = images if reads_images else channels_first(cast(Tensor, active.features))
        n = len(active.index) if reads_images else len(source)
        loop = self._loop(source, n)
        if loop is None:
            return self.whole.run(images, active)
        channels_first(loop.source[: len(source)]).copy_(source)
        if reads_images:
            loop.index[:n].copy_(active.index)
        loop.count.copy_(active.count)
        loop.repeat()
        return (loop.logits if loop.features is None else loop.features)[:n], loop.logits[:n]

    def _loop(self, source: Tensor, n: int) -> _Loop | None:
        """This thread's for its stream, which nothing else uses; recorded anew where it does not fit."""
        key = self.loops.stream()
        loop = self.recorded.loops.get(key)
        rows = channels_last(source[:0])
        if loop is not None and loop.fits(rows, n):
            return loop
        self.recorded.loops.pop(key, None)  # its memory is free before the new one takes some
        capacity = 1 << (n - 1).bit_length()  # a growing batch is recorded a few times, not every time
        try:
            loop = _Loop(self.whole, self.loops, rows, capacity, self.keeps_features)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.refusal = f"it cannot be recorded: {error}"
            if self.forced:
                raise BackendUnavailable(
                    f"{VARIABLE}=while cannot be obeyed by stage {self.stage.name!r}: {self.refusal}"
                ) from error
            return None
        self.recorded.loops[key] = loop
        return loop

    def report(self) -> StageReport:
        """As of the whole stage, with how its rows are counted."""
        counting = f"none: a WHILE node repeats chunks of up to {CHUNK} rows; the first stage is not repeated"
        if self.refusal is not None:
            counting = f"one readback: {self.refusal}"
        report = self.whole.report()
        return replace(report, kernels=(KernelChoice("readback of row count", counting), *report.kernels[1:]))


class _Recorded(threading.local):
    """This thread's loops, one for each stream that it used."""

    def __init__(self) -> None:
        self.loops: dict[int, _Loop] = {}


class _Loop:
    """A stage recorded for one chunk, and the memory that it works on.

    Attributes:
        source: (capacity, …) rows to read; index: (capacity,) int32, which of them are active and in which
            order; count: (1,) int32, how many. Features are in order already: their index stays 0, 1, ….
        features: (capacity, …), None where no stage reads them; logits: (capacity, C). Row i is of index[i].
        repeat: enqueues as many chunks as count says.
    """

    def __init__(
        self, stage: TorchStage, loops: Loops, rows: Tensor, capacity: int, keeps_features: bool
    ) -> None:
        size = min(CHUNK, capacity)
        self.source = source = rows.new_zeros(capacity, *rows.shape[1:])
        self.index = index = torch.arange(capacity, dtype=torch.int32, device=rows.device)
        count, chunk, bucket_count = (index.new_zeros(1) for _ in range(3))
        self.count = count
        bucket, bucket_index = source[:size].clone(), index[:size].clone()
        place = torch.arange(size, device=rows.device)

        def answers() -> list[Tensor]:
            features, logits = stage.forward(bucket)
            return [logits, features] if keeps_features else [logits]

        kept = [part.new_empty(capacity, *part.shape[1:]) for part in answers()]
        self.logits, self.features = kept[0], kept[1] if keeps_features else None

        def work() -> None:
            stage.kernels.gather_rows(source, index, count, chunk, bucket, bucket_index, bucket_count)
            rows_of_chunk = chunk.long() * size + place
            for whole, part in zip(kept, answers(), strict=True):
                whole.index_copy_(0, rows_of_chunk, part)

        self.repeat = loops.record(count, chunk, size, work)

    def fits(self, rows: Tensor, n: int) -> bool:
        """Whether it can read n rows like these."""
        own = self.source
        return own.dtype == rows.dtype and own.shape[1:] == rows.shape[1:] and n <= len(own)


def torch_stage(
    stage: StagePlan,
    next_input: str | None,
    reason: str,
    spec: InputSpec,
    kernels: ExitKernels,
    device: torch.device,
    dtype: torch.dtype,
    choice: Choice,
) -> StageRunner:
    """A stage through torch, in the way that was chosen."""
    whole = TorchStage(stage, reason, spec, kernels, device, dtype, choice.reason)
    if choice.loops is None:
        return whole
    return ChunkedStage(whole, choice.loops, choice.forced, keeps_features=next_input == "previous")
