"""The oracle: what a cascade must return, computed in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcascade.lowering.interpreter import move_stage, run_stage
from fastcascade.lowering.plan import Plan
from fastcascade.model.cascade import Cascade

__all__ = ["ExpectedOutputs", "balanced_thresholds", "expected_outputs", "reference_logits"]


@torch.no_grad()
def reference_logits(plan: Plan, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Every stage's logits on every instance, from the plan's own operations in plain torch.

    Args:
        x: (N, C, H, W) as the plan's input says, uint8 or floating.

    Returns:
        (K, N, num_classes) of ``dtype``.
    """
    image = features = plan.input.to_float(x).to(dtype)
    rows = []
    for stage in plan.stages:
        moved = move_stage(stage, x.device, dtype)
        features, logits = run_stage(moved, image if stage.input == "image" else features)
        rows.append(logits)
    return torch.stack(rows)


@dataclass(frozen=True)
class ExpectedOutputs:
    """The oracle's outputs.

    Attributes:
        log_probs: (N, C) float64; NaN where invalid. label, exit_stage: (N,) int64.
        outside_band: (N,) bool; every stop score up to the exit is farther from its threshold than the band's
            half-width, and the top two log-probabilities at the exit are farther apart than that.
    """

    log_probs: Tensor
    label: Tensor
    exit_stage: Tensor
    outside_band: Tensor


@torch.no_grad()
def expected_outputs(cascade: Cascade, x: Tensor, thresholds: Tensor, band: float = 1e-3) -> ExpectedOutputs:
    """What a cascade must return: every exit evaluated in float64, then the first one that stops.

    Args:
        thresholds: (K−1,).
        band: half the width of the margin band, in units of stop scores and of log-probabilities.
    """
    oracle = copy.deepcopy(cascade).double().eval()
    log_probs, scores, valid = oracle.judge(oracle.all_logits(x))
    everyone = torch.arange(len(x), device=x.device)
    last = torch.full((1, len(x)), True, device=x.device)
    limit = thresholds.to(scores)[:, None]
    stops = torch.cat([(scores >= limit) & valid[:-1], last])
    exit_stage = stops.int().argmax(0)  # the first exit that stops
    visited = torch.arange(len(scores), device=x.device)[:, None] <= exit_stage
    # An infinite threshold has no band: inf − score is inf.
    near = ((scores - limit).abs() <= band) & valid[:-1] & visited
    at_exit = log_probs[exit_stage, everyone]
    label = torch.where(valid[exit_stage, everyone], at_exit.argmax(1), -1)
    top = at_exit.nan_to_num(-math.inf).topk(2, dim=1).values
    tie = valid[exit_stage, everyone] & (top[:, 0] - top[:, 1] <= band)
    return ExpectedOutputs(at_exit, label, exit_stage, ~near.any(0) & ~tie)


@torch.no_grad()
def balanced_thresholds(cascade: Cascade, x: Tensor) -> Tensor:
    """(K−1,) thresholds that give every exit a share of the instances, each halfway between two scores."""
    oracle = copy.deepcopy(cascade).double().eval()
    logits = oracle.all_logits(x)
    scores = oracle.judge(logits[:, logits.isfinite().all(2).all(0)]).scores
    active = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
    thresholds = []
    for k, row in enumerate(scores):
        ordered = row[active].sort(descending=True).values
        cut = max(1, len(ordered) // (len(scores) + 1 - k))
        thresholds.append(ordered[cut - 1 : cut + 1].mean() if len(ordered) else row.new_tensor(0.0))
        active &= row < thresholds[-1]
    return torch.stack(thresholds).float().cpu() if thresholds else torch.empty(0)
