"""Calls as a server makes them, for ours and the peers: one network, 8 images or 1 to 8 a call, in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import Case, noise, reference_exits
from bench.engines import FP32_PEERS, OURS, PYTORCH
from bench.measure import Engine, Worker, prepare
from bench.peers import PEERS
from fastcascade.benchmarking.clocks import percentiles_ms
from fastcascade.benchmarking.pacing import PATTERNS

__all__ = ["NETWORK", "measure_paced"]

NETWORK = "resnet_cifar:20"
_IMAGES = 8
_CALLS = 20
"""Of one pattern in one turn."""
_TUNING = 0.1
"""Seconds of the last choice among a peer's schedules, for each number of images."""


def paced_engines() -> list[Engine]:
    """Ours and the fp32 runtimes; PyTorch's own engines are never the fastest."""
    peers = [p for p in PEERS if p.name in FP32_PEERS and p.name not in PYTORCH]
    return [Engine(OURS, OURS), *(Engine(p.name, p.name, p.tolerance) for p in peers)]


def measure_paced(
    threads: int, rounds: int, engines: Sequence[Engine] | None = None, calls: int = _CALLS
) -> dict[str, Any]:
    """Latencies by engine and pattern; an engine that fails or returns wrong results is refused.

    Returns:
        ``calls`` of each pattern, and ``engines``: by name, for each pattern "p50", "p95" and "p99" in ms, or
        the reason why the engine was "refused".
    """
    case = Case(NETWORK, _IMAGES, threads)
    images = noise(_IMAGES)
    expected = reference_exits(NETWORK, images)
    times: dict[Worker, dict[str, list[float]]] = {}
    refused: dict[str, str] = {}
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "images.npy")
        np.save(path, images)
        workers = [stack.enter_context(Worker(e, threads)) for e in engines or paced_engines()]
        for worker in workers:
            worker.load(case.model)
        for worker in workers:
            try:
                prepare(worker, path, _IMAGES, expected, _TUNING)
                worker.ask("tune_each", seconds=_TUNING)
                times[worker] = {pattern.name: [] for pattern in PATTERNS}
            except RuntimeError as error:
                refused[worker.engine.name] = str(error)
        for r in range(rounds):
            for worker in list(times)[:: 1 if r % 2 == 0 else -1]:
                try:
                    for name, seconds in times[worker].items():
                        seconds += worker.ask("paced", pattern=name, count=calls, seed=r)["seconds"]
                except RuntimeError as error:
                    refused[worker.engine.name] = str(error)
                    del times[worker]
    measured = {
        worker.engine.name: {name: percentiles_ms(seconds) for name, seconds in patterns.items()}
        for worker, patterns in times.items()
    }
    reasons = {name: {"refused": reason} for name, reason in refused.items()}
    return {"network": NETWORK, "calls": calls * rounds, "engines": measured | reasons}
