"""Folders of image files: which files are images, and how one file becomes pixels.

Decoding is bounded and explicit: an allow-list of formats, a limit on pixels that is checked before decoding,
EXIF rotation applied, and no substitute for an image that cannot be read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from fastcascade.data.image_data import Array, ImageData
from fastcascade.errors import DataError, FastCascadeError, InvalidArgument
from fastcascade.storage.files import open_regular

__all__ = ["FoundImages", "ImageFiles", "decode", "find_images", "load_folder"]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = tuple(".bmp .gif .jfif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
UNSUPPORTED_SUFFIXES = tuple(".avif .heic .heif .jp2 .jxl".split())
"""Images in formats that are not decoded; each gets an error."""
# Other modes have more than 8 bits per channel, and Pillow would clip them silently.
MODES = ("1", "CMYK", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr")
MAX_PIXELS = 2**26


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
    """Files with the suffix of an image. Hidden files, hidden folders and links to folders are skipped.

    Raises:
        DataError: there are none, or images lie both in the folder itself and in its sub-folders.
    """
    names: list[str] = []
    others: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = Path(folder).relative_to(root)
        for name in files:
            if not name.startswith("."):
                is_image = name.lower().endswith(SUFFIXES + UNSUPPORTED_SUFFIXES)
                (names if is_image else others).append((relative / name).as_posix())
    if not names:
        raise DataError(f"{root} holds no images; expected files ending in {', '.join(SUFFIXES)}")
    if others:
        warnings.warn(
            f"{root}: skipped {len(others)} files that are not images, for example {min(others)!r}",
            stacklevel=2,
        )
    names.sort()
    direct = ["/" not in name for name in names]
    if any(direct) and not all(direct):
        raise DataError(
            f"{root} holds images both directly ({names[direct.index(True)]!r}) and in sub-folders "
            f"({names[direct.index(False)]!r}); expected one sub-folder per class, or images alone"
        )
    classes = None if direct[0] else tuple(sorted(e.name for e in root.iterdir() if _is_class(e)))
    return FoundImages(names, [_escaped(name) for name in names], classes)


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.is_symlink() and not entry.name.startswith(".")


def _escaped(name: str) -> str:
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
class ImageFiles:
    """Image files of one size, decoded when needed; see :class:`fastcascade.data.image_data.ImageReader`.

    Attributes:
        root: the folder.
        names: paths relative to the folder.
        channels: 3 (RGB) or 1 (grey).
        size: (height, width).
        resize: scale images of other sizes; if False, they are errors.
    """

    root: Path
    names: Sequence[str]
    channels: int
    size: tuple[int, int]
    resize: bool

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, positions: Array) -> ImageFiles:
        return replace(self, names=[self.names[i] for i in positions])

    def read(self, positions: Sequence[int]) -> tuple[Array, list[str | None]]:
        """Decode the images at these positions.

        Returns:
            (n, H, W, C) uint8 readable images, and per position None or the reason why it cannot be read.
        """
        images, errors = [], list[str | None]()
        for position in positions:
            try:
                images.append(decode(self.root / self.names[position], self.channels, self.size, self.resize))
                errors.append(None)
            except DataError as error:
                errors.append(str(error))
        empty = np.empty((0, *self.size, self.channels), np.uint8)
        return np.stack(images) if images else empty, errors


def decode(path: Path, channels: int, size: tuple[int, int] | None, resize: bool) -> Array:
    """An image file as (H, W, channels) uint8, rotated by its EXIF orientation; the first frame of several.

    Args:
        size: (height, width) that the image must have; None for any.
        resize: scale other sizes to ``size`` (antialiased bilinear).

    Raises:
        DataError: unreadable, too large, of another size, or with more than 8 bits per channel.
    """
    pillow, operations = _pillow()
    try:
        file = open_regular(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    try:
        with file, pillow.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"has {image.width} × {image.height} pixels; expected at most {MAX_PIXELS}")
            if image.mode not in MODES:
                raise DataError(f"has pixels of mode {image.mode!r}; expected 8 bits per channel")
            upright = operations.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            if size is not None and upright.size != size[::-1]:
                if not resize:
                    raise DataError(
                        f"is {upright.height} × {upright.width} pixels; expected {size[0]} × {size[1]} "
                        "(allow resizing to scale it)"
                    )
                upright = upright.resize(size[::-1], pillow.Resampling.BILINEAR)
            return np.asarray(upright).reshape(upright.height, upright.width, channels)
    except FastCascadeError:
        raise
    except pillow.UnidentifiedImageError as error:
        raise DataError(f"is damaged, or its format is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise dozens of types on damaged files
        raise DataError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _pillow() -> tuple[ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError("reading image files needs Pillow; install fastcascade[data]") from error
    return Image, ImageOps
