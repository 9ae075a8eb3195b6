"""Tools for testing a backend: a float64 oracle, comparison outside a margin band, random networks."""

from fastcascade.testing.comparison import assert_drop_in, assert_outputs
from fastcascade.testing.networks import random_network, randomise_statistics
from fastcascade.testing.oracle import (
    ExpectedOutputs,
    balanced_thresholds,
    expected_outputs,
    reference_logits,
)

__all__ = [
    "ExpectedOutputs",
    "assert_drop_in",
    "assert_outputs",
    "balanced_thresholds",
    "expected_outputs",
    "random_network",
    "randomise_statistics",
    "reference_logits",
]
