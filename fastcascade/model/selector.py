"""Selectors: modules that score, per instance, whether the answer after a stage is good enough to stop."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastcascade.errors import InvalidArgument
from fastcascade.kernels.reference import MLPWeights, features, mlp_score, threshold_score

__all__ = ["FeatureKind", "MLPSelector", "ScoreKind", "Selector", "ThresholdSelector"]

FeatureKind = Literal["stats", "topk", "probs"]
ScoreKind = Literal["max_prob", "margin", "entropy"]


class Selector(nn.Module):
    """Base of the built-in selectors.

    Any module with ``forward(k, log_probs, previous_label) -> (n,)`` and ``macs(k, num_classes) -> int`` may
    serve instead; its default threshold is 0.
    """

    default_threshold: float | None = 0.0

    def build(self, num_stages: int, num_classes: int) -> None:
        """Create the per-stage weights. Called once by the cascade that owns the selector."""

    @abstractmethod
    def forward(
        self, k: int, log_probs: Tensor, previous_label: Tensor, label: Tensor | None = None
    ) -> Tensor:
        """Stop scores after stage k.

        Args:
            log_probs: (n, C) combined log-probabilities log q_k.
            previous_label: (n,) argmax of p_{k−1}; −1 at k = 0 and where stage k−1 was invalid.
            label: (n,) argmax of p_k; argmax of ``log_probs`` if not given (the same for combine="last").

        Returns:
            (n,) scores; the cascade stops where they reach the threshold.
        """

    @abstractmethod
    def macs(self, k: int, num_classes: int) -> int:
        """Multiplies per instance after stage k."""


class MLPSelector(Selector):
    """A small network per stage: standardised features → ``hidden`` ReLU units → stop score (default t = 0).

    Args:
        features: "stats", "topk" or "probs"; see DESIGN's table. "probs" is the paper's input.
        hidden: width of the hidden layer.

    Attributes:
        mean, std: (K−1, F) buffers set by training; 0 and 1 before.
        w1 (K−1, hidden, F), b1 and w2 (K−1, hidden), b2 (K−1,): parameters.

    Example:
        >>> selector = MLPSelector(features="stats")
        >>> selector.build(num_stages=3, num_classes=10)
        >>> selector(0, torch.randn(5, 10).log_softmax(1), torch.full((5,), -1)).shape
        torch.Size([5])
    """

    mean: Tensor
    std: Tensor
    w1: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter

    def __init__(self, features: FeatureKind = "stats", hidden: int = 16) -> None:
        super().__init__()
        if features not in get_args(FeatureKind):
            raise InvalidArgument(f"unknown features {features!r}; expected one of {get_args(FeatureKind)}")
        if hidden < 1:
            raise InvalidArgument(f"hidden is {hidden}; expected at least 1 unit")
        self.features: FeatureKind = features
        self.hidden = hidden

    def num_features(self, num_classes: int) -> int:
        """F, the number of features for a class count."""
        return num_classes if self.features == "probs" else 4

    def build(self, num_stages: int, num_classes: int) -> None:
        if self.features == "topk" and num_classes < 3:
            raise InvalidArgument(f"features='topk' needs at least 3 classes, not {num_classes}; use 'stats'")
        exits, inputs = num_stages - 1, self.num_features(num_classes)
        if hasattr(self, "w1"):
            if self.w1.shape != (exits, self.hidden, inputs):
                raise InvalidArgument(
                    f"this selector was built for {self.w1.shape[0] + 1} stages and {self.w1.shape[2]} "
                    f"features; the cascade has {num_stages} stages and {inputs} features. "
                    "Give each cascade a selector of its own."
                )
            return
        self.register_buffer("mean", torch.zeros(exits, inputs))
        self.register_buffer("std", torch.ones(exits, inputs))
        self.w1 = nn.Parameter(torch.empty(exits, self.hidden, inputs))
        self.b1 = nn.Parameter(torch.empty(exits, self.hidden))
        self.w2 = nn.Parameter(torch.empty(exits, self.hidden))
        self.b2 = nn.Parameter(torch.empty(exits))
        self.reset()

    @torch.no_grad()
    def reset(self, seed: int | None = None) -> None:
        """Draw fresh weights; from torch's global generator if no seed is given."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for weight, fan_in in ((self.w1, self.w1.shape[2] / 2), (self.w2, self.hidden)):
            weight.copy_(torch.randn(weight.shape, generator=generator) * fan_in**-0.5)
        self.b1.zero_()
        self.b2.zero_()

    @property
    def rules(self) -> tuple[ScoreKind, ...]:
        """The threshold rules that :meth:`start_at` can express."""
        if self.hidden < 2 or self.features == "probs":
            return ()
        return get_args(ScoreKind) if self.features == "stats" else ("max_prob", "margin")

    @torch.no_grad()
    def start_at(self, rule: ScoreKind, seed: int) -> None:
        """Make the score a threshold rule, exactly for "max_prob" and "entropy", closely for "margin".

        Two hidden units carry an exact rule, as x = relu(x) − relu(−x). The margin of the top two
        log-probabilities is softplus(−l₂) − softplus(−l₁) of their log-odds l, and softplus(x) is the mean of
        relu(x − t) over a logistic t: half of the units take that mean at evenly spaced quantiles t. With 16
        units the score is within 0.14 of the margin, with 2 within log 2. The other units start at random and
        count for nothing. Call :meth:`standardise` first.

        Raises:
            InvalidArgument: the features or the width do not allow this rule.
        """
        if rule not in self.rules:
            raise InvalidArgument(
                f"features={self.features!r} with {self.hidden} hidden units cannot start at {rule!r}; "
                f"expected one of {self.rules}"
            )
        self.reset(seed)
        self.w2.zero_()
        knots = _logistic_quantiles(max(1, self.hidden // 4))
        # (feature, its sign, knot, output weight) of each hidden unit
        units = {
            "max_prob": [(0, 1.0, 0.0, 1.0), (0, -1.0, 0.0, -1.0)],
            "margin": [
                (feature, -1.0, knot, weight / len(knots))
                for feature, weight in ((0, -1.0), (1, 1.0))
                for knot in knots
            ],
            "entropy": [(2, 1.0, 0.0, -1.0), (2, -1.0, 0.0, 1.0)],
        }[rule]
        for unit, (feature, sign, knot, weight) in enumerate(units):
            self.w1[:, unit] = 0
            self.w1[:, unit, feature] = sign * self.std[:, feature]
            self.b1[:, unit] = sign * self.mean[:, feature] - knot
            self.w2[:, unit] = weight

    @torch.no_grad()
    def scale_scores(self, k: int, scale: Tensor | float, shift: Tensor | float) -> None:
        """Turn stage k's score u into scale·u + shift."""
        self.w2[k] *= scale
        self.b2[k] = scale * self.b2[k] + shift

    @torch.no_grad()
    def standardise(self, k: int, stage_features: Tensor) -> None:
        """Set stage k's mean and std from (n, F) features; a constant feature keeps std 1."""
        std, mean = torch.std_mean(stage_features, 0)
        self.mean[k] = mean
        self.std[k] = torch.where(std > 1e-6, std, 1.0)

    def weights(self, k: int) -> MLPWeights:
        """Stage k's weights, as the kernels take them."""
        return MLPWeights(self.mean[k], self.std[k], self.w1[k], self.b1[k], self.w2[k], self.b2[k])

    def stage_features(
        self, k: int, log_probs: Tensor, previous_label: Tensor, label: Tensor | None = None
    ) -> Tensor:
        """(n, F) features before standardisation; arguments as in :meth:`forward`."""
        label = log_probs.argmax(1) if label is None else label
        agreement = (label == previous_label).to(log_probs.dtype)
        return features(self.features, log_probs, agreement)

    def forward(
        self, k: int, log_probs: Tensor, previous_label: Tensor, label: Tensor | None = None
    ) -> Tensor:
        return mlp_score(self.stage_features(k, log_probs, previous_label, label), self.weights(k))

    def macs(self, k: int, num_classes: int) -> int:
        return self.num_features(num_classes) * self.hidden + self.hidden

    def extra_repr(self) -> str:
        return f"features={self.features!r}, hidden={self.hidden}"


def _logistic_quantiles(count: int) -> list[float]:
    """The middles of ``count`` equally probable parts of the logistic distribution."""
    shares = [(i + 0.5) / count for i in range(count)]
    return [math.log(share / (1 - share)) for share in shares]


class ThresholdSelector(Selector):
    """The confidence-threshold baseline: the stop score is a statistic, there is nothing to train.

    It has no default threshold: calibrate the cascade or give thresholds.

    Args:
        score: "max_prob" (log-odds of the top class), "margin" (difference of the top two log-probabilities)
            or "entropy" (−entropy in nats).
    """

    default_threshold = None

    def __init__(self, score: ScoreKind) -> None:
        super().__init__()
        if score not in get_args(ScoreKind):
            raise InvalidArgument(f"unknown score {score!r}; expected one of {get_args(ScoreKind)}")
        self.score: ScoreKind = score

    def forward(
        self, k: int, log_probs: Tensor, previous_label: Tensor, label: Tensor | None = None
    ) -> Tensor:
        return threshold_score(self.score, log_probs)

    def macs(self, k: int, num_classes: int) -> int:
        return 0

    def extra_repr(self) -> str:
        return repr(self.score)
