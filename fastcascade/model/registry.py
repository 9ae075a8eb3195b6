"""Construction of networks from their registry names, as used in configs and saved cascades."""

from __future__ import annotations

import inspect
import re
from typing import cast

from torch import nn

from fastcascade.errors import InvalidArgument
from fastcascade.model import pooled_net, resnet
from fastcascade.model.families import FAMILIES
from fastcascade.model.resnet import Head, ResNet, cut_segment

__all__ = ["MODULES", "build_module", "build_network"]

MODULES = (pooled_net, resnet)
"""The modules whose families the registry knows."""


def build_network(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build a network from its registry name, with random weights.

    Args:
        name: ``family:size`` with optional ``,key=value`` options.
        in_channels: of the images, unless the name has this option.

    Raises:
        InvalidArgument: the family, an option or the size is unknown.

    Example:
        >>> build_network("resnet_cifar:20,shortcut=B", num_classes=100).architecture
        'resnet_cifar:20,shortcut=B'
        >>> build_network("resnet9:16", num_classes=10, in_channels=1).architecture
        'resnet9:16,in_channels=1'
    """
    family, _, rest = name.partition(":")
    if family not in FAMILIES:
        raise InvalidArgument(f"unknown network {name!r}; known families: {', '.join(sorted(FAMILIES))}")
    size, *options = rest.split(",")
    function = FAMILIES[family]
    known = [p for p in list(inspect.signature(function).parameters)[1:] if p != "num_classes"]
    keywords: dict[str, int | str] = {"in_channels": in_channels}
    for option in options:
        key, _, value = option.partition("=")
        if key not in known or not value:
            raise InvalidArgument(
                f"bad option {option!r} in {name!r}; {family} takes {known or 'no options'}"
            )
        keywords[key] = int(value) if _NUMBER.fullmatch(value) else value
    if not _NUMBER.fullmatch(size):
        raise InvalidArgument(f"{name!r} has no size in 1 … 9999; an example with a size is {family}:20")
    try:
        return cast(nn.Module, function(int(size), num_classes=num_classes, **keywords))
    except TypeError as error:
        raise InvalidArgument(f"cannot build {name!r}: {error}") from error


# Names may come from untrusted files; four digits bound the size of the network.
_NUMBER = re.compile(r"[1-9][0-9]{0,3}")


_SEGMENT = re.compile(r"(.+)\[([0-9]{1,4}):([0-9]{1,4})\]")


def build_module(name: str, num_classes: int) -> nn.Module:
    """Build a network, a segment of one, or an exit head from its registry name, with random weights.

    Args:
        name: as for :func:`build_network`, ``<network>[begin:end]`` or ``head:<channels>``.

    Raises:
        InvalidArgument: not a registry name.

    Example:
        >>> import torch
        >>> len(build_module("resnet_cifar:20[0:3]", num_classes=10))   # the stem and three blocks
        4
        >>> build_module("head:64", num_classes=10)(torch.zeros(2, 64, 8, 8)).shape
        torch.Size([2, 10])
    """
    segment = _SEGMENT.fullmatch(name)
    if segment:
        network, begin, end = build_network(segment[1], num_classes), int(segment[2]), int(segment[3])
        if not isinstance(network, ResNet):
            raise InvalidArgument(f"{name!r}: only ResNets are cut into segments")
        if not begin < end <= len(network.blocks):
            raise InvalidArgument(f"{name!r} is out of range; the network has {len(network.blocks)} blocks")
        return cut_segment(network, begin, end)
    family, _, size = name.partition(":")
    if family == "head" and _NUMBER.fullmatch(size):
        return Head(int(size), num_classes)
    return build_network(name, num_classes)
