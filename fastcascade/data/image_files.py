"""Folders of image files: which files count, and how one file becomes pixels.

Decoding is bounded and explicit: an allow-list of formats, a pixel limit checked before decoding, the EXIF
rotation applied, and nothing ever put in place of an image that cannot be read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fastcascade.errors import DataError, FastCascadeError

__all__ = ["FoundImages", "ImageFiles", "find_images", "first_size"]

Array: TypeAlias = "np.ndarray[Any, Any]"
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp")
# 16-bit and floating modes are refused: Pillow would clip them to 8 bits without a word.
MODES = ("1", "CMYK", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr")
MAX_PIXELS = 2**26


class FoundImages(NamedTuple):
    """The image files under a folder, sorted by path.

    Attributes:
        names: paths relative to the folder, with ``/``.
        ids: the same with bytes that are not UTF-8 spelled out, fit for any output file.
        classes: the sub-folders' names, sorted, empty ones too; None if images lie in the folder itself.
    """

    names: list[str]
    ids: list[str]
    classes: tuple[str, ...] | None


def find_images(root: Path) -> FoundImages:
    """Image files under a folder, by suffix; hidden files and folders are passed over, links to folders too.

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
                kind = names if name.lower().endswith(SUFFIXES) else others
                kind.append((relative / name).as_posix())
    if not names:
        raise DataError(f"{root} holds no images; expected files ending in {', '.join(SUFFIXES)}")
    if others:
        warnings.warn(
            f"{root}: passed over {len(others)} files that are not images, for example {min(others)!r}",
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
    return FoundImages(names, [_printable(name) for name in names], classes)


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.is_symlink() and not entry.name.startswith(".")


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def first_size(root: Path, names: Iterable[str]) -> tuple[int, int]:
    """(height, width) of the first image that can be decoded.

    Raises:
        DataError: none can.
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
    """Image files that are decoded when they are asked for, to (H, W, C) uint8 of one size.

    Attributes:
        root: the folder.
        names: paths relative to it.
        channels: 3 (RGB) or 1 (grey).
        size: (height, width).
        resize: scale other sizes instead of refusing them.
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
        """Decode the files at these positions.

        Returns:
            (n, H, W, C) uint8 of the readable ones, and for every position None or why it cannot be read.
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
    """One image file as (H, W, channels) uint8, turned upright by its EXIF orientation.

    Args:
        size: (height, width) that it must have; any if None.
        resize: scale another size to ``size`` (antialiased bilinear).

    Raises:
        DataError: unreadable, too large, of another size, or with more than 8 bits a channel.
    """
    pillow, operations = _pillow()
    try:
        with pillow.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"has {image.width} × {image.height} pixels; expected at most {MAX_PIXELS}")
            if image.mode not in MODES:
                raise DataError(f"has pixels of mode {image.mode!r}; expected 8 bits a channel")
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
    except Exception as error:  # Pillow's decoders raise dozens of types on damaged files
        raise DataError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _pillow() -> tuple[ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError("reading image files needs Pillow; install fastcascade[data]") from error
    return Image, ImageOps
