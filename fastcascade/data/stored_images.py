"""Images stored one after another, uncompressed, in a file or several; read from disk when needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastcascade.data.image_data import Array, ImageReader, Read
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
    def of(cls, path: Path, file: BufferedReader, offset: int, size: int, count: int) -> Records:
        """Records of an open file."""
        return cls(path, _identity(file), offset, size, count)

    def read(self, numbers: Array) -> Array:
        """The records with these numbers, (n, size) uint8; neighbours are read at once.

        Raises:
            DataError: the file cannot be read, or is not the one that was checked.
        """
        records = np.empty((len(numbers), self.size), np.uint8)
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        try:
            with open_regular(self.path) as file:
                if _identity(file) != self.identity:
                    raise DataError(f"{self.path} has changed since it was checked; load it again")
                for first, end in pairwise([0, *breaks.tolist(), len(numbers)]):
                    file.seek(self.offset + int(numbers[first]) * self.size)
                    if file.readinto(records[first:end].data) != (end - first) * self.size:
                        raise DataError(f"{self.path} ends before record {numbers[end - 1]}")
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error
        return records


def _identity(file: BufferedReader) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, eq=False)
class StoredImages(ImageReader):
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

    def __getitem__(self, positions: Array | slice) -> StoredImages:
        if isinstance(positions, slice):
            return replace(self, chosen=self.chosen[positions])
        return replace(self, chosen=np.asarray([self.chosen[i] for i in positions], np.int64))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """All images in memory."""
        images, _ = self.read(range(len(self)))
        return images if dtype is None else images.astype(dtype)

    def fetch(self, positions: Sequence[int]) -> Read:
        """Nothing yet: files of records can be read in any order."""
        return partial(self._read, np.asarray([self.chosen[i] for i in positions], np.int64))

    def _read(self, wanted: Array) -> tuple[Array, list[str | None]]:
        """The images with these numbers. A file that cannot be read is an error, not a row."""
        records = np.empty((len(wanted), self.parts[0].size), np.uint8)
        first = 0
        for part in self.parts:
            within = wanted - first
            inside = (within >= 0) & (within < part.count)
            if inside.any():
                records[inside] = part.read(within[inside])
            first += part.count
        return self.decode(records), [None] * len(wanted)

    def fingerprint(self) -> str:
        """sha256 over the files' sizes and modification times, the records' layout, and which are chosen."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(repr((part.identity[1:], part.offset, part.size, part.count)).encode())
        chosen = self.chosen if isinstance(self.chosen, range) else np.asarray(self.chosen).tobytes()
        digest.update(repr(chosen).encode())
        return digest.hexdigest()
