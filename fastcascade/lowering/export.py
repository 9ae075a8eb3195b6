"""Export of a cascade to a plan, stage by stage.

Each stage goes through three steps:

- *Trace*: ``torch.export`` exports an eval copy with a dynamic batch size.
- *Translate*: every operator that the outputs depend on becomes an operation on numbered values, or part of a
  constant. Batch norm and arithmetic with constants become ``ScaleShift``.
- *Fuse*: operations are merged into the operation before them.

Scales and shifts are float64 until the last step, so folding loses no accuracy. A stage that fails at any
step becomes opaque, and the plan gives the operator that failed.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastcascade.errors import LoweringError
from fastcascade.lowering.fusion import fuse
from fastcascade.lowering.plan import Plan, SelectorPlan, StagePlan
from fastcascade.lowering.translation import translate
from fastcascade.model.cascade import Cascade
from fastcascade.model.cost import place_of_failure
from fastcascade.model.selector import MLPSelector, ThresholdSelector

__all__ = ["plan"]


def plan(cascade: Cascade) -> Plan:
    """Lower a cascade to a plan. Temperatures become part of the weights.

    Args:
        cascade: on any device, of any floating dtype, in training or eval mode. It is not changed, and its
            weights are copied, so later training does not affect the plan.

    Returns:
        a :class:`fastcascade.lowering.plan.Plan` on the CPU in float32. A stage that operations cannot
        express is opaque.

    Example:
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> lowered = plan(Cascade([resnet_cifar(8)], None, num_classes=10, input_shape=(3, 32, 32)))
        >>> print(*lowered.stages[0].ops[-4:], sep="; ")
        conv 3×3 64→64, +residual, relu; average pool 8×8, stride 8; flatten; linear 64→10
    """
    image = torch.zeros(2, *cascade.input.shape, dtype=cascade.dtype)
    stages: list[StagePlan] = []
    for k in range(len(cascade.stages)):
        # A copy, because eval mode and folding must not change the cascade.
        stage: nn.Module = copy.deepcopy(cascade.stage(k)).cpu().eval().requires_grad_(False)
        if cascade.stage(k).transform is not None:
            stage = _Transformed(copy.deepcopy(cascade.transforms[k]).cpu(), stage)
        reads = cascade.stage(k).input
        feeds = k + 1 < len(cascade.stages) and cascade.stage(k + 1).input == "previous"
        temperature = float(cascade.temperatures[k])
        if temperature != 1:
            stage = _Tempered(stage, temperature, feeds)
        x = image if reads == "image" else image.new_zeros(2, *stages[-1].shapes[stages[-1].features])
        last = k == len(cascade.stages) - 1
        common: dict[str, Any] = {
            "name": cascade.stage(k).name or f"stage{k}",
            "input": reads,
            "macs": cascade.stage_macs[k],
            "selector_macs": 0 if last else cascade.selector_macs[k],
            "selector": None if last else _selector_plan(cast(nn.Module, cascade.selector), k),
        }
        try:
            stages.append(_lower_stage(stage, x, common))
        except LoweringError as error:
            stages.append(_opaque_stage(stage, x, common, str(error)))
    default = getattr(cascade.selector, "default_threshold", 0.0)
    return Plan(
        stages=tuple(stages),
        input=cascade.input,
        num_classes=cascade.num_classes,
        combine=cascade.combine,
        dense_macs=cascade.dense_macs,
        default_thresholds=None if default is None else torch.full((len(stages) - 1,), float(default)),
        classes=cascade.classes,
        operating_points=dict(cascade.operating_points),
    )


class _Transformed(nn.Module):
    """A stage that reads the cascade's images: its transform becomes operations like any other."""

    def __init__(self, transform: nn.Module, stage: nn.Module) -> None:
        super().__init__()
        self.transform = transform
        self.stage = stage

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.stage(self.transform(x))  # type: ignore[no-any-return]


class _Tempered(nn.Module):
    """A stage with its logits divided by its temperature.

    The division becomes an operation that fuses into the last linear layer, in float64; so kernels and plans
    know nothing of temperatures. Where no stage reads the features, they are the divided logits: a second
    reader would keep the layers apart.
    """

    def __init__(self, stage: nn.Module, temperature: float, keeps_features: bool) -> None:
        super().__init__()
        self.stage = stage
        self.temperature = temperature
        self.keeps_features = keeps_features

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.stage(x)
        tempered = logits / self.temperature
        return features if self.keeps_features else tempered, tempered


def _lower_stage(stage: nn.Module, x: Tensor, common: dict[str, Any]) -> StagePlan:
    graph = translate(_trace(stage, x))
    ops, shapes, (features, logits) = fuse(graph.ops, graph.shapes, graph.outputs)
    return StagePlan(**common, ops=ops, shapes=shapes, features=features, logits=logits)


def _trace(stage: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """Export a stage with a dynamic batch."""
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(stage, (x,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch.export may raise anything, and so may the module
        lines = str(error).strip().splitlines() or [""]
        place = place_of_failure(stage, error)
        raise LoweringError(
            f"torch.export: {type(error).__name__}: {lines[0]}{place and f' ({place})'}"
        ) from error


@torch.no_grad()
def _opaque_stage(stage: nn.Module, x: Tensor, common: dict[str, Any], reason: str) -> StagePlan:
    features, logits = stage(x.clone())  # the module may change its input
    values = [x, features] if features is logits else [x, features, logits]
    shapes = tuple(tuple(value.shape[1:]) for value in values)
    return StagePlan(
        **common, shapes=shapes, features=1, logits=len(shapes) - 1, opaque_reason=reason, module=stage
    )


def _selector_plan(selector: nn.Module, k: int) -> SelectorPlan:
    """A built-in selector as data; a custom class, or a subclass, stays a module."""
    if type(selector) is ThresholdSelector:
        return SelectorPlan(kind=selector.score)
    if type(selector) is MLPSelector:
        weights = {
            name: w.detach().to("cpu", torch.float32).clone().contiguous()
            for name, w in selector.weights(k)._asdict().items()
        }
        return SelectorPlan(kind="mlp", features=selector.features, **weights)
    return SelectorPlan(kind="opaque", module=copy.deepcopy(selector).cpu().eval().requires_grad_(False))
