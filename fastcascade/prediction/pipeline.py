"""Reading, decoding and computing at the same time, with a bounded number of batches in memory.

A reader thread asks for batches in order, a pool of threads decodes them, the caller's thread computes. Each
hands over through a queue of fixed length, so the slowest one sets the pace and memory stays flat.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastcascade.data.image_data import Array, Read, as_tensor
from fastcascade.engine import CompiledCascade
from fastcascade.errors import InvalidArgument
from fastcascade.prediction.predictions import Predictions
from fastcascade.types import CascadeOutput, OperatingPointLike

__all__ = ["Batch", "Waits", "classified", "usable_cpus"]

_AHEAD = 3
"""Batches that are being decoded or wait for the model."""


class Batch(NamedTuple):
    """Inputs that are computed together.

    Attributes:
        ids: of each input.
        reads: decode consecutive pieces of the batch, in any thread.
    """

    ids: Sequence[str]
    reads: Sequence[Read]


@dataclass
class Waits:
    """Where the time of a run went, as seen from the thread that computes, in seconds."""

    for_input: float = 0.0
    computing: float = 0.0
    for_output: float = 0.0

    def limit(self) -> str:
        """What the run is limited by, with its share of the time.

        Example:
            >>> Waits(for_input=6, computing=2, for_output=0).limit()
            'reading and decoding (75% of the time)'
        """
        shares = {
            "reading and decoding": self.for_input,
            "computing": self.computing,
            "writing": self.for_output,
        }
        name = max(shares, key=lambda key: shares[key])
        total = sum(shares.values())
        return f"{name} ({shares[name] / total:.0%} of the time)" if total else "nothing yet"


def classified(
    model: CompiledCascade,
    batches: Iterable[Batch],
    operating_point: OperatingPointLike = None,
    top_k: int = 0,
    waits: Waits | None = None,
) -> Generator[Predictions, None, None]:
    """Predictions of each batch, in order.

    Raises:
        InvalidArgument: the model returns log-probabilities only, or images do not fit it.
    """
    waits = Waits() if waits is None else waits
    classes = model.plan.classes
    start = time.perf_counter()
    with contextlib.closing(_decoded(batches)) as ready:
        for batch, images, errors in ready:
            decoded = time.perf_counter()
            out = model(images.to(model.device), operating_point)
            if not isinstance(out, CascadeOutput):
                raise InvalidArgument('predictions need exits and costs; compile with output="cascade"')
            predictions = Predictions.of_output(batch.ids, errors, out, top_k, classes)
            computed = time.perf_counter()
            yield predictions
            waits.for_input += decoded - start
            waits.computing += computed - decoded
            start = time.perf_counter()
            waits.for_output += start - computed


class _Decoded(NamedTuple):
    batch: Batch
    images: Tensor
    errors: list[str | None]


def _decoded(batches: Iterable[Batch]) -> Generator[_Decoded, None, None]:
    """Batches with their images, decoded ahead."""
    with ThreadPoolExecutor(usable_cpus(), "fastcascade-decode") as pool:
        reader = _Reader(iter(batches), pool)
        try:
            yield from reader
        finally:
            reader.stop()


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_Pending = tuple[Batch, list["Future[tuple[Array, list[str | None]]]"]]


class _Reader:
    """A thread that takes batches from an iterator and hands them to a pool, a bounded number ahead."""

    def __init__(self, batches: Iterator[Batch], pool: ThreadPoolExecutor) -> None:
        self._batches = batches
        self._pool = pool
        self._free = threading.Semaphore(_AHEAD)
        self._queue: queue.SimpleQueue[_Pending | BaseException | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="fastcascade-read", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._free.acquire() and not self._stopped:
                batch = next(self._batches, None)
                if batch is None:
                    break
                self._queue.put((batch, [self._pool.submit(read) for read in batch.reads]))
            self._queue.put(None)
        except BaseException as error:  # raised again in the thread that computes
            self._queue.put(error)

    def __iter__(self) -> Iterator[_Decoded]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, futures = item
            pieces = [future.result() for future in futures]
            images = pieces[0][0] if len(pieces) == 1 else np.concatenate([images for images, _ in pieces])
            yield _Decoded(batch, as_tensor(images), [error for _, errors in pieces for error in errors])
            self._free.release()

    def stop(self) -> None:
        """End the thread, and drop the batches that wait."""
        self._stopped = True
        self._free.release()
        self._thread.join()
        while not self._queue.empty():
            item = self._queue.get()
            for future in item[1] if isinstance(item, tuple) else ():
                future.cancel()
