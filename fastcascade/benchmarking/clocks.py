"""Clocks around a call, with a fixed number of torch threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["clocks_of", "seconds_of", "torch_threads"]


def clocks_of(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall-clock seconds of a call, and the seconds in which a thread worked for it, averaged over threads.

    The second is the process's CPU time over torch's number of threads. No CPU clock sees a GPU's work, so
    there it equals the first.
    """
    before = time.process_time()
    seconds = seconds_of(call, device)
    if device.type == "cuda":
        return seconds, seconds
    return seconds, (time.process_time() - before) / torch.get_num_threads()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a call, including a GPU's work."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run a block with this number of torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
