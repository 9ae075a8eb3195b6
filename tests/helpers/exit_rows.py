"""Rows of logits that show which classes an exit head reads: the one that matters stands in every place.

A kernel reads classes in vectors, warps or tiles. One that forgets the end of them is right for most rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLASS_COUNTS = (2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100, 1000)
INVALID = (math.nan, math.inf, -math.inf)


def places(num_classes: int) -> list[int]:
    """All classes, or of many the first and last ones and those around the ends of vectors and tiles."""
    if num_classes <= 33:
        return list(range(num_classes))
    ends = {place + step for place in (0, 8, 16, 32, 64, 128, 512, 896, num_classes) for step in (-1, 0, 1)}
    return sorted(ends & set(range(num_classes)))


def outliers(num_classes: int, value: float) -> Tensor:
    """(places, C): zeros but for one class, which has most of the mass if the value is large."""
    at = places(num_classes)
    rows = torch.zeros(len(at), num_classes)
    rows[torch.arange(len(at)), at] = value
    return rows


def rotations(num_classes: int) -> Tensor:
    """(places, C): falling logits, begun at another class in each row; a selector scores all alike."""
    falling = torch.cat([torch.tensor([3.0, 2.2, 1.1]), torch.linspace(0.5, -2.0, 1000)])[:num_classes]
    return torch.stack([falling.roll(place) for place in places(num_classes)])
