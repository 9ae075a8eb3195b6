"""The memory layout of feature rows between GPU stages: channels last, and padded for the custom kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcascade.kernels.layers import padded
from fastcascade.lowering.plan import StagePlan

__all__ = ["channels_first", "channels_last", "padded_rows"]


def channels_last(x: Tensor) -> Tensor:
    """(n, C, H, W) → contiguous (n, H, W, C), copied only if necessary; (n, F) → contiguous (n, F)."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).contiguous()


def channels_first(rows: Tensor) -> Tensor:
    """The inverse of :func:`channels_last`, as a view: (n, H, W, C) → (n, C, H, W)."""
    return rows.permute(0, 3, 1, 2) if rows.ndim == 4 else rows


def padded_rows(features: Tensor, stage: StagePlan, dtype: torch.dtype) -> Tensor:
    """A stage's input features in the layout of the custom kernels: channels padded to a multiple of 16.

    Copies only if the channels have no padding yet, as from a stage that ran in torch.
    """
    missing = padded(stage.shapes[0][0]) - features.shape[-1]
    rows = F.pad(features, (0, missing)) if missing else features  # a pad of nothing would copy
    return rows.to(dtype).contiguous()
