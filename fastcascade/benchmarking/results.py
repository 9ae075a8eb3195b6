"""What a benchmark of a cascade answers, as plain data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from fastcascade.benchmarking.torch_peaks import Peaks

__all__ = ["BatchTiming", "Benchmark", "PacedTiming", "Spread", "StageTiming", "StepTiming", "WhatIf"]


_BUSY = 0.1
"""Share of the processors in use by others, from which a benchmark says so."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a quantity over the rounds of a run."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value.

        Example:
            >>> Spread.of([3.0, 1.0, 2.0])
            Spread(median=2.0, low=1.5, high=2.5)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class StepTiming:
    """One step of a stage that runs alone, in the order of a run, with all threads at work.

    Attributes:
        operation, kernel: what is computed, and by what.
        macs: multiplies per image of the plain definition, whatever algorithm computes it; 0 for steps that
            only move, add or compare.
        bytes_per_image: read and written: inputs and output once, weights divided by the images that share
            one read. Most of it stays in cache.
        ms_per_image: over the rounds.
        gflops: two operations per multiply.
        gbs: those bytes per second, in GB.
    """

    operation: str
    kernel: str
    macs: int
    bytes_per_image: float
    ms_per_image: Spread
    gflops: float
    gbs: float


@dataclass(frozen=True)
class StageTiming:
    """One stage with its exit, at the operating point.

    Attributes:
        images_in, images_out: images that reached it, and those that continued.
        batch: the batch size at which the stage alone was fastest; every figure is measured there.
        ms_per_image: the stage alone, without selector.
        exit_ms_per_image: scoring and the stop decision; 0 for the last stage.
        ms: both, for the images that reached it.
        images_per_s: of the stage alone.
        gflops: two operations per multiply of the plain definition, whatever algorithm computes it.
        gflops_share: of :attr:`Peaks.gflops`.
        bytes_per_image: the least that must move: input and logits once, weights once per batch.
        bandwidth_share: those bytes per second over :attr:`Peaks.copy_gbs`.
        steps: one entry per step; empty where the backend cannot time them.
    """

    name: str
    macs: int
    images_in: int
    images_out: int
    batch: int
    ms_per_image: Spread
    exit_ms_per_image: Spread
    ms: float
    images_per_s: float
    gflops: float
    gflops_share: float
    bytes_per_image: float
    bandwidth_share: float
    steps: tuple[StepTiming, ...]


@dataclass(frozen=True)
class BatchTiming:
    """The whole cascade at one batch size.

    Attributes:
        batches: different batches run.
        latency_ms: p50, p90, p95 and p99 of a call, over ``calls`` calls.
        schedule_efficiency: time of the stages alone on the images that reached them over the cascade's
            time. The rest went to exits, compaction, waiting and smaller batches.
        stages_ms_per_image, exits_ms_per_image: the threads' work in stages and exits, each measured alone,
            for the images that reached them.
        compaction_ms_per_image: the threads' other work: compaction, pooling, the call itself. Negative where
            stages run faster inside the cascade than alone.
        idle_ms_per_image: time in which threads did not work: they waited, or another process had the CPU. 0
            on a GPU, whose waiting is not visible. The four parts add up to the time of an image.
        dense_images_per_s: the last exit on every image, at the same batch size.
        saving: realised saving η = (1 − t/t_dense)/(1 − MACs/MACs_dense); None where the cascade does more
            than 0.7 of the dense MACs, where the ratio means little.
    """

    batch: int
    batches: int
    images_per_s: Spread
    latency_ms: dict[str, float]
    calls: int
    schedule_efficiency: Spread
    stages_ms_per_image: Spread
    exits_ms_per_image: Spread
    compaction_ms_per_image: Spread
    idle_ms_per_image: Spread
    dense_images_per_s: Spread
    saving: float | None


@dataclass(frozen=True)
class PacedTiming:
    """The whole cascade in one pattern of calls, see :data:`fastcascade.benchmarking.pacing.PATTERNS`.

    Attributes:
        latency_ms: p50, p95 and p99 of a call, over ``calls`` calls.
    """

    pattern: str
    calls: int
    latency_ms: dict[str, float]


@dataclass(frozen=True)
class WhatIf:
    """A change, and the throughput that the measured stage times say it would have.

    Attributes:
        change: another operating point, a stage left out, or another precision.
        exit_shares: by stage of the cascade as measured, counted by running the changed one; 0 for a stage
            that is left out.
        mean_macs: per image.
        images_per_s: predicted at the largest batch: stage times by how many images reach them, at the
            schedule efficiency measured there.
    """

    change: str
    exit_shares: tuple[float, ...]
    mean_macs: float
    images_per_s: float


@dataclass(frozen=True)
class Benchmark:
    """What :func:`benchmark` measured; ``to_json()`` is plain data.

    Attributes:
        compile_s: packing the plan into a program, apart from everything else.
        first_call_ms: the first call, at the largest batch.
        max_error: largest difference of a probability from the reference backend's, at forced exits.
        instrumentation_share: what reading the clocks adds to the shortest call. Calls that are not timed pay
            nothing.
        paced: calls in a loop, after pauses and at random times, of 8 images or 1 to 8.
        threads: by number, images/s at the largest batch.
        mac_share: mean MACs over dense MACs.
        peers: images/s by name and batch size; empty unless asked for.
        busy_share: share of the processors that other programs took before the measurement; None if unknown.
        energy_mj_per_image: None without a readable energy counter; ``energy_note`` says why.
    """

    machine: dict[str, str]
    backend: str
    precision: str
    images: int
    compile_s: float
    first_call_ms: float
    max_error: float
    instrumentation_share: float
    peaks: Peaks
    stages: tuple[StageTiming, ...]
    batches: tuple[BatchTiming, ...]
    paced: tuple[PacedTiming, ...]
    threads: dict[int, Spread]
    mac_share: float
    what_if: tuple[WhatIf, ...]
    peers: dict[str, dict[int, Spread]]
    energy_mj_per_image: float | None
    energy_note: str
    busy_share: float | None = None

    @property
    def busy_note(self) -> str | None:
        """A warning, if other programs took so much that times are those of a shared machine."""
        if self.busy_share is None or self.busy_share < _BUSY:
            return None
        return (
            f"the machine was busy: before the measurement, other programs took {self.busy_share:.0%} of the "
            "processors; times are longer and spread more than on a quiet one"
        )

    @property
    def exit_ms(self) -> tuple[float, ...]:
        """(K,) milliseconds per image of stopping at each exit, earlier stages included: a cost for
        :func:`fastcascade.calibrate`."""
        parts = (stage.ms_per_image.median + stage.exit_ms_per_image.median for stage in self.stages)
        return tuple(accumulate(parts))

    @property
    def dense_ms(self) -> float:
        """Milliseconds per image of the last exit on every image, at the largest batch."""
        return 1e3 / self.batches[-1].dense_images_per_s.median

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        return asdict(self)
