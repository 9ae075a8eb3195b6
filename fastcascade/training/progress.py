"""Progress on standard error: a bar per epoch and a line per phase; the metrics of a run as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastcascade.storage.files import write_atomically
from fastcascade.training.distributed import rank

__all__ = ["EpochProgress", "announce", "write_metrics"]


class EpochProgress:
    """The progress bar of one epoch, with the latest metrics beside it; the first process alone draws it.

    Args:
        title: text on the left.
        enabled: False draws nothing.

    Example:
        >>> with EpochProgress("epoch 1/1", enabled=False) as progress:
        ...     for step in progress.steps(range(3)):
        ...         progress.note(loss=0.5)
    """

    def __init__(self, title: str, enabled: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not enabled or rank() > 0)
        self.task = self.bar.add_task(title, note="")

    def __enter__(self) -> EpochProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def steps(self, steps: range) -> Iterator[int]:
        """Iterate over ``steps``, advancing the bar."""
        self.bar.update(self.task, total=len(steps))
        for step in steps:
            yield step
            self.bar.advance(self.task)

    def note(self, **numbers: float | Iterable[float]) -> None:
        """Show these numbers beside the bar."""
        self.bar.update(self.task, note="  ".join(f"{k} {_short(v)}" for k, v in numbers.items()))


def announce(line: str, enabled: bool) -> None:
    """Print what runs next, from the first process alone: in a file, the bar of an epoch appears at its end.

    Args:
        enabled: False prints nothing.
    """
    if enabled and rank() == 0:
        Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)


def _short(value: float | Iterable[float]) -> str:
    if isinstance(value, Iterable):
        return "/".join(f"{v:.2f}" for v in value)
    return f"{value:.4g}"


def write_metrics(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file of metrics: one JSON object per epoch and line."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in history).encode())
