"""Which stages to run in int8: early stages only decide whether to stop, so they can be the coarse ones."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastcascade.data.batches import Data, arrays
from fastcascade.engine import CompiledCascade, compile, quantize
from fastcascade.errors import CalibrationError, DataError, InvalidArgument
from fastcascade.evaluation.calibration import find_thresholds_by_time, measure_point
from fastcascade.evaluation.evaluation import Trace
from fastcascade.evaluation.logits import stage_programs
from fastcascade.lowering.export import plan as lower
from fastcascade.lowering.plan import Plan
from fastcascade.model.cascade import Cascade
from fastcascade.types import OperatingPoint

__all__ = ["PrecisionChoice", "choose_precision"]

BATCH = 500
ROUNDS = 7


@dataclass(frozen=True)
class PrecisionChoice:
    """Stage precisions and thresholds for a budget.

    Attributes:
        budget_ms: allowed mean time per image.
        precision: (K,) "fp32" or "int8".
        point: the thresholds, with accuracy, cost and exit shares as measured on the held-out images.
        mean_ms: expected time per image there.
        exit_ms: (K,) measured milliseconds per image of stopping at each exit.
    """

    budget_ms: float
    precision: tuple[str, ...]
    point: OperatingPoint
    mean_ms: float
    exit_ms: tuple[float, ...]


def choose_precision(
    cascade: Cascade,
    calibration_data: Data,
    held_out: Data,
    budgets_ms: Sequence[float],
    *,
    batch: int = 64,
    threads: int | None = None,
) -> list[PrecisionChoice]:
    """The most accurate stage precisions and thresholds for each budget: one curve over all precisions.

    Every stage runs in fp32 and in int8 on all held-out images and is timed on batches of them, in turns.
    Then every combination of precisions is judged with the thresholds that serve it best.

    Args:
        calibration_data: images for the scales of int8; see :func:`fastcascade.quantize`.
        held_out: labelled images that trained no stage. Images that fitted the selector look easier than
            new ones do.
        budgets_ms: mean milliseconds per image; those below the fastest first exit are left out.
        batch: images per call that is timed.
        threads: CPU threads; by default torch's number.

    Returns:
        one choice per budget that can be met, in ascending order. ``fc.compile(cascade, precision=
        choice.precision, calibration_data=…)`` and ``compiled.store_operating_point(choice.point)`` make it
        run.

    Raises:
        CalibrationError: no budget can be met.
        DataError: the held-out images have no labels.
        InvalidArgument: no budget, or one that is not positive.
    """
    if not budgets_ms or not all(budget > 0 for budget in budgets_ms):
        raise InvalidArgument(f"budgets_ms is {list(budgets_ms)}; expected positive numbers")
    exact = lower(cascade)
    coarse = quantize(exact, calibration_data)
    images, labels = arrays(held_out, cascade.num_classes)
    if labels is None:
        raise DataError("the held-out images have no labels; accuracy needs them")
    images = exact.input.nchw(images)
    plans = [_mixed(exact, coarse, wanted) for wanted in _combinations(len(exact.stages))]
    traces, times = _traces_and_times(plans, images, labels, batch, threads)
    choices = [_best(plans, traces, times, budget) for budget in sorted(budgets_ms)]
    found = [choice for choice in choices if choice is not None]
    if not found:
        raise CalibrationError(
            f"no budget up to {max(budgets_ms):g} ms can be met: the fastest first exit takes "
            f"{min(exit_ms[0] for exit_ms in times):.3g} ms per image"
        )
    return found


def _combinations(stages: int) -> list[tuple[bool, ...]]:
    """All choices of the stages that run in int8."""
    return list(itertools.product([False, True], repeat=stages))


def _mixed(exact: Plan, coarse: Plan, in_int8: Sequence[bool]) -> Plan:
    pairs = zip(exact.stages, coarse.stages, strict=True)
    stages = tuple(pair[chosen] for chosen, pair in zip(in_int8, pairs, strict=True))
    return replace(exact, stages=stages, operating_points={})


def _traces_and_times(
    plans: Sequence[Plan], images: Tensor, labels: Tensor, batch: int, threads: int | None
) -> tuple[list[Trace], list[tuple[float, ...]]]:
    """What every plan says about every image, and its exit times; stages that plans share run once."""
    programs: dict[tuple[str, ...], CompiledCascade] = {}
    names: list[list[tuple[str, ...]]] = []  # of each plan's stages
    for plan in plans:
        parts = stage_programs(plan)
        names.append([(str(k), *part.precision) for k, part in enumerate(parts)])
        for name, part in zip(names[-1], parts, strict=True):
            if name not in programs:
                programs[name] = compile(part, output="log_probs", threads=threads)
    logits = {
        name: torch.cat([program(part) for part in images.split(BATCH)]) for name, program in programs.items()
    }
    ms = _times(programs, images[:batch])
    traces, times = [], []
    for plan, own in zip(plans, names, strict=True):
        traces.append(Trace.from_plan_logits(plan, torch.stack([logits[name] for name in own]), labels))
        times.append(_exit_times([ms[name] for name in own], plan))
    return traces, times


def _times(programs: dict[tuple[str, ...], CompiledCascade], images: Tensor) -> dict[tuple[str, ...], float]:
    """Median milliseconds per image of each program, in turns so that a busy machine slows all alike."""
    seconds: dict[tuple[str, ...], list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            seconds[name].append(_seconds(partial(program, images)))
    return {name: 1e3 * statistics.median(values) / len(images) for name, values in seconds.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _exit_times(ms: Sequence[float], plan: Plan) -> tuple[float, ...]:
    """Milliseconds of stopping at each exit; a segment's time holds that of the segments before it."""
    total, times = 0.0, []
    for k, stage in enumerate(plan.stages):
        own = ms[k] - ms[k - 1] if stage.input == "previous" else ms[k]
        total += max(own, 1e-6)
        times.append(total)
    return tuple(times)


def _best(
    plans: Sequence[Plan], traces: Sequence[Trace], times: Sequence[tuple[float, ...]], budget: float
) -> PrecisionChoice | None:
    """The most accurate combination within a budget; of equal ones the fastest. None if none fits."""
    best: PrecisionChoice | None = None
    for plan, seen, exit_ms in zip(plans, traces, times, strict=True):
        try:
            thresholds = find_thresholds_by_time(seen, exit_ms, budget, None)
        except CalibrationError:
            continue
        target = {"budget_ms": budget, "exit_ms": list(exit_ms)}
        point = measure_point(seen, thresholds, f"{budget:g} ms", target)
        point = replace(point, precision=plan.recorded_precision)
        mean = sum(share * ms for share, ms in zip(point.exit_shares, exit_ms, strict=True))
        choice = PrecisionChoice(budget, plan.precision, point, mean, exit_ms)
        if best is None or _merit(choice) > _merit(best):
            best = choice
    return best


def _merit(choice: PrecisionChoice) -> tuple[float, float]:
    return choice.point.accuracy or 0.0, -choice.mean_ms
