"""A cascade written by hand over a runtime: run a stage, score, gather the survivors, run the next.

Everything between the networks is NumPy. The number of survivors changes with every batch, so how they are
cut into micro-batches and padded is tuned for each stage.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bench.peers import WHOLE, Peer, Schedule, make_peer
from fastcascade import Cascade, MLPSelector, ThresholdSelector

__all__ = ["PeerCascade"]

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(log-probabilities (n, C), agreement (n,)) → stop scores (n,)."""


class PeerCascade:
    """A cascade of independent networks, each stage on the same runtime.

    Args:
        peer: name of the runtime.
        cascade: every stage must read the image.
        thresholds: (K−1,) stop thresholds.
    """

    def __init__(self, peer: str, cascade: Cascade, thresholds: np.ndarray, threads: int) -> None:
        if any(cascade.stage(k).input != "image" for k in _indices(cascade)):
            raise ValueError("the hand-written cascade is for networks that all read the image")
        self.stage_weights = cascade.stage_weights
        self.temperatures = cascade.temperatures.tolist()
        self.peers: list[Peer] = []
        for k in _indices(cascade):
            self.peers.append(make_peer(peer))
            self.peers[k].build(cascade.stage(k).module, cascade.input.shape, threads)
        self.scores = [_score(cascade, k) for k in range(len(self.peers) - 1)]
        self.thresholds = thresholds

    def run(self, x: np.ndarray, schedules: tuple[Schedule, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities (N, C) and exits (N,) of x (N, C, H, W) float32."""
        log_probs = np.empty((len(x), 0), np.float32)
        exits = np.zeros(len(x), np.int64)
        active, images = np.arange(len(x)), x
        label, total = np.full(len(x), -1), np.full((len(x), 1), -np.inf, np.float32)
        for k, (peer, schedule) in enumerate(zip(self.peers, schedules, strict=True)):
            own = _log_softmax(peer.run(images, schedule) / np.float32(self.temperatures[k]))
            if k == 0:
                log_probs = np.empty_like(own)
            previous, label = label, own.argmax(1)
            weight = self.stage_weights[k]
            if weight is not None:
                total = np.logaddexp(total, own + np.float32(np.log(weight)))
                own = total - np.float32(np.log(sum(self.stage_weights[: k + 1])))
            log_probs[active], exits[active] = own, k
            if k == len(self.scores):
                break
            keep = self.scores[k](own, label == previous) < self.thresholds[k]
            active, label, total = active[keep], label[keep], total[keep]
            if len(active) == 0:
                break
            images = x[active]
        return log_probs, exits

    def schedules(self, k: int, survivors: int) -> list[Schedule]:
        """Ways of cutting about this many survivors at stage k.

        All rows at once, or micro-batches on one stream or one per thread; for fixed shapes, for a ladder of
        shapes, or for any shape. Stage 0 reads whole batches, whose shape never changes.
        """
        whole, *cut = self.peers[k].schedules(survivors)
        if k == 0:
            return [whole, *cut]
        shapes = self.peers[k].shapes
        return [
            *(Schedule(1, WHOLE, shape) for shape in shapes if shape != "fixed"),
            *(schedule._replace(shapes=shape) for schedule in cut for shape in shapes),
        ]


def _indices(cascade: Cascade) -> range:
    return range(len(cascade.stages))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = logits - logits.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted


def _log_odds(log_probs: np.ndarray, rows: np.ndarray, column: np.ndarray) -> np.ndarray:
    others = log_probs.copy()
    others[rows, column] = -np.inf
    top = others.max(1)
    odds: np.ndarray = log_probs[rows, column] - top - np.log(np.exp(others - top[:, None]).sum(1))
    return odds.clip(-30, 30)


def _top_log_odds(log_probs: np.ndarray, count: int) -> list[np.ndarray]:
    rows = np.arange(len(log_probs))
    order = np.argsort(-log_probs, 1, kind="stable")[:, :count]
    return [_log_odds(log_probs, rows, order[:, i]) for i in range(count)]


def _entropy(log_probs: np.ndarray) -> np.ndarray:
    entropy: np.ndarray = -(np.exp(log_probs) * log_probs).sum(1)
    return entropy


def _score(cascade: Cascade, k: int) -> Score:
    """Stage k's selector in NumPy."""
    selector = cascade.selector
    if isinstance(selector, ThresholdSelector):
        return _threshold_score(selector.score)
    assert isinstance(selector, MLPSelector)
    kind = selector.features
    with torch.no_grad():
        mean, std, w1, b1, w2, b2 = (w.numpy().copy() for w in selector.weights(k))
    # (x − mean)/std is folded into the first layer.
    first = (w1 / std).T.copy()
    bias = b1 - (w1 / std) @ mean

    def score(log_probs: np.ndarray, agreement: np.ndarray) -> np.ndarray:
        if kind == "probs":
            features = np.exp(log_probs)
        elif kind == "topk":
            features = np.stack([*_top_log_odds(log_probs, 3), agreement], 1)
        else:
            features = np.stack([*_top_log_odds(log_probs, 2), _entropy(log_probs), agreement], 1)
        scores: np.ndarray = np.maximum(features @ first + bias, 0) @ w2 + b2
        return scores

    return score


def _threshold_score(kind: str) -> Score:
    if kind == "entropy":
        return lambda log_probs, _: -_entropy(log_probs)
    if kind == "max_prob":
        return lambda log_probs, _: _top_log_odds(log_probs, 1)[0]

    def margin(log_probs: np.ndarray, _: np.ndarray) -> np.ndarray:
        top = np.partition(log_probs, -2, axis=1)
        return top[:, -1] - top[:, -2]

    return margin
