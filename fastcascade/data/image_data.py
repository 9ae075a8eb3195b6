"""Image sets: ids, images in memory or on disk, labels, class names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from fastcascade.errors import InvalidArgument

__all__ = ["Array", "ImageData", "ImageReader", "IndexIds", "Read", "Rows", "as_tensor", "taken"]

Array: TypeAlias = "np.ndarray[Any, Any]"


Read: TypeAlias = "Callable[[], tuple[Array, list[str | None]]]"
"""Decodes a chunk of images, in any thread: (n, …) the readable ones, and per image None or an error."""


class ImageReader(ABC):
    """Images on disk, read in parts.

    Attributes:
        encoded: whether reading decodes image files, which is worth several threads.
        resize: whether images of other sizes are scaled.
    """

    encoded: ClassVar[bool] = False
    resize: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, positions: Array | slice, /) -> ImageReader:
        """The images at these positions; nothing is read."""

    @abstractmethod
    def fetch(self, positions: Sequence[int], /) -> Read:
        """What must be read in order is read here; what can be decoded in parallel, by the function returned.

        Raises:
            DataError: the file cannot be read at all.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 over names, sizes and modification times of the files: tells whether the set has changed."""

    def read(self, positions: Sequence[int], /) -> tuple[Array, list[str | None]]:
        """Read the images at these positions.

        Returns:
            (n, …) the readable images, and per position None or the reason why the image cannot be read.
        """
        return self.fetch(positions)()


class Rows(NamedTuple):
    """A chunk of an image set.

    Attributes:
        ids: of each image: path relative to the folder, or index as text.
        errors: of each image: None, or the reason why it cannot be read.
        images: (n, H, W, C) uint8, or as stored in an npz file; readable images only.
        labels: (n,) int64 of the readable images, or None if the set has no labels.
    """

    ids: list[str]
    errors: list[str | None]
    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """A set of images in memory or on disk.

    Attributes:
        ids: of each image: path relative to the folder, or index as text.
        images: (N, …) array, or a reader of images on disk.
        labels: (N,) int64, or None.
        classes: names in label order, or None if unknown.
    """

    ids: Sequence[str]
    images: Array | ImageReader
    labels: Array | None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        place = "in memory" if isinstance(self.images, np.ndarray) else "on disk"
        labels = "no labels" if self.labels is None else "with labels"
        classes = "" if self.classes is None else f", {len(self.classes)} classes"
        return f"<ImageData: {len(self):,} images {place}, {labels}{classes}>"

    def take(self, indices: Sequence[int] | Array) -> ImageData:
        """The images at these positions, in this order."""
        positions = _as_slice(indices) if isinstance(indices, range) else np.asarray(indices, np.int64)
        return replace(
            self,
            ids=taken(self.ids, positions),
            images=self.images[positions],
            labels=None if self.labels is None else self.labels[positions],
        )

    def rows(self, batch_size: int) -> Iterator[Rows]:
        """All images in order, in chunks of ``batch_size``; of images on disk, one chunk is in memory."""
        for start in range(0, len(self), batch_size):
            chunk = slice(start, start + batch_size)
            ids = list(self.ids[chunk])
            errors: list[str | None] = [None] * len(ids)
            if isinstance(self.images, np.ndarray):
                images = self.images[chunk]
            else:
                images, errors = self.images.read(range(len(self))[chunk])
            labels = self.labels
            if labels is not None:
                labels = labels[chunk][[error is None for error in errors]]
            yield Rows(ids, errors, as_tensor(images), None if labels is None else as_tensor(labels))


def _as_slice(indices: range) -> Array | slice:
    """A range as a slice where it is one, so that nothing is listed."""
    forward = indices.step > 0 and indices.start >= 0
    return slice(indices.start, indices.stop, indices.step) if forward else np.asarray(indices, np.int64)


def taken(values: Sequence[str], positions: Array | slice) -> Sequence[str]:
    """The values at these positions."""
    return values[positions] if isinstance(positions, slice) else [values[i] for i in positions]


class IndexIds(Sequence[str]):
    """The ids "0", "1", … of images without names.

    Example:
        >>> ids = IndexIds(5)
        >>> len(ids), ids[3], ids[1:3]
        (5, '3', ['1', '2'])
    """

    def __init__(self, count: int) -> None:
        self.indices = range(count)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        chosen = self.indices[index]
        return [str(i) for i in chosen] if isinstance(chosen, range) else str(chosen)


def as_tensor(values: Array | Tensor) -> Tensor:
    """A tensor that shares the array's memory if torch supports its layout, else a copy."""
    if isinstance(values, Tensor):
        return values
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    usable = native.flags.writeable and all(stride >= 0 for stride in native.strides)
    try:
        return torch.from_numpy(native if usable else native.copy())
    except TypeError as error:
        raise InvalidArgument(f"got an array of dtype {values.dtype}; expected numbers") from error
