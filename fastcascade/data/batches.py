"""Batches of images and labels from every accepted form of data.

In this library, *data* is a Dataset, a DataLoader, a pair (images, labels) of arrays, or an
:class:`ImageData` from :func:`fastcascade.data.sources.load_data`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastcascade.data.image_data import Array, ImageData, Rows, as_tensor
from fastcascade.errors import DataError, InvalidArgument

__all__ = ["Data", "arrays", "batches", "count_images", "image_hashes"]

Data: TypeAlias = "ImageData | Dataset[Any] | DataLoader[Any] | Sequence[Any]"
"""Accepted data; a pair of arrays is a sequence."""


def batches(
    data: Data, batch_size: int, num_classes: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Data in batches, in order.

    Args:
        data: an :class:`ImageData`; a pair (images, labels) of arrays or tensors, where labels may be None; a
            Dataset whose items are images or (image, label); or a DataLoader of such batches, whose batch
            size is kept.
        batch_size: at least 1; the last batch may be smaller.
        num_classes: labels must lie in 0 … num_classes − 1; unchecked if None.

    Yields:
        images (n, …), uint8 or floating, in the layout of the data, and labels (n,) int64 or None. Unreadable
        images of an :class:`ImageData` are left out with a warning.

    Raises:
        InvalidArgument: another form of data, or arrays that are not images and labels.
        DataError: a label out of range.

    Example:
        >>> pair = (np.zeros((5, 32, 32, 3), np.uint8), np.arange(5))
        >>> [(tuple(images.shape), labels.tolist()) for images, labels in batches(pair, 3)]
        [((3, 32, 32, 3), [0, 1, 2]), ((2, 32, 32, 3), [3, 4])]
    """
    if batch_size < 1:
        raise InvalidArgument(f"batch_size is {batch_size}; expected at least 1")
    for images, labels in _raw_batches(data, batch_size):
        images = _checked_images(images)
        labels = None if labels is None else _checked_labels(labels, len(images), num_classes)
        yield images, labels


def arrays(data: Data, num_classes: int | None = None) -> tuple[Tensor, Tensor | None]:
    """All images and labels, loaded into memory; arguments and errors as for :func:`batches`.

    Returns:
        images (N, …) and labels (N,) int64, or None without labels.

    Raises:
        DataError: there are no images.

    Example:
        >>> images, labels = arrays([(torch.zeros(3, 8, 8), 1), (torch.ones(3, 8, 8), 0)])
        >>> images.shape, labels
        (torch.Size([2, 3, 8, 8]), tensor([1, 0]))
    """
    pairs = list(batches(data, 1024, num_classes))
    if not pairs:
        raise DataError("the data set is empty; expected at least one image")
    labels = [label for _, label in pairs if label is not None]
    if len(labels) not in (0, len(pairs)):
        raise InvalidArgument("some batches have labels and some have none; give labels for all or none")
    return torch.cat([images for images, _ in pairs]), torch.cat(labels) if labels else None


def count_images(data: Data) -> int | None:
    """How many images there are; None for data without a length.

    Example:
        >>> count_images((np.zeros((5, 32, 32, 3), np.uint8), None))
        5
    """
    images: Any = data
    if isinstance(data, DataLoader):
        images = data.dataset
    elif isinstance(data, (list, tuple)) and len(data) == 2 and isinstance(data[0], (np.ndarray, Tensor)):
        images = data[0]
    try:
        return len(images)
    except TypeError:
        return None


def image_hashes(images: Tensor | Array) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit hash (BLAKE2b) of each image's content.

    Args:
        images: (N, C, H, W), uint8 or floating (hashed as float32), in any memory layout. Convert NHWC images
            with :meth:`InputSpec.nchw` first, since the hash depends on the order of the axes.

    Returns:
        (N,) uint64.

    Example:
        >>> image_hashes(np.zeros((1, 3, 2, 2), np.uint8))
        array([2283521107298152996], dtype=uint64)
    """
    x = _checked_images(images)
    values = (x if x.dtype == torch.uint8 else x.float()).detach().cpu().numpy()
    digests = b"".join(hashlib.blake2b(np.ascontiguousarray(v).data, digest_size=8).digest() for v in values)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _raw_batches(data: Data, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """(images, labels or None) per batch, unchecked."""
    if isinstance(data, ImageData):
        for rows in data.rows(batch_size):
            _warn_about_unreadable(rows)
            if len(rows.images):
                yield rows.images, rows.labels
    elif isinstance(data, DataLoader):
        yield from (_pair(batch, "a DataLoader's batch") for batch in data)
    elif isinstance(data, (list, tuple)) and len(data) == 2 and isinstance(data[0], (np.ndarray, Tensor)):
        images, labels = data
        if labels is not None and len(labels) != len(images):
            raise InvalidArgument(
                f"got {len(images)} images and {len(labels)} labels; expected equal numbers"
            )
        for start in range(0, len(images), batch_size):
            chunk = slice(start, start + batch_size)
            yield images[chunk], None if labels is None else labels[chunk]
    elif isinstance(data, (Dataset, Sequence)) and not isinstance(data, str):
        yield from _dataset_batches(data, batch_size)
    else:
        raise InvalidArgument(
            f"data is {_kind(data)}; expected a Dataset, a DataLoader, or a pair (images, labels) of arrays"
        )


def _dataset_batches(data: Dataset[Any] | Sequence[Any], batch_size: int) -> Iterator[tuple[Any, Any]]:
    """Collated items of a map-style or iterable Dataset."""
    if hasattr(data, "__len__"):
        items: Iterable[Any] = (data[i] for i in range(len(data)))
    else:
        items = cast(Iterable[Any], data)
    pairs = (_pair(item, "an item of the Dataset") for item in items)
    while chunk := list(islice(pairs, batch_size)):
        images = [_single_image(image) for image, _ in chunk]
        labels = [label for _, label in chunk if label is not None]
        if len({image.shape for image in images}) > 1:
            shapes = sorted({tuple(image.shape) for image in images})
            raise InvalidArgument(f"images of one Dataset have shapes {shapes}; expected one shape")
        if len(labels) not in (0, len(images)):
            raise InvalidArgument("some items have labels and some have none; give labels for all or none")
        yield torch.stack(images), torch.tensor([int(label) for label in labels]) if labels else None


def _pair(item: Any, what: str) -> tuple[Any, Any]:
    """An item or batch as (images, labels or None)."""
    if isinstance(item, (list, tuple)):
        if len(item) not in (1, 2):
            raise InvalidArgument(f"{what} has {len(item)} parts; expected an image, or an image and a label")
        return item[0], item[1] if len(item) == 2 else None
    return item, None


def _single_image(image: Any) -> Tensor:
    """A Dataset's image, which may be a tensor, an array or a Pillow image, as a tensor with three axes."""
    if hasattr(image, "convert") and hasattr(image, "mode"):
        if image.mode not in ("L", "RGB"):
            raise InvalidArgument(f"a Dataset's image has mode {image.mode!r}; convert it to 'RGB' or 'L'")
        image = np.asarray(image)
    if not isinstance(image, (np.ndarray, Tensor)) or image.ndim not in (2, 3):
        raise InvalidArgument(f"an image of the Dataset is {_kind(image)}; expected an array of three axes")
    tensor = as_tensor(image)
    return tensor if tensor.ndim == 3 else tensor[:, :, None]


def _checked_images(images: Any) -> Tensor:
    if not isinstance(images, (np.ndarray, Tensor)):
        raise InvalidArgument(f"images are {_kind(images)}; expected an array or a tensor")
    tensor = as_tensor(images)
    if tensor.ndim != 4 or not (tensor.dtype == torch.uint8 or tensor.is_floating_point()):
        raise InvalidArgument(
            f"images have shape {tuple(tensor.shape)} and dtype {tensor.dtype}; "
            "expected four axes (NHWC or NCHW), uint8 or floating"
        )
    return tensor


def _checked_labels(labels: Any, n: int, num_classes: int | None) -> Tensor:
    """(n,) int64 from integers of shape (n,) or (n, 1)."""
    if not isinstance(labels, (np.ndarray, Tensor)):
        raise InvalidArgument(f"labels are {_kind(labels)}; expected an array or a tensor")
    tensor = as_tensor(labels)
    integral = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if tuple(tensor.shape) not in ((n,), (n, 1)) or not integral:
        raise InvalidArgument(
            f"labels have shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected ({n},) integers"
        )
    tensor = tensor.reshape(n).long()
    if num_classes is not None and n:
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= num_classes:
            raise DataError(
                f"labels lie in {low} … {high}; expected 0 … {num_classes - 1} for {num_classes} classes"
            )
    return tensor


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"


def _warn_about_unreadable(rows: Rows) -> None:
    bad = [f"{i}: {error}" for i, error in zip(rows.ids, rows.errors, strict=True) if error is not None]
    if bad:
        more = f" (and {len(bad) - 3} more)" if len(bad) > 3 else ""
        warnings.warn(f"left out unreadable images: {'; '.join(bad[:3])}{more}", stacklevel=4)
