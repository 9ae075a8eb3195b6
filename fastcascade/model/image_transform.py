"""What a stage sees of the images, where its network was trained on another size or normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcascade.errors import InvalidArgument
from fastcascade.types import InputSpec, Normalize

__all__ = ["ImageTransform", "TransformImages", "transform_images"]

MAX_SIDE = 2**14


@dataclass(frozen=True)
class ImageTransform:
    """Resizing, centre crop and normalisation of the images of one stage, as its network was trained.

    The cascade's image is resized to ⌊size/crop⌋ and the centre of ``size`` is cut out, as by the transforms
    for evaluation of torchvision and timm. Both happen in floating point, on the active images only.

    Args:
        size: (height, width) that the network reads, or one number for both.
        crop: share of the image's height and width that the network sees, in (0, 1].
        interpolation: "bilinear" or "bicubic", antialiased as Pillow's are.
        normalize: the network's normalisation; None for that of the cascade.

    Raises:
        InvalidArgument: an argument of the wrong type or out of range.

    Example:
        >>> ImageTransform(224, crop=0.875).resized
        (256, 256)
    """

    size: tuple[int, int]
    crop: float = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    normalize: Normalize | None = None

    def __post_init__(self) -> None:
        size: Any = self.size
        size = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list) else size
        fits = isinstance(size, tuple) and len(size) == 2 and all(isinstance(n, int) for n in size)
        if not fits or not all(1 <= n <= MAX_SIDE for n in size):
            raise InvalidArgument(f"size is {self.size!r}; expected (height, width) of 1 … {MAX_SIDE}")
        object.__setattr__(self, "size", size)
        if not isinstance(self.crop, int | float) or not 0 < self.crop <= 1:
            raise InvalidArgument(f"crop is {self.crop!r}; expected a share in (0, 1]")
        if max(self.resized) > MAX_SIDE:
            raise InvalidArgument(
                f"size {size} at crop {self.crop} resizes to {self.resized}; expected at most {MAX_SIDE}"
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise InvalidArgument(
                f"interpolation is {self.interpolation!r}; expected 'bilinear' or 'bicubic'"
            )
        if self.normalize is not None and not isinstance(self.normalize, Normalize):
            raise InvalidArgument(
                f"normalize is {self.normalize!r}; expected None or fc.Normalize(mean, std)"
            )

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) before the crop."""
        height, width = (math.floor(n / self.crop) for n in self.size)
        return height, width


class TransformImages(nn.Module):
    """An :class:`ImageTransform` of images that are normalised as a cascade normalises them.

    (N, C, H, W) → (N, C, \\*size). Normalised pixels (x − mean)/std become those of another normalisation by
    one scale and one shift per channel.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, transform: ImageTransform, spec: InputSpec) -> None:
        super().__init__()
        self.transform = transform
        self.resizes = transform.resized != spec.shape[1:]
        own, given = transform.normalize, spec.preprocess
        self.normalizes = own is not None and own != given
        if not self.normalizes:
            return
        if given is None or own is None or len(own.mean) != len(given.mean):
            raise InvalidArgument(
                f"its normalisation is {own}, the cascade's is {given}; expected one of as many channels"
            )
        before, after = (
            [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (n.mean, n.std)]
            for n in (given, own)
        )
        scale, shift = before[1] / after[1], (before[0] - after[0]) / after[1]
        self.register_buffer("scale", scale.float(), persistent=False)
        self.register_buffer("shift", shift.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        how = self.transform
        if self.resizes:
            x = F.interpolate(x, how.resized, mode=how.interpolation, antialias=True)
        top, left = (round((n - m) / 2) for n, m in zip(how.resized, how.size, strict=True))
        x = x[:, :, top : top + how.size[0], left : left + how.size[1]]
        return x * self.scale + self.shift if self.normalizes else x

    def extra_repr(self) -> str:
        return repr(self.transform)


def transform_images(transform: ImageTransform | None, spec: InputSpec) -> nn.Module:
    """A module for the images of a stage; the identity for a stage that sees them as they are.

    Raises:
        InvalidArgument: the transform does not fit the images.

    Example:
        >>> half = transform_images(ImageTransform(16), InputSpec((3, 32, 32)))
        >>> half(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3, 16, 16])
    """
    return nn.Identity() if transform is None else TransformImages(transform, spec)
