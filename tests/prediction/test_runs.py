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
from fastcascade.prediction.runs import RunOptions, Tally, predict_to_folder
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
    found: list[dict[str, Any]] = []
    for path in sorted(out.glob("part-*")):
        if path.suffix == ".parquet":
            found += parquet.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            found += map(json.loads, path.read_text().splitlines())
        else:
            with open(path, newline="") as file:
                found += csv.DictReader(file)
    return found


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


def test_killed_at_every_call_that_changes_the_disk_it_continues(
    model: CompiledCascade, data: ImageData, tmp_path: Path
) -> None:
    killed, calls = 0, 0
    while killed == calls:
        calls += 1
        out = tmp_path / f"out{calls}"

        wrap = killer(calls)

        def work(out: Path = out, wrap: Any = wrap) -> None:
            os.fsync, os.replace, os.unlink = wrap(os.fsync), wrap(os.replace), wrap(os.unlink)
            Path.unlink = wrap(Path.unlink)  # type: ignore[method-assign]
            run(model, data, out, rows_per_file=10)

        killed += exit_code_of(work) == -signal.SIGKILL
        run(model, data, out, rows_per_file=10)
        check(out, model, data)
        shutil.rmtree(out)
    assert calls > 30


@pytest.mark.parametrize(
    ("n", "side"), [(40_000, 2), pytest.param(200_000, 32, marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_killed_ten_times_at_random_it_continues(tmp_path: Path, n: int, side: int) -> None:
    model = fc.compile(tiny(side=side))
    images = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    data, out = load_inputs(tmp_path / "x.npz", (3, side, side)), tmp_path / "out"
    choose = random.Random(1)
    killed_after = []
    for _ in range(200):
        child = os.fork()
        if child == 0:
            run(model, data, out, rows_per_file=n // 100)
            os._exit(0)
        before = len(list(out.glob("part-*")))
        wanted = before + choose.randrange(10)  # parts, so that the kills are spread over the run
        while len(list(out.glob("part-*"))) < min(wanted, 99):
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
            killed_after.append(before)
        if len(killed_after) == 10 or (out / "_manifest.json").exists():
            break
    assert len(set(killed_after)) >= 3, "the kills came too late"
    run(model, data, out, rows_per_file=n // 100)
    check(out, model, data)


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
