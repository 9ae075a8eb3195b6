"""The plain-torch twin of every kernel: the readable definition that all backends are tested against.

Notation: N instances in the batch, n ≤ N still active, C classes, F features, H hidden units. Class scores
are log-probabilities throughout. A third of CIFAR images have a top probability that rounds to 1 in float32,
so log-odds come from log-sum-exp, never from 1 − q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcascade.kernels.layers import Conv, Elementwise, Layer, Pooling

__all__ = [
    "LOG_ODDS_LIMIT",
    "ExitTables",
    "MLPWeights",
    "ResidentExit",
    "ResidentStage",
    "Score",
    "compact_index",
    "conv",
    "elementwise",
    "entropy",
    "exit_head",
    "exit_step",
    "exit_tables",
    "features",
    "fill_holes",
    "log_odds",
    "mlp_score",
    "persistent",
    "pool",
    "resident",
    "threshold_score",
]

LOG_ODDS_LIMIT = 30.0
"""Bound on the magnitude of log-odds, which keeps features finite when a probability underflows."""


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
    """The features of the MLP selector.

    Args:
        kind: "stats" (log-odds of the top two, entropy, agreement), "topk" (log-odds of the top three,
            agreement) or "probs" (the C probabilities, as in the paper).
        log_probs: (n, C) log q_k.
        agreement: (n,) 1 if this stage's own label equals the previous stage's, else 0.

    Returns:
        (n, F) with F = 4, 4 or C.
    """
    if kind == "probs":
        return log_probs.exp()
    if kind == "topk":
        return torch.cat([log_odds(log_probs, 3), agreement[:, None]], 1)
    return torch.cat([log_odds(log_probs, 2), entropy(log_probs)[:, None], agreement[:, None]], 1)


def threshold_score(kind: str, log_probs: Tensor) -> Tensor:
    """Stop scores of a confidence threshold, (n, C) → (n,); greater is more confident.

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
    """Weights of one stage's MLP selector: mean, std (F,); w1 (H, F); b1, w2 (H,); b2 ()."""

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

    State: ``log_sum`` (N, C) log Σ w_j p_j over the valid stages so far; ``weight_sum`` (N,) Σ w_j over the
        same
    stages; ``previous_label`` (N,) int32, argmax of the previous stage's p, −1 if it was invalid.
    Results: ``log_probs`` (N, C), ``label`` (N,) int64, ``exit_stage`` (N,) int64.
    """

    log_sum: Tensor
    weight_sum: Tensor
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
        weight_sum=torch.zeros(n, device=device, dtype=dtype),
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
    stage_weight: float | None,
    score: Score | None,
    threshold: float = 0.0,
) -> Tensor:
    """The exit after a stage: combine, score, decide, retire the rows that stop.

    A row with a non-finite logit cannot stop here and is left out of the mean. At the last exit it retires
    with label −1 and NaN log-probabilities.

    Args:
        tables: updated in place at the rows in ``index``.
        logits: (n, C) of the active rows.
        index: (n,) int, positions of the active rows in the batch.
        stage: k, written to ``exit_stage`` of the rows that stop.
        stage_weight: w_k of this stage in the mean Σ w_j p_j / Σ w_j; None: q_k is p_k alone.
        score: the selector; None at the last exit, where every row stops.
        threshold: stop where the score is ≥ this; ±inf allowed.

    Returns:
        (n,) bool: True for a row that stays active.
    """
    index = index.long()
    valid = logits.isfinite().all(1)
    own = logits.to(tables.log_sum.dtype).log_softmax(1)  # (n, C) log p_k
    own_label = own.argmax(1)
    previous_label = tables.previous_label[index]
    log_probs = own if stage_weight is None else _into_mean(tables, own, index, valid, stage_weight)

    if score is None:
        stop = torch.ones_like(valid)
    else:
        # The score of an invalid row is never used. Uniform probabilities keep NaN out of the selector.
        safe = torch.where(valid[:, None], log_probs, -math.log(logits.shape[1]))
        stop = valid & (score(safe, previous_label, own_label) >= threshold)

    tables.previous_label[index] = torch.where(valid, own_label, -1).int()
    rows = index[stop]
    tables.log_probs[rows] = torch.where(valid[:, None], log_probs, math.nan)[stop]
    tables.label[rows] = torch.where(valid, log_probs.argmax(1), -1)[stop]
    tables.exit_stage[rows] = stage
    return ~stop


def _into_mean(tables: ExitTables, own: Tensor, index: Tensor, valid: Tensor, weight: float) -> Tensor:
    """Add ``own``, this stage's log-probabilities, to the sums; returns (n, C) log of the mean so far."""
    sums, weighted = tables.log_sum[index], own + math.log(weight)
    sums = torch.where(valid[:, None], torch.logaddexp(sums, weighted), sums)
    weights = tables.weight_sum[index] + weight * valid
    tables.log_sum[index], tables.weight_sum[index] = sums, weights
    return sums - weights[:, None].log()


def exit_head(
    tables: ExitTables,
    logits: Tensor,
    index: Tensor,
    stage: int,
    *,
    stage_weight: float | None,
    selector: str | None,
    weights: MLPWeights | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """:func:`exit_step` with a built-in selector: the twin of the fused exit-head kernels.

    Args:
        selector: "stats", "topk" or "probs" (MLP on those features, with ``weights``); "max_prob", "margin"
            or "entropy"; None at the last exit.
        weights: of the MLP; None for the confidence scores.
        tables, logits, index, stage, stage_weight, threshold: as in :func:`exit_step`.

    Returns:
        (n,) bool: True for a row that stays active.
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
        stage_weight=stage_weight,
        score=None if selector is None else score,
        threshold=threshold,
    )


def compact_index(index: Tensor, keep: Tensor) -> Tensor:
    """The entries of ``index`` (n,) for which ``keep`` (n,) is True, in order."""
    return index[keep]


def fill_holes(rows: Tensor, index: Tensor, keep: Tensor) -> int:
    """Compact feature rows in place: of m survivors, those at positions ≥ m move into the holes below m.

    Sources and destinations are disjoint, so the moves may run in any order. Rows change their order, and the
    entries of ``index`` move with them.

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


def conv(work: Conv, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """activation(conv(x) + bias + residual) on padded rows.

    Args:
        x: (n, H, W, C) of the sizes in ``work.shape``; residual: the rows that ``work.view`` reads, or None.
        weight: (depth, padded out) packed; bias (padded out,).

    Returns:
        (n, OUT_H, OUT_W, stored out channels) in x's dtype.
    """
    shape = work.shape
    taps = shape.kernel[0] * shape.kernel[1]
    kernel = weight[: taps * shape.channels].view(*shape.kernel, shape.channels, -1).permute(3, 2, 0, 1)
    # Pad to the rows and columns that the taps reach; a negative number crops those that no tap reaches.
    sizes = zip((shape.out_height, shape.out_width), shape.stride, shape.dilation, shape.kernel, strict=True)
    reach = [(out - 1) * step + far * (k - 1) + 1 for out, step, far, k in sizes]
    below = reach[0] - shape.height - shape.corner[0]
    right = reach[1] - shape.width - shape.corner[1]
    image = F.pad(x.permute(0, 3, 1, 2), (shape.corner[1], right, shape.corner[0], below))
    out = F.conv2d(image, kernel.to(x.dtype), None, shape.stride, 0, shape.dilation).permute(0, 2, 3, 1)
    out = out + bias.to(x.dtype)
    if residual is not None and work.view is not None:
        view = work.view
        rows = residual[:, view.start[0] :: view.step[0], view.start[1] :: view.step[1], : view.channels]
        rows = rows[:, : shape.out_height, : shape.out_width]
        out = out + F.pad(rows, (view.before, out.shape[3] - view.before - view.channels))
    return _activated(out, work.activation)[..., : work.out[2]]


def pool(work: Pooling, x: Tensor) -> Tensor:
    """Maximum (NaN if the window has one, never the padding) or average over windows of rows (n, H, W, C)."""
    height, width, _ = work.out
    top, bottom, left, right = work.padding
    # In ceil mode windows extend beyond the padding.
    below = max((height - 1) * work.stride[0] + work.kernel[0] - top - x.shape[1], bottom)
    beside = max((width - 1) * work.stride[1] + work.kernel[1] - left - x.shape[2], right)
    edges = (0, 0, left, beside, top, below)
    low = -math.inf if work.kind == "max" else 0.0
    image = F.pad(x, edges, value=low)
    if work.include_padding:
        cells = F.pad(torch.ones_like(x[:1, :, :, :1]), (0, 0, left, right, top, bottom), value=1.0)
        cells = F.pad(cells, (0, 0, 0, beside - right, 0, below - bottom))
    else:
        cells = F.pad(torch.ones_like(x[:1, :, :, :1]), edges)
    best, total, counted = torch.full((), low), torch.zeros(()), torch.zeros(())
    for i in range(work.kernel[0]):
        for j in range(work.kernel[1]):
            rows = slice(i, i + (height - 1) * work.stride[0] + 1, work.stride[0])
            columns = slice(j, j + (width - 1) * work.stride[1] + 1, work.stride[1])
            best, total = torch.maximum(best, image[:, rows, columns]), total + image[:, rows, columns]
            counted = counted + cells[:, rows, columns]
    return best if work.kind == "max" else total / counted


def elementwise(work: Elementwise, x: Tensor, other: Tensor | None, vectors: Tensor | None) -> Tensor:
    """out[h, w, c] = activation(scale[c]·x[start + step·(h, w, c)] + shift[c] + other[h, w, c])."""
    axes = zip(work.out, work.start, work.step, strict=True)
    at = torch.meshgrid(*(start + step * torch.arange(n) for n, start, step in axes), indexing="ij")
    limits = (*work.source[:2], work.channels[0])
    inside = torch.stack([(i >= 0) & (i < limit) for i, limit in zip(at, limits, strict=True)]).all(0)
    h, w, c = (i.clamp(0, limit - 1) for i, limit in zip(at, limits, strict=True))
    out = torch.where(inside, x[:, h, w, c], work.fill)
    if vectors is not None:
        scale, shift = vectors.to(x.dtype)
        out = out * scale + shift
    if other is not None:
        out = out + other
    out = _activated(out, work.activation)
    out[..., work.channels[1] :] = 0
    return out


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return x.relu() if activation == "relu" else x.clamp(0, 6)


def persistent(
    layers: Sequence[Layer],
    source: Tensor,
    index: Tensor,
    features: Tensor | None,
    logits: Tensor,
    *,
    kept: int | None = None,
    pixel_table: Tensor | None = None,
) -> None:
    """A whole stage, layer by layer, on the rows in ``index``: the twin of the persistent kernel.

    Every value is rounded to the dtype of the weights, as the kernel rounds it on storing.

    Args:
        source: images (N, C, H, W), uint8 or float, read through ``index`` (n,); or padded rows (n, H, W, C)
            if the stage reads the previous one.
        features: (n, H, W, C), written with value ``kept``; None if no value is kept.
        logits: (n, classes), written.
        pixel_table: (C, 256), the value of each byte; for uint8 images only.
    """
    values = {0: source}
    if any(isinstance(layer.work, Conv) and layer.work.image for layer in layers):
        images = source[index.long()]
        if pixel_table is not None:
            channel = torch.arange(images.shape[1])[:, None, None]
            images = pixel_table[channel, images.long()]
        values[0] = images.permute(0, 2, 3, 1)
    dtype = next(layer.weight.dtype for layer in layers if layer.weight is not None)
    for layer in layers:
        x = values[layer.source].to(dtype).float()
        other = None if layer.other is None else values[layer.other].float()
        work = layer.work
        if isinstance(work, Conv):
            assert layer.weight is not None
            assert layer.vectors is not None
            out = conv(work, x, other, layer.weight.float(), layer.vectors)
            if work.logits:
                logits.copy_(out[:, 0, 0])
        elif isinstance(work, Pooling):
            out = pool(work, x)
        else:
            out = elementwise(work, x, other, layer.vectors)
        values[layer.output] = out.to(dtype)
    if features is not None and kept is not None:
        features.copy_(values[kept])


class ResidentExit(NamedTuple):
    """The exit of one stage; see :func:`exit_head`."""

    stage_weight: float | None
    selector: str | None
    weights: MLPWeights | None = None


class ResidentStage(NamedTuple):
    """One stage.

    Attributes:
        layers: as in :func:`persistent`.
        kept: the value that the next stage reads; None if that reads the image.
        mirror: whether the stage reads the mirror image.
    """

    layers: Sequence[Layer]
    kept: int | None
    mirror: bool = False


def resident(
    stages: Sequence[ResidentStage],
    exits: Sequence[ResidentExit],
    images: Tensor,
    tables: ExitTables,
    thresholds: Sequence[float],
    *,
    pixel_table: Tensor | None = None,
) -> Tensor:
    """The first stages of a cascade, exits included: the twin of the resident kernel.

    Args:
        tables: as before the first stage; written.
        thresholds: one per selector.
        pixel_table: (C, 256), the value of each byte; for uint8 images only.

    Returns:
        (m,) the images that stay active, in order.
    """
    index, source = torch.arange(len(images)), images
    mirrored = images.flip(3)
    for k, ((layers, kept, mirror), how) in enumerate(zip(stages, exits, strict=True)):
        work = [layer.work for layer in layers]
        reads_images = any(isinstance(w, Conv) and w.image for w in work)
        classes = next(w.out[2] for w in work if isinstance(w, Conv) and w.logits)
        shapes = {layer.output: layer.work.out for layer in layers}
        dtype = next(layer.weight.dtype for layer in layers if layer.weight is not None)
        logits = torch.empty(len(index), classes)
        features = None if kept is None else torch.empty(len(index), *shapes[kept], dtype=dtype)
        rows = (mirrored if mirror else images) if reads_images else source
        persistent(layers, rows, index, features, logits, kept=kept, pixel_table=pixel_table)
        stays = exit_head(
            tables,
            logits,
            index,
            k,
            **how._asdict(),
            threshold=0.0 if how.selector is None else float(thresholds[k]),
        )
        index = index[stays]
        source = source if features is None else features[stays]
    return index
