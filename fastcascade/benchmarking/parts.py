"""Parts of a plan as separate plans that the same engine can time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastcascade.errors import InvalidArgument
from fastcascade.lowering.plan import Plan, StagePlan
from fastcascade.types import InputSpec

__all__ = ["stage_alone", "stage_with_exit", "without_stage"]


def stage_alone(plan: Plan, k: int) -> Plan:
    """Stage k as a cascade of one stage that reads images of the shape of its input.

    Raises:
        InvalidArgument: the stage reads a vector, or an opaque stage's features, whose shape is not known.
    """
    stage = plan.stages[k]
    if stage.input == "image":
        spec = plan.input
    else:
        shapes = plan.stages[k - 1].shapes
        shape = shapes[plan.stages[k - 1].features] if shapes else ()
        if len(shape) != 3:
            raise InvalidArgument(
                f"stage {stage.name!r} reads features of shape {shape or 'unknown'}; only stages that read "
                "images or (C, H, W) features can be timed alone"
            )
        spec = InputSpec((shape[0], shape[1], shape[2]))
    return _plan_of(plan, [k], [replace(stage, input="image")], spec)


def stage_with_exit(plan: Plan, k: int) -> Plan:
    """Stage k with its selector, followed by a stage that no image needs to reach."""
    alone = stage_alone(plan, k)
    first = replace(alone.stages[0], selector=plan.stages[k].selector)
    return _plan_of(plan, [k, k], [first, alone.stages[0]], alone.input)


def without_stage(plan: Plan, k: int) -> Plan | None:
    """The plan without one stage; None if the next one reads its features or no stage is left."""
    rest = [j for j in range(len(plan.stages)) if j != k]
    feeds_next = k + 1 < len(plan.stages) and plan.stages[k + 1].input == "previous"
    if not rest or feeds_next:
        return None
    return _plan_of(plan, rest, [plan.stages[j] for j in rest], plan.input)


def _plan_of(plan: Plan, kept: Sequence[int], stages: Sequence[StagePlan], spec: InputSpec) -> Plan:
    """A plan of changed stages; ``kept`` gives the number that each had in the plan."""
    last = replace(stages[-1], selector=None, selector_macs=0)
    return replace(
        plan,
        stages=(*stages[:-1], last),
        input=spec,
        combine=plan.combine if isinstance(plan.combine, str) else tuple(plan.combine[k] for k in kept),
        default_thresholds=torch.zeros(len(stages) - 1),
        operating_points={},
    )
