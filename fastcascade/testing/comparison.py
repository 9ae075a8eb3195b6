"""Help for tests: an oracle in float64, comparison outside a margin band, random networks.

A backend's answers are right if, at forced exits, its log-probabilities are near the oracle's and, at free
exits, it stops where the oracle does. A stop score within rounding of its threshold may fall on either side,
so instances that close are left out, and their share is capped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcascade.model.cascade import Cascade
from fastcascade.testing.oracle import Expected, balanced_thresholds, expected_answers
from fastcascade.types import CascadeOutput, forced_exit

__all__ = [
    "assert_answers",
    "assert_drop_in",
]


def assert_answers(
    out: CascadeOutput, expected: Expected, tolerance: float = 1e-4, max_unsure: float = 0.05
) -> None:
    """Compare answers with the oracle's, outside the band.

    Args:
        tolerance: largest difference of two probabilities' logarithms.
        max_unsure: largest share of instances inside the band; above it the test proves nothing and fails.
    """
    share = 1 - expected.sure.double().mean().item()
    assert share <= max_unsure, f"{share:.1%} of the instances lie in the margin band; choose other data"
    sure = expected.sure
    torch.testing.assert_close(out.exit_stage[sure], expected.exit_stage[sure])
    torch.testing.assert_close(out.label[sure], expected.label[sure])
    got, want = out.probs[sure].double(), expected.log_probs[sure].exp()
    # Near probability 1 the logarithm keeps what rounding left; near 0 the probability does.
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)


def assert_drop_in(
    fast: Any,
    cascade: Cascade,
    x: Tensor,
    tolerance: float = 1e-4,
    band: float = 1e-3,
    max_unsure: float = 0.05,
) -> None:
    """A compiled cascade answers as its cascade: at every forced exit, then at balanced free exits."""
    stages = len(cascade.stages)
    for j in range(stages):
        thresholds = forced_exit(j, stages)
        expected = expected_answers(cascade, x, thresholds, band)
        assert_answers(fast(x, thresholds), expected, tolerance, max_unsure)
    thresholds = balanced_thresholds(cascade, x)
    out = fast(x, thresholds)
    assert_answers(out, expected_answers(cascade, x, thresholds, band), tolerance, max_unsure)
    torch.testing.assert_close(out.cost_macs, cascade.exit_macs.to(x.device)[out.exit_stage])


# ---- random networks ----
