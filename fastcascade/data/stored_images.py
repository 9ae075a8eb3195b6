"""Images stored one after another, uncompressed, in a file or several; read from disk when needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastcascade.data.image_data import Array
from fastcascade.errors import DataError
from fastcascade.storage.files import open_regular

__all__ = ["Records", "StoredImages"]


@dataclass(frozen=True)
class Records:
    """Records of one size in a file.

    Attributes:
        path: the file.
        identity: inode, size and modification time of the file that was checked.
        offset: position of the first record, in bytes.
        size: of a record, in bytes.
        count: number of records.
    """

    path: Path
    identity: tuple[int, int, int]
    offset: int
    size: int
    count: int

    @classmethod
    def of(cls, path: Path, file: BinaryIO, offset: int, size: int, count: int) -> Records:
        """Records of an open file."""
        return cls(path, _identity(file), offset, size, count)

    def read(self, first: int, count: int) -> Array:
        """(count, size) uint8.

        Raises:
            DataError: the file cannot be read, or is not the one that was checked.
        """
        try:
            with open_regular(self.path) as file:
                if _identity(file) != self.identity:
                    raise DataError(f"{self.path} has changed since it was checked; load it again")
                file.seek(self.offset + first * self.size)
                data = bytearray(count * self.size)
                if file.readinto(data) != len(data):
                    raise DataError(f"{self.path} ends before record {first + count}")
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error
        return np.frombuffer(data, np.uint8).reshape(count, self.size)


def _identity(file: BinaryIO) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Images that are records of one or several files; see :class:`fastcascade.data.image_data.ImageReader`.

    Attributes:
        parts: the files, in order.
        decode: (n, record size) uint8 → (n, …) images.
        chosen: record numbers over all parts, one per image.
    """

    parts: tuple[Records, ...]
    decode: Callable[[Array], Array]
    chosen: Sequence[int] | Array

    @classmethod
    def all_of(cls, parts: Sequence[Records], decode: Callable[[Array], Array]) -> StoredImages:
        """Every record of these files."""
        return cls(tuple(parts), decode, range(sum(part.count for part in parts)))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, positions: Array) -> StoredImages:
        return replace(self, chosen=np.asarray([self.chosen[i] for i in positions], np.int64))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """All images in memory."""
        images, _ = self.read(range(len(self)))
        return images if dtype is None else images.astype(dtype)

    def read(self, positions: range) -> tuple[Array, list[str | None]]:
        """The images at these positions. A file that cannot be read is an error, not a row."""
        wanted = np.asarray(self.chosen[positions.start : positions.stop], np.int64)
        records = np.empty((len(wanted), self.parts[0].size), np.uint8)
        first = 0
        for part in self.parts:
            within = wanted - first
            inside = np.flatnonzero((within >= 0) & (within < part.count))
            # Adjacent images whose records are adjacent too are read at once.
            breaks = np.flatnonzero((np.diff(inside) != 1) | (np.diff(within[inside]) != 1)) + 1
            for run in np.split(inside, breaks):
                if len(run):
                    records[run] = part.read(int(within[run[0]]), len(run))
            first += part.count
        return self.decode(records), [None] * len(wanted)
