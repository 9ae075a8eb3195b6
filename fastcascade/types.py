"""Value types shared by all modules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcascade.errors import InvalidArgument

__all__ = [
    "CascadeOutput",
    "Combine",
    "Evaluation",
    "InputSpec",
    "Normalize",
    "OperatingPoint",
    "OperatingPointLike",
    "SelectorComparison",
    "checked_combine",
    "forced_exit",
    "resolve_thresholds",
    "stage_weights",
]

Combine: TypeAlias = Literal["last", "mean"] | tuple[float, ...]
"""How the probabilities of the visited stages are combined: the last, the mean, or a weighted mean."""

MAX_PIXEL = 1e20
"""Float pixels beyond this count as NaN: above it, one algorithm overflows where another does not."""

WEIGHT_RANGE = (1e-6, 1e6)
"""Allowed weights of a stage; float32 represents their sums and logarithms accurately."""


class CascadeOutput(NamedTuple):
    """Output of a cascade for N instances, in input order.

    Attributes:
        probs: (N, C) float32, combined probabilities at the exit where each instance stopped; NaN for an
            instance that is invalid at the last exit.
        label: (N,) int64, the most probable class (lowest index on ties); −1 if invalid.
        exit_stage: (N,) int64, the stage after which each instance stopped.
        cost_macs: (N,) int64, multiplies spent: stages and selectors up to the exit.
    """

    probs: Tensor
    label: Tensor
    exit_stage: Tensor
    cost_macs: Tensor


@dataclass(frozen=True)
class Normalize:
    """Per-channel normalisation of uint8 images, x → (x/255 − mean)/std. Float images pass unchanged.

    Example:
        >>> Normalize((0.5,), (0.25,)).table()[0, [0, 255]]
        tensor([-2.,  2.])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
        object.__setattr__(self, "std", tuple(float(s) for s in self.std))
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise InvalidArgument(
                f"Normalize got mean {self.mean} and std {self.std}; "
                "expected one mean and one positive std per channel"
            )

    def table(self) -> Tensor:
        """(channels, 256) float32: the normalised value of each pixel byte, used by every backend."""
        mean, std = (torch.tensor(v, dtype=torch.float32)[:, None] for v in (self.mean, self.std))
        return (torch.arange(256, dtype=torch.float32) / 255 - mean) / std


@dataclass(frozen=True)
class InputSpec:
    """Input of the first stage: images of ``shape`` (C, H, W), float, or uint8 normalised by ``preprocess``.

    Example:
        >>> spec = InputSpec((1, 2, 2), Normalize((0.5,), (0.5,)))
        >>> spec.to_float(spec.nchw(np.full((3, 2, 2, 1), 255, np.uint8))).shape
        torch.Size([3, 1, 2, 2])
    """

    shape: tuple[int, int, int]
    preprocess: Normalize | None = None

    def __post_init__(self) -> None:
        shape, preprocess = self.shape, self.preprocess
        if (
            not isinstance(shape, tuple)
            or len(shape) != 3
            or not all(isinstance(s, int) and s > 0 for s in shape)
        ):
            raise InvalidArgument(f"input_shape is {shape!r}; expected three positive integers (C, H, W)")
        if preprocess is None:
            return
        if not isinstance(preprocess, Normalize):
            raise InvalidArgument(
                f"preprocess is {preprocess!r}; expected None or fc.Normalize(mean, std). Apply other "
                "transforms before the cascade"
            )
        if len(preprocess.mean) != shape[0]:
            raise InvalidArgument(
                f"preprocess has {len(preprocess.mean)} channels, input_shape {shape} has {shape[0]}"
                f"{self.channels_first_hint()}"
            )

    def channels_first_hint(self) -> str:
        """Ends an error message: the shape that was probably meant, if this one looks like (H, W, C)."""
        height, width, channels = self.shape
        if not (channels in (1, 3, 4) and channels < min(height, width)):
            return ""
        meant = (channels, height, width)
        return f". input_shape is {self.shape}; expected (C, H, W); did you mean {meant}?"

    def nchw(self, x: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Check a batch and return a view of it as (N, C, H, W).

        Args:
            x: floating (N, C, H, W) or (N, H, W, C), or uint8 images in either layout; NCHW if both fit.

        Raises:
            InvalidArgument: another dtype or shape, or uint8 images without ``preprocess``.
        """
        x = _tensor(x) if isinstance(x, np.ndarray) else x
        if not isinstance(x, Tensor):
            raise InvalidArgument(f"got {type(x).__name__}; expected a tensor or array of images")
        channels, height, width = self.shape
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise InvalidArgument(f"images have dtype {x.dtype}; expected uint8 or a floating dtype")
        if x.dtype == torch.uint8 and self.preprocess is None:
            raise InvalidArgument(
                "got uint8 images, but the cascade has no preprocess; build it with "
                "preprocess=fc.Normalize(mean, std) or pass normalised float images"
            )
        if x.ndim == 4 and tuple(x.shape[1:]) == self.shape:
            return x
        if x.ndim == 4 and tuple(x.shape[1:]) == (height, width, channels):
            return x.permute(0, 3, 1, 2)
        raise InvalidArgument(
            f"got images of shape {tuple(x.shape)}; expected (N, {channels}, {height}, {width}) "
            f"or (N, {height}, {width}, {channels})"
        )

    def to_float(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """Normalise uint8 images (N, C, H, W) to float32; leave float images as they are.

        Float values beyond ±:data:`MAX_PIXEL` become NaN.

        Args:
            table: the preprocessing table on x's device; made if None.
        """
        if x.is_floating_point():
            return torch.where(x.abs() <= MAX_PIXEL, x, math.nan)
        if self.preprocess is None:
            return x
        if table is None:
            table = self.preprocess.table().to(x.device)
        return torch.stack([row[plane.long()] for row, plane in zip(table, x.unbind(1), strict=True)], 1)


def _tensor(x: np.ndarray[Any, Any]) -> Tensor:
    """The array as a tensor, sharing its memory where torch can.

    Torch has no read-only tensors, and a module may write to its input; nor has it negative strides.
    """
    copied = not x.flags.writeable or any(stride < 0 for stride in x.strides)
    return torch.from_numpy(x.copy() if copied else x)


@dataclass(frozen=True)
class OperatingPoint:
    """Stop thresholds chosen on held-out data, with the figures measured there.

    Attributes:
        thresholds: K−1 numbers; stop at k where the stop score is ≥ thresholds[k] (±inf allowed).
        target: the calibration target, for example {"budget_macs": 5e6}.
        accuracy: share of correct labels on the calibration data; None without labels.
        mean_macs: mean accumulated cost there, in MACs per instance.
        exit_shares: share of instances stopping at each of the K exits there.
        n: number of calibration instances.
        risk: for max_risk targets, the share of labels there that differ from the last exit's.
        precision: (K,) of the stages that were measured; () where all were in fp32.
    """

    name: str
    thresholds: tuple[float, ...]
    target: Mapping[str, Any]
    accuracy: float | None
    mean_macs: float
    exit_shares: tuple[float, ...]
    n: int
    risk: float | None = None
    precision: tuple[str, ...] = field(default=(), metadata={"added": True})  # as storage.codec.ADDED


@dataclass(frozen=True)
class SelectorComparison:
    """The learned selector against threshold rules at matched cost, on folds that fitted neither.

    Attributes:
        budgets: (B,) mean costs, as shares of the dense cost.
        accuracy: name → (B,) held-out accuracy: "learned", "max_prob", "margin", "entropy".
        best_rule: the rule with the highest mean accuracy over the budgets.
        gain: mean accuracy over the budgets of the learned selector minus that of the best rule, with
        standard_error: of that difference, paired over the images.
        steps: training steps that the held-out folds preferred; 0 leaves the selector at its first rule.
        n: number of images.
    """

    budgets: tuple[float, ...]
    accuracy: Mapping[str, tuple[float, ...]]
    best_rule: str
    gain: float
    standard_error: float
    steps: int
    n: int


@dataclass(frozen=True, eq=False)
class OutOfFoldScores:
    """Stop scores of the images that fitted a selector, each from a selector fitted without that image.

    Attributes:
        images: (n,) uint64 hashes, increasing.
        scores: (K−1, n) float32, on the scale of the selector that was fitted on all images.
    """

    images: NDArray[np.uint64]
    scores: NDArray[np.float32]

    def __post_init__(self) -> None:
        images, scores = self.images, self.scores
        fits = images.ndim == 1 and images.dtype == np.uint64 and bool((images[1:] > images[:-1]).all())
        if not fits or scores.ndim != 2 or scores.shape[1] != len(images) or scores.dtype != np.float32:
            raise InvalidArgument(
                f"got hashes of shape {images.shape} {images.dtype} and scores of shape {scores.shape} "
                f"{scores.dtype}; expected (n,) increasing uint64 and (K−1, n) float32"
            )

    def without(self, images: NDArray[np.uint64]) -> OutOfFoldScores:
        """The same without these images."""
        kept = ~np.isin(self.images, images)
        return OutOfFoldScores(self.images[kept], self.scores[:, kept])

    def replace(self, scores: NDArray[Any], hashes: NDArray[np.uint64]) -> NDArray[Any]:
        """Scores (K−1, N) of images, with those of the images that fitted the selector replaced."""
        if not len(self.images):
            return scores
        at = np.searchsorted(self.images, hashes).clip(max=len(self.images) - 1)
        known = self.images[at] == hashes
        return np.where(known & ~np.isnan(scores), self.scores[:, at], scores)


OperatingPointLike = str | OperatingPoint | Tensor | Sequence[float] | None
"""Stop thresholds: a stored name, a point, K−1 numbers, or None for the default."""


def resolve_thresholds(
    wanted: OperatingPointLike,
    stored: Mapping[str, OperatingPoint],
    default: Tensor | None,
    num_stages: int,
    precision: tuple[str, ...] = (),
) -> Tensor:
    """Turn an operating point into K−1 thresholds.

    Args:
        wanted: None means the stored point "default" if there is one, else ``default``.
        default: (K−1,) the selector's own thresholds, None if it has none.
        precision: (K,) of the stages that run; () for fp32.

    Returns:
        (K−1,) float32 on the CPU.

    Raises:
        InvalidArgument: an unknown name, the wrong count, NaN, or no default; a point that was measured at
            another precision.
    """
    if wanted is None:
        wanted = "default" if "default" in stored else default
        if wanted is None:
            raise InvalidArgument(
                "this selector has no default thresholds; run fc.calibrate, or pass operating_point=…"
            )
    if isinstance(wanted, str):
        if wanted not in stored:
            known = ", ".join(sorted(stored)) or "none stored"
            raise InvalidArgument(f"unknown operating point {wanted!r}; known: {known}")
        wanted = stored[wanted]
    if isinstance(wanted, OperatingPoint) and wanted.precision != precision:
        measured, runs = (" ".join(p) or "fp32" for p in (wanted.precision, precision))
        raise InvalidArgument(
            f"operating point {wanted.name!r} was measured with stages in {measured}, but they run in "
            f"{runs}, which shifts the stop scores; measure it anew on what runs, with "
            "fc.calibrate or `fastcascade calibrate`"
        )
    numbers = wanted.thresholds if isinstance(wanted, OperatingPoint) else wanted
    thresholds = torch.as_tensor(numbers, dtype=torch.float32).detach().cpu()
    if thresholds.shape != (num_stages - 1,) or bool(thresholds.isnan().any()):
        raise InvalidArgument(
            f"got thresholds {thresholds.tolist()}; expected {num_stages - 1} numbers "
            f"(one per exit but the last; ±inf allowed, NaN not)"
        )
    return thresholds


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and cost of a cascade on labelled data.

    Attributes:
        accuracy: share of correct labels; invalid instances count as wrong.
        mean_macs: mean accumulated cost, in MACs per instance.
        exit_shares: share of instances stopping at each exit, (K,).
        exit_accuracy: accuracy among the instances stopping at each exit, (K,); NaN where none did.
        n: number of instances.
        n_invalid: number of instances that are invalid at the last exit.
    """

    accuracy: float
    mean_macs: float
    exit_shares: tuple[float, ...]
    exit_accuracy: tuple[float, ...]
    n: int
    n_invalid: int


def checked_combine(combine: Combine | Sequence[float], stages: int) -> Combine:
    """ "last", "mean", or one weight per stage as a tuple.

    Raises:
        InvalidArgument: anything else.
    """
    if isinstance(combine, str):
        if combine in ("last", "mean"):
            return combine
    elif isinstance(combine, Sequence) and len(combine) == stages:
        lowest, highest = WEIGHT_RANGE
        if all(isinstance(w, (int, float)) and lowest <= w <= highest for w in combine):
            return tuple(map(float, combine))
    raise InvalidArgument(
        f"combine is {combine!r}; expected 'last', 'mean' or {stages} weights, one per stage, from "
        f"{WEIGHT_RANGE[0]} to {WEIGHT_RANGE[1]:g}"
    )


def stage_weights(combine: Combine, stages: int) -> tuple[float | None, ...]:
    """(K,) weights in the mean of the stages; None for "last".

    Example:
        >>> stage_weights("mean", 2), stage_weights("last", 2), stage_weights((0.5, 2.0), 2)
        ((1.0, 1.0), (None, None), (0.5, 2.0))
    """
    if isinstance(combine, str):
        return (1.0 if combine == "mean" else None,) * stages
    return combine


def forced_exit(j: int, num_stages: int) -> Tensor:
    """(K−1,) thresholds that stop every instance at exit j, or at the next exit where it is valid."""
    thresholds = torch.full((num_stages - 1,), -math.inf)
    thresholds[:j] = math.inf
    return thresholds
