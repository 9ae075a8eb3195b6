"""Runs into a folder: killed at any moment and started again, every input has exactly one row."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import exit_code_of
from PIL import Image
from pyarrow import parquet

import fastcascade as fc
from fastcascade.data.image_data import ImageData, IndexIds
from fastcascade.data.sources import load_inputs
from fastcascade.engine import CompiledCascade
from fastcascade.errors import DataError, InvalidArgument, SaveError
from fastcascade.prediction.runs import RunOptions, Tally, predict_to_file, predict_to_folder
from fastcascade.storage.files import exclusive

N, ROWS = 23, 5


def tiny(seed: int = 1, side: int = 2) -> fc.Cascade:
    """Two linear classifiers."""
    torch.manual_seed(seed)
    pixels = 3 * side * side
    stages = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(pixels, 3)) for _ in range(2)]
    preprocess = fc.Normalize((0.5,) * 3, (0.2,) * 3)
    return fc.Cascade(stages, fc.MLPSelector(), 3, (3, side, side), preprocess=preprocess)


@pytest.fixture(scope="module")
def model() -> CompiledCascade:
    return fc.compile(tiny(), backend="reference")


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    images = np.random.default_rng(0).integers(0, 256, (N, 2, 2, 3), np.uint8)
    np.save(tmp_path / "x.npy", images)
    return load_inputs(tmp_path / "x.npy", (3, 2, 2))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(model: CompiledCascade, data: ImageData, out: Path, point: Any = None, **options: Any) -> Tally:
    return predict_to_folder(model, data, out, point, RunOptions(**({"rows_per_file": ROWS} | options)))


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a file, or of all parts in a folder."""
    if out.is_dir():
        return [row for path in sorted(out.glob("part-*")) for row in rows(path)]
    if out.suffix == ".parquet":
        return parquet.read_table(out).to_pylist()
    if out.suffix == ".jsonl":
        return [json.loads(line) for line in out.read_text().splitlines()]
    with open(out, newline="") as file:
        return list(csv.DictReader(file))


def check(out: Path, model: CompiledCascade, data: ImageData) -> None:
    """Every input once, in order, with the label that the model gives; a manifest; nothing else."""
    found = rows(out)
    assert [row["id"] for row in found] == list(data.ids[:])
    images = data.images.read(range(len(data)))[0]  # type: ignore[union-attr]
    assert [int(row["label"]) for row in found] == model(images).label.tolist()
    manifest = json.loads((out / "_manifest.json").read_text())
    assert manifest["rows"] == len(data)
    assert sum(part["rows"] for part in manifest["parts"]) == len(data)
    assert {path.name for path in out.iterdir()} == {
        "_manifest.json", *(part["file"] for part in manifest["parts"])
    }  # fmt: skip


def check_file(path: Path, model: CompiledCascade, data: ImageData) -> None:
    """The same of a single file; the folder of its parts is gone."""
    found = rows(path)
    assert [row["id"] for row in found] == list(data.ids[:])
    images = data.images.read(range(len(data)))[0]  # type: ignore[union-attr]
    assert [int(row["label"]) for row in found] == model(images).label.tolist()
    assert not path.with_name(f"{path.name}.parts").exists()


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_parts_and_manifest(model: CompiledCascade, data: ImageData, out: Path, kind: str) -> None:
    tally = run(model, data, out, format=kind)
    check(out, model, data)
    assert len(list(out.glob(f"part-*.{kind}"))) == 5
    manifest = json.loads((out / "_manifest.json").read_text())
    assert (tally.rows, tally.errors) == (N, 0)
    assert manifest["exit_shares"] == [n / N for n in tally.exits]
    assert manifest["mean_macs"] == tally.cost_macs / N


def test_a_parquet_folder_reads_as_one_table(model: CompiledCascade, data: ImageData, out: Path) -> None:
    run(model, data, out, top_k=2)
    table = parquet.read_table(out)
    assert table.num_rows == N
    assert table.column_names[-2:] == ["top_labels", "top_probabilities"]


def test_a_complete_run_is_not_repeated(model: CompiledCascade, data: ImageData, out: Path) -> None:
    first = run(model, data, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(model, data, out) == first
    assert run(model, data, out, overwrite=True) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def killer(calls: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps functions so that the process is killed at their n-th call together."""
    left = [calls]
    lock = threading.Lock()

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with lock:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    return wrap


def kill_at_every_call(work: Callable[[], object], check_and_remove: Callable[[], object]) -> int:
    """Do some work, killed at the first call that changes the disk, at the second, …; returns how many."""
    killed, calls = 0, 0
    while killed == calls:
        calls += 1
        wrap = killer(calls)

        def watched(wrap: Any = wrap) -> None:
            os.fsync, os.replace, os.unlink = wrap(os.fsync), wrap(os.replace), wrap(os.unlink)
            Path.unlink = wrap(Path.unlink)  # type: ignore[method-assign]
            work()

        killed += exit_code_of(watched) == -signal.SIGKILL
        check_and_remove()
    return killed


def test_killed_at_every_call_that_changes_the_disk_it_continues(
    model: CompiledCascade, data: ImageData, out: Path
) -> None:
    def work() -> None:
        run(model, data, out, rows_per_file=10)

    def check_and_remove() -> None:
        work()
        check(out, model, data)
        shutil.rmtree(out)

    assert kill_at_every_call(work, check_and_remove) > 30


def test_killed_while_its_parts_are_joined_a_single_file_is_completed(
    model: CompiledCascade, data: ImageData, tmp_path: Path
) -> None:
    path, options = tmp_path / "out.jsonl", RunOptions(rows_per_file=10, format="jsonl", overwrite=True)

    def start() -> None:
        predict_to_folder(model, data, tmp_path / "out.jsonl.parts", options=options)

    def work() -> None:
        predict_to_file(model, data, path, options=options)

    def check_and_remove() -> None:
        work()
        check_file(path, model, data)
        path.unlink()
        start()

    start()
    assert kill_at_every_call(work, check_and_remove) > 6


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_a_single_file_has_the_rows_of_the_folder(
    model: CompiledCascade, data: ImageData, tmp_path: Path, kind: str
) -> None:
    options = RunOptions(rows_per_file=ROWS, top_k=2)
    tally = predict_to_file(model, data, tmp_path / f"one.{kind}", options=options)
    assert tally == run(model, data, tmp_path / "folder", top_k=2, format=kind)
    assert rows(tmp_path / f"one.{kind}") == rows(tmp_path / "folder")
    check_file(tmp_path / f"one.{kind}", model, data)


def test_a_single_file_is_refused_before_anything_is_written(
    model: CompiledCascade, data: ImageData, tmp_path: Path
) -> None:
    path = tmp_path / "one.csv"
    path.write_text("mine")
    with pytest.raises(InvalidArgument, match="exists"):
        predict_to_file(model, data, path)
    assert path.read_text() == "mine"
    assert not (tmp_path / "one.csv.parts").exists()
    predict_to_file(model, data, path, options=RunOptions(overwrite=True))
    check_file(path, model, data)


def test_a_single_file_of_another_run_is_not_continued(
    model: CompiledCascade, data: ImageData, tmp_path: Path
) -> None:
    path = tmp_path / "one.csv"
    started(model, data, tmp_path / "one.csv.parts", format="csv")
    with pytest.raises(InvalidArgument, match="another top-k"):
        predict_to_file(model, data, path, options=RunOptions(rows_per_file=ROWS, top_k=2))
    predict_to_file(model, data, path, options=RunOptions(rows_per_file=ROWS))
    check_file(path, model, data)


PARTS = 200
"""Parts of a run that is killed at random."""


def killed_at_random(start: Callable[[], int], folder: Path, times: int) -> list[int]:
    """Start a process and kill it, again and again; returns how many parts were there at each kill.

    Args:
        start: starts the run into the folder, and returns its process id.
    """
    choose = random.Random(1)
    killed_after = []
    for _ in range(times):
        child = start()
        # Counted in parts, so that a machine of any speed spreads the kills over the first half of the run.
        wanted = len(list(folder.glob("part-*"))) + choose.randrange(PARTS // (2 * times))
        deadline = time.monotonic() + 120
        while len(list(folder.glob("part-*"))) < wanted:
            assert time.monotonic() < deadline, "the run does not go on"
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
            killed_after.append(len(list(folder.glob("part-*"))))
    return killed_after


def random_images(folder: Path, n: int, side: int) -> ImageData:
    images = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
    np.savez(folder / "x.npz", images=images)
    return load_inputs(folder / "x.npz", (3, side, side))


def test_killed_ten_times_at_random_it_continues(tmp_path: Path) -> None:
    model, data, out = fc.compile(tiny()), random_images(tmp_path, 40_000, 2), tmp_path / "out"

    def start() -> int:
        child = os.fork()
        if child == 0:
            run(model, data, out, rows_per_file=len(data) // PARTS)
            os._exit(0)
        return child

    killed_after = killed_at_random(start, out, 10)
    assert len(killed_after) == 10, "a run was complete before it was killed"
    run(model, data, out, rows_per_file=len(data) // PARTS)
    check(out, model, data)


@pytest.mark.parametrize(
    ("n", "times", "name"),
    [
        (4_000, 1, "out.csv"),
        pytest.param(200_000, 10, "out", marks=pytest.mark.slow),
        pytest.param(200_000, 10, "out.parquet", marks=pytest.mark.slow),
    ],
)
def test_the_command_killed_at_random_continues(tmp_path: Path, n: int, times: int, name: str) -> None:
    tiny(side=4).save(tmp_path / "model")
    data, out = random_images(tmp_path, n, 4), tmp_path / name
    folder = out if name == "out" else tmp_path / f"{name}.parts"
    command = [sys.executable, "-m", "fastcascade", "predict", tmp_path / "model", tmp_path / "x.npz"]
    command += ["-o", out, "--rows-per-file", str(n // PARTS)]
    quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed_after = killed_at_random(lambda: subprocess.Popen(command, **quietly).pid, folder, times)
    assert len(killed_after) == times, "a run was complete before it was killed"
    assert killed_after[-1] > 0
    assert not (folder / "_manifest.json").exists()
    subprocess.run(command, check=True, **quietly)
    model = fc.compile(tmp_path / "model")
    if name == "out":
        check(out, model, data)
    else:
        check_file(out, model, data)


def started(model: CompiledCascade, data: ImageData, out: Path, **options: Any) -> None:
    """A run that stops after its first part."""

    class Stop(Exception):
        pass

    def stop(tally: Tally) -> None:
        if any(out.glob("part-*")):
            raise Stop

    settings = RunOptions(**({"rows_per_file": ROWS} | options))
    while not (out / "_run.json").exists():  # the writer may be slower than the model, and the run complete
        shutil.rmtree(out, ignore_errors=True)
        with contextlib.suppress(Stop):
            predict_to_folder(model, data, out, None, settings, watch=stop)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rows_per_file": 4}, r"rows per file \(then 5, now 4\)"),
        ({"top_k": 2}, r"top-k \(then 0, now 2\)"),
        ({"format": "csv"}, "format"),
        ({"point": [0.25]}, "operating point"),
    ],
)
def test_other_options_are_refused_by_name(
    model: CompiledCascade, data: ImageData, out: Path, options: dict[str, Any], named: str
) -> None:
    started(model, data, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InvalidArgument, match=f"another {named}"):
        run(model, data, out, **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(model, data, out, **options, overwrite=True)
    assert len(rows(out)) == N


def test_another_model_or_other_inputs_are_refused(
    model: CompiledCascade, data: ImageData, out: Path, tmp_path: Path
) -> None:
    run(model, data, out)
    other = fc.compile(tiny(2), backend="reference")
    with pytest.raises(InvalidArgument, match="another model;"):
        run(other, data, out)
    os.utime(tmp_path / "x.npy", (1, 1))
    with pytest.raises(InvalidArgument, match="another images;"):
        run(model, load_inputs(tmp_path / "x.npy", (3, 2, 2)), out)
    with pytest.raises(InvalidArgument, match="another images, number of images"):
        run(model, data.take(range(7)), out)


def test_a_new_operating_point_of_the_same_thresholds_is_the_same_run(data: ImageData, out: Path) -> None:
    cascade = tiny()
    run(fc.compile(cascade, backend="reference"), data, out)
    cascade.operating_points["new"] = fc.OperatingPoint("new", (0.0,), {}, None, 1.0, (0.5, 0.5), 1)
    run(fc.compile(cascade, backend="reference"), data, out, "new")


@pytest.mark.parametrize("damage", ["remove", "change", "truncate"])
def test_a_part_that_is_gone_or_damaged_is_made_again(
    model: CompiledCascade, data: ImageData, out: Path, damage: str
) -> None:
    run(model, data, out)
    part = out / "part-00002.parquet"
    whole = part.read_bytes()
    part.unlink()
    if damage != "remove":
        part.write_bytes(whole[:-1] + b"?" if damage == "change" else whole[:-9])
    run(model, data, out)
    assert part.read_bytes() == whole
    check(out, model, data)


def test_a_second_run_on_the_folder_is_refused(model: CompiledCascade, data: ImageData, out: Path) -> None:
    with exclusive(out / ".lock"), pytest.raises(InvalidArgument, match="another process works in"):
        run(model, data, out)
    run(model, data, out)
    check(out, model, data)


def test_a_folder_with_other_files_is_refused(model: CompiledCascade, data: ImageData, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InvalidArgument, match=r"other files, such as 'thesis\.tex'"):
            run(model, data, out, overwrite=overwrite)
    (out / "thesis.tex").rename(out / "part-00000.parquet")
    with pytest.raises(InvalidArgument, match="without a description"):
        run(model, data, out)
    with pytest.raises(InvalidArgument, match="is a file"):
        run(model, data, out / "part-00000.parquet")
    assert (out / "part-00000.parquet").read_text() == "mine"


def test_a_damaged_description_is_refused(model: CompiledCascade, data: ImageData, out: Path) -> None:
    run(model, data, out)
    (out / "_manifest.json").write_text("{}")
    with pytest.raises(fc.FastCascadeError, match="without settings"):
        run(model, data, out)
    run(model, data, out, overwrite=True)
    check(out, model, data)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(np.full((2, 2, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"not an image")
    return folder


def test_bad_inputs_are_rows_and_strict_stops(model: CompiledCascade, photos: Path, out: Path) -> None:
    data = load_inputs(photos, (3, 2, 2))
    with pytest.raises(DataError, match=r"2\.png: is damaged"):
        run(model, data, out, strict=True)
    tally = run(model, data, out)
    assert (tally.rows, tally.errors) == (6, 1)
    assert [row["error"] is None for row in rows(out)] == [True, True, False, True, True, True]
    with pytest.raises(DataError, match=r"1 inputs in .* have an error"):
        run(model, data, out, strict=True)


def test_one_bad_file_alone_is_a_row(model: CompiledCascade, photos: Path, out: Path) -> None:
    tally = run(model, load_inputs(photos / "2.png", (3, 2, 2)), out)
    assert (tally.rows, tally.errors, sum(tally.exits)) == (1, 1, 0)
    assert json.loads((out / "_manifest.json").read_text())["exit_shares"] is None


def test_arrays_in_memory_are_recognised_too(model: CompiledCascade, out: Path) -> None:
    images = np.zeros((3, 2, 2, 3), np.uint8)
    run(model, ImageData(IndexIds(3), images, None), out)
    images[1] = 1
    with pytest.raises(InvalidArgument, match="another images"):
        run(model, ImageData(IndexIds(3), images, None), out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs the rights of root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_room_continues_it(
    model: CompiledCascade, tmp_path: Path, small_disk: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3000, 2, 2, 3), np.uint8)
    np.save(tmp_path / "x.npy", images)
    data, out = load_inputs(tmp_path / "x.npy", (3, 2, 2)), small_disk / "out"
    with pytest.raises(SaveError, match="No space left"):
        run(model, data, out, rows_per_file=200, format="jsonl")
    complete = len(list(out.glob("part-*")))
    assert 0 < complete < 15
    assert not list(out.glob("*tmp"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    run(model, data, out, rows_per_file=200, format="jsonl")
    check(out, model, data)


@pytest.mark.parametrize("call", range(1, 20))
def test_a_disk_that_fails_at_any_write_leaves_a_run_that_continues(
    model: CompiledCascade, data: ImageData, out: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    left = [call]
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(SaveError, match="No space left"):
        run(model, data, out)
    monkeypatch.setattr(os, "fsync", fsync)
    run(model, data, out)
    check(out, model, data)
