"""Random small networks: plain convolutional ones, and ones that together use every operation of a plan."""

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


class _Gated(nn.Module):
    """x · gate(x): squeeze-and-excitation, spatial attention, attention over channels."""

    def __init__(self, *gate: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Sequential(*gate)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)  # type: ignore[no-any-return]


class _Shifted(_Gated):
    """x + gate(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(x)  # type: ignore[no-any-return]


class _ChannelMean(nn.Module):
    def __init__(self, largest: bool) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(1, keepdim=True) if self.largest else x.mean(1, keepdim=True)


class _ChannelNorm(nn.Module):
    """Layer norm over channels, with a scale and a shift at every pixel."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.position = nn.Parameter(torch.randn(channels, height, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.position * self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class _SplitAttention(nn.Module):
    """Two branches weighted by a softmax over the two, as in ResNeSt and SKNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.weights = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.branches(x).unflatten(1, (2, x.shape[1]))
        weights = self.weights(branches.sum(1).mean((2, 3), keepdim=True)).unflatten(1, (2, x.shape[1]))
        return (branches * weights.softmax(1)).sum(1)  # type: ignore[no-any-return]


def random_network(
    seed: int,
    num_classes: int = 5,
    input_shape: tuple[int, int, int] = (3, 9, 8),
    every_operation: bool = False,
) -> nn.Module:
    """A small network of randomly chosen layers, the same for the same seed.

    Args:
        every_operation: choose among gates, norms, resizing and smooth activations, too.

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
            random_layer = _any_layer if every_operation else _random_layer
            layers.append(random_layer(choose, channels, height, width))
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


def _any_layer(choose: random.Random, channels: int, height: int, width: int) -> nn.Module:
    activation = choose.choice(
        [
            nn.SiLU(),
            nn.Hardswish(),
            nn.GELU(),
            nn.GELU("tanh"),
            nn.LeakyReLU(0.1),
            nn.ELU(),
            nn.Mish(),
            nn.Tanh(),
        ]
    )
    same = nn.Conv2d(channels, channels, 3, padding=1)
    gate = choose.choice([nn.Sigmoid(), nn.Hardsigmoid(), nn.Softmax(1)])
    squeeze = [
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(channels, 5, 1),
        activation,
        nn.Conv2d(5, channels, 1),
        gate,
    ]
    smooth = choose.choice(["nearest", "bilinear"])
    kinds = [
        _random_layer(choose, channels, height, width),
        nn.Sequential(same, activation),
        activation,
        _Residual(nn.Sequential(same, activation), nn.Identity(), nn.Identity()),
        nn.Sequential(_Shifted(nn.AdaptiveMaxPool2d(1)), activation),
        _Gated(*squeeze),
        _Gated(_ChannelMean(choose.random() < 0.5), nn.Sigmoid()),
        _SplitAttention(channels),
        _ChannelNorm(channels, height, width),
        nn.ChannelShuffle(choose.choice([g for g in (1, 2, 3, channels) if channels % g == 0])),
        nn.AdaptiveAvgPool2d(choose.choice([(2, 3), (4, 1)])),
        nn.ReplicationPad2d((1, 0, 2, 1)),
    ]
    if max(height, width) < 20:
        kinds.append(nn.Upsample(scale_factor=2, mode=smooth))
    if min(height, width) > 1:
        kinds.append(nn.ReflectionPad2d((0, 1, 1, 1)))
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
