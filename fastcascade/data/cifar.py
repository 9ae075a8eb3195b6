"""CIFAR-10 and CIFAR-100 in their binary layout: records of a label or two and 3 × 32 × 32 pixels."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeAlias

import numpy as np

from fastcascade.data.image_data import Array, ImageData, IndexIds
from fastcascade.data.stored_images import Records, StoredImages
from fastcascade.errors import DataError
from fastcascade.storage.files import open_regular, read_bytes

__all__ = ["LAYOUTS", "Layout", "cifar_kind", "load_cifar"]

Kind: TypeAlias = Literal["cifar10", "cifar100"]

_PIXELS = 3 * 32 * 32
_RECORDS_PER_READ = 1024
_MAX_TEXT_BYTES = 2**20


class Layout(NamedTuple):
    """Names and record format of one of the two data sets.

    Attributes:
        folder: name of the folder in the published archive.
        train, test: names of the files.
        class_names: name of the file with a class name per line.
        label_bytes: before the pixels; the last one is the (fine) label.
        num_classes: number of (fine) labels.
    """

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    class_names: str
    label_bytes: int
    num_classes: int

    @property
    def record_bytes(self) -> int:
        """Size of a record."""
        return self.label_bytes + _PIXELS


LAYOUTS: dict[str, Layout] = {
    "cifar10": Layout(
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        class_names="batches.meta.txt",
        label_bytes=1,
        num_classes=10,
    ),
    "cifar100": Layout(
        folder="cifar-100-binary",
        train=("train.bin",),
        test=("test.bin",),
        class_names="fine_label_names.txt",
        label_bytes=2,
        num_classes=100,
    ),
}


def cifar_kind(path: Path) -> str | None:
    """Which of the two data sets this folder or file holds, or None."""
    for kind, layout in LAYOUTS.items():
        if any((where / layout.test[0]).is_file() for where in (path, path / layout.folder)):
            return kind
    if path.suffix != ".bin" or not path.is_file():
        return None
    size = path.stat().st_size
    fitting = [kind for kind, layout in LAYOUTS.items() if size % layout.record_bytes == 0]
    return fitting[0] if len(fitting) == 1 else None


def load_cifar(path: Path, split: str | None, layout: Layout) -> ImageData:
    """The images of a file, or of one split of a folder; ``split=None`` is the test split.

    Labels are loaded and every byte is checked here; images are read from disk when needed.

    Raises:
        DataError: missing, truncated or damaged.
    """
    if path.is_dir():
        folder = path / layout.folder if (path / layout.folder).is_dir() else path
        files = [folder / name for name in (layout.train if split == "train" else layout.test)]
    else:
        folder, files = path.parent, [path]
    sha256_of = _published_hashes(folder)
    checked = [_check_file(file, layout, sha256_of.get(file.name)) for file in files]
    labels = np.concatenate([labels for _, labels in checked])
    decode = partial(_decode, label_bytes=layout.label_bytes)
    images = StoredImages.all_of([records for records, _ in checked], decode)
    return ImageData(IndexIds(len(images)), images, labels, _class_names(folder / layout.class_names, layout))


def _decode(records: Array, label_bytes: int) -> Array:
    """(n, 32, 32, 3) from records."""
    pixels = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return np.moveaxis(pixels, 1, 3)


def _check_file(path: Path, layout: Layout, sha256: str | None) -> tuple[Records, Array]:
    """The records of a file and their labels, (n,) int64."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            if not size or size % layout.record_bytes:
                raise DataError(
                    f"{path} has {size} bytes; expected a multiple of {layout.record_bytes} "
                    f"({layout.label_bytes} for the label, {_PIXELS} for the pixels)"
                )
            count = size // layout.record_bytes
            labels, found = _read_labels(file, layout)
            records = Records.of(path, file, 0, layout.record_bytes, count)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; `fastcascade download` gets these data sets"
        ) from error
    if sha256 is not None and found != sha256:
        raise DataError(f"{path} is damaged: its sha256 is not the one in SHA256SUMS; download it again")
    if len(labels) != count or labels.max() >= layout.num_classes:
        raise DataError(
            f"{path} has a label {labels.max()}; expected 0 … {layout.num_classes - 1}: it is damaged"
        )
    return records, labels.astype(np.int64)


def _read_labels(file: BinaryIO, layout: Layout) -> tuple[Array, str]:
    """(n,) uint8 labels and the file's sha256, in one pass with bounded memory."""
    file.seek(0)
    digest, labels = hashlib.sha256(), [np.empty(0, np.uint8)]
    while chunk := file.read(_RECORDS_PER_READ * layout.record_bytes):
        digest.update(chunk)
        labels.append(np.frombuffer(chunk, np.uint8)[layout.label_bytes - 1 :: layout.record_bytes].copy())
    return np.concatenate(labels), digest.hexdigest()


def _published_hashes(folder: Path) -> dict[str, str]:
    """File name → sha256, from the SHA256SUMS file that :func:`fastcascade.data.archives.download` writes."""
    path = folder / "SHA256SUMS"
    if not path.exists():
        return {}
    lines = read_bytes(path, _MAX_TEXT_BYTES, DataError).decode("ascii", "replace").splitlines()
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}


def _class_names(path: Path, layout: Layout) -> tuple[str, ...] | None:
    if not path.exists():
        return None
    text = read_bytes(path, _MAX_TEXT_BYTES, DataError).decode("utf-8", "replace")
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) != layout.num_classes:
        raise DataError(f"{path} lists {len(names)} class names; expected {layout.num_classes}")
    return names
