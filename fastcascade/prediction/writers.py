"""Files of predictions: Parquet, JSON lines, CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, cast

import numpy as np

from fastcascade.errors import InvalidArgument
from fastcascade.prediction.predictions import Prediction, Predictions
from fastcascade.storage.files import write_atomically

__all__ = [
    "WRITERS",
    "Format",
    "check_destination",
    "join_files",
    "require_format",
    "save_predictions",
    "write_json_lines",
]

Format: TypeAlias = Literal["parquet", "jsonl", "csv"]

_EMPTY_COLUMN = np.empty(0, np.int64)
_NONE = Predictions(
    [], _EMPTY_COLUMN, np.empty(0, np.float32), _EMPTY_COLUMN, _EMPTY_COLUMN,
    np.empty((0, 0), np.int64), np.empty((0, 0), np.float32), {}, None,
)  # fmt: skip


def save_predictions(batches: Iterable[Predictions], path: str | Path, overwrite: bool = False) -> None:
    """Stream predictions to one file, which appears when it is complete.

    Args:
        path: the suffix selects the format: ``.parquet``, ``.jsonl`` (one JSON object per line) or ``.csv``.
        overwrite: replace an existing file.

    Raises:
        InvalidArgument: the file exists and ``overwrite`` is False, the suffix is unknown, or Parquet was
            selected without pyarrow.
        SaveError: the operating system reported an error; no partial file is left.
    """
    path = Path(path)
    write = WRITERS[check_destination(path, overwrite)]
    write_atomically(path, lambda file: write(batches, cast(IO[bytes], file)), overwrite=overwrite)


def check_destination(path: Path, overwrite: bool) -> Format:
    """The format of a file, and that it may be written, before any image is classified.

    Raises:
        InvalidArgument: as for :func:`save_predictions`.
    """
    name = path.suffix.removeprefix(".")
    if name not in WRITERS:
        raise InvalidArgument(f"cannot write {path}: the name must end in one of .{', .'.join(WRITERS)}")
    if os.path.lexists(path) and not overwrite:
        raise InvalidArgument(f"{path} exists; choose another name, or pass --overwrite")
    require_format(cast(Format, name))
    return cast(Format, name)


def require_format(name: Format) -> None:
    """Check that a format can be written here.

    Raises:
        InvalidArgument: Parquet without pyarrow.
    """
    if name == "parquet":
        _pyarrow()


def write_json_lines(batches: Iterable[Predictions], file: IO[bytes]) -> None:
    """One JSON object per line, in ASCII: an id cannot send escape sequences to a terminal."""
    for batch in batches:
        rows = (dict(zip(batch.columns, row, strict=False)) for row in batch)
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode("ascii"))


def _write_csv(batches: Iterable[Predictions], file: IO[bytes]) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.writer(text)
    head: tuple[str, ...] | None = None
    for batch in batches:
        if head is None:
            head = batch.columns
            writer.writerow(head)
        writer.writerows(map(_csv_cell, row[: len(head)]) for row in batch)
    if head is None:
        writer.writerow(Prediction._fields[:-2])
    text.detach()  # flushes without closing the file


def _csv_cell(value: Any) -> Any:
    """The value, quoted if a spreadsheet would evaluate it as a formula; lists with semicolons."""
    if isinstance(value, list):
        return ";".join(map(str, value))
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value


def _write_parquet(batches: Iterable[Predictions], file: IO[bytes]) -> None:
    parquet = _pyarrow()
    writer = None
    for batch in batches:
        table = batch.to_arrow()
        writer = writer or parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
    (writer or parquet.ParquetWriter(file, _NONE.to_arrow().schema)).close()


def join_files(parts: Sequence[Path], name: Format, file: IO[bytes]) -> None:
    """Copy files of one format, one after another, into one; a part at a time is in memory."""
    if not parts:
        WRITERS[name]([], file)
    elif name == "parquet":
        _join_parquet(parts, file)
    else:
        for number, path in enumerate(parts):
            with open(path, "rb") as part:
                if name == "csv" and number:
                    part.readline()  # the head, which holds no line break
                shutil.copyfileobj(part, file)


def _join_parquet(parts: Sequence[Path], file: IO[bytes]) -> None:
    parquet = _pyarrow()
    with parquet.ParquetWriter(file, parquet.read_schema(parts[0])) as writer:
        for path in parts:
            writer.write_table(parquet.read_table(path))


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidArgument(
            "Parquet needs pyarrow: install fastcascade[data], or write .jsonl or .csv"
        ) from error
    return pyarrow.parquet


WRITERS: dict[str, Callable[[Iterable[Predictions], IO[bytes]], None]] = {
    "parquet": _write_parquet,
    "jsonl": write_json_lines,
    "csv": _write_csv,
}
