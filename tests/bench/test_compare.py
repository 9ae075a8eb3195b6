"""``make bench-compare`` without its builds: no worktree stays behind, turns are ABBA."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

sys.path.append(str(Path(__file__).parents[2]))  # at the end: fastcascade itself stays the installed one

from bench import compare
from bench.cases import reference_exits
from bench.measure import Engine


def git(repository: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits, whose file says 1 and 2; building one copies the file, unless it says otherwise."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    for number in (1, 2):
        (folder / "number").write_text(str(number))
        git(folder, "add", "number")
        git(folder, "commit", "--quiet", "--message", f"commit [{number}]")

    def install(tree: Path, site: Path) -> None:
        site.mkdir(parents=True)
        (site / "number").write_text((tree / "number").read_text())

    monkeypatch.setattr(compare, "ROOT", folder)
    monkeypatch.setattr(compare, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(compare, "_install", install)
    return folder


def worktrees(repository: Path) -> int:
    return git(repository, "worktree", "list").count("\n") + 1


def test_a_commit_is_built_from_its_own_files_and_leaves_no_worktree(repository: Path) -> None:
    for revision, number in (("main~1", "1"), ("main", "2")):
        site = compare.build(compare.resolve(revision))
        assert (site / "number").read_text() == number
        assert not (site.parent / "tree").exists()
    assert worktrees(repository) == 1


def test_a_commit_is_built_once(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = compare.resolve("main")
    first = compare.build(commit)
    monkeypatch.delattr(compare, "_install")
    assert compare.build(commit) == first


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_build_that_fails_or_is_interrupted_leaves_nothing(
    repository: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    install, commit = compare._install, compare.resolve("main")

    def fail(tree: Path, site: Path) -> None:
        install(tree, site)
        raise failure

    monkeypatch.setattr(compare, "_install", fail)
    with pytest.raises(failure):
        compare.build(commit)
    assert worktrees(repository) == 1
    monkeypatch.setattr(compare, "_install", install)
    assert (compare.build(commit) / "number").read_text() == "2"  # the half-made folder was not taken for it


def test_a_worktree_that_a_killed_run_left_is_replaced(repository: Path) -> None:
    commit = compare.resolve("main")
    tree = compare.build(commit).parent / "tree"
    (tree.parent / "built").unlink()
    git(repository, "worktree", "add", "--detach", "--lock", str(tree), "main~1")
    assert (compare.build(commit) / "number").read_text() == "2"
    assert worktrees(repository) == 1


def test_being_ended_removes_the_worktree(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_install", lambda tree, site: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["compare", "main", "main"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            compare.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert worktrees(repository) == 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where this process was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_build_takes_its_compilers_along(tmp_path: Path, interruptible: None) -> None:
    pipe, tree = tmp_path / "pipe", tmp_path / "tree"
    tree.mkdir()
    os.mkfifo(pipe)
    compiler = (
        f"pipe = open({str(pipe)!r}, 'w'); print('up', file=pipe, flush=True); import time; time.sleep(60)"
    )
    lines = ("import subprocess, sys", f"subprocess.run([sys.executable, '-c', {compiler!r}])")
    (tree / "setup.py").write_text("\n".join(lines))
    said: list[str] = []

    def interrupt() -> None:
        with pipe.open() as lines:
            said.append(lines.readline())
            os.kill(os.getpid(), signal.SIGINT)
            said.append(lines.readline())  # nothing, once every process that holds the pipe has ended

    thread = threading.Thread(target=interrupt)
    thread.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compare._install(tree, tmp_path / "site")
    thread.join(timeout=30)
    assert said == ["up\n", ""]
    assert time.monotonic() - start < 50  # it did not end by itself


def test_an_unknown_commit_is_named(repository: Path) -> None:
    with pytest.raises(RuntimeError, match="got 'nowhere', which names no commit"):
        compare.resolve("nowhere")


class FakeWorker:
    """Answers as torch does; B takes half as long. Notes who was asked to be timed."""

    turns: ClassVar[list[str]] = []

    def __init__(self, engine: Engine, threads: int, library: Path) -> None:
        self.engine, self.library = engine, library
        self.refused = None

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def load(self, model: str) -> None:
        self.model = model

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        if command == "images":
            self.images = np.load(arguments["path"])
        if command == "results":
            expected = reference_exits(self.model, self.images)
            labels = expected.log_probs.argmax(1)
            np.savez(arguments["path"], log_probs=expected.log_probs, labels=labels, exits=expected.exits)
        if command == "time":
            self.turns.append(self.engine.name)
            return {"seconds": [0.01 if self.library.name == "old" else 0.005]}
        return {"schedule": ""}


def test_turns_are_abba_and_the_faster_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "Worker", FakeWorker)
    monkeypatch.setattr(compare, "CASES", (("resnet_cifar:8", 2), ("resnet_cifar:8", 1)))
    monkeypatch.setattr(FakeWorker, "turns", [])
    results = compare.compare(Path("old"), Path("new"), threads=1, rounds=4, seconds=0)
    assert "".join(FakeWorker.turns) == "ABBAABBA" * 2
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(compare.comparison_table(results))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("faster") == 2
    assert "resnet_cifar:8, 2 " in text
    assert "2.000× [1.980, 2.020]" in text


def test_a_commit_that_answers_wrongly_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(FakeWorker):
        def load(self, model: str) -> None:
            self.model = "resnet_cifar:14" if self.engine.name == "B" else model

    monkeypatch.setattr(compare, "Worker", Wrong)
    monkeypatch.setattr(compare, "CASES", (("resnet_cifar:8", 2),))
    with pytest.raises(RuntimeError, match="resnet_cifar:8 batch 2 threads 1: log-probabilities differ"):
        compare.compare(Path("old"), Path("new"), threads=1, rounds=1, seconds=0)
