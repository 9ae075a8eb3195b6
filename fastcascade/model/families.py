"""Families of built-in networks: functions that build a network from one size and a few options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar

from fastcascade.errors import InvalidArgument

__all__ = ["FAMILIES", "Network", "checked_channels", "family"]


class Network(Protocol):
    """A network that a registry name rebuilds."""

    architecture: str | None


_P = ParamSpec("_P")
_N = TypeVar("_N", bound=Network)

FAMILIES: dict[str, Callable[..., Network]] = {}
"""The functions that build networks, by the family's name."""


def family(build: Callable[_P, _N]) -> Callable[_P, _N]:
    """Register a family; the networks that it builds get their registry name as ``architecture``."""
    signature = inspect.signature(build)

    @wraps(build)
    def named(*args: _P.args, **kwargs: _P.kwargs) -> _N:
        network = build(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        size, *options = [(k, v) for k, v in given.items() if k != "num_classes"]
        changed = [f",{k}={v}" for k, v in options if v != signature.parameters[k].default]
        network.architecture = f"{build.__name__}:{size[1]}{''.join(changed)}"
        return network

    FAMILIES[build.__name__] = named
    return named


def checked_channels(in_channels: int) -> int:
    """Channels of a network's images.

    Raises:
        InvalidArgument: below 1, or no integer.
    """
    if not isinstance(in_channels, int) or in_channels < 1:
        raise InvalidArgument(f"in_channels is {in_channels!r}; expected an integer of at least 1")
    return in_channels
