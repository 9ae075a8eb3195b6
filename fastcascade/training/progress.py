"""A progress bar on standard error and metrics as JSON lines; both only in the first process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastcascade.training.distributed import rank

__all__ = ["EpochProgress", "append_json_line"]


class EpochProgress:
    """The bar of one epoch, with a running note beside it.

    Args:
        title: shown at the left.
        enabled: draw nothing if False.

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
        """Iterate over ``steps`` and advance the bar."""
        self.bar.update(self.task, total=len(steps))
        for step in steps:
            yield step
            self.bar.advance(self.task)

    def note(self, **numbers: float | Iterable[float]) -> None:
        """Show numbers beside the bar."""
        self.bar.update(self.task, note="  ".join(f"{k} {_short(v)}" for k, v in numbers.items()))


def _short(value: float | Iterable[float]) -> str:
    if isinstance(value, Iterable):
        return "/".join(f"{v:.2f}" for v in value)
    return f"{value:.4g}"


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON object as a line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
