"""Fitting the selector alone, on stored logits of held-out images, so that no threshold rule beats it.

Four things make that so; docs/selection.md has the figures. Temperatures bring confident stages down to their
accuracy. The loss of a wrong answer is bounded. The built-in MLP starts as the best threshold rule, so that
training can only add to it. And how long to train is decided on folds that the training left out: not at all,
where that is no worse within the noise.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcascade.errors import DataError, InvalidArgument
from fastcascade.evaluation.logits import collect_logits
from fastcascade.evaluation.selector_comparison import Judges, gain, rule_scores, summarise
from fastcascade.evaluation.temperature import fit_temperatures
from fastcascade.kernels.reference import mlp_score
from fastcascade.model.cascade import Cascade
from fastcascade.model.selector import MLPSelector, ScoreKind, Selector, ThresholdSelector
from fastcascade.training.augmentation import uniforms
from fastcascade.training.objective import (
    BOUND,
    Baseline,
    Objective,
    exact_loss,
    greedy_exit,
    imitation_loss,
    objective_loss,
    rewards,
)
from fastcascade.types import OutOfFoldScores, SelectorComparison

__all__ = ["collect_logits", "fit_selector", "standardise_features"]

FEWEST_PER_FOLD = 10
"""Images in a fold below which comparing selectors says nothing."""

CLEARLY = 2.24
"""Standard errors by which one way must beat another on the same images: 95 % on one side, of four tries."""

_SCALING_STEPS = 60
"""Of Adam at 0.1, which turn a rule's scores into log-odds of stopping: two numbers per exit."""


@torch.no_grad()
def standardise_features(cascade: Cascade, logits: Tensor) -> None:
    """Set the MLP selector's feature means and deviations from logits (K, N, C); others have none."""
    if isinstance(cascade.selector, MLPSelector):
        valid = logits.isfinite().all(2).all(0)
        _standardise(cascade.selector, _Task.of(cascade, logits[:, valid]))


def fit_selector(
    cascade: Cascade,
    logits: Tensor,
    labels: Tensor,
    objective: Objective = "exact",
    alpha: float = 0.05,
    steps: int = 200,
    learning_rate: float = 0.01,
    weight_decay: float = 0.01,
    baseline: Baseline = "moving_average",
    seed: int = 0,
    cost_shares: Tensor | None = None,
    *,
    temper: bool = True,
    bound: float = BOUND,
    start_at_rule: bool = True,
    folds: int = 4,
    hashes: NDArray[np.uint64] | None = None,
) -> list[float]:
    """Fit temperatures and selector with the stages fixed, by full-batch Adam; compare it with thresholds.

    The built-in MLP starts as the most accurate threshold rule. The fit is repeated without each of ``folds``
    folds; the number of steps that is best on the folds left out, 0 among them, is then taken on all images.
    ``cascade.comparison`` says how the selector and the rules did on those folds. A module of your own starts
    from what it is and takes all steps; a selector without parameters only gets temperatures. Operating
    points stored before do not fit the new selector and are dropped.

    Args:
        logits: (K, N, C) on images that the stages have not been trained on; see :func:`collect_logits`.
            Images with logits that are not finite are left out.
        labels: (N,) int64.
        objective: what the selector is trained for; see :func:`fastcascade.fit`.
        alpha: price of one dense cost in nats.
        steps: at most this many.
        weight_decay: decoupled (AdamW); keeps the score smooth when held-out images are few.
        baseline: of "reinforce".
        cost_shares: (K,) accumulated cost of each exit over the dense cost; in MACs if None.
        temper: fit temperatures; otherwise the cascade's own stay.
        bound: largest loss of a wrong answer, in nats; infinite for the plain cross-entropy.
        start_at_rule: otherwise the MLP starts from random weights.
        folds: 0 takes all steps without a comparison.
        hashes: (N,) of the images (:func:`fastcascade.data.batches.image_hashes`), by which
            :func:`fastcascade.calibrate` finds their out-of-fold scores.

    Returns:
        the greedy policy's mean reward before every step, and at the end.

    Raises:
        InvalidArgument: shapes that do not fit the cascade.
        DataError: labels out of range, or no image with finite logits.

    Warns:
        UserWarning: images left out; too few for a comparison; a temperature that stays 1; a threshold rule
            that is more accurate by more than noise.

    Example:
        >>> import fastcascade as fc
        >>> nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)) for _ in range(2)]
        >>> cascade = fc.Cascade(nets, fc.MLPSelector(), num_classes=2, input_shape=(1, 2, 2))
        >>> y = torch.arange(200) % 2
        >>> z = torch.nn.functional.one_hot(y, 2) + torch.randn(2, 200, 2)
        >>> earned = fit_selector(cascade, z, y, steps=8)
        >>> cascade.comparison.n, sorted(cascade.comparison.accuracy)
        (200, ['entropy', 'learned', 'margin', 'max_prob'])
    """
    logits, labels, valid = _checked(cascade, logits, labels)
    hashes = None if hashes is None else hashes[valid]
    cascade.operating_points.clear()
    cascade.comparison = cascade.out_of_fold = None
    if cascade.auto_selector and not isinstance(cascade.selector, MLPSelector) and cascade.selector:
        cascade.replace_selector(MLPSelector())
    if temper:
        with torch.no_grad():
            cascade.temperatures.copy_(fit_temperatures(logits, labels))
    selector = cascade.selector
    if selector is None or not list(selector.parameters()):
        _keep_scores(cascade, hashes, None if selector is None else cascade.judge(logits).scores)
        return []
    shares = cascade.exit_macs.double() / cascade.dense_macs if cost_shares is None else cost_shares
    task = _Task.of(cascade, logits)
    fit = _Fit(
        task,
        rewards(task.log_probs, labels, shares.to(logits.device), alpha, bound).detach(),
        objective,
        learning_rate,
        weight_decay,
        baseline,
        seed,
    )
    n = len(labels)
    rules = selector.rules if isinstance(selector, MLPSelector) and start_at_rule else ()
    if not _enough(n, folds):
        return fit.run(selector, np.arange(n), "margin" if "margin" in rules else None, steps, {})
    judges = Judges(
        (task.log_probs.argmax(2) == labels).cpu().numpy(),
        shares.double().cpu().numpy(),
        np.random.default_rng(seed).permutation(n) % folds,
    )
    earned, scores, comparison = _fit_and_compare(fit, selector, rules, steps, judges)
    cascade.comparison = comparison
    if _settle(cascade, comparison):
        scores = cascade.judge(logits).scores
    _keep_scores(cascade, hashes, scores)
    return earned


def _enough(n: int, folds: int) -> bool:
    """Whether n images can be cut into folds that compare anything; warns if there are too few."""
    least = FEWEST_PER_FOLD * folds
    if n < least:
        warnings.warn(
            f"got {n} images; comparing the selector with thresholds on {folds} folds takes at least "
            f"{least}. It is fitted without",
            stacklevel=3,
        )
    return folds > 0 and n >= least


def _checked(cascade: Cascade, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, NDArray[np.bool_]]:
    """Rows whose logits are finite everywhere, on one device; and which those are."""
    expected = (len(cascade.stages), len(labels), cascade.num_classes)
    if tuple(logits.shape) != expected:
        raise InvalidArgument(f"logits have shape {tuple(logits.shape)}; expected (K, N, C) = {expected}")
    labels = labels.to(logits.device).long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < cascade.num_classes:
        raise DataError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; "
            f"expected 0 … {cascade.num_classes - 1}"
        )
    valid = logits.isfinite().all(2).all(0)
    missing = len(valid) - int(valid.sum())
    if missing == len(valid):
        raise DataError(f"none of the {len(valid)} images has finite logits at every stage")
    if missing:
        warnings.warn(
            f"{missing} of {len(valid)} images have logits that are not finite; they are left out",
            stacklevel=3,
        )
    return logits[:, valid].detach(), labels[valid], valid.cpu().numpy()


@dataclass(frozen=True)
class _Task:
    """What a selector reads, computed once: (K, N, C) log-probabilities and (K, N) labels, before and own.

    ``features`` (K − 1, N, F) are the MLP's, not standardised; None for other selectors.
    """

    log_probs: Tensor
    previous: Tensor
    own: Tensor
    features: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, cascade: Cascade, logits: Tensor) -> _Task:
        """From logits that are finite."""
        log_probs, own = cascade.judge(logits).log_probs, logits.argmax(2)
        previous = torch.cat([torch.full_like(own[:1], -1), own[:-1]])
        features = None
        if isinstance(cascade.selector, MLPSelector):
            rows = [
                cascade.selector.stage_features(k, log_probs[k], previous[k], own[k])
                for k in range(len(logits) - 1)
            ]
            features = torch.stack(rows)
        return cls(log_probs, previous, own, features)

    def take(self, rows: Tensor) -> _Task:
        """Some images."""
        features = None if self.features is None else self.features[:, rows]
        return _Task(self.log_probs[:, rows], self.previous[:, rows], self.own[:, rows], features)

    def scores(self, selector: nn.Module) -> Tensor:
        """(K − 1, N) stop scores."""
        exits = range(len(self.log_probs) - 1)
        if self.features is not None and isinstance(selector, MLPSelector):
            return torch.stack([mlp_score(self.features[k], selector.weights(k)) for k in exits])
        return torch.stack(
            [
                cast(
                    Tensor,
                    selector(
                        k,
                        self.log_probs[k],
                        self.previous[k],
                        *([self.own[k]] if isinstance(selector, Selector) else []),
                    ),
                )
                for k in exits
            ]
        )


def _standardise(selector: MLPSelector, task: _Task) -> None:
    assert task.features is not None
    for k, rows in enumerate(task.features):
        selector.standardise(k, rows)


class _Fit:
    """One way to train a selector, on any of the images."""

    def __init__(
        self,
        task: _Task,
        reward: Tensor,
        objective: Objective,
        learning_rate: float,
        weight_decay: float,
        baseline: Baseline,
        seed: int,
    ) -> None:
        self.task, self.reward, self.objective = task, reward, objective
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.baseline, self.seed = baseline, seed
        self.planned = 0

    def run(
        self,
        selector: nn.Module,
        index: NDArray[np.intp],
        rule: ScoreKind | None,
        steps: int,
        at: Mapping[int, Callable[[], None]],
        steps_planned: int = 0,
    ) -> list[float]:
        """Train on the images in ``index``; call ``at[step]`` when so many steps are done.

        The learning rate falls to zero over ``steps_planned`` steps, ``steps`` if 0.
        """
        rows = torch.from_numpy(index).to(self.reward.device)
        task, reward = self.task.take(rows), self.reward[:, rows]
        if isinstance(selector, MLPSelector):
            _standardise(selector, task)
            selector.reset(self.seed)
            if rule is not None:
                selector.start_at(rule, self.seed)
                self._scale(selector, task, reward)
        optimizer = torch.optim.AdamW(
            selector.parameters(), self.learning_rate, weight_decay=self.weight_decay
        )
        earned: list[float] = []
        average = 0.0
        for step in range(steps + 1):
            if step in at:
                at[step]()
            scores = task.scores(selector)
            greedy = reward.gather(0, greedy_exit(scores.detach())[None]).squeeze(0)
            earned.append(float(greedy.mean()))
            if step == steps:
                break
            b: Tensor | float = 0.0
            if self.baseline != "none":
                b = greedy if self.baseline == "greedy" else average
            average = earned[-1] if step == 0 else 0.95 * average + 0.05 * earned[-1]
            draws = torch.from_numpy(uniforms(self.seed, step, index, 1)[:, 0])
            optimizer.zero_grad()
            objective_loss(self.objective, scores, reward, draws, b).backward()
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 - step / (steps_planned or steps))
            optimizer.step()
        return earned

    def _scale(self, selector: MLPSelector, task: _Task, reward: Tensor) -> None:
        """Turn a rule's scores into what the objective wants, by a positive scale and a shift per exit."""
        with torch.no_grad():
            std, mean = torch.std_mean(task.scores(selector), 1)
            std = torch.where(std > 1e-6, std, 1.0)
            for k in range(len(std)):
                selector.scale_scores(k, 1 / std[k], -mean[k] / std[k])
            scores = task.scores(selector)
        loss = imitation_loss if self.objective == "imitation" else exact_loss
        log_scale = torch.zeros_like(std, requires_grad=True)
        shift = torch.zeros_like(std, requires_grad=True)
        optimizer = torch.optim.Adam([log_scale, shift], 0.1)
        for _ in range(_SCALING_STEPS):
            optimizer.zero_grad()
            loss(log_scale.exp()[:, None] * scores + shift[:, None], reward).backward()
            optimizer.step()
        for k in range(len(std)):
            selector.scale_scores(k, log_scale[k].detach().exp(), shift[k].detach())


def _fit_and_compare(
    fit: _Fit, selector: nn.Module, rules: Sequence[ScoreKind], steps: int, judges: Judges
) -> tuple[list[float], Tensor, SelectorComparison]:
    """Fit on all images for as many steps as are best on the folds.

    Returns:
        the mean reward before every step and at the end; the out-of-fold scores (K − 1, N); how the selector
        and the threshold rules did on the folds.
    """
    task, everything = fit.task, np.arange(len(judges.folds))
    answers: dict[str, NDArray[np.bool_]] = {
        kind: judges.judge(rule_scores(kind, task.log_probs)) for kind in get_args(ScoreKind)
    }
    rule = _first_rule(rules, answers)
    best, answers["learned"], by_fold = _best_steps(fit, selector, rule, steps, judges)
    earned = fit.run(selector, everything, rule, best, {}, steps_planned=fit.planned)
    with torch.no_grad():
        scores = _out_of_fold(by_fold, task.scores(selector), judges.folds)
    return earned, scores, summarise(judges, answers, best)


def _first_rule(rules: Sequence[ScoreKind], answers: Mapping[str, NDArray[np.bool_]]) -> ScoreKind | None:
    """The margin, unless another rule is better by more than noise; None where there are no rules."""
    best: ScoreKind | None = "margin" if "margin" in rules else None
    for kind in rules:
        difference, error = gain(answers[kind], answers[cast(str, best)])
        if difference > CLEARLY * error:
            best = kind
    return best


def _best_steps(
    fit: _Fit, selector: nn.Module, rule: ScoreKind | None, steps: int, judges: Judges
) -> tuple[int, NDArray[np.bool_], Tensor]:
    """How many steps are best on folds left out of the fit, and the answers (B, N) there.

    None, unless the gain over none is more than noise. Last, the scores (folds, K − 1, N) after so many steps
    of the selectors that left out each fold, on all images.
    """
    fit.planned = steps
    candidates = sorted({0, steps // 8, steps // 4, steps // 2, steps}) if rule else [steps]
    by_fold: dict[int, list[Tensor]] = {step: [] for step in candidates}
    for f in np.unique(judges.folds):
        twin = copy.deepcopy(selector)

        @torch.no_grad()
        def note(step: int, twin: nn.Module = twin) -> None:
            by_fold[step].append(fit.task.scores(twin))

        at = {step: (lambda step=step, note=note: note(step)) for step in candidates}
        fit.run(twin, np.flatnonzero(judges.folds != f), rule, steps, at)
    scores = {step: torch.stack(rows) for step, rows in by_fold.items()}
    answers = {step: judges.judge(_held_out(scores[step], judges.folds)) for step in candidates}
    first = best = candidates[0]
    for step in candidates[1:]:
        difference, error = gain(answers[step], answers[first])
        if difference > CLEARLY * error and answers[step].mean() > answers[best].mean():
            best = step
    return best, answers[best], scores[best]


def _held_out(by_fold: Tensor, folds: NDArray[np.intp]) -> NDArray[np.float32]:
    """(K − 1, N) the scores of the selectors that left out each image's fold, from (folds, K − 1, N)."""
    rows = torch.from_numpy(folds).to(by_fold.device).expand(1, by_fold.shape[1], -1)
    return cast("NDArray[np.float32]", by_fold.gather(0, rows)[0].float().cpu().numpy())


def _out_of_fold(by_fold: Tensor, final: Tensor, folds: NDArray[np.intp]) -> Tensor:
    """:func:`_held_out` on the scale of the final selector (K − 1, N): equal rank among all images."""
    onto = torch.empty_like(by_fold)
    ordered = final.sort(1).values
    for selector, scores in zip(onto, by_fold, strict=True):
        selector.scatter_(1, scores.argsort(1), ordered)
    return torch.from_numpy(_held_out(onto, folds))


def _keep_scores(cascade: Cascade, hashes: NDArray[np.uint64] | None, scores: Tensor | None) -> None:
    """Store the scores (K − 1, N) with which the images may find thresholds, too."""
    if hashes is None or scores is None:
        return
    images, first = np.unique(hashes, return_index=True)
    cascade.out_of_fold = OutOfFoldScores(images, scores.float().cpu().numpy()[:, first])


def _settle(cascade: Cascade, comparison: SelectorComparison) -> bool:
    """Where a threshold rule is clearly better: with "auto" that rule (then True), otherwise a warning."""
    if comparison.gain >= -CLEARLY * comparison.standard_error:
        return False
    if cascade.auto_selector:
        cascade.replace_selector(ThresholdSelector(cast(ScoreKind, comparison.best_rule)))
        cascade.comparison = comparison
    else:
        warnings.warn(
            f"at the same cost the threshold rule {comparison.best_rule!r} is {-comparison.gain:.2%} more "
            f"accurate than the selector (standard error {comparison.standard_error:.2%}, {comparison.n} "
            "images); use selector='auto' or "
            f"fc.ThresholdSelector({comparison.best_rule!r})",
            stacklevel=3,
        )
    return cascade.auto_selector
