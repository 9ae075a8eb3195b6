"""Images from disk: CIFAR binaries, npz files, folders of images."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from fastcascade.data.image_data import Array, ImageData
from fastcascade.data.image_files import ImageFiles, find_images, first_size
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.storage.files import read_bytes

__all__ = ["Split", "load_data"]

Split: TypeAlias = Literal["train", "test"]


MAX_FILE_BYTES = 16 * 2**30


def load_data(
    source: str | Path,
    split: Split | None = None,
    shape: tuple[int, int, int] | None = None,
    resize: bool = False,
    classes: Sequence[str] | None = None,
) -> ImageData:
    """Images from disk: CIFAR-10/100 in binary layout, an npz file, or a folder of images.

    Args:
        source: a path whose kind is found by looking at it, or the kind and a path: ``cifar10:DIR``,
            ``cifar100:DIR`` (or one of their .bin files), ``npz:FILE``, ``folder:DIR``.

            An npz file holds ``x_train``, ``y_train``, ``x_test``, ``y_test``, or ``images`` and ``labels``
            (labels may be missing), and perhaps ``classes``. A folder holds one sub-folder per class, or
            unlabelled images; it may be divided into ``train`` and ``test``.
        split: "train" or "test"; None reads the test part of a divided data set, else everything.
        shape: (C, H, W) that folder images must have; that of the first readable one if not given.
        resize: scale folder images of other sizes to ``shape`` (antialiased bilinear, aspect not kept).
        classes: names in the label order to use. A folder's labels follow them, and if none of its
            sub-folders is among them the images are unlabelled; other sources must agree with them.

    Raises:
        DataError: missing, truncated, corrupt, without the split asked for, or of other classes.
        InvalidArgument: ``resize`` without ``shape``, or for data that are not a folder.
    """
    kind, path = _kind_and_path(source)
    if kind == "folder":
        if resize and shape is None:
            raise InvalidArgument("resize=True needs shape=(C, H, W), the size to scale to")
        return _load_folder(path, split, shape, resize, classes)
    if resize:
        raise InvalidArgument(f"resize=True works on folders of images; {source} is {kind}")
    data = _load_npz(path, split) if kind == "npz" else _load_cifar(path, split, _CIFAR[kind])
    if classes is not None and data.classes is not None and data.classes != tuple(classes):
        raise DataError(f"{source} has the classes {list(data.classes)}; expected {list(classes)}")
    return data


def _kind_and_path(source: str | Path) -> tuple[str, Path]:
    named = re.fullmatch(r"(cifar100?|npz|folder):(.+)", str(source), re.DOTALL)
    if named:
        return named[1], Path(named[2])
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; give a path, or KIND:PATH with cifar10, cifar100, npz, folder"
        )
    for kind, layout in _CIFAR.items():
        if any((where / layout.test[0]).is_file() for where in (path, path / layout.folder)):
            return kind, path
    if path.is_dir():
        return "folder", path
    if path.suffix == ".npz":
        return "npz", path
    size = path.stat().st_size
    fitting = [k for k, layout in _CIFAR.items() if path.suffix == ".bin" and size % layout.record == 0]
    if len(fitting) == 1:
        return fitting[0], path
    raise DataError(f"cannot tell what {path} is; write cifar10:, cifar100:, npz: or folder: before the path")


class _CifarLayout(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label_bytes: int  # before the pixels; the last one is the (fine) label
    num_classes: int

    @property
    def record(self) -> int:
        return self.label_bytes + 3072


_CIFAR = {
    "cifar10": _CifarLayout(
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        names="batches.meta.txt",
        label_bytes=1,
        num_classes=10,
    ),
    "cifar100": _CifarLayout(
        folder="cifar-100-binary",
        train=("train.bin",),
        test=("test.bin",),
        names="fine_label_names.txt",
        label_bytes=2,
        num_classes=100,
    ),
}


def _load_cifar(path: Path, split: Split | None, layout: _CifarLayout) -> ImageData:
    if path.is_file():
        files, folder = [path], path.parent
    else:
        folder = path / layout.folder if (path / layout.folder).is_dir() else path
        files = [folder / name for name in (layout.train if split == "train" else layout.test)]
    hashes = _listed_hashes(folder)
    records = np.concatenate([_cifar_records(file, layout, hashes) for file in files])
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    images = records[:, layout.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ImageData(_indices(len(images)), images, labels, _cifar_classes(folder / layout.names, layout))


def _cifar_records(path: Path, layout: _CifarLayout, hashes: dict[str, str]) -> Array:
    """(n, bytes per record) uint8 of one file, checked."""
    data = read_bytes(path, MAX_FILE_BYTES, DataError)
    if path.name in hashes and hashlib.sha256(data).hexdigest() != hashes[path.name]:
        raise DataError(f"{path} is damaged: its sha256 is not the one in SHA256SUMS; download it again")
    if not data or len(data) % layout.record:
        raise DataError(
            f"{path} has {len(data)} bytes; expected a multiple of {layout.record} "
            f"({layout.label_bytes} for the label, 3072 for the pixels)"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, layout.record)
    largest = int(records[:, layout.label_bytes - 1].max())
    if largest >= layout.num_classes:
        raise DataError(f"{path} has a label {largest}; expected 0 … {layout.num_classes - 1}: it is damaged")
    return records


def _listed_hashes(folder: Path) -> dict[str, str]:
    """File name → sha256 from the SHA256SUMS file that a download leaves, if there is one."""
    path = folder / "SHA256SUMS"
    if not path.exists():
        return {}
    lines = read_bytes(path, 2**20, DataError).decode("ascii", "replace").splitlines()
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}


def _cifar_classes(path: Path, layout: _CifarLayout) -> tuple[str, ...] | None:
    if not path.exists():
        return None
    text = read_bytes(path, 2**20, DataError).decode("utf-8", "replace")
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) != layout.num_classes:
        raise DataError(f"{path} lists {len(names)} class names; expected {layout.num_classes}")
    return names


def _load_npz(path: Path, split: Split | None) -> ImageData:
    try:
        with zipfile.ZipFile(io.BytesIO(read_bytes(path, MAX_FILE_BYTES, DataError))) as archive:
            for entry in archive.infolist():
                archive.open(entry).close()  # compares both copies of the name: damage must not hide an array
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            image_key, label_key = _npz_keys(path, names, split)
            images = _npz_array(archive, image_key)
            labels = _npz_array(archive, label_key) if label_key in names else None
            classes = _npz_array(archive, "classes") if "classes" in names else None
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
        SyntaxError,
    ) as error:
        # NotImplementedError (unknown compression) is a RuntimeError, and so is a password.
        raise DataError(f"{path} is not a readable npz file: {error}") from error
    if images.ndim != 4 or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
        raise DataError(
            f"{path}: {image_key} has shape {images.shape} and dtype {images.dtype}; "
            "expected four axes (NHWC or NCHW), uint8 or floating"
        )
    if labels is not None and (labels.dtype.kind not in "iu" or labels.size != len(images)):
        raise DataError(
            f"{path}: {label_key} has shape {labels.shape} and dtype {labels.dtype}; "
            f"expected {len(images)} integers"
        )
    if classes is not None and (classes.dtype.kind != "U" or classes.ndim != 1):
        raise DataError(f"{path}: classes has dtype {classes.dtype}; expected a row of names")
    return ImageData(
        _indices(len(images)),
        images,
        None if labels is None else labels.reshape(-1).astype(np.int64),
        None if classes is None else tuple(str(name) for name in classes),
    )


def _npz_keys(path: Path, names: set[str], split: Split | None) -> tuple[str, str]:
    wanted = split or "test"
    if f"x_{wanted}" in names:
        return f"x_{wanted}", f"y_{wanted}"
    if split is None and "images" in names:
        return "images", "labels"
    raise DataError(
        f"{path} holds {sorted(names)}; expected x_{wanted} and y_{wanted}"
        + (", or images and labels" if split is None else f" for split={split!r}")
    )


def _npz_array(archive: zipfile.ZipFile, name: str) -> Array:
    """One array of the archive; its header is checked against its size before anything is allocated."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > MAX_FILE_BYTES:
        raise ValueError(f"{name} has {entry.file_size} bytes; expected at most {MAX_FILE_BYTES}")
    data = archive.read(entry)  # checks the CRC
    header = io.BytesIO(data)
    version = np.lib.format.read_magic(header)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = reader(header)
    begin = header.tell()
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"{name} has dtype {dtype}; expected numbers")
    count = int(np.prod([int(n) for n in shape], dtype=object))
    if count < 0 or count * dtype.itemsize != len(data) - begin:
        raise ValueError(f"{name} declares shape {shape} of {dtype} but holds {len(data) - begin} bytes")
    flat = np.frombuffer(data, dtype, count, begin)
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _load_folder(
    path: Path,
    split: Split | None,
    shape: tuple[int, int, int] | None,
    resize: bool,
    classes: Sequence[str] | None,
) -> ImageData:
    root = _split_of_folder(path, split)
    found = find_images(root)
    channels, size = (3, first_size(root, found.names)) if shape is None else (shape[0], shape[1:])
    if channels not in (1, 3):
        raise InvalidArgument(f"shape is {shape}; images in folders have 1 or 3 channels")
    labels, class_names = None, None if classes is None else tuple(classes)
    if found.classes is not None and (classes is None or set(found.classes) & set(classes)):
        class_names = found.classes if classes is None else tuple(classes)
        unknown = sorted(set(found.classes) - set(class_names))
        if unknown:
            raise DataError(f"{root} has the sub-folders {unknown}; expected class names among {class_names}")
        order = {name: label for label, name in enumerate(class_names)}
        labels = np.array([order[name.split("/", 1)[0]] for name in found.names], np.int64)
    return ImageData(found.ids, ImageFiles(root, found.names, channels, size, resize), labels, class_names)


def _split_of_folder(path: Path, split: Split | None) -> Path:
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; expected a folder of images")
    divided = all((path / part).is_dir() for part in ("train", "test"))
    if split is None:
        return path / "test" if divided else path
    if not (path / split).is_dir():
        raise DataError(f"{path} has no sub-folder {split!r}; leave the split out to read the whole folder")
    return path / split


def _indices(n: int) -> list[str]:
    return [str(i) for i in range(n)]
