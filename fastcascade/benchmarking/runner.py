"""Where the time of a cascade goes: each stage alone, exits, schedule, whole batches, single calls.

Calls are timed from outside, so a call costs the same whether or not anyone measures. The cascade and its
parts (a stage alone, a stage with its exit, the last network alone) are programs of the same engine, timed in
turns within one run. Single steps take their turns too, through an entry of the engine that no call uses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fastcascade.backends.interface import Precision
from fastcascade.benchmarking.analysis import (
    batch_timing,
    instrumentation_share,
    mac_share,
    stage_timing,
    what_ifs,
)
from fastcascade.benchmarking.clocks import seconds_of, torch_threads
from fastcascade.benchmarking.machine import busy_share, describe_machine, measure_energy
from fastcascade.benchmarking.pacing import PATTERNS, PacedTurns
from fastcascade.benchmarking.programs import Programs
from fastcascade.benchmarking.results import Benchmark
from fastcascade.benchmarking.torch_peaks import measure_peaks
from fastcascade.benchmarking.turns import take_turns
from fastcascade.data.batches import Data
from fastcascade.data.batches import batches as data_batches
from fastcascade.engine import CompiledCascade, compile
from fastcascade.errors import DataError, FastCascadeError, InvalidArgument
from fastcascade.lowering.export import plan as lower_plan
from fastcascade.lowering.plan import Plan
from fastcascade.model.cascade import Cascade
from fastcascade.types import CascadeOutput, OperatingPointLike, forced_exit

__all__ = ["Benchmark", "benchmark"]

MAX_IMAGES = 4096
"""More images than this only make a run longer."""

_CHECKED_IMAGES = 32
_LARGEST_ERROR = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 5e-2, "int8": 5e-2}
"""Of a probability at a forced exit. A program with a larger error computes something else."""


def benchmark(
    model: Cascade | Plan,
    data: Data | None = None,
    *,
    batches: Sequence[int] = (1, 8, 64, 256),
    threads: Sequence[int] = (),
    operating_point: OperatingPointLike = None,
    backend: str = "auto",
    precision: Precision | None = None,
    device: torch.device | str | None = None,
    peers: bool = False,
    rounds: int = 7,
    seconds: float = 0.1,
) -> Benchmark:
    """Check a cascade's results against the reference backend's, then time it and its parts in turns.

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
        FastCascadeError: its results differ from the reference backend's.

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
    if plan.is_quantized and precision == "int8":
        precision = None  # a mixed plan has parts in float32
    images = _noise(plan, max(batches, default=0)) if data is None else _images(plan, data)
    sizes = sorted({size for size in batches if 1 <= size <= len(images)})
    if not sizes:
        raise InvalidArgument(f"no batch size of {list(batches)} lies in 1 … {len(images)}, the images there")

    def build(
        part: Plan, count: int | None = threads[0] if threads else None, wanted: Precision | None = precision
    ) -> CompiledCascade:
        return compile(part, backend=backend, precision=wanted, device=device, threads=count)

    busy = busy_share()
    with torch_threads(threads[0] if threads else torch.get_num_threads()):
        start = time.perf_counter()
        program = build(plan)
        compile_s = time.perf_counter() - start
        images = images.to(program.device)
        largest, thresholds = images[: sizes[-1]], program.thresholds(operating_point)
        first_call_s = seconds_of(lambda: program(largest, thresholds), program.device)
        max_error = _check(program, images[:_CHECKED_IMAGES])
        programs = Programs(program, images, operating_point, sizes, build)
        peaks = measure_peaks(program.device)
        paced = [PacedTurns(program, images, pattern, thresholds) for pattern in PATTERNS]
        counts = {count: programs.turns_of(build(plan, count), sizes[-1]) for count in threads}
        plain = programs.plain_torch(model) if isinstance(model, Cascade) and peers else {}
        others = [turns for of_peer in plain.values() for turns in of_peer.values()]
        take_turns([*programs.turns(), *paced, *counts.values(), *others], rounds, seconds)
        machine = describe_machine(program)
        energy, note = measure_energy(lambda: program(largest, thresholds), sizes[-1])
    return Benchmark(
        machine=machine,
        backend=program.backend,
        precision=program.precision,
        images=len(images),
        compile_s=compile_s,
        first_call_ms=1e3 * first_call_s,
        max_error=max_error,
        instrumentation_share=instrumentation_share(programs),
        peaks=peaks,
        stages=tuple(stage_timing(programs, k, peaks) for k in range(len(plan.stages))),
        batches=tuple(batch_timing(programs, size) for size in sizes),
        paced=tuple(turns.timing for turns in paced),
        threads={count: turns.rate for count, turns in counts.items()},
        mac_share=mac_share(programs),
        what_if=tuple(what_ifs(programs)),
        peers={name: {size: t.rate for size, t in turns.items()} for name, turns in plain.items()},
        energy_mj_per_image=energy,
        energy_note=note,
        busy_share=busy,
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


def _check(program: CompiledCascade, images: Tensor) -> float:
    """Largest difference of a probability from the reference backend's, at every forced exit."""
    reference = compile(program.plan, backend="reference", device=program.device)
    error = 0.0
    for k in range(len(program.plan.stages)):
        thresholds = forced_exit(k, len(program.plan.stages))
        ours, expected = (cast(CascadeOutput, p(images, thresholds)).probs for p in (program, reference))
        difference = (ours.double() - expected.double()).abs().nan_to_num(nan=math.inf)
        error = max(error, float(difference.masked_fill(~expected.isfinite(), 0).max()))
    allowed = _LARGEST_ERROR[program.precision]
    if error > allowed:
        raise FastCascadeError(
            f"backend {program.backend!r} at {program.precision} returns probabilities that differ from the "
            f"reference backend's by {error:.2g} (allowed: {allowed:g}), so it was not timed"
        )
    return error
