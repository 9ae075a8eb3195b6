"""How an encoded image becomes pixels.

Decoding is bounded and explicit: an allow-list of formats, a limit on pixels that is checked before decoding,
EXIF rotation applied, and no substitute for an image that cannot be read. A JPEG that is scaled down a lot is
decoded at a half, a quarter or an eighth of its size, at least twice the target. simplejpeg decodes JPEG
faster than Pillow and to the same bits; without it, or where it refuses a file, Pillow decodes.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from fastcascade.data.image_data import Array
from fastcascade.errors import DataError, FastCascadeError
from fastcascade.storage.files import read_regular

__all__ = ["FORMATS", "MAX_PIXELS", "decode", "decode_all", "pixels"]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Other modes have more than 8 bits per channel, and Pillow would clip them silently.
MODES = ("1", "CMYK", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr")
MAX_PIXELS = 2**26
MAX_FILE_BYTES = 2**29
_REDUCED_MIN_SIDE = 16
"""Below this many pixels, several of libjpeg's scales round to one size, but not to the same pixels."""


def decode(
    source: Path | bytes, channels: int, size: tuple[int, int] | None = None, resize: bool = False
) -> Array:
    """An encoded image as (H, W, channels) uint8, upright; the first frame of several.

    Args:
        source: a file, or its content.
        channels: 3 (RGB) or 1 (grey).
        size: (height, width) that the image must have; None for any.
        resize: scale other sizes to ``size`` (antialiased bilinear; the aspect ratio is not kept).

    Raises:
        DataError: unreadable, too large, of another size, or with more than 8 bits per channel.
    """
    pillow = _pillow()
    try:
        data = read_regular(source, MAX_FILE_BYTES) if isinstance(source, Path) else source
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    try:
        with pillow.open(io.BytesIO(data), formats=FORMATS) as image:
            return pixels(image, channels, size, resize, data)
    except FastCascadeError:
        raise
    except pillow.UnidentifiedImageError as error:
        raise DataError(f"is damaged, or its format is none of {', '.join(FORMATS)}") from error
    except pillow.DecompressionBombError as error:
        raise DataError(f"has too many pixels; expected at most {MAX_PIXELS}") from error
    except Exception as error:  # Pillow's decoders raise dozens of types on damaged files
        raise DataError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def decode_all(
    sources: Sequence[Path | bytes | DataError], channels: int, size: tuple[int, int], resize: bool
) -> tuple[Array, list[str | None]]:
    """Several images; a source may be the reason why there is none.

    Returns:
        (n, H, W, channels) uint8 readable images, and per source None or the reason why it cannot be read.
    """
    images, errors = [], list[str | None]()
    for source in sources:
        try:
            if isinstance(source, DataError):
                raise source
            images.append(decode(source, channels, size, resize))
            errors.append(None)
        except DataError as error:
            errors.append(str(error))
    return np.stack(images) if images else np.empty((0, *size, channels), np.uint8), errors


def pixels(
    image: Any, channels: int, size: tuple[int, int] | None, resize: bool, data: bytes | None = None
) -> Array:
    """A Pillow image as (H, W, channels) uint8; arguments and errors as for :func:`decode`.

    Args:
        data: the file's content, if the image was opened from one and is not decoded yet.
    """
    pillow = _pillow()
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"has {image.width} × {image.height} pixels; expected at most {MAX_PIXELS}")
    if image.mode not in MODES:
        raise DataError(f"has pixels of mode {image.mode!r}; expected 8 bits per channel")
    turn = _turns(pillow).get(image.getexif().get(_ORIENTATION))
    if resize and size is not None:
        least = 2 * max(size)
        image.draft(None, (least, least))  # does nothing unless the image is an undecoded JPEG
    reduced = (_decode_jpeg(image, data) if data is not None else None) or image
    upright = (reduced if turn is None else reduced.transpose(turn)).convert("L" if channels == 1 else "RGB")
    if size is not None and upright.size != size[::-1]:
        if not resize:
            raise DataError(
                f"is {upright.width} pixels wide and {upright.height} high; expected {size[1]} and {size[0]} "
                "(resize=True, --resize, scales it)"
            )
        upright = upright.resize(size[::-1], pillow.Resampling.BILINEAR)
    return np.asarray(upright).reshape(upright.height, upright.width, channels)


_ORIENTATION = 0x0112


def _turns(pillow: ModuleType) -> dict[int, Any]:
    """EXIF orientation → what makes the image upright."""
    names = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
    return {number: getattr(pillow.Transpose, name) for number, name in enumerate(names, 2)}


def _decode_jpeg(image: Any, data: bytes) -> Any:
    """The image that Pillow would decode, by simplejpeg; None if it is not a plain JPEG, or is damaged."""
    simplejpeg = _simplejpeg()
    if simplejpeg is None or image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    width, height = image.size
    full_height, full_width = _header_size(simplejpeg, data)
    scaled = (full_height, full_width) != (height, width)
    if scaled and min(full_height, full_width) < _REDUCED_MIN_SIDE:
        return None
    least = {"min_height": height, "min_width": width} if scaled else {}
    try:
        array = simplejpeg.decode_jpeg(data, "RGB" if image.mode == "RGB" else "GRAY", **least)
    except ValueError:  # Pillow says what is wrong, or reads what can be read
        return None
    if array.shape[:2] != (height, width):
        return None
    return _pillow().fromarray(array if image.mode == "RGB" else array[:, :, 0])


def _header_size(simplejpeg: ModuleType, data: bytes) -> tuple[int, int]:
    """(height, width) before any reduction; (0, 0) if simplejpeg cannot read the header."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return 0, 0
    return height, width


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading image files needs Pillow; install fastcascade[data]") from error
    return Image


@functools.cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return cast(ModuleType, simplejpeg)
