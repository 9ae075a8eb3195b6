"""The exit head in one launch: log-softmax, combination, features, selector, decision, retirement.

Each program handles BLOCK_ROWS active rows. It passes over their classes in tiles of BLOCK_CLASSES, so any
class count fits: once for the log-sum-exp, once for the selector, once to write. The second and third pass
hit L1 or L2. The number of active rows is read from device memory; programs beyond it return.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcascade.kernels.argument_checks import Keep, check_exit_head
from fastcascade.kernels.reference import LOG_ODDS_LIMIT, ExitTables, MLPWeights
from fastcascade.kernels.triton.launch import launch

__all__ = ["ExitTile", "Keep", "exit_head", "exit_tile", "new_keep"]

LIMIT = tl.constexpr(LOG_ODDS_LIMIT)


class ExitTile(NamedTuple):
    """Tile sizes of the exit head."""

    rows: int
    classes: int


def exit_tile(num_classes: int) -> ExitTile:
    """Tile sizes for a class count: about 2,048 scores, which fit in registers.

    Half as many for long rows that are not 16-byte aligned, because each score then needs its own address.

    Example:
        >>> exit_tile(10), exit_tile(1000), exit_tile(1001)
        (ExitTile(rows=64, classes=16), ExitTile(rows=16, classes=128), ExitTile(rows=16, classes=64))
    """
    classes = min(max(triton.next_power_of_2(num_classes), 16), 128)
    rows = min(max(2048 // classes, 16), 64)
    return ExitTile(rows, 64 if num_classes > 128 and num_classes % 8 else classes)


def new_keep(capacity: int, num_classes: int, device: torch.device | str) -> Keep:
    """An uninitialised :class:`Keep` for up to ``capacity`` active rows."""
    rows = exit_tile(num_classes).rows
    return Keep(
        torch.empty(capacity, dtype=torch.int8, device=device),
        torch.empty(triton.cdiv(capacity, rows), dtype=torch.int32, device=device),
        rows,
    )


@triton.jit
def _load_scores(logits, row_offset, live, column, CLASSES: tl.constexpr):
    """(BLOCK_ROWS, BLOCK_CLASSES) f32 logits; −inf beyond the active rows and the classes."""
    mask = live[:, None] & (column < CLASSES)[None, :]
    return tl.load(logits + row_offset[:, None] + column[None, :], mask=mask, other=float("-inf")).to(
        tl.float32
    )


@triton.jit
def _normaliser(logits, row_offset, live, BLOCK_CLASSES: tl.constexpr, CLASSES: tl.constexpr):
    """Per row: the largest logit, log Σ exp(logit − largest), and whether all logits are finite."""
    largest = tl.full(row_offset.shape, float("-inf"), tl.float32)
    total = tl.zeros(row_offset.shape, tl.float32)
    bad = tl.zeros(row_offset.shape, tl.int32)
    for start in tl.range(0, CLASSES, BLOCK_CLASSES):
        column = start + tl.arange(0, BLOCK_CLASSES)
        x = _load_scores(logits, row_offset, live, column, CLASSES)
        real = live[:, None] & (column < CLASSES)[None, :]
        finite = tl.abs(x) < float("inf")  # false for NaN too
        bad += tl.sum((real & (finite == 0)).to(tl.int32), 1)
        new = tl.maximum(largest, tl.max(x, 1))
        shift = tl.where(new > float("-inf"), new, 0.0)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        largest = new
    return largest, tl.log(total), live & (bad == 0)


@triton.jit
def _combined(
    own,
    log_sum,
    origin,
    valid,
    stage_weight,
    log_weight_sum,
    column,
    MEAN: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """(log q, the new log Σ w p), where ``own`` is log p of this stage; without MEAN, both are ``own``."""
    if MEAN:
        mask = valid[:, None] & (column < CLASSES)[None, :]
        old = tl.load(log_sum + origin[:, None] * CLASSES + column[None, :], mask=mask, other=float("-inf"))
        weighted = own + tl.log(stage_weight)
        high = tl.maximum(old, weighted)
        shift = tl.where(high > float("-inf"), high, 0.0)
        new = shift + tl.log(tl.exp(old - shift) + tl.exp(weighted - shift))
        return new - log_weight_sum[:, None], new
    else:
        return own, own


@triton.jit
def _insert(top1, top2, top3, value):
    """Insert a value into a descending triple; returns the triple and the value that it drops."""
    first = tl.maximum(top1, value)
    value = tl.minimum(top1, value)
    second = tl.maximum(top2, value)
    value = tl.minimum(top2, value)
    third = tl.maximum(top3, value)
    return first, second, third, tl.minimum(top3, value)


@triton.jit
def _exp_relative(value, base):
    """exp(value − base); 0 if value is −inf, even if base is too."""
    return tl.where(value > float("-inf"), tl.exp(value - base), 0.0)


@triton.jit
def _merge_tile(top1, top2, top3, rest, label, scores, column, TOP: tl.constexpr):
    """Merge one tile of log-probabilities into the running top three, the sum of the others, and the label.

    ``rest`` is Σ exp(log q − top1) over all but the top TOP classes. It never contains the class whose
    log-odds are computed from it, so nothing has to be subtracted.
    """
    low = float("-inf")
    best1 = tl.max(scores, 1)
    at = tl.argmax(scores, 1)
    label = tl.where(best1 > top1, tl.min(column) + at, label)  # ties: the lowest class
    scores = tl.where(column[None, :] == (tl.min(column) + at)[:, None], low, scores)
    best2 = tl.full(best1.shape, low, tl.float32)
    best3 = tl.full(best1.shape, low, tl.float32)
    if TOP > 1:
        best2 = tl.max(scores, 1)
        at = tl.argmax(scores, 1)
        scores = tl.where(column[None, :] == (tl.min(column) + at)[:, None], low, scores)
    if TOP > 2:
        best3 = tl.max(scores, 1)
        at = tl.argmax(scores, 1)
        scores = tl.where(column[None, :] == (tl.min(column) + at)[:, None], low, scores)

    base = tl.maximum(top1, best1)
    rest = rest * _exp_relative(top1, base) + tl.sum(_exp_relative(scores, base[:, None]), 1)
    if TOP == 1:
        rest += _exp_relative(tl.minimum(top1, best1), base)
        return base, best2, best3, rest, label
    elif TOP == 2:
        # Only two are kept; the third place is the value that the pair drops.
        top1, top2, out, _ = _insert(top1, top2, best3, best1)
        rest += _exp_relative(out, base)
        top1, top2, out, _ = _insert(top1, top2, best3, best2)
        rest += _exp_relative(out, base)
        return top1, top2, best3, rest, label
    else:
        top1, top2, top3, out = _insert(top1, top2, top3, best1)
        rest += _exp_relative(out, base)
        top1, top2, top3, out = _insert(top1, top2, top3, best2)
        rest += _exp_relative(out, base)
        top1, top2, top3, out = _insert(top1, top2, top3, best3)
        rest += _exp_relative(out, base)
        return top1, top2, top3, rest, label


@triton.jit
def _log_odds(lead, others):
    """lead − log(others), clamped; others = 0 gives the upper limit."""
    odds = lead - tl.log(others)
    return tl.minimum(tl.maximum(odds, -LIMIT), LIMIT)


@triton.jit
def _hidden_input(value, f, mean, std, w1, unit, HIDDEN: tl.constexpr, FEATURES: tl.constexpr):
    """The contribution of feature f (BLOCK_ROWS,) to the hidden units (BLOCK_ROWS, BLOCK_HIDDEN)."""
    weight = tl.load(w1 + unit * FEATURES + f, mask=unit < HIDDEN, other=0.0)
    return ((value - tl.load(mean + f)) / tl.load(std + f))[:, None] * weight[None, :]


@triton.jit
def exit_rows(
    logits, row_offset, live, origin,
    log_sum, weight_sum, previous_label, out_log_probs, out_label, out_stage,
    threshold, mean, std, w1, b1, w2, b2, stage, stage_weight,
    SELECTOR: tl.constexpr, MEAN: tl.constexpr, CLASSES: tl.constexpr, FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """The exit head on a block of rows; returns which of them stop.

    Args:
        logits, row_offset (rows,): row r's logits start at logits + row_offset[r].
        live (rows,): which rows are active; origin (rows,) int64: their positions in the batch.
        log_sum … out_stage: the ExitTables.
        threshold, mean … b2: device memory; a confidence score reads no weights.
        stage_weight: weight of this stage in the mean; unused without MEAN.
        SELECTOR: the name of a built-in selector, or "last" at the last exit.
    """
    TOP: tl.constexpr = 3 if SELECTOR == "topk" else (2 if SELECTOR == "stats" or SELECTOR == "margin" else 1)
    largest, log_total, valid = _normaliser(logits, row_offset, live, BLOCK_CLASSES, CLASSES)
    log_weight_sum = tl.zeros(largest.shape, tl.float32)
    total = log_weight_sum
    if MEAN:
        total = tl.load(weight_sum + origin, mask=live, other=0.0) + tl.where(valid, stage_weight, 0.0)
        log_weight_sum = tl.log(total)

    # Selector: one pass over the classes.
    low = tl.full(largest.shape, float("-inf"), tl.float32)
    top1, top2, top3 = low, low, low
    own1, own2, own3 = low, low, low
    rest = tl.zeros(largest.shape, tl.float32)
    own_rest = tl.zeros(largest.shape, tl.float32)
    label = tl.zeros(largest.shape, tl.int32)
    own_label = tl.zeros(largest.shape, tl.int32)
    entropy = tl.zeros(largest.shape, tl.float32)
    unit = tl.arange(0, BLOCK_HIDDEN)
    hidden = tl.zeros([largest.shape[0], BLOCK_HIDDEN], tl.float32)
    for start in tl.range(0, CLASSES, BLOCK_CLASSES):
        column = start + tl.arange(0, BLOCK_CLASSES)
        own = (_load_scores(logits, row_offset, live, column, CLASSES) - largest[:, None]) - log_total[
            :, None
        ]
        # The scores of other rows are unused; zeros keep NaN out of them.
        own = tl.where(valid[:, None], own, 0.0)
        scores, _ = _combined(
            own, log_sum, origin, valid, stage_weight, log_weight_sum, column, MEAN, CLASSES
        )
        if MEAN:
            own1, own2, own3, own_rest, own_label = _merge_tile(
                own1, own2, own3, own_rest, own_label, own, column, 1
            )
        top1, top2, top3, rest, label = _merge_tile(top1, top2, top3, rest, label, scores, column, TOP)
        if SELECTOR == "entropy" or SELECTOR == "stats":
            entropy -= tl.sum(tl.where(scores > float("-inf"), tl.exp(scores) * scores, 0.0), 1)
        if SELECTOR == "probs":
            # Transposed: tl.dot needs the classes as the first axis of the weights.
            real = column < CLASSES
            centre = tl.load(mean + column, mask=real, other=0.0)
            scale = tl.load(std + column, mask=real, other=1.0)
            weight = tl.load(
                w1 + unit[None, :] * FEATURES + column[:, None],
                mask=real[:, None] & (unit < HIDDEN)[None, :],
                other=0.0,
            )
            feature = (tl.exp(scores) - centre[None, :]) / scale[None, :]
            hidden += tl.dot(feature, weight, input_precision="ieee")
    if not MEAN:
        own_label = label

    stop = live
    if SELECTOR != "last":
        agreement = (own_label == tl.load(previous_label + origin, mask=live, other=-1)).to(tl.float32)
        second = tl.exp(top2 - top1)
        third = tl.exp(top3 - top1)
        if SELECTOR == "max_prob":
            score = _log_odds(tl.zeros(top1.shape, tl.float32), rest)
        elif SELECTOR == "margin":
            score = top1 - top2
        elif SELECTOR == "entropy":
            score = -entropy
        else:
            if SELECTOR == "stats":
                odds1 = _log_odds(tl.zeros(top1.shape, tl.float32), second + rest)
                odds2 = _log_odds(top2 - top1, 1.0 + rest)
                hidden += _hidden_input(odds1, 0, mean, std, w1, unit, HIDDEN, FEATURES)
                hidden += _hidden_input(odds2, 1, mean, std, w1, unit, HIDDEN, FEATURES)
                hidden += _hidden_input(entropy, 2, mean, std, w1, unit, HIDDEN, FEATURES)
                hidden += _hidden_input(agreement, 3, mean, std, w1, unit, HIDDEN, FEATURES)
            elif SELECTOR == "topk":
                odds1 = _log_odds(tl.zeros(top1.shape, tl.float32), second + third + rest)
                odds2 = _log_odds(top2 - top1, 1.0 + third + rest)
                odds3 = _log_odds(top3 - top1, 1.0 + second + rest)
                hidden += _hidden_input(odds1, 0, mean, std, w1, unit, HIDDEN, FEATURES)
                hidden += _hidden_input(odds2, 1, mean, std, w1, unit, HIDDEN, FEATURES)
                hidden += _hidden_input(odds3, 2, mean, std, w1, unit, HIDDEN, FEATURES)
                hidden += _hidden_input(agreement, 3, mean, std, w1, unit, HIDDEN, FEATURES)
            hidden += tl.load(b1 + unit, mask=unit < HIDDEN, other=0.0)[None, :]
            out_weight = tl.load(w2 + unit, mask=unit < HIDDEN, other=0.0)
            score = tl.sum(tl.maximum(hidden, 0.0) * out_weight[None, :], 1) + tl.load(b2)
        stop = valid & (score >= tl.load(threshold))

    # Write the results of the rows that stop, and the state of all rows. Several threads may hold a row, each
    # with its own loads: none may store where another has yet to load.
    tl.debug_barrier()
    if MEAN:
        tl.store(weight_sum + origin, total, mask=live)
    tl.store(previous_label + origin, tl.where(valid, own_label, -1), mask=live)
    tl.store(out_label + origin, tl.where(valid, label, -1).to(tl.int64), mask=stop)
    tl.store(out_stage + origin, tl.zeros(origin.shape, tl.int64) + stage, mask=stop)
    for start in tl.range(0, CLASSES, BLOCK_CLASSES):
        column = start + tl.arange(0, BLOCK_CLASSES)
        own = (_load_scores(logits, row_offset, live, column, CLASSES) - largest[:, None]) - log_total[
            :, None
        ]
        scores, new_sum = _combined(
            own, log_sum, origin, valid, stage_weight, log_weight_sum, column, MEAN, CLASSES
        )
        cell = origin[:, None] * CLASSES + column[None, :]
        real = (column < CLASSES)[None, :]
        if MEAN:
            tl.debug_barrier()  # as above
            tl.store(log_sum + cell, new_sum, mask=valid[:, None] & real)
        scores = tl.where(valid[:, None], scores, float("nan"))
        tl.store(out_log_probs + cell, scores, mask=stop[:, None] & real)
    return stop


@triton.jit(do_not_specialize=["stage"], do_not_specialize_on_alignment=["threshold"])
def exit_head_kernel(
    logits, index, count,
    log_sum, weight_sum, previous_label, out_log_probs, out_label, out_stage,
    threshold, mean, std, w1, b1, w2, b2, keep, block_counts, stage, stage_weight,
    SELECTOR: tl.constexpr, MEAN: tl.constexpr, CLASSES: tl.constexpr, FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    n = tl.load(count)
    if block * BLOCK_ROWS >= n:
        tl.store(block_counts + block, 0)
        return
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < n
    origin = tl.load(index + row, mask=live, other=0).to(tl.int64)
    stop = exit_rows(
        logits, row.to(tl.int64) * CLASSES, live, origin,
        log_sum, weight_sum, previous_label, out_log_probs, out_label, out_stage,
        threshold, mean, std, w1, b1, w2, b2, stage, stage_weight,
        SELECTOR, MEAN, CLASSES, FEATURES, HIDDEN, BLOCK_HIDDEN, BLOCK_CLASSES,
    )  # fmt: skip
    stays = (live & (stop == 0)).to(tl.int32)
    tl.store(keep + row, stays.to(tl.int8), mask=live)
    tl.store(block_counts + block, tl.sum(stays, 0))


class SelectorArguments(NamedTuple):
    """The weight pointers and constants of a selector, as the kernel takes them."""

    pointers: tuple[Tensor, ...]
    features: int
    hidden: int
    block_hidden: int


def selector_arguments(weights: MLPWeights | None, placeholder: Tensor) -> SelectorArguments:
    """Kernel arguments of a selector; without weights, the pointers are a placeholder that is never read."""
    if weights is None:
        return SelectorArguments((placeholder,) * 6, features=4, hidden=1, block_hidden=16)
    hidden, num_features = weights.w1.shape
    return SelectorArguments(tuple(weights), num_features, hidden, max(triton.next_power_of_2(hidden), 16))


def exit_head(
    tables: ExitTables,
    logits: Tensor,
    index: Tensor,
    count: Tensor,
    stage: int,
    keep: Keep,
    *,
    stage_weight: float | None,
    selector: str | None,
    weights: MLPWeights | None = None,
    threshold: Tensor | None = None,
) -> None:
    """The exit head on the first ``count`` active rows, without synchronising with the host.

    Args:
        tables: as in the twin, float32; without a ``stage_weight``, ``log_sum`` and ``weight_sum`` are
            unused.
        logits: (capacity, C) contiguous, fp16, bf16 or fp32; rows from ``count`` on are not read.
        index: (capacity,) int32 positions in the batch; count: (1,) int32.
        keep: written; see :class:`~fastcascade.kernels.argument_checks.Keep`.
        stage_weight, selector, weights: as in the twin; the weights are float32 on the device.
        threshold: (1,) float32 on the device; None at the last exit.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, strides or device.
        RuntimeError: the kernel does not compile or launch.

    Example:
        keep = new_keep(len(logits), 10, logits.device)
        exit_head(tables, logits, index, count, 0, keep, stage_weight=None, selector="margin", threshold=t)
    """
    capacity, num_classes = logits.shape
    tile = exit_tile(num_classes)
    check_exit_head(tables, logits, index, count, keep, tile.rows, selector, weights, threshold)
    if capacity == 0:
        return
    arguments = selector_arguments(weights, logits)
    launch(
        exit_head_kernel, (triton.cdiv(capacity, tile.rows),),
        logits, index, count, *tables, index if threshold is None else threshold, *arguments.pointers,
        keep.flags, keep.counts, stage, 0.0 if stage_weight is None else stage_weight,
        SELECTOR=selector or "last", MEAN=stage_weight is not None, CLASSES=num_classes,
        FEATURES=arguments.features, HIDDEN=arguments.hidden, BLOCK_HIDDEN=arguments.block_hidden,
        BLOCK_ROWS=tile.rows, BLOCK_CLASSES=tile.classes, num_warps=4,
    )  # fmt: skip
