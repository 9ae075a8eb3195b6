"""Assertions that a backend's outputs match the float64 oracle's.

A backend is correct if its log-probabilities match the oracle's at forced exits, and its exits match the
oracle's at free ones. A stop score within rounding error of its threshold may fall on either side. Instances
in this margin band are not compared, and their share is capped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcascade.model.cascade import Cascade
from fastcascade.testing.oracle import ExpectedOutputs, balanced_thresholds, expected_outputs
from fastcascade.types import CascadeOutput, forced_exit

__all__ = [
    "assert_drop_in",
    "assert_outputs",
]


def assert_outputs(
    out: CascadeOutput, expected: ExpectedOutputs, tolerance: float = 1e-4, max_in_band: float = 0.05
) -> None:
    """Compare outputs with the oracle's, outside the margin band.

    Args:
        tolerance: largest difference of two log-probabilities.
        max_in_band: largest share of instances in the band; the assertion fails above it.
    """
    compared = expected.outside_band
    in_band = 1 - compared.double().mean().item()
    assert in_band <= max_in_band, f"{in_band:.1%} of the instances are in the margin band; use other images"
    torch.testing.assert_close(out.exit_stage[compared], expected.exit_stage[compared])
    torch.testing.assert_close(out.label[compared], expected.label[compared])
    got, want = out.probs[compared].double(), expected.log_probs[compared].exp()
    # A relative error of a probability is an absolute error of its logarithm.
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)


def assert_drop_in(
    fast: Any,
    cascade: Cascade,
    x: Tensor,
    tolerance: float = 1e-4,
    band: float = 1e-3,
    max_in_band: float = 0.05,
) -> None:
    """Assert that a compiled cascade matches its cascade, at every forced exit and at balanced free exits."""
    stages = len(cascade.stages)
    for j in range(stages):
        thresholds = forced_exit(j, stages)
        expected = expected_outputs(cascade, x, thresholds, band)
        assert_outputs(fast(x, thresholds), expected, tolerance, max_in_band)
    thresholds = balanced_thresholds(cascade, x)
    out = fast(x, thresholds)
    assert_outputs(out, expected_outputs(cascade, x, thresholds, band), tolerance, max_in_band)
    torch.testing.assert_close(out.cost_macs, cascade.exit_macs.to(x.device)[out.exit_stage])
