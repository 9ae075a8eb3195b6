"""Opaque stages in torch: the layout that their convolutions run fastest in, and ``torch.compile``.

Both classes have an opaque stage's call, a batch of any number of rows → (features, logits), so every backend
runs them like the module itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from fastcascade.lowering.operations import Shape
from fastcascade.lowering.plan import Plan

__all__ = [
    "BUCKETS",
    "ChannelsLast",
    "CompiledModule",
    "compiled_modules",
    "in_best_layout",
    "is_channels_last",
    "module_kernel",
]

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows that a compiled module runs with. More rows run in parts of the largest."""

Call = Callable[[Tensor], tuple[Tensor, Tensor]]


class CompiledModule(nn.Module):
    """A module under ``torch.compile``, which sees few different numbers of rows.

    The number of active rows changes with every batch, and compiling takes seconds to minutes. So rows are
    padded with zeros to the next of :data:`BUCKETS`; each of these is compiled once, when it first occurs.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._compiled: Call | None = None  # made on the first call, after copies and moves to a device

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, …) → features (n, …) and logits (n, C)."""
        if self._compiled is None:
            self._compiled = _compiled(self.module)
        parts = [self._run(self._compiled, rows) for rows in x.split(BUCKETS[-1])]
        if len(parts) == 1:
            return parts[0]
        features, logits = zip(*parts, strict=True)
        return torch.cat(features), torch.cat(logits)

    @staticmethod
    def _run(compiled: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
        count = next(bucket for bucket in BUCKETS if bucket >= len(rows))
        padded = rows
        if count > len(rows):
            padded = torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
        features, logits = compiled(padded)
        return features[: len(rows)], logits[: len(rows)]


def _compiled(module: nn.Module) -> Call:
    """The module's call, compiled for fixed shapes.

    torch counts recompilations per code object and gives up after eight. A copy of the code gives every stage
    a count of its own, also where several stages are of one class.
    """

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], module(x))

    call.__code__ = call.__code__.replace()
    return torch.compile(call, dynamic=False)


class ChannelsLast(nn.Module):
    """A copy of a module with weights and images in channels_last layout; its features may be in it, too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C, H, W) → features (n, …) and logits (n, C)."""
        return cast(tuple[Tensor, Tensor], self.module(x.contiguous(memory_format=torch.channels_last)))


def in_best_layout(module: nn.Module, shape: Shape) -> nn.Module:
    """An opaque stage's module in channels_last if it gains from that, else as it is.

    The rule is fixed, so results do not depend on the clock: a module gains if it has convolutions of maps.
    It must also compute the same on two images of noise: a network may assume contiguous features, in
    ``view``.

    Args:
        shape: of one input, (C, H, W) or (F,).
    """
    if isinstance(module, CompiledModule):
        return CompiledModule(in_best_layout(module.module, shape))
    if len(shape) != 3 or not any(_convolves_maps(part) for part in module.modules()):
        return module
    candidate = ChannelsLast(module)
    return candidate if _same_results(module, candidate, shape) else module


@torch.no_grad()
def _same_results(module: nn.Module, candidate: nn.Module, shape: Shape) -> bool:
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        actual = candidate(x)
    except RuntimeError:
        return False
    return all(
        torch.allclose(a, e, rtol=0, atol=1e-3 * float(e.abs().max()), equal_nan=True)
        for a, e in zip(actual, module(x), strict=True)
    )


def is_channels_last(module: nn.Module) -> bool:
    """Whether a module that :func:`in_best_layout` returned computes in channels_last."""
    return isinstance(module, ChannelsLast) or (
        isinstance(module, CompiledModule) and is_channels_last(module.module)
    )


def _convolves_maps(part: nn.Module) -> bool:
    """Whether this is a convolution of overlapping windows: a patch embedding gains nothing."""
    return isinstance(part, nn.Conv2d) and any(
        k > s for k, s in zip(part.kernel_size, part.stride, strict=True)
    )


def compiled_modules(plan: Plan) -> Plan:
    """The plan with its opaque stages under ``torch.compile``."""
    stages = tuple(
        stage if stage.module is None else replace(stage, module=CompiledModule(stage.module))
        for stage in plan.stages
    )
    return replace(plan, stages=stages)


def module_kernel(module: nn.Module) -> str:
    """How torch runs a module, in words for reports."""
    words = []
    while isinstance(module, ChannelsLast | CompiledModule):
        words.append("channels_last" if isinstance(module, ChannelsLast) else _COMPILED)
        module = cast(nn.Module, module.module)
    return ", ".join(["torch", *words, "active rows only"])


_COMPILED = f"torch.compile, rows padded to {', '.join(map(str, BUCKETS))}"
