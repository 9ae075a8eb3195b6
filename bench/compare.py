"""Two commits against each other in one run: built in worktrees, timed in turns ABBA, ratios with intervals.

``make bench-compare A=… B=…``. Both are measured by this checkout's harness, so only the library differs.
The intervals hold for all cases together (Bonferroni), so that a commit beside itself shows a difference in
at most one run of twenty.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cases import Case, cascade_images, noise
from bench.machine import CACHE, ROOT, THREADS
from bench.measure import Engine, Timing, Worker, measure
from bench.ratios import ratios_together
from bench.worker import OURS

__all__ = ["build", "main"]

_CASES = (("resnet_cifar:20", 8), ("resnet_cifar:20", 256), ("resnet_cifar:56", 64), ("cascade:random", 64))
_IMAGES = 512
"""Of the cascade's: a pass over more would leave fewer rounds in a minute."""


def build(revision: str) -> Path:
    """Check a commit out beside this one and install it into a folder of its own; cached by commit.

    The worktree is removed when it is built; the installed packages stay in ``.benchmarks``.

    Returns:
        the folder to import ``fastcascade`` from.

    Raises:
        subprocess.CalledProcessError: no such revision, or it does not build.
    """
    commit = _output("git", "rev-parse", "--verify", f"{revision}^{{commit}}")
    folder = CACHE / "commits" / commit
    site = folder / "site"
    if not (folder / "built").exists():
        tree = folder / "tree"
        _output("git", "worktree", "add", "--force", "--detach", str(tree), commit)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        try:
            subprocess.run([*install, "--upgrade", "--target", site, tree], check=True)
        finally:
            _output("git", "worktree", "remove", "--force", str(tree))
        (folder / "built").touch()
    return site


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def compare(a: Path, b: Path, threads: int, rounds: int, seconds: float) -> list[tuple[Case, list[Timing]]]:
    """Time the library in folder ``a`` and that in ``b`` on the quick set.

    Raises:
        RuntimeError: one of them fails a case or answers wrongly.
    """
    results = []
    for model, batch in _CASES:
        case = Case(model, batch, threads)
        images = cascade_images(model, batch)[:_IMAGES] if case.is_cascade else noise(batch)
        with ExitStack() as stack:
            workers = []
            for name, library in (("A", a), ("B", b)):
                workers.append(stack.enter_context(Worker(Engine(name, OURS), threads, library)))
                workers[-1].load(model)
            timings = sorted(measure(case, workers, images, rounds, seconds, 0), key=lambda t: t.engine)
        for timing in timings:
            if timing.refused is not None:
                raise RuntimeError(f"{case.key}: {timing.refused}")
        results.append((case, timings))
    return results


def comparison_table(results: list[tuple[Case, list[Timing]]]) -> Table:
    """Per case: both rates, how many times faster B is, and whether that is more than noise."""
    table = Table("case")
    for column in ("A, images/s", "B, images/s", "B over A", ""):
        table.add_column(column, justify="right")
    values = ratios_together([(b.seconds, a.seconds) for _, (a, b) in results])
    for (case, (a, b)), value in zip(results, values, strict=True):
        verdict = "noise" if value.is_noise else "B is faster" if value.value > 1 else "B is slower"
        table.add_row(case.key, f"{a.images_per_s:,.0f}", f"{b.images_per_s:,.0f}", f"{value:.3f}", verdict)
    return table


def main() -> None:
    """Build, measure, show."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("a", help="a commit, branch or tag")
    parser.add_argument("b", help="another one")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.2, help="of one turn")
    arguments = parser.parse_args()
    a, b = build(arguments.a), build(arguments.b)
    results = compare(a, b, arguments.threads, arguments.rounds, arguments.seconds)
    Console().print(comparison_table(results))


if __name__ == "__main__":
    main()
