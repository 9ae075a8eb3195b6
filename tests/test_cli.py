"""The command line: data on standard output, remarks on standard error, statuses 0, 1 and 2."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import nn

import fastcascade as fc
from fastcascade import cli
from fastcascade.backends.registry import NAMES, load_backend
from fastcascade.cli import environment
from fastcascade.model.registry import build_network

# The model's two networks are equal, so every operating point costs more than the last one alone.
pytestmark = pytest.mark.filterwarnings("default::fastcascade.errors.CostWarning")

COMMANDS = "train predict evaluate calibrate bench report inspect quantize export choose".split()
COMMANDS += ["doctor", "download"]
N = 40


class Finished(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Finished]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["fastcascade", *map(str, arguments)])
        monkeypatch.setattr("warnings.showwarning", None)  # main sets it; pytest wants its own back
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return Finished(status, *capsys.readouterr())

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved cascade of two random networks with the operating points "default" and "never"."""
    torch.manual_seed(3)
    cascade = fc.Cascade(
        [fc.Stage(build_network("resnet_cifar:8", 3), name=name) for name in ("small", "large")],
        fc.MLPSelector(),
        num_classes=3,
        input_shape=(3, 8, 8),
        preprocess=fc.Normalize((0.5,) * 3, (0.2,) * 3),
        classes=("ant", "bee", "cat"),
    )
    for name, threshold in (("default", 0.0), ("never", float("inf"))):
        cascade.operating_points[name] = fc.OperatingPoint(name, (threshold,), {}, 0.5, 1e5, (0.5, 0.5), 7)
    cascade.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An npz file of labelled noise."""
    rng = np.random.default_rng(5)
    path = tmp_path / "images.npz"
    np.savez(path, images=rng.integers(0, 256, (N, 8, 8, 3), np.uint8), labels=rng.integers(0, 3, N))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.status == 0
    assert f"Example: fastcascade {command}" in done.out


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_has_a_short_name(run: Run, command: list[str]) -> None:
    done = run(*command, "-h")
    assert done.status == 0
    assert done == run(*command, "--help")


def test_help_lists_every_command(run: Run) -> None:
    assert all(command in run("--help").out for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["predict"], ["predict", "m", "d", "--threads", "0"], ["evaluate", "m", "d", "--split", "x"]],
)
def test_a_malformed_command_line_ends_with_2(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.status == 2
    assert done.out == ""


def test_a_library_error_is_one_message_and_status_1(run: Run, images: Path, tmp_path: Path) -> None:
    done = run("predict", tmp_path / "nowhere", images)
    assert done.status == 1
    assert done.out == ""
    assert done.err.startswith("error:")
    assert "nowhere" in done.err
    assert "Traceback" not in done.err


def test_names_from_outside_send_no_escapes(run: Run, model: Path) -> None:
    done = run("predict", model, "no\x1b[31mthing")
    assert done.status == 1
    assert "no�[31mthing" in done.err


def test_predict_to_standard_output(run: Run, model: Path, images: Path) -> None:
    done = run("predict", model, images, "--operating-point", "never")
    assert done.status == 0
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["id"] for row in rows] == [str(i) for i in range(N)]
    assert {row["exit_stage"] for row in rows} == {1}
    expected = fc.load(model)(np.load(images)["images"], "never").label.tolist()
    assert [row["label"] for row in rows] == expected
    assert f"{N} images" in done.err
    assert "exits 0/100 %" in done.err


def test_predict_to_a_file_and_again(run: Run, model: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.parquet"
    done = run("predict", model, images, "-o", output, "--rows", "3:10")
    assert (done.status, done.out) == (0, "")
    assert parquet.read_table(output).column("id").to_pylist() == [str(i) for i in range(3, 10)]
    refused = run("predict", model, images, "-o", output)
    assert refused.status == 1
    assert "exists" in refused.err
    assert parquet.read_table(output).num_rows == 7
    assert run("predict", model, images, "-o", output, "--overwrite").status == 0
    assert parquet.read_table(output).num_rows == N


def test_predict_counts_bad_images(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"not an image")
    done = run("predict", model, folder)
    assert done.status == 0
    assert [json.loads(line)["error"] is None for line in done.out.splitlines()] == [False, True]
    assert "1 with an error" in done.err


def test_predict_into_a_folder_and_again(run: Run, model: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ("predict", model, images, "-o", output, "--rows-per-file", 16, "--top-k", 2, "--format", "csv")
    done = run(*command)
    assert (done.status, done.out) == (0, "")
    assert re.search(r"40 images in .* images/s, 0 with an error; exits .* on average; limited by", done.err)
    assert sorted(path.name for path in output.glob("part-*")) == [f"part-0000{i}.csv" for i in range(3)]
    assert "(40 of them by an earlier run)" in run(*command).err
    refused = run(*command[:-2])
    assert refused.status == 1
    assert "another format (then 'csv', now 'parquet')" in refused.err
    assert run(*command[:-2], "--overwrite").status == 0
    assert parquet.read_table(output).num_rows == N


def test_predict_takes_many_files(run: Run, model: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    done = run("predict", model, *paths)
    assert [json.loads(line)["id"] for line in done.out.splitlines()] == list(map(str, paths))
    pattern = run("predict", model, tmp_path / "[12].png")
    assert pattern.out.splitlines() == done.out.splitlines()[1:]


def test_predict_resizes_unless_told_otherwise(run: Run, model: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    assert json.loads(run("predict", model, tmp_path / "a.png").out)["error"] is None
    row = json.loads(run("predict", model, tmp_path / "a.png", "--no-resize").out)
    assert "is 30 pixels wide and 20 high" in row["error"]


@pytest.mark.parametrize("output", ["p.jsonl", "folder", None])
def test_strict_stops_at_a_bad_image(run: Run, model: Path, tmp_path: Path, output: str | None) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "bad.png").write_bytes(b"not an image")
    done = run("predict", model, photos, "--strict", *([] if output is None else ["-o", tmp_path / output]))
    assert done.status == 1
    assert "error: bad.png: is damaged" in done.err


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, fastcascade, fastcascade.cli; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("output", [[], ["-o", "p.csv"]])
def test_ray_needs_a_folder(run: Run, model: Path, images: Path, output: list[str]) -> None:
    for option in ("--ray", "--ray=somewhere:6379"):
        done = run("predict", model, images, option, *output)
        assert done.status == 1
        assert "--ray writes a folder of files" in done.err


@pytest.mark.parametrize("rows", ["5", "9:3", "0:41", "a:b"])
def test_bad_rows_are_refused(run: Run, model: Path, images: Path, rows: str) -> None:
    done = run("predict", model, images, "--rows", rows)
    assert done.status == 1
    assert rows in done.err


def test_evaluate_prints_every_operating_point(run: Run, model: Path, images: Path) -> None:
    done = run("evaluate", model, images)
    assert done.status == 0
    loaded, data = fc.load(model), np.load(images)
    for name in ("default", "never"):
        result = fc.evaluate(loaded, (data["images"], data["labels"]), name)
        (line,) = [line for line in done.out.splitlines() if f" {name} " in line]
        assert f"{result.accuracy:.2%}" in line
        assert f"{result.mean_macs:,.0f}" in line


def test_evaluate_draws_the_curve(run: Run, model: Path, images: Path, tmp_path: Path) -> None:
    assert run("evaluate", model, images, "--curve", tmp_path / "curve.svg").status == 0
    assert b"<svg" in (tmp_path / "curve.svg").read_bytes()


def test_calibrate_stores_the_point(run: Run, model: Path, images: Path) -> None:
    budget = fc.load(model).exit_macs[-1].item() * 0.7
    done = run("calibrate", model, images, "--name", "half", "--budget-macs", budget)
    assert done.status == 0, done.err
    assert "half" in done.out
    assert "warning: operating point 'half' costs" in done.err
    points = fc.load(model).operating_points
    assert set(points) == {"default", "never", "half"}
    assert points["half"].mean_macs <= budget


def test_calibrate_that_cannot_be_met_changes_nothing(run: Run, model: Path, images: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    done = run("calibrate", model, images, "--budget-macs", 1)
    assert done.status == 1
    assert "cannot be met" in done.err
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_inspect_shows_temperatures_and_the_comparison(run: Run, model: Path) -> None:
    cascade = fc.load(model)
    cascade.temperatures.copy_(torch.tensor([2.5, 0.75]))
    rows = dict.fromkeys(("learned", "max_prob", "margin", "entropy"), (0.5, 0.625))
    cascade.comparison = fc.types.SelectorComparison((0.25, 0.5), rows, "margin", 0.0, 0.002, 0, 400)
    cascade.save(model, overwrite=True)
    shown = run("inspect", model).out
    assert "temperatures: 2.500 0.750" in shown
    assert "learned − margin: +0.00 ± 0.20 points" in shown
    assert "25% of dense" in shown
    assert shown.count("62.50%") == 4


def test_choose_prints_a_curve_or_json(run: Run, tmp_path: Path) -> None:
    truth = np.arange(200) % 4
    noise = np.random.default_rng(0).normal(size=(2, 200, 4))
    logits = (np.eye(4)[truth] * np.array([2.0, 6.0])[:, None, None] + noise).astype(np.float32)
    pool = tmp_path / "pool.npz"
    np.savez(pool, logits=logits, labels=truth, macs=[1e6, 9e6], names=["small", "large"])
    done = run("choose", pool)
    assert done.status == 0
    assert "small → large" in done.out
    chosen = json.loads(run("choose", pool, "--budget", 5e6, "--json").out)
    assert [c["budget_macs"] for c in chosen] == [5e6]
    refused = run("choose", pool, "--budget", 5)
    assert refused.status == 1
    assert "cheapest classifier costs 1,000,000" in refused.err.replace("\n", " ")


def test_inspect_shows_cascades_and_plans(run: Run, model: Path, tmp_path: Path) -> None:
    fc.plan(fc.load(model)).save(tmp_path / "plan")
    for directory in (model, tmp_path / "plan"):
        done = run("inspect", directory)
        assert done.status == 0, done.err
        for text in ("stage 'small'", "stage 'large'", "conv 3×3 3→16", "ant, bee, cat", "never", "inf"):
            assert text in done.out


def test_predict_runs_a_plan(run: Run, model: Path, images: Path, tmp_path: Path) -> None:
    fc.plan(fc.load(model)).save(tmp_path / "plan")
    assert run("predict", tmp_path / "plan", images).out == run("predict", model, images).out


def test_quantize_saves_a_plan_that_commands_run(run: Run, model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    done = run("quantize", model, images, "--out", out, "--precision", "int8,fp32")
    assert done.status == 0
    assert re.search(r"int8\b.*\d", done.out)
    assert fc.load_plan(out).precision == ("int8", "fp32")
    assert "already" in run("quantize", out, images, "--out", tmp_path / "again").err
    assert "int8" in run("inspect", out).out
    refused = run("evaluate", out, images)
    assert refused.status == 1
    assert "'default' was measured with stages in fp32" in refused.err
    assert run("calibrate", out, images, "--min-accuracy", "0.01").status == 0
    assert run("evaluate", out, images, "--precision", "int8").status == 0
    assert run("predict", out, images, "-o", tmp_path / "p.csv").status == 0
    refused = run("evaluate", model, images, "--precision", "int8")
    assert refused.status == 1
    assert "`fastcascade quantize MODEL DATA --out DIR`" in refused.err
    refused = run("quantize", model, images, "--out", out, "--precision", "int4,int8")
    assert refused.status == 1
    assert "precision is ['int4', 'int8']; expected one of ('fp32', 'fp16', 'bf16', 'int8')" in refused.err


def test_doctor_gives_reasons_and_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_torch(name: str) -> str:
        if name in ("torch", "fastcascade"):
            return "1.2.3"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", only_torch)
    monkeypatch.setenv("FASTCASCADE_ISA", "portable")
    done = run("doctor")
    assert done.status == 0
    for name in NAMES:
        reason = load_backend(name).unavailable_reason()
        assert any(name in line and (reason or "ready")[:20] in line for line in done.out.splitlines())
    for package, use in environment.OPTIONAL.items():
        assert any(package in line and "missing" in line and use in line for line in done.out.splitlines())
    assert "FASTCASCADE_ISA=portable" in done.out


def test_version(run: Run) -> None:
    done = run("--version")
    assert (done.status, done.out) == (0, f"fastcascade {fc.__version__}\n")


NAME = r"[/x] $\frac$ [red]fast"


@pytest.fixture
def oddly_named(model: Path, tmp_path: Path) -> Path:
    """The saved cascade with a name that is markup and a formula, for everything that has one."""
    cascade = fc.load(model)
    cascade.classes = (NAME, "[bold]", "c")
    cascade.stage(0).name = NAME
    for point in list(cascade.operating_points.values()):
        name = NAME + point.name
        cascade.operating_points[name] = dataclasses.replace(point, name=name)
    cascade.save(tmp_path / "[red]odd")
    return tmp_path / "[red]odd"


def test_names_that_look_like_markup_are_printed_as_they_are(
    run: Run, oddly_named: Path, images: Path, tmp_path: Path
) -> None:
    for arguments in (
        ["inspect", oddly_named],
        ["evaluate", oddly_named, images, "--curve", tmp_path / "[red]$curve$.png"],
        ["calibrate", oddly_named, images, "--name", NAME, "--max-risk", 0.5, 0.5],
    ):
        done = run(*arguments)
        assert done.status == 0, done.err
        assert NAME in done.out
    assert "[red]odd" in run("predict", tmp_path / "[red]odd2", images).err


def test_the_output_takes_characters_that_its_encoding_lacks(
    run: Run, model: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["inspect", model], ["evaluate", model, images], ["calibrate", "--help"], ["doctor"]):
        streams = [io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2)]
        monkeypatch.setattr("sys.stdout", streams[0])
        monkeypatch.setattr("sys.stderr", streams[1])
        assert run(*arguments).status == 0
        streams[0].seek(0)
        assert streams[0].read()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--version"], ["predict", "MODEL", "IMAGES"]])
def test_a_full_device_is_one_line_of_error(model: Path, images: Path, arguments: list[str]) -> None:
    known = {"MODEL": str(model), "IMAGES": str(images)}
    command = [sys.executable, "-m", "fastcascade", *(known.get(word, word) for word in arguments)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last == "error: cannot write to standard output: No space left on device"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["predict", "MODEL", "IMAGES"]])
def test_a_closed_pipe_is_no_error_message(model: Path, images: Path, arguments: list[str]) -> None:
    known = {"MODEL": str(model), "IMAGES": str(images)}
    command = [sys.executable, "-m", "fastcascade", *(known.get(word, word) for word in arguments)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    for word in ("Traceback", "error:", "ignored", "Broken pipe", "done"):
        assert word not in done.stderr


def test_a_disk_that_fills_up_is_one_line_of_error(
    run: Run, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/some/file")

    monkeypatch.setattr("os.fsync", full)
    done = run("evaluate", model, images, "--curve", tmp_path / "curve.png")
    assert done.status == 1
    assert done.err.splitlines()[-1].startswith("error: cannot save")
    assert not (tmp_path / "curve.png").exists()
    monkeypatch.setattr("fastcascade.load", full)
    done = run("inspect", model)
    assert (done.status, done.err) == (1, "error: /some/file: No space left on device\n")


def test_what_cannot_be_drawn_is_told_before_the_evaluation(
    run: Run, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastcascade.evaluate", lambda *_: pytest.fail("evaluated"))
    fc.plan(fc.load(model)).save(tmp_path / "plan")
    for directory, curve, message in (
        (model, "curve.pdf", "ends in .png or .svg"),
        (tmp_path / "plan", "curve.png", "is a plan; the curve needs a saved cascade"),
    ):
        done = run("evaluate", directory, images, "--curve", tmp_path / curve)
        assert done.status == 1
        assert message in done.err


@pytest.fixture
def training_arguments(tmp_path: Path) -> list[str]:
    """``train`` on two classes of bright and dark noise, with a config of two small networks."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 2
    pixels = (labels * 200)[:, None, None, None] + rng.integers(0, 50, (96, 8, 8, 3))
    np.savez(tmp_path / "d.npz", x_train=pixels.astype(np.uint8), y_train=labels)
    config = tmp_path / "config.toml"
    config.write_text(
        """
        [cascade]
        stages = ["resnet_cifar:8", "resnet_cifar:8"]
        num_classes = 2
        input_shape = [3, 8, 8]
        mean = [0.5, 0.5, 0.5]
        std = [0.2, 0.2, 0.2]
        [splits]
        train = [0, 64]
        validation = [64, 80]
        calibration = [80, 96]
        [recipe]
        pretrain_epochs = 1
        joint_epochs = 1
        batch_size = 32
        crop_padding = 0
        [operating_points.default]
        budget = 1.5
        """
    )
    return ["train", str(config), str(tmp_path / "d.npz"), "--out", str(tmp_path / "run")]


@pytest.mark.filterwarnings("ignore:.*images")  # too few for temperatures and comparisons
def test_train_calibrates_and_saves(run: Run, training_arguments: list[str], tmp_path: Path) -> None:
    done = run(*training_arguments)
    assert done.status == 0, done.err
    assert "default" in done.out
    assert "default" in fc.load(tmp_path / "run" / "model").operating_points


def test_a_bad_config_is_refused_with_file_and_key(run: Run, training_arguments: list[str]) -> None:
    config = Path(training_arguments[1])
    config.write_text(config.read_text().replace("budget = 1.5", "budgett = 1.5"))
    done = run(*training_arguments)
    assert done.status == 1
    assert f"{config}: unknown key operating_points.default.budgett; did you mean budget?" in done.err


def test_train_under_torchrun_writes_one_model(training_arguments: list[str], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "fastcascade", *training_arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "default" in fc.load(tmp_path / "run" / "model").operating_points


def test_commands_that_only_measure_take_a_cascade_of_modules_without_their_code(
    run: Run, images: Path, tmp_path: Path
) -> None:
    networks = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)) for _ in range(2)]
    preprocess = fc.Normalize((0.5,) * 3, (0.2,) * 3)
    fc.Cascade(networks, fc.MLPSelector(), 3, (3, 8, 8), preprocess=preprocess).save(tmp_path / "own")
    for command in (["evaluate", tmp_path / "own", images], ["inspect", tmp_path / "own"]):
        done = run(*command)
        assert done.status == 0, done.err
        assert "stage" in done.out or "accuracy" in done.out
    done = run("calibrate", tmp_path / "own", images, "--budget-macs", 1e9)
    assert done.status == 1
    assert "modules that the registry does not know" in done.err


def test_a_report_that_cannot_be_written_is_refused_before_measuring(
    run: Run, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastcascade.benchmarking.runner.benchmark", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.html").write_text("old")
    np.savez(tmp_path / "unlabelled.npz", images=np.load(images)["images"])
    for arguments, message in (
        ([model, images, "--out", tmp_path / "old"], "exists"),
        ([model, images, "--out", tmp_path / "new", "-p", "quick"], "unknown operating point 'quick'"),
        ([model, tmp_path / "unlabelled.npz", "--out", tmp_path / "new"], "no labels"),
        ([model, images, "--out", tmp_path / "new", "--batch", "8,"], "--batch is '8,'"),
    ):
        done = run("report", *arguments)
        assert done.status == 1
        assert message in done.err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_report_loads_the_model_once_and_takes_a_plan(
    run: Run, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fc.plan(fc.load(model)).save(tmp_path / "plan")
    loads: list[object] = []
    for name in ("load", "load_plan"):
        load = getattr(fc, name)
        monkeypatch.setattr(fc, name, lambda path, load=load: loads.append(path) or load(path))
    for number, directory in enumerate((model, tmp_path / "plan"), 1):
        done = run("report", directory, images, "--out", tmp_path / f"report{number}", "--batch", 8)
        assert done.status == 0, done.err
        assert len(loads) == number
        page = (tmp_path / f"report{number}" / "report.html").read_text()
        assert ("Accuracy against cost" in page) == (directory == model)
        assert ("before temperature" in page) == (directory == model)
        assert "Confusion matrix" in page


@pytest.mark.slow
def test_bench_and_report(run: Run, model: Path, images: Path, tmp_path: Path) -> None:
    done = run("bench", model, images, "--batch", 8, "--json")
    assert done.status == 0, done.err
    assert [batch["batch"] for batch in json.loads(done.out)["batches"]] == [8]
    done = run("bench", model, images, "--batch", "4,8", "--peers")
    assert "small" in done.out
    assert "PyTorch, the cascade" in done.out
    done = run("bench", model, images, "--batch", "8,")
    assert done.status == 1
    assert "--batch is '8,'; expected numbers from 1" in done.err
    done = run("report", model, images, "--out", tmp_path / "report", "--batch", 8)
    assert done.status == 0, done.err
    assert Path(done.out.strip()).read_text().startswith("<!")
    done = run("report", model, images, "--out", tmp_path / "few", "--batch", 8, "--rows", "0:16")
    assert "accuracy on 16 images" in Path(done.out.strip()).read_text()


def test_bench_without_data_takes_no_choice_of_images(run: Run, model: Path) -> None:
    done = run("bench", model, "--rows", "0:8")
    assert done.status == 1
    assert "name the data, too" in done.err
