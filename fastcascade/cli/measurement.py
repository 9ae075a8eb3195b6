"""Commands that measure: ``evaluate``, ``bench`` and ``report``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fastcascade.cli.arguments import (
    Backend,
    Model,
    Overwrite,
    Peers,
    Point,
    Precision,
    Resize,
    RowRange,
    Sizes,
    Source,
    Split,
    ThreadCounts,
    Threads,
    numbers,
)
from fastcascade.cli.loading import compile_model, read_images, read_model
from fastcascade.cli.output import say
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.text import plain, printable

if TYPE_CHECKING:
    from fastcascade.benchmarking.results import Benchmark
    from fastcascade.data.image_data import ImageData
    from fastcascade.engine import CompiledCascade
    from fastcascade.lowering.plan import Plan
    from fastcascade.model.cascade import Cascade

__all__ = ["bench", "evaluate", "report"]


def evaluate(
    model: Model,
    data: Source,
    operating_point: Annotated[
        list[str] | None, typer.Option("-p", "--operating-point", help="repeatable; default: all")
    ] = None,
    split: Split = None,
    rows: RowRange = None,
    resize: Resize = False,
    backend: Backend = "auto",
    precision: Precision = None,
    threads: Threads = None,
    curve: Annotated[
        Path | None, typer.Option(help="draw the cost–accuracy curve to this .png or .svg file")
    ] = None,
) -> None:
    """Print accuracy, mean cost and exit shares on labelled images."""
    import fastcascade as fc
    from fastcascade.evaluation.curve import check_picture, cost_accuracy_curves, plot_curves

    loaded = read_model(model)
    if curve is not None:
        check_picture(curve)
        if not isinstance(loaded, fc.Cascade):
            raise InvalidArgument(f"{model} is a plan; the curve needs a saved cascade")
    compiled = compile_model(loaded, backend, precision, threads)
    names: list[str | None] = list(operating_point or compiled.usable_points) or [None]
    others = compiled.plan.operating_points.keys() - compiled.usable_points.keys()
    if others and not operating_point:
        say("note:", f"without {', '.join(sorted(others))}: measured at another precision")
    for name in names:
        compiled.thresholds(name)  # fails on an unknown name before the images are read
    images = read_images(data, compiled.plan, split, rows, resize)
    table = Table("operating point", "accuracy", "mean MACs", "of dense", "exit shares", "exit accuracy")
    for name in names:
        result = fc.evaluate(compiled, images, name)
        table.add_row(
            plain(name or "default"),
            f"{result.accuracy:.2%}",
            f"{result.mean_macs:,.0f}",
            f"{result.mean_macs / compiled.plan.dense_macs:.1%}",
            " ".join(f"{share:.1%}" for share in result.exit_shares),
            " ".join("–" if math.isnan(a) else f"{a:.1%}" for a in result.exit_accuracy),
        )
    Console().print(table)
    if curve is not None and isinstance(loaded, fc.Cascade):
        plot_curves(cost_accuracy_curves(loaded, images), curve)


@dataclass(frozen=True)
class _Settings:
    """Options of ``bench`` and ``report``."""

    batches: tuple[int, ...]
    operating_point: str | None
    backend: str
    precision: Precision
    threads: tuple[int, ...]
    peers: bool


def bench(
    model: Model,
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help="images; default: noise")] = None,
    batch: Sizes = "1,8,64,256",
    operating_point: Point = None,
    split: Split = None,
    rows: RowRange = None,
    resize: Resize = False,
    backend: Backend = "auto",
    precision: Precision = None,
    threads: ThreadCounts = "",
    peers: Peers = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Measure where the time goes: each stage alone, the exits, the schedule, whole batches."""
    from fastcascade.benchmarking.tables import bench_tables

    settings = _Settings(
        numbers("--batch", batch), operating_point, backend, precision, numbers("--threads", threads), peers
    )
    loaded = read_model(model)
    if data is None and (split is not None or rows is not None or resize):
        raise InvalidArgument("--split, --rows and --resize choose images; name the data, too")
    _check_run(loaded, settings)
    images = None if data is None else read_images(data, loaded, split, rows, resize)
    measured = _measure(loaded, images, settings)
    if measured.busy_note is not None:
        say("note:", measured.busy_note)
    if as_json:
        print(json.dumps(measured.to_json(), indent=1))
    else:
        Console().print(*bench_tables(measured))


def report(
    model: Model,
    data: Source,
    out: Annotated[Path, typer.Option(help="directory for report.html")],
    batch: Sizes = "1,8,64,256",
    operating_point: Point = None,
    split: Split = None,
    rows: RowRange = None,
    resize: Resize = False,
    backend: Backend = "auto",
    precision: Precision = None,
    threads: ThreadCounts = "",
    peers: Peers = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure a cascade on labelled images, write an HTML page about it and print its path."""
    import fastcascade as fc
    from fastcascade.benchmarking.report import check_report, write_report
    from fastcascade.evaluation.curve import cost_accuracy_curves
    from fastcascade.evaluation.diagnosis import diagnose

    check_report(out, overwrite)
    settings = _Settings(
        numbers("--batch", batch), operating_point, backend, precision, numbers("--threads", threads), peers
    )
    loaded = read_model(model)
    _check_run(loaded, settings)
    images = read_images(data, loaded, split, rows, resize)
    if images.labels is None:
        raise DataError(f"{data} has no labels; a report needs them")
    measured = _measure(loaded, images, settings)
    compiled = compile_model(loaded, backend, precision, next(iter(settings.threads), None))
    evaluation = fc.evaluate(compiled, images, operating_point)
    cascade = loaded if isinstance(loaded, fc.Cascade) else None
    curves = None if cascade is None else cost_accuracy_curves(cascade, images)
    diagnosis = diagnose(compiled, images, operating_point, cascade)
    if cascade is None:
        say("note:", "from a plan, a report has no cost–accuracy curve and no reliability before temperature")
    title = "/".join(model.resolve().parts[-2:])  # "model" alone says little
    page = write_report(out, measured, evaluation, curves, diagnosis, title=title, overwrite=overwrite)
    print(printable(str(page)))


def _check_run(model: Cascade | Plan, settings: _Settings) -> None:
    """Fail before images are read where bf16 cannot run, or where the operating point cannot serve."""
    runs: Cascade | Plan | CompiledCascade = model
    if settings.precision == "bf16":
        runs = compile_model(model, settings.backend, settings.precision, None)
    runs.thresholds(settings.operating_point)


def _measure(model: Cascade | Plan, images: ImageData | None, settings: _Settings) -> Benchmark:
    from fastcascade.benchmarking.runner import benchmark

    return benchmark(
        model,
        images,
        batches=settings.batches or (1,),
        threads=settings.threads,
        operating_point=settings.operating_point,
        backend=settings.backend,
        precision=settings.precision,
        peers=settings.peers,
    )
