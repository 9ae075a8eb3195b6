"""Image files: which files of a folder are images, and reading them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from fastcascade.data.image_data import Array, ImageData, ImageReader, Read, taken
from fastcascade.data.image_decoding import decode, decode_all
from fastcascade.errors import DataError, InvalidArgument

__all__ = [
    "FoundImages",
    "ImageFiles",
    "escaped",
    "find_files",
    "find_images",
    "is_image_name",
    "load_files",
    "load_folder",
]

SUFFIXES = tuple(".bmp .gif .jfif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
UNSUPPORTED_SUFFIXES = tuple(".avif .heic .heif .jp2 .jxl".split())
"""Images in formats that are not decoded; each gets an error."""


def load_folder(
    path: Path,
    split: str | None,
    shape: tuple[int, int, int] | None,
    resize: bool,
    classes: Sequence[str] | None,
) -> ImageData:
    """The images under a folder; see :func:`fastcascade.data.sources.load_data`."""
    root = _split_folder(path, split)
    found = find_images(root)
    channels, size = (3, _first_size(root, found.names)) if shape is None else (shape[0], shape[1:])
    if channels not in (1, 3):
        raise InvalidArgument(f"shape is {shape}; images in folders have 1 or 3 channels")
    images = ImageFiles(root, found.names, channels, size, resize)
    labelled = found.classes is not None and (classes is None or not set(classes).isdisjoint(found.classes))
    if not labelled or found.classes is None:
        return ImageData(found.ids, images, None, None if classes is None else tuple(classes))
    names = found.classes if classes is None else tuple(classes)
    if unknown := sorted(set(found.classes) - set(names)):
        raise DataError(f"{root} has the sub-folders {unknown}; expected class names among {names}")
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.array([label_of[name.split("/", 1)[0]] for name in found.names], np.int64)
    return ImageData(found.ids, images, labels, names)


def _split_folder(path: Path, split: str | None) -> Path:
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; expected a folder of images")
    divided = all((path / part).is_dir() for part in ("train", "test"))
    if split is None:
        return path / "test" if divided else path
    if not (path / split).is_dir():
        raise DataError(f"{path} has no sub-folder {split!r}; leave out the split to read the whole folder")
    return path / split


class FoundImages(NamedTuple):
    """The image files under a folder, sorted by path.

    Attributes:
        names: paths relative to the folder, with ``/``.
        ids: the same, with bytes that are not UTF-8 escaped.
        classes: sorted names of the sub-folders, empty ones included; None if the images lie in the folder
            itself.
    """

    names: list[str]
    ids: list[str]
    classes: tuple[str, ...] | None


def find_images(root: Path) -> FoundImages:
    """The images of a folder that holds images alone, or one sub-folder per class.

    Raises:
        DataError: as for :func:`find_files`, or images lie both in the folder itself and in its sub-folders.
    """
    names = find_files(root)
    direct = ["/" not in name for name in names]
    if any(direct) and not all(direct):
        raise DataError(
            f"{root} holds images both directly ({names[direct.index(True)]!r}) and in sub-folders "
            f"({names[direct.index(False)]!r}); expected one sub-folder per class, or images alone"
        )
    classes = None if direct[0] else tuple(sorted(e.name for e in root.iterdir() if _is_class(e)))
    return FoundImages(names, [escaped(name) for name in names], classes)


def find_files(root: Path) -> list[str]:
    """Sorted paths, relative to the folder, of the files with the suffix of an image at any depth.

    Hidden files, hidden folders and links to folders are skipped; other files, with a warning.

    Raises:
        DataError: there are none, or a folder cannot be read.
    """
    names: list[str] = []
    others: list[str] = []
    for folder, subfolders, files in os.walk(root, onerror=_unreadable_folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = Path(folder).relative_to(root)
        for name in files:
            if not name.startswith("."):
                (names if is_image_name(name) else others).append((relative / name).as_posix())
    if not names:
        raise DataError(f"{root} holds no images; expected files ending in {', '.join(SUFFIXES)}")
    if others:
        warnings.warn(
            f"{root}: left out what is not an image, {len(others)} in all, for example {min(others)!r}",
            stacklevel=2,
        )
    return sorted(names)


def is_image_name(name: str) -> bool:
    """Whether a file has the suffix of an image, in a format that is decoded or not."""
    return name.lower().endswith(SUFFIXES + UNSUPPORTED_SUFFIXES)


def _unreadable_folder(error: OSError) -> NoReturn:
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror or error}") from error


def load_files(
    root: Path,
    names: Sequence[str],
    shape: tuple[int, int, int],
    resize: bool,
    ids: Sequence[str] | None = None,
) -> ImageData:
    """Image files as an unlabelled set.

    Args:
        names: paths relative to ``root``; absolute ones are kept.
        ids: by default, the names.
    """
    if shape[0] not in (1, 3):
        raise InvalidArgument(f"image files have 1 or 3 channels; the images wanted have {shape[0]}")
    images = ImageFiles(root, names, shape[0], shape[1:], resize)
    return ImageData([escaped(name) for name in names] if ids is None else ids, images, None)


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.is_symlink() and not entry.name.startswith(".")


def escaped(name: str) -> str:
    """A name whose bytes that are not UTF-8 are written as ``\\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _first_size(root: Path, names: Iterable[str]) -> tuple[int, int]:
    """(height, width) of the first readable image.

    Raises:
        DataError: no image is readable.
    """
    reason = ""
    for name in names:
        try:
            height, width, _ = decode(root / name, 3, None, resize=False).shape
            return height, width
        except DataError as error:
            reason = reason or f"{name}: {error}"
    raise DataError(f"none of the images in {root} can be read; the first: {reason}")


@dataclass(frozen=True)
class ImageFiles(ImageReader):
    """Image files, decoded when needed.

    Attributes:
        root: the folder.
        names: paths relative to the folder.
        channels: 3 (RGB) or 1 (grey).
        size: (height, width).
        resize: scale images of other sizes; if False, they are errors.
    """

    encoded = True

    root: Path
    names: Sequence[str]
    channels: int
    size: tuple[int, int]
    resize: bool

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, positions: Array | slice) -> ImageFiles:
        return replace(self, names=taken(self.names, positions))

    def fetch(self, positions: Sequence[int]) -> Read:
        """Nothing yet: files can be read in any order."""
        paths = [self.root / self.names[i] for i in positions]
        return partial(decode_all, paths, self.channels, self.size, self.resize)

    def fingerprint(self) -> str:
        """sha256 over the files' names, sizes and modification times."""
        digest = hashlib.sha256()
        for name in self.names:
            try:
                status = os.stat(self.root / name)
                state = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:
                state = "missing"
            digest.update(os.fsencode(name) + b"\0" + state.encode() + b"\0")
        return digest.hexdigest()
