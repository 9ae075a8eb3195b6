"""One engine in a process of its own, answering commands that arrive as JSON lines.

Commands name a *subject* (a network or a cascade run by an engine), then ask to tune it, to answer for a
file of images, or to be timed. Only the process that is being asked runs; the others are stopped.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from bench.cases import load_model
from bench.handmade import PeerCascade
from bench.peers import Peer, Schedule, make_peer

__all__ = ["OURS", "main"]

OURS = "fastcascade"
Batches = list[np.ndarray]


class Subject(ABC):
    """Something that answers for a batch, with a schedule chosen for the batch size in use.

    Attributes:
        stops_early: whether the time of a batch depends on the images in it.
    """

    stops_early = False

    @abstractmethod
    def run(self, x: np.ndarray) -> Any:
        """What is timed: answer for x (n, C, H, W) float32, in the engine's own form."""

    @abstractmethod
    def answer(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """What is checked: log-probabilities or logits (n, C) and exits (n,)."""

    def tune(self, batches: Batches, seconds: float) -> str:
        """Choose the fastest schedule for such batches and describe it."""
        return "its own"


class PeerNetwork(Subject):
    """One network on a peer."""

    def __init__(self, peer: str, model: str, threads: int) -> None:
        self.peer: Peer = make_peer(peer)
        single = load_model(model)
        self.peer.build(single.stage(0).module, single.input.shape, threads)
        self.schedule: Schedule | None = None

    def run(self, x: np.ndarray) -> np.ndarray:
        return self.peer.run(x, self.schedule or self.peer.schedules(len(x))[0])

    def answer(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return {"log_probs": self.run(x), "exits": np.zeros(len(x), np.int64)}

    def tune(self, batches: Batches, seconds: float) -> str:
        candidates = self.peer.schedules(len(batches[0]))
        self.schedule = _fastest(candidates, lambda s: self.peer.run(batches[0], s), seconds)
        return _describe(self.schedule)


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

    def answer(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(("log_probs", "exits"), self.run(x), strict=True))

    def tune(self, batches: Batches, seconds: float) -> str:
        """Stage by stage, on as many rows as usually reach it."""
        exits = np.concatenate([self.run(x)[1] for x in batches])
        chosen = []
        for k, peer in enumerate(self.cascade.peers):
            reached = max(1, round(float((exits >= k).mean()) * len(batches[0])))
            rows, schedules = batches[0][:reached], self.cascade.schedules(k, reached)
            chosen.append(_fastest(schedules, lambda s, peer=peer, rows=rows: peer.run(rows, s), seconds))
        self.schedules = tuple(chosen)
        return "; ".join(map(_describe, chosen))


class Ours(Subject):
    """One network, or a whole cascade, on fastcascade."""

    def __init__(self, model: str, threads: int) -> None:
        import fastcascade as fc

        self.engine = fc.compile(load_model(model), backend="auto", threads=threads)
        self.stops_early = len(self.engine.plan.stages) > 1

    def run(self, x: np.ndarray) -> Any:
        return self.engine(x)

    def answer(self, x: np.ndarray) -> dict[str, np.ndarray]:
        out = self.run(x)
        return {"log_probs": out.probs.log().numpy(), "exits": out.exit_stage.numpy()}


def _fastest(candidates: list[Schedule], run: Any, seconds: float) -> Schedule:
    """Each candidate warmed up once, then timed for its share of ``seconds``; the best of those wins."""
    times = []
    for candidate in candidates:
        run(candidate)
        times.append(min(_times(lambda c=candidate: run(c), seconds / len(candidates))))
    return candidates[int(np.argmin(times))]


def _times(run: Any, seconds: float) -> list[float]:
    """Seconds of each call, for about this long and at least once."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _describe(schedule: Schedule) -> str:
    if schedule.streams == 1:
        return "whole batch"
    return f"{schedule.streams} streams of {schedule.micro_batch}{'' if schedule.padded else ' dynamic'}"


class Commands:
    """What a worker can be asked; every method is one command."""

    def __init__(self, engine: str, threads: int) -> None:
        self.engine = engine
        self.threads = threads
        self.subject: Subject | None = None
        self.batches: Batches = []

    def load(self, model: str) -> dict[str, Any]:
        """Build a model; see :func:`bench.cases.load_model`."""
        start = time.perf_counter()
        self.subject = None  # frees the one before
        if self.engine == OURS:
            self.subject = Ours(model, self.threads)
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

    def answer(self, path: str) -> dict[str, Any]:
        """Write what the subject says about all images, as tuned."""
        assert self.subject is not None
        answers = [self.subject.answer(x) for x in self.batches]
        log_probs, exits = (np.concatenate([a[key] for a in answers]) for key in ("log_probs", "exits"))
        np.savez(path, log_probs=log_probs, exits=exits)
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

    def again(self) -> dict[str, Any]:
        """One batch."""
        assert self.subject is not None
        self.subject.run(self.batches[0])
        return {}

    def fact(self, name: str, **arguments: Any) -> dict[str, Any]:
        """What no comparison shows about our engine; see :mod:`bench.facts`."""
        from bench import facts  # needs today's fastcascade; the rest runs with older ones

        answer: dict[str, Any] = getattr(facts, name)(threads=self.threads, **arguments)
        return answer


def main() -> None:
    """``python -m bench.worker ENGINE THREADS``: read commands on stdin, answer on the original stdout."""
    engine, threads = sys.argv[1], int(sys.argv[2])
    # Converters print; the protocol keeps the real stdout to itself.
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    commands = Commands(engine, threads)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(commands, command.pop("command"))(**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=protocol, flush=True)


if __name__ == "__main__":
    main()
