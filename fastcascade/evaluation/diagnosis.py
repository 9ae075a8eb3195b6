"""Where a cascade is wrong: confused classes, confidence beside accuracy, images on which exits disagree."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcascade.data.image_data import ImageData
from fastcascade.engine import CompiledCascade, compile
from fastcascade.errors import DataError
from fastcascade.evaluation.progress import LateBar
from fastcascade.model.cascade import Cascade
from fastcascade.types import CascadeOutput, InputSpec, OperatingPointLike, forced_exit

__all__ = ["Diagnosis", "Disagreement", "Reliability", "diagnose"]

BATCH_SIZE = 500
BINS = 15

Floats: TypeAlias = "NDArray[np.float64]"


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence beside accuracy, in bins of equal width over the confidence.

    Attributes:
        confidence, accuracy: (B,) means of the images in each bin; NaN in an empty one.
        share: (B,) of all images.
        error: expected calibration error: mean distance of accuracy and confidence over the images (Guo,
            Pleiss, Sun, Weinberger, *On Calibration of Modern Neural Networks*, ICML 2017, equation 3).
    """

    confidence: Floats
    accuracy: Floats
    share: Floats
    error: float

    @classmethod
    def of(cls, confidence: NDArray[Any], correct: NDArray[np.bool_], bins: int = BINS) -> Reliability:
        """Sort answers into bins.

        Args:
            confidence: (N,) probability of the label, 0 to 1; NaN for an invalid image, which is left out.
            correct: (N,) whether the label is right.

        Example:
            >>> found = Reliability.of(np.array([0.9, 0.9, 0.9, 0.9]), np.array([True, True, True, False]), 2)
            >>> found.accuracy[1], round(found.error, 2)
            (0.75, 0.15)
        """
        valid = ~np.isnan(confidence)
        sure, right = confidence[valid].astype(np.float64), correct[valid]
        at = np.minimum((sure * bins).astype(np.intp), bins - 1)
        count = np.bincount(at, minlength=bins)
        filled = np.where(count, count, np.nan)
        mean = np.bincount(at, sure, bins) / filled
        accuracy = np.bincount(at, right, bins) / filled
        share = count / max(1, len(sure))
        return cls(mean, accuracy, share, float(np.nansum(share * np.abs(accuracy - mean))))


@dataclass(frozen=True, eq=False)
class Disagreement:
    """An image whose label at the exit where it stops differs from the last exit's.

    Attributes:
        image: (H, W, 3) uint8, for the eye; floating images are stretched to 0 … 255.
        truth: its label.
        labels: (K,) what each exit says; −1 where the image is invalid.
        exit_stage: where it stops.
    """

    id: str
    image: NDArray[np.uint8]
    truth: int
    labels: tuple[int, ...]
    exit_stage: int

    @property
    def helped(self) -> bool:
        """Whether stopping early gives the right label."""
        return self.labels[self.exit_stage] == self.truth


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What :func:`diagnose` found at one operating point.

    Attributes:
        confusion: (C, C) number of images by true label (row) and answer (column); invalid images are left
            out.
        after: (K,) reliability of every exit, on all images.
        before: the same with every temperature at 1; empty if that is unknown, as for a plan.
        helped: number of images that stop early with the right label, where the last exit is wrong.
        hurt: number that stop early with a wrong label, where the last exit is right.
        examples: some images of both kinds.
        classes: names in label order, or None.
    """

    confusion: NDArray[np.int64]
    after: tuple[Reliability, ...]
    before: tuple[Reliability, ...]
    helped: int
    hurt: int
    examples: tuple[Disagreement, ...]
    classes: tuple[str, ...] | None


def diagnose(
    model: CompiledCascade,
    data: ImageData,
    operating_point: OperatingPointLike = None,
    cascade: Cascade | None = None,
    examples: int = 12,
    progress: bool = True,
) -> Diagnosis:
    """Run every exit on every labelled image, and compare.

    Args:
        cascade: what the model was compiled from; without it, nothing is known of other temperatures.
        examples: images to keep of each kind: those that stopping early helped, and those that it hurt.
        progress: draw a bar on standard error if it takes longer than a second.

    Raises:
        DataError: no labels, or no readable image.

    Example:
        >>> from torch import nn
        >>> cascade = Cascade([nn.Sequential(nn.Flatten(), nn.Linear(3, 2))], None, 2, (3, 1, 1))
        >>> data = ImageData(["a", "b"], np.zeros((2, 3, 1, 1), np.float32), np.array([0, 1]))
        >>> diagnose(compile(cascade, backend="reference"), data).confusion.sum()
        2
    """
    exits = _Exits(model)
    raw = None if cascade is None else _Exits(_at_temperature_one(model, cascade))
    truths, answers, found, raw_found = [], [], [], []
    pictures: dict[bool, list[Disagreement]] = {True: [], False: []}
    counts = {True: 0, False: 0}
    with LateBar("comparing the exits", len(data), progress) as bar:
        for rows in data.rows(BATCH_SIZE):
            bar.advance(len(rows.ids))
            if rows.labels is None:
                raise DataError("these data have no labels; a diagnosis needs them")
            if not len(rows.images):
                continue
            truth = rows.labels.numpy()
            out = cast(CascadeOutput, model(rows.images.to(model.device), operating_point))
            labels, sure = exits.run(rows.images)
            stops, answer = out.exit_stage.cpu().numpy(), out.label.cpu().numpy()
            truths.append(truth)
            answers.append(answer)
            found.append((sure, labels == truth))
            if raw is not None:
                raw_labels, raw_sure = raw.run(rows.images)
                raw_found.append((raw_sure, raw_labels == truth))
            ids = [i for i, error in zip(rows.ids, rows.errors, strict=True) if error is None]
            differs = (answer == truth) != (labels[-1] == truth)
            for i in np.flatnonzero(differs):
                helped = bool(answer[i] == truth[i])
                counts[helped] += 1
                if len(pictures[helped]) < examples:
                    picture = _for_the_eye(rows.images[i], model.plan.input)
                    seen = tuple(labels[:, i].tolist())
                    pictures[helped].append(Disagreement(ids[i], picture, int(truth[i]), seen, int(stops[i])))
    if not truths:
        raise DataError("got 0 readable images; expected at least one")
    return Diagnosis(
        confusion=_confusion(np.concatenate(truths), np.concatenate(answers), model.plan.num_classes),
        after=_reliabilities(found),
        before=_reliabilities(raw_found),
        helped=counts[True],
        hurt=counts[False],
        examples=(*pictures[True], *pictures[False]),
        classes=model.plan.classes,
    )


class _Exits:
    """Every exit of a compiled cascade, forced on all images."""

    def __init__(self, model: CompiledCascade) -> None:
        self.model = model
        self.count = len(model.plan.stages)

    def run(self, images: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Labels and their probabilities, (K, N) each."""
        x = images.to(self.model.device)
        outs = [cast(CascadeOutput, self.model(x, forced_exit(k, self.count))) for k in range(self.count)]
        labels = torch.stack([out.label for out in outs]).cpu().numpy()
        sure = torch.stack([out.probs.amax(1) for out in outs]).cpu().numpy()
        return labels, sure


def _at_temperature_one(model: CompiledCascade, cascade: Cascade) -> CompiledCascade:
    untempered = copy.deepcopy(cascade)
    untempered.temperatures.fill_(1.0)
    return compile(untempered, backend=model.backend, precision=model.precision, device=model.device)


def _confusion(truth: NDArray[Any], answer: NDArray[Any], classes: int) -> NDArray[np.int64]:
    valid = answer >= 0
    cells = truth[valid] * classes + answer[valid]
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes).astype(np.int64)


def _reliabilities(parts: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[Reliability, ...]:
    """One per exit, from (K, n) confidences and correctness of consecutive batches."""
    if not parts:
        return ()
    sure, correct = (np.concatenate(columns, 1) for columns in zip(*parts, strict=True))
    return tuple(Reliability.of(s, c) for s, c in zip(sure, correct, strict=True))


def _for_the_eye(image: Tensor, spec: InputSpec) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of an image in a layout that the model reads; of one or two channels, the first."""
    planes = spec.nchw(image[None])[0].cpu()
    if planes.is_floating_point():
        finite = planes.float().nan_to_num(0.0, 0.0, 0.0)
        low, high = float(finite.min()), float(finite.max())
        planes = (
            (finite - low) * (255 / (high - low) if math.isfinite(high - low) and high > low else 0)
        ).byte()
    pixels = planes.numpy().transpose(1, 2, 0)[:, :, :3]
    return np.repeat(pixels[:, :, :1], 3, 2) if pixels.shape[2] < 3 else pixels.copy()
