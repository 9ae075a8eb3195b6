"""Image sets: ids, images in memory or as files, labels, class names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastcascade.data.image_files import ImageFiles
from fastcascade.errors import InvalidArgument

__all__ = ["Array", "ImageData", "Rows", "as_tensor"]

Array: TypeAlias = "np.ndarray[Any, Any]"


class Rows(NamedTuple):
    """A stretch of a data set in its order, with one entry of ``ids`` and ``errors`` per row.

    Attributes:
        ids: relative path of the image, or its index as text.
        errors: None, or why that image cannot be read. ``images`` and ``labels`` hold the readable rows only.
        images: (n, H, W, C) uint8, or as the arrays of the data set are.
        labels: (n,) int64, or None if the data set has no labels.
    """

    ids: list[str]
    errors: list[str | None]
    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True, eq=False)
class ImageData:
    """A set of images from disk, in memory or decoded while it is read.

    Attributes:
        ids: per image, its path relative to the folder, or its index as text.
        images: (N, H, W, C) uint8 (npz: as stored), or files that are decoded when asked for.
        labels: (N,) int64, or None.
        classes: names in label order, or None where the source has none.
    """

    ids: Sequence[str]
    images: Array | ImageFiles
    labels: Array | None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int] | Array) -> ImageData:
        """The images at these positions, in this order."""
        positions = np.asarray(indices, np.int64)
        return replace(
            self,
            ids=[self.ids[i] for i in positions],
            images=self.images[positions],
            labels=None if self.labels is None else self.labels[positions],
        )

    def rows(self, batch_size: int) -> Iterator[Rows]:
        """All rows in order, ``batch_size`` at a time; only one stretch is in memory if images are files."""
        for start in range(0, len(self), batch_size):
            stretch = slice(start, start + batch_size)
            if isinstance(self.images, ImageFiles):
                images, errors = self.images.read(range(len(self))[stretch])
            else:
                images, errors = self.images[stretch], [None] * len(self.ids[stretch])
            labels = self.labels
            if labels is not None:
                labels = labels[stretch][[error is None for error in errors]]
            yield Rows(
                list(self.ids[stretch]),
                errors,
                as_tensor(images),
                None if labels is None else as_tensor(labels),
            )


def as_tensor(values: Array | Tensor) -> Tensor:
    """A tensor over the same memory where torch can use it, else over a copy."""
    if isinstance(values, Tensor):
        return values
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    usable = native.flags.writeable and all(stride >= 0 for stride in native.strides)
    try:
        return torch.from_numpy(native if usable else native.copy())
    except TypeError as error:
        raise InvalidArgument(f"got an array of dtype {values.dtype}; expected numbers") from error
