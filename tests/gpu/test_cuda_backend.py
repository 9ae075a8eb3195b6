"""The cuda backend's program agrees with the reference backend on whole cascades.

The kernels run on host threads with the stages on the CPU, and on a GPU where one is.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from agreement import assert_labels_agree
from host_threads import HostLaunch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends.gpu.cuda import lower_with
from fastcascade.backends.interface import ExitResults
from fastcascade.backends.registry import load_backend
from fastcascade.errors import BackendUnavailable, InvalidArgument
from fastcascade.kernels import reference
from fastcascade.kernels.cuda import exit_head
from fastcascade.kernels.cuda.launch import DeviceLaunch, Launch
from fastcascade.lowering.plan import Plan
from fastcascade.testing.networks import random_network
from fastcascade.types import forced_exit

SHAPE = (3, 9, 8)
TOLERANCE = 2e-4
BAND = 2e-4


def with_spread(network: nn.Module) -> nn.Module:
    """Spread the logits, because otherwise every score is near every threshold."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    linear.weight.data *= 8
    return network


def independent(selector: nn.Module, combine: Any) -> fc.Cascade:
    """Three networks that read the image."""
    networks = [with_spread(random_network(seed, input_shape=SHAPE)) for seed in (11, 12, 13)]
    return fc.Cascade(networks, selector, 5, SHAPE, combine, preprocess=fc.Normalize((0.5,) * 3, (0.3,) * 3))


def segments(selector: nn.Module, combine: Any) -> fc.Cascade:
    """One backbone in three segments; the first has feature rows of 16-byte words, the second has not."""
    stages = []
    for k, (before, after) in enumerate([(3, 4), (4, 7), (7, 8)]):
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(after, 5))
        body = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU())
        stages.append(fc.Stage(body, with_spread(head), input="previous" if k else "image"))
    return fc.Cascade(stages, selector, 5, SHAPE, combine)


class Comparison:
    """One cascade, on the reference backend and with the CUDA kernels."""

    def __init__(self, launch: Launch, cascade: fc.Cascade) -> None:
        self.plan: Plan = fc.plan(cascade)
        cpu = torch.device("cpu")
        self.reference = load_backend("reference").lower(
            self.plan, precision="fp32", device=cpu, threads=None
        )
        self.program = lower_with(launch, self.plan, "fp32")

    def run(self, x: Tensor, thresholds: Tensor) -> tuple[ExitResults, ExitResults]:
        """The outputs of both."""
        got = self.program.run(x.to(self.program.device), thresholds)
        return ExitResults(*(column.cpu() for column in got)), self.reference.run(x, thresholds)

    def forced(self, x: Tensor) -> None:
        """Assert equal log-probabilities and labels at every forced exit."""
        for k in range(len(self.plan.stages)):
            got, want = self.run(x, forced_exit(k, len(self.plan.stages)))
            assert torch.equal(got.exit_stage, want.exit_stage)
            assert torch.equal(got.label == -1, want.label == -1)
            torch.testing.assert_close(
                got.log_probs, want.log_probs, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True
            )
            assert_labels_agree(got, want, TOLERANCE)

    def free(self, cascade: fc.Cascade, x: Tensor) -> None:
        """Assert equal exits under thresholds that no score is near."""
        with torch.no_grad():
            scores = cascade.eval().all_exits(x)[1]
        thresholds = in_widest_gaps(scores)
        assert (scores - thresholds[:, None]).abs().min() > BAND
        got, want = self.run(x, thresholds)
        assert len(want.exit_stage.unique()) > 1  # some rows stop and some go on
        assert torch.equal(got.exit_stage, want.exit_stage)
        torch.testing.assert_close(got.log_probs, want.log_probs, atol=TOLERANCE, rtol=TOLERANCE)
        assert_labels_agree(got, want, TOLERANCE)


def in_widest_gaps(scores: Tensor) -> Tensor:
    """(K−1, N) stop scores → thresholds (K−1,), each in the widest gap of the middle half of its scores."""
    quarter = scores.shape[1] // 4
    middle = scores.sort(1).values[:, quarter:-quarter]
    at = middle.diff(dim=1).argmax(1, keepdim=True)
    return (middle.gather(1, at) + middle.gather(1, at + 1))[:, 0] / 2


@pytest.mark.parametrize(
    ("selector", "shape", "combine"),
    [
        ("stats", independent, "last"),
        ("stats", segments, "mean"),
        ("probs", independent, "mean"),
        ("topk", independent, (0.2, 0.5, 1.0)),
        ("entropy", segments, "last"),
    ],
)
def test_it_answers_as_the_reference_does(
    launch: Launch, selector: str, shape: Callable[[nn.Module, Any], fc.Cascade], combine: Any
) -> None:
    chosen = fc.ThresholdSelector("entropy") if selector == "entropy" else fc.MLPSelector(selector)
    cascade = shape(chosen, combine)
    if selector == "probs":
        cascade.selector.w2.data *= 10  # an untrained selector scores all rows almost alike
    comparison = Comparison(launch, cascade)
    x = torch.randn(40, *SHAPE) * 2
    comparison.free(cascade, x)
    broken = x[:9].clone()
    broken[3, 1, 5, 5] = math.nan
    comparison.forced(broken)
    got, _ = comparison.run(broken, forced_exit(2, 3))
    assert (got.label == -1).nonzero().flatten().tolist() == [3], "it leaks nowhere"

    reports = comparison.program.describe()
    lines = [[choice.kernel for choice in report.kernels] for report in reports]
    assert all("cuda exit_head" in line for line in lines)
    assert ("cuda fill_holes" if shape is segments else "cuda compact_index") in lines[0]
    assert all("one, none at the first stage" in line for line in lines)
    assert all("without triton" in (report.opaque_reason or "") for report in reports)


def test_a_selector_of_ones_own_runs_through_torch(launch: Launch) -> None:
    class Own(nn.Module):
        """A selector that is confident if the best class is far ahead."""

        def forward(self, k: int, log_probs: Tensor, previous_label: Tensor) -> Tensor:
            return log_probs.amax(1)

        def macs(self, k: int, num_classes: int) -> int:
            return 0

    cascade = independent(Own(), "last")
    Comparison(launch, cascade).free(cascade, torch.randn(40, *SHAPE) * 2)


class Watching(nn.Module):
    """An opaque stage that records the precision of torch's convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.network = random_network(0, input_shape=SHAPE)
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.backends.cudnn.conv.fp32_precision)
        return self.network(x) if float(x.abs().sum()) >= 0 else self.network(-x)


@pytest.mark.filterwarnings("ignore:Watching uses")
def test_torch_does_not_round_a_stage_to_tf32(launch: Launch) -> None:
    cascade = fc.Cascade([Watching()], None, 5, SHAPE)
    program = Comparison(launch, cascade).program
    (watching,) = (m for m in program.runners[0].stage.module.modules() if isinstance(m, Watching))
    watching.seen.clear()
    before = torch.backends.cudnn.conv.fp32_precision
    assert before == "tf32"
    program.run(torch.randn(2, *SHAPE, device=program.device), torch.empty(0))
    assert watching.seen == ["ieee"]
    assert torch.backends.cudnn.conv.fp32_precision == before


# ---- reasons against the backend ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_reason_names_exactly_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load_backend("cuda")

    def reason(cuda: str | None, hip: str | None, gpu: bool, cupy: bool) -> str | None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if cupy else None)
        return backend.unavailable_reason()

    assert reason("13.0", None, gpu=True, cupy=True) is None
    assert reason("13.0", None, gpu=True, cupy=False) == "the package cupy is not installed"
    assert reason("13.0", None, gpu=False, cupy=True) == "torch sees no NVIDIA GPU"
    assert reason(None, None, gpu=False, cupy=True) == "this torch is built without CUDA"
    assert "AMD" in (reason(None, "6.4", gpu=True, cupy=True) or "")
    both = reason(None, None, gpu=False, cupy=False)
    assert both == "this torch is built without CUDA and the package cupy is not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_named_it_is_never_replaced() -> None:
    cascade = fc.Cascade([random_network(0, input_shape=SHAPE)], None, 5, SHAPE)
    with pytest.raises(BackendUnavailable, match="'cuda' cannot run this plan at fp32 on cpu"):
        fc.compile(cascade, backend="cuda")


def test_what_it_does_not_support() -> None:
    backend = load_backend("cuda")
    plan = fc.plan(fc.Cascade([random_network(0, input_shape=SHAPE)], None, 5, SHAPE))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert backend.unsupported_reason(plan, precision="fp16", device=gpu) is None
    assert "bf16" in (backend.unsupported_reason(plan, precision="bf16", device=gpu) or "")
    assert "cpu" in (backend.unsupported_reason(plan, precision="fp32", device=cpu) or "")
    with pytest.raises(InvalidArgument, match="threads=2"):
        backend.lower(plan, precision="fp32", device=gpu, threads=2)


# ---- launching through a stand-in for CuPy, which runs the kernels on CPU threads ----


class FakeCupy(ModuleType):
    """A stand-in for the part of CuPy that a launch uses; records the stream of each kernel."""

    def __init__(self, library: Path) -> None:
        super().__init__("cupy")
        self.host = HostLaunch(library)
        self.started: list[tuple[str, int]] = []
        self.failure: Exception | None = None
        self.stream = 0
        self.cuda = SimpleNamespace(
            Device=lambda index: _Entered(),
            Stream=SimpleNamespace(from_external=lambda s: _Entered(self, s.__cuda_stream__()[1])),
        )

    def RawModule(self, code: str, options: tuple[str, ...]) -> SimpleNamespace:  # noqa: N802, CuPy's name
        def get_function(name: str) -> Callable[..., None]:
            assert f"{name}" in code or name.rsplit("_", 1)[1] in code
            return lambda grid, block, values: self.run(name, grid, block, values)

        return SimpleNamespace(get_function=get_function)

    def run(self, name: str, grid: tuple[int], block: tuple[int], values: tuple) -> None:
        if self.failure is not None:
            raise self.failure
        assert all(value.size == 1 for value in values)  # CuPy passes one-element arrays by value
        self.started.append((name, self.stream))
        buffers = [(ctypes.c_char * value.nbytes).from_buffer(value) for value in values]
        self.host.start(name, *grid, *block, buffers)


class _Entered:
    def __init__(self, cupy: FakeCupy | None = None, stream: int = 0) -> None:
        self.cupy, self.stream = cupy, stream

    def __enter__(self) -> None:
        if self.cupy is not None:
            self.cupy.stream = self.stream

    def __exit__(self, *_: object) -> None:
        if self.cupy is not None:
            self.cupy.stream = 0


@pytest.fixture
def cupy(library: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy(library)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=42))
    return fake


def start_exit_head() -> ExitResults:
    """One launch on five rows."""
    tables, keep = reference.exit_tables(5, 3), exit_head.new_keep(5, 3, "cpu")
    index, count = torch.arange(5, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    logits = torch.eye(5)[:, :3].contiguous()
    launch = DeviceLaunch(torch.device("cpu"))
    exit_head.exit_head(launch, tables, logits, index, count, 0, keep, stage_weight=None, selector=None)
    return ExitResults(tables.log_probs, tables.label, tables.exit_stage)


def test_a_launch_passes_its_arguments_on_torchs_current_stream(cupy: FakeCupy) -> None:
    assert start_exit_head().label.tolist() == [0, 1, 2, 0, 0]
    assert cupy.started == [("exit_head_f32", 42)]


def test_an_error_of_the_device_names_the_kernel(cupy: FakeCupy) -> None:
    cupy.failure = RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(RuntimeError, match=r"kernel exit_head_f32.*CUDA_ERROR_ILLEGAL_ADDRESS"):
        start_exit_head()
