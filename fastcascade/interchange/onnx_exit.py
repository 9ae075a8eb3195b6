"""The exit after a stage as ONNX nodes: the twin of ``kernels.reference.exit_step``."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastcascade.errors import LoweringError
from fastcascade.interchange.onnx_graph import BOOL, FLOAT, INT32, GraphBuilder
from fastcascade.kernels.reference import LOG_ODDS_LIMIT
from fastcascade.lowering.plan import SelectorPlan

__all__ = ["Exit", "ExitState", "add_exit", "finite_rows", "first_state"]

_TINY_LOG = -1e30
"""Stands for log 0 in sums, where −∞ − (−∞) would be NaN."""


class ExitState(NamedTuple):
    """What an exit reads of the exits before it, as names of values.

    ``log_sum`` (N, C) log Σ w_j p_j and ``weight_sum`` (N, 1) Σ w_j over the valid stages so far;
    ``previous_label`` (N,) int64, −1 if the previous stage was invalid.
    """

    log_sum: str
    weight_sum: str
    previous_label: str


class Exit(NamedTuple):
    """What an exit computes, as names of values.

    ``log_probs`` (N, C) float32 and ``label`` (N,) int64 of the rows that stop here; NaN and −1 if invalid.
    ``score`` (N,) float32 stop scores, NaN for rows that cannot stop; None at the last exit.
    """

    log_probs: str
    label: str
    score: str | None
    state: ExitState


def first_state(graph: GraphBuilder, num_classes: int) -> ExitState:
    """The state of one row before the first stage."""
    log_sum = graph.constant(np.full((1, num_classes), -math.inf))
    return ExitState(log_sum, graph.constant(np.zeros((1, 1))), graph.constant([-1]))


def add_exit(
    graph: GraphBuilder,
    logits: str,
    clean: str,
    state: ExitState,
    selector: SelectorPlan | None,
    stage_weight: float | None,
    num_classes: int,
) -> Exit:
    """Add the exit of a stage.

    Args:
        logits: (N, C) float32.
        clean: (N, 1) bool; False for a row whose input is not finite.
        stage_weight: w_k in the mean Σ w_j p_j / Σ w_j; None where q_k is p_k alone.
        selector: None at the last exit.

    Raises:
        LoweringError: the selector is a custom module.
    """
    valid = graph.add("And", clean, finite_rows(graph, logits))
    own = graph.add("LogSoftmax", logits, axis=1)
    own_label = graph.add("ArgMax", own, axis=1, keepdims=0)
    log_probs = own
    if stage_weight is not None:
        log_probs, state = _into_mean(graph, own, valid, state, stage_weight)
    uniform = graph.constant(-math.log(num_classes))
    safe = graph.add("Where", valid, log_probs, uniform)
    score = None
    if selector is not None:
        agreement = graph.add("Cast", graph.add("Equal", own_label, state.previous_label), to=FLOAT)
        value = _score(graph, selector, safe, agreement, num_classes)
        score = graph.add("Where", _squeeze(graph, valid), value, graph.constant(math.nan))
    minus_one = graph.constant(np.int64(-1))
    flat = _squeeze(graph, valid)
    label = graph.add("Where", flat, graph.add("ArgMax", safe, axis=1, keepdims=0), minus_one)
    state = state._replace(previous_label=graph.add("Where", flat, own_label, minus_one))
    return Exit(graph.add("Where", valid, log_probs, graph.constant(math.nan)), label, score, state)


def finite_rows(graph: GraphBuilder, x: str, limit: float = float(np.finfo(np.float32).max)) -> str:
    """(N, F) → (N, 1) bool: every number of the row is at most ``limit`` in magnitude, and none is NaN."""
    inside = graph.add("LessOrEqual", graph.add("Abs", x), graph.constant(limit))
    least = graph.reduce("ReduceMin", graph.add("Cast", inside, to=INT32), [1])
    return graph.add("Cast", least, to=BOOL)


def _squeeze(graph: GraphBuilder, x: str) -> str:
    return graph.add("Squeeze", x, graph.constant([1]))


def _into_mean(
    graph: GraphBuilder, own: str, valid: str, state: ExitState, weight: float
) -> tuple[str, ExitState]:
    """log of the weighted mean so far, and the state with this stage added."""
    weighted = graph.add("Add", own, graph.constant(math.log(weight)))
    larger = graph.add("Max", state.log_sum, weighted, graph.constant(_TINY_LOG))
    shares = [graph.add("Exp", graph.add("Sub", x, larger)) for x in (state.log_sum, weighted)]
    total = graph.add("Add", larger, graph.add("Log", graph.add("Add", *shares)))
    log_sum = graph.add("Where", valid, total, state.log_sum)
    added = graph.add("Where", valid, graph.constant(weight), graph.constant(0.0))
    weight_sum = graph.add("Add", state.weight_sum, added)
    mean = graph.add("Sub", log_sum, graph.add("Log", weight_sum))
    return mean, state._replace(log_sum=log_sum, weight_sum=weight_sum)


def _score(graph: GraphBuilder, selector: SelectorPlan, log_probs: str, agreement: str, classes: int) -> str:
    """(N,) stop scores."""
    match selector.kind:
        case "max_prob":
            return _squeeze(graph, _log_odds(graph, log_probs, 1, classes))
        case "margin":
            first, second = _top(graph, log_probs, 2, classes)[0]
            return _squeeze(graph, graph.add("Sub", first, second))
        case "entropy":
            return _squeeze(graph, graph.add("Neg", _entropy(graph, log_probs)))
        case "opaque":
            raise LoweringError("the selector has no ONNX form: it is a custom module")
    weights = selector.weights
    assert weights is not None
    features = _features(graph, selector.features, log_probs, agreement, classes)
    centred = graph.add("Sub", features, graph.constant(weights.mean))
    standard = graph.add("Div", centred, graph.constant(weights.std))
    hidden = graph.add("Gemm", standard, graph.constant(weights.w1), graph.constant(weights.b1), transB=1)
    bias = graph.constant(weights.b2.reshape(1))
    out = graph.add("Gemm", graph.add("Relu", hidden), graph.constant(weights.w2[None]), bias, transB=1)
    return _squeeze(graph, out)


def _features(graph: GraphBuilder, kind: str | None, log_probs: str, agreement: str, classes: int) -> str:
    if kind == "probs":
        return graph.add("Exp", log_probs)
    column = graph.add("Unsqueeze", agreement, graph.constant([1]))
    if kind == "topk":
        return graph.add("Concat", _log_odds(graph, log_probs, 3, classes), column, axis=1)
    two = _log_odds(graph, log_probs, 2, classes)
    return graph.add("Concat", two, _entropy(graph, log_probs), column, axis=1)


def _top(graph: GraphBuilder, log_probs: str, k: int, classes: int) -> tuple[list[str], list[str]]:
    """The k largest log-probabilities, each (N, 1), and for each a (N, C) mask of its class."""
    names = [graph.new_name(), graph.new_name()]
    graph.add("TopK", log_probs, graph.constant([k]), outputs=names, axis=1)
    every = graph.constant(np.arange(classes)[None])
    values, masks = [], []
    for i in range(k):
        at = graph.constant([i])
        values.append(graph.add("Gather", names[0], at, axis=1))
        masks.append(graph.add("Equal", graph.add("Gather", names[1], at, axis=1), every))
    return values, masks


def _log_odds(graph: GraphBuilder, log_probs: str, k: int, classes: int) -> str:
    """(N, k) log q_c − log Σ_{j≠c} q_j of the k most probable classes, clamped to ±30."""
    columns = []
    for value, mask in zip(*_top(graph, log_probs, k, classes), strict=True):
        others = graph.add("Where", mask, graph.constant(_TINY_LOG), log_probs)
        largest = graph.add("Max", graph.reduce("ReduceMax", others, [1]), graph.constant(_TINY_LOG))
        shares = graph.add("Exp", graph.add("Sub", others, largest))
        total = graph.add("Add", largest, graph.add("Log", graph.reduce("ReduceSum", shares, [1])))
        columns.append(graph.add("Sub", value, total))
    limits = [graph.constant(sign * LOG_ODDS_LIMIT) for sign in (-1.0, 1.0)]
    return graph.add("Clip", graph.add("Concat", *columns, axis=1), *limits)


def _entropy(graph: GraphBuilder, log_probs: str) -> str:
    """(N, 1) in nats."""
    logs = graph.add("Max", log_probs, graph.constant(_TINY_LOG))  # 0 · −∞ would be NaN
    products = graph.add("Mul", graph.add("Exp", log_probs), logs)
    return graph.add("Neg", graph.reduce("ReduceSum", products, [1]))
