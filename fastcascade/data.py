"""Data in every accepted form, turned into batches of images and labels.

Everywhere in this library *data* is a Dataset, a DataLoader, a pair (images, labels) of arrays, or what
:func:`load_data` returns. :func:`batches` is the one place that tells them apart.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastcascade.errors import DataError, InvalidArgument
from fastcascade.files import read_bytes
from fastcascade.folders import ImageFiles, find_images, first_size

__all__ = ["Data", "ImageData", "Rows", "arrays", "batches", "image_hashes", "load_data"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Split: TypeAlias = Literal["train", "test"]
MAX_FILE_BYTES = 16 * 2**30


class Rows(NamedTuple):
    """A stretch of a data set in its order, with one entry of ``ids`` and ``errors`` per row.

    Attributes:
        ids: relative path of the image, or its index as text.
        errors: None, or why that image cannot be read. ``images`` and ``labels`` hold the readable rows only.
        images: (n, H, W, C) uint8, or as the arrays of the data set are.
        labels: (n,) int64, or None if the data set has no labels.
    """

    ids: list[str]
    errors: list[str | None]
    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True, eq=False)
class ImageData:
    """A set of images from disk, in memory or decoded while it is read.

    Attributes:
        ids: per image, its path relative to the folder, or its index as text.
        images: (N, H, W, C) uint8 (npz: as stored), or files that are decoded when asked for.
        labels: (N,) int64, or None.
        classes: names in label order, or None where the source has none.
    """

    ids: Sequence[str]
    images: Array | ImageFiles
    labels: Array | None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int] | Array) -> ImageData:
        """The images at these positions, in this order."""
        positions = np.asarray(indices, np.int64)
        return replace(
            self,
            ids=[self.ids[i] for i in positions],
            images=self.images[positions],
            labels=None if self.labels is None else self.labels[positions],
        )

    def rows(self, batch_size: int) -> Iterator[Rows]:
        """All rows in order, ``batch_size`` at a time; only one stretch is in memory if images are files."""
        for start in range(0, len(self), batch_size):
            stretch = slice(start, start + batch_size)
            if isinstance(self.images, ImageFiles):
                images, errors = self.images.read(range(len(self))[stretch])
            else:
                images, errors = self.images[stretch], [None] * len(self.ids[stretch])
            labels = self.labels
            if labels is not None:
                labels = labels[stretch][[error is None for error in errors]]
            yield Rows(
                list(self.ids[stretch]), errors, _tensor(images), None if labels is None else _tensor(labels)
            )


# The pair of arrays is a Sequence too.
Data: TypeAlias = "ImageData | Dataset[Any] | DataLoader[Any] | Sequence[Any]"


def batches(
    data: Data, batch_size: int, num_classes: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Any accepted form of data as batches, in its own order; one batch is in memory at a time.

    Args:
        data: an :class:`ImageData`; a pair (images, labels) of arrays or tensors, labels may be None; a
            Dataset whose items are images or (image, label); or a DataLoader of such batches, which keeps
            its own batch size.
        batch_size: at least 1; the last batch may be smaller.
        num_classes: if given, labels outside 0 … num_classes − 1 are refused.

    Yields:
        images (n, …), uint8 or floating, in the layout they came in, and labels (n,) int64 or None. Images
        of an :class:`ImageData` that cannot be read are left out with a warning that names them.

    Raises:
        InvalidArgument: data of another form, or dtypes and shapes that are not images and labels.
        DataError: a label out of range.

    Example:
        >>> pair = (np.zeros((5, 32, 32, 3), np.uint8), np.arange(5))
        >>> [(tuple(images.shape), labels.tolist()) for images, labels in batches(pair, 3)]
        [((3, 32, 32, 3), [0, 1, 2]), ((2, 32, 32, 3), [3, 4])]
    """
    if batch_size < 1:
        raise InvalidArgument(f"batch_size is {batch_size}; expected at least 1")
    for images, labels in _raw_batches(data, batch_size):
        images = _checked_images(images)
        labels = None if labels is None else _checked_labels(labels, len(images), num_classes)
        yield images, labels


def arrays(data: Data, num_classes: int | None = None) -> tuple[Tensor, Tensor | None]:
    """All images and labels in memory; arguments and errors as for :func:`batches`.

    Returns:
        images (N, …) and labels (N,) int64, or None without labels.

    Raises:
        DataError: there are no images, so their shape is unknown.

    Example:
        >>> images, labels = arrays([(torch.zeros(3, 8, 8), 1), (torch.ones(3, 8, 8), 0)])
        >>> images.shape, labels
        (torch.Size([2, 3, 8, 8]), tensor([1, 0]))
    """
    pairs = list(batches(data, 1024, num_classes))
    if not pairs:
        raise DataError("the data set is empty; expected at least one image")
    labels = [label for _, label in pairs if label is not None]
    if len(labels) not in (0, len(pairs)):
        raise InvalidArgument("some batches have labels and some have none; give labels for all or none")
    return torch.cat([images for images, _ in pairs]), torch.cat(labels) if labels else None


def image_hashes(images: Tensor | Array) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit hash of each image's content (BLAKE2b), to recognise images seen before.

    Args:
        images: (N, C, H, W), uint8 or floating (hashed as float32), any memory layout; bring NHWC images
            into NCHW first (:meth:`InputSpec.nchw`).

    Returns:
        (N,) uint64.

    Example:
        >>> image_hashes(np.zeros((1, 3, 2, 2), np.uint8))
        array([2283521107298152996], dtype=uint64)
    """
    x = _checked_images(images)
    values = (x if x.dtype == torch.uint8 else x.float()).detach().cpu().numpy()
    digests = b"".join(hashlib.blake2b(np.ascontiguousarray(v).data, digest_size=8).digest() for v in values)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _raw_batches(data: Data, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """(images, labels or None) per batch, unchecked."""
    if isinstance(data, ImageData):
        for rows in data.rows(batch_size):
            _warn_of_unreadable(rows)
            if len(rows.images):
                yield rows.images, rows.labels
    elif isinstance(data, DataLoader):
        yield from (_pair(batch, "a DataLoader's batch") for batch in data)
    elif isinstance(data, (list, tuple)) and len(data) == 2 and isinstance(data[0], (np.ndarray, Tensor)):
        images, labels = data
        if labels is not None and len(labels) != len(images):
            raise InvalidArgument(f"got {len(images)} images and {len(labels)} labels; expected as many")
        for start in range(0, len(images), batch_size):
            stretch = slice(start, start + batch_size)
            yield images[stretch], None if labels is None else labels[stretch]
    elif isinstance(data, (Dataset, Sequence)) and not isinstance(data, str):
        yield from _dataset_batches(data, batch_size)
    else:
        raise InvalidArgument(
            f"data is {_kind(data)}; expected a Dataset, a DataLoader, or a pair (images, labels) of arrays"
        )


def _dataset_batches(data: Dataset[Any] | Sequence[Any], batch_size: int) -> Iterator[tuple[Any, Any]]:
    """Collate the items of a map-style or iterable Dataset."""
    if hasattr(data, "__len__"):
        items: Iterable[Any] = (data[i] for i in range(len(data)))
    else:
        items = cast(Iterable[Any], data)
    pairs = (_pair(item, "an item of the Dataset") for item in items)
    while chunk := list(islice(pairs, batch_size)):
        images = [_single_image(image) for image, _ in chunk]
        labels = [label for _, label in chunk if label is not None]
        if len({image.shape for image in images}) > 1:
            shapes = sorted({tuple(image.shape) for image in images})
            raise InvalidArgument(f"images of one Dataset have shapes {shapes}; expected one shape")
        if len(labels) not in (0, len(images)):
            raise InvalidArgument("some items have labels and some have none; give labels for all or none")
        yield torch.stack(images), torch.tensor([int(label) for label in labels]) if labels else None


def _pair(item: Any, what: str) -> tuple[Any, Any]:
    """An item or batch as (images, labels or None)."""
    if isinstance(item, (list, tuple)):
        if len(item) not in (1, 2):
            raise InvalidArgument(f"{what} has {len(item)} parts; expected an image, or an image and a label")
        return item[0], item[1] if len(item) == 2 else None
    return item, None


def _single_image(image: Any) -> Tensor:
    """One image of a Dataset as a tensor of three axes: a tensor, an array, or a Pillow image."""
    if hasattr(image, "convert") and hasattr(image, "mode"):
        if image.mode not in ("L", "RGB"):
            raise InvalidArgument(f"a Dataset's image has mode {image.mode!r}; convert it to 'RGB' or 'L'")
        image = np.asarray(image)
    if not isinstance(image, (np.ndarray, Tensor)) or image.ndim not in (2, 3):
        raise InvalidArgument(f"an image of the Dataset is {_kind(image)}; expected an array of three axes")
    tensor = _tensor(image)
    return tensor if tensor.ndim == 3 else tensor[:, :, None]


def _checked_images(images: Any) -> Tensor:
    if not isinstance(images, (np.ndarray, Tensor)):
        raise InvalidArgument(f"images are {_kind(images)}; expected an array or a tensor")
    tensor = _tensor(images)
    if tensor.ndim != 4 or not (tensor.dtype == torch.uint8 or tensor.is_floating_point()):
        raise InvalidArgument(
            f"images have shape {tuple(tensor.shape)} and dtype {tensor.dtype}; "
            "expected four axes (NHWC or NCHW), uint8 or floating"
        )
    return tensor


def _checked_labels(labels: Any, n: int, num_classes: int | None) -> Tensor:
    """(n,) int64 from integers of shape (n,) or (n, 1)."""
    if not isinstance(labels, (np.ndarray, Tensor)):
        raise InvalidArgument(f"labels are {_kind(labels)}; expected an array or a tensor")
    tensor = _tensor(labels)
    integral = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if tuple(tensor.shape) not in ((n,), (n, 1)) or not integral:
        raise InvalidArgument(
            f"labels have shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected ({n},) integers"
        )
    tensor = tensor.reshape(n).long()
    if num_classes is not None and n:
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= num_classes:
            raise DataError(
                f"labels lie in {low} … {high}; expected 0 … {num_classes - 1} for {num_classes} classes"
            )
    return tensor


def _tensor(values: Array | Tensor) -> Tensor:
    """A tensor over the same memory where torch can use it, else over a copy."""
    if isinstance(values, Tensor):
        return values
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    usable = native.flags.writeable and all(stride >= 0 for stride in native.strides)
    try:
        return torch.from_numpy(native if usable else native.copy())
    except TypeError as error:
        raise InvalidArgument(f"got an array of dtype {values.dtype}; expected numbers") from error


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"


def _warn_of_unreadable(rows: Rows) -> None:
    bad = [f"{i}: {error}" for i, error in zip(rows.ids, rows.errors, strict=True) if error is not None]
    if bad:
        more = f" (and {len(bad) - 3} more)" if len(bad) > 3 else ""
        warnings.warn(f"left out unreadable images: {'; '.join(bad[:3])}{more}", stacklevel=4)


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
