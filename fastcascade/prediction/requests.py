"""The requests of a batcher: futures, and the bounded queue in which they wait for their batch."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from fastcascade.errors import FastCascadeError, Overloaded, RequestTimeout
from fastcascade.types import CascadeOutput

__all__ = ["Request", "RequestQueue"]

Kind = tuple[torch.dtype, tuple[float, ...]]


class Request(Future[CascadeOutput | Tensor]):
    """The future result of one request; ``await`` works in asyncio, and so does cancelling the awaiting task.

    A request that is cancelled while it waits leaves the queue at once and is never run.

    Attributes:
        images: (N, C, H, W), as the program reads them.
        thresholds: (K−1,) float32.
        deadline: the time (``time.monotonic``) after which it is not started any more, or None.
        kind: what requests must have in common to run in one call.
        arrived: the time at which it entered the queue.
    """

    def __init__(
        self, images: Tensor, thresholds: Tensor, deadline: float | None, queue: RequestQueue
    ) -> None:
        super().__init__()
        self.images, self.thresholds, self.deadline = images, thresholds, deadline
        self.kind: Kind = (images.dtype, tuple(thresholds.tolist()))
        self.arrived = 0.0
        self._queue = queue

    def expired(self, now: float) -> bool:
        """Whether it has waited too long."""
        return self.deadline is not None and now > self.deadline

    def fail_expired(self) -> None:
        """Set the error of a request that waited too long."""
        if self.set_running_or_notify_cancel():
            self.set_exception(
                RequestTimeout(
                    "the request waited longer than its timeout and was not run; the batcher is busy"
                )
            )

    def cancel(self) -> bool:
        """Cancel the request unless it is running or done; returns whether it is cancelled."""
        cancelled = super().cancel()
        if cancelled:
            self._queue.withdraw(self)
        return cancelled

    def __await__(self) -> Generator[Any, None, CascadeOutput | Tensor]:
        return asyncio.wrap_future(self).__await__()


class _Line:
    """Waiting requests of one kind, oldest first."""

    def __init__(self) -> None:
        self.requests: OrderedDict[Request, None] = OrderedDict()
        self.images = 0

    def add(self, request: Request) -> None:
        self.requests[request] = None
        self.images += len(request.images)

    def remove(self, request: Request) -> None:
        del self.requests[request]
        self.images -= len(request.images)

    @property
    def oldest(self) -> Request:
        return next(iter(self.requests))


class RequestQueue:
    """Waiting requests, at most ``max_waiting`` images of them. Safe from several threads.

    Requests of one kind (see :attr:`Request.kind`) form batches. A batch is due when it has ``max_batch``
    images or its oldest request has waited for ``max_delay`` seconds.

    Attributes:
        waiting: images in the queue.
        dropped: requests that were cancelled or timed out in the queue.
        rejected: requests for which there was no room.
    """

    def __init__(self, max_batch: int, max_delay: float, max_waiting: int) -> None:
        self.max_batch, self.max_delay, self.max_waiting = max_batch, max_delay, max_waiting
        # Reentrant: garbage collection may close the queue of a forgotten batcher wherever its thread is.
        self._lock = threading.RLock()
        self._batch_due = threading.Condition(self._lock)
        self._room_made = threading.Condition(self._lock)
        self._lines: dict[Kind, _Line] = {}
        self._closed = False
        self.waiting = self.dropped = self.rejected = 0

    def put(self, request: Request, block: bool) -> None:
        """Add a request; ``block`` waits for room, until the request's deadline.

        Raises:
            Overloaded: no room, unless ``block``.
            RequestTimeout: no room before the deadline.
            FastCascadeError: the queue is closed.
        """
        with self._lock:
            while not self._closed and self.waiting + len(request.images) > self.max_waiting:
                self._wait_for_room(request, block)
            if self._closed:
                raise FastCascadeError("the batcher is closed and takes no more requests")
            request.arrived = time.monotonic()
            line = self._lines.setdefault(request.kind, _Line())
            line.add(request)
            self.waiting += len(request.images)
            # Otherwise the thread that takes batches sleeps until the oldest request is due.
            if line.images >= self.max_batch or len(line.requests) == 1:
                self._batch_due.notify()

    def _wait_for_room(self, request: Request, block: bool) -> None:
        now = time.monotonic()
        if not block:
            self.rejected += 1
            raise Overloaded(
                f"{self.waiting} images are waiting, and max_waiting={self.max_waiting} leaves no room for "
                f"{len(request.images)} more; try again later, or wait for room with block=True"
            )
        if request.expired(now):
            self.rejected += 1
            raise RequestTimeout("there was no room for the request within its timeout; the batcher is busy")
        _wait(self._room_made, None if request.deadline is None else request.deadline - now)

    def take(self) -> list[Request]:
        """The next batch of one kind, as soon as it is due; empty when the queue is closed and drained.

        Requests that were cancelled or whose deadline has passed are not among them. The batch may become
        empty for that reason while the queue is open; then this waits for the next.
        """
        while True:
            with self._lock:
                batch, expired = self._next_batch()
            for request in expired:  # outside the lock, because callbacks of futures may submit requests
                request.fail_expired()
            if batch or not expired:
                return batch

    def _next_batch(self) -> tuple[list[Request], list[Request]]:
        """The requests of the next batch, and those that expired; none of both when closed and drained."""
        while True:
            now = time.monotonic()
            lines = sorted(self._lines.values(), key=lambda line: line.oldest.arrived)
            for line in lines:
                due = line.oldest.arrived + self.max_delay
                if self._closed or line.images >= self.max_batch or due <= now:
                    return self._cut_batch(line, now)
            if self._closed:
                return [], []
            _wait(self._batch_due, lines[0].oldest.arrived + self.max_delay - now if lines else None)

    def _cut_batch(self, line: _Line, now: float) -> tuple[list[Request], list[Request]]:
        batch: list[Request] = []
        expired: list[Request] = []
        images = 0
        for request in list(line.requests):
            if request.expired(now):
                expired.append(request)
                self.dropped += 1
            elif images + len(request.images) <= self.max_batch:
                batch.append(request)
                images += len(request.images)
            else:
                break
            self._remove(request)
        return batch, expired

    def withdraw(self, request: Request) -> None:
        """Take out a request, if it still waits."""
        with self._lock:
            line = self._lines.get(request.kind)
            if line is not None and request in line.requests:
                self._remove(request)
                self.dropped += 1

    def _remove(self, request: Request) -> None:
        line = self._lines[request.kind]
        line.remove(request)
        self.waiting -= len(request.images)
        if not line.requests:
            del self._lines[request.kind]
        self._room_made.notify_all()

    def close(self, discard: bool = False) -> None:
        """Take no more requests; ``discard`` cancels those that wait."""
        with self._lock:
            self._closed = True
            waiting = [request for line in self._lines.values() for request in line.requests]
            self._batch_due.notify_all()
            self._room_made.notify_all()
        for request in waiting if discard else ():
            request.cancel()


def _wait(condition: threading.Condition, seconds: float | None) -> None:
    """Wait for a notification, at most so long, however long that is."""
    condition.wait(None if seconds is None else min(max(seconds, 0.0), threading.TIMEOUT_MAX))
