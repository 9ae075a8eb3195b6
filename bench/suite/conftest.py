"""Shared by the suites: pinned threads, cold caches on request, and one way to time a call.

The suites are for work on one part. Published figures come from ``make bench``, which interleaves engines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.machine import THREADS

BEYOND_CACHES = 64 << 20

Timed = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cold", action="store_true", help="empty the caches before every round")


@pytest.fixture(autouse=True)
def _pinned() -> Iterator[None]:
    """Two CPUs for this process and its children, and as many threads in torch."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:THREADS])
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)
    os.sched_setaffinity(0, allowed)


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Timed:
    """``timed(call, gflop)`` times a call whose result was checked, and records its GFLOP/s."""
    cold = request.config.getoption("--cold")
    flush = np.ones(BEYOND_CACHES, np.uint8) if cold else None

    def run(call: Callable[[], object], gflop: float) -> None:
        call()
        if flush is None:
            benchmark(call)
        else:
            benchmark.pedantic(call, setup=lambda: flush.__iadd__(1) is None, rounds=30)
        if benchmark.stats is not None:
            benchmark.extra_info["gflops"] = round(gflop / benchmark.stats.stats.median, 1)

    return run
