"""Stages in custom kernels, launched per layer or once, compute what the reference backend computes."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastcascade as fc
from fastcascade.backends.gpu.feature_layout import channels_first, channels_last
from fastcascade.backends.gpu.scheduler import Active
from fastcascade.lowering.export import plan
from fastcascade.lowering.interpreter import run_stage
from fastcascade.lowering.plan import StagePlan
from fastcascade.types import InputSpec

pytest.importorskip("triton", reason="triton is not installed")

from fastcascade.backends.gpu.layer_lowering import no_kernel_reason, stage_layers
from fastcascade.backends.gpu.per_layer_stage import PerLayerStage
from fastcascade.backends.gpu.persistent_stage import PersistentStage
from fastcascade.kernels.triton.conv import ConvKind, conv_tiles
from fastcascade.kernels.triton.elementwise import ElementwiseKind, elementwise_tiles
from fastcascade.kernels.triton.layer_launch import run_layer
from fastcascade.kernels.triton.persistent import layer_table
from fastcascade.kernels.triton.pool import PoolKind, pool_tiles

CLASSES = 7


class Classifier(nn.Module):
    """A body on feature maps, global pooling and a linear layer."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Shortcut(nn.Module):
    """conv(x) plus a view of x: strided, channels padded on both sides."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, stride, 1)
        self.stride, self.extra = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        view = x[:, :, :: self.stride, :: self.stride]
        half = self.extra // 2
        return F.relu(self.conv(x) + F.pad(view, (0, 0, 0, 0, half, self.extra - half)))


def conv(i: int, o: int, k: int = 3, **options: object) -> nn.Module:
    return nn.Conv2d(i, o, k, **options)


BODIES: dict[str, tuple[nn.Module, int]] = {
    "odd channels": (nn.Sequential(conv(3, 5), nn.ReLU(), conv(5, 20, 1), nn.ReLU6()), 20),
    "5×5, stride, dilation": (
        nn.Sequential(conv(3, 16, 5, stride=2, padding=2), conv(16, 16, dilation=2)),
        16,
    ),
    "uneven padding": (nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), conv(3, 16, stride=2)), 16),
    "max pooling": (nn.Sequential(conv(3, 16), nn.MaxPool2d(3, 2, 1), nn.ReLU()), 16),
    "max pooling, ceil": (nn.Sequential(conv(3, 16), nn.MaxPool2d(2, 2, ceil_mode=True)), 16),
    "average pooling": (nn.Sequential(conv(3, 16), nn.AvgPool2d(3, 2, 1)), 16),
    "average, padding apart": (nn.Sequential(conv(3, 16), nn.AvgPool2d(3, 2, 1, False, False)), 16),
    "shortcut A": (nn.Sequential(conv(3, 16, padding=1), Shortcut(16, 32, 2), Shortcut(32, 32, 1)), 32),
    "shortcut A, odd": (nn.Sequential(conv(3, 6, padding=1), Shortcut(6, 11, 2)), 11),
    "batch norm first": (nn.Sequential(conv(3, 16), nn.ReLU(), nn.BatchNorm2d(16), nn.ReLU()), 16),
    "many channels": (nn.Sequential(conv(3, 48, stride=2), nn.ReLU(), conv(48, 144, 1)), 144),
}


def stage_of(module: nn.Module, size: int) -> tuple[StagePlan, InputSpec]:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.normal_(part.running_mean)
    cascade = fc.Cascade(
        [module], None, CLASSES, (3, size, size), preprocess=fc.Normalize((0.5,) * 3, (0.2,) * 3)
    )
    lowered = plan(cascade)
    return lowered.stages[0], lowered.input


@pytest.fixture(params=["per layer", "persistent"])
def schedule(request: pytest.FixtureRequest) -> str:
    """One launch per layer, or one per stage."""
    return request.param


def run_fused(
    schedule: str,
    stage: StagePlan,
    spec: InputSpec,
    images: Tensor,
    index: Tensor,
    n: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logits of the rows images[index[:n]]; the conftest poisons the memory beyond."""
    assert no_kernel_reason(stage, None) is None
    layers = stage_layers(stage, dtype, device)
    runner: PerLayerStage | PersistentStage
    if schedule == "persistent":
        runner = PersistentStage(stage, spec, layers, layer_table(layers, None))
    else:
        runner = PerLayerStage(stage, spec, layers, device, dtype, "a test")
    active = Active(index.int().to(device), torch.tensor([n], dtype=torch.int32, device=device), None)
    logits = runner.run(images.to(device), active)[1]
    assert logits.dtype == torch.float32
    assert logits[n:].isnan().all(), "rows beyond the active ones are not written"
    return logits[:n].cpu()


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    ("schedule", "dtype"),
    [("per layer", torch.float32), ("per layer", torch.float16), ("persistent", torch.float32)],
    indirect=["schedule"],
)
@torch.no_grad()
def test_every_operation(device: torch.device, schedule: str, body: str, dtype: torch.dtype) -> None:
    module, channels = BODIES[body]
    stage, spec = stage_of(Classifier(module, channels), 9)
    images, index = torch.randn(6, 3, 9, 9), torch.tensor([4, 1, 5, 0, 2])
    got = run_fused(schedule, stage, spec, images, index, 3, device, dtype)
    want = run_stage(stage, images[index[:3]])[1]
    # float32 is summed in another order; fp16 rounds every stored value.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_small_integers_are_exact(device: torch.device, schedule: str) -> None:
    """Integer sums are exact, so any wrong tap, channel or pixel is detected, and so are TF32 and bf16."""
    body = nn.Sequential(conv(3, 20, padding=1), nn.MaxPool2d(2), conv(20, 16, stride=2))
    module = nn.Sequential(body, nn.Flatten(), nn.Linear(16 * 2 * 2, CLASSES))
    for parameter in module.parameters():
        parameter.copy_(torch.randint(-3, 4, parameter.shape))
    body[0].weight.mul_(257)  # needs more bits than bf16 or TF32 have
    stage, spec = stage_of(module, 10)
    images = torch.randint(-4, 5, (3, 3, 10, 10)).float()
    got = run_fused(schedule, stage, spec, images, torch.arange(3), 3, device)
    assert torch.equal(got, run_stage(stage, images)[1])
    assert got.abs().max() > 100


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@torch.no_grad()
def test_bytes_are_read_through_the_table(device: torch.device, schedule: str, layout: str) -> None:
    stage, spec = stage_of(Classifier(conv(3, 16, padding=1), 16), 8)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    want = run_stage(stage, spec.to_float(images[[2, 0]]))[1]
    if layout == "nhwc":
        images = channels_first(channels_last(images))
    got = run_fused(schedule, stage, spec, images, torch.tensor([2, 0]), 2, device)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["per layer"], indirect=True)
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 63, 64, 65])
@torch.no_grad()
def test_every_count(device: torch.device, schedule: str, n: int) -> None:
    stage, spec = stage_of(Classifier(conv(3, 16), 16), 4)
    images, index = torch.randn(80, 3, 4, 4), torch.randperm(80)[:70]
    got = run_fused(schedule, stage, spec, images, index, n, device)
    torch.testing.assert_close(got, run_stage(stage, images[index[:n]])[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nan_stays_in_its_row_and_survives_relu_and_pooling(device: torch.device, schedule: str) -> None:
    body = nn.Sequential(conv(3, 16, padding=1), nn.ReLU(), nn.MaxPool2d(2), conv(16, 16), nn.ReLU6())
    stage, spec = stage_of(Classifier(body, 16), 8)
    images = torch.randn(5, 3, 8, 8)
    images[2, 0, 3, 3] = math.nan
    got = run_fused(schedule, stage, spec, images, torch.arange(5), 5, device)
    assert got.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("module", "size", "words"),
    [
        (Classifier(conv(3, 6, groups=3), 6), 8, "groups"),
        (Classifier(conv(3, 16), 16), 65, "cuDNN"),
        (nn.Sequential(conv(3, CLASSES, 8), nn.Flatten()), 8, "flattened"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES)), 8, "only convolutions read images"),
    ],
)
def test_what_does_not_fit_says_why(module: nn.Module, size: int, words: str) -> None:
    stage, _ = stage_of(module, size)
    reason = no_kernel_reason(stage, None)
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    ("x", "out", "words"),
    [
        (torch.zeros(2, 16, 4, 4).permute(0, 2, 3, 1), torch.zeros(2, 4, 4, 16), "contiguous"),
        (torch.zeros(2, 4, 4, 16), torch.zeros(1, 1, 1, 1).expand(2**27, 4, 4, 16), "split the batch"),
    ],
    ids=["strides", "too many rows"],
)
def test_rows_that_would_be_misread_are_refused(x: Tensor, out: Tensor, words: str) -> None:
    stage, _ = stage_of(Classifier(nn.Sequential(conv(3, 16, padding=1), conv(16, 16, padding=1)), 16), 4)
    layer = stage_layers(stage, torch.float32, torch.device("cpu"))[1]
    with pytest.raises(ValueError, match=words):
        run_layer(layer, x, None, torch.ones(1, dtype=torch.int32), out)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [(conv_tiles, ConvKind), (pool_tiles, PoolKind), (elementwise_tiles, ElementwiseKind)],
    ids=["conv", "pool", "elementwise"],
)
def test_fields_of_a_kind_are_the_constexpr_arguments_in_order(kernel: Any, kind: Any) -> None:
    """A kind is passed by position, so its field names must match the arguments."""
    source = inspect.getsource(kernel.fn)
    arguments = re.findall(r"(\w+): tl\.constexpr", source.partition("):")[0])
    assert [name.lower() for name in arguments] == list(kind._fields)
