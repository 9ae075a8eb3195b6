"""A cascade as a classifier of scikit-learn: ``fc.CascadeClassifier``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcascade.engine import CompiledCascade, compile
from fastcascade.errors import CostWarning, InvalidArgument
from fastcascade.evaluation.calibration import calibrate
from fastcascade.model.cascade import Cascade, Stage
from fastcascade.model.selector import MLPSelector, ThresholdSelector
from fastcascade.training.trainer import fit
from fastcascade.types import CascadeOutput, Normalize

try:
    from sklearn.base import ClassifierMixin, clone
    from sklearn.utils import check_random_state
    from sklearn.utils.metaestimators import _BaseComposition
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"fc.CascadeClassifier needs scikit-learn ({error}): pip install 'fastcascade[sklearn]'"
    ) from error

__all__ = ["CascadeClassifier"]

Array: TypeAlias = NDArray[Any]

_COST_OF_DEAREST = 10**9
"""Costs become whole numbers in proportion to this."""

_SMALLEST_PROBABILITY = 1e-12
"""Estimators may return 0, whose logarithm is no logit."""


class CascadeClassifier(ClassifierMixin, _BaseComposition):  # type: ignore[misc]
    """Classifiers of growing cost, of which each sample is given to as few as it needs.

    ``fit`` trains the estimators on a part of the samples, and chooses on the others when to stop.
    ``predict`` gives a sample to the next estimator only if the previous ones are not sure enough.

    Args:
        estimators: (name, classifier) pairs from cheap to dear. A classifier has ``predict_proba``, or is a
            torch module or :class:`fastcascade.Stage` that is trained already, for images (N, C, H, W).
        costs: of one sample, per estimator, in any unit; by default the multiplies of modules, and 1 for each
            of several estimators of scikit-learn.
        selector: "max_prob", "margin" or "entropy" of the probabilities, or "learned" from them by a small
            network.
        budget: highest mean cost of a sample; its unit is that of ``costs``.
        min_accuracy: lowest accuracy on the held-out samples, at the least cost. Without it and ``budget``,
            the accuracy of the last estimator.
        held_out: share of the samples that choose when to stop; estimators are not trained on them. All of
            them if no estimator is to be trained.
        prefit: take the estimators as they are, trained.
        preprocess: of uint8 images, for modules; see :class:`fastcascade.Cascade`.
        random_state: of the split.

    Attributes:
        classes_: labels in the order of the probabilities.
        estimators_: the trained estimators.
        cascade_: the :class:`fastcascade.Cascade` of them.
        mean_cost_: per held-out sample, in the unit of ``costs``.
        accuracy_: on the held-out samples, slightly optimistic: the thresholds were chosen there.

    Raises:
        InvalidArgument: in ``fit``, an argument that is out of range, or no held-out samples.

    Example:
        >>> from sklearn.datasets import make_blobs
        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.ensemble import RandomForestClassifier
        >>> X, y = make_blobs(300, centers=3, random_state=0)
        >>> two = [("line", LogisticRegression()), ("forest", RandomForestClassifier(50, random_state=0))]
        >>> classifier = CascadeClassifier(two, costs=[1, 40], random_state=0).fit(X, y)
        >>> classifier.predict_proba(X).shape, classifier.mean_cost_ < 41
        ((300, 3), True)
    """

    def __init__(
        self,
        estimators: Sequence[tuple[str, Any]],
        *,
        costs: Sequence[float] | None = None,
        selector: Literal["max_prob", "margin", "entropy", "learned"] = "max_prob",
        budget: float | None = None,
        min_accuracy: float | None = None,
        held_out: float = 0.2,
        prefit: bool = False,
        preprocess: Normalize | None = None,
        random_state: Any = None,
    ) -> None:
        self.estimators = estimators
        self.costs = costs
        self.selector = selector
        self.budget = budget
        self.min_accuracy = min_accuracy
        self.held_out = held_out
        self.prefit = prefit
        self.preprocess = preprocess
        self.random_state = random_state

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name, with those of the estimators as ``<name>__<parameter>``."""
        return cast(dict[str, Any], self._get_params("estimators", deep=deep))

    def set_params(self, **params: Any) -> CascadeClassifier:
        """Change parameters, whole estimators or their parameters by name; takes effect in ``fit``."""
        self._set_params("estimators", **params)
        return self

    def fit(self, X: Any, y: Any) -> CascadeClassifier:
        """Train the estimators that are not trained yet, and choose when to stop.

        Args:
            X: (n, features), or images (n, C, H, W) for modules.
            y: (n,) labels, numbers or text.
        """
        self._check_arguments()
        X, y = validate_data(self, X, y, allow_nd=True, dtype=self._dtype(X))
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InvalidArgument(f"y has one class, {self.classes_.tolist()}; expected at least 2 classes")
        untrained = not self.prefit and any(not _is_module(one) for _, one in self.estimators)
        kept = self._held_out(labels) if untrained else np.ones(len(labels), bool)
        self.estimators_ = [self._trained(one, X[~kept], y[~kept]) for _, one in self.estimators]
        self.cascade_ = self._cascade(X)
        self._choose_thresholds(torch.from_numpy(_images(X[kept])), torch.from_numpy(labels[kept]))
        return self

    def predict(self, X: Any) -> Array:
        """(n,) the most probable class of each sample."""
        labels = self._run(X).label.numpy()
        return cast(Array, self.classes_[labels])

    def predict_proba(self, X: Any) -> Array:
        """(n, classes) probabilities, of the estimator at which each sample stopped."""
        return self._run(X).probs.numpy().astype(np.float64)

    def exit_stage(self, X: Any) -> Array:
        """(n,) number of the estimator at which each sample stops."""
        return self._run(X).exit_stage.numpy()

    def _run(self, X: Any) -> CascadeOutput:
        check_is_fitted(self, "cascade_")
        X = validate_data(self, X, allow_nd=True, dtype=self._dtype(X), reset=False)
        run = self._compiled() if all(map(_is_module, self.estimators_)) else self.cascade_
        return cast(CascadeOutput, run(torch.from_numpy(_images(X))))

    def _compiled(self) -> CompiledCascade:
        if getattr(self, "_fast", None) is None:
            self._fast = compile(self.cascade_)
        return self._fast

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled cascade, which cannot be pickled."""
        return {name: value for name, value in super().__getstate__().items() if name != "_fast"}

    # ---- fitting ----

    def _check_arguments(self) -> None:
        names = [name for name, _ in self.estimators] if self.estimators else []
        if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
            raise InvalidArgument(
                f"estimators have the names {names}; expected (name, classifier) pairs of different names"
            )
        if self.costs is not None and (len(self.costs) != len(names) or not all(c > 0 for c in self.costs)):
            raise InvalidArgument(f"costs are {self.costs}; expected {len(names)} positive numbers")
        modules = [_is_module(one) for _, one in self.estimators]
        if self.costs is None and any(modules) and not all(modules):
            raise InvalidArgument("modules beside estimators of scikit-learn need costs=[…] in one unit")
        if self.budget is not None and self.min_accuracy is not None:
            raise InvalidArgument("got budget and min_accuracy; expected at most one target")
        if self.selector not in ("max_prob", "margin", "entropy", "learned"):
            raise InvalidArgument(
                f"selector is {self.selector!r}; expected 'max_prob', 'margin', 'entropy' or 'learned'"
            )
        if not 0 < self.held_out < 1:
            raise InvalidArgument(f"held_out is {self.held_out!r}; expected a share between 0 and 1")

    def _dtype(self, X: Any) -> Any:
        """Bytes stay bytes where the cascade normalises them; everything else becomes float64 or float32."""
        if not any(_is_module(one) for _, one in self.estimators):
            return np.float64
        return None if getattr(X, "dtype", None) == np.uint8 else np.float32

    def _held_out(self, labels: Array) -> NDArray[np.bool_]:
        """(n,) whether a sample is held out: a share of each class, but never all of it."""
        random = check_random_state(self.random_state)
        kept = np.zeros(len(labels), bool)
        for label in np.unique(labels):
            members = random.permutation(np.flatnonzero(labels == label))
            count = min(max(1, round(self.held_out * len(members))), len(members) - 1)
            kept[members[:count]] = True
        if not kept.any():
            raise InvalidArgument(
                f"y has one sample of each class ({len(labels)} in all); expected a class with 2 samples, "
                "one of them to hold out"
            )
        return kept

    def _trained(self, estimator: Any, X: Array, y: Array) -> Any:
        if _is_module(estimator):
            return estimator
        if not hasattr(estimator, "predict_proba"):
            raise InvalidArgument(
                f"{estimator!r} has no predict_proba; expected a classifier with probabilities"
            )
        if not self.prefit:
            return clone(estimator).fit(X.reshape(len(X), -1), y)
        check_is_fitted(estimator)
        if not np.array_equal(estimator.classes_, self.classes_):
            raise InvalidArgument(
                f"{estimator!r} was trained on classes {estimator.classes_.tolist()}, y has "
                f"{self.classes_.tolist()}; expected the same"
            )
        return estimator

    def _cascade(self, X: Array) -> Cascade:
        named = list(zip((name for name, _ in self.estimators), self.estimators_, strict=True))
        costs = self.costs
        if costs is None and not all(map(_is_module, self.estimators_)):
            costs = [1.0] * len(named)
        self._unit = 1.0 if costs is None else max(costs) / _COST_OF_DEAREST
        macs = [None] * len(named) if costs is None else [round(cost / self._unit) for cost in costs]
        stages = [_stage(name, one, count) for (name, one), count in zip(named, macs, strict=True)]
        selector = None
        if len(stages) > 1:
            selector = MLPSelector() if self.selector == "learned" else ThresholdSelector(self.selector)
        shape = _images(X).shape[1:]
        return Cascade(stages, selector, len(self.classes_), shape, preprocess=self.preprocess)

    def _choose_thresholds(self, images: Tensor, labels: Tensor) -> None:
        cascade = self.cascade_
        if self.selector == "learned" and len(cascade.stages) > 1:
            fit(cascade, None, (images, labels), freeze_stages=True, progress=False)
        budget, accuracy = self.budget, self.min_accuracy
        least = float(cascade.exit_macs[0]) * self._unit
        if budget is not None and budget < least:
            raise InvalidArgument(
                f"budget is {budget}; expected at least {least:g}, the cost of the first exit"
            )
        if budget is None and accuracy is None:
            never = torch.full((len(cascade.stages) - 1,), torch.inf)
            accuracy = float((cascade(images, never).label == labels).double().mean())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CostWarning)  # it speaks of MACs, these costs have another unit
            point = calibrate(
                cascade,
                (images, labels),
                budget_macs=None if budget is None else budget / self._unit,
                min_accuracy=accuracy,
                progress=False,
            )
        self.mean_cost_ = point.mean_macs * self._unit
        self.accuracy_ = point.accuracy


def _is_module(estimator: Any) -> bool:
    return isinstance(estimator, nn.Module)


def _images(X: Array) -> Array:
    """Samples as a cascade reads them: (n, C, H, W), where a feature is a channel of one pixel."""
    return X if X.ndim == 4 else X.reshape(*X.shape, *(1,) * (4 - X.ndim))


def _stage(name: str, estimator: Any, macs: int | None) -> Stage:
    if not _is_module(estimator):
        return Stage(_Probabilities(estimator), name=name, macs=macs)
    stage = copy.copy(estimator) if isinstance(estimator, Stage) else Stage(estimator, name=name)
    stage.macs = stage.macs if macs is None else macs
    return stage


class _Probabilities(nn.Module):
    """An estimator of scikit-learn as a stage: the logarithms of its probabilities are logits."""

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self.estimator = estimator
        # Cascades run in the dtype of their first parameter.
        self.wide = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.estimator.predict_proba(x.detach().flatten(1).numpy())
        return torch.from_numpy(np.log(np.maximum(probabilities, _SMALLEST_PROBABILITY))).to(x)
