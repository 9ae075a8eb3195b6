"""Images in tar archives, as WebDataset stores them. Names in an archive are keys; nothing is extracted."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Sequence
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastcascade.data.image_data import Array, ImageData, ImageReader, Read
from fastcascade.data.image_decoding import MAX_FILE_BYTES, decode_all
from fastcascade.data.image_files import escaped, is_image_name
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.storage.files import open_regular

__all__ = ["load_tar"]


def load_tar(paths: Sequence[Path], shape: tuple[int, int, int], resize: bool) -> ImageData:
    """The members of one or several tar archives that have the suffix of an image, in their order.

    The archives' tables of contents are read here, the images when needed.

    Args:
        paths: uncompressed archives.
        shape: (C, H, W) of the images.
        resize: scale images of other sizes.

    Raises:
        DataError: an archive is unreadable, truncated or compressed, or none of them holds an image.
    """
    if shape[0] not in (1, 3):
        raise InvalidArgument(f"encoded images have 1 or 3 channels; the images wanted have {shape[0]}")
    archives = [_examine(path) for path in paths]
    ids = [
        name if len(paths) == 1 else f"{path.name}/{name}"
        for path, archive in zip(paths, archives, strict=True)
        for name in archive.names
    ]
    if not ids:
        raise DataError(f"{paths[0]} holds no members with the suffix of an image")
    members = np.concatenate(
        [
            np.column_stack([np.full(len(archive.names), number), archive.spans])
            for number, archive in enumerate(archives)
        ]
    )
    files = tuple((path, archive.identity) for path, archive in zip(paths, archives, strict=True))
    return ImageData(ids, TarImages(files, members, shape, resize), None)


class _Archive(NamedTuple):
    """The images of an archive: their names, and (n, 2) int64 offset and size in bytes."""

    names: list[str]
    spans: Array
    identity: tuple[int, int]


def _examine(path: Path) -> _Archive:
    names: list[str] = []
    spans: list[tuple[int, int]] = []
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every member in memory
                if member.isreg() and not member.issparse() and is_image_name(member.name):
                    names.append(escaped(member.name))
                    spans.append((member.offset_data, member.size))
            identity = _identity(file)
            if max((offset + size for offset, size in spans), default=0) > identity[0]:
                raise DataError(f"{path} is truncated in its last member")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable, uncompressed tar archive: {error}; unpack a .tar.gz with gunzip"
        ) from error
    return _Archive(names, np.asarray(spans, np.int64).reshape(-1, 2), identity)


def _identity(file: BufferedReader) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


class TarImages(ImageReader):
    """Members of tar archives; see :class:`fastcascade.data.image_data.ImageReader`.

    Attributes:
        files: path, and size and modification time, of each archive.
        members: (n, 3) int64: number of the archive, offset and size in bytes.
    """

    encoded = True

    def __init__(
        self,
        files: tuple[tuple[Path, tuple[int, int]], ...],
        members: Array,
        shape: tuple[int, int, int],
        resize: bool,
    ) -> None:
        self.files = files
        self.members = members
        self.shape = shape
        self.resize = resize

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, positions: Array | slice) -> TarImages:
        return TarImages(self.files, self.members[positions], self.shape, self.resize)

    def fetch(self, positions: Sequence[int]) -> Read:
        """Nothing yet: members can be read in any order."""
        return partial(self._read, self.members[np.asarray(positions, np.int64)])

    def _read(self, members: Array) -> tuple[Array, list[str | None]]:
        contents: list[bytes | DataError] = []
        for run in np.split(members, np.flatnonzero(np.diff(members[:, 0])) + 1):
            if len(run):
                contents += self._contents(int(run[0, 0]), run[:, 1:])
        return decode_all(contents, self.shape[0], self.shape[1:], self.resize)

    def _contents(self, number: int, spans: Array) -> list[bytes | DataError]:
        path, identity = self.files[number]
        try:
            with open_regular(path) as file:
                if _identity(file) != identity:
                    raise DataError(f"{path} has changed since it was opened; start again")
                return [_content(file, int(offset), int(size)) for offset, size in spans]
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error

    def fingerprint(self) -> str:
        """sha256 over the archives' names, sizes and modification times, and which members are chosen."""
        digest = hashlib.sha256(repr([(path.name, identity) for path, identity in self.files]).encode())
        digest.update(np.ascontiguousarray(self.members).tobytes())
        return digest.hexdigest()


def _content(file: BufferedReader, offset: int, size: int) -> bytes | DataError:
    if size > MAX_FILE_BYTES:
        return DataError(f"has {size:,} bytes; expected at most {MAX_FILE_BYTES:,}")
    file.seek(offset)
    return file.read(size)
