"""The training objectives alone, for people with a loop of their own.

Notation: K exits, N instances, C classes. A selector's scores u (K−1, N) define a policy over exits

    π(k) = σ(u_k) ∏_{j<k} (1 − σ(u_j)),   σ(u_{K−1}) := 1,

and stopping at k earns the reward r_k = −ℓ(q_k, y) − α·cost_k/dense. In the paper (Guan et al. 2018) the
loss ℓ is the cross-entropy; here it is bounded, for a few confident mistakes would outweigh all else. All
three objectives raise the expected reward E_{k∼π}[r_k]; they differ in the gradient. Losses are means over
instances.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcascade.errors import InvalidArgument

__all__ = [
    "BOUND",
    "Baseline",
    "Objective",
    "auxiliary_loss",
    "distillation_loss",
    "exact_loss",
    "greedy_exit",
    "imitation_loss",
    "objective_loss",
    "policy_log_probs",
    "reinforce_loss",
    "rewards",
    "sample_exits",
]

Objective = Literal["exact", "reinforce", "imitation"]
Baseline = Literal["none", "moving_average", "greedy"]


BOUND = 2.0
"""Largest loss of a wrong answer, in nats."""


def rewards(
    log_probs: Tensor, labels: Tensor, cost_shares: Tensor, alpha: float, bound: float = BOUND
) -> Tensor:
    """What stopping at each exit earns: −ℓ(q_k, y) − α·cost_k/dense.

    The loss is the generalised cross-entropy of Zhang and Sabuncu (2018, arXiv 1805.07836),
    ℓ = bound·(1 − q_y^(1/bound)): the cross-entropy where q_y is near 1, ``bound`` where it is 0.

    Args:
        log_probs: (K, N, C) combined log-probabilities log q_k.
        labels: (N,) int64 true classes.
        cost_shares: (K,) accumulated cost of each exit over the dense cost.
        alpha: price of one dense cost, in nats.
        bound: in nats; infinite for the cross-entropy itself.

    Returns:
        (K, N) r_k, differentiable in ``log_probs``.

    Example:
        >>> q = torch.tensor([[[0.999, 0.001]], [[1e-6, 1.0]]]).log()
        >>> rewards(q, torch.tensor([0]), torch.tensor([0.5, 1.5]), alpha=0.1).squeeze(1)
        tensor([-0.0510, -2.1480])
    """
    exits = log_probs.shape[0]
    log_likelihood = log_probs.gather(2, labels.expand(exits, -1)[:, :, None]).squeeze(2)
    if bound < math.inf:
        log_likelihood = bound * torch.expm1(log_likelihood / bound)
    return log_likelihood - alpha * cost_shares.to(log_probs)[:, None]


def policy_log_probs(scores: Tensor) -> Tensor:
    """log π(k) of every exit, (K−1, N) stop scores → (K, N).

    Example:
        >>> policy_log_probs(torch.zeros(2, 1)).exp().squeeze(1)
        tensor([0.5000, 0.2500, 0.2500])
    """
    nothing = scores.new_zeros(1, scores.shape[1])
    stop = torch.cat([F.logsigmoid(scores), nothing])
    passed = torch.cat([nothing, F.logsigmoid(-scores).cumsum(0)])
    return stop + passed


def exact_loss(scores: Tensor, reward: Tensor) -> Tensor:
    """−Σ_k π(k) r_k: with K exits the expectation is a finite sum and needs no sampling.

    Args:
        scores: (K−1, N), reward: (K, N), both differentiable.
    """
    return -(policy_log_probs(scores).exp() * reward).sum(0).mean()


def sample_exits(scores: Tensor, draws: Tensor) -> Tensor:
    """Sample an exit per instance by inverse transform.

    Args:
        scores: (K−1, N).
        draws: (N,) uniform in [0, 1).

    Returns:
        (N,) int64 exits distributed as π.
    """
    cumulative = policy_log_probs(scores).exp().cumsum(0)[:-1]
    return (draws.to(scores) >= cumulative).sum(0)


def greedy_exit(scores: Tensor) -> Tensor:
    """(N,) first exit with u_k ≥ 0, the last one where there is none."""
    stop = torch.cat([scores >= 0, torch.ones_like(scores[:1], dtype=torch.bool)])
    return stop.int().argmax(0)


def reinforce_loss(scores: Tensor, reward: Tensor, draws: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """A loss whose gradient is the paper's estimator −[(r_τ − b)·∇log π(τ) + ∇r_τ] with one sampled exit τ.

    Only the classifier that stopped receives a supervised signal; add :func:`auxiliary_loss` so that deep
    stages do not starve. Its value is not an estimate of the loss, only its gradient is.

    Args:
        scores: (K−1, N), reward: (K, N), both differentiable.
        draws: (N,) uniform in [0, 1), one per instance.
        baseline: b, a number or (N,); must not depend on the sampled exit.
    """
    exits = sample_exits(scores.detach(), draws)[None]
    earned = reward.gather(0, exits).squeeze(0)
    log_policy = policy_log_probs(scores).gather(0, exits).squeeze(0)
    return -((earned.detach() - baseline) * log_policy + earned).mean()


def imitation_loss(scores: Tensor, reward: Tensor) -> Tensor:
    """Cross-entropy against the best exit in hindsight, weighted by what a wrong decision loses.

    At k the teacher stops if r_k ≥ max_{j>k} r_j (ties stop: the cheaper exit); the weight is the gap
    between the two, but at most one nat: a network that errs confidently loses many nats, and a few such
    instances would outweigh all others. The rewards are constants here: only the selector learns.

    Args:
        scores: (K−1, N), reward: (K, N).
    """
    reward = reward.detach()
    later = reward.flip(0).cummax(0).values.flip(0)[1:]  # (K−1, N) best reward after k
    gap = reward[:-1] - later
    return F.binary_cross_entropy_with_logits(scores, (gap >= 0).to(scores), weight=gap.abs().clamp(max=1.0))


def objective_loss(
    objective: Objective,
    scores: Tensor,
    reward: Tensor,
    draws: Tensor,
    baseline: Tensor | float = 0.0,
) -> Tensor:
    """The loss named ``objective``; ``draws`` and ``baseline`` matter to "reinforce" only."""
    if objective not in get_args(Objective):
        raise InvalidArgument(f"unknown objective {objective!r}; expected one of {get_args(Objective)}")
    if objective == "reinforce":
        return reinforce_loss(scores, reward, draws, baseline)
    if objective == "imitation":
        return imitation_loss(scores, reward)
    return exact_loss(scores, reward)


def auxiliary_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every stage's own p_k, summed over stages: they learn also where π(k) is small.

    A sum, so that a stage's learning rate does not depend on how many others there are.

    Args:
        logits: (K, N, C), labels: (N,).
    """
    exits = logits.shape[0]
    return exits * F.cross_entropy(
        logits.float().flatten(0, 1), labels.repeat(exits), label_smoothing=label_smoothing
    )


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy against a teacher's probabilities (Hinton et al. 2015, T = 1), summed over stages.

    Args:
        logits: (K, N, C), teacher: (N, C) logits, treated as constants.
    """
    target = teacher.detach().float().softmax(1)
    return -(target * logits.float().log_softmax(2)).sum((0, 2)).mean()
