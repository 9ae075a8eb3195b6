"""Prediction on Ray: the rows, files and manifest of a local run, also with a worker killed in the middle."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import fastcascade as fc
from fastcascade import cli
from fastcascade.engine import CompiledCascade
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.prediction.runs import RunOptions, Tally, predict_to_folder

ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'fastcascade[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

N, ROWS = 20_000, 500


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two CPUs in this machine."""
    # Workers import this test's module and helpers by no path: they need the installed package alone.
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model() -> CompiledCascade:
    torch.manual_seed(1)
    stages = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)) for _ in range(2)]
    preprocess = fc.Normalize((0.5,) * 3, (0.2,) * 3)
    cascade = fc.Cascade(
        stages, fc.MLPSelector(), 3, (3, 2, 2), preprocess=preprocess, classes=("a", "b", "c")
    )
    return fc.compile(cascade, threads=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (N, 2, 2, 3), np.uint8))
    return tmp_path / "x.npy"


def images(source: Path) -> fc.ray.Images:
    return fc.ray.Images(str(source), (3, 2, 2))


def run(model: CompiledCascade, source: Path, out: Path, **more: Any) -> Tally:
    options = RunOptions(rows_per_file=ROWS, top_k=2)
    return fc.ray.predict_to_folder(model, images(source), out, options=options, **more)


def contents(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {path.name: path.read_bytes() for path in out.glob("part-*")}
    return found | {"manifest": json.loads((out / "_manifest.json").read_text())}


def test_files_and_manifest_are_those_of_a_local_run(
    model: CompiledCascade, source: Path, tmp_path: Path
) -> None:
    seen: list[int] = []
    tally = run(model, source, tmp_path / "ray", watch=lambda counted: seen.append(counted.rows))
    options = RunOptions(rows_per_file=ROWS, top_k=2)
    assert tally == predict_to_folder(model, images(source).load(), tmp_path / "local", options=options)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert sum(seen) == N


def test_a_local_run_is_continued(model: CompiledCascade, source: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(tally: Tally) -> None:
        if any((tmp_path / "out").glob("part-*")):
            raise Stop

    options = RunOptions(rows_per_file=ROWS, top_k=2)
    with pytest.raises(Stop):
        predict_to_folder(model, images(source).load(), tmp_path / "out", options=options, watch=stop)
    started: list[int] = []
    run(model, source, tmp_path / "out", started=lambda tally, _: started.append(tally.rows))
    assert 0 < started[0] < N
    assert parquet.read_table(tmp_path / "out").column("id").to_pylist() == [str(i) for i in range(N)]


def workers() -> list[int]:
    """Process ids of the actors that write parts."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::") and b"_PartWriter" in title:
                found.append(int(entry.name))
    return found


def test_a_killed_worker_loses_and_doubles_nothing(
    model: CompiledCascade, source: Path, tmp_path: Path
) -> None:
    out, killed = tmp_path / "out", list[int]()

    def kill(counted: Tally) -> None:
        if not killed and (found := workers()):
            os.kill(found[0], signal.SIGKILL)
            killed.append(found[0])

    run(model, source, out, watch=kill, workers=2)
    assert len(killed) == 1
    local = predict_to_folder(
        model, images(source).load(), tmp_path / "local", options=RunOptions(rows_per_file=ROWS, top_k=2)
    )
    assert local.rows == N
    assert contents(out) == contents(tmp_path / "local")


def test_the_command_runs_on_ray(
    model: CompiledCascade, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.plan.save(tmp_path / "plan")
    command = f"fastcascade predict plan {source.name} -o out --ray --rows 500:1500 --rows-per-file 200"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", command.split())
    monkeypatch.setattr("warnings.showwarning", None)  # main sets it; pytest wants its own back
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert parquet.read_table("out").column("id").to_pylist() == [str(i) for i in range(500, 1500)]


def test_strict_and_changed_images_stop_the_run(model: CompiledCascade, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "bad.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"bad\.png: is damaged"):
        fc.ray.predict_to_folder(
            model, images(tmp_path / "photos"), tmp_path / "out", options=RunOptions(strict=True)
        )
    tally = fc.ray.predict_to_folder(model, images(tmp_path / "photos"), tmp_path / "out")
    assert (tally.rows, tally.errors) == (1, 1)


def test_a_data_set_keeps_its_columns_and_gets_predictions(model: CompiledCascade) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (50, 2, 2, 3), np.uint8)
    dataset = ray.data.from_items([{"name": f"n{i}", "image": image} for i, image in enumerate(pixels)])
    rows = sorted(
        fc.ray.predict(dataset, model, top_k=2, batch_size=16).take_all(), key=lambda r: int(r["name"][1:])
    )
    expected = fc.predict(model, pixels, top_k=2)
    assert [row["name"] for row in rows] == [f"n{i}" for i in range(50)]
    assert [row["label"] for row in rows] == expected.label.tolist()
    assert [row["class_name"] for row in rows] == [p.class_name for p in expected]
    assert [list(row["top_labels"]) for row in rows] == expected.top_labels.tolist()
    assert "image" not in rows[0]


def test_encoded_images_may_be_damaged_or_missing(model: CompiledCascade) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(file, "PNG")
    cells = [file.getvalue(), b"no image", None]
    rows = fc.ray.predict(
        ray.data.from_items([{"jpg": cell} for cell in cells]), model, column="jpg"
    ).take_all()
    errors = sorted(str(row["error"]) for row in rows)
    assert errors[0] == "None"
    assert any("is damaged" in error for error in errors)
    assert any("is missing" in error for error in errors)


def test_impossible_pools_are_refused(model: CompiledCascade) -> None:
    dataset = ray.data.from_items([{"image": b""}])
    with pytest.raises(InvalidArgument, match="at least 1 of each"):
        fc.ray.predict(dataset, model, workers=0)
    with pytest.raises(InvalidArgument, match="at least 1 of each"):
        fc.ray.predict(dataset, model, cpus=0)


def test_a_ray_serve_deployment_answers_with_the_batcher(
    model: CompiledCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of docs/scale.md, without its HTTP proxy."""
    pytest.importorskip("ray.serve", reason="Ray Serve is missing: pip install 'ray[serve]'")
    import re

    text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    (code,) = re.findall(r"<!-- not run: [^\n]*Ray Serve -->\n```python\n(.*?)```", text, re.DOTALL)
    from ray import serve

    model.plan.save(tmp_path / "plan")
    names: dict[str, Any] = {"__name__": "deployment"}
    exec(compile(code, "serve.py", "exec"), names)
    try:
        handle = serve.run(names["Classifier"].bind(str(tmp_path / "plan")), route_prefix=None)
        pixels = np.random.default_rng(1).integers(0, 256, (20, 2, 2, 3), np.uint8)
        answers = [handle.classify.remote(image) for image in pixels]
        assert [answer.result()["label"] for answer in answers] == model(pixels).label.tolist()
    finally:
        serve.shutdown()
