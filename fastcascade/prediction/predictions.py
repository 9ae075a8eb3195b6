"""Predictions for an image set, streamed: one batch is in memory at a time.

Every image has a row, in order. An image that cannot be read, or whose logits are not finite, has a row with
an error. Output files are written atomically: a file of predictions is complete or absent.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from fastcascade.data.image_data import ImageData
from fastcascade.engine import CompiledCascade
from fastcascade.errors import InvalidArgument
from fastcascade.storage.files import write_atomically
from fastcascade.types import CascadeOutput, OperatingPointLike

__all__ = ["Prediction", "predictions", "save_predictions", "write_json_lines"]

BATCH_BYTES = 32 * 2**20
"""Size of a batch of float32 images."""

INVALID = "the logits are not finite; look for NaN or infinite pixels"


class Prediction(NamedTuple):
    """One image's row; each field is a column of the output.

    Attributes:
        id: path relative to the folder, or index as text.
        label: class index; None if there is an error.
        class_name: name of the label; None if the cascade has no names.
        score: probability of the label at the exit where the instance stopped.
        exit: the stage after which the instance stopped; None if the image could not be read.
        cost_macs: multiplies spent; None if the image could not be read.
        error: the reason why there is no label, else None.
    """

    id: str
    label: int | None = None
    class_name: str | None = None
    score: float | None = None
    exit: int | None = None
    cost_macs: int | None = None
    error: str | None = None


def predictions(
    model: CompiledCascade, data: ImageData, operating_point: OperatingPointLike = None
) -> Iterator[list[Prediction]]:
    """One :class:`Prediction` per image, in the order of the data, in batches.

    Args:
        model: a cascade compiled with ``output="cascade"``.
        data: images of the cascade's input shape, from :func:`fastcascade.data.sources.load_data`.
        operating_point: see :meth:`Cascade.thresholds`.

    Raises:
        InvalidArgument: images of another shape, or an unknown operating point.

    Example:
        >>> import fastcascade as fc, numpy as np
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> cascade = fc.Cascade([resnet_cifar(8)], None, 10, (3, 32, 32))
        >>> images = np.zeros((2, 3, 32, 32), np.float32)
        >>> images[1] = np.nan
        >>> data = ImageData(["blank", "broken"], images, None)
        >>> [(p.id, p.error) for batch in predictions(fc.compile(cascade), data) for p in batch]
        [('blank', None), ('broken', 'the logits are not finite; look for NaN or infinite pixels')]
    """
    classes = model.plan.classes
    image_bytes = 4 * math.prod(model.plan.input.shape)
    for rows in data.rows(max(1, BATCH_BYTES // image_bytes)):
        out = model(rows.images.to(model.device), operating_point)
        if not isinstance(out, CascadeOutput):
            raise InvalidArgument('predictions need exits and costs; compile with output="cascade"')
        readable = _predictions_of(out, classes)
        yield [
            next(readable)._replace(id=i) if error is None else Prediction(i, error=error)
            for i, error in zip(rows.ids, rows.errors, strict=True)
        ]


def _predictions_of(out: CascadeOutput, classes: tuple[str, ...] | None) -> Iterator[Prediction]:
    """The cascade's output as predictions with an empty id."""
    score = out.probs.gather(1, out.label.clamp(min=0)[:, None])[:, 0]
    columns = (column.tolist() for column in (out.label, score, out.exit_stage, out.cost_macs))
    for label, probability, exit_stage, cost in zip(*columns, strict=True):
        if label < 0:
            yield Prediction("", exit=exit_stage, cost_macs=cost, error=INVALID)
        else:
            name = None if classes is None else classes[label]
            yield Prediction("", label, name, probability, exit_stage, cost)


def save_predictions(batches: Iterable[list[Prediction]], path: str | Path, overwrite: bool = False) -> None:
    """Stream predictions to a file, which appears when it is complete.

    Args:
        path: the suffix selects the format: ``.parquet``, ``.jsonl`` (one JSON object per line) or ``.csv``.
        overwrite: replace an existing file.

    Raises:
        InvalidArgument: the file exists and ``overwrite`` is False, the suffix is unknown, or Parquet was
            selected without pyarrow.
        SaveError: the operating system reported an error; no partial file is left.
    """
    path = Path(path)
    check_destination(path, overwrite)
    write = WRITERS[path.suffix]
    write_atomically(path, lambda file: write(batches, cast(IO[bytes], file)), overwrite=overwrite)


def check_destination(path: Path, overwrite: bool) -> None:
    """Check the format, and that the file may be written, before any image is classified.

    Raises:
        InvalidArgument: as for :func:`save_predictions`.
    """
    if path.suffix not in WRITERS:
        raise InvalidArgument(f"cannot write {path}: the name must end in one of {', '.join(WRITERS)}")
    if os.path.lexists(path) and not overwrite:
        raise InvalidArgument(f"{path} exists; choose another name, or overwrite it")


def write_json_lines(batches: Iterable[list[Prediction]], file: IO[bytes]) -> None:
    """One JSON object per line, in ASCII: an id cannot send escape sequences to a terminal."""
    for batch in batches:
        file.write("".join(json.dumps(p._asdict()) + "\n" for p in batch).encode("ascii"))


def _write_csv(batches: Iterable[list[Prediction]], file: IO[bytes]) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.writer(text)
    writer.writerow(Prediction._fields)
    for batch in batches:
        writer.writerows([_csv_cell(value) for value in prediction] for prediction in batch)
    text.detach()  # flushes without closing the file


def _csv_cell(value: str | float | None) -> str | float | None:
    """The value, quoted if a spreadsheet would evaluate it as a formula."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value


def _write_parquet(batches: Iterable[list[Prediction]], file: IO[bytes]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidArgument(
            "Parquet needs pyarrow: install fastcascade[data], or write a .jsonl file"
        ) from error
    text, number = pyarrow.string(), pyarrow.int64()
    types = (text, number, text, pyarrow.float32(), number, number, text)
    schema = pyarrow.schema(list(zip(Prediction._fields, types, strict=True)))
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for batch in batches:
            columns = [list(column) for column in zip(*batch, strict=True)]
            writer.write_table(pyarrow.table(columns, schema=schema))


WRITERS = {".parquet": _write_parquet, ".jsonl": write_json_lines, ".csv": _write_csv}
