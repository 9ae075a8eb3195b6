"""The command line: ``fastcascade train``, ``calibrate``, ``evaluate``, ``predict``, ``bench``, ``report``…

Results go to standard output, progress and messages to standard error. A :class:`FastCascadeError` or an
:class:`OSError` ends a command with one message and exit status 1, a malformed command line with status 2.
Commands import what they need when they run, so that ``--help`` is fast.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastcascade.errors import DataError, FastCascadeError, InvalidArgument
from fastcascade.text import plain, printable

if TYPE_CHECKING:
    from fastcascade.benchmarking.results import Benchmark
    from fastcascade.data.image_data import ImageData
    from fastcascade.engine import CompiledCascade
    from fastcascade.lowering.plan import Plan
    from fastcascade.model.cascade import Cascade
    from fastcascade.prediction.predictions import Predictions
    from fastcascade.types import OperatingPoint, SelectorComparison

__all__ = ["app", "main"]

app = typer.Typer(
    help="Cascades of image classifiers with learned early exit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Entry point of the ``fastcascade`` command."""
    warnings.showwarning = lambda message, *_, **__: say("warning:", str(message))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows "?" for "×"
    try:
        status = _run()
        sys.stdout.flush()
    except FastCascadeError as error:
        status = _fail(str(error))
    except BrokenPipeError:  # the reader, such as head, has enough
        status = 1
    except OSError as error:
        status = _fail(_reason(error))
    _discard_output()
    sys.exit(status)


def _run() -> int:
    """Run a command; returns its exit status."""
    try:
        app(args=["--ray=local" if word == "--ray" else word for word in sys.argv[1:]])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _fail(message: str) -> int:
    with contextlib.suppress(OSError):  # standard error may be full, too
        say("error:", message)
    return 1


def _reason(error: OSError) -> str:
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return f"cannot write to standard output: {error.strerror}"
    return str(error)


def _discard_output() -> None:
    """Drop output that cannot be written; Python would try again at exit and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(kind: str, message: str) -> None:
    """Print a message to standard error."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble((kind, "bold"), " ", printable(message)))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastcascade {version('fastcascade')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None:
    """Cascades of image classifiers with learned early exit."""


##### Shared arguments

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="directory of a saved cascade or plan")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="an npz file, a folder of images, or cifar10:DIR, cifar100:DIR, npz:FILE, folder:DIR",
    ),
]
Split = Annotated[Literal["train", "test"] | None, typer.Option(help="which split of the data set")]
RowRange = Annotated[str | None, typer.Option("--rows", metavar="START:STOP", help="use only these images")]
Resize = Annotated[bool, typer.Option("--resize", help="scale images to the size of the model's input")]
Point = Annotated[
    str | None, typer.Option("--operating-point", "-p", help='default: the one named "default"')
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: as PyTorch")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace existing output")]
Backend = Annotated[str, typer.Option(help="auto, or a name from `fastcascade doctor`")]
Precision = Annotated[
    Literal["fp32", "fp16", "bf16", "int8"] | None,
    typer.Option(
        help="precision of the stages; fp16 is for GPUs, bf16 for CPUs with AVX512-BF16, int8 for models "
        "from `fastcascade quantize`"
    ),
]


def _load_images(
    source: str, described: Cascade | Plan, split: Split = None, rows: str | None = None, resize: bool = False
) -> ImageData:
    """Images of the model's input size, labelled in the order of its classes."""
    from fastcascade.data.sources import load_data

    data = load_data(source, split, shape=described.input.shape, resize=resize, classes=described.classes)
    return data if rows is None else data.take(_row_range(rows, len(data)))


def _row_range(text: str, n: int) -> range:
    """``START:STOP`` as a range within n; either may be omitted, as in a slice."""
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if match is None:
        raise InvalidArgument(f"--rows is {text!r}; expected START:STOP, for example 47500:50000")
    chosen = range(int(match[1] or 0), int(match[2] or n))
    if not chosen or chosen.stop > n:
        raise InvalidArgument(f"--rows is {text!r}; expected a range within the {n} images")
    return chosen


def _load_model(directory: Path) -> Cascade | Plan:
    """The saved cascade in a directory; its plan if there is no cascade, or one whose modules need code."""
    import fastcascade as fc
    from fastcascade.engine import load_model
    from fastcascade.lowering.plan_file import plan_exists
    from fastcascade.model.store import cascade_exists, plan_note

    if cascade_exists(directory):
        return load_model(directory) if plan_note(directory).custom_modules else fc.load(directory)
    return fc.load_plan(directory) if plan_exists(directory) else fc.load(directory)


def _compile(
    model: Cascade | Plan | Path, backend: str, precision: Precision, threads: int | None
) -> CompiledCascade:
    import fastcascade as fc
    from fastcascade.engine import load_model
    from fastcascade.lowering.plan import Plan

    model = load_model(model) if isinstance(model, Path) else model
    if precision == "int8" and not (isinstance(model, Plan) and model.is_quantized):
        raise InvalidArgument(
            "--precision int8 needs a quantised model; `fastcascade quantize MODEL DATA --out DIR` makes one"
        )
    return fc.compile(model, backend=backend, precision=precision, threads=threads)


def _check_run(
    model: Cascade | Plan, backend: str, precision: Precision, operating_point: str | None
) -> None:
    """Fail before images are read where bf16 cannot run, or where the operating point cannot serve."""
    if precision == "bf16":
        _compile(model, backend, precision, None).thresholds(operating_point)
    else:
        model.thresholds(operating_point)


##### Commands


@app.command(epilog="Example: fastcascade train examples/cifar10/config.toml cifar10:data --out run/")
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file; docs/config.md lists its keys")
    ],
    data: Source,
    out: Annotated[
        Path, typer.Option(help="output directory: checkpoint/ during training, model/ at the end")
    ],
    overwrite: Overwrite = False,
) -> None:
    """Train, calibrate and save a cascade. An interrupted run resumes when the command is repeated."""
    from fastcascade.training.config import train_from_config

    cascade = train_from_config(config, data, out, overwrite=overwrite)
    Console().print(operating_points_table(cascade.operating_points, cascade.dense_macs))
    say("saved:", str(out / "model"))


@app.command(epilog="Example: fastcascade predict model/ photos/ -o predictions/")
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
    from fastcascade.prediction.writers import check_destination, write_json_lines

    # Such an image is an error row; Pillow's own warning would interrupt the progress bar.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    to_file = output is not None and output.suffix in _FILES
    if output is not None and to_file:
        check_destination(output, overwrite)
    compiled = _compile(model, backend, precision, threads)
    compiled.thresholds(operating_point)  # fails on an unknown name before the inputs are read
    images = load_inputs(inputs[0] if len(inputs) == 1 else inputs, compiled.plan.input.shape, resize, split)
    chosen = None if rows is None else _row_range(rows, len(images))
    if chosen is not None:
        images = images.take(chosen)
    if ray is not None and (output is None or to_file):
        raise InvalidArgument("--ray writes a folder of files; name one with -o")
    num_exits = len(compiled.plan.stages)
    # Left before an error is printed, or the progress bar would be drawn after it.
    with RunProgress(len(images), num_exits) as progress:
        options = RunOptions(top_k, file_format, rows_per_file, strict, overwrite)
        if output is not None and ray is not None:
            fc.ray.predict_to_folder(
                compiled,
                fc.ray.Images(
                    inputs[0] if len(inputs) == 1 else inputs,
                    compiled.plan.input.shape,
                    resize,
                    split,
                    None if chosen is None else (chosen.start, chosen.stop),
                ),
                output,
                operating_point,
                options,
                progress.started,
                progress.watch,
                address=None if ray == "local" else ray,
                cpus=threads or 1,
            )
        elif output is not None:
            run = predict_to_file if to_file else predict_to_folder
            run(compiled, images, output, operating_point, options, progress.started, progress.watch)
        else:
            found = predict_batches(compiled, images, operating_point, top_k, resize, progress.waits)
            with contextlib.closing(found):
                batches = _watched(found, strict, lambda batch: progress.watch(Tally.of(batch, num_exits)))
                write_json_lines(batches, sys.stdout.buffer)
                sys.stdout.flush()
    say("done:", progress.summary())


_FILES = (".parquet", ".jsonl", ".csv")
"""Suffixes of an output that is one file."""


def _watched(
    batches: Iterable[Predictions], strict: bool, watch: Callable[[Predictions], None]
) -> Iterator[Predictions]:
    """The batches unchanged; the first error row is an error if ``strict``."""
    for batch in batches:
        if strict:
            batch.require_no_errors()
        watch(batch)
        yield batch


@app.command(epilog="Example: fastcascade evaluate model/ cifar10:data --curve curve.png")
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

    loaded = _load_model(model)
    if curve is not None:
        check_picture(curve)
        if not isinstance(loaded, fc.Cascade):
            raise InvalidArgument(f"{model} is a plan; the curve needs a saved cascade")
    compiled = _compile(loaded, backend, precision, threads)
    names: list[str | None] = list(operating_point or compiled.usable_points) or [None]
    others = compiled.plan.operating_points.keys() - compiled.usable_points.keys()
    if others and not operating_point:
        say("note:", f"without {', '.join(sorted(others))}: measured at another precision")
    for name in names:
        compiled.thresholds(name)  # fails on an unknown name before the images are read
    images = _load_images(data, compiled.plan, split, rows, resize)
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


@app.command(
    epilog="Example: fastcascade calibrate model/ cifar10:data --split train --rows 47500: --name fast "
    "--budget-macs 2e7"
)
def calibrate(
    model: Model,
    data: Source,
    name: Annotated[str, typer.Option(help="name of the operating point")] = "default",
    budget_macs: Annotated[float | None, typer.Option(help="highest accuracy at this mean cost")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="lowest cost at this accuracy, 0 to 1")] = None,
    max_risk: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="EPS DELTA",
            help="label differs from the last exit's at a rate ≤ EPS, with probability ≥ 1 − DELTA",
        ),
    ] = None,
    split: Split = None,
    rows: RowRange = None,
    resize: Resize = False,
    precision: Annotated[
        Literal["bf16"] | None,
        typer.Option(help="measure in bf16, for which alone the operating point then serves"),
    ] = None,
) -> None:
    """Choose stop thresholds on held-out images, for one target, and store them in the saved model."""
    import fastcascade as fc
    from fastcascade.model.store import cascade_exists

    # A plan beside a cascade must not get points that the cascade lacks.
    loaded = fc.load(model) if cascade_exists(model) else _load_model(model)
    measured: Cascade | CompiledCascade
    if isinstance(loaded, fc.Cascade) and precision is None:
        measured = loaded
    else:
        measured = _compile(loaded, "auto", precision, None)
    images = _load_images(data, loaded, split, rows, resize)
    point = fc.calibrate(
        measured, images, name, budget_macs=budget_macs, min_accuracy=min_accuracy, max_risk=max_risk
    )
    if isinstance(loaded, fc.Cascade):
        loaded.operating_points[name] = point
    else:
        loaded = replace(loaded, operating_points={**loaded.operating_points, name: point})
    loaded.save(model, overwrite=True)
    Console().print(operating_points_table({name: point}, loaded.dense_macs))


def operating_points_table(points: Mapping[str, OperatingPoint], dense_macs: int) -> Table:
    """Operating points with the figures measured on their calibration data."""
    table = Table("operating point", "thresholds", "accuracy", "risk", "mean MACs", "of dense", "images")
    for name, point in points.items():
        table.add_row(
            plain(name),
            " ".join(f"{threshold:.3f}" for threshold in point.thresholds),
            "" if point.accuracy is None else f"{point.accuracy:.2%}",
            "" if point.risk is None else f"{point.risk:.2%}",
            f"{point.mean_macs:,.0f}",
            f"{point.mean_macs / dense_macs:.1%}",
            f"{point.n:,}",
        )
    return table


Sizes = Annotated[str, typer.Option("--batch", metavar="N,N,…", help="batch sizes")]
ThreadCounts = Annotated[
    str, typer.Option("--threads", metavar="N,N,…", help="CPU threads; several numbers are compared")
]
Peers = Annotated[bool, typer.Option("--peers", help="also time plain PyTorch")]


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """``1,8,64`` as integers; none for an empty string."""
    if not re.fullmatch(r"(|[1-9]\d*(,[1-9]\d*)*)", text):
        raise InvalidArgument(f"{option} is {text!r}; expected numbers from 1, for example 1,8,64")
    return tuple(map(int, text.split(","))) if text else ()


@app.command(
    epilog="Example: fastcascade bench model/ npz:test-images.npz --batch 1,256 --threads 1,2 --peers"
)
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

    settings = MeasureSettings(
        _numbers("--batch", batch), operating_point, backend, precision, _numbers("--threads", threads), peers
    )
    loaded = _load_model(model)
    if data is None and (split is not None or rows is not None or resize):
        raise InvalidArgument("--split, --rows and --resize choose images; name the data, too")
    _check_run(loaded, backend, precision, operating_point)
    images = None if data is None else _load_images(data, loaded, split, rows, resize)
    measured = _measure(loaded, images, settings)
    if measured.busy_note is not None:
        say("note:", measured.busy_note)
    if as_json:
        print(json.dumps(measured.to_json(), indent=1))
    else:
        Console().print(*bench_tables(measured))


@app.command(epilog="Example: fastcascade report model/ npz:test-images.npz --out report/")
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
    settings = MeasureSettings(
        _numbers("--batch", batch), operating_point, backend, precision, _numbers("--threads", threads), peers
    )
    loaded = _load_model(model)
    _check_run(loaded, backend, precision, operating_point)
    images = _load_images(data, loaded, split, rows, resize)
    if images.labels is None:
        raise DataError(f"{data} has no labels; a report needs them")
    measured = _measure(loaded, images, settings)
    compiled = _compile(loaded, backend, precision, next(iter(settings.threads), None))
    evaluation = fc.evaluate(compiled, images, operating_point)
    cascade = loaded if isinstance(loaded, fc.Cascade) else None
    curves = None if cascade is None else cost_accuracy_curves(cascade, images)
    diagnosis = diagnose(compiled, images, operating_point, cascade)
    if cascade is None:
        say("note:", "from a plan, a report has no cost–accuracy curve and no reliability before temperature")
    title = "/".join(model.resolve().parts[-2:])  # "model" alone says little
    page = write_report(out, measured, evaluation, curves, diagnosis, title=title, overwrite=overwrite)
    print(printable(str(page)))


@dataclass(frozen=True)
class MeasureSettings:
    """Options of ``bench`` and ``report``."""

    batches: tuple[int, ...]
    operating_point: str | None
    backend: str
    precision: Precision
    threads: tuple[int, ...]
    peers: bool


def _measure(model: Cascade | Plan, images: ImageData | None, settings: MeasureSettings) -> Benchmark:
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


@app.command(epilog="Example: fastcascade inspect model/")
def inspect(model: Model) -> None:
    """Print a saved cascade or plan: stages with operations and costs, classes, operating points."""
    from fastcascade.lowering.export import plan as lower
    from fastcascade.lowering.plan import Plan

    loaded = _load_model(model)
    described = loaded if isinstance(loaded, Plan) else lower(loaded)
    console = Console(soft_wrap=True, highlight=False)
    for line in str(described).splitlines():
        console.print(plain(line))
    if not isinstance(loaded, Plan):
        console.print("temperatures:", " ".join(f"{t:.3f}" for t in loaded.temperatures.tolist()))
        if loaded.comparison is not None:
            console.print(comparison_table(loaded.comparison))
    if described.classes is not None:
        console.print("classes:", plain(", ".join(described.classes)))
    if described.operating_points:
        console.print(operating_points_table(described.operating_points, described.dense_macs))
        others = described.operating_points.keys() - described.usable_points().keys()
        if others:
            console.print(
                "measured at another precision, to be calibrated anew:", plain(", ".join(sorted(others)))
            )


def comparison_table(comparison: SelectorComparison) -> Table:
    """Held-out accuracy of the learned selector and of threshold rules at the same cost."""
    title = (
        f"stop scores at matched cost, {comparison.n:,} images; learned − {comparison.best_rule}: "
        f"{100 * comparison.gain:+.2f} ± {100 * comparison.standard_error:.2f} points"
    )
    table = Table("score", *(f"{share:.0%} of dense" for share in comparison.budgets), title=title)
    for name, row in comparison.accuracy.items():
        table.add_row(printable(name), *(f"{accuracy:.2%}" for accuracy in row))
    return table


@app.command(
    epilog="Example: fastcascade quantize model/ cifar10:data --split train --rows 47500: --out int8/"
)
def quantize(
    model: Model,
    data: Source,
    out: Annotated[Path, typer.Option(metavar="DIR", help="where the quantised plan goes")],
    precision: Annotated[
        str, typer.Option(metavar="P,P,…", help="int8, or int8 or fp32 for each stage")
    ] = "int8",
    split: Split = None,
    rows: RowRange = None,
    resize: Resize = False,
    overwrite: Overwrite = False,
) -> None:
    """Quantise a cascade to int8 on images like those to come, and save its plan; labels are not needed."""
    import fastcascade as fc

    loaded = _load_model(model)
    names = precision.split(",")
    plan = fc.quantize(
        loaded,
        _load_images(data, loaded, split, rows, resize),
        names[0] if len(names) == 1 else names,  # type: ignore[arg-type]
    )
    plan.save(out, overwrite=overwrite)
    table = Table("stage", "precision", "int8 layers", "largest error", "weights, KiB")
    for stage in plan.stages:
        errors = stage.layer_errors
        largest = f"{max(errors):.1%}" if errors else ""
        table.add_row(
            plain(stage.name), stage.precision, str(len(errors)), largest, f"{stage.weight_bytes / 1024:,.0f}"
        )
    Console().print(table)
    say("saved:", str(out))
    if plan.operating_points:
        say("note:", f"its operating points are those of fp32; now run: fastcascade calibrate {out} DATA …")


@app.command(epilog="Example: fastcascade export model/ --onnx exported/")
def export(
    model: Model,
    onnx: Annotated[Path, typer.Option(metavar="DIR", help="where the ONNX models go")],
    overwrite: Overwrite = False,
) -> None:
    """Write a cascade as ONNX models: one for single images, and one per stage with a script for batches."""
    from fastcascade.interchange.onnx_model import export_onnx
    from fastcascade.lowering.export import plan as lower
    from fastcascade.lowering.plan import Plan

    loaded = _load_model(model)
    for path in export_onnx(loaded if isinstance(loaded, Plan) else lower(loaded), onnx, overwrite=overwrite):
        say("wrote", str(path))


@app.command(epilog="Example: fastcascade choose pool.npz --budget 3e7")
def choose(
    pool: Annotated[
        Path,
        typer.Argument(
            metavar="POOL",
            help="npz file with logits (K, N, C), labels (N,), macs (K,) and, if you like, names (K,)",
        ),
    ],
    budget: Annotated[
        list[float] | None, typer.Option(help="mean cost per image; again for more; a curve if left out")
    ] = None,
    max_stages: Annotated[int, typer.Option(min=1, max=5, help="longest cascade")] = 3,
    folds: Annotated[int, typer.Option(min=2, help="of the cross-validation")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Which of many trained classifiers make the best cascade, from what they say on held-out images."""
    import dataclasses

    from fastcascade.evaluation.stage_choice import read_pool, stage_choices

    choices = stage_choices(**read_pool(pool), budgets=budget, max_stages=max_stages, folds=folds)
    if as_json:
        print(json.dumps([dataclasses.asdict(choice) for choice in choices], indent=1))
        return
    table = Table("budget", "stages", "combine", "thresholds", "held-out accuracy", "mean cost", "stop at")
    for c in choices:
        combine = c.combine if isinstance(c.combine, str) else " : ".join(f"{w:.2g}" for w in c.combine)
        table.add_row(
            f"{c.budget_macs:,.0f}",
            printable(" → ".join(c.names)),
            combine,
            " ".join(f"{t:.3f}" for t in c.thresholds),
            f"{c.held_out_accuracy:.2%}",
            f"{c.held_out_macs:,.0f}",
            " ".join(f"{share:.0%}" for share in c.exit_shares),
        )
    Console().print(table)


OPTIONAL = {
    "pyarrow": "Parquet",
    "Pillow": "image files",
    "simplejpeg": "faster decoding of JPEG",
    "matplotlib": "pictures of the cost–accuracy curve",
    "onnx": "ONNX files, read and written",
    "triton": "the triton backend",
    "cupy": "the cuda backend",
    "cuda-bindings": "torch stages on the GPU without reading a count back",
}
"""Package → feature that needs it."""


@app.command(epilog="Example: fastcascade doctor")
def doctor() -> None:
    """Print versions, the CPU, each backend or why it cannot run, and missing optional packages."""
    import torch

    from fastcascade.backends.registry import NAMES, load_backend

    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"fastcascade {version('fastcascade')}, Python {platform.python_version()}, {platform.platform()}"
    )
    isa = torch.backends.cpu.get_cpu_capability()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU with {isa}")
    console.print(plain(f"bf16: {_bf16_state()}"))
    for variable in ("FASTCASCADE_BACKEND", "FASTCASCADE_ISA", "FASTCASCADE_STAGES"):
        if variable in os.environ:
            console.print(plain(f"{variable}={os.environ[variable]} is set and overrides the choice"))
    backends = Table("backend", "state", title="backends, in the order in which auto tries them")
    for name in NAMES:
        backends.add_row(name, plain(load_backend(name).unavailable_reason() or "ready"))
    packages = Table("package", "version", "needed for", title="optional packages")
    for name, use in OPTIONAL.items():
        packages.add_row(name, _version(name) or "missing", use)
    console.print(backends)
    console.print(packages)


def _bf16_state() -> str:
    """Whether the engine can run in bf16, or why not."""
    try:
        from fastcascade import _C

        return _C.bf16_refusal() or "ready"
    except (ImportError, ValueError) as error:
        return str(error)


def _version(package: str) -> str | None:
    """Installed version; cupy's packages have the CUDA version in their name."""
    for name in (package, f"{package}-cuda13x", f"{package}-cuda12x"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


@app.command(epilog="Example: fastcascade download cifar10 data/")
def download(
    name: Annotated[Literal["cifar10", "cifar100"], typer.Argument(help="which data set")],
    directory: Annotated[Path, typer.Argument(help="destination directory")],
    url: Annotated[str | None, typer.Option(help="mirror of the official archive")] = None,
) -> None:
    """Download a data set from its home page or a mirror, verify it and print its path."""
    from fastcascade.data.archives import download as fetch

    print(printable(str(fetch(name, directory, url))))
