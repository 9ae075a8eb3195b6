"""The microbenchmark: what it counts is right, its parts are what they claim, no timing is asserted."""

from __future__ import annotations

import copy
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from rich.console import Console
from torch import nn

import fastcascade as fc
from fastcascade.backends.cpu import CpuProgram
from fastcascade.backends.interface import StepTime
from fastcascade.backends.registry import load_backend
from fastcascade.benchmarking.machine import measure_energy
from fastcascade.benchmarking.pacing import PATTERNS, PacedTurns, Pattern, paced_calls
from fastcascade.benchmarking.parts import stage_alone, stage_with_exit, without_stage
from fastcascade.benchmarking.results import Benchmark, Spread
from fastcascade.benchmarking.runner import _check, benchmark
from fastcascade.benchmarking.tables import bench_tables, kernel_cells
from fastcascade.benchmarking.torch_peaks import Peaks, measure_peaks
from fastcascade.engine import CompiledCascade
from fastcascade.errors import DataError, FastCascadeError, InvalidArgument
from fastcascade.lowering.export import plan as lower_plan
from fastcascade.model.resnet import cut_into_segments, resnet_cifar

SHAPE = (3, 8, 8)


def small_network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


@pytest.fixture(autouse=True)
def _known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcascade.benchmarking.runner.measure_peaks", lambda device: Peaks(100.0, 10.0))
    monkeypatch.setattr("fastcascade.benchmarking.turns._PROBE_SECONDS", 1e-4)


@pytest.fixture
def cascade() -> fc.Cascade:
    torch.manual_seed(0)
    stages = [fc.Stage(small_network(width), name=f"w{width}") for width in (2, 4, 8)]
    made = fc.Cascade(stages, fc.MLPSelector(), 4, SHAPE, combine=(0.25, 0.5, 1.0)).eval()
    with torch.no_grad():
        scores = made.all_exits(torch.randn(64, *SHAPE))[1]
    thresholds = tuple(scores.median(1).values.tolist())
    point = fc.OperatingPoint("default", thresholds, {}, None, 0.0, (0.5, 0.25, 0.25), 64)
    made.operating_points = {
        "default": point,
        "never": replace(point, name="never", thresholds=(math.inf,) * 2),
    }
    return made


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(48, *SHAPE, generator=torch.Generator().manual_seed(1))


def measure(cascade: fc.Cascade, images: torch.Tensor, **settings: object) -> Benchmark:
    arguments: dict[str, object] = {"batches": [1, 16], "rounds": 2, "seconds": 1e-4, "backend": "reference"}
    return benchmark(cascade, (images, None), **(arguments | settings))  # type: ignore[arg-type]


def invent_clocks(
    monkeypatch: pytest.MonkeyPatch,
    clocks: Callable[[partial[fc.CascadeOutput], torch.device], tuple[float, float]],
) -> None:
    """Let calls take invented times. Paced calls would take real time, so there are none."""
    monkeypatch.setattr("fastcascade.benchmarking.turns.clocks_of", clocks)
    monkeypatch.setattr("fastcascade.benchmarking.runner.PATTERNS", ())


def test_counts_how_many_images_reach_each_stage(cascade: fc.Cascade, images: torch.Tensor) -> None:
    measured = measure(cascade, images)
    exits = cascade(images).exit_stage
    assert [stage.images_in for stage in measured.stages] == [int((exits >= k).sum()) for k in range(3)]
    assert [stage.images_out for stage in measured.stages] == [int((exits > k).sum()) for k in range(3)]
    assert measured.mac_share == pytest.approx(cascade(images).cost_macs.double().mean() / cascade.dense_macs)


def test_calls_are_paced_in_every_pattern(cascade: fc.Cascade, images: torch.Tensor) -> None:
    measured = measure(cascade, images)
    assert [timing.pattern for timing in measured.paced] == [pattern.name for pattern in PATTERNS]
    for timing in measured.paced:
        assert timing.calls == 2
        assert 0 < timing.latency_ms["p50"] <= timing.latency_ms["p99"]


def test_patterns_decide_the_pauses_and_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        events.append("sleep")
        now[0] += seconds

    def call(images: int) -> None:
        events.append(str(images))
        now[0] += 0.002

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    for pattern in PATTERNS:
        events.clear()
        start = now[0]
        assert paced_calls(call, pattern, 200, seed=0) == pytest.approx([0.002] * 200, abs=0.02), pattern
        sizes = {int(event) for event in events if event != "sleep"}
        assert sizes == (set(range(1, 9)) if "mixed" in pattern.name else {8})
        assert ("sleep" in events) == bool(pattern.pause_s or pattern.per_second)
        if pattern.per_second:
            assert (now[0] - start) / 200 == pytest.approx(1 / 30, rel=0.2)


def test_a_long_turn_has_a_bounded_number_of_paced_calls() -> None:
    turns = PacedTurns(lambda rows: None, torch.zeros(8), Pattern("loop"))
    assert len(turns.take(seconds=1e9)) == 400


def test_a_call_that_is_late_counts_from_when_it_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def call(images: int) -> None:
        now[0] += 1.0  # far more than 30 arrivals a second allow

    seconds = paced_calls(call, Pattern("flood", per_second=30.0), 5, seed=0)
    assert seconds == sorted(seconds)
    assert seconds[-1] > 4


def test_operating_point_decides_what_is_measured(cascade: fc.Cascade, images: torch.Tensor) -> None:
    measured = measure(cascade, images, operating_point="never")
    assert [stage.images_in for stage in measured.stages] == [48, 48, 48]
    assert all(batch.saving is None for batch in measured.batches)  # more MACs than dense: η says nothing


def test_rates_follow_from_times(cascade: fc.Cascade, images: torch.Tensor) -> None:
    measured = measure(cascade, images)
    for k, stage in enumerate(measured.stages):
        assert stage.images_per_s == pytest.approx(1e3 / stage.ms_per_image.median)
        assert stage.gflops == pytest.approx(2e-9 * cascade.stage_macs[k] * stage.images_per_s)
        assert stage.gflops_share == pytest.approx(stage.gflops / measured.peaks.gflops)
        both = stage.ms_per_image.median + stage.exit_ms_per_image.median
        assert stage.ms == pytest.approx(stage.images_in * both)
    assert measured.exit_ms[0] == pytest.approx(measured.stages[0].ms / 48)
    assert list(measured.exit_ms) == sorted(measured.exit_ms)
    assert measured.dense_ms == pytest.approx(1e3 / measured.batches[-1].dense_images_per_s.median)
    for batch in measured.batches:
        assert batch.latency_ms["p50"] <= batch.latency_ms["p95"] <= batch.latency_ms["p99"]


def test_schedule_efficiency_finds_a_schedule_that_wastes_a_fifth(
    cascade: fc.Cascade, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Calls take invented times: a stage alone, also with its exit, 1 ms an image; the cascade 1.25 times what
    # the stages need for the images that reach them.
    # In a fifth of the cascade's time its threads wait; the rest is work like that of the stages.
    def invented(call: partial[fc.CascadeOutput], device: torch.device) -> tuple[float, float]:
        if not isinstance(call.func, CompiledCascade):
            return 1e-6, 1e-6
        if len(call.func.plan.stages) < 3:
            return 1e-3 * len(call.args[0]), 1e-3 * len(call.args[0])
        needed = 1e-3 * float((call().exit_stage + 1).sum())
        return 1.25 * needed, needed

    invent_clocks(monkeypatch, invented)
    batch = measure(cascade, images, batches=[16], seconds=1e9).batches[0]
    visits = float((cascade(images).exit_stage + 1).sum()) / len(images)
    assert visits > 1.2
    assert batch.batches >= 64
    assert batch.schedule_efficiency.median == pytest.approx(0.8)
    assert batch.idle_ms_per_image.median == pytest.approx(0.25 * visits, rel=0.1)
    assert batch.compaction_ms_per_image.median == pytest.approx(0)
    assert batch.images_per_s.median == pytest.approx(1e3 / (1.25 * visits), rel=0.1)


def test_every_part_of_the_time_is_found_where_it_was_planted(
    cascade: fc.Cascade, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Milliseconds per image: 1, 2 and 4 in the stages, 0.1 and 0.3 in their exits, 0.5 in compaction."""
    stage_ms, exit_ms = {"w2": 1.0, "w4": 2.0, "w8": 4.0}, {"w2": 0.1, "w4": 0.3}
    compaction_ms, idle_ms = 0.5, 0.25

    def invented(call: partial[fc.CascadeOutput], device: torch.device) -> tuple[float, float]:
        if not isinstance(call.func, CompiledCascade):
            return 1e-6, 1e-6
        stages, n = call.func.plan.stages, len(call.args[0])
        first = stages[0].name
        if len(stages) < 3:  # a stage alone or with its exit, whose threads wait for a tenth of the time
            busy = 1e-3 * n * (stage_ms[first] + (exit_ms[first] if len(stages) == 2 else 0.0))
            return 1.1 * busy, busy
        reached = [int((call().exit_stage >= k).sum()) for k in range(3)]
        costs = [stage_ms[s.name] + exit_ms.get(s.name, 0.0) for s in stages]
        busy = 1e-3 * (sum(m * ms for m, ms in zip(reached, costs, strict=True)) + n * compaction_ms)
        return busy + 1e-3 * n * idle_ms, busy

    invent_clocks(monkeypatch, invented)
    batch = measure(cascade, images, batches=[48], seconds=1e9, rounds=1).batches[0]
    shares = [float((cascade(images).exit_stage >= k).double().mean()) for k in range(3)]
    assert shares[0] > shares[1] > shares[2] > 0
    stages = sum(share * ms for share, ms in zip(shares, stage_ms.values(), strict=True))
    exits = sum(share * ms for share, ms in zip(shares, exit_ms.values(), strict=False))
    assert batch.stages_ms_per_image.median == pytest.approx(stages)
    assert batch.exits_ms_per_image.median == pytest.approx(exits)
    assert batch.compaction_ms_per_image.median == pytest.approx(compaction_ms)
    assert batch.idle_ms_per_image.median == pytest.approx(idle_ms)


def test_rounds_go_on_where_the_one_before_ended(cascade: fc.Cascade, images: torch.Tensor) -> None:
    measured = measure(cascade, images, batches=[1], rounds=5, seconds=1e-9)
    assert measured.batches[0].batches == measured.batches[0].calls == 5


def test_wrong_answers_are_not_timed(cascade: fc.Cascade, images: torch.Tensor) -> None:
    spoilt = copy.deepcopy(cascade)
    with torch.no_grad():
        cast(nn.Conv2d, cast(nn.Sequential, spoilt.stage(1).module)[0]).weight.mul_(1.1)
    plan, wrong = lower_plan(cascade), lower_plan(spoilt)
    assert _check(fc.compile(plan, backend="reference"), images) == 0
    broken = fc.compile(wrong, backend="reference")
    broken.plan = plan
    with pytest.raises(FastCascadeError, match="so it was not timed"):
        _check(broken, images)


def test_plain_pytorch_is_timed_on_request(cascade: fc.Cascade, images: torch.Tensor) -> None:
    measured = measure(cascade, images, peers=True)
    assert list(measured.peers) == ["PyTorch, the cascade", "PyTorch, last exit on everything"]
    assert all(list(rates) == [1, 16] for rates in measured.peers.values())
    assert measure(cascade, images).peers == {}
    with pytest.raises(InvalidArgument, match="pass the cascade"):
        benchmark(lower_plan(cascade), peers=True)


def test_what_if_covers_precisions_that_the_backend_has(
    cascade: fc.Cascade, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = type(load_backend("reference")).unsupported_reason

    def allow_fp16(self: object, plan: object, *, precision: str, device: torch.device) -> str | None:
        return None if precision == "fp16" else refuse(self, plan, precision=precision, device=device)  # type: ignore[arg-type]

    monkeypatch.setattr(type(load_backend("reference")), "unsupported_reason", allow_fp16)
    rows = {row.change: row for row in measure(cascade, images).what_if}
    assert rows["precision fp16"].mean_macs == pytest.approx(cascade(images).cost_macs.double().mean())


@pytest.mark.parametrize("change", ["operating point never", "without stage w2", "without stage w8"])
def test_a_prediction_is_what_the_changed_cascade_then_does(
    cascade: fc.Cascade, images: torch.Tensor, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stage takes as long as its cost says, wherever it runs: then the prediction must be exact.
    def invented(call: partial[fc.CascadeOutput], device: torch.device) -> tuple[float, float]:
        if not isinstance(call.func, CompiledCascade):
            return 1e-6, 1e-6
        macs = torch.tensor([stage.macs for stage in call.func.plan.stages]).cumsum(0)
        seconds = 1e-9 * float(macs[call().exit_stage].sum())
        return seconds, seconds

    invent_clocks(monkeypatch, invented)
    settings: dict[str, object] = {"batches": [16], "seconds": 1e9, "rounds": 1}
    row = next(r for r in measure(cascade, images, **settings).what_if if r.change == change)
    plan, thresholds = lower_plan(cascade), cascade.thresholds()
    if change == "operating point never":
        thresholds = torch.full((2,), math.inf)
    else:
        left_out = 0 if change.endswith("w2") else 2
        changed = without_stage(plan, left_out)
        assert changed is not None
        plan, thresholds = changed, thresholds[[k for k in range(3) if k != left_out][:-1]]
    run = benchmark(plan, (images, None), operating_point=thresholds, backend="reference", **settings)  # type: ignore[arg-type]
    assert row.images_per_s == pytest.approx(run.batches[0].images_per_s.median, rel=0.1)


def test_parts_answer_as_the_stages_they_are(cascade: fc.Cascade, images: torch.Tensor) -> None:
    plan = lower_plan(cascade)
    for k in range(3):
        alone = fc.compile(stage_alone(plan, k), backend="reference")(images)
        expected = cascade.stage(k).module(images).softmax(1)
        torch.testing.assert_close(alone.probs, expected.detach())
    paired = fc.compile(stage_with_exit(plan, 1), backend="reference")
    assert (paired(images, [-math.inf]).exit_stage == 0).all()
    assert (paired(images, [math.inf]).exit_stage == 1).all()


def test_stages_of_a_backbone_are_timed_on_features_of_their_own_shape() -> None:
    segments = cut_into_segments(resnet_cifar(8), after=[1, 2])
    stages = [fc.Stage(m, e, input="previous" if k else "image") for k, (m, e) in enumerate(segments)]
    plan = lower_plan(fc.Cascade(stages, fc.MLPSelector(), 10, (3, 32, 32)))
    assert [stage_alone(plan, k).input.shape for k in range(3)] == [(3, 32, 32), (16, 32, 32), (32, 16, 16)]
    measured = benchmark(plan, batches=[4], rounds=1, seconds=1e-4, backend="reference")
    assert [row.change for row in measured.what_if] == ["without stage stage2"]


def test_a_stage_that_reads_a_vector_is_refused() -> None:
    first, second = nn.Sequential(nn.Flatten(), nn.Linear(192, 6)), nn.Linear(6, 5)
    stages = [fc.Stage(first, nn.Linear(6, 4)), fc.Stage(second, nn.Linear(5, 4), input="previous")]
    plan = lower_plan(fc.Cascade(stages, fc.MLPSelector(), 4, SHAPE))
    with pytest.raises(InvalidArgument, match=r"features of shape \(6,\)"):
        stage_alone(plan, 1)


def test_what_if_counts_what_the_changed_cascade_does(cascade: fc.Cascade, images: torch.Tensor) -> None:
    rows = {row.change: row for row in measure(cascade, images).what_if}
    assert set(rows) == {"operating point never", "without stage w2", "without stage w4", "without stage w8"}
    assert rows["operating point never"].exit_shares == (0, 0, 1)
    assert rows["operating point never"].mean_macs == cascade.exit_macs[-1]

    thresholds = cascade.thresholds()
    changed = without_stage(lower_plan(cascade), 1)
    assert changed is not None
    out = fc.compile(changed, backend="reference")(images, thresholds[:1])
    row = rows["without stage w4"]
    assert row.exit_shares[1] == 0
    assert row.exit_shares[0] == pytest.approx(float((out.exit_stage == 0).double().mean()))
    assert row.mean_macs == pytest.approx(float(out.cost_macs.double().mean()))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Softsign()], ids=["operations", "opaque"])
def test_one_foreign_network_without_images_or_labels(activation: nn.Module) -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 7, 4), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(body, nn.Linear(4, 1000))
    cascade = fc.Cascade([network], None, 1000, (3, 224, 224))
    measured = benchmark(cascade, batches=[1, 3], rounds=1, seconds=0.001, backend="cpu", peers=True)
    assert [stage.images_in for stage in measured.stages] == [3]
    assert [timing.batch for timing in measured.batches] == [1, 3]
    assert set(measured.peers["PyTorch, the cascade"]) == {1, 3}
    text = io.StringIO()
    Console(file=text, width=200).print(*bench_tables(measured))
    assert "nan" not in text.getvalue()


def test_threads_are_compared_where_the_backend_takes_them(cascade: fc.Cascade, images: torch.Tensor) -> None:
    reason = load_backend("cpu").unavailable_reason()
    if reason is not None:
        pytest.skip(f"the cpu backend cannot run: {reason}")
    measured = measure(cascade, images, backend="cpu", threads=[1, 2])
    assert list(measured.threads) == [1, 2]
    for first in (1, 2):  # the first is used for everything else
        assert measure(cascade, images, backend="cpu", threads=[first]).machine["threads"] == str(first)


def cpu_program(stages: Sequence[nn.Module | fc.Stage], shape: tuple[int, int, int]) -> CpuProgram:
    reason = load_backend("cpu").unavailable_reason()
    if reason is not None:
        pytest.skip(f"the cpu backend cannot run: {reason}")
    selector = fc.MLPSelector() if len(stages) > 1 else None
    program = fc.compile(fc.Cascade(list(stages), selector, 16, shape), backend="cpu", threads=2).program
    assert isinstance(program, CpuProgram)
    return program


def test_multiplies_and_bytes_of_every_step_are_those_counted_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 16),
    )
    steps = cpu_program([network], (3, 8, 8)).time_steps(0, torch.randn(1, 3, 8, 8), 0.0)
    assert [step.macs for step in steps if step.macs] == [
        16 * 8 * 8 * 3 * 3 * 3,
        32 * 4 * 4 * 16 * 3 * 3,
        32 * 4 * 4 * 3 * 3,
        32 * 16,
    ]
    # Channels that fill vectors, so that what is stored does not depend on their width.
    strided, linear = (s for s in steps if s.macs in (32 * 4 * 4 * 16 * 3 * 3, 32 * 16))
    assert strided.bytes_moved == 4 * (16 * 8 * 8 + 32 * 4 * 4 + 32 * (16 * 3 * 3 + 1))
    assert linear.bytes_moved == 4 * (32 + 16 + 16 * (32 + 1))
    pool = next(step for step in steps if step.kernel == "pool_average_f32")
    assert (pool.macs, pool.bytes_moved) == (0, 4 * (32 * 4 * 4 + 32))


def test_images_of_a_tile_share_one_reading_of_the_weights() -> None:
    program = cpu_program([nn.Sequential(nn.Flatten(), nn.Linear(192, 16))], (3, 8, 8))
    one, four = (program.time_steps(0, torch.randn(n, 3, 8, 8), 0.0)[-1].bytes_moved for n in (1, 4))
    assert one - four == pytest.approx(0.75 * 4 * 16 * (192 + 1))


def test_steps_of_a_stage_multiply_as_often_as_the_stage_and_none_is_missing() -> None:
    segments = cut_into_segments(resnet_cifar(8, num_classes=16), after=[1, 2])
    shared = [fc.Stage(m, e, input="previous" if k else "image") for k, (m, e) in enumerate(segments)]
    grouped = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.Conv2d(32, 8, 3, groups=2),
        nn.Conv2d(8, 8, (1, 3), groups=8),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(16),
    )
    grouped(torch.randn(1, 3, 32, 32))
    for program in (cpu_program(shared, (3, 32, 32)), cpu_program([grouped], (3, 32, 32))):
        for k, (stage, report) in enumerate(zip(program.plan.stages, program.describe(), strict=True)):
            steps = program.time_steps(k, torch.randn(3, *stage.shapes[0]), 0.0)
            assert 2 * sum(step.macs for step in steps) == 2 * stage.macs
            assert [step[:2] for step in steps] == list(report.kernels[:-1])  # the exit head is no step
            assert all(step.seconds > 0 and step.bytes_moved > 0 for step in steps)


def test_steps_become_rates_and_rows(
    cascade: fc.Cascade, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(stage.steps == () for stage in measure(cascade, images).stages)  # the reference has none
    seconds = iter([1.0] * 3 + [2.0] * 3 + [4.0] * 3)  # warm-up, then two rounds, of three stages

    def invented(self: CpuProgram, k: int, x: torch.Tensor, turn: float) -> list[StepTime]:
        took = next(seconds)
        return [StepTime("a", "conv", 6_000_000_000, 3e9, took), StepTime("b", "load", 0, 1e9, took / 3)]

    cpu_program([small_network(16).append(nn.Linear(4, 16))], SHAPE)  # skips where there is none
    monkeypatch.setattr(CpuProgram, "time_steps", invented)
    measured = measure(cascade, images, backend="cpu", rounds=2)
    step, other = measured.stages[0].steps
    assert step.ms_per_image == Spread.of([2000.0, 4000.0])
    assert (step.gflops, step.gbs) == (pytest.approx(4.0), pytest.approx(1.0))
    assert (other.gflops, other.gbs) == (0, pytest.approx(1.0))
    assert json.loads(json.dumps(measured.to_json()))["stages"][0]["steps"][0]["kernel"] == "conv"
    first, second = kernel_cells(measured)[:2]
    assert first == ("w2", "conv", "1", "3000000.00", "75%", "4", "4%", "1.0", "10%")
    assert second == ("w2", "load", "1", "1000000.00", "25%", "–", "–", "1.0", "10%")


@pytest.mark.parametrize(
    ("stage", "count", "seconds", "message"),
    [(1, 1, 0.0, "stage 1 does not exist"), (0, 0, 0.0, "got 0 rows"), (0, 1, math.nan, "seconds is nan")],
)
def test_steps_that_cannot_be_timed_are_refused(stage: int, count: int, seconds: float, message: str) -> None:
    program = cpu_program([nn.Sequential(nn.Flatten(), nn.Linear(192, 16))], (3, 8, 8))
    with pytest.raises(ValueError, match=message):
        program.time_steps(stage, torch.zeros(count, 3, 8, 8), seconds)


def test_leaves_torch_threads_as_they_were(cascade: fc.Cascade, images: torch.Tensor) -> None:
    before = torch.get_num_threads()
    measure(cascade, images)
    assert torch.get_num_threads() == before


def test_json_and_tables_hold_what_was_measured(cascade: fc.Cascade, images: torch.Tensor) -> None:
    measured = measure(cascade, images)
    measured = replace(
        measured, stages=(replace(measured.stages[0], name="[red]a\x1b[2J"), *measured.stages[1:])
    )
    facts = json.loads(json.dumps(measured.to_json()))
    assert facts["stages"][0]["images_in"] == 48
    assert {"p50", "p90", "p95", "p99"} == set(facts["batches"][0]["latency_ms"])
    console = Console(file=io.StringIO(), width=200, color_system=None)
    for table in bench_tables(measured):
        console.print(table)
    text = cast(io.StringIO, console.file).getvalue()
    assert "[red]a�[2J" in text
    assert "w8" in text
    assert "operating point never" in text


def test_energy_comes_from_zeus_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    assert measure_energy(lambda: None, 8) == (
        None,
        "energy was not measured: the package zeus is not installed",
    )

    calls = []

    class Monitor:
        def begin_window(self, name: str) -> None:
            calls.clear()

        def end_window(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(gpu_energy={}, cpu_energy={0: 0.002 * len(calls)})

    monkeypatch.setattr("fastcascade.benchmarking.machine._ENERGY_SECONDS", 0.01)
    monkeypatch.setitem(sys.modules, "zeus.monitor", SimpleNamespace(ZeusMonitor=Monitor))
    energy, _ = measure_energy(lambda: calls.append(0), 8)
    assert energy == pytest.approx(0.25)  # 2 mJ a call of 8 images


def test_peaks_are_measured() -> None:
    peaks = measure_peaks(torch.device("cpu"))
    assert peaks.gflops > 0.1
    assert peaks.copy_gbs > 0.01


def test_spread_of_one_value_and_of_many() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batches": [0, 64]}, "1 … 48"), ({"rounds": 0}, "rounds=0"), ({"seconds": 0.0}, "seconds=0")],
)
def test_bad_settings_are_refused(
    cascade: fc.Cascade, images: torch.Tensor, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        measure(cascade, images, **settings)


def test_no_images_are_refused(cascade: fc.Cascade) -> None:
    with pytest.raises(DataError, match="0 images"):
        measure(cascade, torch.empty(0, *SHAPE))
