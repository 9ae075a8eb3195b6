"""Plain-torch twins of every kernel: the readable definition that all backends are tested against.

Notation: N instances in the batch, n ≤ N still active, C classes, F features, H hidden units. Class scores
are kept as log-probabilities throughout, because a third of real images have a top probability that rounds
to 1: log-odds come from log-sum-exp, never from 1 − q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LOG_ODDS_LIMIT",
    "ExitTables",
    "MLPWeights",
    "Score",
    "compact_index",
    "entropy",
    "exit_head",
    "exit_step",
    "exit_tables",
    "features",
    "fill_holes",
    "log_odds",
    "mlp_score",
    "threshold_score",
]

LOG_ODDS_LIMIT = 30.0
"""Log-odds are clamped to ± this, so that features stay finite when a probability underflows."""


def log_odds(log_probs: Tensor, k: int) -> Tensor:
    """Log-odds of the k most probable classes: log q_c − log Σ_{j≠c} q_j, clamped to ±30.

    Args:
        log_probs: (n, C), C ≥ 2.

    Returns:
        (n, k), most probable first.

    Example:
        >>> log_odds(torch.tensor([[0.75, 0.25]]).log(), 1)
        tensor([[1.0986]])
    """
    top = log_probs.topk(k, dim=1).indices  # (n, k)
    columns = []
    for c in top.T.unsqueeze(2):  # (n, 1)
        others = log_probs.scatter(1, c, -math.inf).logsumexp(1)
        columns.append(log_probs.gather(1, c).squeeze(1) - others)
    return torch.stack(columns, 1).clamp(-LOG_ODDS_LIMIT, LOG_ODDS_LIMIT)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats, (n, C) → (n,); a class of probability 0 contributes 0."""
    nats: Tensor = torch.special.entr(log_probs.exp()).sum(1)
    return nats


def features(kind: str, log_probs: Tensor, agreement: Tensor) -> Tensor:
    """What the MLP selector sees.

    Args:
        kind: "stats" (log-odds of the top two, entropy, agreement), "topk" (log-odds of the top three,
            agreement) or "probs" (the C probabilities, as in the paper).
        log_probs: (n, C) log q_k.
        agreement: (n,) 1 where this stage's own label equals the previous stage's, else 0.

    Returns:
        (n, F) with F = 4, 4 or C.
    """
    if kind == "probs":
        return log_probs.exp()
    if kind == "topk":
        return torch.cat([log_odds(log_probs, 3), agreement[:, None]], 1)
    return torch.cat([log_odds(log_probs, 2), entropy(log_probs)[:, None], agreement[:, None]], 1)


def threshold_score(kind: str, log_probs: Tensor) -> Tensor:
    """Confidence-threshold stop scores, (n, C) → (n,); greater is more confident.

    ``kind`` is "max_prob" (log-odds of the top class), "margin" (difference of the top two
    log-probabilities) or "entropy" (−entropy).
    """
    if kind == "entropy":
        return -entropy(log_probs)
    if kind == "margin":
        top = log_probs.topk(2, dim=1).values
        return top[:, 0] - top[:, 1]
    return log_odds(log_probs, 1)[:, 0]


class MLPWeights(NamedTuple):
    """One stage's selector: mean, std (F,); w1 (H, F); b1, w2 (H,); b2 ()."""

    mean: Tensor
    std: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def mlp_score(x: Tensor, weights: MLPWeights) -> Tensor:
    """Stop score w2·relu(w1·((x − mean)/std) + b1) + b2; (n, F) → (n,), in x's dtype."""
    weights = MLPWeights(*(w.to(x.dtype) for w in weights))
    hidden = ((x - weights.mean) / weights.std) @ weights.w1.T + weights.b1
    return hidden.relu() @ weights.w2 + weights.b2


class ExitTables(NamedTuple):
    """State and results of a batch, one row per instance, in input order.

    State: ``log_sum`` (N, C) log Σ p_j over the valid stages so far; ``visits`` (N,) int32, how many those
    were; ``previous_label`` (N,) int32, argmax of the previous stage's p, −1 where it was invalid.
    Results: ``log_probs`` (N, C), ``label`` (N,) int64, ``exit_stage`` (N,) int64.
    """

    log_sum: Tensor
    visits: Tensor
    previous_label: Tensor
    log_probs: Tensor
    label: Tensor
    exit_stage: Tensor


def exit_tables(
    n: int, num_classes: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ExitTables:
    """Tables for a batch of n instances before the first stage."""
    return ExitTables(
        log_sum=torch.full((n, num_classes), -math.inf, device=device, dtype=dtype),
        visits=torch.zeros(n, dtype=torch.int32, device=device),
        previous_label=torch.full((n,), -1, dtype=torch.int32, device=device),
        log_probs=torch.full((n, num_classes), math.nan, device=device, dtype=dtype),
        label=torch.full((n,), -1, dtype=torch.int64, device=device),
        exit_stage=torch.full((n,), -1, dtype=torch.int64, device=device),
    )


Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(log_probs (n, C), previous_label (n,), own label (n,)) → stop scores (n,)."""


def exit_step(
    tables: ExitTables,
    logits: Tensor,
    index: Tensor,
    stage: int,
    *,
    combine: str,
    score: Score | None,
    threshold: float = 0.0,
) -> Tensor:
    """Everything after a stage's logits: combine, score, decide, retire what stops.

    Rows with a non-finite logit cannot stop here and are left out of the mean; at the last exit they retire
    with label −1 and NaN log-probabilities.

    Args:
        tables: updated in place at the rows in ``index``.
        logits: (n, C) of the active rows.
        index: (n,) int, the active rows' positions in the batch.
        stage: k, written to ``exit_stage`` of the rows that stop.
        combine: "last" or "mean".
        score: the selector; None at the last exit, where everything stops.
        threshold: stop where the score is ≥ this; ±inf allowed.

    Returns:
        (n,) bool: True where the row stays active.
    """
    index = index.long()
    valid = logits.isfinite().all(1)
    own = logits.to(tables.log_sum.dtype).log_softmax(1)  # (n, C) log p_k
    own_label = own.argmax(1)
    previous_label = tables.previous_label[index]
    visits = tables.visits[index] + valid.int()
    log_sum = torch.where(valid[:, None], torch.logaddexp(tables.log_sum[index], own), tables.log_sum[index])
    log_probs = own if combine == "last" else log_sum - visits[:, None].to(own.dtype).log()

    if score is None:
        stop = torch.ones_like(valid)
    else:
        # An invalid row's score is never used; a uniform stand-in keeps NaN out of the selector.
        safe = torch.where(valid[:, None], log_probs, -math.log(logits.shape[1]))
        stop = valid & (score(safe, previous_label, own_label) >= threshold)

    tables.log_sum[index] = log_sum
    tables.visits[index] = visits
    tables.previous_label[index] = torch.where(valid, own_label, -1).int()
    rows = index[stop]
    tables.log_probs[rows] = torch.where(valid[:, None], log_probs, math.nan)[stop]
    tables.label[rows] = torch.where(valid, log_probs.argmax(1), -1)[stop]
    tables.exit_stage[rows] = stage
    return ~stop


def exit_head(
    tables: ExitTables,
    logits: Tensor,
    index: Tensor,
    stage: int,
    *,
    combine: str,
    selector: str | None,
    weights: MLPWeights | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """:func:`exit_step` with a built-in selector: the twin of the fused exit-head kernels.

    Args:
        selector: "stats", "topk" or "probs" (MLP on those features, with ``weights``); "max_prob", "margin"
            or "entropy"; None at the last exit.
        weights: of the MLP; None for the confidence scores.
        tables, logits, index, stage, combine, threshold: as in :func:`exit_step`.

    Returns:
        (n,) bool: True where the row stays active.
    """

    def score(log_probs: Tensor, previous_label: Tensor, own_label: Tensor) -> Tensor:
        assert selector is not None
        if weights is None:
            return threshold_score(selector, log_probs)
        agreement = (own_label == previous_label).to(log_probs.dtype)
        return mlp_score(features(selector, log_probs, agreement), weights)

    return exit_step(
        tables,
        logits,
        index,
        stage,
        combine=combine,
        score=None if selector is None else score,
        threshold=threshold,
    )


def compact_index(index: Tensor, keep: Tensor) -> Tensor:
    """The entries of ``index`` (n,) where ``keep`` (n,) is True, in order."""
    return index[keep]


def fill_holes(rows: Tensor, index: Tensor, keep: Tensor) -> int:
    """Compact feature rows in place: with m survivors, those at positions ≥ m move into the holes below m.

    Sources and destinations are disjoint, so the moves may run in any order. The order of rows changes, so
    ``index`` moves along.

    Args:
        rows: (n, …), index: (n,), keep: (n,) bool; rows and index are changed in place.

    Returns:
        m; rows[:m] and index[:m] are the survivors.
    """
    m = int(keep.sum())
    holes = (~keep[:m]).nonzero()[:, 0]
    tail = keep[m:].nonzero()[:, 0] + m
    rows[holes] = rows[tail]
    index[holes] = index[tail]
    return m
