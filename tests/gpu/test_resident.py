"""The resident kernel in the emulator: whole cascades give what the reference gives, without a race.

Every barrier is needed: left out, it is reported as a race. Every planted fault shows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resident_cases import (
    CASES,
    MORE_CASES,
    POOLED_CASES,
    SLOW_CASES,
    WIDE_CASES,
    Case,
    images,
    in_widest_gaps,
)
from resident_emulator import EmulatedResident, build, missing_emulator, union
from torch import Tensor

import fastcascade as fc
from fastcascade.backends.gpu.layer_lowering import stage_layers
from fastcascade.backends.gpu.resident_stage import ResidentChoice, ResidentStages, without_mirror
from fastcascade.backends.registry import load_backend
from fastcascade.kernels import reference
from fastcascade.kernels.cuda.resident_estimate import step_counts
from fastcascade.kernels.cuda.resident_plan import CLEAR_BORDER, RESIDUAL_FIRST
from fastcascade.kernels.cuda.resident_table import ResidentTable, fragments, resident_table
from fastcascade.kernels.reference import ExitTables, exit_tables
from fastcascade.lowering.plan import Plan
from fastcascade.types import forced_exit

TWIN, FP32 = 1e-3, 6e-3
"""Largest error of a log-probability, relative to the largest one: against the twin, which rounds to fp16 in
the same places (not between a convolution and the sum after it), and against fp32."""

BAND = 0.03
"""Of an exit's range of scores: images so close to its threshold may stop elsewhere."""

CPU = torch.device("cpu")


class Built:
    """A compilation that several plans share."""

    def __init__(self, folder: Path, cases: dict[str, Case], *changes: tuple[str, str]) -> None:
        self.cases = {name: case.plan() for name, case in cases.items()}
        plans = [resident for _, _, resident in self.cases.values()]
        assert len({plan.warps for plan in plans}) == 1
        self.types, self.heads = union(plans)
        self.library = build(folder, resident_table(plans[0], self.types, self.heads), *changes)

    def stages(self, name: str, launch: EmulatedResident) -> ResidentStages:
        """The launch of a case's stages."""
        _, plan, resident = self.cases[name]
        stages = ResidentStages(plan, ResidentChoice(resident, (None,) * len(plan.stages)), launch)
        stages.table = resident_table(resident, self.types, self.heads)
        return stages


def skip_without_emulator() -> None:
    reason = missing_emulator()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The quick cases, compiled once."""
    skip_without_emulator()
    return Built(tmp_path_factory.mktemp("resident"), CASES)


def run(stages: ResidentStages, x: Tensor, thresholds: Tensor) -> ExitTables:
    """The tables after the launch."""
    tables = exit_tables(len(x), stages.plan.num_classes)
    stages.run(x, tables, thresholds)
    return tables


def twin(plan: Plan, x: Tensor, thresholds: Tensor) -> ExitTables:
    """What kernels/reference.py makes of it, in fp16."""
    half = []
    for stage in plan.stages:
        unmirrored, mirror = without_mirror(stage)
        half.append((stage_layers(unmirrored, torch.float16, CPU), mirror))
    reads = [stage.input for stage in plan.stages[1:]]
    kept = [
        stage.features if after == "previous" else None
        for stage, after in zip(plan.stages, [*reads, ""], strict=True)
    ]
    exits = [
        reference.ResidentExit(
            weight,
            None if selector is None else selector.features or selector.kind,
            None if selector is None else selector.weights,
        )
        for weight, selector in zip(plan.stage_weights, (s.selector for s in plan.stages), strict=True)
    ]
    tables = exit_tables(len(x), plan.num_classes)
    pixel_table = plan.input.preprocess.table() if plan.input.preprocess and x.dtype == torch.uint8 else None
    left = reference.resident(
        [
            reference.ResidentStage(layers, value, mirror)
            for (layers, mirror), value in zip(half, kept, strict=True)
        ],
        exits,
        x,
        tables,
        thresholds.tolist(),
        pixel_table=pixel_table,
    )
    assert len(left) == 0
    return tables


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value; rows of NaN must be the same."""
    assert torch.equal(got.isnan(), want.isnan())
    return float((got - want).abs().nan_to_num().max() / want.abs().nan_to_num().max())


def check_forced(stages: ResidentStages, plan: Plan, x: Tensor) -> None:
    """Every exit forced in turn."""
    fp32 = load_backend("reference").lower(plan, precision="fp32", device=CPU, threads=None)
    for k in range(len(plan.stages)):
        thresholds = forced_exit(k, len(plan.stages))
        got = run(stages, x, thresholds)
        mirrored, exact = twin(plan, x, thresholds), fp32.run(x, thresholds)
        assert torch.equal(got.exit_stage, exact.exit_stage)
        assert error(got.log_probs, mirrored.log_probs) < TWIN
        assert error(got.log_probs, exact.log_probs) < FP32
        clear = (
            exact.log_probs.topk(2).values.diff().abs()[:, 0] > 4 * FP32 * exact.log_probs.abs().max()
        ) | (exact.label < 0)
        assert torch.equal(got.label[clear], exact.label[clear])


def check_free(stages: ResidentStages, cascade: fc.Cascade, plan: Plan, x: Tensor) -> None:
    """Images stop where they like; those near a threshold may stop elsewhere."""
    if len(plan.stages) == 1:
        return
    with torch.no_grad():
        scores = cascade.all_exits(plan.input.to_float(x))[1]
    thresholds = in_widest_gaps(scores)
    near = (scores - thresholds[:, None]).abs() < BAND * (scores.amax(1) - scores.amin(1))[:, None]
    got, want = run(stages, x, thresholds), twin(plan, x, thresholds)
    reached = torch.arange(len(scores))[:, None] <= want.exit_stage
    clear = ~(near & reached).any(0)
    assert clear.float().mean() > 0.5
    assert len(want.exit_stage[clear].unique()) > 1
    assert torch.equal(got.exit_stage[clear], want.exit_stage[clear])
    same = got.exit_stage == want.exit_stage
    assert error(got.log_probs[same], want.log_probs[same]) < TWIN


def check(built: Built, name: str, case: Case, **options: Any) -> dict[str, int]:
    """Everything about one case; returns the counts of its last launch."""
    launch = EmulatedResident(built.library, **options)
    cascade, plan, _ = built.cases[name]
    stages = built.stages(name, launch)
    x = images(case.images, plan.input.shape)
    check_forced(stages, plan, x[: min(case.images, 3)])
    check_free(stages, cascade, plan, x)
    assert launch.counts["races"] == launch.counts["deadlocks"] == 0
    return launch.counts


@pytest.mark.parametrize("name", CASES)
def test_cascades_answer_as_the_reference_does(built: Built, name: str) -> None:
    check(built, name, CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [MORE_CASES, SLOW_CASES, WIDE_CASES, POOLED_CASES],
    ids=["more", "large", "wide", "pooled"],
)
def test_more_cascades_answer_as_the_reference_does(tmp_path: Path, cases: dict[str, Case]) -> None:
    skip_without_emulator()
    several = Built(tmp_path, cases)
    for name, case in cases.items():
        check(several, name, case, blocks=2)


@pytest.mark.parametrize(
    "name",
    [
        "ResNet-8 then 14, mean",
        "four exits of a ResNet-20",
        "pooled networks in groups, one with GELU, one mirrored",
    ],
)
def test_the_same_bits_for_any_order_of_warps_and_number_of_blocks(built: Built, name: str) -> None:
    _, plan, _ = built.cases[name]
    x, thresholds = images(6, plan.input.shape), torch.zeros(len(plan.stages) - 1)
    answers = []
    for options in ({}, {"backward": True}, {"blocks": 3}, {"blocks": 2, "backward": True}):
        launch = EmulatedResident(built.library, **options)
        answers.append(run(built.stages(name, launch), x, thresholds))
        assert launch.counts["races"] == launch.counts["deadlocks"] == 0
    for other in answers[1:]:
        for first, second in zip(answers[0], other, strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def test_images_of_any_layout_and_type(built: Built) -> None:
    """Channels last in memory, a strided view, floats instead of bytes."""
    name = "ResNet-8"
    _, plan, _ = built.cases[name]
    stages = built.stages(name, EmulatedResident(built.library))
    x = images(3, plan.input.shape)
    want = run(stages, x, torch.empty(0)).log_probs
    wide = torch.zeros(3, 3, 16, 40, dtype=torch.uint8)
    wide[..., 3:35:2] = x
    for same in (x.contiguous(memory_format=torch.channels_last), wide[..., 3:35:2], plan.input.to_float(x)):
        assert torch.equal(run(stages, same, torch.empty(0)).log_probs, want)


def test_an_image_with_a_nan_is_invalid_and_alone(built: Built) -> None:
    name = "ResNet-8 then 14, mean"
    _, plan, _ = built.cases[name]
    stages = built.stages(name, EmulatedResident(built.library))
    x = plan.input.to_float(images(4, plan.input.shape))
    x[2, 1, 5, 5] = torch.nan
    check_forced(stages, plan, x)
    got = run(stages, x, forced_exit(1, 2))
    assert (got.label == -1).tolist() == [False, False, True, False]


def test_nothing_in_nothing_out(built: Built) -> None:
    _, plan, _ = built.cases["ResNet-8"]
    stages = built.stages("ResNet-8", EmulatedResident(built.library))
    assert run(stages, images(0, plan.input.shape), torch.empty(0)).label.shape == (0,)


def test_counts_are_those_of_the_estimate(built: Built) -> None:
    """Instructions that ``resident_estimate.py`` assumes for a full group, and conflicts of ldmatrix."""
    for name in ("ResNet-8", "ResNet-9 of width 8", "2×2 stem, odd sizes"):
        _, plan, resident = built.cases[name]
        launch = EmulatedResident(built.library, trace=True)
        run(
            built.stages(name, launch),
            images(resident.groups[0].images, plan.input.shape),
            forced_exit(len(plan.stages) - 1, len(plan.stages)),
        )
        runs = [
            (resident.groups[0].images // entry.step.images, step_counts(entry.step, resident.warps))
            for entry in resident.entries
        ]
        for field in ("mma", "load_matrix", "load_matrix_passes"):
            estimated = sum(times * getattr(counts, field) for times, counts in runs)
            assert launch.counts[field] == estimated, (name, field)


# ---- the emulator itself ----


def cute(lane: Tensor, values: int, strides: tuple[int, ...]) -> Tensor:
    """Index into a column-major tile, as CuTe gives it: strides of lane % 4, lane / 4, value bits."""
    value = torch.arange(values)
    bits = sum((value >> i & 1) * stride for i, stride in enumerate(strides[2:]))
    return lane[:, None] % 4 * strides[0] + lane[:, None] // 4 * strides[1] + bits


def test_fragments_are_those_of_the_ptx_isa(built: Built) -> None:
    """mma.m16n8k16 and the packing of weights, against layouts from another source (CuTe's SM80 atoms)."""
    lane = torch.arange(32)
    a, b = torch.randn(16, 16).half(), torch.randn(16, 16).half()  # b: (k, n)
    at = cute(lane, 8, (32, 1, 16, 8, 128))
    a_fragment = a[at % 16, at // 16].contiguous()
    at = cute(lane, 4, (16, 1, 8, 64))
    b_fragment = b[at // 8, at % 8].contiguous()
    assert torch.equal(fragments(b.float())[:, :4], b_fragment)
    at, d = cute(lane, 4, (32, 1, 16, 8)), torch.zeros(32, 4)
    built.library.mma_emulated(*(ctypes.c_void_p(t.data_ptr()) for t in (a_fragment, b_fragment, d)))
    want = (a.float() @ b[:, :8].float())[at % 16, at // 16]
    torch.testing.assert_close(d, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("pitch", "passes"), [(16, 4), (32, 8), (128, 32)])
def test_ldmatrix_and_its_bank_conflicts(built: Built, pitch: int, passes: int) -> None:
    """Rows one after the other, every second one, and all in the same four banks."""
    memory = torch.arange(1024, dtype=torch.int16)
    rows = torch.arange(32, dtype=torch.int32) * pitch % 2048
    out = torch.zeros(32, 8, dtype=torch.int16)
    found = built.library.load_matrix_emulated(*(ctypes.c_void_p(t.data_ptr()) for t in (memory, rows, out)))
    lane = torch.arange(32)
    want = [rows[8 * i + lane // 4] // 2 + lane % 4 * 2 + half for i in range(4) for half in (0, 1)]
    assert torch.equal(out, torch.stack(want, 1).short())
    assert found == (passes if pitch < 128 else 4 * 8)


# ---- faults ----


def barriers(built: Built, name: str, n: int) -> int:
    """How many a block passes for n images that go through all stages."""
    _, plan, _ = built.cases[name]
    launch = EmulatedResident(built.library)
    run(
        built.stages(name, launch),
        images(n, plan.input.shape),
        forced_exit(len(plan.stages) - 1, len(plan.stages)),
    )
    return launch.counts["barriers"]


def race_without(built: Built, name: str, left_out: int, n: int = 2) -> bool:
    """Whether leaving out one barrier is reported as a race, whichever warp runs first."""
    _, plan, _ = built.cases[name]
    x = images(n + 2, plan.input.shape)[1 : n + 1]  # what lies around them is memory, too
    found = []
    for backward in (False, True):
        launch = EmulatedResident(built.library, left_out=left_out, stop_at_race=True, backward=backward)
        run(built.stages(name, launch), x, forced_exit(len(plan.stages) - 1, len(plan.stages)))
        found.append(launch.counts["races"] > 0)
    return all(found)


def test_each_kind_of_barrier_is_needed(built: Built) -> None:
    """After the queue, the image, the first layers; the last layer, the pool, the sums, the stop."""
    count = barriers(built, "ResNet-8", 1)
    chosen = [0, 1, 2, 3, *range(count - 5, count - 1)]  # the last one only ends the queue
    assert [i for i in chosen if not race_without(built, "ResNet-8", i)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("ResNet-8 then 14, mean", 4),
        ("four exits of a ResNet-20", 2),
        ("ResNet-9 of width 8", 3),  # a group that is not full
        ("all kinds of pooling", 2),
        ("pooled networks in groups, one with GELU, one mirrored", 4),
    ],
)
def test_every_barrier_is_needed(built: Built, name: str, n: int) -> None:
    """But for those where the first layers of a group begin with its next image, in maps of their own."""
    count = barriers(built, name, n)
    assert count > 20
    unneeded = [i for i in range(count - 1) if not race_without(built, name, i, n)]
    grouped = [group for group in built.cases[name][2].groups if group.images > 1]
    assert len(unneeded) <= len(grouped) * (n - 1)


def with_entries(table: ResidentTable, change: Callable[[list[int], Any], None]) -> ResidentTable:
    """A table with changed entries."""
    rows = table.layers.tolist()
    for row, entry in zip(rows, table.plan.entries, strict=True):
        change(row, entry)
    return replace(table, layers=torch.tensor(rows, dtype=torch.int32))


def keep_borders(row: list[int], entry: Any) -> None:
    row[8] &= ~CLEAR_BORDER


def lose_residual(row: list[int], entry: Any) -> None:
    row[8] &= ~RESIDUAL_FIRST


def shift_weights(table: ResidentTable) -> ResidentTable:
    """A tap's weights used twice: the second fragment of the second convolution is the first."""
    weights = table.weights.clone()
    second = [e for e in table.plan.entries if e.step.kind == "conv"][1]
    begin = int(table.layers[table.plan.entries.index(second), 12]) * 8
    weights[begin + 256 : begin + 512] = weights[begin : begin + 256]
    return replace(table, weights=weights)


FAULTS: dict[str, tuple[Callable[[ResidentTable], ResidentTable], dict[str, Any], bool]] = {
    "nothing": (lambda table: table, {}, False),
    "borders are not cleared": (lambda table: with_entries(table, keep_borders), {}, True),
    "a lost residual": (lambda table: with_entries(table, lose_residual), {}, False),
    "a tap twice": (shift_weights, {}, False),
    "b0 and b1 swapped": (lambda table: table, {"swap_b": True}, False),
}
"""What is planted, how, and whether it makes answers NaN (memory starts as NaN)."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(built: Built, fault: str) -> None:
    name = "ResNet-8 then 14, mean"
    change, options, invalid = FAULTS[fault]
    _, plan, _ = built.cases[name]
    stages = built.stages(name, EmulatedResident(built.library, **options))
    stages.table = change(stages.table)
    x, thresholds = images(3, plan.input.shape), forced_exit(1, 2)
    got, want = run(stages, x, thresholds), twin(plan, x, thresholds)
    assert bool((got.label == -1).all()) == invalid
    if not invalid:
        wrong = error(got.log_probs, want.log_probs)
        assert wrong < TWIN if fault == "nothing" else wrong > 10 * TWIN
    assert stages.launch.counts["races"] == 0, "a wrong value is no race"


GROUPS = "pooled networks in groups, one with GELU, one mirrored"
PLANTED_IN_SOURCE = {
    "goes on after the stop": ("if (!stop && !last) push", "if (!last) push", "ResNet-8 then 14, mean"),
    "loses an image that waits": ("waiting(context, stage) == 0;) stage++", "true;) stage++", GROUPS),
    "all of a group on the first image": ("source + image * In::kBytes + r", "source + r", GROUPS),
    "forgets the mirror": ("flags & kMirror", "flags & kAverage", GROUPS),
    "activation before the pooling": (
        "pack<kActivation == kRelu>(upper[half * 2], upper[half * 2 + 1])",
        "pack<true>(upper[half * 2], upper[half * 2 + 1])",
        GROUPS,
    ),
    "a residual as if it were pooled": (
        "using Whole = Map<Out::kChannels, kHeight, kWidth>",
        "using Whole = Out",
        "residuals, one before a ReLU and a pooling",
    ),
    "pools one row twice": ("sum[t + 1][g * 2 + n]", "sum[t][g * 2 + n]", "ResNet-9 of width 8"),
    "forgets the last kernel row": (
        "for (int ky = 0; ky < kKernel; ky++)",
        "for (int ky = 0; ky < kKernel - 1; ky++)",
        "ResNet-8",
    ),
    "stores over the border": (
        "(kWidth % kColumns == 0 || result_column(lane) < kWidth)",
        "true",
        "2×2 stem, odd sizes",
    ),
    "one upper half of the pixels": ("half * (8 / kColumns)) * kTiles", "half) * kTiles", "ResNet-8"),
}
"""Old text, new text, the case that shows it."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED_IN_SOURCE)
def test_a_fault_planted_in_the_source_shows(tmp_path: Path, fault: str) -> None:
    """The checks that pass on the kernel as it is fail on each of these."""
    skip_without_emulator()
    old, new, name = PLANTED_IN_SOURCE[fault]
    case = (CASES | MORE_CASES)[name]
    broken = Built(tmp_path, {name: case}, (old, new))
    with pytest.raises(AssertionError):
        check(broken, name, case)
