"""The standard benchmark: every case and engine, one results file per machine, one table of targets.

``make bench`` runs it; it takes about a quarter of an hour on two quiet cores. ``--only`` measures part of it
and keeps the rest of the results file; ``--everything`` adds what no target needs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.cases import BATCHES, NETWORKS, Case, cascade_images, noise
from bench.engines import OURS, engines_for, left_out
from bench.fma_peaks import fma_peaks
from bench.machine import ROOT, THREADS, machine, machine_slug
from bench.measure import Engine, Worker, measure
from bench.paced import measure_paced
from bench.stored import PEAK, beside, beside_table
from bench.targets import target_table

__all__ = ["main", "measure_cases", "measure_facts"]

CASCADE = ROOT / "examples" / "cifar10" / "resnet9" / "model"
EFFICIENCY_BATCHES = (8, 64, 256)


def standard_cases(threads: int, cascade: Path, everything: bool) -> list[Case]:
    """The cascade, then dense networks, at the batch sizes of the targets."""
    networks = (*NETWORKS, "resnet9:32") if everything else NETWORKS
    batches = (*BATCHES, 64) if everything else BATCHES
    cascades = [Case(f"cascade:{cascade}", batch, threads) for batch in batches if everything or batch > 1]
    return cascades + [Case(network, batch, threads) for network in networks for batch in batches]


def measure_cases(
    engines: Mapping[Case, Sequence[Engine]],
    images_of: Callable[[Case], np.ndarray],
    rounds: int,
    seconds: float,
    tuning: float,
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Measure the engines of cases in order; they stay loaded for all batch sizes of a model.

    Yields:
        each case with its entry of the results file, when it is measured.
    """
    for _, group in groupby(engines, key=lambda case: case.model):
        sizes = list(group)
        with ExitStack() as stack:
            workers = {}
            for engine in {engine.name: engine for case in sizes for engine in engines[case]}.values():
                workers[engine.name] = stack.enter_context(Worker(engine, sizes[0].threads))
            for worker in workers.values():  # after all have started, so that they import in parallel
                worker.load(worker.engine.model(sizes[0]))
            for case in sizes:
                start, peaks = time.perf_counter(), fma_peaks(case.threads)
                images = images_of(case)
                present = [workers[engine.name] for engine in engines[case]]
                timings = measure(case, present, images, rounds, seconds, tuning)
                entry = {
                    "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "batch": case.batch,
                    "threads": case.threads,
                    "images": len(images),
                    "rounds": rounds,
                    "peaks": peaks,
                    "engines": {timing.engine: timing.as_json() for timing in timings},
                    "took_s": time.perf_counter() - start,
                }
                yield case, entry


def _images(case: Case) -> np.ndarray:
    return cascade_images(case.model, case.batch) if case.is_cascade else noise(case.batch)


def measure_facts(cascade: Path, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """The facts about our engine alone, each in a process of its own; see :mod:`bench.facts`."""
    models = {network: network for network in NETWORKS} | {"cascade": f"cascade:{cascade}"}

    def ask(name: str, **arguments: Any) -> dict[str, Any]:
        with Worker(Engine(OURS, OURS), threads) as worker:
            try:
                return worker.ask("fact", name=name, **arguments)
            except RuntimeError as error:
                return {"refused": str(error)}

    # Turns long enough for many different batches of the largest size.
    schedule = {"batches": EFFICIENCY_BATCHES, "rounds": rounds, "seconds": 4 * seconds}
    return {
        "schedule": ask("schedule", model=models["cascade"], **schedule),
        "memory": {name: ask("memory", model=model, batches=BATCHES) for name, model in models.items()},
        "errors": {name: ask("errors", model=model) for name, model in models.items()},
    }


def results_table(entry: dict[str, Any], title: str) -> Table:
    """One case: every engine with its spread, its schedule and its share of the peak."""
    peak = max(value for key, value in entry["peaks"].items() if key.startswith("fp32"))
    table = Table(title=f"{title} · fp32 peak {peak:.0f} GFLOP/s", title_justify="left")
    if entry.get("left_out"):
        table.caption = f"not in this set: {', '.join(entry['left_out'])}"
    for column in ("engine", "images/s", "±", "GFLOP/s", "of peak", "error", "schedule"):
        table.add_column(column, justify="left" if column in ("engine", "schedule") else "right")
    rows = sorted(entry["engines"].values(), key=lambda row: -row.get("images_per_s", 0))
    for row in rows:
        if "refused" in row:
            reason = row["refused"].splitlines()[0]
            table.add_row(row["engine"], "–", "", "", "", "", f"[yellow]refused: {escape(reason)}")
            continue
        table.add_row(
            row["engine"],
            f"{row['images_per_s']:,.0f}",
            f"{row['spread'] / 2:.0%}",
            f"{row['gflops']:,.0f}",
            f"{row['gflops'] / peak:.0%}",
            f"{row['gate']['max_error']:.0e}",
            row["schedule"],
        )
    return table


def load_results(path: Path) -> dict[str, Any]:
    """The results file, or an empty one."""
    results: dict[str, Any] = {"cases": {}, "facts": {}}
    if path.exists():
        results |= json.loads(path.read_text())
    return results


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help='only cases named like one of these, "facts", "paced"')
    parser.add_argument("--everything", action="store_true", help="all peers, networks and batch sizes")
    parser.add_argument("--engines", nargs="*", help="measure only the engines of these names")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--cascade", type=Path, default=CASCADE, help="folder of the saved cascade")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1, help="of one engine's turn in a round")
    parser.add_argument("--tuning", type=float, default=2.0, help="seconds to choose a schedule, per network")
    parser.add_argument("--output", type=Path, help="results file; bench/results/<machine>.json by default")
    parser.add_argument("--beside", type=Path, help="a stored results file to compare with (indicative)")
    parser.add_argument(
        "--baseline", default=PEAK, help="scale the comparison by this, or by the engine of this name"
    )
    arguments = parser.parse_args()
    if arguments.beside is not None and not arguments.beside.is_file():
        parser.error(f"--beside: {arguments.beside} is not a file")
    return arguments


def main() -> None:
    """Measure, write the results after every case, show the tables."""
    arguments, start, console = _arguments(), time.perf_counter(), Console()
    path = arguments.output or ROOT / "bench" / "results" / f"{machine_slug(machine())}.json"
    results = load_results(path) | {"machine": machine()}
    stored = None if arguments.beside is None else json.loads(arguments.beside.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)

    def wanted(name: str) -> bool:
        return arguments.only is None or any(part in name for part in arguments.only)

    cascade = arguments.cascade.resolve()
    cases = [c for c in standard_cases(arguments.threads, cascade, arguments.everything) if wanted(c.key)]
    engines = {
        case: [
            engine
            for engine in engines_for(case, arguments.everything)
            if arguments.engines is None or engine.name in arguments.engines
        ]
        for case in cases
    }
    settings = (arguments.rounds, arguments.seconds, arguments.tuning)
    measured = {}
    for case, entry in measure_cases(engines, _images, *settings):
        entry["left_out"] = left_out(case, arguments.everything)
        results["cases"][case.key] = measured[case.key] = entry
        path.write_text(json.dumps(results, indent=1) + "\n")
        console.print(results_table(entry, case.key))
    if wanted("facts"):
        results["facts"] = measure_facts(cascade, arguments.threads, arguments.rounds, arguments.seconds)
        path.write_text(json.dumps(results, indent=1) + "\n")
    if wanted("paced"):
        results["paced"] = measure_paced(arguments.threads, arguments.rounds)
        path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(target_table(results))
    if stored is not None:
        rows = beside(measured, stored["cases"], arguments.baseline)
        console.print(beside_table(rows, arguments.beside.name, arguments.baseline))
    console.print(f"{(time.perf_counter() - start) / 60:.1f} minutes; results: {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
