"""Does a selector that sees more than probabilities beat the margin? Rewrites a table of docs/selection.md.

    python examples/cifar10/richer_inputs.py cifar10:data

On the stages of `resnet9/` and the 15,000 images that they were not trained on, drawn anew five times: a
third fits, a third chooses the number of steps and finds the thresholds, a third judges. At every exit a
network of 16 hidden units is added to the margin, a·margin + b, and trained on the exact expectation of the
reward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from study import ALPHA, SEEDS, mean_and_spread, rewrite_document, table
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.evaluation.calibration import find_thresholds
from fastcascade.evaluation.evaluation import Trace
from fastcascade.kernels.reference import features
from fastcascade.model.store import load_cascade
from fastcascade.training.objective import exact_loss, rewards

HERE = Path(__file__).parent
HELD_OUT = slice(45_000, 50_000)
BUDGETS = (0.36, 0.45, 0.6)
STEPS = (0, 25, 50, 100, 200, 400)
WEIGHT_DECAYS = (1e-3, 1e-1)
HIDDEN = 16

Inputs = dict[str, list[Tensor]]
"""By name, one (N, F) for each exit but the last."""


@dataclass(frozen=True)
class Part:
    """Some of the images: what the stages say, what a selector may see, and what stopping earns (K, n)."""

    trace: Trace
    margin: Tensor
    inputs: Inputs
    reward: Tensor

    def at(self, rows: NDArray[np.intp]) -> Part:
        index = torch.from_numpy(rows)
        trace = replace(
            self.trace,
            labels=self.trace.labels[:, rows],
            own_labels=self.trace.own_labels[:, rows],
            scores=self.trace.scores[:, rows],
            true_labels=None if self.trace.true_labels is None else self.trace.true_labels[rows],
        )
        inputs = {name: [x[index] for x in per_exit] for name, per_exit in self.inputs.items()}
        return Part(trace, self.margin[:, index], inputs, self.reward[:, index])


@torch.no_grad()
def run_stages(cascade: fc.Cascade, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits (K, N, C), and per stage the pooled features (N, F) that its last linear layer reads."""
    pooled: list[list[Tensor]] = [[] for _ in cascade.stages]
    for stage, found in zip(cascade.stages, pooled, strict=True):
        last = [m for m in stage.modules() if isinstance(m, nn.Linear)][-1]
        last.register_forward_pre_hook(lambda _, given, found=found: found.append(given[0].clone()))
    batches = images.split(250)
    logits = [cascade.all_logits(batch) for batch in track(batches, "running the stages")]
    return torch.cat(logits, 1), [torch.cat(found) for found in pooled]


def everything(cascade: fc.Cascade, images: Tensor, labels: Tensor) -> Part:
    """All images as one part."""
    logits, pooled = run_stages(cascade, images)
    judged = cascade.judge(logits)
    own = logits.argmax(2)
    agreement = torch.stack([torch.zeros_like(own[0]), *(own[1:] == own[:-1]).long()]).float()
    log_probs = (logits / cascade.temperatures[:, None, None]).log_softmax(2)
    exits = range(len(cascade.stages) - 1)
    usual = [features("stats", judged.log_probs[k], agreement[k]) for k in exits]
    visited = [torch.cat(list(log_probs[: k + 1]), 1) for k in exits]
    inputs = {
        "its usual features": usual,
        "and the log-probabilities of all stages visited": [
            torch.cat(x, 1) for x in zip(usual, visited, strict=True)
        ],
        "and the stage's pooled features": [torch.cat([usual[k], pooled[k]], 1) for k in exits],
        "and both": [torch.cat([usual[k], visited[k], pooled[k]], 1) for k in exits],
    }
    trace = Trace.from_logits(cascade, logits, labels, "margin")
    shares = cascade.exit_macs.double() / cascade.dense_macs
    reward = rewards(judged.log_probs, labels, shares, ALPHA).float()
    return Part(trace, torch.from_numpy(trace.scores).float(), inputs, reward)


class AddedNetwork(nn.Module):
    """a·margin + b, and a network of 16 units that starts as 0."""

    def __init__(self, seen: Tensor, margin: Tensor) -> None:
        super().__init__()
        self.std, self.mean = torch.std_mean(seen, 0)
        self.std = torch.where(self.std > 1e-6, self.std, 1.0)
        self.scale = nn.Parameter(1 / margin.std())
        self.shift = nn.Parameter(-margin.mean() / margin.std())
        self.layers = nn.Sequential(
            nn.Linear(seen.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1, bias=False)
        )
        nn.init.zeros_(self.layers[2].weight)

    def forward(self, seen: Tensor, margin: Tensor) -> Tensor:
        added: Tensor = self.layers((seen - self.mean) / self.std).squeeze(1)
        return self.scale * margin + self.shift + added


@dataclass(frozen=True)
class Judged:
    """A selector's accuracy on the judging images at each budget.

    Attributes:
        chosen_by: its sum of accuracies on the images that choose among selectors.
    """

    chosen_by: float
    accuracy: list[float]


def judge_scores(
    scores_of: Callable[[Part], Tensor], found_on: Part, judged_on: Part, dense_macs: int
) -> Judged:
    """With thresholds for each budget that are found on the first part."""
    with torch.no_grad():
        calibration, test = (
            replace(part.trace, scores=scores_of(part).numpy().astype(np.float32))
            for part in (found_on, judged_on)
        )
    found = [find_thresholds(calibration, budget_macs=share * dense_macs) for share in BUDGETS]
    chosen_by = sum(calibration.run(thresholds).accuracy for thresholds in found)
    return Judged(chosen_by, [test.run(thresholds).accuracy for thresholds in found])


def trained(
    parts: tuple[Part, Part, Part], name: str, weight_decay: float, seed: int, dense_macs: int
) -> Judged:
    """The added network with as many steps as the second part likes best."""
    fitted_on, found_on, judge = parts
    torch.manual_seed(seed)
    exits = range(len(fitted_on.margin))
    networks = nn.ModuleList(AddedNetwork(fitted_on.inputs[name][k], fitted_on.margin[k]) for k in exits)

    def scores_of(part: Part) -> Tensor:
        return torch.stack([net(part.inputs[name][k], part.margin[k]) for k, net in enumerate(networks)])

    optimizer = torch.optim.AdamW(networks.parameters(), 1e-2, weight_decay=weight_decay)
    candidates = []
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            candidates.append(judge_scores(scores_of, found_on, judge, dense_macs))
        optimizer.zero_grad()
        exact_loss(scores_of(fitted_on), fitted_on.reward).backward()
        optimizer.step()
    return max(candidates, key=lambda candidate: candidate.chosen_by)


def inputs_table(cascade: fc.Cascade, all_images: Part) -> str:
    dense_macs = cascade.dense_macs
    found: dict[str, list[list[float]]] = {"the margin alone": []}
    for seed in track(SEEDS, "selectors"):
        order = np.random.default_rng(seed).permutation(all_images.trace.n)
        fit, find, judge = (all_images.at(rows) for rows in np.array_split(order, 3))
        alone = judge_scores(lambda part: part.margin, find, judge, dense_macs)
        found["the margin alone"].append(alone.accuracy)
        for name in all_images.inputs:
            candidates = [
                trained((fit, find, judge), name, decay, seed, dense_macs) for decay in WEIGHT_DECAYS
            ]
            best = max(candidates, key=lambda candidate: candidate.chosen_by)
            found.setdefault(name, []).append(best.accuracy)
    rows = [[name, *mean_and_spread(accuracy)] for name, accuracy in found.items()]
    return table(["the selector sees", *(f"≤ {share:.0%} of dense" for share in BUDGETS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="CIFAR-10, for example cifar10:data")
    arguments = parser.parse_args()
    shipped = load_cascade(HERE / "resnet9" / "model")
    cascade = fc.Cascade(
        list(shipped.stages),
        fc.ThresholdSelector("margin"),
        10,
        shipped.input.shape,
        preprocess=shipped.input.preprocess,
    ).eval()
    parts = [arrays(load_data(arguments.source, split)) for split in ("train", "test")]
    images = torch.cat([parts[0][0][HELD_OUT], parts[1][0]])
    labels = torch.cat([part[1][rows] for part, rows in zip(parts, (HELD_OUT, slice(None)), strict=True)])
    nchw = cascade.input.nchw(images)
    table_of_inputs = inputs_table(cascade, everything(cascade, nchw, labels.long()))
    print(table_of_inputs)
    rewrite_document({"inputs": table_of_inputs})


if __name__ == "__main__":
    main()
