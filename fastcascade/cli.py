"""The command line: ``fastcascade train``, ``calibrate``, ``evaluate``, ``predict``, ``bench``, ``report``…

Results go to standard output, progress and remarks to standard error. A :class:`FastCascadeError` ends a
command with its message and exit status 1, a malformed command line with status 2. Each command imports
what it needs itself, so that help and errors come at once.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastcascade.errors import FastCascadeError, InvalidArgument

if TYPE_CHECKING:
    from fastcascade.benchmarking.runner import Benchmark
    from fastcascade.data.image_data import ImageData
    from fastcascade.engine import CompiledCascade
    from fastcascade.lowering.plan import Plan
    from fastcascade.model.cascade import Cascade
    from fastcascade.prediction.predictions import Prediction
    from fastcascade.types import OperatingPoint

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
    try:
        app()
    except FastCascadeError as error:
        say("error:", str(error))
        sys.exit(1)


def say(kind: str, message: str) -> None:
    """One remark on standard error. It may quote file names, so control characters do not get through."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble((kind, "bold"), " ", printable(message)))


def printable(text: str) -> str:
    """Text without terminal escapes and other control characters, which a name from outside may carry.

    Example:
        >>> printable("cat\\x1b[2J.png")
        'cat�[2J.png'
    """
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "�", text)


##### What several commands take

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="directory of a saved cascade or plan")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="an npz file, a folder of images, or cifar10:DIR, cifar100:DIR, npz:FILE, folder:DIR",
    ),
]
Split = Annotated[Literal["train", "test"] | None, typer.Option(help="part of a divided data set")]
RowRange = Annotated[str | None, typer.Option("--rows", metavar="START:STOP", help="only these images")]
Resize = Annotated[
    bool, typer.Option("--resize", help="scale images of other sizes instead of refusing them")
]
Point = Annotated[str | None, typer.Option("--operating-point", "-p", help='name; "default" if left out')]
Threads = Annotated[int | None, typer.Option(min=1, help="threads; as many as PyTorch uses if left out")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]
Backend = Annotated[str, typer.Option(help="auto, or one that `fastcascade doctor` lists")]
Precision = Annotated[Literal["fp32", "fp16"], typer.Option(help="of the stages' arithmetic")]


def _load_images(
    source: str, described: Cascade | Plan, split: Split = None, rows: str | None = None, resize: bool = False
) -> ImageData:
    """Images of the size that the cascade takes, with its label order."""
    from fastcascade.data.sources import load_data

    data = load_data(source, split, shape=described.input.shape, resize=resize, classes=described.classes)
    return data if rows is None else data.take(_row_range(rows, len(data)))


def _row_range(text: str, n: int) -> range:
    """``START:STOP`` as positions among n; either may be missing, as in a slice."""
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if match is None:
        raise InvalidArgument(f"--rows is {text!r}; expected START:STOP, for example 47500:50000")
    chosen = range(int(match[1] or 0), int(match[2] or n))
    if not chosen or chosen.stop > n:
        raise InvalidArgument(f"--rows is {text!r}; expected a stretch of the {n} images there are")
    return chosen


def _load_model(directory: Path) -> Cascade | Plan:
    """What a directory holds; a saved cascade is preferred to a plan beside it."""
    import fastcascade as fc

    if not (directory / "cascade.json").exists() and (directory / "plan.json").exists():
        return fc.load_plan(directory)
    return fc.load(directory)


def _compile(directory: Path, backend: str, precision: Precision, threads: int | None) -> CompiledCascade:
    import fastcascade as fc

    return fc.compile(_load_model(directory), backend=backend, precision=precision, threads=threads)


##### Commands


@app.command(epilog="Example: fastcascade train examples/cifar10/config.toml cifar10:data --out run/")
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file; see examples/cifar10/config.toml")
    ],
    data: Source,
    out: Annotated[Path, typer.Option(help="receives checkpoint/ while training and model/ at the end")],
    overwrite: Overwrite = False,
) -> None:
    """Train, calibrate and save a cascade; the same command again goes on where it was stopped."""
    from fastcascade.training.config import train_from_config

    cascade = train_from_config(config, data, out, overwrite=overwrite)
    Console().print(operating_points_table(cascade.operating_points, cascade.dense_macs))
    say("saved:", str(out / "model"))


@app.command(epilog="Example: fastcascade predict model/ folder:photos --output photos.parquet")
def predict(
    model: Model,
    data: Source,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=".parquet, .jsonl or .csv; JSON lines on standard output if left out"
        ),
    ] = None,
    operating_point: Point = None,
    split: Split = None,
    rows: RowRange = None,
    resize: Resize = False,
    backend: Backend = "auto",
    precision: Precision = "fp32",
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Classify images: a row each with label, class name, score, exit and cost, or with an error."""
    from fastcascade.prediction.predictions import (
        check_destination,
        predictions,
        save_predictions,
        write_json_lines,
    )

    if output is not None:
        check_destination(output, overwrite)
    compiled = _compile(model, backend, precision, threads)
    images = _load_images(data, compiled.plan, split, rows, resize)
    compiled.plan.thresholds(operating_point)  # an unknown name is told before the bar appears
    tally = Tally(len(images))
    answers = tally.watch(predictions(compiled, images, operating_point))
    if output is None:
        write_json_lines(answers, sys.stdout.buffer)
    else:
        save_predictions(answers, output, overwrite)
    say("done:", tally.summary())


class Tally:
    """Counts predictions while they pass, behind a progress bar on standard error."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.errors = 0
        self.cost = 0
        self.exits: Counter[int] = Counter()
        self.seconds = 0.0

    def watch(self, batches: Iterable[list[Prediction]]) -> Iterator[list[Prediction]]:
        """The same batches, counted."""
        start = time.perf_counter()
        columns = (TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=self.total)
            for batch in batches:
                self.errors += sum(p.error is not None for p in batch)
                self.exits.update(p.exit for p in batch if p.exit is not None)
                self.cost += sum(p.cost_macs or 0 for p in batch)
                bar.advance(task, len(batch))
                yield batch
        self.seconds = time.perf_counter() - start

    def summary(self) -> str:
        """One line for the end."""
        ran = max(1, self.exits.total())
        shares = " / ".join(f"{self.exits[k] / ran:.1%}" for k in range(max(self.exits, default=0) + 1))
        return (
            f"{self.total:,} images in {self.seconds:.1f} s, {self.errors:,} with an error; "
            f"mean cost {self.cost / ran / 1e6:.2f} M MACs; stopped at exits {shares}"
        )


@app.command(epilog="Example: fastcascade evaluate model/ cifar10:data --curve curve.png")
def evaluate(
    model: Model,
    data: Source,
    operating_point: Annotated[
        list[str] | None, typer.Option("-p", "--operating-point", help="again for more; all if left out")
    ] = None,
    split: Split = None,
    rows: RowRange = None,
    resize: Resize = False,
    backend: Backend = "auto",
    precision: Precision = "fp32",
    threads: Threads = None,
    curve: Annotated[
        Path | None, typer.Option(help="draw the cost–accuracy curve to this .png or .svg file")
    ] = None,
) -> None:
    """Accuracy, mean cost and the exits' shares on labelled images."""
    import fastcascade as fc

    compiled = _compile(model, backend, precision, threads)
    images = _load_images(data, compiled.plan, split, rows, resize)
    names: list[str | None] = list(operating_point or compiled.plan.operating_points) or [None]
    table = Table(
        "operating point", "accuracy", "mean MACs", "of dense", "stop at each exit", "accuracy there"
    )
    for name in names:
        result = fc.evaluate(compiled, images, name)
        table.add_row(
            printable(name or "default"),
            f"{result.accuracy:.2%}",
            f"{result.mean_macs:,.0f}",
            f"{result.mean_macs / compiled.plan.dense_macs:.1%}",
            " ".join(f"{share:.1%}" for share in result.exit_shares),
            " ".join(f"{accuracy:.1%}" for accuracy in result.exit_accuracy),
        )
    Console().print(table)
    if curve is not None:
        from fastcascade.evaluation.curve import cost_accuracy_curves, plot_curves

        plot_curves(cost_accuracy_curves(fc.load(model), images), curve)


@app.command(
    epilog="Example: fastcascade calibrate model/ cifar10:data --split train --rows 47500: --name fast "
    "--budget-macs 2e7"
)
def calibrate(
    model: Model,
    data: Source,
    name: Annotated[str, typer.Option(help="what to call the operating point")] = "default",
    budget_macs: Annotated[float | None, typer.Option(help="highest accuracy at this mean cost")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="lowest cost at this accuracy, 0 to 1")] = None,
    max_risk: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="EPS DELTA",
            help="labels differ from the last exit's at a rate ≤ EPS, with probability ≥ 1 − DELTA",
        ),
    ] = None,
    split: Split = None,
    rows: RowRange = None,
    resize: Resize = False,
) -> None:
    """Choose stop thresholds on held-out images and store them in the saved cascade. Give one target."""
    import fastcascade as fc

    cascade = fc.load(model)
    images = _load_images(data, cascade, split, rows, resize)
    point = fc.calibrate(
        cascade, images, name, budget_macs=budget_macs, min_accuracy=min_accuracy, max_risk=max_risk
    )
    cascade.save(model, overwrite=True)
    Console().print(operating_points_table({name: point}, cascade.dense_macs))


def operating_points_table(points: Mapping[str, OperatingPoint], dense_macs: int) -> Table:
    """Stored operating points with what was measured when they were chosen."""
    table = Table("operating point", "thresholds", "accuracy", "risk", "mean MACs", "of dense", "images")
    for name, point in points.items():
        table.add_row(
            printable(name),
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
    str, typer.Option("--threads", metavar="N,N,…", help="threads; more than one number compares them")
]
Peers = Annotated[bool, typer.Option("--peers", help="time plain PyTorch in the same run")]


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """``1,8,64`` as numbers; nothing for an empty text."""
    if not re.fullmatch(r"(|[1-9]\d*(,[1-9]\d*)*)", text):
        raise InvalidArgument(f"{option} is {text!r}; expected numbers from 1, for example 1,8,64")
    return tuple(map(int, text.split(","))) if text else ()


@app.command(
    epilog="Example: fastcascade bench model/ npz:test-images.npz --batch 1,256 --threads 1,2 --peers"
)
def bench(
    model: Model,
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help="images; noise if left out")] = None,
    batch: Sizes = "1,8,64,256",
    operating_point: Point = None,
    backend: Backend = "auto",
    precision: Precision = "fp32",
    threads: ThreadCounts = "",
    peers: Peers = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Where the time goes: each stage alone, the exits, the schedule, whole batches."""
    from fastcascade.benchmarking.tables import bench_tables

    measured = _measure(model, data, batch, operating_point, backend, precision, threads, peers)
    if as_json:
        print(json.dumps(measured.to_json(), indent=1))
    else:
        Console().print(*bench_tables(measured))


@app.command(epilog="Example: fastcascade report model/ npz:test-images.npz --out report/")
def report(
    model: Model,
    data: Source,
    out: Annotated[Path, typer.Option(help="directory for report.html and its pictures")],
    batch: Sizes = "1,8,64,256",
    operating_point: Point = None,
    backend: Backend = "auto",
    precision: Precision = "fp32",
    threads: ThreadCounts = "",
    peers: Peers = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure a cascade on labelled images and write one HTML page about it; print where it is."""
    import fastcascade as fc
    from fastcascade.benchmarking.report import write_report
    from fastcascade.evaluation.curve import cost_accuracy_curves

    measured = _measure(model, data, batch, operating_point, backend, precision, threads, peers)
    cascade = fc.load(model)
    images = _load_images(data, cascade)
    compiled = _compile(model, backend, precision, next(iter(_numbers("--threads", threads)), None))
    evaluation = fc.evaluate(compiled, images, operating_point)
    curves = cost_accuracy_curves(cascade, images)
    print(write_report(out, measured, evaluation, curves, title=model.resolve().name, overwrite=overwrite))


def _measure(
    model: Path,
    data: str | None,
    batch: str,
    operating_point: str | None,
    backend: str,
    precision: Precision,
    threads: str,
    peers: bool,
) -> Benchmark:
    from fastcascade.benchmarking.runner import benchmark

    loaded = _load_model(model)
    return benchmark(
        loaded,
        None if data is None else _load_images(data, loaded),
        batches=_numbers("--batch", batch) or (1,),
        threads=_numbers("--threads", threads),
        operating_point=operating_point,
        backend=backend,
        precision=precision,
        peers=peers,
    )


@app.command(epilog="Example: fastcascade inspect model/")
def inspect(model: Model) -> None:
    """Print a saved cascade or plan: stages with their operations and costs, and the operating points."""
    from fastcascade.lowering.export import plan as lower
    from fastcascade.lowering.plan import Plan

    loaded = _load_model(model)
    described = loaded if isinstance(loaded, Plan) else lower(loaded)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for line in str(described).splitlines():
        console.print(printable(line))
    if described.classes is not None:
        console.print("classes:", ", ".join(printable(name) for name in described.classes))
    if described.operating_points:
        console.print(operating_points_table(described.operating_points, described.dense_macs))


OPTIONAL = {
    "pyarrow": "Parquet output",
    "Pillow": "folders of images",
    "matplotlib": "pictures of the cost–accuracy curve",
    "triton": "the triton backend",
    "cupy": "the cuda backend",
    "cuda-bindings": "GPU stages through torch without reading a count back",
}
"""Package → what does not work without it."""


@app.command(epilog="Example: fastcascade doctor")
def doctor() -> None:
    """Print versions, the processor, every backend with its reason if it cannot run, and what is missing."""
    import torch

    from fastcascade.backends.registry import NAMES, load_backend

    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"fastcascade {version('fastcascade')}, Python {platform.python_version()}, {platform.platform()}"
    )
    isa = torch.backends.cpu.get_cpu_capability()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU with {isa}")
    for variable in ("FASTCASCADE_BACKEND", "FASTCASCADE_ISA", "FASTCASCADE_STAGES"):
        if variable in os.environ:
            console.print(
                f"{variable}={printable(os.environ[variable])} is set: it is used or an error, never replaced"
            )
    backends = Table("backend", "state", title="backends, in the order in which auto tries them")
    for name in NAMES:
        backends.add_row(name, load_backend(name).unavailable_reason() or "ready")
    packages = Table("package", "version", "needed for", title="optional packages")
    for name, use in OPTIONAL.items():
        packages.add_row(name, _version(name) or "missing", use)
    console.print(backends)
    console.print(packages)


def _version(package: str) -> str | None:
    """Installed version; cupy's wheels carry the CUDA version in their name."""
    for name in (package, f"{package}-cuda13x", f"{package}-cuda12x"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


@app.command(epilog="Example: fastcascade download cifar10 data/")
def download(
    name: Annotated[Literal["cifar10", "cifar100"], typer.Argument(help="which data set")],
    directory: Annotated[Path, typer.Argument(help="where to put it")],
) -> None:
    """Fetch a data set from its home page, checked; print where it is."""
    from fastcascade.data.archives import download as fetch

    print(fetch(name, directory))
