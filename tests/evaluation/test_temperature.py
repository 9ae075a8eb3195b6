"""Temperatures: what scaling did is undone; where nothing can be found it is 1, with the reason."""

from __future__ import annotations

import math

import pytest
import torch

from fastcascade.errors import InvalidArgument
from fastcascade.evaluation.temperature import fit_temperatures


def calibrated(n: int = 20_000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose softmax is the distribution that the labels are drawn from."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 6, generator=g) * 2
    return logits, torch.multinomial(logits.softmax(1), 1, generator=g).squeeze(1)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_scaled_logits_get_their_scale(scale: float) -> None:
    logits, labels = calibrated()
    stages = torch.stack([logits * scale, logits])
    stages[0, 7] = math.nan  # one bad image is left out
    assert fit_temperatures(stages, labels).tolist() == pytest.approx([scale, 1.0], rel=0.05)


def test_the_likelihood_has_its_maximum_there() -> None:
    logits, labels = calibrated(500)
    found = float(fit_temperatures(logits[None] * 2, labels))

    def loss(t: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits.double() * 2 / t, labels))

    assert all(loss(found) < loss(found * factor) for factor in (0.98, 1.02))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.eye(3).repeat(10, 1)[None] * 5, torch.arange(3).repeat(10), "no temperature from"),
        (torch.zeros(1, 30, 3), torch.arange(3).repeat(10), "no temperature from"),
        (torch.full((1, 30, 3), math.nan), torch.arange(3).repeat(10), "0 images with finite logits"),
        (torch.randn(1, 6, 3), torch.arange(3).repeat(2), "6 images with finite logits, fewer than 20"),
    ],
)
def test_where_none_is_found_it_is_one(logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.warns(UserWarning, match=rf"stage 0 keeps temperature 1: {message}"):
        assert fit_temperatures(logits, labels).tolist() == [1.0]


def test_shapes_are_checked() -> None:
    with pytest.raises(InvalidArgument, match=r"expected \(K, N, C\)"):
        fit_temperatures(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64))
