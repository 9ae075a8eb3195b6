"""The documents say what the stored results, the shipped model and the code say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import fastcascade as fc
from fastcascade.data.image_data import ImageData
from fastcascade.data.sources import load_data

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "cifar10"
README = (ROOT / "README.md").read_text()
RESULTS = json.loads((EXAMPLE / "results.json").read_text())


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    """``examples/cifar10/measure.py`` as a module."""
    spec = importlib.util.spec_from_file_location("measure", EXAMPLE / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("document", ["README.md", "examples/cifar10/README.md"])
def test_tables_are_those_of_the_stored_results(measure: ModuleType, document: str) -> None:
    text = (ROOT / document).read_text()
    assert "<!-- operating points -->\n| |" in text
    assert measure.write_tables(text, RESULTS) == text, "measure.py writes these tables"


def test_an_empty_table_is_filled_and_the_text_around_it_kept(measure: ModuleType) -> None:
    empty = "a\n<!-- operating points -->\n<!-- end -->\nb\n<!-- networks -->\n<!-- end -->\nc\n"
    written = measure.write_tables(empty, RESULTS)
    assert [line for line in written.splitlines() if not line.startswith(("|", "<"))] == ["a", "b", "c"]
    assert written.count("| network alone |") == 1
    assert measure.write_tables(written, RESULTS) == written


def test_the_demo_in_the_readme_shows_the_stored_accuracies() -> None:
    shipped, dense = RESULTS["shipped_images"], RESULTS["dense_macs"]
    rows = [
        (f'cascade "{p["operating_point"]}"', p["accuracy"], p["share_of_dense_macs"])
        for p in shipped["operating_points"]
    ]
    expected = [
        (name, f"{accuracy:.2%}", f"{share * dense / 1e6:.2f}", f"{share:.1%}")
        for name, accuracy, share in [("last network", shipped["last_network"], 1.0), *rows]
    ]
    cells = [
        tuple(cell.strip() for cell in line.split("│")[1:5]) for line in README.splitlines() if "│" in line
    ]
    assert [row for row in cells if row[0] in [name for name, *_ in expected]] == expected

    default = next(p for p in shipped["operating_points"] if p["operating_point"] == "default")
    exits = re.findall(r"│ \d+ +│ [\w-]+ +│ +[\d.]+ M MACs │ +([\d.]+%) │ +([\d.]+%) │", README)
    pairs = zip(default["exit_shares"], default["exit_accuracy"], strict=True)
    assert exits == [(f"{share:.1%}", f"{right:.1%}") for share, right in pairs]


def test_the_shipped_model_has_the_stored_accuracy_and_exits() -> None:
    shipped = RESULTS["shipped_images"]
    cascade = fc.load(EXAMPLE / "model")
    data = load_data(EXAMPLE / "test-images.npz", classes=cascade.classes)
    images, labels = torch.from_numpy(np.array(data.images)), torch.from_numpy(np.array(data.labels))
    assert len(images) == shipped["n"]
    fast = fc.compile(cascade, threads=2)
    assert list(cascade.operating_points) == [p["operating_point"] for p in shipped["operating_points"]]
    rounding = 1  # image whose stop score may lie on its threshold, where instruction sets differ
    for point in shipped["operating_points"]:
        out = fast(images, point["operating_point"])
        right = int((out.label == labels).sum())
        assert right == pytest.approx(point["accuracy"] * shipped["n"], abs=rounding + 0.01)
        exits = out.exit_stage.bincount(minlength=len(cascade.stages)).tolist()
        wanted = [share * shipped["n"] for share in point["exit_shares"]]
        assert exits == pytest.approx(wanted, abs=rounding + 0.01)
    forced = fast(images, [float("inf")] * (len(cascade.stages) - 1)).exit_stage
    assert (forced == len(cascade.stages) - 1).all()


class FewImages:
    """In place of CIFAR-10: a dozen images, whatever rows are asked for; on disk, as CIFAR-10's are."""

    classes = tuple("abcdefghij")

    def __init__(self, path: Path) -> None:
        images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
        np.savez(path, images=images, labels=np.arange(12) % 10)
        self.path = path

    def take(self, rows: range) -> ImageData:
        return load_data(self.path, classes=self.classes)


@pytest.mark.filterwarnings("ignore:.*images")  # a dozen are too few for temperatures and comparisons
def test_the_quick_start_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.findall(r"## Quick start\n.*?```python\n(.*?)```", README, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    few = FewImages(tmp_path / "few.npz")
    monkeypatch.setattr(fc, "load_data", lambda source, split: few)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].label.shape == (12,)
    assert "fast" in names["cascade"].operating_points
    assert "tensor" in capsys.readouterr().out
