"""Image sets in npz files, which are zip archives of arrays, and in npy files, which are single arrays.

Uncompressed images stay on disk and are read when needed. Labels, class names and compressed images are
loaded, up to ``MAX_MEMORY_BYTES``. Sizes come from the arrays' headers and must agree with the archive's;
they are checked before any data are decompressed.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastcascade.data.image_data import Array, ImageData, IndexIds
from fastcascade.data.stored_images import Records, StoredImages
from fastcascade.errors import DataError
from fastcascade.storage.files import open_regular

__all__ = ["MAX_MEMORY_BYTES", "load_npy", "load_npz"]

MAX_MEMORY_BYTES = 4 * 2**30
"""Limit on what is loaded from one npz file: labels, class names and compressed images together."""

_READ_BYTES = 2**18
_MAX_CONTENTS_BYTES = 2**20
_MAX_HEADER_BYTES = 2**14
_MAX_CLASSES = 2**20
_END_BYTES = 22
"""Of a zip file's last record, without its comment."""
_COUNTED_ELSEWHERE = 0xFFFF
"""The number of entries in the last record of a zip64 file."""

# bz2 and lzma streams cannot be decompressed in bounded pieces; numpy writes neither.
_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def load_npz(path: Path, split: str | None) -> ImageData:
    """The images of one split, or ``images`` and ``labels``; see :func:`fastcascade.data.sources.load_data`.

    Raises:
        DataError: unreadable, damaged, with arrays of other types, or larger than ``MAX_MEMORY_BYTES``.
    """
    try:
        with _BoundedReader(open_regular(path).detach()) as file, zipfile.ZipFile(file) as archive:
            return _load(path, file, archive, split)
    except MemoryError as error:
        raise DataError(f"{path} does not fit in memory; save it uncompressed with numpy.savez") from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,  # also an unknown compression method and a password
        SyntaxError,
        struct.error,
    ) as error:
        raise DataError(f"{path} is not a readable npz file: {error}") from error


class _BoundedReader(io.BufferedReader):
    """A file for :class:`zipfile.ZipFile`, which reads the table of contents at once, whatever its size."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = _MAX_CONTENTS_BYTES
        if size > _MAX_CONTENTS_BYTES:
            raise zipfile.BadZipFile(f"its table of contents has {size} bytes")
        return super().read(size)


def _load(path: Path, file: io.BufferedReader, archive: zipfile.ZipFile, split: str | None) -> ImageData:
    # Damage must not hide an array.
    _check_count(file, archive)
    for entry in archive.infolist():
        archive.open(entry).close()  # compares the two copies of a name
    names = {name.removesuffix(".npy") for name in archive.namelist()}
    image_key, label_key = _keys(path, names, split)
    headers = {key: _read_header(archive, key) for key in (image_key, label_key, "classes") if key in names}
    images, labels, classes = headers[image_key], headers.get(label_key), headers.get("classes")
    _check_types(path, image_key, label_key, headers)
    on_disk = images.entry.compress_type == zipfile.ZIP_STORED and not images.fortran_order
    loaded = [header for header in headers.values() if not (on_disk and header is images)]
    _check_memory(path, loaded, 0 if labels is None else 8 * math.prod(labels.shape))
    return ImageData(
        IndexIds(images.shape[0]),
        _stored_images(path, file, archive, images) if on_disk else _read_array(archive, images),
        None if labels is None else _read_array(archive, labels).reshape(-1).astype(np.int64),
        None if classes is None else tuple(str(name) for name in _read_array(archive, classes)),
    )


def _check_count(file: io.BufferedReader, archive: zipfile.ZipFile) -> None:
    """The table of contents has as many entries as its last record says: a wrong length joins two of them."""
    file.seek(-_END_BYTES - len(archive.comment), io.SEEK_END)
    expected = int.from_bytes(file.read(_END_BYTES)[10:12], "little")
    found = len(archive.infolist())
    if expected not in (found, _COUNTED_ELSEWHERE):
        raise zipfile.BadZipFile(f"its table of contents has {found} entries instead of {expected}")


def _keys(path: Path, names: set[str], split: str | None) -> tuple[str, str]:
    """Names of the arrays of images and labels."""
    wanted = split or "test"
    if f"x_{wanted}" in names:
        return f"x_{wanted}", f"y_{wanted}"
    if split is None and "images" in names:
        return "images", "labels"
    raise DataError(
        f"{path} holds {sorted(names)[:20]}; expected x_{wanted} and y_{wanted}"
        + (", or images and labels" if split is None else f" for split={split!r}")
    )


class _Header(NamedTuple):
    """An array in the archive: ``offset`` bytes of header, then ``size`` bytes of data."""

    name: str
    entry: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran_order: bool
    offset: int
    size: int


def _read_header(archive: zipfile.ZipFile, name: str) -> _Header:
    """The header of an array, which must agree with the size in the archive's table of contents."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in _COMPRESSION:
        raise ValueError(f"{name} has compression method {entry.compress_type}; expected stored or deflated")
    with archive.open(entry) as stream:
        start = io.BytesIO(stream.read(_MAX_HEADER_BYTES))
    shape, fortran_order, dtype = _array_header(start)
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"{name} has dtype {dtype}; expected numbers")
    size = math.prod(shape) * dtype.itemsize
    held = entry.file_size - start.tell()
    if min(shape, default=0) < 0 or size != held:
        raise ValueError(f"{name} declares shape {shape} of {dtype} but holds {held} bytes")
    return _Header(name, entry, shape, dtype, fortran_order, start.tell(), size)


def _check_types(path: Path, image_key: str, label_key: str, headers: Mapping[str, _Header]) -> None:
    images, labels, classes = headers[image_key], headers.get(label_key), headers.get("classes")
    _check_images(path, image_key, images.shape, images.dtype)
    if labels is not None and (labels.dtype.kind not in "iu" or math.prod(labels.shape) != images.shape[0]):
        raise DataError(
            f"{path}: {label_key} has shape {labels.shape} and dtype {labels.dtype}; "
            f"expected {images.shape[0]} integers"
        )
    if classes is not None and (classes.dtype.kind != "U" or len(classes.shape) != 1):
        raise DataError(f"{path}: classes has dtype {classes.dtype}; expected a row of names")
    if classes is not None and classes.shape[0] > _MAX_CLASSES:
        raise DataError(f"{path}: classes has {classes.shape[0]} names; expected at most {_MAX_CLASSES}")


def _check_images(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    if len(shape) != 4 or 0 in shape[1:] or not (dtype == np.uint8 or dtype.kind == "f"):
        raise DataError(
            f"{path}: {name} has shape {shape} and dtype {dtype}; "
            "expected four axes (NHWC or NCHW), uint8 or floating"
        )


def _check_memory(path: Path, loaded: list[_Header], int64_labels: int) -> None:
    """Bound the bytes of the loaded arrays and of the labels as int64."""
    total = sum(header.size for header in loaded) + int64_labels
    if total > MAX_MEMORY_BYTES:
        raise DataError(
            f"{path}: {' and '.join(header.name for header in loaded)} would take {total:,} bytes of memory; "
            f"expected at most {MAX_MEMORY_BYTES:,}. Uncompressed images, saved by numpy.savez, stay on disk"
        )


def _pieces(archive: zipfile.ZipFile, header: _Header) -> Iterator[bytes]:
    """The array's data, decompressed piece by piece; zipfile compares the CRC at the end."""
    total = 0
    with archive.open(header.entry) as stream:
        stream.read(header.offset)
        while piece := stream.read(_READ_BYTES):
            total += len(piece)
            yield piece
    if total != header.size:
        raise ValueError(f"{header.name} ends after {total} of {header.size} bytes")


def _read_array(archive: zipfile.ZipFile, header: _Header) -> Array:
    """The array in memory."""
    data = np.empty(header.size, np.uint8)
    position = 0
    for piece in _pieces(archive, header):
        data[position : position + len(piece)] = np.frombuffer(piece, np.uint8)
        position += len(piece)
    return data.view(header.dtype).reshape(header.shape, order="F" if header.fortran_order else "C")


def _stored_images(
    path: Path, file: io.BufferedReader, archive: zipfile.ZipFile, header: _Header
) -> StoredImages:
    """Images that stay on disk."""
    for _ in _pieces(archive, header):
        pass  # checks the length and the CRC
    # A local file header: 26 bytes, lengths of the name and of the extra field, these two, the data.
    file.seek(header.entry.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    begin = header.entry.header_offset + 30 + name_bytes + extra_bytes + header.offset
    count, *shape = header.shape
    record_bytes = math.prod(shape) * header.dtype.itemsize
    records = Records.of(path, file, begin, record_bytes, count)
    return StoredImages.all_of([records], partial(_decode, dtype=header.dtype, shape=shape))


def load_npy(path: Path) -> ImageData:
    """The images of one array in a .npy file, unlabelled; they stay on disk.

    Raises:
        DataError: unreadable, truncated, in Fortran order, or not images.
    """
    try:
        with open_regular(path) as file:
            shape, fortran_order, dtype = _array_header(file)
            begin, end = file.tell(), file.seek(0, 2)
            size = math.prod(shape) * dtype.itemsize
            if dtype.hasobject or min(shape, default=0) < 0 or end - begin != size:
                raise ValueError(f"it declares shape {shape} of {dtype} but holds {end - begin} bytes")
            _check_images(path, "it", shape, dtype)
            if fortran_order:
                raise ValueError("it is in Fortran order; save numpy.ascontiguousarray of it")
            count, *image = shape
            records = Records.of(path, file, begin, math.prod(image) * dtype.itemsize, count)
    except (OSError, ValueError, SyntaxError, struct.error, EOFError) as error:
        raise DataError(f"{path} is not a readable npy file: {error}") from error
    images = StoredImages.all_of([records], partial(_decode, dtype=dtype, shape=image))
    return ImageData(IndexIds(count), images, None)


def _array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, order and dtype of the array in an npy file or member."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file, max_header_size=_MAX_HEADER_BYTES)
    return tuple(map(int, shape)), fortran_order, dtype


def _decode(records: Array, dtype: np.dtype[np.generic], shape: Sequence[int]) -> Array:
    return records.view(dtype).reshape(-1, *shape)
