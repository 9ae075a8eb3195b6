"""Fitting the selector alone, on stored logits of held-out images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastcascade.errors import InvalidArgument
from fastcascade.model.cascade import Cascade
from fastcascade.model.cost import eval_mode
from fastcascade.model.selector import MLPSelector
from fastcascade.training.augmentation import uniforms
from fastcascade.training.objective import Baseline, Objective, greedy_exit, objective_loss, rewards

__all__ = ["collect_logits", "fit_selector", "standardise_features"]


@torch.no_grad()
def collect_logits(cascade: Cascade, images: Tensor, batch_size: int = 500) -> Tensor:
    """Logits (K, N, C) of every stage on every image, in eval mode and full precision.

    Args:
        images: (N, …) as the cascade takes them, on any device.

    Returns:
        on the cascade's device.
    """
    if len(images) == 0:
        raise InvalidArgument("got no images; expected at least one")
    with eval_mode(cascade):
        return torch.cat([cascade.all_logits(b.to(cascade.device)) for b in images.split(batch_size)], 1)


@torch.no_grad()
def standardise_features(cascade: Cascade, logits: Tensor) -> None:
    """Set the MLP selector's feature means and deviations from logits (K, N, C); others have none."""
    selector = cascade.selector
    if not isinstance(selector, MLPSelector):
        return
    log_probs = cascade.judge(logits).log_probs
    valid = logits.isfinite().all(2).all(0)
    labels = logits[:, valid].argmax(2)
    for k in range(len(logits) - 1):
        previous = labels[k - 1] if k else torch.full_like(labels[0], -1)
        selector.standardise(k, selector.stage_features(k, log_probs[k, valid], previous, labels[k]))


def fit_selector(
    cascade: Cascade,
    logits: Tensor,
    labels: Tensor,
    objective: Objective = "exact",
    alpha: float = 0.3,
    steps: int = 500,
    learning_rate: float = 0.01,
    weight_decay: float = 0.01,
    baseline: Baseline = "moving_average",
    seed: int = 0,
    cost_shares: Tensor | None = None,
) -> list[float]:
    """Fit the selector by full-batch Adam with the stages' answers fixed.

    The built-in MLP starts from fresh weights and freshly standardised features; a module of your own starts
    from what it is. A selector without parameters is left alone.

    Args:
        logits: (K, N, C) on images that the stages have not been trained on; see :func:`collect_logits`.
        labels: (N,) int64.
        alpha: price of one dense cost in nats.
        weight_decay: decoupled (AdamW); keeps the score smooth when held-out images are few.
        baseline: of "reinforce".
        cost_shares: (K,) accumulated cost of each exit over the dense cost; in MACs if None.

    Returns:
        the greedy policy's mean reward before every step.

    Raises:
        InvalidArgument: shapes that do not fit the cascade.

    Example:
        >>> import fastcascade as fc
        >>> nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)) for _ in range(2)]
        >>> cascade = fc.Cascade(nets, fc.MLPSelector(), num_classes=2, input_shape=(1, 2, 2))
        >>> x, y = torch.randn(50, 1, 2, 2), torch.zeros(50, dtype=torch.long)
        >>> len(fit_selector(cascade, collect_logits(cascade, x), y, steps=5))
        5
    """
    expected = (len(cascade.stages), len(labels), cascade.num_classes)
    if tuple(logits.shape) != expected:
        raise InvalidArgument(f"logits have shape {tuple(logits.shape)}; expected (K, N, C) = {expected}")
    parameters = [] if cascade.selector is None else list(cascade.selector.parameters())
    if not parameters:
        return []
    if isinstance(cascade.selector, MLPSelector):
        cascade.selector.reset(seed)
        standardise_features(cascade, logits)
    valid = logits.isfinite().all(2).all(0)
    logits, labels = logits[:, valid].detach(), labels.to(logits.device)[valid]
    shares = cascade.exit_macs.double() / cascade.dense_macs if cost_shares is None else cost_shares
    judged = cascade.judge(logits)
    reward = rewards(judged.log_probs, labels, shares.to(logits.device), alpha).detach()
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay)
    index = np.arange(len(labels))
    earned: list[float] = []
    average = 0.0
    for step in range(steps):
        scores = cascade.judge(logits).scores
        greedy = reward.gather(0, greedy_exit(scores.detach())[None]).squeeze(0)
        earned.append(float(greedy.mean()))
        b: Tensor | float = 0.0
        if baseline != "none":
            b = greedy if baseline == "greedy" else average
        average = earned[-1] if step == 0 else 0.95 * average + 0.05 * earned[-1]
        draws = torch.from_numpy(uniforms(seed, step, index, 1)[:, 0])
        optimizer.zero_grad()
        objective_loss(objective, scores, reward, draws, b).backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.step()
    return earned
