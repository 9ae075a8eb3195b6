"""Accuracy and cost of a cascade on labelled images.

:func:`evaluate` runs the model with its early exit, as a user would. :func:`trace` runs every stage on every
instance once and keeps what each exit would say; from that, any thresholds are evaluated in microseconds, so
calibration and the cost–accuracy curve work on traces. Notation: K exits, N instances, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcascade.data.batches import Data, batches, count_images, image_hashes
from fastcascade.engine import CompiledCascade, compile
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.evaluation.logits import compiling_pays, plan_logits, stage_logits
from fastcascade.evaluation.progress import LateBar
from fastcascade.kernels.reference import exit_step, exit_tables, threshold_score
from fastcascade.lowering.plan import Plan, SelectorPlan
from fastcascade.model.cascade import Cascade
from fastcascade.model.selector import ScoreKind
from fastcascade.types import (
    CascadeOutput,
    Evaluation,
    OperatingPoint,
    OperatingPointLike,
    resolve_thresholds,
)

__all__ = ["Trace", "evaluate", "trace", "traces"]

BATCH_SIZE = 500


def evaluate(
    model: Callable[..., Any],
    data: Data,
    operating_point: OperatingPointLike = None,
    progress: bool = True,
) -> Evaluation:
    """Run a cascade with early exit over labelled data.

    Args:
        model: a :class:`Cascade`, or what :func:`fastcascade.compile` made of one. A cascade on the CPU is
            compiled first where that is faster.
        data: a Dataset, a DataLoader, or (images, labels).
        operating_point: a stored name, an OperatingPoint, or K−1 thresholds; None for the model's default.
        progress: draw a bar on standard error if it takes longer than a second.

    Returns:
        an :class:`Evaluation`; invalid instances (non-finite logits at the last exit) count as wrong.

    Raises:
        DataError: no labels, or no instances.
        InvalidArgument: a model that does not answer with a CascadeOutput; an unknown operating point.

    Example:
        >>> from torch import nn
        >>> cascade = Cascade([nn.Sequential(nn.Flatten(), nn.Linear(4, 2))], None, 2, (1, 2, 2))
        >>> evaluate(cascade, (torch.randn(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64))).exit_shares
        (1.0,)
    """
    described = model if isinstance(model, Cascade) else cast(Any, model).plan
    count = count_images(data)
    if isinstance(model, Cascade) and compiling_pays(model, count):
        model.thresholds(operating_point)  # an unknown one fails before anything is compiled
        model = compile(model)
    labels, correct, exits, costs = [], [], [], []
    with LateBar("running the cascade", count, progress) as bar:
        for images, true_labels in batches(data, BATCH_SIZE, described.num_classes):
            out = model(_on_device(images, model), operating_point=operating_point)
            if not isinstance(out, CascadeOutput):
                raise InvalidArgument(
                    f"the model answered {type(out).__name__}, expected a CascadeOutput; pass a Cascade, or "
                    'compile with output="cascade"'
                )
            label = out.label.cpu().numpy()
            labels.append(label)
            correct.append(label == _require_labels(true_labels).numpy())
            exits.append(out.exit_stage.cpu().numpy())
            costs.append(out.cost_macs.cpu().numpy())
            bar.advance(len(images))
    _require_instances(labels)
    return _summarise(
        np.concatenate(labels),
        np.concatenate(correct),
        np.concatenate(exits),
        np.concatenate(costs),
        num_exits=len(described.stages),
    )


@dataclass(frozen=True, eq=False)
class Trace:
    """What every exit of a cascade says about every instance of a data set.

    Attributes:
        labels: (K, N) int64, the label that stopping at each exit would give; −1 where invalid there.
        own_labels: (K, N) int64, each stage's own label (differs from ``labels`` for combine="mean").
        scores: (K−1, N) float, stop scores; NaN where invalid, and such an instance cannot stop there.
        exit_macs: (K,) int64, accumulated cost of stopping at each exit.
        single_macs: (K,) int64, cost of each stage alone.
        true_labels: (N,) int64, or None.
        hashes: (N,) uint64 of the images, or None; tells which of them the cascade was trained on.

    Example:
        >>> from torch import nn
        >>> logits = torch.tensor([[[2.0, 0.0], [0.1, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])  # (K, N, C)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> from fastcascade.model.selector import ThresholdSelector
        >>> cascade = Cascade([net, net], ThresholdSelector("margin"), 2, (1, 2, 2))
        >>> Trace.from_logits(cascade, logits, torch.tensor([0, 1])).run([1.0]).exit_shares
        (0.5, 0.5)
    """

    labels: NDArray[np.int64]
    own_labels: NDArray[np.int64]
    scores: NDArray[np.floating[Any]]
    exit_macs: NDArray[np.int64]
    single_macs: NDArray[np.int64]
    true_labels: NDArray[np.int64] | None = None
    hashes: NDArray[np.uint64] | None = None

    @classmethod
    @torch.no_grad()
    def from_logits(
        cls,
        cascade: Cascade,
        logits: Tensor,
        true_labels: Tensor | None = None,
        score: ScoreKind | None = None,
        hashes: NDArray[np.uint64] | None = None,
    ) -> Trace:
        """Judge saved logits.

        Args:
            logits: (K, N, C) of every stage.
            true_labels: (N,) integers.
            score: None for the cascade's own selector; otherwise this confidence score in its place, at no
                cost, as the baseline that every selector must beat.
            hashes: (N,) uint64.

        Raises:
            InvalidArgument: shapes that do not fit the cascade, or an unknown score.
        """
        expected = (len(cascade.stages), logits.shape[1] if logits.ndim == 3 else "N", cascade.num_classes)
        if tuple(logits.shape) != expected:
            raise InvalidArgument(
                f"got logits of shape {tuple(logits.shape)}; expected (K, N, C) = {expected}"
            )
        if true_labels is not None and true_labels.shape != logits.shape[1:2]:
            raise InvalidArgument(
                f"got labels of shape {tuple(true_labels.shape)} for {logits.shape[1]} instances"
            )
        judged = cascade.judge(logits)
        scores, selector_macs = judged.scores, cascade.exit_macs - torch.tensor(cascade.stage_macs).cumsum(0)
        if score is not None:
            scores = _confidence(score, judged.log_probs[:-1])
            selector_macs = torch.zeros_like(selector_macs)
        return cls(
            labels=judged.log_probs.argmax(2).masked_fill(~judged.valid, -1).cpu().numpy(),
            own_labels=logits.argmax(2).masked_fill(~judged.valid, -1).cpu().numpy(),
            scores=scores.masked_fill(~judged.valid[:-1], math.nan).cpu().numpy(),
            exit_macs=(torch.tensor(cascade.stage_macs).cumsum(0) + selector_macs).numpy(),
            single_macs=np.array(cascade.single_macs, np.int64),
            true_labels=None if true_labels is None else true_labels.long().cpu().numpy(),
            hashes=hashes,
        )

    @classmethod
    @torch.no_grad()
    def from_plan_logits(
        cls,
        plan: Plan,
        logits: Tensor,
        true_labels: Tensor | None = None,
        hashes: NDArray[np.uint64] | None = None,
    ) -> Trace:
        """Judge the logits (K, N, C) of a plan's stages by the plan's own selectors.

        Args:
            logits: divided by the temperatures, as the plan's stages return them.
            true_labels: (N,) integers. hashes: (N,) uint64.
        """
        everyone = torch.arange(logits.shape[1])
        tables = exit_tables(logits.shape[1], plan.num_classes, logits.device)
        labels, scores = [], []
        for k, stage in enumerate(plan.stages):
            valid = logits[k].isfinite().all(1)
            if stage.selector is None:
                exit_step(tables, logits[k], everyone, k, stage_weight=plan.stage_weights[k], score=None)
                labels.append(tables.label)
                continue
            score = _Recorder(stage.selector, k)
            exit_step(
                tables,
                logits[k],
                everyone,
                k,
                stage_weight=plan.stage_weights[k],
                score=score,
                threshold=math.inf,
            )
            labels.append(score.labels.masked_fill(~valid, -1))
            scores.append(score.scores.masked_fill(~valid, math.nan))
        own = logits.argmax(2).masked_fill(~logits.isfinite().all(2), -1)
        single = [stage.macs for stage in plan.stages]
        for k, stage in enumerate(plan.stages):
            single[k] += single[k - 1] if stage.input == "previous" else 0
        return cls(
            labels=torch.stack(labels).numpy(),
            own_labels=own.numpy(),
            scores=torch.stack(scores).numpy() if scores else np.empty((0, logits.shape[1]), np.float32),
            exit_macs=plan.exit_macs.numpy(),
            single_macs=np.array(single, np.int64),
            true_labels=None if true_labels is None else true_labels.long().numpy(),
            hashes=hashes,
        )

    @property
    def n(self) -> int:
        """Number of instances."""
        return int(self.labels.shape[1])

    @property
    def num_exits(self) -> int:
        """K."""
        return int(self.labels.shape[0])

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(K, N): whether stopping at each exit gives the true label.

        Raises:
            DataError: the trace has no true labels.
        """
        correct: NDArray[np.bool_] = self.labels == self._true_labels()
        return correct

    @property
    def disagrees(self) -> NDArray[np.bool_]:
        """(K, N): whether stopping at each exit gives another label than the last exit; needs no labels."""
        differs: NDArray[np.bool_] = self.labels != self.labels[-1]
        return differs

    def exits(self, thresholds: OperatingPointLike) -> NDArray[np.intp]:
        """(N,) the exit where each instance stops, for K−1 thresholds or an OperatingPoint."""
        numbers = thresholds.thresholds if isinstance(thresholds, OperatingPoint) else thresholds
        t = resolve_thresholds(numbers, {}, None, self.num_exits).numpy()
        stops = np.ones((self.num_exits, self.n), np.bool_)
        np.greater_equal(self.scores, t[:, None], out=stops[:-1])  # NaN compares False: cannot stop
        exits: NDArray[np.intp] = stops.argmax(0)
        return exits

    def run(self, thresholds: OperatingPointLike) -> Evaluation:
        """The Evaluation of K−1 thresholds or of an OperatingPoint, as the cascade would measure it.

        Raises:
            DataError: the trace has no true labels.
            InvalidArgument: not K−1 numbers.
        """
        exits = self.exits(thresholds)
        labels = np.take_along_axis(self.labels, exits[None], 0)[0]
        correct = labels == self._true_labels()
        return _summarise(labels, correct, exits, self.exit_macs[exits], self.num_exits)

    def single_stages(self) -> list[tuple[int, float]]:
        """(MACs, accuracy) of every stage used alone on all instances.

        Raises:
            DataError: the trace has no true labels.
        """
        accuracies = (self.own_labels == self._true_labels()).mean(1)
        return [(int(m), float(a)) for m, a in zip(self.single_macs, accuracies, strict=True)]

    def _true_labels(self) -> NDArray[np.int64]:
        if self.true_labels is None:
            raise DataError("these data have no labels; accuracy needs them")
        return self.true_labels


class _Recorder:
    """A selector of a plan that remembers its scores, and the labels of the exit."""

    def __init__(self, selector: SelectorPlan, k: int) -> None:
        self.selector, self.k = selector, k

    def __call__(self, log_probs: Tensor, previous_label: Tensor, own_label: Tensor) -> Tensor:
        self.labels = log_probs.argmax(1)
        self.scores = self.selector.score(self.k, log_probs, previous_label, own_label)
        return self.scores


def trace(cascade: Cascade | CompiledCascade, data: Data, progress: bool = True) -> Trace:
    """Run every stage on every instance once and keep what each exit would say.

    Args:
        cascade: a cascade, or a compiled one, which runs at its own precision, on the CPU; fp16 there in
            fp32.
        data: a Dataset, a DataLoader, or (images, labels).
        progress: draw a bar on standard error if it takes longer than a second.

    Raises:
        DataError: no instances.
    """
    if isinstance(cascade, Cascade):
        return traces(cascade, data, [None], progress)[0]
    plan = cascade.plan
    run = plan_logits(plan, "bf16" if cascade.precision == "bf16" else None)
    parts: list[Trace] = []
    with LateBar("running the stages", count_images(data), progress) as bar:
        for images, true_labels in batches(data, BATCH_SIZE, plan.num_classes):
            hashes = image_hashes(plan.input.nchw(images))
            parts.append(Trace.from_plan_logits(plan, run(images), true_labels, hashes))
            bar.advance(len(images))
    _require_instances(parts)
    return _concatenate(parts)


def traces(
    cascade: Cascade, data: Data, scores: Sequence[ScoreKind | None], progress: bool = True
) -> list[Trace]:
    """One trace per way of scoring, all from the same single pass over the data.

    The stages of a cascade on the CPU run through the compiled engine where that is faster.

    Args:
        scores: None for the cascade's own selector, or the name of a confidence score.
        progress: draw a bar on standard error if it takes longer than a second.

    Raises:
        DataError: no instances.
    """
    parts: list[list[Trace]] = []
    count = count_images(data)
    run = stage_logits(cascade, compiling_pays(cascade, count))
    with LateBar("running the stages", count, progress) as bar:
        for images, true_labels in batches(data, BATCH_SIZE, cascade.num_classes):
            hashes = image_hashes(cascade.input.nchw(images))
            logits = run(_on_device(images, cascade))
            parts.append([Trace.from_logits(cascade, logits, true_labels, s, hashes) for s in scores])
            bar.advance(len(images))
    _require_instances(parts)
    return [_concatenate(column) for column in zip(*parts, strict=True)]


def _concatenate(parts: Sequence[Trace]) -> Trace:
    first = parts[0]
    return Trace(
        labels=np.concatenate([p.labels for p in parts], 1),
        own_labels=np.concatenate([p.own_labels for p in parts], 1),
        scores=np.concatenate([p.scores for p in parts], 1),
        exit_macs=first.exit_macs,
        single_macs=first.single_macs,
        true_labels=_join([p.true_labels for p in parts]),
        hashes=_join([p.hashes for p in parts]),
    )


def _join(parts: Iterable[NDArray[Any] | None]) -> NDArray[Any] | None:
    present = [p for p in parts if p is not None]
    return np.concatenate(present) if present else None


def _confidence(kind: ScoreKind, log_probs: Tensor) -> Tensor:
    """Confidence scores (K−1, N) from log-probabilities (K−1, N, C), whose invalid rows are NaN."""
    if kind not in get_args(ScoreKind):
        raise InvalidArgument(f"unknown score {kind!r}; expected one of {get_args(ScoreKind)}")
    safe = log_probs.nan_to_num(-math.log(log_probs.shape[2]), neginf=-math.inf)
    return torch.stack([threshold_score(kind, q) for q in safe]) if len(safe) else safe[:, :, 0]


def _summarise(
    labels: NDArray[np.int64],
    correct: NDArray[np.bool_],
    exits: NDArray[np.intp],
    costs: NDArray[np.int64],
    num_exits: int,
) -> Evaluation:
    counts = np.bincount(exits, minlength=num_exits).tolist()
    hits = np.bincount(exits[correct], minlength=num_exits).tolist()
    n = len(labels)
    return Evaluation(
        accuracy=float(correct.mean()),
        mean_macs=int(costs.sum()) / n,
        exit_shares=tuple(c / n for c in counts),
        exit_accuracy=tuple(h / c if c else math.nan for h, c in zip(hits, counts, strict=True)),
        n=n,
        n_invalid=int((labels < 0).sum()),
    )


def _on_device(images: Tensor, model: object) -> Tensor:
    return images.to(getattr(model, "device", images.device))


def _require_labels(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise DataError("these data have no labels; accuracy needs them")
    return labels


def _require_instances(parts: Sequence[object]) -> None:
    if not parts:
        raise DataError("got 0 instances; expected at least one")
