"""Random small networks that together use every operation of a plan."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcascade.model.resnet import PadShortcut

__all__ = ["random_network", "randomise_statistics"]


def randomise_statistics(module: nn.Module) -> nn.Module:
    """Randomise the statistics and weights of every batch norm, which are all 0 and 1 before training."""
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
    """A small network of randomly chosen layers, the same for the same seed.

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
