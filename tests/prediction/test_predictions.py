"""Predictions: one row per input in its order, errors as rows, and files that are complete or not there."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import exit_code_of
from PIL import Image
from pyarrow import parquet

import fastcascade as fc
from fastcascade.data.image_data import ImageData
from fastcascade.data.sources import load_data
from fastcascade.engine import CompiledCascade
from fastcascade.errors import InvalidArgument, SaveError
from fastcascade.model.resnet import resnet_cifar
from fastcascade.prediction.predictions import Prediction, Predictions
from fastcascade.prediction.predictor import predict_batches
from fastcascade.prediction.writers import save_predictions

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def cascade() -> fc.Cascade:
    torch.manual_seed(1)
    return fc.Cascade(
        [resnet_cifar(8, num_classes=3), resnet_cifar(8, num_classes=3)],
        fc.ThresholdSelector("margin"),
        num_classes=3,
        input_shape=(3, 8, 8),
        preprocess=fc.Normalize((0.5,) * 3, (0.2,) * 3),
        classes=CLASSES,
    )


@pytest.fixture(scope="module")
def model(cascade: fc.Cascade) -> CompiledCascade:
    return fc.compile(cascade, backend="reference")


def images(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 3, 8, 8), np.uint8)


def middle(cascade: fc.Cascade, x: np.ndarray) -> list[float]:
    """A threshold at which some images stop early and some do not, in the widest gap between scores."""
    with torch.no_grad():
        scores = cascade.eval().all_exits(torch.from_numpy(x))[1][0].sort().values
    gap = int(scores.diff()[1:-1].argmax()) + 1
    return [float(scores[gap] + scores[gap + 1]) / 2]


def rows(model: CompiledCascade, data: ImageData, point: list[float]) -> list[Prediction]:
    return [p for batch in predict_batches(model, data, point, top_k=0) for p in batch]


def test_rows_are_what_the_cascade_answers(cascade: fc.Cascade, model: CompiledCascade) -> None:
    x = images(33)
    point = middle(cascade, x)
    out = cascade(x, point)
    found = rows(model, ImageData([str(i) for i in range(33)], x, None), point)
    assert [p.id for p in found] == [str(i) for i in range(33)]
    assert [p.label for p in found] == out.label.tolist()
    assert [p.exit_stage for p in found] == out.exit_stage.tolist()
    assert [p.cost_macs for p in found] == out.cost_macs.tolist()
    assert [p.class_name for p in found] == [CLASSES[i] for i in out.label]
    assert {p.exit_stage for p in found} == {0, 1}
    torch.testing.assert_close(torch.tensor([p.probability for p in found]), out.probs.max(1).values)


def test_batches_do_not_matter(
    cascade: fc.Cascade, model: CompiledCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is cut into batches by bytes; every cut gives the same rows."""
    x = images(10)
    data, point = ImageData([str(i) for i in range(10)], x, None), middle(cascade, x)
    whole = rows(model, data, point)
    monkeypatch.setattr("fastcascade.prediction.inputs.BATCH_BYTES", 3 * 4 * 3 * 8 * 8)
    batches = list(predict_batches(model, data, point, top_k=0))
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    for cut, uncut in zip([p for batch in batches for p in batch], whole, strict=True):
        assert cut._replace(probability=None) == uncut._replace(probability=None)
        assert cut.probability == pytest.approx(uncut.probability, abs=1e-5)


def test_bad_inputs_are_rows_with_an_error(
    tmp_path: Path, cascade: fc.Cascade, model: CompiledCascade
) -> None:
    """Between good images: a damaged file, one of another size. The good ones answer as they do alone."""
    good = images(3).transpose(0, 2, 3, 1)
    for i, image in enumerate(good):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "0b.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "1b.png")
    found = rows(model, load_data(tmp_path, shape=(3, 8, 8), classes=CLASSES), [0.0])
    assert [p.id for p in found] == ["0.png", "0b.png", "1.png", "1b.png", "2.png"]
    assert [p.error is None for p in found] == [True, False, True, False, True]
    assert "8 pixels wide and 9 high" in str(found[3].error)
    assert found[1][1:6] == found[3][1:6] == (None,) * 5
    assert [p.label for p in found if p.error is None] == cascade(good, [0.0]).label.tolist()


def test_non_finite_pixels_are_an_error_and_cost_all_stages(
    cascade: fc.Cascade, model: CompiledCascade
) -> None:
    x = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)
    x[1] = np.nan
    found = rows(model, ImageData(["a", "b", "c"], x, None), [-1e9])
    assert [p.error is None for p in found] == [True, False, True]
    assert (found[1].label, found[1].probability) == (None, None)
    assert (found[1].exit_stage, found[1].cost_macs) == (1, int(cascade.exit_macs[-1]))


def some(ids: list[str], error: str | None = None) -> Predictions:
    """Rows with labels 0, 1, …, or rows that could not be read."""
    n = len(ids)
    numbers = np.arange(n) % len(CLASSES)
    if error is not None:
        column, scores = np.full(n, -1), np.full(n, np.nan, np.float32)
    else:
        column, scores = numbers, (0.5 / (numbers + 1)).astype(np.float32)
    return Predictions(
        ids=ids,
        label=column,
        probability=scores,
        exit_stage=column,
        cost_macs=numbers * 10,
        top_labels=np.empty((n, 0), np.int64),
        top_probabilities=np.empty((n, 0), np.float32),
        errors={} if error is None else dict.fromkeys(range(n), error),
        classes=CLASSES,
    )


SOME = [some(["a/1.png", "=1+1"]), some(["ü\x1b[2J,\n"], "cannot be decoded")]
COLUMNS = Prediction._fields[:-2]


def as_rows(batches: list[Predictions]) -> list[dict[str, object]]:
    return [dict(zip(COLUMNS, p, strict=False)) for batch in batches for p in batch]


def test_parquet(tmp_path: Path) -> None:
    save_predictions(SOME, tmp_path / "p.parquet")
    table = parquet.read_table(tmp_path / "p.parquet")
    assert table.to_pylist() == as_rows(SOME)
    assert str(table.schema.field("probability").type) == "float"
    assert str(table.schema.field("cost_macs").type) == "int64"


def test_json_lines(tmp_path: Path) -> None:
    save_predictions(SOME, tmp_path / "p.jsonl")
    data = (tmp_path / "p.jsonl").read_bytes()
    assert [json.loads(line) for line in data.splitlines()] == as_rows(SOME)
    assert data.isascii()
    assert b"\x1b" not in data


def test_csv_defuses_formulas(tmp_path: Path) -> None:
    save_predictions(SOME, tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [row["id"] for row in found] == ["a/1.png", "'=1+1", "ü\x1b[2J,\n"]
    assert [row["label"] for row in found] == ["0", "1", ""]


def test_no_images_give_a_file_without_rows(tmp_path: Path) -> None:
    for suffix in (".parquet", ".jsonl", ".csv"):
        save_predictions([], tmp_path / f"p{suffix}")
    assert parquet.read_table(tmp_path / "p.parquet").shape == (0, len(COLUMNS))
    assert (tmp_path / "p.jsonl").read_bytes() == b""
    assert (tmp_path / "p.csv").read_text().split() == [",".join(COLUMNS)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
@pytest.mark.parametrize("failure", [RuntimeError("stop"), OSError(28, "No space left on device")])
def test_a_failure_midway_leaves_the_old_file(tmp_path: Path, suffix: str, failure: Exception) -> None:
    path = tmp_path / f"p{suffix}"
    path.write_text("old")

    def broken() -> Iterator[Predictions]:
        yield SOME[0]
        raise failure

    with pytest.raises(SaveError if isinstance(failure, OSError) else RuntimeError):
        save_predictions(broken(), path, overwrite=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"

    def killed() -> Iterator[Predictions]:
        yield SOME[0]
        assert len(list(tmp_path.iterdir())) == 1
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code_of(lambda: save_predictions(killed(), path)) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    save_predictions(SOME, path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_appears_during_the_run_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"

    def slow() -> Iterator[Predictions]:
        yield SOME[0]
        path.write_text("from elsewhere")

    with pytest.raises(InvalidArgument, match="exists"):
        save_predictions(slow(), path)
    assert path.read_text() == "from elsewhere"


def test_an_existing_file_is_refused_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("old")

    def untouched() -> Iterator[Predictions]:
        pytest.fail("work was done")
        yield SOME[0]

    with pytest.raises(InvalidArgument, match="exists"):
        save_predictions(untouched(), path)
    assert path.read_text() == "old"
    with pytest.raises(InvalidArgument, match=r"\.parquet, \.jsonl, \.csv"):
        save_predictions(untouched(), tmp_path / "p.xlsx")


def test_log_probabilities_are_refused(cascade: fc.Cascade) -> None:
    model = fc.compile(cascade, backend="reference", output="log_probs")
    with pytest.raises(InvalidArgument, match="output"):
        rows(model, ImageData(["0"], images(1), None), [0.0])


def test_top_classes_are_sorted_and_written(
    tmp_path: Path, cascade: fc.Cascade, model: CompiledCascade
) -> None:
    x = images(5)
    found = model.predict(x, [0.0], top_k=2)
    probs, order = cascade(x, [0.0]).probs.sort(dim=1, descending=True, stable=True)
    assert found.top_labels.tolist() == order[:, :2].tolist()
    torch.testing.assert_close(torch.tensor(found.top_probabilities), probs[:, :2])
    save_predictions([found[:2], found[2:]], tmp_path / "p.parquet")
    assert (
        parquet.read_table(tmp_path / "p.parquet")["top_labels"].to_pylist() == found.to_dict()["top_labels"]
    )
    save_predictions([found], tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as file:
        cells = [row["top_labels"] for row in csv.DictReader(file)]
    assert cells == [";".join(map(str, row)) for row in found.top_labels.tolist()]


def test_more_top_classes_than_classes_are_all_of_them(model: CompiledCascade) -> None:
    assert model.predict(images(1), [0.0], top_k=99).top_labels.shape == (1, 3)


def test_rows_with_an_error_have_no_top_classes(model: CompiledCascade) -> None:
    x = np.zeros((3, 3, 8, 8), np.float32)
    x[1] = np.nan
    found = model.predict(x, [0.0], top_k=2)
    assert [row.top_labels is None for row in found] == [False, True, False]
    assert found.to_arrow().column("top_labels").null_count == 1
    assert found.to_arrow().column("label").null_count == 1
    assert found.to_arrow().to_pylist()[1]["exit_stage"] == 1


def test_slices_and_joins_keep_errors_in_place() -> None:
    joined = Predictions.join(SOME)
    assert [p.error for p in joined] == [None, None, "cannot be decoded"]
    assert [p.error for p in joined[1:]] == [None, "cannot be decoded"]
    assert joined[-1].id == SOME[1].ids[0]
    assert list(joined) == [joined[i] for i in range(3)]
    with pytest.raises(IndexError):
        joined[3]


def test_the_table_is_80_columns_wide_and_safe() -> None:
    found = Predictions.join([some([f"{'long/' * 40}<b>{i}\x1b[2J\n" for i in range(12)]), SOME[1]])
    text = repr(found)
    assert "13 predictions, 1 with an error" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "3 more" in text
    html = found._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert "\x1b" not in html


def test_data_frames(model: CompiledCascade) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is optional")
    frame = model.predict(images(3), [0.0]).to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == list(Prediction._fields)
    assert frame["class_name"].isin(CLASSES).all()
