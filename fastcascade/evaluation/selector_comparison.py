"""Stop scores at matched cost, each judged on folds that took no part in its thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fastcascade.evaluation.threshold_grid import BinnedScores, ThresholdGrid, resolution
from fastcascade.kernels.reference import threshold_score
from fastcascade.model.selector import ScoreKind
from fastcascade.types import SelectorComparison

__all__ = ["Judges", "gain", "rule_scores", "summarise"]

PLACES = (0.1, 0.25, 0.45, 0.7)
"""Budgets of the comparison: how far from the first exit's cost to the dense cost."""


def rule_scores(rule: ScoreKind, log_probs: torch.Tensor) -> NDArray[np.float32]:
    """(K − 1, N) scores of a threshold rule on combined log-probabilities (K, N, C)."""
    scores = torch.stack([threshold_score(rule, q) for q in log_probs[:-1]])
    return cast("NDArray[np.float32]", scores.float().cpu().numpy())


@dataclass(frozen=True)
class Judges:
    """Images on which stop scores are compared.

    Attributes:
        right: (K, N) whether stopping at each exit gives the true label.
        shares: (K,) accumulated cost of each exit, over the dense cost.
        folds: (N,) number of each image's fold.
    """

    right: NDArray[np.bool_]
    shares: NDArray[np.float64]
    folds: NDArray[np.intp]

    @property
    def budgets(self) -> NDArray[np.float64]:
        """(B,) budgets between the first exit's cost and the dense cost, as shares of it."""
        first = float(self.shares[0])
        most = max(first, min(1.0, float(self.shares[-1])))
        return first + np.array(PLACES) * (most - first)

    def judge(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """(B, N) whether each image is answered rightly at each budget.

        The thresholds of a fold are found on the other folds. Scores count by their rank within their fold,
        so that folds may have been scored by different models.

        Args:
            scores: (K − 1, N), of models that were not fitted on the image scored.
        """
        ranks = np.empty(scores.shape, np.float64)
        for f in np.unique(self.folds):
            rows = self.folds == f
            for k, row in enumerate(scores[:, rows]):
                ordered = np.sort(row)
                middle = np.searchsorted(ordered, row, "left") + np.searchsorted(ordered, row, "right")
                ranks[k, rows] = middle / (2 * len(row))
        answers = np.zeros((len(self.budgets), scores.shape[1]), np.bool_)
        size = resolution(len(scores))
        for f in np.unique(self.folds):
            rest, held_out = self.folds != f, self.folds == f
            exits = [BinnedScores.of(row[rest], size) for row in ranks]
            grid = ThresholdGrid(list(self.right[:, rest]), exits, self.shares.tolist())
            for b, budget in enumerate(self.budgets):
                best = grid.best(budget * int(rest.sum()))
                stops = np.ones((len(self.right), int(held_out.sum())), np.bool_)
                if best is not None:
                    limits = np.array(grid.thresholds(best))[:, None]
                    stops[:-1] = ranks[:, held_out] >= limits
                answers[b, held_out] = np.take_along_axis(self.right[:, held_out], stops.argmax(0)[None], 0)[
                    0
                ]
        return answers


def gain(better: NDArray[np.bool_], than: NDArray[np.bool_]) -> tuple[float, float]:
    """Difference of two mean accuracies over budgets (B, N), and its standard error, paired over images."""
    difference = better.mean(0) - than.mean(0)
    return float(difference.mean()), float(difference.std() / math.sqrt(max(1, len(difference))))


def summarise(judges: Judges, answers: Mapping[str, NDArray[np.bool_]], steps: int) -> SelectorComparison:
    """The comparison of "learned" with the other names in ``answers``, each (B, N)."""
    rules = [name for name in answers if name != "learned"]
    best = max(rules, key=lambda name: float(answers[name].mean()))
    difference, error = gain(answers["learned"], answers[best])
    return SelectorComparison(
        budgets=tuple(judges.budgets.tolist()),
        accuracy={name: tuple(a.mean(1).tolist()) for name, a in answers.items()},
        best_rule=best,
        gain=difference,
        standard_error=error,
        steps=steps,
        n=judges.right.shape[1],
    )
