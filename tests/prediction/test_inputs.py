"""Everything that fc.predict accepts gives the rows that the arrays give."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fastcascade as fc
from fastcascade.engine import CompiledCascade
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.model.resnet import resnet_cifar
from fastcascade.prediction.predictions import Predictions

N = 5
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def model() -> CompiledCascade:
    torch.manual_seed(1)
    cascade = fc.Cascade(
        [resnet_cifar(8, num_classes=3)] * 2,
        fc.MLPSelector(),
        num_classes=3,
        input_shape=(3, 8, 8),
        preprocess=fc.Normalize((0.5,) * 3, (0.2,) * 3),
    )
    return fc.compile(cascade, backend="reference")


@pytest.fixture(scope="module")
def grey() -> CompiledCascade:
    torch.manual_seed(1)
    first = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    cascade = fc.Cascade([first], None, 3, (1, 8, 8), preprocess=fc.Normalize((0.5,), (0.2,)))
    return fc.compile(cascade, backend="reference")


@pytest.fixture(scope="module")
def expected(model: CompiledCascade) -> list[float]:
    return model(IMAGES).probs.max(1).values.tolist()


def check(found: Predictions, expected: list[float]) -> None:
    assert not found.errors, found.errors
    np.testing.assert_allclose(found.probability, expected, atol=1e-5)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


class ListDataset(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from IMAGES


def forms() -> dict[str, Any]:
    nchw = IMAGES.transpose(0, 3, 1, 2)
    normalised = ((nchw / 255.0 - 0.5) / 0.2).astype(np.float32)
    labels = torch.arange(N)
    return {
        "NHWC": IMAGES,
        "NCHW": nchw,
        "tensor": torch.from_numpy(IMAGES.copy()),
        "floats": normalised,
        "half": torch.from_numpy(normalised).double(),
        "list of arrays": list(IMAGES),
        "list of CHW": list(nchw),
        "list of float tensors": list(torch.from_numpy(normalised)),
        "Pillow": [Image.fromarray(image) for image in IMAGES],
        "encoded": [encoded(image) for image in IMAGES],
        "generator": (image for image in IMAGES),
        "Dataset of pairs": ListDataset([(Image.fromarray(x), 1) for x in IMAGES]),
        "IterableDataset": Stream(),
        "DataLoader": DataLoader(TensorDataset(torch.from_numpy(nchw.copy()), labels), batch_size=2),
        "Subset": torch.utils.data.Subset(ListDataset(list(IMAGES)), range(N)),
    }


@pytest.mark.parametrize("form", forms())
def test_every_form_gives_the_same_rows(model: CompiledCascade, expected: list[float], form: str) -> None:
    found = model.predict(forms()[form])
    check(found, expected)
    assert list(found.ids) == [str(i) for i in range(N)]


def test_one_image_needs_no_batch_axis(model: CompiledCascade, expected: list[float]) -> None:
    for image in (IMAGES[2], IMAGES[2].transpose(2, 0, 1), Image.fromarray(IMAGES[2]), encoded(IMAGES[2])):
        check(model.predict(image), expected[2:3])


def test_grey_images_need_no_channel_axis(grey: CompiledCascade, model: CompiledCascade) -> None:
    plane = IMAGES[:, :, :, 0]
    wanted = grey(plane[:, None]).probs.max(1).values.tolist()
    check(grey.predict(plane), wanted)
    check(grey.predict(plane[1]), wanted[1:2])
    check(grey.predict(list(plane)), wanted)
    check(grey.predict(Image.fromarray(plane[3])), wanted[3:4])
    coloured = model(np.repeat(plane[:, None], 3, 1)).probs.max(1).values.tolist()
    check(model.predict(plane), coloured)
    check(model.predict(plane[0]), coloured[:1])


def test_other_sizes_are_scaled_or_errors(model: CompiledCascade) -> None:
    large = np.repeat(np.repeat(IMAGES, 2, 1), 2, 2)
    scaled = [np.asarray(Image.fromarray(x).resize((8, 8), Image.Resampling.BILINEAR)) for x in large]
    wanted = model(np.stack(scaled)).probs.max(1).values.tolist()
    check(model.predict(large), wanted)
    check(model.predict(list(large)), wanted)
    check(model.predict(large[0]), wanted[:1])
    refused = model.predict([IMAGES[0], large[0]], resize=False)
    assert list(refused.errors) == [1]
    with pytest.raises(InvalidArgument, match="expected"):
        model.predict(large.astype(np.float32))


def test_bad_items_are_rows(model: CompiledCascade, expected: list[float]) -> None:
    class Broken(ListDataset):
        def __getitem__(self, i: int) -> Any:
            if i == 1:
                raise KeyError("gone")
            return super().__getitem__(i)

    found = model.predict(Broken(list(IMAGES)))
    assert found.errors == {1: "cannot be read: KeyError: 'gone'"}
    assert found.label[1] == -1
    np.testing.assert_allclose(found.probability[2:], expected[2:], atol=1e-5)
    found = model.predict([IMAGES[0], b"not an image", np.zeros((3, 9, 9), np.float32)[:, :0, :0]][:2])
    assert "is damaged" in found.errors[1]


@pytest.mark.parametrize(
    "inputs", [3, {"a": 1}, [3], np.zeros((2, 3, 8, 8), np.int64), np.zeros(4, np.uint8), [[1, 2]]], ids=repr
)
def test_what_is_no_image_is_refused(model: CompiledCascade, inputs: Any) -> None:
    with pytest.raises(InvalidArgument):
        model.predict(inputs)


@pytest.mark.parametrize("inputs", [[], np.zeros((0, 8, 8, 3), np.uint8)], ids=["list", "array"])
def test_no_inputs_are_refused(model: CompiledCascade, inputs: Any) -> None:
    with pytest.raises(DataError, match="no inputs"):
        model.predict(inputs)


class HubImage:
    """As the feature of the same role in ``datasets``."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


HubImage.__name__ = "Image"


class HubDataset(ListDataset):
    """The part of ``datasets.Dataset`` that is used: decoded images, unless its column is cast."""

    column_names = ("label", "photo")

    def __init__(self, cells: list[Any], decode: bool = True) -> None:
        super().__init__(cells)
        self.features = {"label": object(), "photo": HubImage(decode)}

    def select_columns(self, names: list[str]) -> HubDataset:
        assert names == ["photo"]
        return self

    def cast_column(self, name: str, feature: HubImage) -> HubDataset:
        return HubDataset(self.items, feature.decode)

    def __getitem__(self, i: int) -> Any:
        assert not self.features["photo"].decode
        if i >= len(self.items):
            raise IndexError
        return {"photo": self.items[i]}


def test_data_sets_of_the_form_of_hugging_face(
    tmp_path: Path, model: CompiledCascade, expected: list[float]
) -> None:
    cells: list[Any] = [{"bytes": encoded(image), "path": None} for image in IMAGES]
    cells[1] = {"bytes": b"damaged", "path": None}
    (tmp_path / "2.png").write_bytes(encoded(IMAGES[2]))
    cells[2] = {"bytes": None, "path": str(tmp_path / "2.png")}
    cells[3] = None
    found = model.predict(HubDataset(cells))
    assert list(found.errors) == [1, 3]
    np.testing.assert_allclose(found.probability[[0, 2, 4]], [expected[i] for i in (0, 2, 4)], atol=1e-5)


def test_hugging_face_data_sets(model: CompiledCascade, expected: list[float]) -> None:
    """Their own library where it is installed: columns of images, a damaged one included."""
    datasets = pytest.importorskip("datasets", reason="datasets is optional")
    cells = [{"bytes": encoded(image), "path": None} for image in IMAGES]
    cells[1] = {"bytes": b"damaged", "path": None}
    table = {"label": list(range(N)), "photo": cells}
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    found = model.predict(datasets.Dataset.from_dict(table, features=features))
    assert list(found.errors) == [1]
    np.testing.assert_allclose(found.probability[2:], expected[2:], atol=1e-5)
    with pytest.raises(InvalidArgument, match="type Image"):
        model.predict(datasets.Dataset.from_dict({"a": [1]}))


##### Files


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_parquet(path: Path, cells: list[Any], **options: Any) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"label": pa.array(range(len(cells))), "image": pa.array(cells, kind)}
    parquet.write_table(pa.table(columns), path, **options)


def files(folder: Path) -> list[Any]:
    """The images in every kind of file; each entry is an input for predict."""
    pngs = [encoded(image) for image in IMAGES]
    photos = folder / "photos"
    for i, png in enumerate(pngs):
        path = photos / ("a" if i < 2 else "b") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
    np.save(folder / "x.npy", IMAGES)
    np.savez(folder / "x.npz", images=IMAGES)
    np.savez_compressed(folder / "y.npz", images=IMAGES)
    write_tar(folder / "x-000.tar", {"a.json": b"{}", "a.png": pngs[0], "../b.png": pngs[1]})
    write_tar(folder / "x-001.tar", {f"{i}.png": pngs[i] for i in range(2, N)})
    cells = [{"bytes": png, "path": "x.png"} for png in pngs]
    write_parquet(folder / "x.parquet", cells, row_group_size=2)
    (folder / "hub").mkdir()
    write_parquet(folder / "hub" / "x-0.parquet", cells[:2])
    write_parquet(folder / "hub" / "x-1.parquet", cells[2:])
    return [
        photos,
        f"folder:{photos}",
        f"{photos}/**/*.png",
        sorted(photos.rglob("*.png")),
        [str(path) for path in sorted(photos.rglob("*.png"))],
        folder / "x.npy",
        folder / "x.npz",
        folder / "y.npz",
        f"{folder}/x-*.tar",
        f"{folder}/x-{{000..001}}.tar",
        folder / "x.parquet",
        folder / "hub",
    ]


@pytest.mark.parametrize("number", range(12))
def test_every_kind_of_file(
    tmp_path: Path, model: CompiledCascade, expected: list[float], number: int
) -> None:
    found = model.predict(files(tmp_path)[number])
    check(found, expected)
    assert len(set(found.ids)) == N


def test_one_file(tmp_path: Path, model: CompiledCascade, expected: list[float]) -> None:
    (tmp_path / "b.png").write_bytes(encoded(IMAGES[1]))
    found = model.predict(tmp_path / "b.png")
    check(found, expected[1:2])
    assert found[0].id == "b.png"


def test_ids_say_where_an_image_is(tmp_path: Path, model: CompiledCascade) -> None:
    every = files(tmp_path)
    assert list(model.predict(every[0]).ids)[:3] == ["a/0.png", "a/1.png", "b/2.png"]
    assert list(model.predict(every[8]).ids)[:3] == [
        "x-000.tar/a.png",
        "x-000.tar/../b.png",
        "x-001.tar/2.png",
    ]
    assert list(model.predict(every[10]).ids) == [str(i) for i in range(N)]
    assert list(model.predict(every[11]).ids)[1:3] == ["x-0.parquet/1", "x-1.parquet/0"]


def test_nothing_is_extracted_from_a_tar(tmp_path: Path, model: CompiledCascade) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    write_tar(inside / "x.tar", {"../escaped.png": encoded(IMAGES[0]), "/abs.png": encoded(IMAGES[1])})
    assert not model.predict(inside / "x.tar").errors
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.tar"]


def test_bad_cells_and_members_are_rows(tmp_path: Path, model: CompiledCascade) -> None:
    good = encoded(IMAGES[0])
    write_parquet(tmp_path / "x.parquet", [{"bytes": good, "path": None}, None, {"bytes": None, "path": "x"}])
    assert list(model.predict(tmp_path / "x.parquet").errors) == [1, 2]
    write_tar(tmp_path / "x.tar", {"a.png": good, "b.png": b"", "c.heic": b"unknown", "d.png": good[:50]})
    found = model.predict(tmp_path / "x.tar")
    assert list(found.errors) == [1, 2, 3]
    assert list(found.ids) == ["a.png", "b.png", "c.heic", "d.png"]


def test_a_damaged_row_group_gives_error_rows(tmp_path: Path, model: CompiledCascade) -> None:
    path = tmp_path / "x.parquet"
    cells = [{"bytes": encoded(IMAGES[i % N]), "path": None} for i in range(12)]
    write_parquet(
        path, cells, row_group_size=4, compression="none", use_dictionary=False, write_page_checksum=True
    )
    column = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    end = column.data_page_offset + column.total_compressed_size
    data = bytearray(path.read_bytes())
    data[end - 140 : end - 100] = b"\xff" * 40
    path.write_bytes(data)
    found = model.predict(path)
    assert list(found.errors) == [4, 5, 6, 7]
    assert "row group 1" in found.errors[4]


def test_truncated_and_foreign_files_are_refused(tmp_path: Path, model: CompiledCascade) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": encoded(IMAGES[0]), "b.png": bytes(5000)})
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:3000])
    (tmp_path / "y.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    parquet.write_table(pa.table({"a": [1]}), tmp_path / "y.parquet")
    np.save(tmp_path / "x.npy", IMAGES)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    np.save(tmp_path / "y.npy", np.asfortranarray(IMAGES))
    np.save(tmp_path / "z.npy", np.array([{}], object), allow_pickle=True)
    for name in ("x.tar", "y.tar", "x.parquet", "y.parquet", "x.npy", "y.npy", "z.npy", "none.png", "*.bmp"):
        with pytest.raises(DataError, match=name.replace("*", r"\*")):
            model.predict(tmp_path / name)


def test_loops_of_links_are_not_followed(tmp_path: Path, model: CompiledCascade) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encoded(IMAGES[0]))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self.png").symlink_to("self.png")
    found = model.predict(tmp_path)
    assert list(found.ids) == ["a/self.png", "a/x.png"]
    assert "cannot be read" in found.errors[0]
    assert len(model.predict(f"{tmp_path}/**/x.png")) == 1


def test_an_unreadable_folder_is_an_error(
    tmp_path: Path, model: CompiledCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "x.png").write_bytes(encoded(IMAGES[0]))
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match="locked: Permission denied"):
        model.predict(tmp_path)


def test_a_file_that_changes_during_the_run_is_an_error(tmp_path: Path, model: CompiledCascade) -> None:
    from fastcascade.data.sources import load_inputs

    every = files(tmp_path)
    for source in (every[5], tmp_path / "x-001.tar", every[10]):
        data = load_inputs(source, (3, 8, 8))
        os.utime(source, (1, 1))
        with pytest.raises(DataError, match="has changed"):
            model.predict(data)


def test_names_are_unambiguous_and_printable(tmp_path: Path, model: CompiledCascade) -> None:
    for name in (b"a\nb.png", b"\xff.png", b"c\x1b[2J.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(encoded(IMAGES[0]))
    found = model.predict(tmp_path)
    assert set(found.ids) == {"a\nb.png", "\\xff.png", "c\x1b[2J.png"}
    assert "\x1b" not in repr(found)
    found.to_arrow()
