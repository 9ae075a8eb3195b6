"""Encoded images in a column of Parquet files, as Hugging Face data sets store them.

Files are read in order and in small pieces, so that memory does not depend on the size of a row group.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastcascade.data.image_data import Array, ImageData, ImageReader, IndexIds, Read
from fastcascade.data.image_decoding import decode_all
from fastcascade.data.shard_ids import ShardIds
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.storage.files import open_regular

__all__ = ["load_parquet"]

_NAMES = ("image", "img", "jpg", "jpeg", "png", "bytes")
"""Preferred names of the column, if there are several with bytes."""

_ROWS_PER_READ = 32
_BUFFER_BYTES = 2**20


def load_parquet(paths: Sequence[Path], shape: tuple[int, int, int], resize: bool) -> ImageData:
    """The images of one or several Parquet files, unlabelled, in the order of the files and their rows.

    Args:
        paths: files with a column of encoded images: binary, or a struct with a binary field ``bytes``.
        shape: (C, H, W) of the images.
        resize: scale images of other sizes.

    Raises:
        DataError: a file is not readable Parquet, or has no such column.
    """
    if shape[0] not in (1, 3):
        raise InvalidArgument(f"encoded images have 1 or 3 channels; the images wanted have {shape[0]}")
    files = tuple(_examine(path) for path in paths)
    counts = [file.rows for file in files]
    images = ParquetImages(files, shape, resize, range(sum(counts)))
    ids = IndexIds(counts[0]) if len(files) == 1 else ShardIds([path.name for path in paths], counts)
    return ImageData(ids, images, None)


class _File(NamedTuple):
    """A Parquet file: ``groups`` are the numbers of rows of its row groups, ``leaf`` the column to read."""

    path: Path
    column: str
    leaf: str
    groups: tuple[int, ...]
    identity: tuple[int, int]

    @property
    def rows(self) -> int:
        return sum(self.groups)


def _examine(path: Path) -> _File:
    pyarrow, parquet = _pyarrow()
    try:
        with open_regular(path) as stream:
            status = os.fstat(stream.fileno())
            file = parquet.ParquetFile(stream, page_checksum_verification=True)
            column, leaf = _image_column(pyarrow, path, file.schema_arrow)
            groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    return _File(path, column, leaf, groups, (status.st_size, status.st_mtime_ns))


def _image_column(pyarrow: Any, path: Path, schema: Any) -> tuple[str, str]:
    """The column that holds encoded images, and the path of its bytes."""

    def is_binary(kind: Any) -> bool:
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    found = {}
    for field in schema:
        if is_binary(field.type):
            found[field.name] = field.name
        elif pyarrow.types.is_struct(field.type):
            position = field.type.get_field_index("bytes")
            if position >= 0 and is_binary(field.type.field(position).type):
                found[field.name] = f"{field.name}.bytes"
    if not found:
        raise DataError(
            f"{path} has the columns {schema.names}; expected one of encoded images: binary, or a struct "
            "with a binary field 'bytes'"
        )
    name = next((name for name in _NAMES if name in found), next(iter(found)))
    return name, found[name]


class ParquetImages(ImageReader):
    """Encoded images in Parquet files; see :class:`fastcascade.data.image_data.ImageReader`.

    Reading goes on where it stopped. Any other position costs reading its row group from the beginning.
    """

    encoded = True

    def __init__(
        self,
        files: tuple[_File, ...],
        shape: tuple[int, int, int],
        resize: bool,
        chosen: range | Array,
    ) -> None:
        self.files = files
        self.shape = shape
        self.resize = resize
        self.chosen = chosen
        self._ends = np.cumsum([file.rows for file in files])
        self._lock = threading.Lock()
        self._next = -1
        self._cells: Iterator[bytes | DataError] = iter(())

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, positions: Array | slice) -> ParquetImages:
        if isinstance(positions, slice):
            chosen = self.chosen[positions]
        else:
            chosen = np.asarray([self.chosen[i] for i in positions], np.int64)
        return ParquetImages(self.files, self.shape, self.resize, chosen)

    def fetch(self, positions: Sequence[int]) -> Read:
        """Read the encoded images; the function decodes them."""
        with self._lock:
            cells = [self._cell(int(self.chosen[position])) for position in positions]
        return partial(decode_all, cells, self.shape[0], self.shape[1:], self.resize)

    def _cell(self, row: int) -> bytes | DataError:
        if row != self._next:
            self._cells = self._rows_from(row)
        self._next = row + 1
        try:
            return next(self._cells)
        except StopIteration:
            raise DataError(f"row {row} is missing; the files have changed since they were opened") from None

    def _rows_from(self, row: int) -> Iterator[bytes | DataError]:
        """The cells from a row on, over all later files."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        first = row - (int(self._ends[number - 1]) if number else 0)
        for file in self.files[number:]:
            yield from _cells(file, first)
            first = 0

    def fingerprint(self) -> str:
        """sha256 over the files' names, sizes, modification times and columns, and which rows are chosen."""
        files = [(file.path.name, file.column, file.groups, file.identity) for file in self.files]
        chosen = self.chosen if isinstance(self.chosen, range) else self.chosen.tobytes()
        return hashlib.sha256(repr((files, chosen)).encode()).hexdigest()


def _cells(file: _File, first: int) -> Iterator[bytes | DataError]:
    """The cells of a file from a row on; a row group that is damaged gives its remaining rows as errors."""
    pyarrow, parquet = _pyarrow()
    try:
        stream = open_regular(file.path)
    except OSError as error:
        raise DataError(f"cannot read {file.path}: {error.strerror or error}") from error
    with stream:
        status = os.fstat(stream.fileno())
        if (status.st_size, status.st_mtime_ns) != file.identity:
            raise DataError(f"{file.path} has changed since it was opened; start again")
        reader = parquet.ParquetFile(
            stream, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
        for group, rows in enumerate(file.groups):
            if first >= rows:
                first -= rows
                continue
            read = 0
            try:
                for cell in itertools.islice(_group_cells(reader, group, file), first, None):
                    read += 1
                    yield cell
            except (OSError, pyarrow.ArrowException) as error:
                reason = DataError(
                    f"cannot be read: row group {group} of {file.path.name} is damaged: {error}"
                )
                yield from itertools.repeat(reason, rows - first - read)
            first = 0


def _group_cells(reader: Any, group: int, file: _File) -> Iterator[bytes | DataError]:
    batches = reader.iter_batches(
        batch_size=_ROWS_PER_READ, row_groups=[group], columns=[file.leaf], use_threads=False
    )
    for batch in batches:
        column = batch.column(0)
        if file.leaf != file.column:
            column = column.flatten()[0]  # unlike field(0), this knows where the whole struct is null
        for value in column:
            cell = value.as_py()
            yield DataError(f"has no bytes in column {file.column!r}") if cell is None else cell


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("reading Parquet needs pyarrow; install fastcascade[data]") from error
    return pyarrow, pyarrow.parquet
