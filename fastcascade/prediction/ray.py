"""Prediction on a Ray cluster: :func:`predict` for data sets, :func:`predict_to_folder` for overnight runs.

Both use Ray Data's pools of actors with one engine each. The plan goes into the object store once, from where
every machine takes one copy. A run into a folder sends only the numbers of parts to the workers, which read
the images and write the parts themselves; what comes back is a part's size, hash and counts. The driver lists
the parts as a local run does, so that either kind of run continues the other, and a part that a killed worker
had begun is written anew under the same name.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fastcascade.data.image_data import ImageData, ImageReader
from fastcascade.data.sources import Split, load_inputs
from fastcascade.engine import CompiledCascade, compile
from fastcascade.errors import DataError, FastCascadeError, InvalidArgument
from fastcascade.lowering.plan import Plan
from fastcascade.lowering.plan_file import load_plan
from fastcascade.model.cascade import Cascade
from fastcascade.prediction import predictor
from fastcascade.prediction.inputs import image_batches, pieces, rows_per_batch
from fastcascade.prediction.pipeline import Waits, classified
from fastcascade.prediction.runs import Part, RunOptions, Tally, complete, opened_run, write_part
from fastcascade.types import OperatingPointLike

__all__ = ["Images", "predict", "predict_to_folder"]

_BLOCKS = 10_000
"""Pieces in which the numbers of parts travel, at most."""


def predict(
    dataset: Any,
    model: CompiledCascade | Cascade | Plan | str | Path,
    operating_point: OperatingPointLike = None,
    top_k: int = 0,
    resize: bool = True,
    column: str = "image",
    workers: int | None = None,
    cpus: int = 1,
    gpus: float = 0,
    batch_size: int = 256,
) -> Any:
    """Classify the images of a Ray data set.

    Args:
        dataset: a ``ray.data.Dataset``.
        model: what :func:`fastcascade.compile` accepts, or a compiled cascade.
        operating_point: as for :func:`fastcascade.predict`.
        top_k: number of most probable classes to keep per image.
        resize: scale uint8 images of other sizes; if False, they are errors.
        column: holds the images: arrays (H, W, C), as ``ray.data.read_images`` reads them; encoded bytes;
            paths; or Hugging Face's structs of both.
        workers: number of actors; by default, as many as the cluster has room for.
        cpus: of each worker, which runs so many threads.
        gpus: of each worker; above 0, the model runs on one.
        batch_size: rows that a worker gets at a time.

    Returns:
        a lazy ``ray.data.Dataset`` with the other columns of ``dataset`` and those of
        :class:`fastcascade.prediction.predictions.Prediction` but the id. Rows that cannot be read have an
        error.

    Raises:
        InvalidArgument: Ray is missing, or an unknown operating point.
        LoweringError: a stage is opaque, so that the plan cannot travel.
    """
    ray = _ray()
    _require_pool(workers, cpus)
    compiled = model if isinstance(model, CompiledCascade) else compile(model)
    thresholds = compiled.thresholds(operating_point).tolist()
    travelling = _TravellingModel.of(compiled, cpus, "cuda" if gpus else "cpu")
    # By default the pool grows while there is room, because reading the images needs CPUs, too.
    size = {"size": workers} if workers else {"min_size": 1, "max_size": _room(cpus, gpus)}
    pool = ray.data.ActorPoolStrategy(**size)
    return dataset.map_batches(
        _Classifier,
        batch_format="pyarrow",
        batch_size=batch_size,
        fn_constructor_args=(travelling, column, thresholds, top_k, resize),
        compute=pool,
        num_cpus=cpus,
        num_gpus=gpus,
    )


@dataclass(frozen=True)
class Images:
    """Arguments of :func:`fastcascade.data.sources.load_inputs`, and which rows; every worker opens them.

    Attributes:
        rows: (start, stop); None for all.
    """

    source: str | Sequence[str]
    shape: tuple[int, int, int]
    resize: bool = True
    split: Split | None = None
    rows: tuple[int, int] | None = None

    def load(self) -> ImageData:
        """Open the images."""
        data = load_inputs(self.source, self.shape, self.resize, self.split)
        return data if self.rows is None else data.take(range(*self.rows))


def predict_to_folder(
    model: CompiledCascade,
    images: Images,
    folder: str | Path,
    operating_point: OperatingPointLike = None,
    options: RunOptions | None = None,
    started: Callable[[Tally, Waits], None] | None = None,
    watch: Callable[[Tally], None] | None = None,
    address: str | None = None,
    workers: int | None = None,
    cpus: int = 1,
) -> Tally:
    """:func:`fastcascade.prediction.runs.predict_to_folder` with workers on a Ray cluster.

    Rows, files, manifest and continuation are the same. All machines must see the images and the folder under
    the same paths, as on a network file system.

    Args:
        images: what to classify.
        address: of a cluster; None uses the one that this process is connected to, or starts one here.
        workers: number of actors; by default, as many as the cluster has room for.
        cpus: of each worker, which runs so many threads.

    Raises:
        InvalidArgument: Ray is missing, or as for a local run.
        LoweringError: a stage is opaque, so that the plan cannot travel.
        DataError: as for a local run.
        SaveError: as for a local run.
        FastCascadeError: Ray gave up, for example because workers find other images than the driver.
    """
    ray = _ray()
    _require_pool(workers, cpus)
    options = RunOptions() if options is None else options
    data = images.load()
    with opened_run(model, data, folder, operating_point, options) as run:

        def parts(_: Waits) -> Generator[Tally, None, None]:
            if not (pending := run.pending(len(data))):
                return
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False)
                ray.data.DataContext.get_current().enable_progress_bars = False  # the run has its own
            thresholds = model.thresholds(operating_point).tolist()
            travelling = _TravellingModel.of(model, cpus, str(model.device))
            work = _Work(images, _fingerprint(data), thresholds, options, os.getcwd(), str(folder))
            numbers = [{"part": number} for number in pending]
            blocks = min(_BLOCKS, len(numbers))
            written = ray.data.from_items(numbers, override_num_blocks=blocks).map_batches(
                _PartWriter,
                batch_size=1,
                fn_constructor_args=(travelling, work),
                compute=ray.data.ActorPoolStrategy(size=workers or _room(cpus, 0)),
                num_cpus=cpus,
            )
            try:
                for row in written.iter_rows():
                    if row["error"]:
                        raise DataError(row["error"])
                    part = Part.of_json(json.loads(row["part"]), run.num_exits)
                    run.record(part)
                    yield part.tally
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise FastCascadeError(
                    f"Ray ended the run: {reason}. Complete parts stay; repeat it"
                ) from error

        return complete(run, len(data), parts, started, watch)


def _fingerprint(data: ImageData) -> str:
    return data.images.fingerprint() if isinstance(data.images, ImageReader) else ""


def _ray() -> ModuleType:
    try:
        import_module("ray.data")
        return import_module("ray")
    except ImportError as error:
        raise InvalidArgument("Ray is not installed: pip install 'fastcascade[ray]'") from error


def _require_pool(workers: int | None, cpus: int) -> None:
    if cpus < 1 or (workers is not None and workers < 1):
        raise InvalidArgument(f"got {workers} workers of {cpus} CPUs; expected at least 1 of each")


def _room(cpus: int, gpus: float) -> int:
    """Workers that the cluster has room for, at least one; it is connected."""
    resources = _ray().cluster_resources()
    room = [resources.get("CPU", 1) // cpus, *([resources.get("GPU", 0) // gpus] if gpus else [])]
    return max(1, int(min(room)))


@dataclass(frozen=True)
class _TravellingModel:
    """A compiled cascade as a worker gets it: the files of its plan in the object store, and its settings."""

    files: Any
    backend: str
    precision: Any
    device: str
    threads: int

    @classmethod
    def of(cls, model: CompiledCascade, threads: int, device: str) -> _TravellingModel:
        with tempfile.TemporaryDirectory() as folder:
            model.plan.save(folder)
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return cls(_ray().put(files), model.backend, model.precision, device, threads)

    def compiled(self) -> CompiledCascade:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in _ray().get(self.files).items():
                Path(folder, name).write_bytes(content)
            plan = load_plan(folder)
        return compile(plan, self.backend, self.precision, self.device, self.threads)


class _Classifier:
    """An actor that classifies the rows it is sent."""

    def __init__(
        self, model: _TravellingModel, column: str, thresholds: list[float], top_k: int, resize: bool
    ) -> None:
        self.model = model.compiled()
        self.column, self.thresholds, self.top_k, self.resize = column, thresholds, top_k, resize

    def __call__(self, table: Any) -> Any:
        items = [_item(cell.as_py()) for cell in table.column(self.column)]
        found = predictor.predict(self.model, items, self.thresholds, self.top_k, self.resize).to_arrow()
        result = table.drop_columns([self.column])
        for name in found.column_names[1:]:
            result = result.append_column(name, found.column(name))
        return result


def _item(cell: Any) -> Any:
    """A cell as :func:`fastcascade.predict` reads it."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    return DataError("is missing") if cell is None else cell


class _Work(NamedTuple):
    """What a worker does, apart from the model: ``cwd`` is the driver's, to which relative paths refer."""

    images: Images
    fingerprint: str
    thresholds: list[float]
    options: RunOptions
    cwd: str
    folder: str


class _PartWriter:
    """An actor that classifies whole parts of a run and writes their files."""

    def __init__(self, model: _TravellingModel, work: _Work) -> None:
        os.chdir(work.cwd)
        self.model, self.data, self.work = model.compiled(), work.images.load(), work
        if _fingerprint(self.data) != work.fingerprint:
            raise DataError(
                f"a worker finds other images than the driver at {work.images.source!r}; share them"
            )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        written, errors = [], []
        for number in batch["part"].tolist():
            try:
                written.append(json.dumps(self._write(number).to_json()))
                errors.append("")
            except DataError as error:  # Ray would repeat what raises
                written.append("")
                errors.append(str(error))
        return {"part": written, "error": errors}

    def _write(self, number: int) -> Part:
        options, plan = self.work.options, self.model.plan
        spans = pieces(number, len(self.data), options.rows_per_file, rows_per_batch(plan.input))
        found = []
        batches = image_batches(self.data, spans)
        for predictions in classified(self.model, batches, self.work.thresholds, options.top_k):
            if options.strict:
                predictions.require_no_errors()
            found.append(predictions)
        return write_part(Path(self.work.folder), number, found, options.format, len(plan.stages))
