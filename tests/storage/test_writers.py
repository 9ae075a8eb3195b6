"""Several writers, killed writers: a reader finds a whole model at any moment, and nothing stays behind."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcascade.errors import InvalidArgument
from fastcascade.storage.bundle import BundleFormat, load_bundle, save_bundle
from fastcascade.storage.files import write_atomically

DEMO = BundleFormat("demo", 1)


def save(directory: Path, writer: int, number: int, overwrite: bool = True) -> None:
    """A bundle whose tensor and JSON say who wrote it, so that a mixture shows."""
    tensors = {"w": torch.full((2000,), writer * 1000 + number)}
    save_bundle(directory, DEMO, {"writer": writer, "number": number}, tensors, overwrite=overwrite)


def load(directory: Path) -> None:
    """Load, and check that the tensor belongs to the JSON."""
    content, tensors = load_bundle(directory, DEMO)
    assert tensors["w"].tolist() == [content["writer"] * 1000 + content["number"]] * 2000


def saves(directory: Path, writer: int, count: int) -> None:
    for number in range(count):
        save(directory, writer, number)


def start_process(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return child


def alive(children: dict[int, int]) -> bool:
    for child in [c for c, status in children.items() if status < 0]:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            children[child] = os.waitstatus_to_exitcode(status)
    return -1 in children.values()


def only_one_bundle(directory: Path) -> bool:
    names = sorted(path.name for path in directory.iterdir())
    return len(names) == 2 and names[0].startswith("demo-") and names[1] == "demo.json"


def test_threads_that_save_into_one_directory_neither_fail_nor_tear(tmp_path: Path) -> None:
    save(tmp_path, 9, 0)
    failures: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=run, args=(lambda n=n: saves(tmp_path, n, 25),)) for n in range(4)]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        load(tmp_path)
    assert not failures
    load(tmp_path)
    assert only_one_bundle(tmp_path)


def test_threads_that_write_one_file_each_leave_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    failures: list[BaseException] = []

    def write(letter: bytes) -> None:
        try:
            for _ in range(25):
                write_atomically(path, lambda file: [file.write(letter * 1000) for _ in range(10)])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert path.read_bytes() in (b"a" * 10_000, b"b" * 10_000, b"c" * 10_000)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("rounds", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_processes_that_save_into_one_directory_leave_it_loadable(tmp_path: Path, rounds: int) -> None:
    for number in range(rounds):
        directory = tmp_path / str(number)
        save(directory, 9, 0)
        children = {start_process(lambda n=n: saves(directory, n, 15)): -1 for n in range(3)}  # noqa: B023
        while alive(children):
            load(directory)
        assert set(children.values()) == {0}
        load(directory)
        assert only_one_bundle(directory)


@pytest.mark.parametrize("seconds", [2.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_writers_killed_at_any_moment_leave_a_directory_that_loads_and_heals(
    tmp_path: Path, seconds: float
) -> None:
    save(tmp_path, 9, 0)
    choose = random.Random(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        children = [start_process(lambda n=n: saves(tmp_path, n, 1000)) for n in range(3)]
        for child in children:
            time.sleep(choose.uniform(0.001, 0.05))
            os.kill(child, signal.SIGKILL)
            load(tmp_path)
        for child in children:
            os.waitpid(child, 0)
        load(tmp_path)
    save(tmp_path, 9, 1)
    assert only_one_bundle(tmp_path), sorted(os.listdir(tmp_path))


def test_of_two_first_saves_one_wins_and_the_other_is_refused(tmp_path: Path) -> None:
    """Both begin while the directory is empty; without overwrite, the second must not replace the first."""
    for number in range(5):
        directory, refused = tmp_path / str(number), list[int]()
        barrier = threading.Barrier(4)

        def first_save(
            writer: int, directory: Path = directory, refused: list[int] = refused, barrier: Any = barrier
        ) -> None:
            barrier.wait()
            try:
                save(directory, writer, 0, overwrite=False)
            except InvalidArgument:
                refused.append(writer)

        threads = [threading.Thread(target=first_save, args=(writer,)) for writer in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 3
        assert load_bundle(directory, DEMO)[0]["writer"] not in refused
        load(directory)
        assert only_one_bundle(directory)


def test_a_file_that_appears_while_another_is_written_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def slow(file: Any) -> None:
        path.write_bytes(b"from elsewhere")
        file.write(b"mine")

    with pytest.raises(InvalidArgument, match="exists"):
        write_atomically(path, slow, overwrite=False)
    assert path.read_bytes() == b"from elsewhere"
    assert list(tmp_path.iterdir()) == [path]


def test_without_hard_links_a_new_file_still_never_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    write_atomically(tmp_path / "file", b"first", overwrite=False)
    with pytest.raises(InvalidArgument, match="exists"):
        write_atomically(tmp_path / "file", b"second", overwrite=False)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_reader_between_the_two_files_of_a_save_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is replaced after the reader read the JSON and before it opens the tensors."""
    from fastcascade.storage import bundle

    save(tmp_path, 1, 0)
    read_json = bundle.read_json

    def slow_read(path: Path) -> dict[str, Any]:
        document = read_json(path)
        monkeypatch.setattr(bundle, "read_json", read_json)
        save(tmp_path, 2, 0)
        return document

    monkeypatch.setattr(bundle, "read_json", slow_read)
    assert load_bundle(tmp_path, DEMO)[0]["writer"] == 2


def killed_while_writing(path: Path) -> None:
    ready, tell = os.pipe()

    def write(file: Any) -> None:
        file.write(b"half")
        file.flush()
        os.write(tell, b"x")
        time.sleep(60)

    child = start_process(lambda: write_atomically(path, write))
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    killed_while_writing(path)
    assert len(list(tmp_path.iterdir())) == 1
    write_atomically(path, b"whole")
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_live_writers_and_of_other_programs_are_left_alone(tmp_path: Path) -> None:
    path, other = tmp_path / "rows.csv", tmp_path / ".rows.csv.notes.tmp"
    other.write_text("mine")

    def outer(file: Any) -> None:
        file.write(b"outer")
        write_atomically(path, b"inner")
        assert path.read_bytes() == b"inner"

    write_atomically(path, outer)
    assert path.read_bytes() == b"outer"
    assert set(tmp_path.iterdir()) == {path, other}


def test_old_leftovers_of_other_destinations_are_removed_too(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "a.csv")
    (leftover,) = tmp_path.iterdir()
    write_atomically(tmp_path / "b.csv", b"1")
    assert leftover.exists(), "a fresh one may belong to a machine whose locks are not visible here"
    os.utime(leftover, (0, 0))
    write_atomically(tmp_path / "b.csv", b"2")
    assert [p.name for p in tmp_path.iterdir()] == ["b.csv"]


@pytest.mark.parametrize("torn", [None, b"", b"\0" * 100, b'{"format": "fastcasc'])
def test_a_directory_with_an_incomplete_bundle_can_be_saved_into(tmp_path: Path, torn: bytes | None) -> None:
    save(tmp_path, 1, 0)
    if torn is None:
        (tmp_path / "demo.json").unlink()
    else:
        (tmp_path / "demo.json").write_bytes(torn)
    save(tmp_path, 2, 0, overwrite=False)
    load(tmp_path)
    assert only_one_bundle(tmp_path)


@pytest.mark.parametrize("found", [b'{"of": "another program"}', None])
def test_what_another_program_keeps_under_the_name_is_not_replaced(
    tmp_path: Path, found: bytes | None
) -> None:
    path = tmp_path / "demo.json"
    path.symlink_to("nowhere") if found is None else path.write_bytes(found)
    with pytest.raises(InvalidArgument, match="exists"):
        save(tmp_path, 2, 0, overwrite=False)
    assert path.is_symlink() if found is None else path.read_bytes() == found
