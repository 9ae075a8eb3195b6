"""``fc.predict``: inputs of any kind to predictions, in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from fastcascade.engine import CompiledCascade, compile
from fastcascade.errors import DataError
from fastcascade.lowering.plan import Plan
from fastcascade.model.cascade import Cascade
from fastcascade.prediction.inputs import open_inputs
from fastcascade.prediction.pipeline import Waits, classified
from fastcascade.prediction.predictions import Predictions
from fastcascade.types import OperatingPointLike

__all__ = ["predict", "predict_batches"]


def predict(
    model: CompiledCascade | Cascade | Plan | str | Path,
    inputs: Any,
    operating_point: OperatingPointLike = None,
    top_k: int = 5,
    resize: bool = True,
) -> Predictions:
    """Classify images.

    Args:
        model: a compiled cascade, or what :func:`fastcascade.compile` accepts: a cascade, a plan, or the
            folder of a saved one. Compile it once if you call this often.
        inputs: one of

            - a path: an image file, a folder, a pattern such as ``"photos/**/*.jpg"``, a .npz, .npy,
              .parquet or .tar file, CIFAR binaries (:func:`fastcascade.data.sources.load_inputs`); or a list
              of paths;
            - a Pillow image, an array or a tensor: one image or a batch, grey ones without a channel axis if
              you like; uint8 pixels, or floats that are already normalised;
            - a list or iterator of images, a torch Dataset or DataLoader (labels are ignored), a Hugging Face
              ``datasets.Dataset``, or an image set from :func:`fastcascade.load_data`.
        operating_point: see :meth:`Cascade.thresholds`.
        top_k: number of most probable classes to keep per image.
        resize: scale uint8 images of other sizes to the model's (antialiased bilinear; the aspect ratio is
            not kept). If False, they are errors.

    Returns:
        one :class:`fastcascade.prediction.predictions.Prediction` per input, in order. An input that cannot
        be read has a row with an error.

    Raises:
        InvalidArgument: other inputs or an unknown operating point.
        DataError: the inputs are empty, or a path without images.

    Example:
        >>> import fastcascade as fc, numpy as np
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> cascade = fc.Cascade(
        ...     [resnet_cifar(8)], None, 10, (3, 32, 32), preprocess=fc.Normalize((0.5,) * 3, (0.25,) * 3)
        ... )
        >>> found = predict(cascade, np.zeros((2, 32, 32, 3), np.uint8))
        >>> len(found), found[0].exit_stage, len(found[0].top_labels)
        (2, 0, 5)
    """
    compiled = model if isinstance(model, CompiledCascade) else compile(model)
    with contextlib.closing(predict_batches(compiled, inputs, operating_point, top_k, resize)) as parts:
        found = list(parts)
    if not found:
        raise DataError("there are no inputs; expected at least one image")
    return Predictions.join(found)


def predict_batches(
    model: CompiledCascade,
    inputs: Any,
    operating_point: OperatingPointLike = None,
    top_k: int = 5,
    resize: bool = True,
    waits: Waits | None = None,
) -> Generator[Predictions, None, None]:
    """The same, batch by batch as they are ready; a few batches are in memory at a time.

    Args:
        waits: updated with where the time goes.
    """
    model.thresholds(operating_point)  # fails on an unknown name before anything is read
    batches, _ = open_inputs(inputs, model.plan.input, resize)
    yield from classified(model, batches, operating_point, top_k, waits)
