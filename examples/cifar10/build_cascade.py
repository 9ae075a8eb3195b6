"""Build the example's cascade from its trained networks: row of stages, selector, operating points.

    python examples/cifar10/build_cascade.py cifar10:data --run examples/cifar10/run

Of the 5,000 held-out training images, the first half fits temperatures and selector, the second half the
thresholds. The row of stages and their weights in the combined probabilities are chosen among a few, by
threshold rules on random thirds of all 5,000. The test images take no part.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from itertools import permutations, product
from pathlib import Path

import numpy as np
import torch
from measure import SPLITS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_stages import NORMALIZE, TRAIN_IMAGES, WEIGHTS, trained_network

import fastcascade as fc
from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.evaluation.calibration import find_thresholds
from fastcascade.evaluation.evaluation import Trace
from fastcascade.evaluation.logits import collect_logits
from fastcascade.evaluation.temperature import fit_temperatures
from fastcascade.model.registry import build_network
from fastcascade.training.refit import fit_selector
from fastcascade.types import Combine

HERE = Path(__file__).parent
POOL = tuple(f"{kind}pooled_net:{width}" for width in (16, 32, 64) for kind in ("", "mirrored_"))
"""Registry names of what a row may use: each trained network, on the image and on the mirrored image."""

Key = tuple[str, str]
"""A trained stage: the phase of train_stages.py that made it, "first" or "second", and a name of the pool."""

BUDGETS = {"fast": 20e6, "default": 50.6e6, "accurate": 100e6}
"""Mean MACs per image. 50.6 M is a fifth of ResNet-110's 253 M."""

SMALL_WEIGHTS = ((1, 1), (0.1, 0.4), (0.3, 0.7))
"""Of the first two stages in the combined probabilities, beside 1 for the large ones."""

SEEDS = range(2)

TEST_IMAGES = 10_000
QUANTILE = 1.645
"""Of the normal distribution at 95 %, one-sided."""


def trained_stages(run: Path) -> dict[Key, fc.Stage]:
    """The stages that train_stages.py has finished."""
    stages: dict[Key, fc.Stage] = {}
    for phase, name in product(("first", "second"), POOL):
        folder = run / phase / name.removeprefix("mirrored_").replace(":", "-")
        if (folder / WEIGHTS).exists():
            network = build_network(name, 10)
            trained = trained_network(folder).state_dict()
            (network.network if name.startswith("mirrored") else network).load_state_dict(trained)
            continued = phase == "first" and (run / "second" / folder.name / WEIGHTS).exists()
            stage_name = name.replace("_net:", "-") + "-first" * continued
            stages[phase, name] = fc.Stage(network, name=stage_name)
    return stages


def rows_of(stages: Collection[Key]) -> list[tuple[Key, ...]]:
    """The rows to compare: small networks of the last phase, the large one, and it or its like mirrored.

    A large network of the first phase errs otherwise than the one that came from it, so both together may do
    better than one on both directions (snapshot ensembles, Huang et al., ICLR 2017).
    """
    newest = {name: phase for phase, name in sorted(stages)}
    small = [[(newest[name], name) for name in POOL if name.endswith(width)] for width in (":16", ":32")]
    large = (newest["pooled_net:64"], "pooled_net:64")
    seconds = [key for key in stages if key[1] == "mirrored_pooled_net:64"]
    tails = [(large, *some) for n in (1, 2) for some in permutations(seconds, n)]
    return [(*row, *tail) for row, tail in product(product(*small), tails)]


def cascade_of(
    stages: list[fc.Stage], selector: nn.Module | str, combine: Combine, classes: tuple[str, ...] | None
) -> fc.Cascade:
    return fc.Cascade(
        stages,
        selector,
        10,
        (3, 32, 32),
        combine=combine,
        preprocess=NORMALIZE,
        classes=classes,
    )


def held_out_accuracy(cascade: fc.Cascade, logits: Tensor, labels: Tensor) -> list[float]:
    """Per budget, the mean over splits: two thirds fit temperatures and thresholds, one third judges."""
    found: dict[str, list[float]] = {name: [] for name in BUDGETS}
    for seed in SEEDS:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
        fitted, judged = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
        cascade.temperatures.copy_(fit_temperatures(logits[:, fitted], labels[fitted]))
        search = Trace.from_logits(cascade, logits[:, fitted], labels[fitted])
        judge = Trace.from_logits(cascade, logits[:, judged], labels[judged])
        for name, macs in BUDGETS.items():
            found[name].append(judge.run(find_thresholds(search, budget_macs=macs)).accuracy)
    return [float(np.mean(accuracies)) for accuracies in found.values()]


def calibrate_within(cascade: fc.Cascade, seen: Trace, name: str, budget: float) -> None:
    """Calibrate for less than the budget, so that the test images stay within it at 95 % confidence.

    The mean costs of the images seen and of the test images differ by chance, by a standard error of
    σ·√(1/n + 1/n_test) for costs of standard deviation σ.
    """
    target = budget
    while True:
        point = fc.calibrate(cascade, seen, name=name, budget_macs=target)
        costs = seen.exit_macs[seen.exits(point)]
        error = float(costs.std()) * (1 / seen.n + 1 / TEST_IMAGES) ** 0.5
        excess = point.mean_macs + QUANTILE * error - budget
        if excess <= 0:
            return
        target = point.mean_macs - excess


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="CIFAR-10, for example cifar10:data")
    parser.add_argument("--run", type=Path, default=HERE / "run", help="written by train_stages.py")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    arguments = parser.parse_args()
    data = load_data(arguments.source, "train")
    images, labels = arrays(data.take(range(TRAIN_IMAGES, len(data))), 10)
    assert labels is not None
    stages = trained_stages(arguments.run)
    pool = cascade_of(list(stages.values()), fc.ThresholdSelector("margin"), "last", data.classes)
    logits = dict(
        zip(stages, collect_logits(pool, images.movedim(-1, 1), compiled=True, progress=True), strict=True)
    )
    table = Table("stages", "combine", *(f"≤ {macs / 1e6:g} M MACs" for macs in BUDGETS.values()))
    scores: dict[tuple[tuple[Key, ...], Combine], float] = {}
    for row, weights in product(rows_of(stages), SMALL_WEIGHTS):
        combine = (*weights, *(1 for _ in row[2:]))
        rule = cascade_of([stages[key] for key in row], fc.ThresholdSelector("margin"), combine, data.classes)
        accuracies = held_out_accuracy(rule, torch.stack([logits[key] for key in row]), labels)
        scores[row, combine] = sum(accuracies)
        described = " ".join(f"{name} ({phase})" for phase, name in row)
        table.add_row(described, str(combine), *(f"{accuracy:.2%}" for accuracy in accuracies))
    row, combine = max(scores, key=lambda way: scores[way])
    Console().print(table, f"chosen: {row}, {combine}")

    parts = {name: slice(begin - TRAIN_IMAGES, end - TRAIN_IMAGES) for name, (begin, end) in SPLITS.items()}
    fitted, calibrated = parts["validation"], parts["calibration"]
    cascade = cascade_of([stages[key] for key in row], "auto", combine, data.classes)
    said = torch.stack([logits[key] for key in row])
    fit_selector(cascade, said[:, fitted], labels[fitted])
    seen = Trace.from_logits(cascade, said[:, calibrated], labels[calibrated])
    for name, macs in BUDGETS.items():
        calibrate_within(cascade, seen, name, macs)
    cascade.save(arguments.out, overwrite=True, half=True)
    for point in cascade.operating_points.values():
        print(point)
    print(cascade.selector, cascade.temperatures, cascade.comparison)


if __name__ == "__main__":
    main()
