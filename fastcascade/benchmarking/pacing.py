"""Calls as a server makes them: after a pause, at random times, straight after a torch operation.

In a loop, threads spin and weights are in cache. After a pause, threads are asleep and weights in memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcascade.benchmarking.clocks import percentiles_ms, seconds_of
from fastcascade.benchmarking.results import PacedTiming

__all__ = ["PATTERNS", "PacedTurns", "Pattern", "loop_of", "paced_calls"]

_CALLS_PER_SECOND = 200
"""Calls of one turn, per second that the turn is meant to take."""

_MOST_CALLS = 400
"""Calls of one turn, however long it is meant to take: the pauses between them would add up to minutes."""


class Pattern(NamedTuple):
    """When calls come, and of how many images.

    Attributes:
        least, most: images of a call, uniformly distributed.
        pause_s: sleep before every call.
        per_second: Poisson arrivals at this rate. A call that comes while another runs waits for it.
        after_torch: run a torch operation on a million numbers before every call.
    """

    name: str
    least: int = 8
    most: int = 8
    pause_s: float = 0.0
    per_second: float = 0.0
    after_torch: bool = False


PATTERNS = (
    Pattern("loop"),
    Pattern("after 1 ms", pause_s=1e-3),
    Pattern("after 30 ms", pause_s=30e-3),
    Pattern("after torch", after_torch=True),
    Pattern("loop, mixed", least=1),
    Pattern("Poisson, mixed", least=1, per_second=30.0),
)


def loop_of(name: str) -> str:
    """The pattern of calls in a loop with as many images as the pattern of this name.

    Example:
        >>> loop_of("after 1 ms"), loop_of("Poisson, mixed")
        ('loop', 'loop, mixed')
    """
    return "loop, mixed" if name.endswith(", mixed") else "loop"


def paced_calls(call: Callable[[int], object], pattern: Pattern, count: int, seed: int) -> list[float]:
    """Seconds of ``count`` calls, from the time when each is due to its end.

    Args:
        call: classifies this number of images and waits for the results.

    Example:
        >>> len(paced_calls(lambda images: None, Pattern("after 1 ms", pause_s=1e-3), count=3, seed=0))
        3
    """
    chance = random.Random(seed)
    if not (pattern.pause_s or pattern.per_second or pattern.after_torch):
        call(pattern.most)  # so that the first call is one of a loop, too
    arrival = time.perf_counter()
    seconds = []
    for _ in range(count):
        images = chance.randint(pattern.least, pattern.most)
        arrival += chance.expovariate(pattern.per_second) if pattern.per_second else 0.0
        start = _wait(pattern, arrival)
        call(images)
        seconds.append(time.perf_counter() - start)
    return seconds


def _wait(pattern: Pattern, arrival: float) -> float:
    """Wait until the next call is due; the time at which it was."""
    if pattern.after_torch:
        _operand().exp()
    if pattern.per_second:
        left = arrival - time.perf_counter()
        if left <= 0:
            return arrival
        time.sleep(left)
    elif pattern.pause_s:
        time.sleep(pattern.pause_s)
    return time.perf_counter()


@cache
def _operand() -> Tensor:
    return torch.ones(1_000_000)


class PacedTurns:
    """A callable on the first few of its rows, in one pattern, with the seconds of its calls by round."""

    def __init__(self, call: Callable[..., Any], rows: Tensor, pattern: Pattern, *arguments: Any) -> None:
        self.call, self.rows, self.pattern, self.arguments = call, rows, pattern, arguments
        self.rounds: list[list[float]] = []

    def take(self, seconds: float) -> list[float]:
        """One turn, of so many calls that a loop of slow ones takes about this long; 400 at most."""

        def call(images: int) -> None:
            seconds_of(lambda: self.call(self.rows[:images], *self.arguments), self.rows.device)

        count = max(1, min(_MOST_CALLS, round(_CALLS_PER_SECOND * seconds)))
        return paced_calls(call, self.pattern, count, seed=len(self.rounds))

    @property
    def timing(self) -> PacedTiming:
        """Percentiles over all rounds."""
        calls = [seconds for turn in self.rounds for seconds in turn]
        return PacedTiming(self.pattern.name, len(calls), percentiles_ms(calls))
