"""The triton backend agrees with the reference backend on cascades of both shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from agreement import assert_labels_agree
from readback import NoReadback
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends.interface import ExitResults, Precision
from fastcascade.backends.registry import load_backend
from fastcascade.lowering.export import plan
from fastcascade.lowering.plan import Plan
from fastcascade.model.resnet import BasicBlock, Head, ResNet, cut_into_segments

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.errors import OutOfResources, TritonError

from fastcascade.kernels.triton import layer_launch

IMAGE = (3, 8, 8)
CLASSES = 10
NORMALIZE = fc.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
# The error of a log-probability after a few layers in fp16, which has 11 bits.
TOLERANCE = {"fp32": 2e-4, "fp16": 5e-2}
BAND = {"fp32": 2e-3, "fp16": 1e-1}


def tiny_network(width: int, blocks: int, shortcut: str = "A") -> ResNet:
    """A ResNet of ``blocks`` blocks, with nontrivial batch norms; the second block halves the image."""
    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    rows: list[nn.Module] = [BasicBlock(width, width)]
    rows += [BasicBlock(width, 2 * width, 2, shortcut)] if blocks > 1 else []
    rows += [BasicBlock(2 * width, 2 * width) for _ in range(blocks - 2)]
    network = ResNet(stem, rows, Head(2 * width if blocks > 1 else width, CLASSES))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    spread_logits(network)
    return network


def spread_logits(network: nn.Module) -> None:
    """Scale linear layers up, or every score would be near every threshold and most rows would be ties."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 8


def segments_of(network: ResNet, after: list[int]) -> list[fc.Stage]:
    """The backbone in segments, each with an exit; the last exit is the network's own."""
    segments = cut_into_segments(network, after)
    for _, exit_head in segments[:-1]:
        spread_logits(exit_head)
    return [fc.Stage(m, e, "previous" if k else "image") for k, (m, e) in enumerate(segments)]


@torch.no_grad()
def spread(cascade: fc.Cascade) -> fc.Cascade:
    """Standardise and scale an MLP selector, so that its scores spread."""
    selector = cascade.selector
    if isinstance(selector, fc.MLPSelector):
        logits = cascade.eval().all_logits(images(64))
        judged = cascade.judge(logits)
        for k in range(len(logits) - 1):
            previous = torch.full((64,), -1) if k == 0 else logits[k - 1].argmax(1)
            values = selector.stage_features(k, judged.log_probs[k], previous, logits[k].argmax(1))
            selector.mean[k], selector.std[k] = values.mean(0), values.std(0).clamp_min(0.05)
            selector.w2.data[k] *= 3
    return cascade


def independent(**options: object) -> fc.Cascade:
    """Two networks that read the image."""
    selector = options.pop("selector", None) or fc.MLPSelector()
    stages = [tiny_network(16, 1), tiny_network(16, 3, "B")]
    return spread(fc.Cascade(stages, selector, CLASSES, IMAGE, preprocess=NORMALIZE, **options))


def multi_exit(**options: object) -> fc.Cascade:
    """One backbone in three segments."""
    stages = segments_of(tiny_network(16, 4), after=[1, 3])
    selector = options.pop("selector", None) or fc.MLPSelector()
    return spread(fc.Cascade(stages, selector, CLASSES, IMAGE, preprocess=NORMALIZE, **options))


def mixed(**options: object) -> fc.Cascade:
    """A backbone in two segments, then a network that reads the image again."""
    stages = segments_of(tiny_network(16, 3), after=[1])
    selector = options.pop("selector", None) or fc.MLPSelector()
    return spread(fc.Cascade([*stages, tiny_network(32, 1)], selector, CLASSES, IMAGE, **options))


class Comparison:
    """One plan, on the reference backend (CPU, fp32) and on the triton backend."""

    def __init__(self, lowered: Plan, device: torch.device, precision: Precision = "fp32") -> None:
        self.precision: Precision = precision
        self.device = device
        self.plan = lowered
        self.reference = load_backend("reference").lower(
            lowered, precision="fp32", device=torch.device("cpu"), threads=None
        )
        backend = load_backend("triton")
        assert backend.unavailable_reason() is None
        assert backend.unsupported_reason(lowered, precision=precision, device=device) is None
        self.program = backend.lower(lowered, precision=precision, device=device, threads=None)

    def run(self, x: Tensor, thresholds: Tensor) -> tuple[ExitResults, ExitResults]:
        got = self.program.run(x.to(self.device), thresholds)
        return ExitResults(*(t.cpu() for t in got)), self.reference.run(x, thresholds)

    def forced(self, x: Tensor) -> list[ExitResults]:
        """Assert equal log-probabilities and labels at every forced exit; returns the reference's results."""
        results = []
        last = len(self.plan.stages) - 1
        for k in range(last + 1):
            thresholds = torch.full((last,), math.inf)
            thresholds[k:] = -math.inf
            got, want = self.run(x, thresholds)
            assert torch.equal(got.exit_stage, want.exit_stage)
            assert torch.equal(got.label == -1, want.label == -1)
            atol = TOLERANCE[self.precision]
            torch.testing.assert_close(got.log_probs, want.log_probs, atol=atol, rtol=atol, equal_nan=True)
            assert_labels_agree(got, want, atol)
            results.append(want)
        return results

    def free(self, x: Tensor, thresholds: Tensor, scores: Tensor) -> None:
        """Assert equal exits for all rows outside the margin band, which must be most rows."""
        got, want = self.run(x, thresholds)
        distance = (scores - thresholds[:, None]).abs().nan_to_num(math.inf)
        reached = torch.arange(len(thresholds))[:, None] <= want.exit_stage
        clear = (distance.masked_fill(~reached, math.inf) > BAND[self.precision]).all(0)
        assert clear.float().mean() >= 0.8
        assert torch.equal(got.exit_stage[clear], want.exit_stage[clear])
        same = clear & (got.exit_stage == want.exit_stage)
        atol = TOLERANCE[self.precision]
        torch.testing.assert_close(
            got.log_probs[same], want.log_probs[same], atol=atol, rtol=atol, equal_nan=True
        )
        got, want = (ExitResults(*(column[same] for column in results)) for results in (got, want))
        assert_labels_agree(got, want, atol)


def images(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(n, *IMAGE) + 2 * torch.randn(n, IMAGE[0], 1, 1)  # images differ in colour, too
    return (x * 60 + 128).clamp(0, 255).to(torch.uint8) if dtype == torch.uint8 else x


def middle_thresholds(cascade: fc.Cascade, x: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds in the widest gap of the middle half of each stage's scores, and the scores."""
    with torch.no_grad():
        scores = cascade.eval().all_exits(x)[1]
    quarter = len(x) // 4
    ordered = scores.nan_to_num(0.0).sort(1).values[:, quarter : -quarter or None]
    at = ordered.diff(dim=1).argmax(1, keepdim=True)
    return ((ordered.gather(1, at) + ordered.gather(1, at + 1)) / 2)[:, 0], scores


@pytest.fixture
def one_launch() -> None:
    """Requested by tests that run stages as one launch even under the interpreter."""


@pytest.fixture(autouse=True)
def schedule(device: torch.device, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force one launch per layer under the interpreter, where the persistent kernel is too slow."""
    if device.type == "cpu" and "one_launch" not in request.fixturenames:
        monkeypatch.setattr("fastcascade.backends.gpu.persistent_stage.SCRATCH_LIMIT", 0)


@pytest.mark.usefixtures("one_launch")
@pytest.mark.parametrize(
    ("shape", "precision"), [(independent, "fp32"), (multi_exit, "fp16"), (mixed, "fp32")]
)
@torch.no_grad()
def test_every_shape_with_one_launch_per_stage(device: torch.device, shape, precision: Precision) -> None:
    comparison = Comparison(plan(shape()), device, precision)
    assert all("one launch" in report.kernels[0].kernel for report in comparison.program.describe())
    comparison.forced(images(6))


@pytest.mark.parametrize("shape", [independent, multi_exit, mixed])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
@torch.no_grad()
def test_every_shape_of_cascade(device: torch.device, shape, precision: Precision) -> None:
    torch.manual_seed(1)  # few rows are ties, even to fp16's tolerance
    cascade = shape()
    x = images(17)
    comparison = Comparison(plan(cascade), device, precision)
    comparison.forced(x)
    comparison.free(x, *middle_thresholds(cascade, x))


@pytest.mark.parametrize("n", [1, 15, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 63, 65))])
def test_batch_sizes(device: torch.device, n: int) -> None:
    Comparison(plan(multi_exit()), device).forced(images(n))


@pytest.mark.parametrize(
    "selector",
    [fc.MLPSelector("topk"), fc.MLPSelector("probs", hidden=5), fc.ThresholdSelector("entropy")],
    ids=["topk", "probs", "entropy"],
)
@pytest.mark.parametrize(
    "combine", ["last", *(pytest.param(c, marks=pytest.mark.slow) for c in ("mean", (0.2, 1.0)))]
)
def test_selectors_and_combinations(device: torch.device, selector: nn.Module, combine: Any) -> None:
    cascade = independent(selector=selector, combine=combine)
    x = images(17)
    comparison = Comparison(plan(cascade), device)
    comparison.forced(x)
    comparison.free(x, *middle_thresholds(cascade, x))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_byte_images_in_both_layouts(device: torch.device, layout: str) -> None:
    x = images(9, torch.uint8)
    if layout == "nhwc":
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    before = x.clone()
    Comparison(plan(independent()), device).forced(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [independent, multi_exit])
def test_a_broken_image_is_marked_and_leaks_nowhere(device: torch.device, shape) -> None:
    x = images(17)
    x[3, 1, 5, 5] = math.nan
    comparison = Comparison(plan(shape()), device)
    for result in comparison.forced(x):
        assert (result.label == -1).nonzero().flatten().tolist() == [3]


class OwnSelector(nn.Module):
    """A custom selector: the difference of the top two log-probabilities."""

    def forward(self, k: int, log_probs: Tensor, previous_label: Tensor) -> Tensor:
        best = log_probs.topk(2, 1).values
        return best[:, 0] - best[:, 1] + 0.1 * (previous_label < 0)

    def macs(self, k: int, num_classes: int) -> int:
        return 0


class Branching(nn.Module):
    """An opaque stage."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) if float(x.abs().sum()) >= 0 else self.network(-x)


@pytest.mark.filterwarnings("ignore:Branching uses")
def test_opaque_stage_and_selector_run_through_torch(device: torch.device) -> None:
    stages = [tiny_network(16, 1), Branching(tiny_network(16, 2))]
    cascade = fc.Cascade(stages, OwnSelector(), CLASSES, IMAGE)
    x = images(17)
    comparison = Comparison(plan(cascade), device)
    comparison.forced(x)
    comparison.free(x, *middle_thresholds(cascade, x))
    reports = comparison.program.describe()
    assert reports[1].opaque_reason is not None
    assert any("readback" in choice.kernel for choice in reports[0].kernels)


def test_large_batches_run_in_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcascade.backends.gpu.scheduler.MAX_ROWS", 7)
    Comparison(plan(independent()), device).forced(images(17))


def test_out_of_memory_names_a_batch_size(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Comparison(plan(independent()), device).program

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(program.runners[0], "run", exhausted)
    with pytest.raises(fc.FastCascadeError, match="batches of 8"):
        program.run(images(17).to(device), torch.zeros(1))


class Opaque(nn.Module):
    """A stage that operations cannot express, but that can be recorded."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 0 * torch.fft.rfft(x).real.mean())


@pytest.mark.filterwarnings("ignore:Opaque uses")
def test_opaque_stages_read_the_count_back_once(device: torch.device) -> None:
    """Between stages in custom kernels; the host knows the count of the first stage."""
    stages = [tiny_network(16, 1), Opaque(tiny_network(16, 1)), tiny_network(16, 1)]
    cascade = spread(fc.Cascade(stages, fc.MLPSelector(), CLASSES, IMAGE, preprocess=NORMALIZE))
    comparison = Comparison(plan(cascade), device)
    x = images(9)
    comparison.forced(x)
    comparison.free(x, *middle_thresholds(cascade, x))
    report = comparison.program.describe()[1]
    assert report.opaque_reason is not None
    assert report.kernels[0] == ("readback of row count", "one, none at the first stage")


class TooLarge:
    """A stand-in for a kernel that does not fit on the device or does not compile."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.fn = layer_launch.conv_kernel.fn

    def __getitem__(self, grid: tuple[int, ...]):  # type: ignore[no-untyped-def]
        def start(*arguments: object, **constants: object) -> None:
            raise self.error

        return start


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OutOfResources(300_000, 232_448, "shared memory"),
            "conv_kernel needs 300000 of shared memory .*232448",
        ),
        (TritonError("ptxas"), "conv_kernel failed: ptxas"),
    ],
)
def test_a_kernel_that_cannot_run_is_named(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    program = Comparison(plan(independent()), device).program
    monkeypatch.setattr(layer_launch, "conv_kernel", TooLarge(error))
    with pytest.raises(fc.FastCascadeError, match=f"(?s)stage 0 .*{said}"):
        program.run(images(2).to(device), torch.zeros(1))


def test_what_it_cannot_run_it_refuses_with_a_reason(device: torch.device) -> None:
    backend = load_backend("triton")
    lowered = plan(independent())
    reason = backend.unsupported_reason(lowered, precision="bf16", device=device)
    assert reason is not None
    assert "bf16" in reason
    assert backend.unsupported_reason(lowered, precision="fp32", device=torch.device("meta")) is not None


@contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """Make torch raise an error if the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        with NoReadback():
            yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.usefixtures("one_launch")
@pytest.mark.parametrize("shape", [independent, multi_exit, mixed])
def test_between_own_kernels_the_host_waits_for_nothing(device: torch.device, shape) -> None:
    program = Comparison(plan(shape()), device).program
    assert all(report.opaque_reason is None for report in program.describe())
    x, thresholds = images(1).to(device), torch.zeros(len(program.runners) - 1)
    program.run(x, thresholds)  # compiles
    with no_synchronisation(device):
        program.run(x, thresholds)


@pytest.mark.filterwarnings("ignore:Branching uses")
def test_a_stage_through_torch_waits_and_the_guard_sees_it(device: torch.device) -> None:
    cascade = fc.Cascade(
        [tiny_network(16, 1), Branching(tiny_network(16, 1))], fc.MLPSelector(), CLASSES, IMAGE
    )
    program = Comparison(plan(cascade), device).program
    x, thresholds = images(3).to(device), torch.full((1,), math.inf)
    program.run(x, thresholds)
    with pytest.raises((AssertionError, RuntimeError, fc.FastCascadeError)), no_synchronisation(device):
        program.run(x, thresholds)


@pytest.mark.parametrize("layout", ["misaligned", "strided", "flipped", "expanded"])
@torch.no_grad()
def test_images_at_any_address_with_any_strides(device: torch.device, layout: str) -> None:
    x = images(3, torch.uint8)
    there = x.to(device)
    if layout == "misaligned":
        there = torch.empty(x.numel() + 1, dtype=torch.uint8, device=device)[1:].view(x.shape).copy_(there)
        assert there.data_ptr() % 2 == 1
    if layout == "strided":
        there = there.repeat_interleave(2, 2).repeat_interleave(3, 3)[:, :, ::2, ::3]
    if layout == "flipped":
        x, there = x.transpose(2, 3), there.transpose(2, 3)
    if layout == "expanded":
        x, there = x[:1].expand(3, *IMAGE), there[:1].expand(3, *IMAGE)
    comparison = Comparison(plan(independent()), device)
    got = comparison.program.run(there, torch.tensor([math.inf])).log_probs.cpu()
    want = comparison.reference.run(x, torch.tensor([math.inf])).log_probs
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def test_images_elsewhere_or_of_another_type_are_refused_or_converted(device: torch.device) -> None:
    fast = fc.compile(independent(), backend="triton", device=device)
    with pytest.raises(fc.FastCascadeError, match="meta"):
        fast(images(2).to("meta"))
    with pytest.raises(fc.FastCascadeError, match="int64"):
        fast(torch.zeros(2, *IMAGE, dtype=torch.int64, device=device))
    x = images(2).to(device)
    assert torch.equal(fast(x.double()).label, fast(x).label)
