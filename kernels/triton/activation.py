"""Activations inside the Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ACTIVATIONS", "activate"]

ACTIVATIONS = ("none", "relu", "relu6")
"""An activation's number in the kernels is its position here."""


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply activation number ACTIVATION; NaN stays NaN."""
    if ACTIVATION > 0:
        x = tl.where(x < 0, 0.0, x)
    if ACTIVATION == 2:
        x = tl.where(x > 6, 6.0, x)
    return x
