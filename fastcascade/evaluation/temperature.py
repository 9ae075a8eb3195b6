"""Temperatures: how far a stage's confidence is from its accuracy, as one number per stage."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from fastcascade.errors import InvalidArgument

__all__ = ["fit_temperatures"]

RANGE = (0.05, 20.0)
"""Temperatures outside say that the images are too few or too easy to find one."""

FEWEST = 20
"""Images below which no temperature is fitted."""


def fit_temperatures(logits: Tensor, labels: Tensor, warn: bool = True) -> Tensor:
    """The temperature of each stage that makes held-out labels most likely.

    After Guo, Pleiss, Sun, Weinberger, *On Calibration of Modern Neural Networks* (ICML 2017,
    arXiv 1706.04599). The mean of −log softmax(z/T)_y is convex in 1/T, so that bisection on its derivative
    finds T. A stage without a minimum between 0.05 and 20 keeps 1.

    Args:
        logits: (K, N, C) of images that trained no stage; rows that are not finite are left out.
        labels: (N,) int64.
        warn: say which stages keep 1, and why.

    Returns:
        (K,) float32, on the logits' device.

    Raises:
        InvalidArgument: shapes that do not fit.

    Warns:
        UserWarning: a stage keeps 1.

    Example:
        >>> z = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [3.0, 0.0]] * 10])
        >>> y = torch.tensor([0, 0, 1, 1] * 10)  # three of four right, yet 95 % sure
        >>> float(fit_temperatures(z, y))  # 3 / log 3
        2.73...
    """
    if logits.ndim != 3 or labels.shape != logits.shape[1:2]:
        raise InvalidArgument(
            f"got logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (K, N, C) and (N,)"
        )
    found = []
    for k, z in enumerate(logits.double()):
        valid = z.isfinite().all(1)
        temperature, reason = _fit(z[valid], labels.to(z.device)[valid])
        if reason and warn:
            warnings.warn(f"stage {k} keeps temperature 1: {reason}", stacklevel=2)
        found.append(temperature)
    return torch.tensor(found, dtype=torch.float32, device=logits.device)


def _fit(logits: Tensor, labels: Tensor) -> tuple[float, str | None]:
    """T, and why it is 1 where none was found; logits (n, C) float64."""
    if len(labels) < FEWEST:
        return 1.0, f"{len(labels)} images with finite logits, fewer than {FEWEST}"
    truth = logits.gather(1, labels[:, None]).squeeze(1)

    def slope(inverse: float) -> float:
        expected = ((inverse * logits).softmax(1) * logits).sum(1)
        return float((expected - truth).mean())

    low, high = 1 / RANGE[1], 1 / RANGE[0]
    if not (slope(low) < 0 < slope(high)):
        return 1.0, f"no temperature from {RANGE[0]} to {RANGE[1]:g} fits its logits best"
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high), None
