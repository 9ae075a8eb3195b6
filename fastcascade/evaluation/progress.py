"""A progress bar that appears only where one has to wait."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["LateBar"]

PATIENCE_S = 1.0


class LateBar:
    """A bar on standard error for work that takes longer than a second; none where that is no terminal.

    Args:
        title: text on the left.
        total: number of images; None if unknown.
        shown: False draws nothing.

    Example:
        >>> with LateBar("counting", 3) as bar:
        ...     for _ in range(3):
        ...         bar.advance(1)
    """

    def __init__(self, title: str, total: int | None, shown: bool = True) -> None:
        console = Console(stderr=True)
        visible = shown and (console.is_terminal or console.is_jupyter)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not visible)
        self.task = self.bar.add_task(title, total=total)
        self.due = time.monotonic() + PATIENCE_S

    def __enter__(self) -> LateBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, images: int) -> None:
        """Count images as done."""
        self.bar.advance(self.task, images)
        if time.monotonic() > self.due and not self.bar.live.is_started:
            self.bar.start()
