"""The choice of a backend, the reasons against one, and that each matches the reference forward pass."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends import registry
from fastcascade.backends.registry import NAMES, choose_backend, load_backend
from fastcascade.errors import BackendUnavailable, InvalidArgument
from fastcascade.lowering.interpreter import run_op
from fastcascade.lowering.operations import Conv2d, Op, Pool
from fastcascade.lowering.plan import Plan
from fastcascade.testing.comparison import assert_drop_in
from fastcascade.testing.networks import random_network, randomise_statistics
from fastcascade.testing.oracle import balanced_thresholds
from fastcascade.types import forced_exit

SHAPE = (3, 9, 8)
CPU = torch.device("cpu")


def independent(selector: nn.Module, combine: Any = "last") -> fc.Cascade:
    """Three networks that all read the image; the middle one is opaque."""
    networks = [random_network(11, input_shape=SHAPE), own_code(), random_network(12, input_shape=SHAPE)]
    for network in networks:
        sharpen(network, torch.randn(200, *SHAPE))
    normalise = fc.Normalize((0.5,) * 3, (0.3,) * 3)
    return fc.Cascade(networks, selector, 5, SHAPE, combine=combine, preprocess=normalise)


def own_code() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softsign(), nn.Flatten(), nn.Linear(4 * 7 * 6, 5))


def segments(selector: nn.Module, combine: Any = "last") -> fc.Cascade:
    """One backbone in three segments, of which the middle one is opaque."""

    def head(channels: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))

    bodies: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 7, 3, 2), nn.GELU()),
        nn.Sequential(nn.Conv2d(7, 8, 1), nn.ReLU()),
    ]
    stages = [
        fc.Stage(randomise_statistics(body), head(channels), input="previous" if k else "image")
        for k, (body, channels) in enumerate(zip(bodies, (6, 7, 8), strict=True))
    ]
    features = torch.randn(200, *SHAPE)
    for stage in stages:
        assert stage.exit is not None
        with torch.no_grad():
            features = stage.module.eval()(features)
        sharpen(stage.exit, features)
    return fc.Cascade(stages, selector, 5, SHAPE, combine=combine)


@torch.no_grad()
def sharpen(network: nn.Module, x: Tensor) -> None:
    """Centre and scale the last layer, so that labels and confidence vary between images."""
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    logits = network.eval()(x)
    scale = 3 / logits.std(0)
    linear.weight.mul_(scale[:, None])
    linear.bias.sub_(logits.mean(0)).mul_(scale)


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run on the CPU here; the others skip with their reason."""
    name = str(request.param)
    reason = load_backend(name).unavailable_reason()
    if reason is None:
        plan = fc.plan(independent(fc.MLPSelector()))
        reason = load_backend(name).unsupported_reason(plan, precision="fp32", device=CPU)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


SELECTORS = {
    "stats": lambda: fc.MLPSelector("stats"),
    "topk": lambda: fc.MLPSelector("topk", hidden=3),
    "probs": lambda: fc.MLPSelector("probs"),
    "max_prob": lambda: fc.ThresholdSelector("max_prob"),
    "margin": lambda: fc.ThresholdSelector("margin"),
    "entropy": lambda: fc.ThresholdSelector("entropy"),
    "own": lambda: Own(),
}


class Own(nn.Module):
    """A custom selector that is confident if the label did not change."""

    def forward(self, k: int, log_probs: Tensor, previous_label: Tensor) -> Tensor:
        return log_probs.amax(1).exp() + (log_probs.argmax(1) == previous_label) + 0.1 * k

    def macs(self, k: int, num_classes: int) -> int:
        return 0


# Every selector and combination, and both shapes of cascade. Each case costs one export per stage.
@pytest.mark.parametrize(
    ("selector", "shape", "combine"),
    [
        ("stats", independent, "last"),
        ("stats", segments, "mean"),
        ("topk", segments, "last"),
        ("probs", independent, "mean"),
        ("max_prob", segments, "last"),
        ("margin", independent, "last"),
        ("entropy", segments, "mean"),
        ("stats", independent, (0.2, 0.5, 1.0)),
        ("own", segments, "last"),
        ("own", independent, "mean"),
    ],
)
def test_every_backend_is_a_drop_in(backend: str, selector: str, shape: Any, combine: Any) -> None:
    cascade = shape(SELECTORS[selector](), combine)
    fast = fc.compile(cascade, backend=backend)
    x = torch.randn(101, *SHAPE)
    assert_drop_in(fast, cascade, x)
    out = fast(x, balanced_thresholds(cascade, x))
    assert out.exit_stage.bincount(minlength=3).min() > 10  # every exit is used
    assert len(out.label.unique()) >= 2


@pytest.mark.parametrize("shape", [independent, segments], ids=["independent", "segments"])
def test_invalid_rows_go_on_and_leave_their_neighbours_alone(backend: str, shape: Any) -> None:
    cascade = shape(fc.MLPSelector(), "mean")
    x = torch.randn(40, *SHAPE)
    clean = fc.compile(cascade, backend=backend)(x, forced_exit(0, 3))
    x[7, 1, 4, 4] = math.nan
    x[8] = math.inf
    out = fc.compile(cascade, backend=backend)(x, forced_exit(0, 3))
    for row in (7, 8):
        assert out.label[row] == -1
        assert out.exit_stage[row] == 2
        assert out.probs[row].isnan().all()
        assert out.cost_macs[row] == cascade.exit_macs[2]
    rest = torch.tensor([row not in (7, 8) for row in range(40)])
    for got, want in zip(out, clean, strict=True):
        assert torch.equal(got[rest], want[rest])


def test_a_row_that_is_invalid_at_one_exit_stops_later(backend: str) -> None:
    class Fragile(nn.Module):
        """A stage with non-finite logits for images whose first pixel is large."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, 0, 0, :1] > 1, math.nan, self.linear(x.mean((2, 3))))

    cascade = fc.Cascade(
        [Fragile(), random_network(3, input_shape=SHAPE)], fc.MLPSelector(), 5, SHAPE, "mean"
    )
    assert_drop_in(fc.compile(cascade, backend=backend), cascade, torch.randn(60, *SHAPE))


def test_uint8_images_and_any_strides(backend: str) -> None:
    cascade = independent(fc.MLPSelector())
    fast = fc.compile(cascade, backend=backend)
    nhwc = torch.randint(0, 256, (12, 9, 8, 3), dtype=torch.uint8)
    thresholds = forced_exit(2, 3)
    want = fast(nhwc.permute(0, 3, 1, 2).contiguous(), thresholds).probs
    assert torch.equal(fast(nhwc, thresholds).probs, want)
    assert torch.equal(fast(nhwc.numpy(), thresholds).probs, want)
    torch.testing.assert_close(cascade(nhwc, thresholds).probs, want, rtol=1e-4, atol=1e-6)
    x = torch.randn(12, *SHAPE)
    padded = torch.zeros(24, 3, 9, 11)
    padded[::2, :, :, 1:9] = x
    for view in (padded[::2, :, :, 1:9], x.contiguous(memory_format=torch.channels_last)):
        got, want = fast(view, thresholds).probs, fast(x, thresholds).probs
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        fast(x[:1].expand(4, *SHAPE), thresholds).label, fast(x, thresholds).label[:1].expand(4)
    )


def test_the_input_is_never_changed(backend: str) -> None:
    """Neither an in-place stage nor compaction of features that alias the image changes the input."""
    cascade = fc.Cascade(
        [
            fc.Stage(nn.ReLU(inplace=True), nn.Sequential(nn.Flatten(), nn.Linear(216, 5))),
            fc.Stage(nn.Identity(), nn.Sequential(nn.Flatten(), nn.Linear(216, 5)), input="previous"),
            fc.Stage(nn.Sequential(nn.Flatten(), nn.Linear(216, 5))),
        ],
        fc.MLPSelector(),
        5,
        SHAPE,
    )
    x = torch.randn(30, *SHAPE)
    before = x.clone()
    fast = fc.compile(cascade, backend=backend)
    fast(x, balanced_thresholds(cascade, x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("n", [1, 2, 15, 17])
def test_extremes_of_stopping(backend: str, n: int) -> None:
    cascade = segments(fc.MLPSelector())
    fast = fc.compile(cascade, backend=backend)
    x = torch.randn(n, *SHAPE)
    for j in range(3):
        assert (fast(x, forced_exit(j, 3)).exit_stage == j).all()


def test_described_stages_match_the_plan(backend: str) -> None:
    fast = fc.compile(independent(fc.MLPSelector()), backend=backend)
    reports = fast.program.describe()
    assert [report.name for report in reports] == [stage.name for stage in fast.plan.stages]
    assert [report.opaque_reason for report in reports] == [stage.opaque_reason for stage in fast.plan.stages]
    assert all(report.kernels and report.weight_bytes > 0 for report in reports)


# ---- choice ----


@pytest.fixture
def plan() -> Plan:
    return fc.plan(fc.Cascade([random_network(0, input_shape=SHAPE)], None, 5, SHAPE))


class Fake:
    """A stand-in for a backend, with given reasons."""

    def __init__(self, name: str, unavailable: str | None = None, unsupported: str | None = None) -> None:
        self.name, self.unavailable, self.unsupported = name, unavailable, unsupported

    def unavailable_reason(self) -> str | None:
        return self.unavailable

    def unsupported_reason(self, plan: Plan, **_: Any) -> str | None:
        assert self.unavailable is None, "asked although unavailable"
        return self.unsupported


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four backends: the first has no device, the second cannot run the plan, the others can."""
    fakes = [Fake("a", "no device"), Fake("b", None, "too deep"), Fake("c"), Fake("d")]
    modules = {fake.name: f"fastcascade.backends.{fake.name}" for fake in fakes}
    monkeypatch.setattr(registry, "MODULES", modules)
    for fake in fakes:
        module = ModuleType(modules[fake.name])
        module.BACKEND = fake  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("fakes")
def test_auto_takes_the_first_without_a_reason(plan: Plan) -> None:
    assert choose_backend("auto", plan, precision="fp32", device=CPU).name == "c"
    assert choose_backend("d", plan, precision="fp32", device=CPU).name == "d"


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(("name", "reason"), [("a", "no device"), ("b", "too deep")])
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_named_backend_is_never_replaced(
    plan: Plan, name: str, reason: str, by_environment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_environment:
        monkeypatch.setenv("FASTCASCADE_BACKEND", name)
    with pytest.raises(BackendUnavailable, match=reason):
        choose_backend("auto" if by_environment else name, plan, precision="fp32", device=CPU)


@pytest.mark.usefixtures("fakes")
def test_the_argument_wins_over_the_environment(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCASCADE_BACKEND", "a")
    assert choose_backend("d", plan, precision="fp32", device=CPU).name == "d"


def test_unknown_names_are_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="unknown backend 'tpu'"):
        choose_backend("tpu", plan, precision="fp32", device=CPU)
    with pytest.raises(InvalidArgument, match="unknown precision 'fp8'"):
        choose_backend("reference", plan, precision="fp8", device=CPU)  # type: ignore[arg-type]
    monkeypatch.setenv("FASTCASCADE_BACKEND", "tpu")
    with pytest.raises(InvalidArgument, match="unknown backend 'tpu'"):
        choose_backend("auto", plan, precision="fp32", device=CPU)


def test_a_broken_import_is_not_taken_for_an_absent_device(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MODULES", {"missing": "fastcascade.backends.missing"})
    with pytest.raises(ModuleNotFoundError):
        choose_backend("auto", plan, precision="fp32", device=CPU)


def test_the_reference_says_what_it_cannot_do(plan: Plan) -> None:
    with pytest.raises(BackendUnavailable, match="it runs fp32 and int8, not fp16"):
        choose_backend("reference", plan, precision="fp16", device=CPU)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="torch cannot use cuda"):
            choose_backend("reference", plan, precision="fp32", device=torch.device("cuda"))
    with pytest.raises(InvalidArgument, match="torch's own threads"):
        fc.compile(plan, backend="reference", threads=2)


# ---- operations that the interpreter composes from several torch operators ----


def test_asymmetric_convolution_padding() -> None:
    x = torch.randn(2, *SHAPE)
    op = Conv2d(1, 0, torch.randn(4, 3, 3, 2), torch.randn(4), (2, 1), (2, 0, 1, 3))
    padded = nn.functional.pad(x, (1, 3, 2, 0))
    want = nn.functional.conv2d(padded, op.weight, op.bias, (2, 1))
    torch.testing.assert_close(run_op(op, [x], op.output_shape(SHAPE)), want)


@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("include_padding", [False, True])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("stride", [(1, 2), (3, 3)])
def test_pooling_is_its_definition(
    kind: Any,
    ceil_mode: bool,
    include_padding: bool,
    padding: tuple[int, int, int, int],
    stride: tuple[int, int],
) -> None:
    op: Op = Pool(1, 0, kind, (3, 2), stride, padding, ceil_mode, include_padding)
    x = torch.randn(1, *SHAPE)
    channels, height, width = op.output_shape(SHAPE)
    got = run_op(op, [x], (channels, height, width))[0]
    top, bottom, left, right = padding
    for row in range(height):
        for column in range(width):
            y, z = row * stride[0] - top, column * stride[1] - left
            window = x[0, :, max(y, 0) : y + 3, max(z, 0) : z + 2]
            inside = window.shape[1] * window.shape[2]
            declared = (min(y + 3, 9 + bottom) - y) * (min(z + 2, 8 + right) - z)
            want = window.amax((1, 2))
            if kind == "average":
                want = window.sum((1, 2)) / (declared if include_padding else inside)
            torch.testing.assert_close(got[:, row, column], want)


@pytest.mark.parametrize("value", [1e21, 3e38, -1e38, math.inf, -math.inf, math.nan])
def test_pixels_beyond_the_limit_are_nan_everywhere(backend: str, value: float) -> None:
    """Invalid on every backend and in the cascade itself; the largest pixel allowed is not."""
    cascade = independent(fc.MLPSelector())
    fast = fc.compile(cascade, backend=backend, device="cpu")
    x = torch.randn(3, *SHAPE)
    x[1, 0, 2, 3] = value
    for out in (cascade(x), fast(x)):
        assert out.label[1] == -1
        assert out.probs[1].isnan().all()
        assert (out.label[[0, 2]] >= 0).all()
