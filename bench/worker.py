"""One engine in a process of its own that carries out commands, which arrive as JSON lines.

Commands load a *subject* (a network or a cascade on this engine), tune it, write its results for a file of
images, or time it. Only the process that carries out a command runs; the others are stopped.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.cases import calibration_images, load_model
from bench.handmade import PeerCascade
from bench.peers import WHOLE, Peer, Schedule, make_peer
from bench.quantized_peers import QuantizedPeer

__all__ = ["OURS", "OURS_INT8", "main"]

OURS, OURS_INT8 = "fastcascade", "fastcascade int8"
TUNING_BATCHES, TUNING_IMAGES = 3, 256
"""A cascade's schedules are tuned on so many batches at least, and so many images."""
FINALISTS = 4
"""Schedules that take turns after one call each."""
Batches = list[np.ndarray]


class Subject(ABC):
    """A network or a cascade on an engine, with the schedule that was tuned for the batch size in use.

    Attributes:
        stops_early: whether the time of a batch depends on the images in it.
    """

    stops_early = False

    @abstractmethod
    def run(self, x: np.ndarray) -> Any:
        """What is timed: classify x (n, C, H, W) float32."""

    @abstractmethod
    def results(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """What is checked: ``log_probs`` (n, C; logits will do), ``labels`` (n,) and ``exits`` (n,)."""

    def tune(self, batches: Batches, seconds: float) -> str:
        """Choose the fastest schedule for such batches and describe it."""
        return "its own"


class PeerNetwork(Subject):
    """One network on a peer, with a schedule for every batch size that was tuned."""

    def __init__(self, peer: str, model: str, threads: int) -> None:
        self.peer: Peer = make_peer(peer)
        single = load_model(model)
        if isinstance(self.peer, QuantizedPeer):
            self.peer.calibration = calibration_images(model, single.input.shape)
        self.peer.build(single.stage(0).module, single.input.shape, threads)
        self.chosen: dict[int, Schedule] = {}

    def run(self, x: np.ndarray) -> np.ndarray:
        return self.peer.run(x, self.chosen.get(len(x)) or self.peer.schedules(len(x))[0])

    def results(self, x: np.ndarray) -> dict[str, np.ndarray]:
        logits = self.run(x)
        return {"log_probs": logits, "labels": logits.argmax(1), "exits": np.zeros(len(x), np.int64)}

    def tune(self, batches: Batches, seconds: float) -> str:
        rows = len(batches[0])
        best = fastest(self.peer.schedules(rows), lambda s: self.peer.run(batches[0], s), seconds)
        self.chosen[rows] = best
        return _describe(best, rows)


class PeerCascadeSubject(Subject):
    """A hand-written cascade over a peer."""

    stops_early = True

    def __init__(self, peer: str, cascade: str, threads: int) -> None:
        model = load_model(cascade)
        self.cascade = PeerCascade(peer, model, model.thresholds().numpy(), threads)
        self.stages = len(model.stages)
        self.schedules: tuple[Schedule, ...] | None = None

    def run(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        schedules = self.schedules or tuple(self.cascade.schedules(k, len(x))[0] for k in range(self.stages))
        return self.cascade.run(x, schedules)

    def results(self, x: np.ndarray) -> dict[str, np.ndarray]:
        log_probs, exits = self.run(x)
        return {"log_probs": log_probs, "labels": log_probs.argmax(1), "exits": exits}

    def tune(self, batches: Batches, seconds: float) -> str:
        """Stage by stage, on the images that reach it in one batch after the other.

        The number of rows changes from batch to batch as it does when timed, so a runtime that prepares
        itself again for every new shape pays for it here too.
        """
        few = batches[: max(TUNING_BATCHES, TUNING_IMAGES // len(batches[0]))]
        exits = [self.run(x)[1] for x in few]
        chosen = []
        for k, peer in enumerate(self.cascade.peers):
            reached = [x[e >= k] for x, e in zip(few, exits, strict=True) if (e >= k).any()]
            candidates = self.cascade.schedules(k, max(map(len, reached), default=1))

            def pass_over(schedule: Schedule, peer: Peer = peer, parts: Batches = reached) -> None:
                for rows in parts:
                    peer.run(rows, schedule)

            chosen.append(fastest(candidates, pass_over, seconds))
        self.schedules = tuple(chosen)
        return "; ".join(_describe(schedule, len(batches[0])) for schedule in chosen)


class Ours(Subject):
    """One network, or a whole cascade, on fastcascade."""

    def __init__(self, model: str, threads: int, int8: bool = False) -> None:
        import fastcascade as fc

        cascade = load_model(model)
        arguments: dict[str, Any] = {}  # older versions know no calibration data
        if int8:
            from fastcascade.lowering import quantization

            # Random networks are so sensitive that no layer of theirs would be quantised.
            quantization.MAX_DIVERGENCE = math.inf
            images = calibration_images(model, cascade.input.shape)
            arguments = {"precision": "int8", "calibration_data": images}
        self.engine = fc.compile(cascade, backend="auto", threads=threads, **arguments)
        self.stops_early = len(self.engine.plan.stages) > 1

    def run(self, x: np.ndarray) -> Any:
        return self.engine(x)

    def results(self, x: np.ndarray) -> dict[str, np.ndarray]:
        out = self.run(x)
        log_probs = out.probs.log().numpy()
        return {"log_probs": log_probs, "labels": out.label.numpy(), "exits": out.exit_stage.numpy()}


def fastest(candidates: list[Schedule], run: Callable[[Schedule], object], seconds: float) -> Schedule:
    """The fastest candidate: each is warmed up and timed once, then the best few take turns.

    Args:
        run: runs a candidate over everything that decides.
        seconds: for the turns of the best few, all together.
    """
    once = {}
    for candidate in candidates:
        run(candidate)
        once[candidate] = _times(lambda c=candidate: run(c), 0)[0]
    best = sorted(candidates, key=once.__getitem__)[:FINALISTS]
    times: dict[Schedule, list[float]] = {candidate: [] for candidate in best}
    start = time.perf_counter()
    while len(best) > 1 and (not times[best[0]] or time.perf_counter() - start < seconds):
        for candidate in best:
            times[candidate] += _times(lambda c=candidate: run(c), 0)
    return min(best, key=lambda c: statistics.median(times[c] or [once[c]]))


def _times(run: Any, seconds: float) -> list[float]:
    """Seconds of each call, for about this long and at least once."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _describe(schedule: Schedule, batch: int) -> str:
    name = f"{schedule.streams} stream{'s' if schedule.streams > 1 else ''} of {schedule.micro_batch}"
    if schedule.streams == 1 and schedule.micro_batch in (batch, WHOLE):
        name = "whole batch"
    return name if schedule.shapes == "fixed" else f"{name}, {schedule.shapes}"


class Commands:
    """The commands of a worker, one per method."""

    def __init__(self, engine: str, threads: int) -> None:
        self.engine = engine
        self.threads = threads
        self.subject: Subject | None = None
        self.batches: Batches = []

    def load(self, model: str) -> dict[str, Any]:
        """Build a model; see :func:`bench.cases.load_model`."""
        start = time.perf_counter()
        self.subject = None  # frees the previous one
        if self.engine in (OURS, OURS_INT8):
            self.subject = Ours(model, self.threads, int8=self.engine == OURS_INT8)
        elif model.startswith("cascade:"):
            self.subject = PeerCascadeSubject(self.engine, model, self.threads)
        else:
            self.subject = PeerNetwork(self.engine, model, self.threads)
        return {"seconds": time.perf_counter() - start}

    def images(self, path: str, batch: int) -> dict[str, Any]:
        """Take the images (M, C, H, W) of a file, in whole batches."""
        images = np.load(path)
        self.batches = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
        return {"batches": len(self.batches)}

    def tune(self, seconds: float) -> dict[str, Any]:
        """Choose the schedule for the images' batch size."""
        assert self.subject is not None
        return {"schedule": self.subject.tune(self.batches, seconds)}

    def results(self, path: str) -> dict[str, Any]:
        """Write the subject's results for all images, as tuned."""
        assert self.subject is not None
        parts = [self.subject.results(x) for x in self.batches]
        np.savez(path, **{key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
        return {}

    def time(self, seconds: float) -> dict[str, Any]:
        """Seconds per image of each pass, for about this long after one warm-up batch.

        A pass goes over all batches where instances may stop early, otherwise over one: they cost the same.
        """
        subject = self.subject
        assert subject is not None
        batches = self.batches if subject.stops_early else self.batches[:1]
        subject.run(batches[0])
        passes = _times(lambda: [subject.run(x) for x in batches], seconds)
        return {"seconds": [t / sum(map(len, batches)) for t in passes]}

    def tune_each(self, seconds: float) -> dict[str, Any]:
        """Choose a schedule for every batch size up to the images'."""
        assert self.subject is not None
        x = self.batches[0]
        return {"schedules": [self.subject.tune([x[:rows]], seconds) for rows in range(1, len(x) + 1)]}

    def paced(self, pattern: str, count: int, seed: int) -> dict[str, Any]:
        """Seconds of calls in a pattern of :data:`fastcascade.benchmarking.pacing.PATTERNS`."""
        from fastcascade.benchmarking import pacing  # older ones have none

        subject, x = self.subject, self.batches[0]
        assert subject is not None
        wanted = next(p for p in pacing.PATTERNS if p.name == pattern)
        return {"seconds": pacing.paced_calls(lambda rows: subject.run(x[:rows]), wanted, count, seed)}

    def again(self) -> dict[str, Any]:
        """One batch."""
        assert self.subject is not None
        self.subject.run(self.batches[0])
        return {}

    def fact(self, name: str, **arguments: Any) -> dict[str, Any]:
        """A fact about our engine alone; see :mod:`bench.facts`."""
        from bench import facts  # needs today's fastcascade; the rest runs with older ones

        fact: dict[str, Any] = getattr(facts, name)(threads=self.threads, **arguments)
        return fact


def main() -> None:
    """``python -m bench.worker ENGINE THREADS``: commands on stdin, replies on the original stdout."""
    engine, threads = sys.argv[1], int(sys.argv[2])
    # Converters print to stdout, so replies go through a copy of it.
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    commands = Commands(engine, threads)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = getattr(commands, command.pop("command"))(**command)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=protocol, flush=True)


if __name__ == "__main__":
    main()
