"""Timing in turns: every program has one turn a round, so a machine that slows down slows all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastcascade.backends.interface import StepTime, TimesSteps
from fastcascade.benchmarking.clocks import clocks_of
from fastcascade.benchmarking.results import Spread

__all__ = ["StepTurns", "Timed", "TimedCall", "Turns", "fastest", "take_turns"]

_PROBE_SECONDS = 0.05
_DIFFERENT_BATCHES = 64


class TimedCall(NamedTuple):
    """One call: the number of its batch, wall-clock seconds, and seconds in which its threads worked."""

    batch: int
    seconds: float
    busy: float


class Timed(Protocol):
    """Anything that takes turns."""

    rounds: list[Any]

    def take(self, seconds: float) -> Any: ...


class Turns:
    """A callable, its batches, and the times of its calls.

    Attributes:
        batches: row numbers of every batch: the images in order, then shuffled until there are enough.
        rounds: calls by round; each round continues with the batch after the last one.
    """

    def __init__(self, call: Callable[..., Any], rows: Tensor, size: int, *arguments: Any) -> None:
        self.call, self.rows, self.size, self.arguments = call, rows, size, arguments
        self.batches = list(_different_batches(len(rows), size))
        self.rounds: list[list[TimedCall]] = []
        self.next = 0

    def take(self, seconds: float) -> list[TimedCall]:
        """One turn: different batches until the time is up, at least one, each at most once."""
        calls: list[TimedCall] = []
        while len(calls) < len(self.batches) and (not calls or sum(c.seconds for c in calls) < seconds):
            batch = self.next
            part = _gather(self.rows, self.batches[batch])
            calls.append(TimedCall(batch, *clocks_of(partial(self.call, part, *self.arguments), part.device)))
            self.next = (batch + 1) % len(self.batches)
        return calls

    @property
    def per_image(self) -> list[float]:
        """Per round, seconds per image."""
        return [statistics.fmean(c.seconds for c in calls) / self.size for calls in self.rounds]

    @property
    def busy_per_image(self) -> list[float]:
        """Per round, seconds per image in which the threads worked."""
        return [statistics.fmean(c.busy for c in calls) / self.size for calls in self.rounds]

    @property
    def rate(self) -> Spread:
        """Images per second."""
        return Spread.of([1 / t for t in self.per_image])


class StepTurns:
    """A stage alone whose steps are timed one by one, with their times by round."""

    def __init__(self, program: TimesSteps, rows: Tensor) -> None:
        self.program, self.rows = program, rows
        self.rounds: list[list[StepTime]] = []

    def take(self, seconds: float) -> list[StepTime]:
        """One turn."""
        return self.program.time_steps(0, self.rows, seconds)


def take_turns(turns: Sequence[Timed], rounds: int, seconds: float) -> None:
    """One turn each per round, after one call that warms up; the order alternates."""
    for turn in turns:
        turn.take(0)
    for r in range(rounds):
        for turn in turns[:: 1 if r % 2 == 0 else -1]:
            turn.rounds.append(turn.take(seconds))


def fastest(candidates: Sequence[Turns]) -> Turns:
    """The candidate whose calls take the least time per image."""

    def best(turns: Turns) -> float:
        turns.take(0)  # warms up
        return min(call.seconds for call in turns.take(_PROBE_SECONDS)) / turns.size

    return min(candidates, key=best)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]`` without torch's threads, which would keep spinning while the next call is timed."""
    return torch.from_numpy(rows.numpy()[index.numpy()]) if rows.device.type == "cpu" else rows[index]


def _different_batches(count: int, size: int) -> Iterator[Tensor]:
    whole = count - count % size
    order, generator = torch.arange(count), torch.Generator().manual_seed(0)
    for _ in range(math.ceil(_DIFFERENT_BATCHES * size / whole)):
        yield from order[:whole].split(size)
        order = torch.randperm(count, generator=generator)
