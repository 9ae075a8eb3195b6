"""``predict``: an image set of any size to standard output, one file, a folder, or a Ray cluster."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastcascade.cli.arguments import Backend, Model, Point, Precision, RowRange, Split, Threads, row_range
from fastcascade.cli.loading import compile_model
from fastcascade.cli.output import say
from fastcascade.errors import InvalidArgument

if TYPE_CHECKING:
    from fastcascade.prediction.predictions import Predictions

__all__ = ["predict"]

_FILES = (".parquet", ".jsonl", ".csv")
"""Suffixes of an output that is one file."""


def predict(
    model: Model,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="a folder, a file (npz, npy, Parquet, tar, CIFAR), a pattern in quotes, or image files",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="a folder, or a .parquet, .jsonl or .csv file, which appears when it is complete. Repeat "
            "the command after a kill, and it continues. Default: JSON lines on standard output",
        ),
    ] = None,
    operating_point: Point = None,
    top_k: Annotated[int, typer.Option(min=0, help="also write the K most probable classes")] = 0,
    split: Split = None,
    rows: RowRange = None,
    resize: Annotated[
        bool, typer.Option(help="scale image files to the model's size; otherwise other sizes are errors")
    ] = True,
    file_format: Annotated[
        Literal["parquet", "jsonl", "csv"], typer.Option("--format", help="of the files in a folder")
    ] = "parquet",
    rows_per_file: Annotated[int, typer.Option(min=1, help="inputs per file in a folder")] = 16_384,
    strict: Annotated[
        bool, typer.Option("--strict", help="stop at the first input that is an error")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[=ADDRESS]",
            help="run on the Ray cluster at HOST:PORT (--ray=HOST:PORT), or on one started here (--ray); "
            "OUT is a folder that all machines share",
        ),
    ] = None,
    backend: Backend = "auto",
    precision: Precision = None,
    threads: Threads = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace an existing file, or another run in the folder")
    ] = False,
) -> None:
    """Classify images. Every input has a row: label, class name, probability, exit and cost, or an error."""
    import fastcascade as fc
    from fastcascade.data.sources import load_inputs
    from fastcascade.prediction.predictor import predict_batches
    from fastcascade.prediction.progress import RunProgress
    from fastcascade.prediction.runs import RunOptions, Tally, predict_to_file, predict_to_folder
    from fastcascade.prediction.writers import check_destination

    # Such an image is an error row; Pillow's own warning would interrupt the progress bar.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    to_file = output is not None and output.suffix in _FILES
    if output is not None and to_file:
        check_destination(output, overwrite)
    if ray is not None and (output is None or to_file):
        raise InvalidArgument("--ray writes a folder of files; name one with -o")
    compiled = compile_model(model, backend, precision, threads)
    compiled.thresholds(operating_point)  # fails on an unknown name before the inputs are read
    source, shape = inputs[0] if len(inputs) == 1 else inputs, compiled.plan.input.shape
    images = load_inputs(source, shape, resize, split)
    chosen = None if rows is None else row_range(rows, len(images))
    if chosen is not None:
        images = images.take(chosen)
    options = RunOptions(top_k, file_format, rows_per_file, strict, overwrite)
    num_exits = len(compiled.plan.stages)
    # Left before an error is printed, or the progress bar would be drawn after it.
    with RunProgress(len(images), num_exits) as progress:
        if output is None:
            found = predict_batches(compiled, images, operating_point, top_k, resize, progress.waits)
            _print_rows(found, strict, lambda batch: progress.watch(Tally.of(batch, num_exits)))
        elif ray is None:
            run = predict_to_file if to_file else predict_to_folder
            run(compiled, images, output, operating_point, options, progress.started, progress.watch)
        else:
            span = None if chosen is None else (chosen.start, chosen.stop)
            fc.ray.predict_to_folder(
                compiled,
                fc.ray.Images(source, shape, resize, split, span),
                output,
                operating_point,
                options,
                progress.started,
                progress.watch,
                address=None if ray == "local" else ray,
                cpus=threads or 1,
            )
    say("done:", progress.summary())


def _print_rows(
    batches: Generator[Predictions, None, None], strict: bool, watch: Callable[[Predictions], None]
) -> None:
    """Print rows as JSON lines on standard output."""
    from fastcascade.prediction.writers import write_json_lines

    with contextlib.closing(batches):
        write_json_lines(_watched(batches, strict, watch), sys.stdout.buffer)
        sys.stdout.flush()


def _watched(
    batches: Iterable[Predictions], strict: bool, watch: Callable[[Predictions], None]
) -> Iterator[Predictions]:
    """The batches unchanged; the first error row is an error if ``strict``."""
    for batch in batches:
        if strict:
            batch.require_no_errors()
        watch(batch)
        yield batch
