"""Help for tests: an oracle in float64, comparison outside a margin band, random networks.

A backend's answers are right if, at forced exits, its log-probabilities are near the oracle's and, at free
exits, it stops where the oracle does. A stop score within rounding of its threshold may fall on either side,
so instances that close are left out, and their share is capped.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcascade.backends.reference import move_stage, run_stage
from fastcascade.cascade import Cascade
from fastcascade.plan import Plan
from fastcascade.resnet import PadShortcut
from fastcascade.types import CascadeOutput

__all__ = [
    "Expected",
    "assert_answers",
    "assert_drop_in",
    "balanced_thresholds",
    "expected_answers",
    "forced_exit",
    "random_network",
    "randomise_statistics",
    "reference_logits",
]


@torch.no_grad()
def reference_logits(plan: Plan, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Every stage's logits on every instance, from the plan's own operations in plain torch.

    Args:
        x: (N, C, H, W) as the plan's input says, uint8 or floating.

    Returns:
        (K, N, num_classes) of ``dtype``.
    """
    image = features = plan.input.to_float(x).to(dtype)
    rows = []
    for stage in plan.stages:
        moved = move_stage(stage, x.device, dtype)
        features, logits = run_stage(moved, image if stage.input == "image" else features)
        rows.append(logits)
    return torch.stack(rows)


@dataclass(frozen=True)
class Expected:
    """The oracle's answers.

    Attributes:
        log_probs: (N, C) float64; NaN where invalid. label, exit_stage: (N,) int64.
        sure: (N,) bool; no score on the way was within the band of its threshold, nor are the top two
            log-probabilities within it of each other.
    """

    log_probs: Tensor
    label: Tensor
    exit_stage: Tensor
    sure: Tensor


@torch.no_grad()
def expected_answers(cascade: Cascade, x: Tensor, thresholds: Tensor, band: float = 1e-3) -> Expected:
    """What a cascade must answer, from every exit's judgement in float64 and a look-up.

    Args:
        thresholds: (K−1,).
        band: half the width of the margin band, in units of stop scores and of log-probabilities.
    """
    oracle = copy.deepcopy(cascade).double().eval()
    log_probs, scores, valid = oracle.judge(oracle.all_logits(x))
    everyone = torch.arange(len(x), device=x.device)
    last = torch.full((1, len(x)), True, device=x.device)
    limit = thresholds.to(scores)[:, None]
    stops = torch.cat([(scores >= limit) & valid[:-1], last])
    exit_stage = stops.int().argmax(0)  # the first exit that stops
    visited = torch.arange(len(scores), device=x.device)[:, None] <= exit_stage
    # An infinite threshold has no band: inf − score is inf.
    near = ((scores - limit).abs() <= band) & valid[:-1] & visited
    answer = log_probs[exit_stage, everyone]
    label = torch.where(valid[exit_stage, everyone], answer.argmax(1), -1)
    top = answer.nan_to_num(-math.inf).topk(2, dim=1).values
    tie = valid[exit_stage, everyone] & (top[:, 0] - top[:, 1] <= band)
    return Expected(answer, label, exit_stage, ~near.any(0) & ~tie)


def assert_answers(
    out: CascadeOutput, expected: Expected, tolerance: float = 1e-4, max_unsure: float = 0.05
) -> None:
    """Compare answers with the oracle's, outside the band.

    Args:
        tolerance: largest difference of two probabilities' logarithms.
        max_unsure: largest share of instances inside the band; above it the test proves nothing and fails.
    """
    share = 1 - expected.sure.double().mean().item()
    assert share <= max_unsure, f"{share:.1%} of the instances lie in the margin band; choose other data"
    sure = expected.sure
    torch.testing.assert_close(out.exit_stage[sure], expected.exit_stage[sure])
    torch.testing.assert_close(out.label[sure], expected.label[sure])
    got, want = out.probs[sure].double(), expected.log_probs[sure].exp()
    # Near probability 1 the logarithm keeps what rounding left; near 0 the probability does.
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)


def forced_exit(j: int, num_stages: int) -> Tensor:
    """(K−1,) thresholds that send every instance to exit j, or where invalid there to the next valid one."""
    thresholds = torch.full((num_stages - 1,), -math.inf)
    thresholds[:j] = math.inf
    return thresholds


@torch.no_grad()
def balanced_thresholds(cascade: Cascade, x: Tensor) -> Tensor:
    """(K−1,) thresholds under which every exit gets a share of the instances, between two scores each."""
    oracle = copy.deepcopy(cascade).double().eval()
    logits = oracle.all_logits(x)
    scores = oracle.judge(logits[:, logits.isfinite().all(2).all(0)]).scores
    active = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
    thresholds = []
    for k, row in enumerate(scores):
        ordered = row[active].sort(descending=True).values
        cut = max(1, len(ordered) // (len(scores) + 1 - k))
        thresholds.append(ordered[cut - 1 : cut + 1].mean() if len(ordered) else row.new_tensor(0.0))
        active &= row < thresholds[-1]
    return torch.stack(thresholds).float().cpu() if thresholds else torch.empty(0)


def assert_drop_in(
    fast: Any,
    cascade: Cascade,
    x: Tensor,
    tolerance: float = 1e-4,
    band: float = 1e-3,
    max_unsure: float = 0.05,
) -> None:
    """A compiled cascade answers as its cascade: at every forced exit, then at balanced free exits."""
    stages = len(cascade.stages)
    for j in range(stages):
        thresholds = forced_exit(j, stages)
        expected = expected_answers(cascade, x, thresholds, band)
        assert_answers(fast(x, thresholds), expected, tolerance, max_unsure)
    thresholds = balanced_thresholds(cascade, x)
    out = fast(x, thresholds)
    assert_answers(out, expected_answers(cascade, x, thresholds, band), tolerance, max_unsure)
    torch.testing.assert_close(out.cost_macs, cascade.exit_macs.to(x.device)[out.exit_stage])


# ---- random networks ----


def randomise_statistics(module: nn.Module) -> nn.Module:
    """Give every batch norm statistics and weights as after training; fresh ones are all 0 and 1."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) and m.running_mean is not None:
            assert m.running_var is not None
            nn.init.normal_(m.running_mean, std=0.3)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
    return module


class _Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.shortcut(x)
        return self.activation(y)  # type: ignore[no-any-return]


class _Branches(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class _Crop(nn.Module):
    """Strided slices, negative and positive padding, a part of the channels."""

    def __init__(self, channels: int, step: int) -> None:
        super().__init__()
        self.channels, self.step = channels, step

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, : self.channels, :: self.step, 1:], (0, 2, -1 if x.shape[2] > 2 else 0, 1))


def random_network(
    seed: int, num_classes: int = 5, input_shape: tuple[int, int, int] = (3, 9, 8)
) -> nn.Module:
    """A small network of every layer that plans express, the same for the same seed.

    Example:
        >>> random_network(1)(torch.zeros(2, 3, 9, 8)).shape
        torch.Size([2, 5])
    """
    choose = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        channels, height, width = input_shape
        for _ in range(choose.randint(2, 6)):
            layers.append(_random_layer(choose, channels, height, width))
            probe = nn.Sequential(*layers).eval()(torch.zeros(1, *input_shape))
            channels, height, width = probe.shape[1:]
        layers += _random_head(choose, channels, height * width, num_classes)
        return randomise_statistics(nn.Sequential(*layers)).eval()


def _random_convolution(choose: random.Random, channels: int, out: int, height: int, width: int) -> nn.Module:
    groups = choose.choice([g for g in (1, 2, channels) if channels % g == 0 and out % g == 0])
    kernel, dilation = choose.choice([1, 2, 3, 5]), choose.choice([1, 1, 2])
    fits = dilation * (kernel - 1) < min(height, width)
    padding: Any = choose.choice(["same", kernel // 2 * dilation, *([0] if fits else [])])
    stride = 1 if padding == "same" else choose.choice([1, 2])
    bias = choose.random() < 0.5
    if not fits:
        padding, stride = "same", 1
    return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias)


def _random_layer(choose: random.Random, channels: int, height: int, width: int) -> nn.Module:
    out = choose.choice([channels, 2 * channels, 6])
    convolution = _random_convolution(choose, channels, out, height, width)
    activation = choose.choice(
        [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Identity(), nn.Hardtanh(0, 6)]
    )
    same = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    stride = choose.choice([1, 2])
    widened = nn.Sequential(
        nn.Conv2d(channels, 2 * channels, 3, stride, padding=1), nn.BatchNorm2d(2 * channels)
    )
    kinds = [
        nn.Sequential(convolution, nn.BatchNorm2d(out), activation),
        nn.Sequential(convolution, activation, nn.Dropout2d(0.5)),
        nn.Sequential(nn.BatchNorm2d(channels), activation, same),
        _Residual(nn.Sequential(same, nn.BatchNorm2d(channels)), nn.Identity(), activation),
        _Residual(widened, PadShortcut(channels, 2 * channels, stride), activation),
        _Residual(widened, nn.Conv2d(channels, 2 * channels, 1, stride), activation),
        _Branches(nn.Identity(), same, nn.Sequential(same, activation)),
        nn.ZeroPad2d((0, 1, 2, 0)),
    ]
    if min(height, width) >= 3:
        kinds += [
            nn.MaxPool2d(choose.choice([2, 3]), choose.choice([1, 2]), 1, ceil_mode=choose.random() < 0.5),
            nn.AvgPool2d(3, 2, 1, ceil_mode=choose.random() < 0.5, count_include_pad=choose.random() < 0.5),
            _Crop(max(1, channels - 1), choose.choice([1, 2])),
        ]
    return choose.choice(kinds)


class _SpatialMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-1, -2))


def _random_head(choose: random.Random, channels: int, area: int, num_classes: int) -> list[nn.Module]:
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    hidden = [
        nn.Flatten(),
        nn.Linear(channels * area, 7),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, num_classes),
    ]
    return choose.choice([pooled, [_SpatialMean(), *pooled[2:]], hidden])
