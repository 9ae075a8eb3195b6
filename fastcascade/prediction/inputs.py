"""Everything that :func:`fastcascade.predict` accepts, as batches for the pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastcascade.data.batches import batches as labelled_batches
from fastcascade.data.image_data import Array, ImageData, IndexIds
from fastcascade.data.image_decoding import decode, pixels
from fastcascade.data.sources import load_inputs
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.prediction.pipeline import Batch
from fastcascade.types import InputSpec

__all__ = ["Inputs", "image_batches", "open_inputs", "pieces", "rows_per_batch"]

BATCH_BYTES = 32 * 2**20
"""Size of a batch of float32 images, at most."""

MAX_BATCH_ROWS = 1024
"""More images do not make the engine faster, and the first results would come later."""

PIECE_ROWS = 16
"""Image files that one thread decodes at a time."""


class Inputs(NamedTuple):
    """Inputs in batches; ``total`` is None if their number is unknown."""

    batches: Iterator[Batch]
    total: int | None


def open_inputs(inputs: Any, spec: InputSpec, resize: bool) -> Inputs:
    """Find out what the inputs are.

    Args:
        inputs: see :func:`fastcascade.predict`.
        spec: of the model.
        resize: scale images of other sizes; if False, they are errors.

    Raises:
        InvalidArgument: another type.
        DataError: a path without images.
    """
    rows = rows_per_batch(spec)
    if _is_path(inputs) or (_is_list(inputs) and inputs and all(map(_is_path, inputs))):
        inputs = load_inputs(inputs, spec.shape, resize)
    if isinstance(inputs, ImageData):
        return Inputs(image_batches(inputs, _cut(range(len(inputs)), rows)), len(inputs))
    if isinstance(inputs, DataLoader):
        return Inputs(_loader_batches(inputs), None)
    if isinstance(inputs, np.ndarray | Tensor):
        return _array_inputs(inputs, spec, resize, rows)
    if _is_image(inputs) or isinstance(inputs, bytes):
        inputs = [inputs]
    items, total = _items(inputs)
    return Inputs(_item_batches(items, spec, resize, rows), total)


def rows_per_batch(spec: InputSpec) -> int:
    """Number of images in a batch."""
    return min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // (4 * math.prod(spec.shape))))


def pieces(number: int, n: int, rows_per_part: int, rows: int) -> list[range]:
    """Positions of the batches of a part of n inputs.

    Example:
        >>> pieces(1, 12, 5, 2)
        [range(5, 7), range(7, 9), range(9, 10)]
    """
    return list(_cut(range(number * rows_per_part, min(n, (number + 1) * rows_per_part)), rows))


def _cut(positions: range, rows: int) -> Iterator[range]:
    return (positions[start : start + rows] for start in range(0, len(positions), rows))


def _is_path(value: Any) -> bool:
    return isinstance(value, str | Path)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_image(value: Any) -> bool:
    """A Pillow image, without importing Pillow."""
    return hasattr(value, "convert") and hasattr(value, "mode") and hasattr(value, "getexif")


##### Image sets


def image_batches(data: ImageData, chunks: Iterable[range]) -> Iterator[Batch]:
    """The images at these positions; reading starts when a batch is taken."""
    images = data.images
    for chunk in chunks:
        ids = data.ids[chunk.start : chunk.stop]
        if isinstance(images, np.ndarray):
            part = images[chunk.start : chunk.stop]
            yield Batch(ids, [partial(_readable, part)])
        else:
            pieces = _cut(chunk, PIECE_ROWS) if images.encoded else [chunk]
            yield Batch(ids, [images.fetch(piece) for piece in pieces])


def _readable(images: Array) -> tuple[Array, list[str | None]]:
    return images, [None] * len(images)


def _loader_batches(loader: DataLoader[Any]) -> Iterator[Batch]:
    start = 0
    for images, _ in labelled_batches(loader, 1):
        ids = [str(i) for i in range(start, start + len(images))]
        start += len(images)
        yield Batch(ids, [partial(_readable, _as_array(images))])


def _as_array(images: Array | Tensor) -> Array:
    """An array on the CPU, uint8 or of a floating type that NumPy has."""
    if isinstance(images, np.ndarray):
        return images
    images = images.detach().cpu()
    return (images.float() if images.dtype == torch.bfloat16 else images).numpy()


def _array_inputs(images: Array | Tensor, spec: InputSpec, resize: bool, rows: int) -> Inputs:
    """An array of images or of one image, with or without batch axis; grey ones may lack the channel axis."""
    array = _as_array(images)
    channels, height, width = spec.shape
    if array.ndim == 3 and array.shape in (spec.shape, (height, width, channels)):
        array = array[None]
    elif (
        array.ndim == 3 and array.shape[1:] == (height, width) and (channels == 1 or array.dtype == np.uint8)
    ):
        array = np.repeat(array[:, None], channels, axis=1)
    elif array.dtype == np.uint8 and array.ndim in (2, 3):
        return Inputs(_item_batches([array], spec, resize, rows), 1)
    elif array.ndim == 2 and channels == 1:
        array = array[None, None]
    fits = array.shape[1:] in (spec.shape, (height, width, channels))
    if array.ndim == 4 and array.dtype == np.uint8 and resize and not fits:
        return Inputs(_item_batches(array, spec, resize, rows), len(array))
    spec.nchw(array)  # says what is wrong
    data = ImageData(IndexIds(len(array)), array, None)
    return Inputs(image_batches(data, _cut(range(len(array)), rows)), len(array))


##### Single items: Pillow images, arrays, encoded images, items of data sets


def _items(inputs: Any) -> tuple[Iterable[Any], int | None]:
    """The images of a sequence, a Dataset, a Hugging Face data set or an iterator, unchecked.

    An item that cannot be read is a :class:`DataError` in its place.
    """
    if hasattr(inputs, "column_names") and hasattr(inputs, "features"):
        return _hugging_face_items(inputs)
    total = len(inputs) if hasattr(inputs, "__len__") else None
    if hasattr(inputs, "__getitem__") and total is not None and not isinstance(inputs, str | Mapping):
        return (_item(inputs, i) for i in range(total)), total
    if isinstance(inputs, Iterable) and not isinstance(inputs, str | Mapping):
        return inputs, total
    raise InvalidArgument(
        f"inputs are {type(inputs).__name__}; expected a path, images (arrays, tensors or Pillow), a list of "
        "them, a Dataset or a DataLoader"
    )


def _item(data: Any, i: int) -> Any:
    try:
        return data[i]
    except Exception as error:  # a Dataset's own code
        return DataError(f"cannot be read: {type(error).__name__}: {error}")


def _hugging_face_items(data: Any) -> tuple[Iterable[Any], int | None]:
    """The image column of a ``datasets.Dataset``, still encoded, so that a damaged image is one error row."""
    features = data.features or {}
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    name = next((name for name, kind in kinds.items() if kind == "Image"), None)
    if name is None:
        raise InvalidArgument(f"the data set has the columns {kinds}; expected one of type Image")
    data = data.select_columns([name]).cast_column(name, type(features[name])(decode=False))
    cells = (_encoded(row[name]) for row in data)
    return cells, len(data) if hasattr(data, "__len__") else None


def _encoded(cell: Mapping[str, Any] | None) -> Any:
    """The bytes or the path of a Hugging Face image."""
    if cell is None or (cell.get("bytes") is None and not cell.get("path")):
        return DataError("has neither bytes nor a path")
    return Path(cell["path"]) if cell.get("bytes") is None else cell["bytes"]


def _item_batches(items: Iterable[Any], spec: InputSpec, resize: bool, rows: int) -> Iterator[Batch]:
    stream = iter(items)
    numbers = count()
    while chunk := list(islice(stream, rows)):
        ids = [_id(item, number) for item, number in zip(chunk, numbers, strict=False)]
        yield Batch(
            ids,
            [
                partial(_converted, chunk[start : start + PIECE_ROWS], spec, resize)
                for start in range(0, len(chunk), PIECE_ROWS)
            ],
        )


def _id(item: Any, number: int) -> str:
    """The file that a Pillow image was opened from, or the index."""
    name = getattr(item, "filename", None) if _is_image(item) else None
    return str(name or number)


def _converted(items: Sequence[Any], spec: InputSpec, resize: bool) -> tuple[Array, list[str | None]]:
    images, errors = [], list[str | None]()
    for item in items:
        try:
            images.append(_image(item[0] if _is_list(item) and item else item, spec, resize))
            errors.append(None)
        except DataError as error:
            errors.append(str(error))
    if len({image.dtype for image in images}) > 1:
        raise InvalidArgument("some images are uint8 and some floating; expected one type in all of them")
    channels, height, width = spec.shape
    return np.stack(images) if images else np.empty((0, height, width, channels), np.uint8), errors


def _image(item: Any, spec: InputSpec, resize: bool) -> Array:
    """One image as (H, W, C) uint8, or (C, H, W) floating.

    Raises:
        DataError: it cannot be read, or does not fit.
        InvalidArgument: it is not an image.
    """
    channels, *size = spec.shape
    height, width = size
    if isinstance(item, DataError):
        raise item
    if isinstance(item, bytes | Path):
        return decode(item, _file_channels(channels), (height, width), resize)
    if isinstance(item, str):
        return decode(Path(item), _file_channels(channels), (height, width), resize)
    if _is_image(item):
        return _of_pillow(item, channels, (height, width), resize)
    if not isinstance(item, np.ndarray | Tensor) or item.ndim not in (2, 3):
        raise InvalidArgument(
            f"an input is {_kind(item)}; expected an image: an array of 2 or 3 axes, or Pillow's"
        )
    array = _as_array(item)
    if array.ndim == 2 and channels == 1:
        array = array[:, :, None]
    if array.dtype == np.uint8:
        if array.shape == spec.shape:
            return np.moveaxis(array, 0, 2)
        if array.shape == (height, width, channels):
            return array
        return _of_pillow(_pillow_image(array), channels, (height, width), resize)
    if array.dtype.kind != "f":
        raise InvalidArgument(f"an image has dtype {array.dtype}; expected uint8 or a floating type")
    if array.shape == (height, width, channels) and array.shape != spec.shape:
        array = np.moveaxis(array, 2, 0)
    if array.shape != spec.shape:
        raise DataError(f"has shape {array.shape}; expected {spec.shape}. Only uint8 images are resized")
    return array.astype(np.float32)


def _file_channels(channels: int) -> int:
    if channels not in (1, 3):
        raise InvalidArgument(f"image files have 1 or 3 channels; the model reads {channels}")
    return channels


def _of_pillow(image: Any, channels: int, size: tuple[int, int], resize: bool) -> Array:
    try:
        return pixels(image, _file_channels(channels), size, resize)
    except (OSError, ValueError, SyntaxError) as error:  # a file that was opened lazily and is damaged
        raise DataError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _pillow_image(array: Array) -> Any:
    """A uint8 array in any usual layout as a Pillow image."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("resizing needs Pillow; install fastcascade[data]") from error
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise DataError(f"has shape {array.shape}; expected (H, W), (H, W, C) or (C, H, W)")
    return Image.fromarray(np.ascontiguousarray(array))


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"
