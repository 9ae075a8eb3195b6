"""Where the time of a cascade goes: each stage alone, exits, schedule, whole batches, single calls.

Nothing inside the engine is instrumented, so measuring costs nothing when it is off. The cascade and parts of
it (a stage alone, a stage with its exit, the last network alone) are programs of the same engine, timed in
turns within one run, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fastcascade.backends import Precision
from fastcascade.cascade import Cascade
from fastcascade.data import Data
from fastcascade.data import batches as data_batches
from fastcascade.engine import CompiledCascade, compile
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.lower import plan as lower_plan
from fastcascade.machine import (
    Ceilings,
    describe_machine,
    measure_ceilings,
    measure_energy,
    seconds_of,
    torch_threads,
)
from fastcascade.plan import Plan, StagePlan
from fastcascade.types import CascadeOutput, InputSpec, OperatingPointLike

__all__ = ["BatchTiming", "Benchmark", "Ceilings", "Spread", "StageTiming", "WhatIf", "benchmark"]

MAX_IMAGES = 4096
"""More images than this only make a run longer."""

_BYTES = 4
_LARGEST_MAC_SHARE = 0.7
_PROBE_SECONDS = 0.05


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
class StageTiming:
    """One stage with its exit, at the operating point.

    Attributes:
        images_in, images_out: how many of the images reached it, and how many went on.
        batch: the batch size at which the stage alone was fastest; all figures are for this one.
        ms_per_image: the stage alone, without selector.
        exit_ms_per_image: what scoring and the decision add; 0 for the last stage.
        ms: both, for the images that reached it.
        images_per_s: of the stage alone.
        gflops: two operations per multiply of the plain definition, whatever algorithm computes it.
        gflops_share: of the ceiling.
        bytes_per_image: input and logits once, weights once per batch: the least that must move.
        bandwidth_share: of the ceiling, for those bytes.
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


@dataclass(frozen=True)
class BatchTiming:
    """The whole cascade at one batch size.

    Attributes:
        batches: different batches that a pass ran.
        latency_ms: p50, p90, p95 and p99 of a call, over ``calls`` calls.
        schedule_efficiency: time of the stages alone on the images that reached them over the cascade's
            time. What is missing from 1 went to exits, compaction, waiting and smaller batches.
        rest_ms_per_image: the cascade's time beyond stages and exits alone: compaction, pooling, idle
            threads, overhead of the call. Negative where the stages together do better than alone.
        dense_images_per_s: the last exit's answer for every image, at the same batch size.
        saving: realised saving η = (1 − t/t_dense)/(1 − MACs/MACs_dense); None where the cascade does more
            than 0.7 of the dense MACs, as the quotient then says little.
    """

    batch: int
    batches: int
    images_per_s: Spread
    latency_ms: dict[str, float]
    calls: int
    schedule_efficiency: Spread
    rest_ms_per_image: Spread
    dense_images_per_s: Spread
    saving: float | None


@dataclass(frozen=True)
class WhatIf:
    """A change, and the throughput that the measured stage times say it would have.

    Attributes:
        change: another operating point, or a stage left out.
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
        threads: by number, images/s at the largest batch.
        mac_share: mean MACs over dense MACs.
        energy_mj_per_image: None where this machine shows no energy counter; ``energy_note`` says why.
    """

    machine: dict[str, str]
    backend: str
    precision: str
    images: int
    compile_s: float
    first_call_ms: float
    ceilings: Ceilings
    stages: tuple[StageTiming, ...]
    batches: tuple[BatchTiming, ...]
    threads: dict[int, Spread]
    mac_share: float
    what_if: tuple[WhatIf, ...]
    energy_mj_per_image: float | None
    energy_note: str

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        return asdict(self)


def benchmark(
    model: Cascade | Plan,
    data: Data | None = None,
    *,
    batches: Sequence[int] = (1, 8, 64, 256),
    threads: Sequence[int] = (),
    operating_point: OperatingPointLike = None,
    backend: str = "auto",
    precision: Precision = "fp32",
    device: torch.device | str | None = None,
    rounds: int = 7,
    seconds: float = 0.1,
) -> Benchmark:
    """Measure a cascade and its parts in turns.

    Args:
        data: images that decide how many stop where (labels are not needed, at most 4096 are used);
            one largest batch of standard normal noise if not given.
        batches: sizes to measure; those above the number of images are left out.
        threads: numbers of threads to compare at the largest batch; the first is used for everything else.
            Torch's number if empty.
        rounds: turns that every program gets.
        seconds: of one turn, roughly.

    Raises:
        InvalidArgument: no batch size fits, or rounds or seconds that are not positive.
        DataError: no images.
        BackendUnavailable: the backend cannot run here, or not this cascade.

    Example:
        >>> import fastcascade as fc
        >>> from fastcascade.resnet import resnet_cifar
        >>> cascade = fc.Cascade([resnet_cifar(8), resnet_cifar(14)], fc.MLPSelector(), 10, (3, 32, 32))
        >>> measured = benchmark(cascade, batches=[8], rounds=1, seconds=0.01)
        >>> [stage.images_in for stage in measured.stages][0]
        8
    """
    plan = model if isinstance(model, Plan) else lower_plan(model)
    if rounds < 1 or not seconds > 0:
        raise InvalidArgument(f"got rounds={rounds}, seconds={seconds}; expected positive numbers")
    images = _noise(plan, max(batches, default=0)) if data is None else _images(plan, data)
    sizes = sorted({size for size in batches if 1 <= size <= len(images)})
    if not sizes:
        raise InvalidArgument(f"no batch size of {list(batches)} lies in 1 … {len(images)}, the images there")

    def build(part: Plan, count: int | None = threads[0] if threads else None) -> CompiledCascade:
        return compile(part, backend=backend, precision=precision, device=device, threads=count)

    with torch_threads(threads[0] if threads else torch.get_num_threads()):
        run = _Run(plan, images, operating_point, sizes, build)
        ceilings = measure_ceilings(run.program.device)
        counts = {count: run.turns_of(build(plan, count), sizes[-1]) for count in threads}
        _take_turns([*run.turns(), *counts.values()], rounds, seconds)
        energy, note = measure_energy(lambda: run.program(run.images[: sizes[-1]], run.thresholds), sizes[-1])
    return Benchmark(
        machine=describe_machine(run.program),
        backend=run.program.backend,
        precision=precision,
        images=len(images),
        compile_s=run.compile_s,
        first_call_ms=1e3 * run.first_call_s,
        ceilings=ceilings,
        stages=tuple(run.stage_timing(k, ceilings) for k in range(len(plan.stages))),
        batches=tuple(map(run.batch_timing, sizes)),
        threads={count: Spread.of([1 / t for t in turns.per_image]) for count, turns in counts.items()},
        mac_share=run.mac_share,
        what_if=tuple(run.what_ifs()),
        energy_mj_per_image=energy,
        energy_note=note,
    )


def _noise(plan: Plan, count: int) -> Tensor:
    return torch.randn(count, *plan.input.shape, generator=torch.Generator().manual_seed(0))


def _images(plan: Plan, data: Data) -> Tensor:
    parts, count = [], 0
    for images, _ in data_batches(data, 256):
        parts.append(plan.input.nchw(images))
        count += len(images)
        if count >= MAX_IMAGES:
            break
    if not count:
        raise DataError("got 0 images to measure with; expected at least one")
    return torch.cat(parts)[:MAX_IMAGES].contiguous()


##### Parts of a plan as plans of their own


def stage_alone(plan: Plan, k: int) -> Plan:
    """Stage k as a cascade of one stage; it reads images of its own input's shape.

    Raises:
        InvalidArgument: the stage reads a vector, or an opaque stage's features, whose shape is not known.
    """
    stage = plan.stages[k]
    if stage.input == "image":
        spec = plan.input
    else:
        shapes = plan.stages[k - 1].shapes
        shape = shapes[plan.stages[k - 1].features] if shapes else ()
        if len(shape) != 3:
            raise InvalidArgument(
                f"stage {stage.name!r} reads features of shape {shape or 'unknown'}; only stages that read "
                "images or (C, H, W) features can be timed alone"
            )
        spec = InputSpec((shape[0], shape[1], shape[2]))
    return _plan_of(plan, [replace(stage, input="image")], spec)


def stage_with_exit(plan: Plan, k: int) -> Plan:
    """Stage k with its selector, before a stage that nothing needs to reach."""
    alone = stage_alone(plan, k)
    first = replace(alone.stages[0], selector=plan.stages[k].selector)
    return _plan_of(plan, [first, alone.stages[0]], alone.input)


def without_stage(plan: Plan, k: int) -> Plan | None:
    """The plan with one stage left out; None where the next reads its features, or none is left."""
    rest = [stage for j, stage in enumerate(plan.stages) if j != k]
    feeds_next = k + 1 < len(plan.stages) and plan.stages[k + 1].input == "previous"
    if not rest or feeds_next:
        return None
    return _plan_of(plan, rest, plan.input)


def _plan_of(plan: Plan, stages: Sequence[StagePlan], spec: InputSpec) -> Plan:
    last = replace(stages[-1], selector=None, selector_macs=0)
    return replace(
        plan,
        stages=(*stages[:-1], last),
        input=spec,
        default_thresholds=torch.zeros(len(stages) - 1),
        operating_points={},
    )


##### Timing


class _Turns:
    """A program, what it runs on, and how long its calls took.

    Attributes:
        rounds: per round, seconds of each call; calls go over the batches from the first one on.
    """

    def __init__(
        self, program: CompiledCascade, rows: Tensor, size: int, thresholds: Tensor | None = None
    ) -> None:
        self.program, self.size, self.thresholds = program, size, thresholds
        self.parts = rows[: len(rows) - len(rows) % size].split(size)
        self.rounds: list[list[float]] = []

    def take(self, seconds: float) -> list[float]:
        """One turn: different batches until the time is up, at least one."""
        calls: list[float] = []
        for part in self.parts:
            calls.append(seconds_of(partial(self.program, part, self.thresholds), part.device))
            if sum(calls) >= seconds:
                break
        return calls

    @property
    def per_image(self) -> list[float]:
        """Per round, seconds per image."""
        return [statistics.fmean(calls) / self.size for calls in self.rounds]


def _take_turns(turns: Sequence[_Turns], rounds: int, seconds: float) -> None:
    """Every program once a round, after one turn that warms up; the order alternates."""
    for turn in turns:
        turn.take(0)
    for r in range(rounds):
        for turn in turns[:: 1 if r % 2 == 0 else -1]:
            turn.rounds.append(turn.take(seconds))


class _Run:
    """The cascade and its parts as programs, and what their times mean."""

    def __init__(
        self,
        plan: Plan,
        images: Tensor,
        operating_point: OperatingPointLike,
        sizes: list[int],
        build: Callable[[Plan], CompiledCascade],
    ) -> None:
        self.plan, self.sizes, self.build = plan, sizes, build
        start = time.perf_counter()
        self.program = build(plan)
        self.compile_s = time.perf_counter() - start
        self.images = images.to(self.program.device)
        self.thresholds = plan.thresholds(operating_point)
        largest = self.images[: sizes[-1]]
        self.first_call_s = seconds_of(partial(self.program, largest, self.thresholds), self.program.device)
        self.exits = self._exits(self.program, self.thresholds)

        stages = range(len(plan.stages))
        alone = [build(stage_alone(plan, k)) for k in stages]
        rows = [self._rows(k, alone[k].plan.input) for k in stages]
        self.alone = [_fastest([_Turns(alone[k], rows[k], size) for size in sizes]) for k in stages]
        always = torch.tensor([-math.inf])
        self.exit = [
            _Turns(build(stage_with_exit(plan, k)), rows[k], self.alone[k].size, always) for k in stages[:-1]
        ]
        self.cascade = {size: self.turns_of(self.program, size) for size in sizes}
        self.dense = {size: self._dense(alone[-1], size) for size in sizes}

    def turns_of(self, program: CompiledCascade, size: int) -> _Turns:
        """The whole cascade on all images."""
        return _Turns(program, self.images, size, self.thresholds)

    def turns(self) -> list[_Turns]:
        """Everything that is timed."""
        return [*self.cascade.values(), *self.dense.values(), *self.alone, *self.exit]

    def _dense(self, last: CompiledCascade, size: int) -> _Turns:
        """The last exit's answer for everything: the last network alone, or a backbone that never stops."""
        if self.plan.stages[-1].input == "image":
            return _Turns(last, self.images, size)
        never = torch.full((len(self.plan.stages) - 1,), math.inf)
        return _Turns(self.program, self.images, size, never)

    def _exits(self, program: CompiledCascade, thresholds: Tensor) -> Tensor:
        parts = self.images.split(self.sizes[-1])
        return torch.cat([cast(CascadeOutput, program(part, thresholds)).exit_stage.cpu() for part in parts])

    def _rows(self, k: int, spec: InputSpec) -> Tensor:
        """What stage k reads: the images that reach it (again and again up to a batch), or noise features."""
        reached = (self.exits >= k).nonzero()[:, 0]
        count = max(len(reached), self.sizes[-1])
        if self.plan.stages[k].input == "previous":
            generator = torch.Generator().manual_seed(k)
            return torch.randn(count, *spec.shape, generator=generator).relu().to(self.images.device)
        chosen = reached if len(reached) else torch.arange(len(self.images))
        return self.images[chosen.repeat(math.ceil(count / len(chosen)))[:count].to(self.images.device)]

    @property
    def mac_share(self) -> float:
        """Mean MACs over dense MACs."""
        return self._mean_macs(self.plan, self.exits) / self.plan.dense_macs

    @staticmethod
    def _mean_macs(plan: Plan, exits: Tensor) -> float:
        return float(plan.exit_macs[exits].double().mean())

    def _reached(self, count: int) -> list[int]:
        """How many of the first ``count`` images reach each stage."""
        return [int((self.exits[:count] >= k).sum()) for k in range(len(self.plan.stages))]

    def stage_timing(self, k: int, ceilings: Ceilings) -> StageTiming:
        """What is known about stage k."""
        stage, turns = self.plan.stages[k], self.alone[k]
        alone = turns.per_image
        exit_s = [0.0]
        if k < len(self.exit):
            exit_s = [b - a for a, b in zip(alone, self.exit[k].per_image, strict=True)]
        reached = [*self._reached(len(self.exits)), 0]
        seconds = statistics.median(alone)
        gflops = 2e-9 * stage.macs / seconds
        weights = sum(report.weight_bytes for report in turns.program.program.describe())
        image = turns.parts[0][0]
        moved = image.numel() * image.element_size() + _BYTES * self.plan.num_classes + weights / turns.size
        return StageTiming(
            name=stage.name,
            macs=stage.macs,
            images_in=reached[k],
            images_out=reached[k + 1],
            batch=turns.size,
            ms_per_image=Spread.of([1e3 * s for s in alone]),
            exit_ms_per_image=Spread.of([1e3 * s for s in exit_s]),
            ms=1e3 * reached[k] * (seconds + statistics.median(exit_s)),
            images_per_s=1 / seconds,
            gflops=gflops,
            gflops_share=gflops / ceilings.gflops,
            bytes_per_image=moved,
            bandwidth_share=moved / seconds / 1e9 / ceilings.copy_gbs,
        )

    def batch_timing(self, size: int) -> BatchTiming:
        """What is known about the cascade at one batch size."""
        turns, dense = self.cascade[size], self.dense[size].per_image
        efficiency, rest = [], []
        for r, calls in enumerate(turns.rounds):
            count = len(calls) * size
            ideal = self._stage_seconds(self._reached(count), r)
            exits = self._exit_seconds(self._reached(count), r)
            efficiency.append(ideal / sum(calls))
            rest.append(1e3 * (sum(calls) - ideal - exits) / count)
        time_share = statistics.median(a / b for a, b in zip(turns.per_image, dense, strict=True))
        calls = sorted(call for part in turns.rounds for call in part)
        return BatchTiming(
            batch=size,
            batches=max(map(len, turns.rounds)),
            images_per_s=Spread.of([1 / t for t in turns.per_image]),
            latency_ms={f"p{p}": 1e3 * calls[math.ceil(p / 100 * len(calls)) - 1] for p in (50, 90, 95, 99)},
            calls=len(calls),
            schedule_efficiency=Spread.of(efficiency),
            rest_ms_per_image=Spread.of(rest),
            dense_images_per_s=Spread.of([1 / t for t in dense]),
            saving=(1 - time_share) / (1 - self.mac_share) if self.mac_share <= _LARGEST_MAC_SHARE else None,
        )

    def _stage_seconds(self, reached: Sequence[int], r: int) -> float:
        """Time of the stages alone in round r, for these many images each."""
        return sum(n * turns.per_image[r] for n, turns in zip(reached, self.alone, strict=True))

    def _exit_seconds(self, reached: Sequence[int], r: int) -> float:
        pairs = zip(reached, self.alone, self.exit, strict=False)
        return sum(n * (with_exit.per_image[r] - alone.per_image[r]) for n, alone, with_exit in pairs)

    def what_ifs(self) -> Iterator[WhatIf]:
        """Every other stored operating point, and every stage left out that can be."""
        for name, point in self.plan.operating_points.items():
            thresholds = self.plan.thresholds(point)
            if not torch.equal(thresholds, self.thresholds):
                yield self._what_if(f"operating point {name}", self.program, thresholds, self._all_stages())
        for k, stage in enumerate(self.plan.stages):
            changed = without_stage(self.plan, k)
            if changed is not None:
                kept = [j for j in self._all_stages() if j != k]
                yield self._what_if(
                    f"without stage {stage.name}", self.build(changed), self.thresholds[kept[:-1]], kept
                )

    def _all_stages(self) -> list[int]:
        return list(range(len(self.plan.stages)))

    def _what_if(
        self, change: str, program: CompiledCascade, thresholds: Tensor, kept: Sequence[int]
    ) -> WhatIf:
        """Predict from how many images the changed cascade sends to each stage."""
        exits = self._exits(program, thresholds)
        shares = [0.0] * len(self.plan.stages)
        seconds = 0.0
        for position, k in enumerate(kept):
            shares[k] = float((exits == position).double().mean())
            seconds += float((exits >= position).double().mean()) * statistics.median(self.alone[k].per_image)
        efficiency = self.batch_timing(self.sizes[-1]).schedule_efficiency.median
        return WhatIf(change, tuple(shares), self._mean_macs(program.plan, exits), efficiency / seconds)


def _fastest(candidates: Sequence[_Turns]) -> _Turns:
    """The batch size at which a call takes the least time per image."""

    def best(turns: _Turns) -> float:
        turns.take(0)  # warms up
        return min(turns.take(_PROBE_SECONDS)) / turns.size

    return min(candidates, key=best)
