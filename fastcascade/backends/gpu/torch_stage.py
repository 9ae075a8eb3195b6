"""Stage runners for stages that run in torch: the active rows as one batch, or as chunks of fixed size.

:class:`TorchStage` reads the number of active rows back to the host. :class:`ChunkedStage` records the stage
once for a chunk of fixed size; a WHILE node of a CUDA graph repeats it. It wastes less than one chunk of
rows, and the host waits for nothing.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from fastcascade.backends.gpu.feature_layout import channels_first, channels_last
from fastcascade.backends.gpu.scheduler import Active, LoweringContext, StageRunner
from fastcascade.backends.gpu.while_loops import VARIABLE, Loops
from fastcascade.backends.interface import KernelChoice, StageReport
from fastcascade.errors import BackendUnavailable
from fastcascade.lowering.interpreter import move_stage, run_stage
from fastcascade.lowering.plan import StagePlan

__all__ = ["ChunkedStage", "TorchStage", "torch_stage"]

CHUNK = 256
"""Most rows per chunk. 256 images of 224×224 should fill a GPU; an estimate, not a measurement."""


class TorchStage:
    """A stage in torch: gathers exactly the active rows into one batch and runs the stage on it.

    Reads the number of active rows back once per call. The first stage needs no readback.

    Args:
        reason: why the stage runs in torch, for the report.
    """

    def __init__(self, context: LoweringContext, stage: StagePlan, reason: str) -> None:
        spec, device = context.spec, context.device
        self.stage = move_stage(stage, device, context.dtype)
        self.reason = reason
        self.readback_reason = context.loops.reason
        self.spec = spec
        self.pixel_table = None if spec.preprocess is None else spec.preprocess.table().to(device)
        self.kernels = context.kernels
        self.dtype = context.dtype

    def run(self, images: Tensor, active: Active) -> tuple[Tensor, Tensor]:
        """See :meth:`StageRunner.run`."""
        if active.known is None:
            active.known = int(active.count)  # the only synchronisation with the host
        n = active.known
        if n == 0:
            empty = images.new_empty((0, self.spec.shape[0]), dtype=self.dtype)
            return empty, empty
        reads_images = self.stage.input == "image"
        x = self._gather(images, active, n) if reads_images else cast(Tensor, active.features)[:n]
        rows, logits = self.forward(x)
        # Compaction works in place and must not change the caller's images.
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
            x = x[:, : self.stage.shapes[0][0]]  # custom kernels leave padded channels
        features, logits = run_stage(self.stage, x.to(self.dtype))
        return channels_last(features), logits.contiguous()

    def report(self) -> StageReport:
        """One line per operation, after a line that says when the row count is read back."""
        work = self.stage.ops or ("module",)
        return StageReport(
            name=self.stage.name,
            opaque_reason=self.reason,
            kernels=(
                KernelChoice(
                    "readback of row count", f"one, none at the first stage: {self.readback_reason}"
                ),
                *(KernelChoice(str(op), "torch") for op in work),
            ),
            isa="torch",
            weight_bytes=self.stage.weight_bytes,
            arena_bytes=0,
        )


class ChunkedStage:
    """A stage in torch, recorded for one chunk and repeated on the device.

    The first stage runs on the whole batch, because the host knows its number of rows. A module in which the
    host waits for the device cannot be recorded; it runs as a :class:`TorchStage` instead. The Python code of
    any other module runs only while it is recorded.

    Args:
        forced: a module that cannot be recorded is an error.
        keeps_features: the next stage reads this stage's features.
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

        The next run on the same stream overwrites the returned tensors.

        Raises:
            BackendUnavailable: the stage cannot be recorded, and ``forced`` is set.
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
        """The recording of this thread and stream, made anew if it does not fit n such rows."""
        key = self.loops.stream()
        loop = self.recorded.loops.get(key)
        rows = channels_last(source[:0])
        if loop is not None and loop.fits(rows, n):
            return loop
        self.recorded.loops.pop(key, None)  # frees its memory before the new recording allocates
        capacity = 1 << (n - 1).bit_length()  # powers of two, so that growing batches are rarely re-recorded
        try:
            loop = _Loop(self.whole, self.loops, rows, capacity, self.keeps_features)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.refusal = f"it cannot be recorded: {error}"
            if self.forced:
                raise BackendUnavailable(
                    f"{VARIABLE}=while is impossible for stage {self.stage.name!r}: {self.refusal}"
                ) from error
            return None
        self.recorded.loops[key] = loop
        return loop

    def report(self) -> StageReport:
        """The report of the stage in torch, with a first line about its chunks."""
        readback = f"none: a WHILE node repeats chunks of up to {CHUNK} rows; the first stage is one batch"
        if self.refusal is not None:
            readback = f"one readback: {self.refusal}"
        report = self.whole.report()
        return replace(report, kernels=(KernelChoice("readback of row count", readback), *report.kernels[1:]))


class _Recorded(threading.local):
    """The recordings of one thread, by stream."""

    def __init__(self) -> None:
        self.loops: dict[int, _Loop] = {}


class _Loop:
    """A stage recorded for one chunk, with the memory that the recording reads and writes.

    Attributes:
        source: (capacity, …) input rows.
        index: (capacity,) int32, the active rows of ``source``. Features are compacted in place, so their
            index stays 0, 1, 2, ….
        count: (1,) int32, the number of active rows.
        features, logits: (capacity, …), row i for index[i]; features is None if no stage reads them.
        repeat: enqueues as many chunks as ``count`` needs.
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

        def outputs() -> list[Tensor]:
            features, logits = stage.forward(bucket)
            return [logits, features] if keeps_features else [logits]

        kept = [part.new_empty(capacity, *part.shape[1:]) for part in outputs()]
        self.logits, self.features = kept[0], kept[1] if keeps_features else None

        def work() -> None:
            stage.kernels.gather_rows(source, index, count, chunk, bucket, bucket_index, bucket_count)
            rows_of_chunk = chunk.long() * size + place
            for whole, part in zip(kept, outputs(), strict=True):
                whole.index_copy_(0, rows_of_chunk, part)

        self.repeat = loops.record(count, chunk, size, work)

    def fits(self, rows: Tensor, n: int) -> bool:
        """Whether the recording can take n rows of this dtype and shape."""
        own = self.source
        return own.dtype == rows.dtype and own.shape[1:] == rows.shape[1:] and n <= len(own)


def torch_stage(
    context: LoweringContext, stage: StagePlan, next_input: str | None, reason: str
) -> StageRunner:
    """The runner of a stage in torch: chunked if the device can loop, a readback otherwise."""
    whole = TorchStage(context, stage, reason)
    if context.loops.loops is None:
        return whole
    keeps_features = next_input == "previous"
    return ChunkedStage(whole, context.loops.loops, context.loops.forced, keeps_features)
