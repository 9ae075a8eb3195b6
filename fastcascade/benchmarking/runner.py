"""Where the time of a cascade goes: each stage alone, exits, schedule, whole batches, single calls.

Nothing that a call runs through is instrumented, so measuring costs nothing when it is off. The cascade and
parts of it (a stage alone, a stage with its exit, the last network alone) are programs of the same engine,
timed in turns within one run, so that a machine that slows down slows all of them. Single steps are timed in
turn with them, by an entry of the engine that nothing else uses.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor

from fastcascade.backends.interface import Precision, StepTime, TimesSteps
from fastcascade.benchmarking.machine import (
    Ceilings,
    clocks_of,
    describe_machine,
    measure_ceilings,
    measure_energy,
    torch_threads,
)
from fastcascade.benchmarking.parts import stage_alone, stage_with_exit, without_stage
from fastcascade.benchmarking.results import BatchTiming, Benchmark, Spread, StageTiming, StepTiming, WhatIf
from fastcascade.data.batches import Data
from fastcascade.data.batches import batches as data_batches
from fastcascade.engine import CompiledCascade, compile
from fastcascade.errors import BackendUnavailable, DataError, FastCascadeError, InvalidArgument
from fastcascade.lowering.export import plan as lower_plan
from fastcascade.lowering.plan import Plan
from fastcascade.model.cascade import Cascade
from fastcascade.model.cost import eval_mode
from fastcascade.types import CascadeOutput, InputSpec, OperatingPointLike, forced_exit

__all__ = [
    "BatchTiming",
    "Benchmark",
    "Ceilings",
    "Spread",
    "StageTiming",
    "StepTiming",
    "WhatIf",
    "benchmark",
]

MAX_IMAGES = 4096
"""More images than this only make a run longer."""

_BYTES = 4
_LARGEST_MAC_SHARE = 0.7
_PROBE_SECONDS = 0.05
_DIFFERENT_BATCHES = 64
_CHECKED_IMAGES = 32
_LARGEST_ERROR = {"fp32": 1e-3, "fp16": 5e-2}
"""Of a probability at a forced exit. A program that is further off computes something else."""


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
    peers: bool = False,
    rounds: int = 7,
    seconds: float = 0.1,
) -> Benchmark:
    """Measure a cascade and its parts in turns, after its answers were checked.

    Args:
        data: images that decide how many stop where (labels are not needed, at most 4096 are used);
            one largest batch of standard normal noise if not given.
        batches: sizes to measure; those above the number of images are left out.
        threads: numbers of threads to compare at the largest batch; the first is used for everything else.
            Torch's number if empty.
        peers: also time the cascade in plain PyTorch, and its last exit on everything.
        rounds: turns that every program gets.
        seconds: of one turn, roughly.

    Raises:
        InvalidArgument: no batch size fits, rounds or seconds that are not positive, or peers for a plan.
        DataError: no images.
        BackendUnavailable: the backend cannot run here, or not this cascade.
        FastCascadeError: its answers differ from the reference's.

    Example:
        >>> import fastcascade as fc
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> cascade = fc.Cascade([resnet_cifar(8), resnet_cifar(14)], fc.MLPSelector(), 10, (3, 32, 32))
        >>> measured = benchmark(cascade, batches=[8], rounds=1, seconds=0.01)
        >>> [stage.images_in for stage in measured.stages][0]
        8
    """
    plan = model if isinstance(model, Plan) else lower_plan(model)
    if rounds < 1 or not seconds > 0:
        raise InvalidArgument(f"got rounds={rounds}, seconds={seconds}; expected positive numbers")
    if peers and isinstance(model, Plan):
        raise InvalidArgument("peers=True runs the cascade's own modules, but got a plan; pass the cascade")
    images = _noise(plan, max(batches, default=0)) if data is None else _images(plan, data)
    sizes = sorted({size for size in batches if 1 <= size <= len(images)})
    if not sizes:
        raise InvalidArgument(f"no batch size of {list(batches)} lies in 1 … {len(images)}, the images there")

    def build(
        part: Plan, count: int | None = threads[0] if threads else None, wanted: Precision = precision
    ) -> CompiledCascade:
        return compile(part, backend=backend, precision=wanted, device=device, threads=count)

    with torch_threads(threads[0] if threads else torch.get_num_threads()):
        run = _Run(plan, images, operating_point, sizes, build, precision)
        ceilings = measure_ceilings(run.program.device)
        counts = {count: run.turns_of(build(plan, count), sizes[-1]) for count in threads}
        plain = run.plain_torch(model) if isinstance(model, Cascade) and peers else {}
        others = [turns for of_peer in plain.values() for turns in of_peer.values()]
        _take_turns([*run.turns(), *counts.values(), *others], rounds, seconds)
        machine = describe_machine(run.program)
        energy, note = measure_energy(lambda: run.program(run.images[: sizes[-1]], run.thresholds), sizes[-1])
    return Benchmark(
        machine=machine,
        backend=run.program.backend,
        precision=precision,
        images=len(images),
        compile_s=run.compile_s,
        first_call_ms=1e3 * run.first_call_s,
        max_error=run.max_error,
        instrumentation_share=run.instrumentation_share(),
        ceilings=ceilings,
        stages=tuple(run.stage_timing(k, ceilings) for k in range(len(plan.stages))),
        batches=tuple(map(run.batch_timing, sizes)),
        threads={count: turns.rate for count, turns in counts.items()},
        mac_share=run.mac_share,
        what_if=tuple(run.what_ifs()),
        peers={name: {size: t.rate for size, t in turns.items()} for name, turns in plain.items()},
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


##### Timing


class _Call(NamedTuple):
    """One call: which batch, seconds by the clock, and those in which its threads worked."""

    batch: int
    seconds: float
    busy: float


class _Turns:
    """Something to call, what it is called with, and how long its calls took.

    Attributes:
        batches: rows of every different batch: the images in order, then shuffled until there are enough.
        rounds: calls by round; each round goes on where the one before ended.
    """

    def __init__(self, call: Callable[..., Any], rows: Tensor, size: int, *arguments: Any) -> None:
        self.call, self.rows, self.size, self.arguments = call, rows, size, arguments
        self.batches = list(_different_batches(len(rows), size))
        self.rounds: list[list[_Call]] = []
        self.next = 0

    def take(self, seconds: float) -> list[_Call]:
        """One turn: different batches until the time is up, at least one, at most each once."""
        calls: list[_Call] = []
        while len(calls) < len(self.batches) and (not calls or sum(c.seconds for c in calls) < seconds):
            batch = self.next
            part = _gather(self.rows, self.batches[batch])
            calls.append(_Call(batch, *clocks_of(partial(self.call, part, *self.arguments), part.device)))
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


class _StepTurns:
    """A stage alone whose steps are timed one by one, and how long they took by round."""

    def __init__(self, program: TimesSteps, rows: Tensor) -> None:
        self.program, self.rows = program, rows
        self.rounds: list[list[StepTime]] = []

    def take(self, seconds: float) -> list[StepTime]:
        """One turn."""
        return self.program.time_steps(0, self.rows, seconds)

    def timings(self) -> Iterator[StepTiming]:
        """What is known about each step."""
        for rounds in zip(*self.rounds, strict=True):
            step, seconds = rounds[0], [step.seconds for step in rounds]
            median = statistics.median(seconds)
            yield StepTiming(
                operation=step.operation,
                kernel=step.kernel,
                macs=step.macs,
                bytes_per_image=step.bytes_moved,
                ms_per_image=Spread.of([1e3 * s for s in seconds]),
                gflops=2e-9 * step.macs / median,
                gbs=1e-9 * step.bytes_moved / median,
            )


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]`` without torch's threads, which would go on spinning while the next call is timed."""
    return torch.from_numpy(rows.numpy()[index.numpy()]) if rows.device.type == "cpu" else rows[index]


def _different_batches(count: int, size: int) -> Iterator[Tensor]:
    whole = count - count % size
    order, generator = torch.arange(count), torch.Generator().manual_seed(0)
    for _ in range(math.ceil(_DIFFERENT_BATCHES * size / whole)):
        yield from order[:whole].split(size)
        order = torch.randperm(count, generator=generator)


class _Timed(Protocol):
    """What takes turns."""

    rounds: list[Any]

    def take(self, seconds: float) -> Any: ...


def _take_turns(turns: Sequence[_Timed], rounds: int, seconds: float) -> None:
    """Every program once a round, after one call that warms up; the order alternates."""
    for turn in turns:
        turn.take(0)
    for r in range(rounds):
        for turn in turns[:: 1 if r % 2 == 0 else -1]:
            turn.rounds.append(turn.take(seconds))


def _steps_of(alone: _Turns) -> _StepTurns | None:
    """The steps of a stage that runs alone, where its program can time them."""
    program = cast(CompiledCascade, alone.call).program
    return _StepTurns(program, alone.rows[: alone.size]) if isinstance(program, TimesSteps) else None


def _fastest(candidates: Sequence[_Turns]) -> _Turns:
    """The batch size at which a call takes the least time per image."""

    def best(turns: _Turns) -> float:
        turns.take(0)  # warms up
        return min(call.seconds for call in turns.take(_PROBE_SECONDS)) / turns.size

    return min(candidates, key=best)


class _Run:
    """The cascade and its parts as programs, and what their times mean."""

    def __init__(
        self,
        plan: Plan,
        images: Tensor,
        operating_point: OperatingPointLike,
        sizes: list[int],
        build: Callable[..., CompiledCascade],
        precision: Precision,
    ) -> None:
        self.plan, self.sizes, self.build = plan, sizes, build
        start = time.perf_counter()
        self.program = build(plan)
        self.compile_s = time.perf_counter() - start
        self.images = images.to(self.program.device)
        self.thresholds = plan.thresholds(operating_point)
        largest = self.images[: sizes[-1]]
        self.first_call_s, _ = clocks_of(partial(self.program, largest, self.thresholds), largest.device)
        self.max_error = _check(self.program, self.images[:_CHECKED_IMAGES], precision)
        self.exits = self._exits(self.program, self.thresholds)

        stages = range(len(plan.stages))
        rows = [self._rows(k, stage_alone(plan, k).input) for k in stages]
        self.alone = [
            _fastest([_Turns(program, rows[k], size) for size in sizes])
            for k, program in enumerate(self._alone(precision))
        ]
        always = torch.tensor([-math.inf])
        self.exit = [
            _Turns(build(stage_with_exit(plan, k)), rows[k], self.alone[k].size, always) for k in stages[:-1]
        ]
        self.steps = {k: steps for k, alone in enumerate(self.alone) if (steps := _steps_of(alone))}
        self.cascade = {size: self.turns_of(self.program, size) for size in sizes}
        self.dense = {size: self._dense(self.alone[-1].call, size) for size in sizes}
        self.other_precisions = {
            other: [_Turns(p, rows[k], self.alone[k].size) for k, p in enumerate(self._alone(other))]
            for other in get_args(Precision)
            if other != precision and self._can_run(other)
        }

    def _alone(self, precision: Precision) -> list[CompiledCascade]:
        """Every stage as a program of its own."""
        parts = [stage_alone(self.plan, k) for k in range(len(self.plan.stages))]
        return [self.build(part, wanted=precision) for part in parts]

    def _can_run(self, precision: Precision) -> bool:
        try:
            self.build(self.plan, wanted=precision)
        except BackendUnavailable:
            return False
        return True

    def turns_of(self, program: CompiledCascade, size: int) -> _Turns:
        """The whole cascade on all images."""
        return _Turns(program, self.images, size, self.thresholds)

    def turns(self) -> list[_Timed]:
        """Everything of this engine that is timed."""
        others = [turns for stages in self.other_precisions.values() for turns in stages]
        whole = [*self.cascade.values(), *self.dense.values(), *self.alone, *self.exit, *others]
        return [*whole, *self.steps.values()]

    def plain_torch(self, cascade: Cascade) -> dict[str, dict[int, _Turns]]:
        """The cascade's own forward, and its last exit on everything, by batch size."""
        never = torch.full((len(self.plan.stages) - 1,), math.inf)
        last = cascade.stage(len(cascade.stages) - 1)

        @torch.inference_mode()
        def dense(x: Tensor) -> object:
            if last.input == "previous":
                return cascade(x, never)
            with eval_mode(last):
                return last(cascade.images(x))[1].softmax(1)

        return {
            "PyTorch, the cascade": {s: _Turns(cascade, self.images, s, self.thresholds) for s in self.sizes},
            "PyTorch, last exit on everything": {s: _Turns(dense, self.images, s) for s in self.sizes},
        }

    def _dense(self, last: Callable[..., Any], size: int) -> _Turns:
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

    ##### What the times mean

    @property
    def mac_share(self) -> float:
        """Mean MACs over dense MACs."""
        return self._mean_macs(self.plan, self.exits) / self.plan.dense_macs

    @staticmethod
    def _mean_macs(plan: Plan, exits: Tensor) -> float:
        return float(plan.exit_macs[exits].double().mean())

    def instrumentation_share(self) -> float:
        """What reading the clocks adds to the shortest call there is."""
        device = self.images.device
        clocks = min(clocks_of(partial(clocks_of, int, device), device)[0] for _ in range(100))
        shortest = min(c.seconds for calls in self.cascade[self.sizes[0]].rounds for c in calls)
        return clocks / shortest

    def _reached(self, exits: Tensor) -> list[int]:
        """How many instances came to each stage."""
        return [int((exits >= k).sum()) for k in range(len(self.plan.stages))]

    def stage_timing(self, k: int, ceilings: Ceilings) -> StageTiming:
        """What is known about stage k."""
        stage, turns = self.plan.stages[k], self.alone[k]
        alone = turns.per_image
        exit_s = [0.0]
        if k < len(self.exit):
            exit_s = [b - a for a, b in zip(alone, self.exit[k].per_image, strict=True)]
        reached = [*self._reached(self.exits), 0]
        seconds = statistics.median(alone)
        gflops = 2e-9 * stage.macs / seconds
        program = cast(CompiledCascade, turns.call).program
        weights = sum(report.weight_bytes for report in program.describe())
        image = turns.rows[0]
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
            steps=tuple(self.steps[k].timings()) if k in self.steps else (),
        )

    def batch_timing(self, size: int) -> BatchTiming:
        """What is known about the cascade at one batch size."""
        turns, dense = self.cascade[size], self.dense[size].per_image
        time_share = statistics.median(a / b for a, b in zip(turns.per_image, dense, strict=True))
        calls = sorted(call.seconds for part in turns.rounds for call in part)
        shares = [self._breakdown(turns, r) for r in range(len(turns.rounds))]
        stages, exits, compaction, idle = (
            Spread.of([1e3 * part for part in parts]) for parts in zip(*shares, strict=True)
        )
        return BatchTiming(
            batch=size,
            batches=len({call.batch for part in turns.rounds for call in part}),
            images_per_s=turns.rate,
            latency_ms={f"p{p}": 1e3 * calls[math.ceil(p / 100 * len(calls)) - 1] for p in (50, 90, 95, 99)},
            calls=len(calls),
            schedule_efficiency=Spread.of([self._efficiency(turns, r) for r in range(len(turns.rounds))]),
            stages_ms_per_image=stages,
            exits_ms_per_image=exits,
            compaction_ms_per_image=compaction,
            idle_ms_per_image=idle,
            dense_images_per_s=self.dense[size].rate,
            saving=(1 - time_share) / (1 - self.mac_share) if self.mac_share <= _LARGEST_MAC_SHARE else None,
        )

    def _round_exits(self, turns: _Turns, r: int) -> Tensor:
        """Exits of the images that the cascade ran in round r."""
        return torch.cat([self.exits[turns.batches[call.batch]] for call in turns.rounds[r]])

    def _efficiency(self, turns: _Turns, r: int) -> float:
        """In round r, the time of the stages alone on what reached them over the cascade's."""
        reached = self._reached(self._round_exits(turns, r))
        ideal = sum(n * alone.per_image[r] for n, alone in zip(reached, self.alone, strict=True))
        return ideal / sum(call.seconds for call in turns.rounds[r])

    def _breakdown(self, turns: _Turns, r: int) -> tuple[float, float, float, float]:
        """In round r, seconds per image in stages, exits, compaction and waiting; they add up to the call."""
        exits = self._round_exits(turns, r)
        reached = [n / len(exits) for n in self._reached(exits)]
        stages = sum(n * alone.busy_per_image[r] for n, alone in zip(reached, self.alone, strict=True))
        pairs = zip(reached, self.alone, self.exit, strict=False)
        exit_s = sum(n * (both.busy_per_image[r] - alone.busy_per_image[r]) for n, alone, both in pairs)
        busy = turns.busy_per_image[r]
        return stages, exit_s, busy - stages - exit_s, turns.per_image[r] - busy

    def what_ifs(self) -> Iterator[WhatIf]:
        """Every other stored operating point, every stage left out that can be, every other precision."""
        everything = list(range(len(self.plan.stages)))
        for name, point in self.plan.operating_points.items():
            thresholds = self.plan.thresholds(point)
            if not torch.equal(thresholds, self.thresholds):
                yield self._what_if(
                    f"operating point {name}", self.program, thresholds, everything, self.alone
                )
        for k, stage in enumerate(self.plan.stages):
            changed = without_stage(self.plan, k)
            if changed is not None:
                kept = [j for j in everything if j != k]
                thresholds, program = self.thresholds[kept[:-1]], self.build(changed)
                yield self._what_if(f"without stage {stage.name}", program, thresholds, kept, self.alone)
        for precision, alone in self.other_precisions.items():
            program = self.build(self.plan, wanted=precision)
            yield self._what_if(f"precision {precision}", program, self.thresholds, everything, alone)

    def _what_if(
        self,
        change: str,
        program: CompiledCascade,
        thresholds: Tensor,
        kept: Sequence[int],
        alone: Sequence[_Turns],
    ) -> WhatIf:
        """Predict from how many images the changed cascade sends to each stage."""
        exits = self._exits(program, thresholds)
        shares = [0.0] * len(self.plan.stages)
        seconds = 0.0
        for position, k in enumerate(kept):
            shares[k] = float((exits == position).double().mean())
            seconds += float((exits >= position).double().mean()) * statistics.median(alone[k].per_image)
        efficiency = self.batch_timing(self.sizes[-1]).schedule_efficiency.median
        return WhatIf(change, tuple(shares), self._mean_macs(program.plan, exits), efficiency / seconds)


def _check(program: CompiledCascade, images: Tensor, precision: Precision) -> float:
    """Largest difference of a probability from the reference backend's, at every forced exit."""
    reference = compile(program.plan, backend="reference", device=program.device)
    error = 0.0
    for k in range(len(program.plan.stages)):
        thresholds = forced_exit(k, len(program.plan.stages))
        ours, expected = (cast(CascadeOutput, p(images, thresholds)).probs for p in (program, reference))
        difference = (ours.double() - expected.double()).abs().nan_to_num(nan=math.inf)
        error = max(error, float(difference.masked_fill(~expected.isfinite(), 0).max()))
    if error > _LARGEST_ERROR[precision]:
        raise FastCascadeError(
            f"backend {program.backend!r} at {precision} answers probabilities that differ by {error:.2g} "
            f"from the reference's; at most {_LARGEST_ERROR[precision]:g} is expected, so "
            "its speed means nothing"
        )
    return error
