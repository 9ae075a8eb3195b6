"""From times to figures: rates, shares of the peaks, schedule efficiency, breakdown, predictions."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from fastcascade.benchmarking.clocks import clocks_of, percentiles_ms
from fastcascade.benchmarking.parts import without_stage
from fastcascade.benchmarking.programs import Programs
from fastcascade.benchmarking.results import BatchTiming, Spread, StageTiming, StepTiming, WhatIf
from fastcascade.benchmarking.torch_peaks import Peaks
from fastcascade.benchmarking.turns import StepTurns, Turns
from fastcascade.engine import CompiledCascade

__all__ = ["batch_timing", "instrumentation_share", "mac_share", "stage_timing", "what_ifs"]

_BYTES = 4
_LARGEST_MAC_SHARE = 0.7


def mac_share(programs: Programs) -> float:
    """Mean MACs over dense MACs."""
    plan = programs.plan
    return float(plan.exit_macs[programs.exits].double().mean()) / plan.dense_macs


def instrumentation_share(programs: Programs) -> float:
    """What reading the clocks adds to the shortest call."""
    device = programs.images.device
    clocks = min(clocks_of(partial(clocks_of, int, device), device)[0] for _ in range(100))
    rounds = programs.cascade[programs.sizes[0]].rounds
    return clocks / min(c.seconds for calls in rounds for c in calls)


def stage_timing(programs: Programs, k: int, peaks: Peaks) -> StageTiming:
    """Stage k with its exit."""
    stage, turns = programs.plan.stages[k], programs.alone[k]
    alone = turns.per_image
    exit_s = [0.0]
    if k < len(programs.with_exit):
        # A difference of two times may be negative where the exit takes less than the timing's noise.
        exit_s = [max(0.0, b - a) for a, b in zip(alone, programs.with_exit[k].per_image, strict=True)]
    reached = [*_reached(programs, programs.exits), 0]
    seconds = statistics.median(alone)
    gflops = 2e-9 * stage.macs / seconds
    program = cast(CompiledCascade, turns.call).program
    weights = sum(report.weight_bytes for report in program.describe())
    image = turns.rows[0]
    logits = _BYTES * programs.plan.num_classes
    moved = image.numel() * image.element_size() + logits + weights / turns.size
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
        gflops_share=gflops / peaks.gflops,
        bytes_per_image=moved,
        bandwidth_share=moved / seconds / 1e9 / peaks.copy_gbs,
        steps=tuple(_step_timings(programs.steps[k])) if k in programs.steps else (),
    )


def _step_timings(turns: StepTurns) -> Iterator[StepTiming]:
    for rounds in zip(*turns.rounds, strict=True):
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


def batch_timing(programs: Programs, size: int) -> BatchTiming:
    """The cascade at one batch size."""
    turns, dense = programs.cascade[size], programs.dense[size].per_image
    time_share = statistics.median(a / b for a, b in zip(turns.per_image, dense, strict=True))
    macs = mac_share(programs)
    calls = [call.seconds for part in turns.rounds for call in part]
    shares = [_breakdown(programs, turns, r) for r in range(len(turns.rounds))]
    stages, exits, compaction, idle = (
        Spread.of([1e3 * part for part in parts]) for parts in zip(*shares, strict=True)
    )
    return BatchTiming(
        batch=size,
        batches=len({call.batch for part in turns.rounds for call in part}),
        images_per_s=turns.rate,
        latency_ms=percentiles_ms(calls, (50, 90, 95, 99)),
        calls=len(calls),
        schedule_efficiency=Spread.of([_efficiency(programs, turns, r) for r in range(len(turns.rounds))]),
        stages_ms_per_image=stages,
        exits_ms_per_image=exits,
        compaction_ms_per_image=compaction,
        idle_ms_per_image=idle,
        dense_images_per_s=programs.dense[size].rate,
        saving=(1 - time_share) / (1 - macs) if macs <= _LARGEST_MAC_SHARE else None,
    )


def _reached(programs: Programs, exits: Tensor) -> list[int]:
    """How many instances came to each stage."""
    return [int((exits >= k).sum()) for k in range(len(programs.plan.stages))]


def _round_exits(programs: Programs, turns: Turns, r: int) -> Tensor:
    """Exits of the images that the cascade ran in round r."""
    return torch.cat([programs.exits[turns.batches[call.batch]] for call in turns.rounds[r]])


def _efficiency(programs: Programs, turns: Turns, r: int) -> float:
    """In round r, the time of the stages alone on the images that reached them, over the cascade's."""
    reached = _reached(programs, _round_exits(programs, turns, r))
    ideal = sum(n * alone.per_image[r] for n, alone in zip(reached, programs.alone, strict=True))
    return ideal / sum(call.seconds for call in turns.rounds[r])


def _breakdown(programs: Programs, turns: Turns, r: int) -> tuple[float, float, float, float]:
    """In round r, seconds per image in stages, exits, compaction and waiting; they add up to the call."""
    exits = _round_exits(programs, turns, r)
    reached = [n / len(exits) for n in _reached(programs, exits)]
    stages = sum(n * alone.busy_per_image[r] for n, alone in zip(reached, programs.alone, strict=True))
    pairs = zip(reached, programs.alone, programs.with_exit, strict=False)
    exit_s = sum(n * max(0.0, both.busy_per_image[r] - alone.busy_per_image[r]) for n, alone, both in pairs)
    busy = turns.busy_per_image[r]
    return stages, exit_s, busy - stages - exit_s, turns.per_image[r] - busy


def what_ifs(programs: Programs) -> Iterator[WhatIf]:
    """Every other stored operating point, every stage left out that can be, every other precision."""
    plan, build = programs.plan, programs.build
    everything = list(range(len(plan.stages)))
    for name, point in programs.program.usable_points.items():
        thresholds = programs.program.thresholds(point)
        if not torch.equal(thresholds, programs.thresholds):
            change = f"operating point {name}"
            yield _what_if(programs, change, programs.program, thresholds, everything, programs.alone)
    for k, stage in enumerate(plan.stages):
        changed = without_stage(plan, k)
        if changed is not None:
            kept = [j for j in everything if j != k]
            thresholds, program = programs.thresholds[kept[:-1]], build(changed)
            yield _what_if(programs, f"without stage {stage.name}", program, thresholds, kept, programs.alone)
    for precision, alone in programs.other_precisions.items():
        program, change = build(plan, wanted=precision), f"precision {precision}"
        yield _what_if(programs, change, program, programs.thresholds, everything, alone)


def _what_if(
    programs: Programs,
    change: str,
    program: CompiledCascade,
    thresholds: Tensor,
    kept: Sequence[int],
    alone: Sequence[Turns],
) -> WhatIf:
    """Predict from how many images the changed cascade sends to each stage."""
    exits = programs.exits_of(program, thresholds)
    shares = [0.0] * len(programs.plan.stages)
    seconds = 0.0
    for position, k in enumerate(kept):
        shares[k] = float((exits == position).double().mean())
        seconds += float((exits >= position).double().mean()) * statistics.median(alone[k].per_image)
    efficiency = batch_timing(programs, programs.sizes[-1]).schedule_efficiency.median
    macs = float(program.plan.exit_macs[exits].double().mean())
    return WhatIf(change, tuple(shares), macs, efficiency / seconds)
