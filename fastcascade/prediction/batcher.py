"""Dynamic batching: single requests from many threads or asyncio tasks, run together.

A cascade gains more from this than a dense network: the survivors of several requests share the deep stages.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastcascade.engine import CompiledCascade
from fastcascade.errors import FastCascadeError, InvalidArgument
from fastcascade.prediction.requests import Request, RequestQueue
from fastcascade.types import CascadeOutput, OperatingPointLike

__all__ = ["Batcher", "BatcherStats"]

_RECENT = 4096
"""Requests whose waiting times are kept for the percentiles."""


@dataclass(frozen=True)
class BatcherStats:
    """What a batcher has done so far.

    Attributes:
        requests, images: that were run.
        batches: calls of the compiled cascade.
        failed: requests whose call raised an error.
        dropped: requests that were cancelled, or timed out, before they ran.
        rejected: requests for which there was no room.
        waiting: images in the queue now.
        wait_ms: how long requests waited for their batch to start, "p50", "p95" and "p99" over the last few
            thousand; NaN before the first.
    """

    requests: int
    images: int
    batches: int
    failed: int
    dropped: int
    rejected: int
    waiting: int
    wait_ms: dict[str, float]

    @property
    def mean_batch(self) -> float:
        """Images per batch; NaN before the first."""
        return self.images / self.batches if self.batches else float("nan")


class Batcher:
    """Gathers requests into batches, runs them on a compiled cascade, and returns futures of their own rows.

    One thread of its own runs the batches, one at a time; requests that arrive meanwhile form the next one.
    Requests with the same thresholds and dtype share a batch. Close the batcher, or use it in a ``with``
    statement; it is also closed when it is garbage-collected and when the interpreter exits.

    Args:
        model: the compiled cascade.
        max_batch: most images of one call.
        max_delay_ms: how long a request waits for others while the model is idle. A busy model adds the
            rest of its call, but the requests that arrive in that time are not delayed further.
        max_waiting: most images in the queue. Beyond them, :meth:`submit` raises or blocks.

    Raises:
        InvalidArgument: something else than a compiled cascade, or a limit out of range.

    Example:
        >>> import fastcascade as fc
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> fast = fc.compile(fc.Cascade([resnet_cifar(8)], None, 10, (3, 32, 32)))
        >>> with Batcher(fast) as batcher:
        ...     futures = [batcher.submit(torch.randn(3, 32, 32)) for _ in range(4)]
        ...     shapes = [tuple(future.result().probs.shape) for future in futures]
        >>> shapes
        [(1, 10), (1, 10), (1, 10), (1, 10)]
    """

    def __init__(
        self,
        model: CompiledCascade,
        *,
        max_batch: int = 256,
        max_delay_ms: float = 2.0,
        max_waiting: int = 1024,
    ) -> None:
        if not isinstance(model, CompiledCascade):
            raise InvalidArgument(f"got {type(model).__name__}; expected a compiled cascade from fc.compile")
        if max_batch < 1 or max_waiting < max_batch or not 0 <= max_delay_ms < float("inf"):
            raise InvalidArgument(
                f"got max_batch={max_batch}, max_waiting={max_waiting}, max_delay_ms={max_delay_ms}; "
                "expected 1 ≤ max_batch ≤ max_waiting and a delay of 0 ms or more"
            )
        self.model = model
        self._queue = RequestQueue(max_batch, max_delay_ms / 1e3, max_waiting)
        self._record = _Record()
        self._process = os.getpid()
        # The thread does not refer to this object, so that it can be garbage-collected while the thread runs.
        arguments = (model, self._queue, self._record)
        self._thread = threading.Thread(
            target=_run_batches, args=arguments, name="fastcascade-batcher", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, _shut_down, self._queue, self._thread, self._process)

    def submit(
        self,
        images: Tensor | np.ndarray[Any, Any],
        operating_point: OperatingPointLike = None,
        *,
        timeout_s: float | None = None,
        block: bool = False,
    ) -> Request:
        """Add a request; returns its future, whose result is what ``model(images, operating_point)`` returns.

        The images are checked here, so a wrong request raises at once and harms no other. Until the result is
        there, they must not be changed. In asyncio, ``await`` the future. Callbacks of the future run on the
        batcher's thread and should be short.

        Args:
            images: N images as the model takes them, at most ``max_batch``, or one image without N.
            timeout_s: how long the request may wait for its batch to start; after that it fails with
                :class:`fastcascade.errors.RequestTimeout`, at the latest when the batch that is running ends.
            block: wait for room in the queue. For threads; in asyncio it would stop the event loop.

        Raises:
            InvalidArgument: wrong images, operating point or timeout, or more images than ``max_batch``.
            Overloaded: the queue is full, and not ``block``.
            RequestTimeout: no room within the timeout.
            FastCascadeError: the batcher is closed, or belongs to the parent of this process.
        """
        if os.getpid() != self._process:
            raise FastCascadeError(
                f"this batcher belongs to process {self._process}, and threads do not survive a fork; create "
                f"one in process {os.getpid()}"
            )
        if timeout_s is not None and not timeout_s > 0:
            raise InvalidArgument(f"timeout_s is {timeout_s}; expected a positive number of seconds, or None")
        checked = self.model.images(images[None] if getattr(images, "ndim", 0) == 3 else images)
        if len(checked) > self._queue.max_batch:
            raise InvalidArgument(
                f"got {len(checked)} images in one request; expected at most "
                f"max_batch={self._queue.max_batch}. Split it, or call the model itself"
            )
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        request = Request(checked, self.model.thresholds(operating_point), deadline, self._queue)
        self._queue.put(request, block)
        return request

    @property
    def stats(self) -> BatcherStats:
        """Counts of requests, images and batches, and waiting times."""
        return self._record.stats(self._queue)

    def close(self, discard: bool = False) -> None:
        """Take no more requests, and wait until those in the queue are done, or cancelled if ``discard``."""
        _shut_down(self._queue, self._thread, self._process, discard)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        queue = self._queue
        return (
            f"Batcher(max_batch={queue.max_batch}, max_delay_ms={1e3 * queue.max_delay:g}, "
            f"max_waiting={queue.max_waiting}, waiting={queue.waiting})"
        )


class _Record:
    """The counters of a batcher. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._waits: deque[float] = deque(maxlen=_RECENT)

    def count(self, waits: Sequence[float] = (), **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)
            self._waits.extend(waits)

    def stats(self, queue: RequestQueue) -> BatcherStats:
        with self._lock:
            counts, waits = Counter(self._counts), 1e3 * np.array(self._waits or [np.nan])
        return BatcherStats(
            **{name: counts[name] for name in ("requests", "images", "batches", "failed")},
            dropped=queue.dropped + counts["dropped"],
            rejected=queue.rejected,
            waiting=queue.waiting,
            wait_ms={f"p{p}": float(np.percentile(waits, p)) for p in (50, 95, 99)},
        )


def _shut_down(queue: RequestQueue, thread: threading.Thread, process: int, discard: bool = False) -> None:
    """Close the queue and wait for the thread. A forked child has neither, and locks may be held for ever."""
    if os.getpid() != process:
        return
    queue.close(discard)
    if thread is not threading.current_thread():  # a callback may close the batcher
        thread.join()


def _run_batches(model: CompiledCascade, queue: RequestQueue, record: _Record) -> None:
    """The batcher's thread: runs batch after batch until the queue is closed and drained."""
    try:
        while batch := queue.take():
            started = [request for request in batch if request.set_running_or_notify_cancel()]
            now = time.monotonic()
            waits = [now - request.arrived for request in started]
            record.count(waits, dropped=len(batch) - len(started))
            if started:
                _run_batch(model, started, record)
            del batch, started  # otherwise the last results would live until the next request
    finally:
        queue.close(discard=True)  # nobody would run them


def _run_batch(model: CompiledCascade, requests: list[Request], record: _Record) -> None:
    """Run requests of one kind in one call and set their results.

    A call that fails is repeated for each request alone, so that an error reaches only the request that
    causes it.
    """
    try:
        out = model(_join([request.images for request in requests]), requests[0].thresholds)
    except Exception as error:
        if len(requests) == 1:
            record.count(batches=1, failed=1)
            requests[0].set_exception(error)
            return
        for request in requests:
            _run_batch(model, [request], record)
        return
    sizes = [len(request.images) for request in requests]
    record.count(batches=1, requests=len(sizes), images=sum(sizes))
    for request, rows in zip(requests, _split(out, sizes), strict=True):
        request.set_result(rows)


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenate images. On the CPU by NumPy: torch's threads would keep spinning and slow down the call."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].device.type == "cpu":
        return torch.from_numpy(np.concatenate([part.numpy() for part in parts]))
    return torch.cat(parts)


def _split(out: CascadeOutput | Tensor, sizes: list[int]) -> list[CascadeOutput | Tensor]:
    """Each request's rows, as copies: a view would keep, and pickle, the rows of all other requests."""
    if len(sizes) == 1:
        return [out]
    split = cast(Any, torch.split_with_sizes_copy)  # torch declares the variant with out= only
    if isinstance(out, Tensor):
        return list(split(out, sizes))
    columns = [split(column, sizes) for column in out]
    return [CascadeOutput(*rows) for rows in zip(*columns, strict=True)]
