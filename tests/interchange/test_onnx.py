"""Exported ONNX models compute what the cascade computes, in ONNX Runtime."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastcascade as fc
from fastcascade.errors import InvalidArgument, LoweringError
from fastcascade.interchange.onnx_model import RUNNER, export_onnx
from fastcascade.lowering.export import plan as lower
from fastcascade.lowering.plan import Plan
from fastcascade.model.resnet import resnet_cifar
from fastcascade.testing import assert_drop_in
from fastcascade.testing.networks import random_network, randomise_statistics
from fastcascade.types import CascadeOutput

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("onnx", reason="the package onnx is not installed")

Run = Callable[[Tensor, Tensor], CascadeOutput]


def batches(plan: Plan, folder: Path) -> Run:
    """The stage models under the exported runner."""
    export_onnx(plan, folder)
    spec = importlib.util.spec_from_file_location("exported_runner", folder / RUNNER)
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)

    cascade = runner.Cascade(folder)

    def run(x: Tensor, thresholds: Tensor) -> CascadeOutput:
        log_probs, label, exit_stage = cascade(x.numpy(), thresholds.tolist())
        cost = plan.exit_macs.numpy()[exit_stage]
        return CascadeOutput(*map(torch.from_numpy, (np.exp(log_probs), label, exit_stage, cost)))

    return run


def single_images(plan: Plan, folder: Path) -> Run:
    """The cascade model, image by image."""
    export_onnx(plan, folder)
    session = onnxruntime.InferenceSession(folder / "cascade.onnx")

    def run(x: Tensor, thresholds: Tensor) -> CascadeOutput:
        rows = [
            session.run(None, {"image": image.numpy()[None], "thresholds": thresholds.numpy()}) for image in x
        ]
        log_probs, *rest = map(np.concatenate, zip(*rows, strict=True))
        return CascadeOutput(*map(torch.from_numpy, (np.exp(log_probs), *rest)))

    return run


RUNS = {"batches": batches, "single images": single_images}


@pytest.fixture(params=RUNS)
def exported(request: pytest.FixtureRequest) -> Callable[[Plan, Path], Run]:
    return RUNS[request.param]


def three_networks(selector: Any, combine: Any = "last", classes: int = 5) -> fc.Cascade:
    torch.manual_seed(5)
    stages = [
        nn.Sequential(nn.Flatten(), nn.Linear(216, width), nn.ReLU(), nn.Linear(width, classes))
        for width in (8, 16, 32)
    ]
    cascade = fc.Cascade(stages, selector, classes, (3, 9, 8), combine=combine)
    for p in cascade.selector.parameters():
        nn.init.normal_(p, std=0.5)
    return cascade


SELECTORS = {
    "stats": lambda: fc.MLPSelector("stats"),
    "topk": lambda: fc.MLPSelector("topk"),
    "probs": lambda: fc.MLPSelector("probs"),
    "max_prob": lambda: fc.ThresholdSelector("max_prob"),
    "margin": lambda: fc.ThresholdSelector("margin"),
    "entropy": lambda: fc.ThresholdSelector("entropy"),
}


CASES: list[tuple[str, Any]] = [(name, "mean") for name in SELECTORS]
CASES += [("stats", "last"), ("margin", (0.2, 0.5, 1.0))]


@pytest.mark.parametrize(("selector", "combine"), CASES, ids=str)
def test_every_selector_and_combination(selector: str, combine: Any, tmp_path: Path) -> None:
    cascade = three_networks(SELECTORS[selector](), combine)
    x = 3 * torch.randn(100, 3, 9, 8)
    assert_drop_in(batches(lower(cascade), tmp_path), cascade, x, band=1e-4)


@pytest.mark.parametrize("classes", [2, 3, 17])
def test_the_cascade_model_goes_on_only_where_it_must(classes: int, tmp_path: Path) -> None:
    cascade = three_networks(fc.MLPSelector("stats"), "mean", classes)
    assert_drop_in(single_images(lower(cascade), tmp_path), cascade, 3 * torch.randn(60, 3, 9, 8), band=1e-4)


def test_segments_of_one_backbone(exported: Callable[[Plan, Path], Run], tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = fc.Stage(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), exit=_head(8))
    second = fc.Stage(nn.Sequential(nn.Conv2d(8, 12, 3), nn.SiLU()), exit=_head(12), input="previous")
    third = fc.Stage(random_network(7), input="image")
    cascade = fc.Cascade([first, second, third], fc.ThresholdSelector("margin"), 5, (3, 9, 8), combine="mean")
    assert_drop_in(exported(lower(cascade), tmp_path), cascade, 3 * torch.randn(60, 3, 9, 8), band=1e-4)


def _head(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def test_bytes_are_normalised_inside(exported: Callable[[Plan, Path], Run], tmp_path: Path) -> None:
    preprocess = fc.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    stages = [random_network(3), random_network(4)]
    cascade = fc.Cascade(stages, fc.ThresholdSelector("margin"), 5, (3, 9, 8), preprocess=preprocess)
    x = torch.randint(0, 256, (30, 3, 9, 8), dtype=torch.uint8)
    assert_drop_in(exported(lower(cascade), tmp_path), cascade, x, band=1e-4)


def test_stages_that_see_other_sizes(exported: Callable[[Plan, Path], Run], tmp_path: Path) -> None:
    preprocess = fc.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    transforms = [
        fc.ImageTransform((9, 8), interpolation="bicubic", normalize=fc.Normalize((0.1,) * 3, (0.5,) * 3)),
        fc.ImageTransform((15, 13), crop=0.75),
        fc.ImageTransform((27, 24), interpolation="bicubic"),
    ]
    stages = [
        fc.Stage(random_network(seed, input_shape=(3, *how.size)), transform=how)
        for seed, how in zip((3, 6, 9), transforms, strict=True)
    ]
    cascade = fc.Cascade(stages, fc.ThresholdSelector("margin"), 5, (3, 24, 21), preprocess=preprocess)
    x = torch.randint(0, 256, (30, 3, 24, 21), dtype=torch.uint8)
    assert_drop_in(exported(lower(cascade), tmp_path), cascade, x, band=1e-4, max_in_band=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e20])
def test_a_bad_pixel_makes_its_row_invalid(
    exported: Callable[[Plan, Path], Run], bad: float, tmp_path: Path
) -> None:
    cascade = three_networks(fc.MLPSelector("stats"), "mean")
    x = torch.randn(6, 3, 9, 8)
    x[2, 1, 4, 4] = bad
    out = exported(lower(cascade), tmp_path)(x, torch.full((2,), -math.inf))
    assert out.label[2] == -1
    assert out.exit_stage.tolist() == [0, 0, 2, 0, 0, 0]
    assert out.probs[2].isnan().all()
    assert not out.probs[[0, 1, 3, 4, 5]].isnan().any()


class Everything(nn.Module):
    """The operations that random networks lack."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.embedding = nn.Parameter(torch.randn(8, 9, 8))
        self.head = nn.Linear(8 * 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x), approximate="tanh")
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid() + self.embedding
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.channel_shuffle(F.mish(x), 4) + x.flip(3) * x.amax(1, keepdim=True)
        x = F.interpolate(x, size=(13, 11), mode="bilinear") + F.interpolate(x, size=(13, 11))
        x = x + x.unflatten(1, (2, 4)).softmax(1).flatten(1, 2) * F.hardswish(x)
        x = F.adaptive_avg_pool2d(x, (7, 5)) + F.adaptive_max_pool2d(F.elu(x), (7, 5))
        x = F.pad(F.leaky_relu(x), (1, 2, 2, 1), "reflect") + F.pad(
            F.hardsigmoid(x), (1, 2, 2, 1), "replicate"
        )
        x = F.avg_pool2d(x, 3, 2, padding=1, ceil_mode=True, count_include_pad=False)
        x = F.avg_pool2d(x, 2, 2, padding=1, ceil_mode=True)
        x = F.max_pool2d(x, (2, 1), ceil_mode=True)
        return self.head(F.adaptive_avg_pool2d(x, (4, 3)).flatten(1))  # type: ignore[no-any-return]


def test_every_operation(tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = randomise_statistics(Everything()).eval()
    cascade = fc.Cascade([network], None, 5, (3, 9, 8))
    plan = lower(cascade)
    assert plan.stages[0].opaque_reason is None
    assert_drop_in(batches(plan, tmp_path), cascade, torch.randn(20, 3, 9, 8))


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed: int, tmp_path: Path) -> None:
    cascade = fc.Cascade([random_network(seed)], None, 5, (3, 9, 8))
    assert_drop_in(batches(lower(cascade), tmp_path), cascade, torch.randn(9, 3, 9, 8))


def test_metadata_holds_what_a_caller_needs(tmp_path: Path) -> None:
    cascade = three_networks(fc.MLPSelector("stats"))
    export_onnx(lower(cascade), tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "cascade.onnx")
    stored = json.loads(session.get_modelmeta().custom_metadata_map["fastcascade"])
    assert stored["exit_macs"] == cascade.exit_macs.tolist()
    assert stored["thresholds"] == {"default": ["0.0", "0.0"]}


def test_the_runner_needs_nothing_of_this_package(tmp_path: Path) -> None:
    export_onnx(lower(three_networks(fc.MLPSelector("stats"))), tmp_path)
    script = (
        "import sys; sys.modules['torch'] = sys.modules['fastcascade'] = None\n"
        "import numpy as np; from run_cascade import Cascade\n"
        "print(Cascade('.')(np.zeros((3, 3, 9, 8), np.float32))[1].shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "(3,)\n"


def test_existing_files_are_kept(tmp_path: Path) -> None:
    plan = lower(fc.Cascade([resnet_cifar(8)], None, 10, (3, 32, 32)))
    export_onnx(plan, tmp_path)
    with pytest.raises(InvalidArgument, match="exists"):
        export_onnx(plan, tmp_path)
    export_onnx(plan, tmp_path, overwrite=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(len(x), -1, 8)
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))  # type: ignore[no-any-return]


def test_an_opaque_stage_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not counted"):
        cascade = fc.Cascade([Attention()], None, 5, (3, 9, 8))
    with pytest.raises(LoweringError, match="opaque"):
        export_onnx(lower(cascade), tmp_path / "out")
    assert not (tmp_path / "out").exists()
