"""How much of torchvision and timm runs as operations, how exactly, and how fast: ``make coverage``.

Every network is lowered and compiled in a process of its own, and its results are stored at once, so a run
that is stopped goes on where it was. ``--speed`` also times it beside ONNX Runtime and OpenVINO, which takes
minutes per network.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import fastcascade as fc
from bench.architectures import ARCHITECTURES, ATTENTION, NUM_CLASSES, build, load_libraries, sample_images
from bench.cases import Case
from bench.coverage_page import verdict, write_page
from bench.engines import OURS
from bench.machine import ROOT, THREADS, machine
from bench.measure import Engine, Worker, measure
from bench.peers import PEERS
from fastcascade.testing.oracle import reference_logits

__all__ = ["RESULTS", "examine", "main"]

RESULTS = ROOT / "bench" / "results" / "coverage" / "networks.json"
SPEED_PEERS = ("ONNX Runtime", "OpenVINO")
SPEED_BATCHES = (1, 16)

_IMAGES = 2
_PATIENCE_S = 900


def examine(name: str) -> dict[str, Any]:
    """Lower and compile one network, and compare its results with float64's.

    Errors are the largest differences of a logit from float64's, whose standard deviation is 3: of the
    compiled network, of torch in fp32, and of the plan interpreted in float64, which shows errors of the
    lowering alone.
    """
    network, shape = build(name)
    x = sample_images(_IMAGES, shape, seed=1)
    cascade = fc.Cascade([network], None, NUM_CLASSES, shape)
    plan_s, plan = _timed(lambda: fc.plan(cascade))
    compile_s, program = _timed(lambda: fc.compile(plan, output="log_probs"))
    stage = plan.stages[0]
    with torch.no_grad():
        torch_fp32 = network(x)
    ours: Tensor = program(x)
    interpreted = reference_logits(plan, x.double())[0] if stage.ops else None
    with torch.no_grad():
        exact = network.double()(x.double())
    return {
        "shape": shape,
        "macs": plan.dense_macs,
        "weights": sum(p.numel() for p in network.parameters()),
        "plan_s": plan_s,
        "compile_s": compile_s,
        "operations": Counter(type(op).__name__ for op in stage.ops),
        "opaque_reason": stage.opaque_reason,
        "isa": program.program.describe()[0].isa,
        "spread": float(exact.std(0).mean()),
        "error": _error(ours, exact.log_softmax(1)),
        "torch_error": _error(torch_fp32.log_softmax(1), exact.log_softmax(1)),
        "plan_error": None if interpreted is None else _error(interpreted, exact),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _error(values: Tensor, exact: Tensor) -> float:
    return float((values.double() - exact).abs().nan_to_num(nan=torch.inf).max())


def examine_apart(name: str, threads: int) -> dict[str, Any]:
    """:func:`examine` in a process of its own; {"failed": …} if that fails or takes too long."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_examine_and_send, args=(name, threads, sender))
    process.start()
    sender.close()
    try:
        late = {"failed": f"no result after {_PATIENCE_S} s"}
        entry: dict[str, Any] = receiver.recv() if receiver.poll(_PATIENCE_S) else late
    except EOFError:
        process.join()
        entry = {"failed": f"its process ended with status {process.exitcode}"}
    process.kill()
    process.join()
    return entry


def _examine_and_send(name: str, threads: int, sender: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        entry = examine(name)
    except Exception as error:
        entry = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    sender.send(entry)


def _prepare_for_forks() -> None:
    """Load what every child needs, without starting threads, which a fork would lose."""
    torch.set_num_threads(1)
    load_libraries()
    torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(2, 2),))  # the first export loads much of torch


def measure_speed(name: str, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Images/s of this engine and the peers by batch size; an engine that fails gives its reason."""
    _, shape = build(name)
    engines = [Engine(OURS, OURS)]
    engines += [Engine(peer.name, peer.name, peer.tolerance) for peer in PEERS if peer.name in SPEED_PEERS]
    speeds: dict[str, Any] = {}
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(engine, threads)) for engine in engines]
        for worker in workers:
            worker.load(name)
        for batch in SPEED_BATCHES:
            images = sample_images(batch, shape, seed=2).numpy()
            timings = measure(Case(name, batch, threads), workers, images, rounds, seconds, seconds)
            speeds[str(batch)] = {
                timing.engine: timing.refused or 1 / statistics.median(timing.seconds) for timing in timings
            }
    return speeds


def load_results(path: Path) -> dict[str, Any]:
    """The results file, or an empty one."""
    results: dict[str, Any] = {"networks": {}}
    if path.exists():
        results |= json.loads(path.read_text())
    return results


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="only networks whose name contains one of these")
    parser.add_argument("--again", action="store_true", help="also those that the results file has")
    parser.add_argument("--speed", action="store_true", help="time them beside other runtimes")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one engine's turn in a round")
    return parser.parse_args()


def main() -> None:
    """Examine every network that has no result yet, and write the page."""
    arguments, console = _arguments(), Console()
    _prepare_for_forks()
    results = load_results(RESULTS) | {"machine": machine()}
    networks: dict[str, Any] = results["networks"]

    def store() -> None:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write_page(results)

    for name in [*(name for names in ARCHITECTURES.values() for name in names), *ATTENTION]:
        if arguments.only is not None and not any(part in name for part in arguments.only):
            continue
        if arguments.again or "when" not in networks.get(name, {}):
            kept = {key: value for key, value in networks.get(name, {}).items() if key == "speed"}
            networks[name] = kept | examine_apart(name, arguments.threads)
            store()
            console.print(f"{name}: {verdict(networks[name])}")
        if arguments.speed and (arguments.again or "speed" not in networks[name]):
            networks[name]["speed"] = measure_speed(
                name, arguments.threads, arguments.rounds, arguments.seconds
            )
            store()
            console.print(f"{name}: {networks[name]['speed']}")
    store()


if __name__ == "__main__":
    main()
