"""Whole cascades on the CPU engine: the oracle's answers, whatever the schedule, the input or the caller."""

from __future__ import annotations

import copy
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastcascade as fc
from fastcascade import _C
from fastcascade.backends.cpu import BACKEND, CpuProgram, stage_spec
from fastcascade.backends.interface import ExitResults
from fastcascade.errors import BackendUnavailable
from fastcascade.lowering.operations import Conv2d
from fastcascade.lowering.plan import Plan
from fastcascade.model.resnet import cut_into_segments, resnet9, resnet_cifar
from fastcascade.testing.comparison import assert_drop_in
from fastcascade.testing.networks import random_network, randomise_statistics
from fastcascade.testing.oracle import balanced_thresholds, reference_logits
from fastcascade.types import Combine, forced_exit

SIDE = 16  # small images: the schedules are the same
NORMALIZE = fc.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
BAND = 3e-4  # scores differ from float64's by some 1e-5


def images(n: int) -> Tensor:
    """(n, 3, SIDE, SIDE) float images, the same in every test."""
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(n))


def _trained(network: nn.Module) -> nn.Module:
    """Statistics as after training and logits that differ between images; the same in every test."""
    torch.manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    randomise_statistics(network)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.1)
    return network.eval()


@cache
def independent(combine: Combine = "last", selector: Callable[[], nn.Module] = fc.MLPSelector) -> fc.Cascade:
    """Three networks of their own."""
    networks = [_trained(resnet9(4)), _trained(resnet_cifar(8, shortcut="A")), _trained(resnet_cifar(14))]
    return _cascade(networks, combine, selector())


@cache
def segments(combine: Combine = "last") -> fc.Cascade:
    """One network cut in three."""
    cut = cut_into_segments(_trained(resnet_cifar(14, shortcut="B")), [1, 3])
    stages = [
        fc.Stage(body, exit=_trained(head), input="image" if k == 0 else "previous")
        for k, (body, head) in enumerate(cut)
    ]
    return _cascade(stages, combine, fc.MLPSelector())


plan_of = cache(fc.plan)
"""Lowering takes a second; the tests share cascades and plans, and change neither."""


def _cascade(stages: list[nn.Module], combine: Combine, selector: nn.Module) -> fc.Cascade:
    torch.manual_seed(0)
    cascade = fc.Cascade(stages, selector, 10, (3, SIDE, SIDE), combine=combine, preprocess=NORMALIZE)
    for parameter in selector.parameters():
        nn.init.normal_(parameter, std=0.7)
    return cascade


def run(plan: Plan, x: Tensor, thresholds: Tensor, threads: int = 1, isa: str = "") -> ExitResults:
    return CpuProgram(plan, threads, isa).run(x, thresholds)


def assert_same_bits(a: ExitResults, b: ExitResults) -> None:
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


SELECTORS: dict[str, Callable[[], nn.Module]] = {
    "stats": fc.MLPSelector,
    "topk": lambda: fc.MLPSelector(features="topk"),
    "probs": lambda: fc.MLPSelector(features="probs"),
    "max_prob": lambda: fc.ThresholdSelector("max_prob"),
    "margin": lambda: fc.ThresholdSelector("margin"),
    "entropy": lambda: fc.ThresholdSelector("entropy"),
}


@pytest.mark.parametrize("build", [independent, segments])
@pytest.mark.parametrize("combine", ["last", "mean", (0.2, 0.5, 1.0)])
def test_drop_in(
    isa: str, build: Callable[..., fc.Cascade], combine: Combine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCASCADE_ISA", isa)
    cascade = build(combine)
    fast = fc.compile(plan_of(cascade), backend="cpu", threads=2)
    assert_drop_in(fast, cascade, images(60), tolerance=1e-3, band=BAND)


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector(selector: str) -> None:
    cascade = independent("mean", SELECTORS[selector])
    fast = fc.compile(plan_of(cascade), backend="cpu", threads=1)
    assert_drop_in(fast, cascade, images(60), tolerance=1e-3, band=BAND)


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed: int) -> None:
    network = random_network(seed)
    plan = fc.plan(fc.Cascade([network], None, 5, (3, 9, 8)))
    x = torch.randn(7, 3, 9, 8)
    expected = reference_logits(plan, x)[0].log_softmax(1)
    torch.testing.assert_close(
        run(plan, x, torch.empty(0)).log_probs.double(), expected, rtol=1e-4, atol=1e-4
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6))
def test_random_networks_of_every_operation(isa: str, seed: int) -> None:
    network = random_network(seed, every_operation=True)
    plan = fc.plan(fc.Cascade([network], None, 5, (3, 9, 8)))
    assert plan.stages[0].module is None, plan.stages[0].opaque_reason
    x = torch.randn(5, 3, 9, 8, generator=torch.Generator().manual_seed(seed))
    results = run(plan, x, torch.empty(0), 1, isa)
    expected = reference_logits(plan, x)[0].log_softmax(1)
    torch.testing.assert_close(results.log_probs.double(), expected, rtol=1e-4, atol=1e-4)
    assert_same_bits(run(plan, x, torch.empty(0), 3, isa), results)


@pytest.mark.parametrize("build", [independent, segments])
@pytest.mark.parametrize("n", [1, 3, 16, 200])
def test_bits_do_not_depend_on_the_schedule(isa: str, build: Callable[..., fc.Cascade], n: int) -> None:
    cascade = build()
    x = images(n)
    thresholds = balanced_thresholds(cascade, images(30))
    plan = plan_of(cascade)
    expected = run(plan, x, thresholds, 1, isa)
    for threads in (2, 3, 4):
        assert_same_bits(run(plan, x, thresholds, threads, isa), expected)
    order = torch.randperm(n)
    permuted = run(plan, x[order], thresholds, 2, isa)
    assert_same_bits(permuted, ExitResults(*(rows[order] for rows in expected)))
    program = CpuProgram(plan, 2, isa)
    parts = [program.run(part, thresholds) for part in x.split(7)]
    assert_same_bits(ExitResults(*map(torch.cat, zip(*parts, strict=True))), expected)


def test_large_batches_lose_nobody() -> None:
    """Survivors of one window wait for those of the next, and all of them run in the last."""
    plan, x = plan_of(independent()), images(900)
    thresholds = balanced_thresholds(independent(), images(30))
    program = CpuProgram(plan, 1)
    parts = [program.run(part, thresholds) for part in x.split(15)]
    expected = ExitResults(*map(torch.cat, zip(*parts, strict=True)))
    assert len(expected.exit_stage.unique()) == 3
    for threads in (1, 2, 3):
        assert_same_bits(run(plan, x, thresholds, threads), expected)


def test_program_gives_the_same_bits_again() -> None:
    cascade = segments()
    plan, x = plan_of(cascade), images(200)
    thresholds = balanced_thresholds(cascade, x[:30])
    program = CpuProgram(plan, 4)
    first = program.run(x, thresholds)
    assert len(first.exit_stage.unique()) == 3
    for _ in range(5):
        assert_same_bits(program.run(x, thresholds), first)


@pytest.mark.parametrize("build", [independent, segments])
@pytest.mark.parametrize("n", [9, 150])
def test_invalid_rows(build: Callable[..., fc.Cascade], n: int) -> None:
    cascade = build("mean")
    plan, x = plan_of(cascade), images(n)
    thresholds = balanced_thresholds(cascade, x)
    clean = run(plan, x, thresholds, 2)
    bad = torch.arange(n) % 4 == 1
    x[bad, 1, 5, 7] = math.nan
    out = run(plan, x, thresholds, 2)
    assert out.log_probs[bad].isnan().all()
    assert (out.label[bad] == -1).all()
    assert (out.exit_stage[bad] == 2).all()
    assert_same_bits(ExitResults(*(r[~bad] for r in out)), ExitResults(*(r[~bad] for r in clean)))


def test_layouts_and_bytes() -> None:
    plan = plan_of(segments())
    pixels = torch.randint(0, 256, (20, 3, SIDE, SIDE), dtype=torch.uint8)
    floats = plan.input.to_float(pixels)
    thresholds = torch.zeros(2)
    expected = run(plan, floats, thresholds)
    wide = torch.zeros(40, 3, SIDE, 2 * SIDE)
    wide[::2, :, :, ::2] = floats
    inputs = {
        "channels last": floats.contiguous(memory_format=torch.channels_last),
        "strided": wide[::2, :, :, ::2],
        "bytes": pixels,
        "bytes, channels last": pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    }
    for x in inputs.values():
        assert_same_bits(run(plan, x, thresholds, 2), expected)


def test_two_callers_at_once() -> None:
    plan = plan_of(independent())
    program, thresholds = CpuProgram(plan, 2), torch.zeros(2)
    batches = [images(n) for n in (1, 5, 40, 150)]
    expected = [program.run(x, thresholds) for x in batches]
    failures: list[BaseException] = []

    def call() -> None:
        try:
            for _ in range(3):
                for x, want in zip(batches, expected, strict=True):
                    assert_same_bits(program.run(x, thresholds), want)
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_use() -> None:
    plan, x = plan_of(independent()), images(40)
    program, thresholds = CpuProgram(plan, 2), torch.zeros(2)
    expected = program.run(x, thresholds)
    child = os.fork()
    if child == 0:
        same = all(
            np.array_equal(a.numpy(), b.numpy())
            for _ in range(3)
            for a, b in zip(program.run(x, thresholds), expected, strict=True)
        )
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_same_bits(program.run(x, thresholds), expected)


class _Sine(nn.Module):
    """A network that no plan can express."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _trained(resnet_cifar(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sin())  # type: ignore[no-any-return]


class _UsersSelector(nn.Module):
    def forward(self, k: int, log_probs: Tensor, previous_label: Tensor) -> Tensor:
        return log_probs.amax(1) + 1.5

    def macs(self, k: int, num_classes: int) -> int:
        return num_classes


@pytest.mark.parametrize("selector", [fc.MLPSelector, _UsersSelector])
def test_opaque_stages_and_selectors(selector: Callable[[], nn.Module]) -> None:
    networks = [_trained(resnet9(4)), _Sine(), _trained(resnet_cifar(14))]
    cascade = _cascade(networks, "mean", selector())
    fast = fc.compile(cascade, backend="cpu", threads=2)
    assert [report.isa == "torch" for report in fast.program.describe()] == [False, True, False]
    assert_drop_in(fast, cascade, images(60), tolerance=1e-3, band=BAND)


_GROWTH = """
import re
import torch
import fastcascade as fc
from fastcascade.backends.cpu import CpuProgram
from fastcascade.model.resnet import resnet9, resnet_cifar

def resident(what):
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(rf"{what}:\\s+(\\d+)", status)[1])

images, none = torch.randn(1400, 3, 32, 32), torch.empty(0)
for network in (resnet_cifar(20), resnet_cifar(110), resnet9(32)):
    program = CpuProgram(fc.plan(fc.Cascade([network], None, 10, (3, 32, 32))), 2)
    program.run(images[:0], none)
    before = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
    program.run(images, none)
    print(program.memory_bytes, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux's /proc")
def test_memory_beyond_weights() -> None:
    """What a call adds to the process's peak, however large the batch: the images alone are 16.4 MiB."""
    # Large buffers straight from the system: none hides in memory that was freed before.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _GROWTH]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    limit = 2 * 8 * 2**20
    for line in run.stdout.splitlines():
        counted, grown = map(int, line.split())
        assert counted <= limit
        assert 0.5 * counted <= grown <= limit


def test_describe_names_kernels(isa: str) -> None:
    plan = plan_of(segments())
    reports = CpuProgram(plan, 1, isa).describe()
    assert [report.isa for report in reports] == [isa] * 3
    names = {choice.kernel for report in reports for choice in report.kernels}
    assert {"conv3x3_winograd_f32", "conv_direct_f32", "exit_row_f32"} <= names
    forced = CpuProgram(plan, 1, isa, kernel="conv_direct_f32").describe()
    assert "conv3x3_winograd_f32" not in {c.kernel for report in forced for c in report.kernels}


# ---- bad input ----


@cache
def _valid() -> dict[str, object]:
    plan = fc.plan(fc.Cascade([random_network(3)], None, 5, (3, 9, 8)))
    return stage_spec(plan.stages[0], False)


def _build(stage: dict[str, object], classes: int = 5) -> None:
    _C.Cascade([stage], [None], classes)


def _conv(**changes: object) -> dict[str, object]:
    conv: dict[str, object] = {
        "op": "Conv2d",
        "output": 1,
        "inputs": [0],
        "weight": np.ones((5, 3, 3, 3), np.float32),
        "bias": np.zeros(5, np.float32),
        "stride": [1, 1],
        "padding": [0, 0, 0, 0],
        "dilation": [1, 1],
        "groups": 1,
        "residual": None,
        "activation": "relu",
    }
    return {**conv, **changes}


def _op(name: str, **fields: object) -> dict[str, object]:
    return {"op": name, "output": 1, "inputs": [0], **fields}


HOSTILE: dict[str, tuple[dict[str, object], str]] = {
    "unknown operation": (_conv(op="Conv9d"), "unknown operation"),
    "unknown activation": (_conv(activation="swoosh"), "unknown activation"),
    "reads itself": (_conv(inputs=[1]), "before it is written"),
    "reads out of range": (_conv(inputs=[2**40]), "before it is written"),
    "negative value": (_conv(inputs=[-1]), "before it is written"),
    "writes the input": (_conv(output=0), "taken or out of range"),
    "writes out of range": (_conv(output=9), "taken or out of range"),
    "stride 0": (_conv(stride=[0, 1]), "stride is 0"),
    "negative padding": (_conv(padding=[-1, 0, 0, 0]), "padding is -1"),
    "huge padding": (_conv(padding=[2**62, 0, 0, 0]), "padding is"),
    "huge dilation": (_conv(dilation=[2**61, 1]), "dilation is"),
    "beyond 64 bits": (_conv(groups=2**70), "wrong type, length or range"),
    "groups 0": (_conv(groups=0), "groups is 0"),
    "weights of another shape": (_conv(weight=np.ones((5, 4, 3, 3), np.float32)), "do not fit"),
    "empty weights": (_conv(weight=np.ones((5, 3, 0, 3), np.float32)), "kernel is 0"),
    "short bias": (_conv(bias=np.zeros(4, np.float32)), "bias has 4"),
    "double weights": (_conv(weight=np.ones((5, 3, 3, 3))), "float32"),
    "three axes": (_conv(weight=np.ones((5, 3, 9), np.float32)), "axes"),
    "window too large": (_conv(dilation=[9, 1]), "does not fit"),
    "residual of another shape": (_conv(residual=0), "adds a value"),
    "residual below 0": (_conv(residual=-2), "'residual' is -2"),
    "padded input too wide": (_conv(padding=[0, 0, 40000, 40000]), "width is 80008"),
    "padded input too large": (_conv(padding=[32000] * 4, stride=[65536, 65536]), "too large"),
    "activations too large": (
        {
            "op": "Pad",
            "output": 1,
            "inputs": [0],
            "before": [0, 20000, 20000],
            "after": [0, 0, 0],
            "value": 0.0,
            "mode": "constant",
        },
        "GiB for the activations",
    ),
    "parts of a softmax": (_op("Softmax", parts=2), "softmax over 2 parts"),
    "a softmax without parts": (_op("Softmax", parts=0), "parts is 0"),
    "channels that are not there": (_op("Reorder", channels=[0, 3]), "channel is 3"),
    "no channels": (_op("Reorder", channels=[]), "channels is 0"),
    "a reshape of other size": (_op("Reshape", shape=[3, 9, 9]), "reshapes"),
    "a reshape of two axes": (_op("Reshape", shape=[27, 8]), "2 sizes; expected 1 or 3"),
    "an empty pool": (_op("AdaptivePool", kind="max", size=[0, 1]), "height is 0"),
    "a pool of another kind": (_op("AdaptivePool", kind="median", size=[1, 1]), "expected average or max"),
    "a huge resize": (_op("Resize", kind="nearest", size=[2**40, 1], align_corners=False), "height is"),
    "a short layer norm": (
        _op("LayerNorm", scale=np.ones(2, np.float32), shift=np.ones(3, np.float32), eps=0.1),
        "scale has 2 numbers",
    ),
    "a reflection beyond the image": (
        _op("Pad", before=[0, 9, 0], after=[0, 0, 0], value=0.0, mode="reflect"),
        "reflected rows is 9",
    ),
    "replicated channels": (
        _op("Pad", before=[1, 0, 0], after=[0, 0, 0], value=0.0, mode="replicate"),
        "channel padding is 1",
    ),
    "a product of one value": (_op("Multiply"), "has 1 inputs"),
    "no inputs": (_conv(inputs=[]), "has 0 inputs"),
    "text for a number": (_conv(output="one"), "wrong type, length or range"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_operations_are_refused(name: str) -> None:
    op, message = HOSTILE[name]
    stage = {
        "name": "s",
        "input": "image",
        "keeps_features": False,
        "shape": [3, 9, 8],
        "ops": [op],
        "features": 0,
        "logits": 1,
    }
    with pytest.raises(ValueError, match=message):
        _build(stage)


def test_hostile_stages_are_refused() -> None:
    _build(_valid())
    for changes, message in [
        ({"shape": [3, 9, 2**40]}, "width is"),
        ({"shape": [2**20, 2**16, 2**16]}, "too large"),
        ({"logits": 99}, "not written"),
        ({"input": "previous"}, "first stage"),
        ({"input": "disk"}, "unknown input"),
        ({"ops": [3]}, "an operation as a dictionary"),
    ]:
        with pytest.raises(ValueError, match=message):
            _build({**_valid(), **changes})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="expected 6 classes"):
        _build(_valid(), classes=6)
    with pytest.raises(ValueError, match="a stage as a dictionary"):
        _C.Cascade(["s"], [None], 5)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="a selector as a dictionary"):
        _C.Cascade([_valid(), _valid()], [7, None], 5)  # type: ignore[list-item]


@pytest.mark.parametrize("groups", [8191, 32749, 65521])
def test_groups_that_would_fill_the_memory_are_refused(groups: int) -> None:
    """A prime number of groups can only be merged all together: 64 KB become 512 MB, 512 KB become 34 GB."""
    conv = _conv(weight=np.ones((2 * groups, 1, 1, 1), np.float32), bias=np.ones(2 * groups, np.float32))
    stage = {
        **_valid(),
        "shape": [groups, 1, 1],
        "ops": [{**conv, "groups": groups}],
        "features": 0,
        "logits": 1,
    }
    with pytest.raises(ValueError, match=f"{groups} groups"):
        _build(stage, classes=2 * groups)


def test_plans_that_the_engine_refuses_name_the_backend() -> None:
    plan = fc.plan(fc.Cascade([nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten())], None, 5, (3, 3, 3)))
    stage = plan.stages[0]
    huge = replace(stage.ops[0], padding=(32000,) * 4, stride=(65536, 65536))
    plan = replace(plan, stages=(replace(stage, ops=(huge, *stage.ops[1:])),))
    with pytest.raises(BackendUnavailable, match=r"backend 'cpu' refuses the plan: .*too large"):
        fc.compile(plan, backend="cpu")


def _editable(value: Any) -> Any:
    """A copy with lists for tuples; arrays are shared."""
    if isinstance(value, dict):
        return {key: _editable(item) for key, item in value.items()}
    return [_editable(item) for item in value] if isinstance(value, list | tuple) else value


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value's parts are: a key or an index for every step down."""
    is_list = isinstance(value, list)
    items = enumerate(value) if is_list else value.items() if isinstance(value, dict) else ()
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


def test_random_damage_is_refused_or_runs() -> None:
    """Whatever one field of a stage becomes, the engine says ValueError or answers in the right shape."""
    choose = random.Random(0)
    arrays = [np.zeros(0, np.float32), np.ones((2, 3), np.float32), np.ones((5, 3, 3, 3), np.float32)]
    numbers = [-1, 0, 1, 2, 7, 2**31, 2**62, -(2**62), 1.5, math.nan, True]
    values: list[Any] = [*arrays, *numbers, None, "relu", "", [], [1], {}]
    places = _places(_editable(_valid()))[1:]
    refused = 0
    for _ in range(400):
        damaged = _editable(_valid())
        target, path = damaged, choose.choice(places)
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = choose.choice(values)
        try:
            engine = _C.Cascade([damaged], [None], 5)
        except ValueError:
            refused += 1
        else:
            rows = np.ones((2, *damaged["shape"]), np.float32)
            assert engine.run_stage(0, rows)[0].shape == (2, 5)
    assert 100 < refused < 400


def test_bad_calls_are_refused() -> None:
    engine = _C.Cascade([_valid()], [None], 5)
    none = np.empty(0, np.float32)
    good = np.zeros((2, 3, 9, 8), np.float32)
    for batch, thresholds, message in [
        (good[:, :2], none, "expected an array of shape"),
        (good[0], none, "expected an array of shape"),
        (good.astype(np.float64), none, "expected float32 or uint8"),
        (good.astype(np.uint8), none, "need a table"),
        (good, np.zeros(1, np.float32), "thresholds have 1 numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.run(batch, None, thresholds)
    cascade = _C.Cascade([_valid(), _valid()], [{"score": "margin"}, None], 5)
    with pytest.raises(ValueError, match="NaN"):
        cascade.run(good, None, np.full(1, np.nan, np.float32))
    with pytest.raises(ValueError, match="selector 0 is missing"):
        _C.Cascade([_valid(), _valid()], [None, None], 5)


def test_forced_instruction_sets_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCASCADE_ISA", "sse9")
    reason = BACKEND.unavailable_reason()
    assert reason is not None
    assert "sse9" in reason
    plan = fc.plan(fc.Cascade([random_network(3)], None, 5, (3, 9, 8)))
    with pytest.raises(BackendUnavailable, match="avx512, avx2, portable"):
        fc.compile(plan, backend="cpu")
    monkeypatch.setenv("FASTCASCADE_ISA", "portable")
    assert fc.compile(plan, backend="cpu").program.describe()[0].isa == "portable"


def test_forced_exits_reach_every_stage() -> None:
    plan, x = plan_of(independent()), images(37)
    expected = reference_logits(plan, x).log_softmax(2)
    for j in range(3):
        out = run(plan, x, forced_exit(j, 3), 2)
        assert (out.exit_stage == j).all()
        torch.testing.assert_close(out.log_probs.double(), expected[j], rtol=1e-3, atol=1e-3)


def _errors(plan: Plan, x: Tensor, kernel: str = "") -> tuple[float, float]:
    """Largest error of a log-probability against float64 at forced exits: the engine's, torch fp32's."""
    exact = reference_logits(plan, x).log_softmax(2)
    plain = reference_logits(plan, x, torch.float32).log_softmax(2)
    program = CpuProgram(plan, 1, kernel=kernel)
    stages = len(plan.stages)
    got = torch.stack([program.run(x, forced_exit(j, stages)).log_probs for j in range(stages)])
    return (got - exact).abs().max().item(), (plain - exact).abs().max().item()


@pytest.mark.parametrize(("kernel", "factor"), [("conv_direct_f32", 2), ("", 6)])
@pytest.mark.parametrize("build", [independent, segments])
def test_accuracy(build: Callable[..., fc.Cascade], kernel: str, factor: int) -> None:
    error, torch_error = _errors(plan_of(build()), images(200), kernel)
    assert error <= factor * torch_error


def test_planted_bf16_layer_is_caught() -> None:
    """What the bound is worth: it fails when one layer's weights go through bf16."""
    plan = plan_of(independent())
    spoilt = copy.deepcopy(plan)
    weight = next(op.weight for op in spoilt.stages[0].ops[1:] if isinstance(op, Conv2d))
    weight.copy_(weight.bfloat16())
    exact = reference_logits(plan, images(8))[0].log_softmax(1)
    out = CpuProgram(spoilt, 1).run(images(8), forced_exit(0, 3))
    _, torch_error = _errors(plan, images(8))
    assert (out.log_probs - exact).abs().max().item() > 6 * torch_error
