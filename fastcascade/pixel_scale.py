"""A warning about float images of the wrong scale, which would only show as bad accuracy."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastcascade.errors import ScaleWarning
from fastcascade.types import InputSpec

__all__ = ["ScaleCheck"]

_BATCHES = 16
"""Float batches that are checked: the first ones may be warm-up calls on noise or zeros."""

_SAMPLED_IMAGES, _SAMPLED_ROWS = 16, 16
"""Per batch: so many images, and of each so many rows and columns of pixels."""

_ENOUGH_IMAGES = 4
"""A single bright image may have no pixel below the mean."""

_SPAN = 0.6
"""Values that lie closer together may belong to a flat image."""

_OUTLIERS = 0.01


class ScaleCheck:
    """Warns once if float images are not normalised as ``preprocess`` would normalise them.

    With ``low`` and ``high`` the values of a black and a white pixel, (0 − mean)/std and (1 − mean)/std, the
    images are of the wrong scale if

    - more than 1 % of their values lie outside [low, high] by more than high − low, as pixels of 0–255 do; or
    - ``low`` is below −0.25 in every channel, and yet at least four images have all values in 0–1 and span
      0.6 of it, as pixels of 0–1 do.

    Otherwise they pass: augmented images may exceed the range a little, and standard normal noise a little
    more. Only a sample of each of the first 16 float batches is checked. A batch that fits either scale, all
    black or flat, is judged together with the next; a negative value shows that a batch is normalised.

    Attributes:
        open: whether batches still have to be checked.

    Example:
        >>> from fastcascade.types import Normalize
        >>> check = ScaleCheck(InputSpec((1, 2, 2), Normalize((0.5,), (0.25,))))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     check(torch.rand(8, 1, 2, 2) * 255)
        >>> len(caught), check.open
        (1, False)
    """

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        self.open = spec.preprocess is not None
        self._batches = 0
        self._start()

    def _start(self) -> None:
        self._images = 0
        self._lowest, self._highest = float("inf"), float("-inf")

    def __call__(self, images: Tensor, stacklevel: int = 6) -> None:
        """Check a batch (N, C, H, W) while ``open``; uint8 images pass.

        Args:
            stacklevel: of the warning; 6 is the caller of a module whose ``forward`` calls a method that
                calls this.
        """
        preprocess = self.spec.preprocess
        if preprocess is None or not self.open or images.dtype == torch.uint8 or not len(images):
            return
        self._batches += 1
        self.open = self._batches < _BATCHES
        sample = _sample(images)
        finite = sample[sample.isfinite()]
        if not len(finite):
            return
        mean, std = (sample.new_tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
        low, high = -mean / std, (1 - mean) / std
        outside = (sample < 2 * low - high) | (sample > 2 * high - low)
        self._images += len(images)
        self._lowest = min(self._lowest, float(finite.min()))
        self._highest = max(self._highest, float(finite.max()))
        far = float(outside.float().mean()) > _OUTLIERS
        within = self._lowest >= 0 and self._highest <= 1 and bool((low < -0.25).all())
        spans = self._highest - self._lowest >= _SPAN and self._images >= _ENOUGH_IMAGES
        if far or (within and spans):
            self._warn(float(low.min()), float(high.max()), stacklevel + 1)
        elif not within:
            self._start()

    def _warn(self, low: float, high: float, stacklevel: int) -> None:
        self.open = False
        warnings.warn(
            f"float images have values from {self._lowest:.3g} to {self._highest:.3g}; this cascade expects "
            f"normalised ones, from about {low:.2g} to {high:.2g}. Pass uint8 images, which it normalises "
            "itself, or (x/255 − mean)/std with the mean and std of its preprocess",
            ScaleWarning,
            stacklevel=stacklevel,
        )


def _sample(images: Tensor) -> Tensor:
    """A few images of the batch, thinned out to a few rows and columns, in float32."""
    steps = [max(1, size // most) for size, most in zip(images.shape[2:], (_SAMPLED_ROWS,) * 2, strict=True)]
    picked = images[:: max(1, len(images) // _SAMPLED_IMAGES), :, :: steps[0], :: steps[1]]
    return picked.detach().to(torch.float32)
