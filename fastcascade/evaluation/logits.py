"""What every stage says about every image, by the compiled engine where that pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fastcascade.engine import compile
from fastcascade.errors import InvalidArgument
from fastcascade.evaluation.progress import LateBar
from fastcascade.lowering.export import plan
from fastcascade.lowering.plan import Plan
from fastcascade.model.cascade import Cascade
from fastcascade.model.cost import eval_mode

__all__ = ["collect_logits", "compiling_pays", "plan_logits", "stage_logits", "stage_programs"]

WORTH_COMPILING = 20e9
"""Multiplies, above which lowering the stages (a second or two each) costs less than it saves on a CPU."""


def compiling_pays(cascade: Cascade, images: int | None) -> bool:
    """Whether to run ``images`` images (None: an unknown number) through the engine: on a CPU, for many."""
    work = torch.inf if images is None else images * float(sum(cascade.stage_macs))
    return cascade.device.type == "cpu" and cascade.dtype == torch.float32 and work > WORTH_COMPILING


@torch.no_grad()
def collect_logits(
    cascade: Cascade,
    images: Tensor,
    batch_size: int = 500,
    compiled: bool | None = False,
    progress: bool = False,
) -> Tensor:
    """Logits (K, N, C) of every stage on every image, in eval mode and full precision.

    Args:
        images: (N, …) as the cascade takes them, on any device.
        compiled: run the stages through :func:`fastcascade.compile`; then each row is what the stage says
            up to a constant, which no softmax sees. None compiles where it pays: on a CPU, for many images.
        progress: draw a bar on standard error if it takes longer than a second.

    Returns:
        on the cascade's device.

    Raises:
        InvalidArgument: no images.
    """
    if len(images) == 0:
        raise InvalidArgument("got no images; expected at least one")
    if compiled is None:
        compiled = compiling_pays(cascade, len(images))
    logits = stage_logits(cascade, compiled)
    rows = []
    with LateBar("running the stages", len(images), progress) as bar:
        for batch in images.split(batch_size):
            rows.append(logits(batch.to(cascade.device)))
            bar.advance(len(batch))
    return torch.cat(rows, 1)


def stage_logits(cascade: Cascade, compiled: bool) -> Callable[[Tensor], Tensor]:
    """A function from images (n, …) on the cascade's device to the logits (K, n, C) of all stages.

    Args:
        compiled: by the engine, up to a constant per row; stages that read the image run once each, alone.
    """
    if not compiled:

        @torch.no_grad()
        def eager(images: Tensor) -> Tensor:
            with eval_mode(cascade):
                return cascade.all_logits(images)

        return eager
    tempered = plan_logits(plan(cascade))
    # The plan divides by the temperature; log-probabilities times it are logits again.
    temperatures = cascade.temperatures.cpu()[:, None, None]
    return lambda images: tempered(images) * temperatures


def plan_logits(whole: Plan, precision: Literal["bf16"] | None = None) -> Callable[[Tensor], Tensor]:
    """A function from images (n, …) on the CPU to the logits (K, n, C) of all stages of a plan, divided by
    their temperatures, up to a constant per row; stages that read the image run once each, alone.

    Args:
        precision: None for the plan's own.
    """
    fast = [compile(part, precision=precision, output="log_probs") for part in stage_programs(whole)]
    return lambda images: torch.stack([program(images) for program in fast])


def stage_programs(whole: Plan) -> list[Plan]:
    """Every stage, with the segments that it reads through, as a cascade of one exit."""
    return [_chain(whole, k) for k in range(len(whole.stages))]


def _chain(whole: Plan, k: int) -> Plan:
    """Stage k, with the segments that it reads through, as a cascade of one exit."""
    first = k
    while whole.stages[first].input == "previous":
        first -= 1
    if first < k:
        # Every instance passes the earlier exits: +∞ thresholds.
        stages = [*whole.stages[first:k], replace(whole.stages[k], selector=None, selector_macs=0)]
    else:
        stages = [replace(whole.stages[k], selector=None, selector_macs=0)]
    return replace(
        whole,
        stages=tuple(stages),
        combine="last",
        default_thresholds=torch.full((k - first,), torch.inf),
        operating_points={},
    )
