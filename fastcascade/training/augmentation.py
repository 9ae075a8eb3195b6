"""Random crops and flips whose random numbers depend only on (seed, epoch, sample index).

A training run that is killed and resumed, split over processes, or fed in another batch size therefore
sees the same images.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["crop_and_flip", "epoch_order", "uniforms"]

Words: TypeAlias = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit words with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = x ^ (x >> np.uint64(31))
    return mixed


def uniforms(seed: int, epoch: int, index: NDArray[np.integer[Any]], count: int) -> NDArray[np.float64]:
    """``count`` numbers in [0, 1) for every sample index.

    Args:
        index: (n,) sample indices.

    Returns:
        (n, count) float64, a pure function of (seed, epoch, index, column).

    Example:
        >>> a, b = (uniforms(0, 3, np.array(i), 2) for i in ([5, 9], [9, 5]))
        >>> bool((a == b[::-1]).all())
        True
    """
    stream = _mix(np.array([seed], np.uint64) * _GOLDEN + np.uint64(epoch))
    key = _mix(stream + (index.astype(np.uint64)[:, None] + np.uint64(1)) * _GOLDEN)
    words = _mix(key + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    draws: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draws


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order in which an epoch visits samples 0 … n−1."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def crop_and_flip(images: Tensor, draws: NDArray[np.float64], padding: int) -> Tensor:
    """Shift each image by up to ``padding`` pixels (zeros move in) and mirror half of them.

    Args:
        images: (n, C, H, W), any dtype.
        draws: (n, 3) in [0, 1): vertical shift, horizontal shift, mirror.

    Returns:
        (n, C, H, W) of the same dtype.
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    draw = torch.from_numpy(draws)
    top, left = ((draw[:, i] * (2 * padding + 1)).long() for i in (0, 1))
    rows = top[:, None] + torch.arange(height)  # (n, H)
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(draw[:, 2:3] < 0.5, columns.flip(1), columns) + left[:, None]  # (n, W)
    sample = torch.arange(n)[:, None, None]
    # Advanced indices around a slice move to the front: (n, H, W, C).
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
