"""The protocol of every comparison: tune, check, then time in turns, with one process awake at a time."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from bench.cases import Case, Reference, reference_exits
from bench.machine import CACHE, ROOT
from bench.ratios import relative_spread

__all__ = ["Engine", "Gate", "Timing", "Worker", "check", "measure", "prepare"]

_PATIENCE_S = 600
"""An engine that takes longer over one command is killed and refused."""


@dataclass(frozen=True)
class Engine:
    """What runs in one worker process.

    Attributes:
        name: shown in tables.
        kind: "fastcascade" or the name of a peer.
        tolerance: largest difference of log-probabilities from torch's fp32 that still counts as the same
            network.
        environment: variables set for that process only, for example a forced instruction set.
        threads: its own number, or None for the case's.
        last_only: run only the last network of a cascade, on everything.
    """

    name: str
    kind: str
    tolerance: float = 2e-3
    environment: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    last_only: bool = False

    def model(self, case: Case) -> str:
        """What this engine loads for a case."""
        return case.model.replace("cascade:", "last:") if self.last_only else case.model


class Worker:
    """A process that holds one engine and is stopped (SIGSTOP) except while it carries out a command.

    A runtime's idle threads may spin; in a stopped process they cannot slow the engine being timed.

    Args:
        threads: unless the engine has a number of its own.
        library: folder to import ``fastcascade`` from, if not where it is installed.

    Attributes:
        refused: why the engine could not load its model, or None.
    """

    def __init__(self, engine: Engine, threads: int, library: Path | None = None) -> None:
        self.engine = engine
        self.refused: str | None = None
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", engine.kind, str(engine.threads or threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=CACHE,
            env=os.environ | {"PYTHONPATH": _python_path(library)} | dict(engine.environment),
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def load(self, model: str) -> None:
        """Load a model; a failure is stored in ``refused``."""
        try:
            self.ask("load", model=model)
        except RuntimeError as error:
            self.refused = str(error)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Wake the process, send a command, wait for its reply, stop the process.

        Raises:
            RuntimeError: the worker reports an error or died; the message ends with its log's last lines.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        watchdog = threading.Timer(_PATIENCE_S, self.process.kill)
        watchdog.start()
        self.process.send_signal(signal.SIGCONT)
        line = ""
        with suppress(BrokenPipeError):
            print(json.dumps({"command": command, **arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        watchdog.cancel()
        ended = f"its process ended, or was killed after {_PATIENCE_S} s without a reply"
        reply: dict[str, Any] = json.loads(line) if line else {"error": ended}
        self.process.send_signal(signal.SIGSTOP)
        if "error" in reply:
            self.log.seek(0)
            tail = "".join(self.log.readlines()[-12:])
            raise RuntimeError(f"{self.engine.name}, on command {command!r}: {reply['error']}\n{tail}")
        return reply


def _python_path(library: Path | None) -> str:
    """A path with ``bench`` on it but without this checkout's ``fastcascade``, which is not built."""
    folder = CACHE / "path"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "bench"
    if not link.exists():
        link.symlink_to(ROOT / "bench", target_is_directory=True)
    return os.pathsep.join([*([] if library is None else [str(library)]), str(folder)])


@dataclass(frozen=True)
class Gate:
    """Whether an engine computes what torch does.

    Attributes:
        max_error: of log-probabilities (clipped at −20), over rows that left at the same exit.
        flips: share of rows that left at another exit, all of them within the band around a threshold.
    """

    max_error: float
    flips: float


def check(results: Mapping[str, np.ndarray], expected: Reference, tolerance: float) -> Gate:
    """Compare an engine's ``log_probs`` (or logits), ``labels`` and ``exits`` with torch's.

    Raises:
        RuntimeError: rows are missing, they differ by more than ``tolerance``, a label differs where the top
            two classes are further apart than two tolerances, an exit differs where the stop score is further
            than ten tolerances from its threshold, or more than 1 % of the exits differ.
    """
    exits, margin = expected.exits, expected.margin
    if len(results["log_probs"]) != len(exits):
        raise RuntimeError(f"{len(results['log_probs'])} results for {len(exits)} images")
    own = torch.from_numpy(results["log_probs"]).log_softmax(1).clamp(min=-20).numpy()
    differing = results["exits"] != exits
    if differing.mean() > 0.01 or bool((differing & (margin > 10 * tolerance)).any()):
        raise RuntimeError(
            f"{int(differing.sum())} of {len(exits)} instances leave at another exit, the furthest at a "
            f"distance of {margin[differing].max():.2g} from its threshold"
        )
    error = float(np.abs(own - expected.log_probs.clip(-20))[~differing].max())
    if not error <= tolerance:
        raise RuntimeError(f"log-probabilities differ from torch's by {error:.2g}; allowed: {tolerance:.2g}")
    top = np.sort(expected.log_probs, axis=1)[:, -2:]
    clear = ~differing & (top[:, 1] - top[:, 0] > 2 * tolerance)
    labels = int((results["labels"] != expected.log_probs.argmax(1))[clear].sum())
    if labels:
        raise RuntimeError(f"{labels} of {len(exits)} labels differ from torch's, away from ties")
    return Gate(error, float(differing.mean()))


@dataclass(frozen=True)
class Timing:
    """One engine on one case.

    Attributes:
        schedule: how it cut the batch.
        seconds: per round, the median seconds per image.
        gate: how far its results were from torch's.
        gflop: mean over the images.
        refused: why it was not timed, or None.
    """

    engine: str
    schedule: str = ""
    seconds: tuple[float, ...] = ()
    gate: Gate | None = None
    gflop: float = 0.0
    refused: str | None = None

    @property
    def images_per_s(self) -> float:
        """Median over the rounds."""
        return 1 / statistics.median(self.seconds)

    def as_json(self) -> dict[str, Any]:
        """Fields of the results file."""
        if self.refused is not None:
            return {"engine": self.engine, "refused": self.refused}
        return {
            "engine": self.engine,
            "schedule": self.schedule,
            "images_per_s": self.images_per_s,
            "spread": relative_spread(self.seconds),
            "seconds_per_image": list(self.seconds),
            "gflops": self.gflop * self.images_per_s,
            "gate": None if self.gate is None else asdict(self.gate),
        }


def measure(
    case: Case, workers: Sequence[Worker], images: np.ndarray, rounds: int, seconds: float, tuning: float
) -> list[Timing]:
    """Time every worker's engine on a case.

    Args:
        workers: with the case's model loaded.
        images: (M, C, H, W) float32; cut into batches of the case's size.
        rounds: every engine has one turn a round; the order is reversed every other round.
        seconds: of one turn, at least.
        tuning: seconds for the last choice among an engine's schedules; a cascade's stages have as many each.

    Returns:
        One :class:`Timing` per worker. An engine that fails or returns wrong results is refused.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npy")
        np.save(path, images)
        expected: dict[str, Reference] = {}
        timed: dict[Worker, Timing] = {}
        refused = []
        for worker in workers:
            model = worker.engine.model(case)
            if model not in expected:
                expected[model] = reference_exits(model, images)
            try:
                timed[worker] = prepare(worker, path, case.batch, expected[model], tuning)
            except RuntimeError as error:
                refused.append(Timing(worker.engine.name, refused=str(error)))
        for r in range(rounds):
            for worker in list(timed)[:: 1 if r % 2 == 0 else -1]:
                try:
                    passes = worker.ask("time", seconds=seconds)["seconds"]
                except RuntimeError as error:
                    refused.append(Timing(timed.pop(worker).engine, refused=str(error)))
                    continue
                turns = (*timed[worker].seconds, statistics.median(passes))
                timed[worker] = replace(timed[worker], seconds=turns)
    return [*timed.values(), *refused]


def prepare(worker: Worker, images: Path, batch: int, expected: Reference, tuning: float) -> Timing:
    """Tune an engine and compare its results with torch's.

    Raises:
        RuntimeError: it did not load, fails, or its results are wrong.
    """
    if worker.refused is not None:
        raise RuntimeError(worker.refused)
    results = images.with_name("results.npz")
    worker.ask("images", path=str(images), batch=batch)
    schedule = worker.ask("tune", seconds=tuning)["schedule"]
    worker.ask("results", path=str(results))
    with np.load(results) as arrays:
        gate = check(arrays, expected, worker.engine.tolerance)
    return Timing(worker.engine.name, schedule, gate=gate, gflop=expected.gflop)
