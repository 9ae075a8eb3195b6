"""Clocks around a call, with a fixed number of torch threads; percentiles of times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

__all__ = ["clocks_of", "percentiles_ms", "seconds_of", "torch_threads"]


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


def percentiles_ms(seconds: Sequence[float], ranks: Sequence[int] = (50, 95, 99)) -> dict[str, float]:
    """Percentiles in milliseconds: the smallest value that so many percent do not exceed.

    Example:
        >>> percentiles_ms([n / 1e3 for n in range(1, 201)])
        {'p50': 100.0, 'p95': 190.0, 'p99': 198.0}
    """
    ordered = sorted(seconds)
    return {f"p{p}": 1e3 * ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in ranks}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run a block with this number of torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
