"""What every stage says about every image, by the compiled engine where that pays."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastcascade.engine import compile
from fastcascade.errors import InvalidArgument
from fastcascade.lowering.export import plan
from fastcascade.lowering.plan import Plan
from fastcascade.model.cascade import Cascade
from fastcascade.model.cost import eval_mode

__all__ = ["collect_logits", "compiled_logits"]

WORTH_COMPILING = 20e9
"""Multiplies, above which lowering the stages (a second or two each) costs less than it saves on a CPU."""


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
        progress: draw a bar on standard error.

    Returns:
        on the cascade's device.

    Raises:
        InvalidArgument: no images.
    """
    if len(images) == 0:
        raise InvalidArgument("got no images; expected at least one")
    if compiled is None:
        work = len(images) * float(sum(cascade.stage_macs))
        compiled = cascade.device.type == "cpu" and cascade.dtype == torch.float32 and work > WORTH_COMPILING
    if compiled:
        return compiled_logits(cascade, images, batch_size, progress)
    rows = []
    with _bar(len(images), progress) as bar, eval_mode(cascade):
        for batch in images.split(batch_size):
            rows.append(cascade.all_logits(batch.to(cascade.device)))
            bar.advance(bar.task_ids[0], len(batch))
    return torch.cat(rows, 1)


def compiled_logits(
    cascade: Cascade, images: Tensor, batch_size: int = 500, progress: bool = False
) -> Tensor:
    """:func:`collect_logits` through the engine: stages that read the image run once each, alone."""
    whole = plan(cascade)
    fast = [compile(_chain(whole, k), output="log_probs") for k in range(len(whole.stages))]
    result = torch.empty(len(fast), len(images), cascade.num_classes)
    with _bar(len(images), progress) as bar:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            for k, program in enumerate(fast):
                # The plan divides by the temperature; log-probabilities times it are logits again.
                result[k, start : start + batch_size] = program(batch) * cascade.temperatures[k].cpu()
            bar.advance(bar.task_ids[0], len(batch))
    return result


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


def _bar(total: int, shown: bool) -> Progress:
    columns = (TextColumn("running the stages"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
    bar.add_task("", total=total)
    return bar
