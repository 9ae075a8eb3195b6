"""Runs: predictions of a large set, in a folder of files, that continue after a kill.

A run cuts its inputs into parts of a fixed number of rows. Each part becomes one file, written atomically,
and then one line of ``_progress.jsonl`` with the file's size and sha256. A part is done if both agree, so
after a kill at any moment every part is done or is written again as a whole. ``_run.json`` holds what decides
the rows: model, inputs and options. A run with others is refused. ``_manifest.json`` is written last and
replaces both. Readers of Parquet folders skip names that begin with an underscore or a dot.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from fastcascade.data.image_data import Array, ImageData, ImageReader
from fastcascade.engine import CompiledCascade
from fastcascade.errors import DataError, FileFormatError, InvalidArgument, SaveError
from fastcascade.lowering.plan_file import plan_fingerprint
from fastcascade.prediction.inputs import image_batches, pieces, rows_per_batch
from fastcascade.prediction.pipeline import Waits, classified
from fastcascade.prediction.predictions import Predictions
from fastcascade.prediction.writers import WRITERS, Format, check_destination, join_files, require_format
from fastcascade.storage.files import (
    exclusive,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    remove_leftovers,
    write_atomically,
)
from fastcascade.types import OperatingPointLike

__all__ = [
    "ROWS_PER_FILE",
    "Part",
    "Run",
    "RunOptions",
    "Tally",
    "complete",
    "opened_run",
    "predict_to_file",
    "predict_to_folder",
    "write_part",
]

ROWS_PER_FILE = 16_384

_RUN, _PROGRESS, _MANIFEST, _LOCK = "_run.json", "_progress.jsonl", "_manifest.json", ".lock"
_PART = re.compile(r"part-(\d{5,})\.(parquet|jsonl|csv)")
_MAX_PROGRESS_BYTES = 2**30


@dataclass(frozen=True)
class RunOptions:
    """Options of a run.

    Attributes:
        top_k: number of most probable classes per row; 0 leaves out their columns.
        format: of the files.
        rows_per_file: inputs per file.
        strict: end at the first input that cannot be read.
        overwrite: replace the run of another model, other inputs or options; the same run still continues.
    """

    top_k: int = 0
    format: Format = "parquet"
    rows_per_file: int = ROWS_PER_FILE
    strict: bool = False
    overwrite: bool = False


@dataclass
class Tally:
    """Counts over the rows of a run.

    Attributes:
        rows: number of inputs.
        errors: how many of them have an error.
        exits: number that stopped at each exit.
        cost_macs: sum of their costs.
    """

    rows: int
    errors: int
    exits: list[int]
    cost_macs: int

    @classmethod
    def of(cls, predictions: Predictions, num_exits: int) -> Tally:
        """Count some rows."""
        ran = predictions.exit_stage[predictions.exit_stage >= 0]
        exits = [int((ran == k).sum()) for k in range(num_exits)]
        return cls(len(predictions), len(predictions.errors), exits, int(predictions.cost_macs.sum()))

    def __iadd__(self, other: Tally) -> Tally:
        self.rows += other.rows
        self.errors += other.errors
        self.exits = [a + b for a, b in zip(self.exits, other.exits, strict=True)]
        self.cost_macs += other.cost_macs
        return self


class Part(NamedTuple):
    """A complete file: its number, size and sha256, and the counts of its rows."""

    number: int
    bytes: int
    sha256: str
    tally: Tally

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which :meth:`of_json` makes the part again."""
        return {"part": self.number, "bytes": self.bytes, "sha256": self.sha256, **asdict(self.tally)}

    @classmethod
    def of_json(cls, value: Mapping[str, Any], num_exits: int) -> Part:
        """Raises KeyError, TypeError or ValueError if the value is not a part."""
        exits = [int(n) for n in value["exits"]]
        if len(exits) != num_exits:
            raise ValueError("another number of exits")
        tally = Tally(int(value["rows"]), int(value["errors"]), exits, int(value["cost_macs"]))
        return cls(int(value["part"]), int(value["bytes"]), str(value["sha256"]), tally)


def predict_to_folder(
    model: CompiledCascade,
    data: ImageData,
    folder: str | Path,
    operating_point: OperatingPointLike = None,
    options: RunOptions | None = None,
    started: Callable[[Tally, Waits], None] | None = None,
    watch: Callable[[Tally], None] | None = None,
) -> Tally:
    """Classify an image set into a folder of files; called again after a kill, it continues.

    Args:
        folder: created if missing. It holds ``part-00000.parquet`` and so on, in the order of the inputs, and
            ``_manifest.json`` when the run is complete.
        started: called once, with the counts of the parts that were done before, and with the record of where
            the time goes, which is updated meanwhile.
        watch: called with the counts of every batch.

    Returns:
        the counts of the whole run. A complete run is not repeated.

    Raises:
        InvalidArgument: the folder holds other files, or the run of another model, other inputs or other
            options; or another process works in it.
        DataError: with ``strict``, an input cannot be read; or a file of the inputs changed meanwhile.
        SaveError: the operating system reported an error. Complete parts stay; the same call continues.
    """
    options = RunOptions() if options is None else options
    with opened_run(model, data, folder, operating_point, options) as run:
        return complete(run, len(data), partial(run.classify, model, data, operating_point), started, watch)


def predict_to_file(
    model: CompiledCascade,
    data: ImageData,
    path: str | Path,
    operating_point: OperatingPointLike = None,
    options: RunOptions | None = None,
    started: Callable[[Tally, Waits], None] | None = None,
    watch: Callable[[Tally], None] | None = None,
) -> Tally:
    """The same into one file, which appears when it is complete.

    Meanwhile the run is in the folder ``NAME.parts`` beside the file. Called again after a kill, it continues
    there. The folder is removed when its parts have been copied into the file.

    Args:
        path: the suffix selects the format: ``.parquet``, ``.jsonl`` or ``.csv``.
        options: ``format`` is that of the suffix; ``overwrite`` also replaces an existing file.
        started: as for :func:`predict_to_folder`.
        watch: as for :func:`predict_to_folder`.

    Raises:
        InvalidArgument: as for :func:`predict_to_folder`, an unknown suffix, or the file exists.
        DataError, SaveError: as for :func:`predict_to_folder`.
    """
    path, options = Path(path), RunOptions() if options is None else options
    options = replace(options, format=check_destination(path, options.overwrite))
    parts = path.with_name(f"{path.name}.parts")
    with opened_run(model, data, parts, operating_point, options) as run:
        tally = complete(run, len(data), partial(run.classify, model, data, operating_point), started, watch)
        files = [run.path(number) for number in sorted(run.parts)]
        write_atomically(
            path, lambda file: join_files(files, options.format, file), overwrite=options.overwrite
        )
        shutil.rmtree(parts, ignore_errors=True)
    return tally


@contextlib.contextmanager
def opened_run(
    model: CompiledCascade,
    data: ImageData,
    folder: str | Path,
    operating_point: OperatingPointLike,
    options: RunOptions,
) -> Iterator[Run]:
    """The run in a folder, which is locked meanwhile."""
    thresholds = model.thresholds(operating_point)
    if options.rows_per_file < 1:
        raise InvalidArgument(f"rows_per_file is {options.rows_per_file}; expected at least 1")
    require_format(options.format)
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise InvalidArgument(f"{folder} is a file; expected a folder, or the name of a new one")
    settings = _settings(model, data, [str(t) for t in thresholds.tolist()], options)
    with exclusive(folder / _LOCK, wait=False):
        run = Run(folder, settings, options, len(model.plan.stages))
        run.open()
        yield run


def complete(
    run: Run,
    n: int,
    work: Callable[[Waits], Generator[Tally, None, None]],
    started: Callable[[Tally, Waits], None] | None,
    watch: Callable[[Tally], None] | None,
) -> Tally:
    """Do what is left of a run.

    Args:
        n: number of inputs.
        work: classifies what is left; yields the counts of rows, and records parts.
    """
    tally, waits = run.done_tally(), Waits()
    if run.options.strict and tally.errors:
        raise DataError(f"{tally.errors} inputs in {run.folder} have an error, and the run is strict")
    if started is not None:
        started(tally, waits)
    if run.is_complete(n):
        return tally
    run.begin()
    with contextlib.closing(work(waits)) as counts:
        for counted in counts:
            tally += counted
            if watch is not None:
                watch(counted)
    run.finish(n)
    return tally


def write_part(
    folder: Path, number: int, batches: Sequence[Predictions], name: Format, num_exits: int
) -> Part:
    """Write the file of a part.

    Raises:
        SaveError: the operating system reported an error.
    """
    path = folder / _part_name(number, name)
    write_atomically(path, lambda file: WRITERS[name](batches, file))
    found = _file_hash(path)
    if found is None:
        raise SaveError(f"{path} vanished while it was written; only one run may use a folder")
    return Part(number, *found, Tally.of(Predictions.join(batches), num_exits))


def _part_name(number: int, name: Format) -> str:
    return f"part-{number:05d}.{name}"


def _settings(
    model: CompiledCascade, data: ImageData, thresholds: list[str], options: RunOptions
) -> dict[str, Any]:
    """All that decides the rows; the keys are what a refusal names."""
    images = data.images
    return {
        "model": plan_fingerprint(model.plan),
        "operating point": thresholds,
        "backend": model.backend,
        "precision": model.precision,
        "images": images.fingerprint() if isinstance(images, ImageReader) else _array_hash(images),
        "number of images": len(data),
        "size of images": list(model.plan.input.shape),
        "resize": isinstance(images, ImageReader) and images.resize,
        "top-k": options.top_k,
        "format": options.format,
        "rows per file": options.rows_per_file,
    }


def _array_hash(images: Array) -> str:
    digest = hashlib.sha256(repr((images.shape, images.dtype.str)).encode())
    for image in images:
        digest.update(image.tobytes())
    return digest.hexdigest()


class Run:
    """The files of a run; its caller holds the folder's lock."""

    def __init__(self, folder: Path, settings: dict[str, Any], options: RunOptions, num_exits: int) -> None:
        self.folder = folder
        self.settings = settings
        self.options = options
        self.num_exits = num_exits
        self.parts: dict[int, Part] = {}

    ##### Before: what is there already

    def open(self) -> None:
        """Check the folder, remove what killed runs left, find the parts that are done."""
        others = sorted(path.name for path in self.folder.iterdir() if not _is_own(path.name))
        if others:
            raise InvalidArgument(
                f"{self.folder} holds other files, such as {others[0]!r}; choose a folder of its own"
            )
        remove_leftovers(self.folder)
        try:
            self._find_parts(self._description())
        except (FileFormatError, InvalidArgument):
            if not self.options.overwrite:
                raise
            self._clear()

    def _description(self) -> dict[str, Any]:
        """What ``_manifest.json`` or ``_run.json`` says, if it is of the same model, inputs and options."""
        for name in (_MANIFEST, _RUN):
            if os.path.lexists(self.folder / name):
                document = read_json(self.folder / name, _MAX_PROGRESS_BYTES)
                self._refuse_other_settings(document.get("settings"))
                return document
        if found := sorted(path.name for path in self.folder.glob("part-*")):
            raise InvalidArgument(
                f"{self.folder} holds {found[0]!r} of a run without a description; choose another folder, or "
                "pass --overwrite"
            )
        return {}

    def _refuse_other_settings(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise FileFormatError(f"{self.folder} holds a run without settings; choose another folder")
        changed = [key for key in self.settings if found.get(key) != self.settings[key]]
        if not changed:
            return
        differences = [
            key
            if key in ("model", "images")
            else f"{key} (then {found.get(key)!r}, now {self.settings[key]!r})"
            for key in changed
        ]
        raise InvalidArgument(
            f"{self.folder} holds a run with another {', '.join(differences)}; choose another folder, "
            "repeat the command as it was, or replace the run with --overwrite"
        )

    def _find_parts(self, description: Mapping[str, Any]) -> None:
        """The parts that the manifest or the progress file lists and whose files are as listed."""
        listed = description.get("parts")
        candidates = list(listed) if isinstance(listed, list) else []
        with contextlib.suppress(FileFormatError):  # there is none
            for line in read_bytes(self.folder / _PROGRESS, _MAX_PROGRESS_BYTES).splitlines():
                with contextlib.suppress(ValueError):  # the last line of a killed run
                    candidates.append(parse_json(line))
        for candidate in candidates:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                part = Part.of_json(candidate, self.num_exits)
                if _file_hash(self.path(part.number)) == (part.bytes, part.sha256):
                    self.parts[part.number] = part

    def _clear(self) -> None:
        """Remove another run; what describes it goes last."""
        parts = [path for path in self.folder.iterdir() if _PART.fullmatch(path.name)]
        self._remove(_MANIFEST)
        for path in parts:
            path.unlink()
        self._remove(_PROGRESS, _RUN)

    def begin(self) -> None:
        """Describe the run before its first part is written."""
        self._write_json(_RUN, self._document())
        # Written anew, because a kill may have left an unfinished line.
        lines = "".join(json.dumps(part.to_json()) + "\n" for part in self.parts.values())
        write_atomically(self.folder / _PROGRESS, lines.encode())
        self._remove(_MANIFEST)

    def _remove(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()

    def done_tally(self) -> Tally:
        """Counts of the parts that are done."""
        tally = Tally(0, 0, [0] * self.num_exits, 0)
        for part in self.parts.values():
            tally += part.tally
        return tally

    def is_complete(self, n: int) -> bool:
        """Whether every part is done and the manifest is written, which replaces the other files."""
        complete = (self.folder / _MANIFEST).exists() and not self.pending(n)
        if complete:
            self._remove(_PROGRESS, _RUN)
        return complete

    def pending(self, n: int) -> list[int]:
        """Numbers of the parts that are not done."""
        count = -(-n // self.options.rows_per_file)
        return [number for number in range(count) if number not in self.parts]

    ##### During: one part after another

    def classify(
        self, model: CompiledCascade, data: ImageData, point: OperatingPointLike, waits: Waits
    ) -> Generator[Tally, None, None]:
        """Classify and write all parts that are not done; yields the counts of each batch."""
        taken: deque[_Chunk] = deque()
        chunks = self._chunks(len(data), rows_per_batch(model.plan.input), taken)
        parts = classified(model, image_batches(data, chunks), point, self.options.top_k, waits)
        with _Writer(self._write_part) as writer, contextlib.closing(parts) as batches:
            for predictions in batches:
                chunk = taken.popleft()
                if self.options.strict:
                    predictions.require_no_errors()
                writer.put(chunk, predictions)
                yield Tally.of(predictions, self.num_exits)

    def _chunks(self, n: int, rows: int, taken: deque[_Chunk]) -> Iterator[range]:
        """Positions of the batches of all parts that are not done; no batch crosses a part."""
        for number in self.pending(n):
            spans = pieces(number, n, self.options.rows_per_file, rows)
            for span in spans:
                taken.append(_Chunk(number, span is spans[-1]))
                yield span

    def _write_part(self, number: int, batches: list[Predictions]) -> None:
        self.record(write_part(self.folder, number, batches, self.options.format, self.num_exits))

    def record(self, part: Part) -> None:
        """List a part whose file is complete.

        Raises:
            SaveError: the operating system reported an error.
        """
        line = (json.dumps(part.to_json()) + "\n").encode()
        try:
            with open(self.folder / _PROGRESS, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SaveError(f"cannot write {self.folder / _PROGRESS}: {error.strerror or error}") from error
        self.parts[part.number] = part

    ##### After: the manifest

    def finish(self, n: int) -> None:
        """Write the manifest, then remove what it replaces."""
        tally = self.done_tally()
        parts = [self.parts[number].to_json() for number in sorted(self.parts)]
        for part in parts:
            part["file"] = self.path(part["part"]).name
        ran = sum(tally.exits)
        self._write_json(
            _MANIFEST,
            self._document()
            | {
                "rows": n,
                "errors": tally.errors,
                "exit_shares": [count / ran for count in tally.exits] if ran else None,
                "mean_macs": tally.cost_macs / ran if ran else None,
                "parts": parts,
            },
        )
        self._remove(_PROGRESS, _RUN)

    def _document(self) -> dict[str, Any]:
        return {
            "format": "fastcascade predictions",
            "version": 1,
            "written_by": version("fastcascade"),
            "settings": self.settings,
        }

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_atomically(self.folder / name, json.dumps(value, indent=1).encode())

    def path(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / _part_name(number, self.options.format)


class _Chunk(NamedTuple):
    """A batch of a part."""

    part: int
    is_last: bool


def _is_own(name: str) -> bool:
    own = name in (_RUN, _PROGRESS, _MANIFEST, _LOCK) or _PART.fullmatch(name) is not None
    return own or name.endswith(".fastcascade-tmp")


def _file_hash(path: Path) -> tuple[int, str] | None:
    """Size and sha256 of a file; None if it cannot be read."""
    digest, size = hashlib.sha256(), 0
    try:
        with open_regular(path) as file:
            while block := file.read(2**20):
                digest.update(block)
                size += len(block)
    except OSError:
        return None
    return size, digest.hexdigest()


class _Writer:
    """A thread that writes parts while the next ones are computed; at most one part waits."""

    def __init__(self, write: Callable[[int, list[Predictions]], None]) -> None:
        self._write = write
        self._batches: list[Predictions] = []
        self._queue: queue.Queue[tuple[int, list[Predictions]] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fastcascade-write", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def put(self, chunk: _Chunk, predictions: Predictions) -> None:
        """Take a batch; raises the error of an earlier part."""
        self._raise()
        self._batches.append(predictions)
        if chunk.is_last:
            self._queue.put((chunk.part, self._batches))
            self._batches = []

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._write(*item)
                except BaseException as error:  # raised again in the caller's thread
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def __exit__(self, kind: Any, *_: object) -> None:
        """Wait for the parts that are complete, also after an error elsewhere."""
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()
