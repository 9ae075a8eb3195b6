"""Compare two commits in one run: built in worktrees, timed in ABBA turns, ratios with intervals.

``make bench-compare A=… B=…``. Both run under this checkout's harness, so only the library differs.
The intervals hold for all cases together (Bonferroni) and allow for the memory layout of a process, so a
commit compared with itself shows a difference in at most one run of twenty.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.cases import Case, cascade_images, noise
from bench.machine import CACHE, ROOT, THREADS
from bench.measure import Engine, Timing, Worker, measure
from bench.ratios import ratios_together
from bench.worker import OURS

__all__ = ["build", "compare", "comparison_table", "main"]

CASES = (("resnet_cifar:20", 8), ("resnet_cifar:20", 256), ("resnet_cifar:56", 64), ("cascade:random", 64))
_IMAGES = 512
"""Of the cascade's: more would leave fewer rounds in a minute."""

Results = list[tuple[Case, list[Timing]]]
progress = Console(stderr=True)


def resolve(revision: str) -> str:
    """The full hash of a commit.

    Raises:
        RuntimeError: there is no such commit.
    """
    try:
        return _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"got {revision!r}, which names no commit here; expected a branch, a tag or a hash (git log)"
        ) from error


def build(commit: str) -> Path:
    """Check out a commit in a worktree and install it into a folder of its own, once per commit.

    The worktree is removed afterwards, also when the build fails or is interrupted. The installed packages
    stay in ``.benchmarks``.

    Args:
        commit: full hash.

    Returns:
        the folder to import ``fastcascade`` from.

    Raises:
        RuntimeError: it does not build.
    """
    folder = CACHE / "commits" / f"{commit}-{sys.implementation.cache_tag}"
    site, built = folder / "site", folder / "built"
    if not built.exists():
        progress.print("building (a minute or two)")
        start = time.perf_counter()
        shutil.rmtree(site, ignore_errors=True)
        with _worktree(commit, folder / "tree") as tree:
            _install(tree, site)
        built.touch()
        progress.print(f"built in {time.perf_counter() - start:.0f} s", highlight=False)
    return site


@contextmanager
def _worktree(commit: str, tree: Path) -> Iterator[Path]:
    _remove_worktree(tree)  # left by a killed run
    try:
        _git("worktree", "add", "--detach", str(tree), commit)
        yield tree
    finally:
        _remove_worktree(tree)


def _remove_worktree(tree: Path) -> None:
    # Forced twice: an interrupted checkout is locked.
    command = ["git", "worktree", "remove", "--force", "--force", tree]
    subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
    shutil.rmtree(tree, ignore_errors=True)


def _install(tree: Path, site: Path) -> None:
    """Build what is in ``tree`` with this environment's tools.

    Raises:
        RuntimeError: it does not build; the compiler's messages are on stderr.
    """
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", site, tree]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its compilers too, before their folder is removed
            raise
    if code:
        raise RuntimeError("pip could not build it; its messages are above")


def _git(*arguments: str) -> str:
    command = ("git", *arguments)
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def compare(a: Path, b: Path, threads: int, rounds: int, seconds: float) -> Results:
    """Time the libraries in folders ``a`` and ``b`` on the quick set.

    Raises:
        RuntimeError: one of them fails a case or returns wrong results.
    """
    results = []
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(Engine(name, OURS), threads, library))
            for name, library in (("A", a), ("B", b))
        ]
        for i, (model, batch) in enumerate(CASES, 1):
            case = Case(model, batch, threads)
            progress.print(f"measuring {i} of {len(CASES)}: {case.key}", highlight=False)
            images = cascade_images(model, batch)[:_IMAGES] if case.is_cascade else noise(batch)
            for worker in workers:
                worker.load(model)
            timings = measure(case, workers, images, rounds, seconds, tuning=0)
            for timing in timings:
                if timing.refused is not None:
                    raise RuntimeError(f"{case.key}: {timing.refused}")
            results.append((case, timings))
    return results


def comparison_table(results: Results) -> Table:
    """Per case: both rates, how many times faster B is, and whether the difference exceeds the noise."""
    table = Table(
        "case, batch",
        title=f"images/s, threads {results[0][0].threads}",
        title_justify="left",
        caption="intervals hold for all cases together, at 95 %",
        caption_justify="left",
    )
    for column in ("A", "B", "B over A", "B is"):
        table.add_column(column, justify="right")
    values = ratios_together([(b.seconds, a.seconds) for _, (a, b) in results])
    for (case, (a, b)), value in zip(results, values, strict=True):
        verdict = "noise" if value.is_noise else "faster" if value.value > 1 else "slower"
        rates = (f"{timing.images_per_s:,.0f}" for timing in (a, b))
        table.add_row(f"{case.model}, {case.batch}", *rates, f"{value:.3f}", verdict)
    return table


def _end(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


def main() -> None:
    """Build, measure, show."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("a", help="a commit, branch or tag")
    parser.add_argument("b", help="another one")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.1, help="of one turn")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)  # an exception, so that worktrees are removed
    try:
        commits = [resolve(arguments.a), resolve(arguments.b)]
        sites = []
        for name, commit in zip("AB", commits, strict=True):
            title = _git("log", "-1", "--format=%h %s", commit)
            progress.print(f"{name}: {escape(title)}", highlight=False)
            sites.append(build(commit))
        results = compare(*sites, arguments.threads, arguments.rounds, arguments.seconds)
    except RuntimeError as error:
        sys.exit(f"bench-compare: {error}")
    Console().print(comparison_table(results))


if __name__ == "__main__":
    main()
