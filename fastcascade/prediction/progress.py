"""Progress of a run on standard error: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
from rich.text import Text

from fastcascade.prediction.pipeline import Waits
from fastcascade.prediction.runs import Tally

__all__ = ["RunProgress"]

_LINE_SECONDS = 60.0


class RunProgress:
    """Shows images/s, the time left, exit shares, mean cost, and what limits the run.

    A context manager; ``started`` and ``watch`` are what :func:`predict_to_folder` calls.
    """

    def __init__(self, total: int | None, num_exits: int) -> None:
        self.total = total
        self.tally = Tally(0, 0, [0] * num_exits, 0)
        self.before = 0
        self.waits = Waits()
        self._start = time.perf_counter()
        self._seconds = 0.0
        self._last_line = self._start
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), _Details(self))
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds = time.perf_counter() - self._start
        self._bar.refresh()
        self._bar.stop()

    def started(self, tally: Tally, waits: Waits) -> None:
        """Count what an earlier run did; ``waits`` is kept and read when details are shown."""
        self.waits = waits
        self.tally += tally
        self.before = tally.rows
        self._start = self._last_line = time.perf_counter()
        self._bar.update(self._task, completed=tally.rows)

    def watch(self, tally: Tally) -> None:
        """Count a batch."""
        self.tally += tally
        self._bar.update(self._task, completed=self.tally.rows)
        if not self._console.is_terminal and time.perf_counter() - self._last_line > _LINE_SECONDS:
            self._last_line = time.perf_counter()
            total = "" if self.total is None else f" of {self.total:,}"
            self._console.print(f"{self.tally.rows:,}{total} images, {self.details()}")

    def rate(self) -> float:
        """Images per second since the start, without those that were done before."""
        seconds = self._seconds or time.perf_counter() - self._start
        return (self.tally.rows - self.before) / max(seconds, 1e-9)

    def details(self) -> str:
        """Speed, time left, exits, cost and limit in one line of at most 80 columns or so."""
        rate = self.rate()
        if not rate:
            return "starting"
        left = "" if self.total is None else f", {_duration((self.total - self.tally.rows) / rate)} left"
        return f"{_rate(rate)}{left}, {self._exits()}, limited by {self.waits.limit()}"

    def _exits(self) -> str:
        ran = max(1, sum(self.tally.exits))
        shares = "/".join(f"{100 * count / ran:.0f}" for count in self.tally.exits)
        return f"exits {shares} %, {self.tally.cost_macs / ran / 1e6:.2f} M MACs"

    def summary(self) -> str:
        """What was done, in one line."""
        new = self.tally.rows - self.before
        done = f" ({self.before:,} of them by an earlier run)" if self.before else ""
        speed = f" in {_duration(self._seconds)}, {_rate(self.rate())}" if new else ""
        limit = f"; limited by {self.waits.limit()}" if new else ""
        return (
            f"{self.tally.rows:,} images{done}{speed}, {self.tally.errors:,} with an error; "
            f"{self._exits()} on average{limit}"
        )


class _Details(ProgressColumn):
    def __init__(self, progress: RunProgress) -> None:
        super().__init__()
        self.progress = progress

    def render(self, task: Task) -> Text:
        """The details beside the bar."""
        return Text(self.progress.details())


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:,.0f} images/s" if images_per_s >= 10 else f"{images_per_s:.2f} images/s"


def _duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> _duration(3.2), _duration(75), _duration(7300)
        ('3.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
