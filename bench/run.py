"""The standard set: every case, every engine, one results file per machine, one table of targets.

``python -m bench.run`` takes at most ten minutes on two cores; ``--only`` measures part of it and keeps the
rest of the results file as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cases import BATCHES, NETWORKS, Case, cascade_images, model_gflop, noise
from bench.engines import engines_for
from bench.machine import ROOT, ceilings, machine, machine_slug
from bench.measure import Worker, measure
from bench.targets import target_table

__all__ = ["main", "measure_cases"]

CASCADE = ROOT / "examples" / "cifar10" / "model"
CASCADE_BATCHES = (8, 64, 256)


def standard_cases(threads: int, cascade: Path) -> list[Case]:
    """Dense networks at every batch size, then the cascade."""
    dense = [Case(network, batch, threads) for network in NETWORKS for batch in BATCHES]
    return dense + [Case(f"cascade:{cascade}", batch, threads) for batch in CASCADE_BATCHES]


def measure_cases(
    cases: list[Case], everyone: bool, names: list[str] | None, rounds: int, seconds: float, tuning: float
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Measure cases in order; engines stay loaded over the batch sizes of a model.

    Yields:
        each case with its entry of the results file, as soon as it is measured.
    """
    for model, group in groupby(cases, key=lambda case: case.model):
        gflop = None if model.startswith("cascade:") else model_gflop(model)
        workers: dict[str, Worker] = {}
        with ExitStack() as stack:
            for case in group:
                engines = engines_for(case, everyone)
                if names is not None:
                    engines = [engine for engine in engines if engine.name in names]
                for engine in engines:
                    if engine.name not in workers:
                        workers[engine.name] = stack.enter_context(Worker(engine, case.threads))
                        workers[engine.name].load(engine.model(case))
                start, peak = time.perf_counter(), ceilings(case.threads)
                images = cascade_images(case.model, case.batch) if case.is_cascade else noise(case.batch)
                present = [workers[engine.name] for engine in engines]
                timings = measure(case, present, images, rounds, seconds, tuning)
                yield (
                    case,
                    {
                        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                        "batch": case.batch,
                        "threads": case.threads,
                        "images": len(images),
                        "gflop_per_image": gflop,
                        "ceilings": peak,
                        "engines": {timing.engine: timing.as_json(gflop) for timing in timings},
                        "took_s": time.perf_counter() - start,
                    },
                )


def results_table(entry: dict[str, Any], title: str) -> Table:
    """One case: every engine with its spread, its schedule and its distance from the ceiling."""
    peak = max(value for key, value in entry["ceilings"].items() if key.startswith("fp32"))
    table = Table(title=f"{title} · fp32 ceiling {peak:.0f} GFLOP/s", title_justify="left")
    for column in ("engine", "images/s", "±", "GFLOP/s", "of ceiling", "error", "schedule"):
        table.add_column(column, justify="left" if column in ("engine", "schedule") else "right")
    rows = sorted(entry["engines"].values(), key=lambda row: -row.get("images_per_s", 0))
    for row in rows:
        if "refused" in row:
            table.add_row(row["engine"], "–", "", "", "", "", "refused")
            continue
        gflops = row.get("gflops")
        table.add_row(
            row["engine"],
            f"{row['images_per_s']:,.0f}",
            f"{row['spread'] / 2:.0%}",
            "" if gflops is None else f"{gflops:,.0f}",
            "" if gflops is None else f"{gflops / peak:.0%}",
            f"{row['gate']['max_error']:.0e}",
            row["schedule"],
        )
    return table


def load_results(path: Path) -> dict[str, Any]:
    """The results file, or an empty one of this machine."""
    if path.exists():
        results: dict[str, Any] = json.loads(path.read_text())
        return results
    return {"machine": machine(), "cases": {}}


def main() -> None:
    """Measure, write the results after every case, show the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="measure only cases whose name contains one of these")
    parser.add_argument("--everyone", action="store_true", help="the slow peers on every network too")
    parser.add_argument("--engines", nargs="*", help="measure only the engines of these names")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cascade", type=Path, default=CASCADE, help="folder of the saved cascade")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="of one engine's turn in a round")
    parser.add_argument("--tuning", type=float, default=1.0, help="seconds to find a schedule in")
    parser.add_argument("--output", type=Path, help="results file; bench/results/<machine>.json by default")
    arguments = parser.parse_args()
    path = arguments.output or ROOT / "bench" / "results" / f"{machine_slug(machine())}.json"
    results, console = load_results(path), Console()
    results["machine"] = machine()
    cases = standard_cases(arguments.threads, arguments.cascade)
    if arguments.only is not None:
        cases = [case for case in cases if any(part in case.key for part in arguments.only)]
    for case, entry in measure_cases(
        cases,
        arguments.everyone,
        arguments.engines,
        arguments.rounds,
        arguments.seconds,
        arguments.tuning,
    ):
        results["cases"][case.key] = entry
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        console.print(results_table(entry, case.key))
        for row in entry["engines"].values():
            if "refused" in row:
                console.print(f"[yellow]{row['refused']}", highlight=False)
    console.print(target_table(results))


if __name__ == "__main__":
    main()
