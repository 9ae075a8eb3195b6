"""Every accepted form of data gives the same batches; what is wrong is named, never guessed or replaced."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fastcascade.data.batches import arrays, batches, image_hashes
from fastcascade.data.image_data import ImageData
from fastcascade.data.image_decoding import decode
from fastcascade.data.sources import load_data
from fastcascade.errors import DataError, InvalidArgument

N = 7
CIFAR_TEST = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}
pillow = pytest.importorskip("PIL.Image", reason="reading image files needs Pillow")


def random_images(n: int = N, shape: tuple[int, ...] = (32, 32, 3)) -> np.ndarray[Any, Any]:
    images: np.ndarray[Any, Any] = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
    return images


IMAGES, LABELS = random_images(), np.arange(N) % 3


class ListDataset(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class StreamDataset(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(torch.from_numpy(IMAGES), LABELS, strict=True)


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    view: np.ndarray[Any, Any] = array.view()
    view.flags.writeable = False
    return view


tensors = (torch.from_numpy(IMAGES), torch.from_numpy(LABELS))
FORMS: dict[str, Any] = {
    "pair of arrays": (IMAGES, LABELS),
    "list of arrays": [IMAGES, LABELS],
    "pair of tensors": tensors,
    "read-only arrays": (read_only(IMAGES), read_only(LABELS)),
    "big-endian labels": (IMAGES, LABELS.astype(">i4")),
    "column of labels": (IMAGES, LABELS[:, None].astype(np.uint8)),
    "reversed views": (IMAGES[::-1].copy()[::-1], LABELS[::-1].copy()[::-1]),
    "ImageData": ImageData([str(i) for i in range(N)], IMAGES, LABELS),
    "Dataset of tensors": TensorDataset(*tensors),
    "Dataset of arrays": ListDataset(list(zip(IMAGES, LABELS, strict=True))),
    "Dataset of Pillow images": ListDataset([(pillow.fromarray(i), int(k)) for i, k in zip(IMAGES, LABELS, strict=True)]),  # noqa: E501
    "list of items": list(zip(IMAGES, LABELS, strict=True)),
    "iterable Dataset": StreamDataset(),
    "DataLoader": DataLoader(TensorDataset(*tensors), batch_size=3),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("batch_size", [1, 3, N, 100])
def test_every_form_gives_the_same_batches(name: str, batch_size: int) -> None:
    parts = list(batches(FORMS[name], batch_size))
    expected = 3 if name == "DataLoader" else batch_size
    assert [len(images) for images, _ in parts] == [min(expected, N - i) for i in range(0, N, expected)]
    images = torch.cat([images for images, _ in parts])
    labels = torch.cat([label for _, label in parts if label is not None])
    assert images.dtype == torch.uint8
    assert torch.equal(images, tensors[0])
    assert labels.dtype == torch.int64
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    "data",
    [(IMAGES, None), ListDataset(list(IMAGES)), ListDataset([(i,) for i in IMAGES]),
     DataLoader(ListDataset(list(tensors[0])), batch_size=4), ImageData(list("abcdefg"), IMAGES, None)],
    ids=["pair", "Dataset", "one-tuples", "DataLoader", "ImageData"],
)  # fmt: skip
def test_data_without_labels_give_none(data: Any) -> None:
    images, labels = arrays(data)
    assert torch.equal(images, tensors[0])
    assert labels is None


def test_float_images_keep_their_dtype_and_layout() -> None:
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert arrays((images, None))[0] is not images
    assert torch.equal(arrays((images, None))[0], images)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IMAGES, r"data is ndarray of shape \(7, 32, 32, 3\); expected a Dataset, a DataLoader, or a pair"),
        ("cifar10", "data is str"),
        (3, "data is int"),
        ((IMAGES, LABELS[:5]), "7 images and 5 labels"),
        ((IMAGES, LABELS.astype(float)), "dtype torch.float64; expected .* integers"),
        ((IMAGES, LABELS > 0), "dtype torch.bool"),
        ((IMAGES, np.stack([LABELS, LABELS], 1)), r"labels have shape \(4, 2\)"),
        ((IMAGES.astype(np.int32), LABELS), "dtype torch.int32; expected four axes"),
        ((IMAGES[..., 0], LABELS), r"shape \(4, 32, 32\).*expected four axes"),
        ((np.array(["a"]), LABELS[:1]), "expected numbers"),
        (ListDataset([(1, 2, 3)]), "3 parts"),
        (ListDataset([{"image": 1}]), "an image of the Dataset is dict"),
        (ListDataset([IMAGES[0], IMAGES[0, :5]]), r"shapes \[\(5, 32, 3\), \(32, 32, 3\)\]"),
        (ListDataset([(IMAGES[0], 1), (IMAGES[0],)]), "some items have labels"),
        (ListDataset([pillow.new("P", (4, 4))]), "mode 'P'; convert"),
    ],
)
def test_what_is_not_data_is_named(data: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        list(batches(data, 4))


def test_batch_size_and_label_range_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="batch_size is 0"):
        list(batches((IMAGES, LABELS), 0))
    assert len(arrays((IMAGES, LABELS), num_classes=3)[0]) == N
    with pytest.raises(DataError, match="0 … 2; expected 0 … 1 for 2 classes"):
        arrays((IMAGES, LABELS), num_classes=2)
    with pytest.raises(DataError, match="-1 … 2"):
        arrays((IMAGES, np.where(LABELS == 0, -1, LABELS)), num_classes=3)
    with pytest.raises(DataError, match="empty"):
        arrays((IMAGES[:0], LABELS[:0]))


def test_batches_read_no_further_than_asked() -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield IMAGES[0], 1

    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return endless()

    assert next(batches(Endless(), 5))[0].shape == (5, 32, 32, 3)


def test_hashes_depend_on_content_alone() -> None:
    nchw = tensors[0].permute(0, 3, 1, 2)
    hashes = image_hashes(nchw)
    assert hashes.dtype == np.uint64
    assert len(set(hashes.tolist())) == N
    for same in (nchw.contiguous(), nchw.contiguous().numpy(), nchw.to(memory_format=torch.channels_last)):
        assert (image_hashes(same) == hashes).all()
    assert (image_hashes(nchw.flip(0)) == hashes[::-1]).all()
    changed = nchw.clone()
    changed[2, 1, 5, 5] += 1
    assert (image_hashes(changed) != hashes).tolist() == [i == 2 for i in range(N)]
    floats = nchw.float()
    assert (image_hashes(floats.double()) == image_hashes(floats)).all()
    assert len(image_hashes(nchw[:0])) == 0


def cifar_bytes(kind: str, n: int = N) -> bytes:
    """Records of the images and labels above, as the data sets' page describes them."""
    images = random_images(n)
    records = io.BytesIO()
    for i in range(n):
        coarse = bytes([19 - i % 20]) if kind == "cifar100" else b""
        records.write(coarse + bytes([i % 3]) + b"".join(images[i, :, :, c].tobytes() for c in range(3)))
    return records.getvalue()


def write_cifar(root: Path, kind: str) -> Path:
    folder = root / {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[kind]
    folder.mkdir()
    (folder / CIFAR_TEST[kind]).write_bytes(cifar_bytes(kind))
    if kind == "cifar10":
        for i in range(1, 6):
            (folder / f"data_batch_{i}.bin").write_bytes(cifar_bytes(kind, i))
        (folder / "batches.meta.txt").write_text("".join(f"class {i}\n" for i in range(10)) + "\n")
    else:
        (folder / "train.bin").write_bytes(cifar_bytes(kind, 15))
        (folder / "fine_label_names.txt").write_text("".join(f"class {i}\n" for i in range(100)))
    return folder


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_is_read_from_a_folder_or_a_file(tmp_path: Path, kind: str) -> None:
    folder = write_cifar(tmp_path, kind)
    file = folder / CIFAR_TEST[kind]
    for source in (tmp_path, folder, f"{kind}:{tmp_path}", f"{kind}:{folder}", f"{kind}:{file}", file):
        data = load_data(source)
        assert data.classes is not None
        assert data.classes[:2] == ("class 0", "class 1")
        assert list(data.ids) == [str(i) for i in range(N)]
        images, labels = arrays(data)
        assert torch.equal(images, tensors[0])
        assert labels is not None
        assert labels.tolist() == LABELS.tolist()
    assert len(load_data(folder, split="train")) == 15
    (folder / "batches.meta.txt").unlink(missing_ok=True)
    (folder / "fine_label_names.txt").unlink(missing_ok=True)
    assert load_data(folder).classes is None


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_damaged_cifar_files_are_refused(tmp_path: Path, kind: str) -> None:
    file = write_cifar(tmp_path, kind) / CIFAR_TEST[kind]
    good = file.read_bytes()
    for bad, message in [
        (good[:-1], "expected a multiple of"),
        (b"", "has 0 bytes"),
        (good[: -len(good) // N] + b"\xff" * (len(good) // N), "label 255"),
    ]:
        file.write_bytes(bad)
        with pytest.raises(DataError, match=message):
            load_data(f"{kind}:{tmp_path}")
    file.unlink()
    with pytest.raises(DataError, match=r"cannot read .*No such file"):
        load_data(f"{kind}:{tmp_path}")


def test_a_listed_sha256_finds_any_flipped_bit(tmp_path: Path) -> None:
    file = write_cifar(tmp_path, "cifar10") / "test_batch.bin"
    good = file.read_bytes()
    (file.parent / "SHA256SUMS").write_text(f"{hashlib.sha256(good).hexdigest()}  test_batch.bin\n")
    assert len(load_data(tmp_path)) == N
    for byte in range(0, len(good), 499):
        bad = bytearray(good)
        bad[byte] ^= 1
        file.write_bytes(bad)
        with pytest.raises(DataError, match="is damaged"):
            load_data(tmp_path)


def test_sources_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    (tmp_path / "both.bin").write_bytes(bytes(3073 * 3074))
    (tmp_path / "text.txt").write_text("hello")
    for name in ("both.bin", "text.txt"):
        with pytest.raises(DataError, match=r"cannot infer the kind of .*; write cifar10:"):
            load_data(tmp_path / name)
    with pytest.raises(DataError, match="does not exist"):
        load_data(tmp_path / "nothing")
    with pytest.raises(DataError, match="is not a folder"):
        load_data(f"folder:{tmp_path / 'text.txt'}")


def save_npz(path: Path, **values: Any) -> Path:
    np.savez(path, **values)
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_is_read_with_or_without_a_split(tmp_path: Path, compressed: bool) -> None:
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "a.npz", x_train=IMAGES[:5], y_train=LABELS[:5, None], x_test=IMAGES, y_test=LABELS)
    save(tmp_path / "b.npz", images=np.asfortranarray(IMAGES), classes=np.array(["cat", "dog", "owl"]))
    assert torch.equal(arrays(load_data(tmp_path / "a.npz"))[0], tensors[0])
    train = load_data(f"npz:{tmp_path / 'a.npz'}", split="train")
    assert train.labels is not None
    assert train.labels.tolist() == LABELS[:5].tolist()
    unlabelled = load_data(tmp_path / "b.npz")
    assert unlabelled.labels is None
    assert unlabelled.classes == ("cat", "dog", "owl")
    assert torch.equal(arrays(unlabelled)[0], tensors[0])
    with pytest.raises(DataError, match=r"classes \['cat', 'dog', 'owl'\]; expected \['dog', 'cat', 'owl'\]"):
        load_data(tmp_path / "b.npz", classes=["dog", "cat", "owl"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": IMAGES}, r"holds \['x'\]; expected x_test and y_test, or images and labels"),
        ({"images": IMAGES[..., 0]}, "expected four axes"),
        ({"images": IMAGES.astype(np.int64)}, "dtype int64"),
        ({"images": IMAGES, "labels": LABELS[:3]}, "expected 7 integers"),
        ({"images": IMAGES, "labels": LABELS / 2}, "expected 7 integers"),
        ({"images": IMAGES, "classes": np.arange(3)}, "expected a row of names"),
        ({"images": np.array([[[[{}]]]], dtype=object)}, "dtype object; expected numbers"),
    ],
)
def test_npz_with_other_content_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(save_npz(tmp_path / "a.npz", **values))


def test_an_npz_header_that_lies_about_its_size_allocates_nothing(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 32, 32, 3)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(100))
    with pytest.raises(DataError, match="but holds 100 bytes"):
        load_data(tmp_path / "a.npz")


def flipped_or_cut(data: st.DataObject, good: bytes) -> bytes:
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(bad[: data.draw(st.just(len(bad)) | st.integers(0, len(bad)))])


fuzzed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@fuzzed
@given(data=st.data())
def test_a_damaged_npz_loads_identically_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.npz"
    save = data.draw(st.sampled_from([np.savez, np.savez_compressed]))
    save(path, images=random_images(2, (4, 4, 3)), labels=np.array([1, 0]))
    path.write_bytes(flipped_or_cut(data, path.read_bytes()))
    try:
        loaded = load_data(path)
    except DataError:
        return
    assert (np.asarray(loaded.images) == random_images(2, (4, 4, 3))).all()
    assert loaded.labels is not None
    assert loaded.labels.tolist() == [1, 0]


@fuzzed
@given(data=st.data(), extension=st.sampled_from([".png", ".jpg", ".bmp", ".ppm", ".webp", ".gif", ".tif"]))
def test_a_damaged_image_file_is_an_image_or_an_error_row(
    tmp_path: Path, data: st.DataObject, extension: str
) -> None:
    good, path = tmp_path / f"good{extension}", tmp_path / "folder" / f"bad{extension}"
    path.parent.mkdir(exist_ok=True)
    pillow.fromarray(random_images(1, (8, 8, 3))[0]).save(good)
    path.write_bytes(flipped_or_cut(data, good.read_bytes()))
    with contextlib.suppress(DataError):
        assert decode(path, 3, (8, 8), resize=False).shape == (8, 8, 3)


def write_folder(root: Path, **images: list[np.ndarray[Any, Any]]) -> Path:
    for name, row in images.items():
        (root / name).mkdir(parents=True)
        for i, image in enumerate(row):
            pillow.fromarray(image).save(root / name / f"{i}.png")
    return root


def test_a_folder_of_classes_is_read_in_order_of_its_paths(tmp_path: Path) -> None:
    write_folder(tmp_path, owl=[IMAGES[2]], cat=[IMAGES[0], IMAGES[1]], empty=[])
    data = load_data(tmp_path)
    assert data.classes == ("cat", "empty", "owl")
    assert list(data.ids) == ["cat/0.png", "cat/1.png", "owl/0.png"]
    images, labels = arrays(data)
    assert torch.equal(images, tensors[0][:3])
    assert labels is not None
    assert labels.tolist() == [0, 0, 2]
    taken = data.take([2, 0])
    assert list(taken.ids) == ["owl/0.png", "cat/0.png"]
    assert torch.equal(arrays(taken)[0], tensors[0][[2, 0]])


def test_labels_follow_the_class_order_of_the_caller(tmp_path: Path) -> None:
    write_folder(tmp_path, cat=[IMAGES[0]], owl=[IMAGES[1]])
    labels = load_data(tmp_path, classes=["owl", "dog", "cat"]).labels
    assert labels is not None
    assert labels.tolist() == [2, 0]
    assert load_data(tmp_path, classes=["one", "two"]).labels is None
    with pytest.raises(DataError, match=r"sub-folders \['owl'\]; expected class names among"):
        load_data(tmp_path, classes=["cat", "dog"])


def test_a_divided_folder_is_read_by_its_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", cat=[IMAGES[0]], owl=[IMAGES[1]])
    write_folder(tmp_path / "test", cat=[IMAGES[2]])
    assert list(load_data(tmp_path).ids) == ["cat/0.png"]
    assert len(load_data(tmp_path, split="train")) == 2
    with pytest.raises(DataError, match="no sub-folder 'train'"):
        load_data(tmp_path / "test", split="train")


def test_one_bad_image_is_one_error_row_and_stops_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path, all=list(IMAGES))
    folder = tmp_path / "all"
    (folder / "2.png").write_bytes(b"not an image")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:-200])
    pillow.fromarray(IMAGES[4, :9]).save(folder / "4.png")
    data = load_data(folder)
    rows = list(data.rows(3))
    assert [row.ids for row in rows] == [[f"{i}.png" for i in part] for part in ((0, 1, 2), (3, 4, 5), (6,))]
    errors = [error for row in rows for error in row.errors]
    assert [error is None for error in errors] == [True, True, False, False, False, True, True]
    assert errors[4] == "is 32 pixels wide and 9 high; expected 32 and 32 (resize=True, --resize, scales it)"
    assert torch.equal(torch.cat([row.images for row in rows]), tensors[0][[0, 1, 5, 6]])
    with pytest.warns(UserWarning, match="left out unreadable images: .*is damaged"):
        parts = list(batches(data, 3))
    assert [len(images) for images, _ in parts] == [2, 1, 1]


def test_labels_stay_with_their_images_around_a_bad_one(tmp_path: Path) -> None:
    write_folder(tmp_path, cat=[IMAGES[0], IMAGES[1]], owl=[IMAGES[2]])
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"):
        images, labels = arrays(load_data(tmp_path))
    assert labels is not None
    assert labels.tolist() == [0, 1]
    assert torch.equal(images, tensors[0][[0, 2]])


def test_other_sizes_are_scaled_only_when_asked(tmp_path: Path) -> None:
    write_folder(tmp_path, all=[IMAGES[0], np.repeat(np.repeat(IMAGES[1], 2, 0), 2, 1)])
    assert [row.errors[0] is None for row in load_data(tmp_path, shape=(3, 32, 32)).rows(1)] == [True, False]
    images, _ = arrays(load_data(tmp_path, shape=(3, 16, 16), resize=True))
    assert images.shape == (2, 16, 16, 3)
    with pytest.raises(InvalidArgument, match="needs shape"):
        load_data(tmp_path, resize=True)
    with pytest.raises(InvalidArgument, match="works on folders"):
        load_data(save_npz(tmp_path / "a.npz", images=IMAGES), shape=(3, 8, 8), resize=True)


def test_images_become_rgb_or_grey_and_16_bits_are_refused(tmp_path: Path) -> None:
    pillow.fromarray(IMAGES[0, :, :, 0]).save(tmp_path / "grey.png")
    pillow.fromarray(IMAGES[1]).convert("RGBA").save(tmp_path / "rgba.png")
    pillow.fromarray(IMAGES[2].astype(np.uint16)[:, :, 0] * 200).save(tmp_path / "sixteen.png")
    colour, errors = load_data(tmp_path).images.read([0, 1, 2])  # type: ignore[union-attr]
    assert (colour[0] == IMAGES[0, :, :, :1]).all()
    assert (colour[1] == IMAGES[1]).all()
    assert errors[2] is not None
    assert "expected 8 bits per channel" in errors[2]
    grey = next(load_data(tmp_path, shape=(1, 32, 32)).rows(1)).images
    assert (grey.numpy()[0, :, :, 0] == IMAGES[0, :, :, 0]).all()
    with pytest.raises(InvalidArgument, match="1 or 3 channels"):
        load_data(tmp_path, shape=(4, 32, 32))


def test_the_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = pillow.Exif()
    exif[0x0112] = 6  # turn 90° clockwise to see it upright
    pillow.fromarray(IMAGES[0, :20]).save(tmp_path / "a.png", exif=exif)
    (image, *_), _ = load_data(tmp_path).images.read([0])  # type: ignore[union-attr]
    assert (image == np.rot90(IMAGES[0, :20], -1)).all()


def test_a_header_of_too_many_pixels_is_refused_before_decoding(tmp_path: Path) -> None:
    pillow.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    png = bytearray((tmp_path / "a.png").read_bytes())
    png[16:24] = struct.pack(">II", 9000, 9000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (tmp_path / "a.png").write_bytes(png)
    with pytest.raises(DataError, match="9000 × 9000 pixels; expected at most"):
        load_data(tmp_path)


def test_what_is_not_an_image_file_is_told_or_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        load_data(tmp_path)
    write_folder(tmp_path, cat=[IMAGES[0]])
    (tmp_path / "cat" / "notes.txt").write_text("hello")
    (tmp_path / ".hidden").mkdir()
    with pytest.warns(
        UserWarning, match=r"left out what is not an image, 1 in all, for example 'cat/notes\.txt'"
    ):
        assert load_data(tmp_path).classes == ("cat",)
    pillow.fromarray(IMAGES[0]).save(tmp_path / "loose.png")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match=r"both directly \('loose\.png'\) and in sub-folders"),
    ):
        load_data(tmp_path)


def test_the_content_decides_about_the_format(tmp_path: Path) -> None:
    pillow.fromarray(IMAGES[0]).save(tmp_path / "a.bmp")
    pillow.fromarray(IMAGES[0]).save(tmp_path / "b.tga")
    (tmp_path / "a.bmp").rename(tmp_path / "a.png")
    (tmp_path / "b.tga").rename(tmp_path / "b.png")
    _, errors = load_data(tmp_path).images.read([0, 1])  # type: ignore[union-attr]
    assert errors[0] is None
    assert errors[1] == "is damaged, or its format is none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"


def test_names_that_are_not_utf8_become_printable_ids(tmp_path: Path) -> None:
    pillow.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    data = load_data(tmp_path)
    assert list(data.ids) == ["\\xff.png"]
    assert torch.equal(arrays(data)[0], tensors[0][:1])
