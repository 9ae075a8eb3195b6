"""Which of many trained classifiers make a cascade: their order, how they combine, and the stop thresholds.

The input is what each classifier says about the same held-out images, so nothing is trained or run. With few
classifiers every chain is tried; with many, the chains that Streeter's greedy builds, one for each accuracy
asked of an early exit (*Approximation Algorithms for Cascading Prediction Models*, ICML 2018,
arXiv 1802.07697). Notation: K classifiers, N images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastcascade.errors import CalibrationError, DataError, InvalidArgument
from fastcascade.evaluation.temperature import fit_temperatures
from fastcascade.evaluation.threshold_grid import BinnedScores, ThresholdGrid, resolution
from fastcascade.kernels.reference import threshold_score
from fastcascade.model.selector import ScoreKind
from fastcascade.types import Combine

__all__ = ["StageChoice", "choose_stages", "read_pool", "stage_choices"]

EXHAUSTIVE = 2000
"""Chains up to this number are all tried; beyond it, the greedy's."""

_ACCURACIES = np.linspace(0.8, 1.0, 21)
"""What the greedy asks of early exits, as shares of the best classifier's accuracy."""


@dataclass(frozen=True)
class StageChoice:
    """A cascade of trained classifiers for one budget.

    Attributes:
        budget_macs: allowed mean cost, in MACs per image.
        stages: indices of the chosen classifiers, in the order in which they run.
        names: of the same.
        combine: as :class:`fastcascade.Cascade` takes it.
        score: the threshold rule between the stages.
        temperatures: of the chosen classifiers, fitted on the images.
        thresholds: one per stage but the last.
        accuracy, mean_macs: on the images of the choice; the accuracy of the best among many, so it flatters.
        held_out_accuracy, held_out_macs: of the same way of choosing on images that took no part in it,
            averaged over the folds; what to expect on new images.
        exit_shares: share of the images that stops at each exit.
    """

    budget_macs: float
    stages: tuple[int, ...]
    names: tuple[str, ...]
    combine: Combine
    score: ScoreKind
    temperatures: tuple[float, ...]
    thresholds: tuple[float, ...]
    accuracy: float
    mean_macs: float
    held_out_accuracy: float
    held_out_macs: float
    exit_shares: tuple[float, ...]


def choose_stages(
    logits: ArrayLike | Tensor | Sequence[ArrayLike | Tensor],
    labels: ArrayLike | Tensor,
    macs: Sequence[float],
    *,
    budget: float,
    names: Sequence[str] | None = None,
    score: ScoreKind = "margin",
    max_stages: int = 3,
    folds: int = 5,
    seed: int = 0,
) -> StageChoice:
    """The cascade of trained classifiers that is most accurate at a mean cost.

    Args:
        logits: (K, N, C) floats, or K arrays (N, C), of classifiers that read the image, on images that
            trained none of them.
        labels: (N,) integers in 0 … C − 1.
        macs: (K,) multiplies per image of each classifier; any unit does, if ``budget`` is in the same.
        budget: allowed mean cost per image, earlier stages included.
        names: of the classifiers; "0", "1", … if not given.
        score: "max_prob", "margin" or "entropy", on temperature-scaled probabilities.
        max_stages: longest chain, up to 5.
        folds: of the cross-validation behind ``held_out_accuracy``.
        seed: of the folds.

    Raises:
        InvalidArgument: shapes that do not fit each other, or arguments out of range.
        DataError: logits that are not finite, labels out of range, or fewer images than folds.
        CalibrationError: every classifier costs more than the budget.

    Example:
        >>> y = torch.arange(300) % 3
        >>> small = torch.nn.functional.one_hot(y, 3) * 2 + torch.randn(300, 3)
        >>> large = torch.nn.functional.one_hot(y, 3) * 6 + torch.randn(300, 3)
        >>> choice = choose_stages([small, large], y, macs=[1e6, 9e6], budget=5e6)
        >>> choice.names, choice.mean_macs <= 5e6
        (('0', '1'), True)
    """
    return stage_choices(
        logits,
        labels,
        macs,
        budgets=[budget],
        names=names,
        score=score,
        max_stages=max_stages,
        folds=folds,
        seed=seed,
    )[0]


def stage_choices(
    logits: ArrayLike | Tensor | Sequence[ArrayLike | Tensor],
    labels: ArrayLike | Tensor,
    macs: Sequence[float],
    *,
    budgets: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    score: ScoreKind = "margin",
    max_stages: int = 3,
    folds: int = 5,
    seed: int = 0,
) -> list[StageChoice]:
    """The curve of :func:`choose_stages`: one choice per budget, all from one search.

    Args:
        budgets: in the unit of ``macs``; if None, twelve, evenly spaced in log cost from the cheapest
            classifier to the dearest.
        logits, labels, macs, names, score, max_stages, folds, seed: as in :func:`choose_stages`.

    Returns:
        choices in the order of ``budgets``.

    Raises:
        InvalidArgument, DataError, CalibrationError: as :func:`choose_stages`.
    """
    pool = _Pool.checked(logits, labels, macs, names)
    if not 1 <= max_stages <= 5:
        raise InvalidArgument(f"max_stages is {max_stages}; expected 1 … 5")
    if folds < 2:
        raise InvalidArgument(f"folds is {folds}; expected at least 2")
    if len(pool.labels) < 10 * folds:
        raise DataError(
            f"got {len(pool.labels)} images; {folds} folds need at least {10 * folds}, ten for each"
        )
    if budgets is None:
        inner = np.geomspace(pool.macs.min(), pool.macs.max(), 12)[1:-1].tolist()  # its ends are rounded
        budgets = [float(pool.macs.min()), *inner, float(pool.macs.max())]
    for budget in budgets:
        if not pool.macs.min() <= budget < math.inf:
            raise CalibrationError(
                f"a budget of {budget:,.0f} cannot be met: the cheapest classifier costs "
                f"{pool.macs.min():,.0f} per image"
            )
    wanted = np.array(budgets, np.float64)
    fold = np.random.default_rng(seed).permutation(len(pool.labels)) % folds
    totals = np.zeros((2, len(wanted)))  # right answers and cost on images outside the choice
    for f in range(folds):
        rest = _Judged(pool, fold != f, score)
        for b, found in enumerate(rest.search(wanted, max_stages)):
            totals[:, b] += rest.measure(found, fold == f)[:2]
    everything = np.ones(len(pool.labels), np.bool_)
    judged = _Judged(pool, everything, score)
    result = []
    for b, found in enumerate(judged.search(wanted, max_stages)):
        hits, cost, shares = judged.measure(found, everything)
        n = len(pool.labels)
        result.append(
            StageChoice(
                budget_macs=float(wanted[b]),
                stages=found.chain,
                names=tuple(pool.names[k] for k in found.chain),
                combine=judged.weights(found.chain, found.combine),
                score=score,
                temperatures=tuple(float(judged.temperatures[k]) for k in found.chain),
                thresholds=found.thresholds,
                accuracy=hits / n,
                mean_macs=cost / n,
                held_out_accuracy=float(totals[0, b]) / n,
                held_out_macs=float(totals[1, b]) / n,
                exit_shares=shares,
            )
        )
    return result


def read_pool(path: str | Path) -> dict[str, Any]:
    """The arguments of :func:`stage_choices` that an npz file holds.

    Args:
        path: with arrays ``logits`` (K, N, C), ``labels`` (N,), ``macs`` (K,) and, optionally, ``names`` (K,)
            of text. Pickled objects are refused.

    Raises:
        InvalidArgument: unreadable, or an array is missing.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise InvalidArgument(f"cannot read {path}: {error}") from error
    if missing := {"logits", "labels", "macs"} - set(arrays):
        raise InvalidArgument(f"{path} lacks {sorted(missing)}; expected logits, labels, macs and names")
    names = arrays.get("names")
    return {
        "logits": arrays["logits"],
        "labels": arrays["labels"],
        "macs": arrays["macs"],
        "names": None if names is None else [str(name) for name in names],
    }


@dataclass(frozen=True)
class _Pool:
    """Checked input; classifiers in the caller's order."""

    logits: Tensor  # (K, N, C) float32
    labels: NDArray[np.int64]
    macs: NDArray[np.float64]
    names: tuple[str, ...]

    @classmethod
    def checked(cls, logits: Any, labels: Any, macs: Sequence[float], names: Sequence[str] | None) -> _Pool:
        each = [torch.as_tensor(np.asarray(z)) for z in logits]
        names = tuple(map(str, range(len(each)))) if names is None else tuple(map(str, names))
        if not each:
            raise InvalidArgument("got no classifiers; expected the logits of at least one")
        if len(names) != len(each) or len(set(names)) != len(names):
            raise InvalidArgument(f"got names {names} for {len(each)} classifiers; expected one each")
        for name, z in zip(names, each, strict=True):
            if z.ndim != 2 or not z.is_floating_point():
                raise InvalidArgument(
                    f"the logits of {name!r} are {z.dtype} of shape {tuple(z.shape)}; expected floats (N, C)"
                )
            if z.shape != each[0].shape:
                raise InvalidArgument(
                    f"{name!r} has logits of shape {tuple(z.shape)}, {names[0]!r} of {tuple(each[0].shape)}; "
                    "all must judge the same images and the same classes"
                )
            if bad := int((~z.isfinite().all(1)).sum()):
                raise DataError(f"the logits of {name!r} are not finite on {bad} of {len(z)} images")
        truth = np.asarray(labels)
        n, classes = each[0].shape
        if classes < 2:
            raise InvalidArgument(f"the logits have {classes} class; expected at least 2")
        if truth.shape != (n,) or not np.issubdtype(truth.dtype, np.integer):
            raise InvalidArgument(
                f"labels are {truth.dtype} of shape {truth.shape}; expected ({n},) integers"
            )
        if n and not 0 <= truth.min() <= truth.max() < classes:
            raise DataError(f"labels run from {truth.min()} to {truth.max()}; expected 0 … {classes - 1}")
        cost = np.asarray(macs, np.float64)
        if cost.shape != (len(each),) or not (np.isfinite(cost) & (cost > 0)).all():
            raise InvalidArgument(f"macs is {list(macs)}; expected {len(each)} positive numbers")
        return cls(torch.stack([z.float() for z in each]), truth.astype(np.int64), cost, names)


@dataclass(frozen=True)
class _Found:
    """A chain with its thresholds."""

    chain: tuple[int, ...]
    combine: str
    thresholds: tuple[float, ...]


class _Exit:
    """What the exit after a row of classifiers says; scores only where they are asked for.

    Attributes:
        right: (N,) whether its label is the true one.
    """

    def __init__(self, probs: Tensor, labels: NDArray[np.int64], score: ScoreKind) -> None:
        self.probs, self.score = probs, score
        self.right = probs.argmax(1).numpy() == labels
        self.binning: dict[int, BinnedScores] = {}

    @cached_property
    def scores(self) -> NDArray[np.float32]:
        """(N,) stop scores."""
        # Probabilities that underflow are far from the top two, and add nothing to the entropy.
        scores: NDArray[np.float32] = threshold_score(self.score, self.probs.clamp(min=1e-38).log()).numpy()
        return scores

    def binned(self, size: int, chosen: NDArray[np.bool_]) -> BinnedScores:
        """The scores of the chosen images, always the same ones."""
        if size not in self.binning:
            self.binning[size] = BinnedScores.of(self.scores[chosen], size)
        return self.binning[size]


class _Judged:
    """A pool judged on the images in ``chosen``, with temperatures fitted there."""

    def __init__(self, pool: _Pool, chosen: NDArray[np.bool_], score: ScoreKind) -> None:
        self.pool, self.chosen, self.score = pool, chosen, score
        rows = torch.from_numpy(chosen)
        self.temperatures = fit_temperatures(
            pool.logits[:, rows], torch.from_numpy(pool.labels[chosen]), warn=False
        )
        self.own = (pool.logits / self.temperatures[:, None, None]).softmax(2)  # (K, N, C)
        self.exits: dict[tuple[Any, ...], _Exit] = {}

    def weights(self, chain: tuple[int, ...], combine: str) -> Combine:
        """As :class:`fastcascade.Cascade` takes them."""
        if combine == "cost":
            costs = self.pool.macs[list(chain)]
            return tuple((costs / costs.max()).clip(1e-6).tolist())
        return "mean" if combine == "mean" and len(chain) > 1 else "last"

    def exit(self, row: tuple[int, ...], combine: str) -> _Exit:
        """The exit after the classifiers in ``row``."""
        key = row[-1:] if combine == "last" or len(row) == 1 else (combine, *row)
        if key not in self.exits:
            probs = self.own[row[-1]]
            if len(key) > 1:
                weights = [1.0 if combine == "mean" else float(self.pool.macs[k]) for k in row]
                before = self.exit(row[:-1], combine).probs * sum(weights[:-1])
                probs = (before + weights[-1] * probs) / sum(weights)
            self.exits[key] = _Exit(probs, self.pool.labels, self.score)
        return self.exits[key]

    def search(self, budgets: NDArray[np.float64], max_stages: int) -> list[_Found]:
        """The most accurate chain for each budget, on the chosen images; of equals the cheapest."""
        best = np.full(len(budgets), -1.0)
        spent = np.full(len(budgets), math.inf)
        found: list[_Found | None] = [None] * len(budgets)
        for chain in self.chains(max_stages):
            for combine in ("last", "mean", "cost") if len(chain) > 1 else ("last",):
                grid = self.grid(chain, combine)
                for b, budget in enumerate(budgets * int(self.chosen.sum())):
                    i = grid.best(budget)
                    if i is not None and (grid.hits[i], -grid.cost[i]) > (best[b], -spent[b]):
                        best[b], spent[b] = grid.hits[i], grid.cost[i]
                        found[b] = _Found(chain, combine, grid.thresholds(i))
        return [f for f in found if f is not None]

    def chains(self, max_stages: int) -> Iterator[tuple[int, ...]]:
        """All chains of growing cost, or the greedy's where there are too many."""
        order = np.argsort(self.pool.macs, kind="stable").tolist()
        longest = min(max_stages, len(order))
        tried: set[tuple[int, ...]] = set()
        for length in range(1, longest + 1):
            if len(tried) + math.comb(len(order), length) > EXHAUSTIVE:
                break
            tried.update(combinations(order, length))
        else:
            yield from sorted(tried)
            return
        tried.update((k,) for k in order)
        for accuracy in _ACCURACIES:
            for last in order:
                greedy = self.greedy(float(accuracy), last)
                tried.update((*greedy[:i], last) for i in range(min(len(greedy) + 1, longest)))
        yield from sorted(tried)

    def greedy(self, share: float, last: int) -> tuple[int, ...]:
        """Streeter's greedy before a last classifier: next comes the one that settles most images per cost.

        A classifier settles its most confident remaining images, as many as it gets right at ``share`` of
        the last one's accuracy. For fixed settled sets this is the greedy of min-sum set cover (Feige,
        Lovász, Tetali 2004), whose mean cost is within a factor of four of the best order's.
        """
        floor = share * float(self.exit((last,), "last").right[self.chosen].mean())
        left = self.chosen.copy()
        chain: list[int] = []
        while left.any():
            gains = []
            for k in range(len(self.pool.macs)):
                if k in chain or self.pool.macs[k] >= self.pool.macs[last]:
                    continue
                exit = self.exit((k,), "last")
                rows = np.flatnonzero(left)
                rows = rows[np.argsort(-exit.scores[rows], kind="stable")]
                right = np.cumsum(exit.right[rows]) / np.arange(1, len(rows) + 1)
                enough = np.flatnonzero(right >= floor)
                settled = int(enough[-1]) + 1 if len(enough) else 0
                gains.append((settled / self.pool.macs[k], k, rows[:settled]))
            gain, k, settled_rows = max(gains, default=(0.0, 0, np.empty(0, int)), key=lambda g: g[0])
            # The last classifier settles all that is left.
            if gain <= left.sum() / self.pool.macs[last]:
                break
            chain.append(k)
            left[settled_rows] = False
        return tuple(chain)

    def grid(self, chain: tuple[int, ...], combine: str) -> ThresholdGrid:
        """All combinations of thresholds of a chain, on the chosen images."""
        exits = [self.exit(chain[: k + 1], combine) for k in range(len(chain))]
        size = resolution(len(chain) - 1)
        return ThresholdGrid(
            [e.right[self.chosen] for e in exits],
            [e.binned(size, self.chosen) for e in exits[:-1]],
            np.cumsum(self.pool.macs[list(chain)]).tolist(),
        )

    def measure(self, found: _Found, rows: NDArray[np.bool_]) -> tuple[int, float, tuple[float, ...]]:
        """Right answers, total cost and exit shares on some images."""
        active, hits, cost, shares = rows.copy(), 0, 0.0, []
        paid = np.cumsum(self.pool.macs[list(found.chain)])
        for k, threshold in enumerate((*found.thresholds, -math.inf)):
            exit = self.exit(found.chain[: k + 1], found.combine)
            stops = active & (exit.scores >= threshold)
            hits += int(exit.right[stops].sum())
            cost += float(paid[k]) * int(stops.sum())
            shares.append(int(stops.sum()) / int(rows.sum()))
            active &= ~stops
        return hits, cost, tuple(shares)
