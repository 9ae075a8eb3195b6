"""Residual networks for small and large images, whole or cut into segments with exits.

There are three families. A name describes a network, so that a saved cascade can rebuild it:

- ``resnet_cifar:D``: D = 6n+2 layers, widths 16/32/64, shortcut A (zero-padded) or B (1×1 convolution)
  (He et al. 2016, section 4.2).
- ``resnet9:W``: eight 3×3 convolutions of widths W … 8W with max pooling; trains fast (Page 2019).
- ``resnet_imagenet:D``: ResNet-18/34 of basic blocks, -50/101/152 of bottlenecks (He et al. 2016, table 1).

Options follow the size: ``resnet_cifar:20,width=32,shortcut=B``; ``in_channels=1`` reads gray images.
``[begin:end]`` after a name is the segment of these blocks, with the stem if it begins at 0. ``head:C`` is an
exit head for C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from fastcascade.errors import InvalidArgument
from fastcascade.model.families import checked_channels, family

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "Head",
    "ResNet",
    "Segment",
    "cut_into_segments",
    "resnet9",
    "resnet_cifar",
    "resnet_imagenet",
]


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class PadShortcut(nn.Module):
    """Shortcut A: every ``stride``-th pixel, with the channels zero-padded on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        extra = out_channels - in_channels
        self.stride = stride
        self.padding = (0, 0, 0, 0, extra // 2, extra - extra // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def _shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    if kind == "A":
        return PadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut; (N, in, H, W) → (N, out, ⌈H/stride⌉, ⌈W/stride⌉)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, shortcut: str = "B") -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions around a shortcut; the stride sits on the 3×3 (as in torchvision)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1, shortcut: str = "B") -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = _conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = _conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class IdentityResidual(nn.Module):
    """x + body(x), with no activation after the sum (ResNet-9)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


class Head(nn.Sequential):
    """Global average pooling and a linear classifier; (N, C, H, W) → logits (N, classes).

    Attributes:
        architecture: the registry name of the head.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        self.num_classes = num_classes
        self.architecture = f"head:{channels}"


class Segment(nn.Sequential):
    """Some consecutive blocks of a network, after its stem if they are the first.

    Attributes:
        architecture: the registry name that rebuilds it, or None for one cut from a network without a name.
    """

    def __init__(self, *parts: nn.Module, architecture: str | None = None) -> None:
        super().__init__(*parts)
        self.architecture = architecture


class ResNet(nn.Module):
    """A stem, a row of blocks and a classification head.

    Attributes:
        architecture: the registry name that rebuilds this network, or None for one made by hand.
        stem, blocks, head: the three parts, applied in this order. ``blocks`` is an ``nn.Sequential``;
            :func:`cut_into_segments` cuts between its members.
    """

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], head: Head) -> None:
        super().__init__()
        self.architecture: str | None = None
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.head = head
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)))
        return logits


def _conv_bn_relu(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        _conv(in_channels, out_channels, kernel, stride), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


def _groups(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    depths: Sequence[int],
    width: int,
    shortcut: str,
) -> tuple[list[nn.Module], int]:
    """Groups of residual blocks; each group after the first halves the image and doubles the width."""
    blocks: list[nn.Module] = []
    for row, depth in enumerate(depths):
        channels = width * 2**row
        for position in range(depth):
            stride = 2 if row > 0 and position == 0 else 1
            blocks.append(block(in_channels, channels, stride, shortcut))
            in_channels = channels * block.expansion
    return blocks, in_channels


@family
def resnet_cifar(
    depth: int, num_classes: int = 10, width: int = 16, shortcut: str = "A", in_channels: int = 3
) -> ResNet:
    """ResNet for 32×32 images with 6n+2 layers (He et al. 2016, section 4.2).

    Args:
        depth: 8, 14, 20, … (6n+2), at most 1202, the deepest published.
        width: channels of the first group; the second and third have twice and four times as many.
        shortcut: "A" (strided, zero-padded; no weights) or "B" (1×1 convolution).
        in_channels: of the images; 1 for gray.

    Raises:
        InvalidArgument: another depth or shortcut, or ``in_channels`` is below 1.

    Example:
        >>> import torch
        >>> resnet_cifar(8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if not 8 <= depth <= 1202 or (depth - 2) % 6:
        raise InvalidArgument(
            f"resnet_cifar depth {depth} is not 6n+2 in 8 … 1202; use 8, 14, 20, 32, 44, 56 or 110"
        )
    if shortcut not in ("A", "B"):
        raise InvalidArgument(f"unknown shortcut {shortcut!r}; expected 'A' or 'B'")
    blocks, channels = _groups(BasicBlock, width, [(depth - 2) // 6] * 3, width, shortcut)
    return ResNet(_conv_bn_relu(checked_channels(in_channels), width), blocks, Head(channels, num_classes))


@family
def resnet9(width: int, num_classes: int = 10, stem: int | None = None, in_channels: int = 3) -> ResNet:
    """ResNet-9 for 32×32 images: eight 3×3 convolutions, three max-pooling layers, two residual pairs.

    Trains in a quarter of the time of a 6n+2 ResNet of equal cost (Page 2019, "How to train your ResNet",
    where ``width`` is 64).

    Args:
        width: the base width; the convolutions after the first have 2·width to 8·width channels.
        stem: channels of the first convolution; ``width`` by default.
        in_channels: of the images; 1 for gray.

    Raises:
        InvalidArgument: ``in_channels`` is below 1.

    Example:
        >>> import torch
        >>> resnet9(16)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    stem = width if stem is None else stem

    def residual_pair(channels: int) -> nn.Module:
        return IdentityResidual(
            nn.Sequential(_conv_bn_relu(channels, channels), _conv_bn_relu(channels, channels))
        )

    def narrowing(in_channels: int, out_channels: int) -> nn.Module:
        return nn.Sequential(_conv_bn_relu(in_channels, out_channels), nn.MaxPool2d(2))

    blocks = [
        narrowing(stem, 2 * width),
        residual_pair(2 * width),
        narrowing(2 * width, 4 * width),
        narrowing(4 * width, 8 * width),
        residual_pair(8 * width),
    ]
    network = ResNet(_conv_bn_relu(checked_channels(in_channels), stem), blocks, Head(8 * width, num_classes))
    # Zero logits at the start allow the high learning rate of a ten-epoch schedule.
    nn.init.zeros_(cast(nn.Linear, network.head[-1]).weight)
    return network


_IMAGENET_ROWS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


@family
def resnet_imagenet(depth: int, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """ResNet-18, -34, -50, -101 or -152 for 224×224 images (He et al. 2016, table 1).

    Args:
        in_channels: of the images; 1 for gray.

    Raises:
        InvalidArgument: the depth is not one of these, or ``in_channels`` is below 1.

    Example:
        >>> import torch
        >>> resnet_imagenet(18, num_classes=5)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 5])
    """
    if depth not in _IMAGENET_ROWS:
        raise InvalidArgument(
            f"resnet_imagenet depth {depth} is unknown; use one of {sorted(_IMAGENET_ROWS)}"
        )
    block, depths = _IMAGENET_ROWS[depth]
    first = _conv_bn_relu(checked_channels(in_channels), 64, kernel=7, stride=2)
    stem = nn.Sequential(first, nn.MaxPool2d(3, stride=2, padding=1))
    blocks, channels = _groups(block, 64, depths, 64, "B")
    return ResNet(stem, blocks, Head(channels, num_classes))


def cut_into_segments(network: ResNet, after: Sequence[int]) -> list[tuple[nn.Module, nn.Module]]:
    """Cut a network into segments, each with its own exit head.

    Segment k + 1 reads the features of segment k. Every exit but the last is a new :class:`Head`; the last
    exit is the network's own head.

    Args:
        network: a :class:`ResNet`; its modules are copied.
        after: the numbers of blocks before each cut, increasing, in 1 … len(blocks) − 1.

    Returns:
        (segment, exit) pairs: segment (N, C, H, W) → (N, C', H', W'), exit → logits (N, classes).

    Raises:
        InvalidArgument: the cuts are out of range or not increasing.

    Example:
        >>> segments = cut_into_segments(resnet_cifar(20), after=[3, 6])
        >>> [len(segment) for segment, _ in segments]   # the first one holds the stem too
        [4, 3, 3]
    """
    cuts = list(after)
    count = len(network.blocks)
    if cuts != sorted(set(cuts)) or not all(0 < cut < count for cut in cuts):
        raise InvalidArgument(f"cuts {cuts} must be increasing and lie in 1 … {count - 1} ({count} blocks)")
    network = copy.deepcopy(network)
    segments: list[tuple[nn.Module, nn.Module]] = []
    for begin, end in zip([0, *cuts], [*cuts, count], strict=True):
        segment = cut_segment(network, begin, end)
        channels = _channels_out(segment)
        exit_head = network.head if end == count else Head(channels, network.head.num_classes)
        segments.append((segment, exit_head))
    return segments


def cut_segment(network: ResNet, begin: int, end: int) -> Segment:
    parts = [network.stem] if begin == 0 else []
    parts += list(network.blocks)[begin:end]
    name = None if network.architecture is None else f"{network.architecture}[{begin}:{end}]"
    return Segment(*parts, architecture=name)


def _channels_out(segment: Segment) -> int:
    """Output channels of the last convolution."""
    convolutions = [m for m in segment.modules() if isinstance(m, nn.Conv2d)]
    return convolutions[-1].out_channels
