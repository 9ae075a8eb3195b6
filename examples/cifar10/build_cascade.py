"""Build the example's cascade from its trained networks: combine, temperatures, selector, operating points.

    python examples/cifar10/build_cascade.py cifar10:data --run examples/cifar10/run

Of the 5,000 held-out training images, the first half fits temperatures and selector, the second half the
thresholds. The weights of the stages in the combined probabilities are chosen among a few, by threshold rules
on random thirds of all 5,000. The test images take no part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from measure import SPLITS
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from train_stages import NORMALIZE, TRAIN_IMAGES

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
STAGES = ("pooled_net:16", "pooled_net:32", "pooled_net:64", "mirrored_pooled_net:64")
"""Registry names. The last stage is the third network again, on the mirrored image."""

BUDGETS = {"fast": 20e6, "default": 50.6e6, "accurate": 100e6}
"""Mean MACs per image. 50.6 M is a fifth of ResNet-110's 253 M."""

COMBINES: tuple[Combine, ...] = ("last", "mean", (0.1, 0.4, 1, 1), (0.3, 0.7, 1, 1))
SEEDS = range(2)


def trained_stages(run: Path) -> list[fc.Stage]:
    """The stages with the weights that train_stages.py left in ``run``."""
    stages = []
    for name in STAGES:
        network = build_network(name, 10)
        trained = network.network if name.startswith("mirrored") else network
        folder = run / name.removeprefix("mirrored_").replace(":", "-")
        weights = load_file(folder / "weights.safetensors")
        trained.load_state_dict(
            {key: w.float() if w.is_floating_point() else w for key, w in weights.items()}
        )
        stages.append(fc.Stage(network, name=name.replace("_net:", "-")))
    return stages


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
    logits = collect_logits(
        cascade_of(stages, fc.ThresholdSelector("margin"), "last", data.classes),
        images.movedim(-1, 1),
        compiled=True,
        progress=True,
    )
    table = Table("combine", *(f"≤ {macs / 1e6:g} M MACs" for macs in BUDGETS.values()))
    scores = {}
    for combine in COMBINES:
        rule = cascade_of(stages, fc.ThresholdSelector("margin"), combine, data.classes)
        scores[combine] = held_out_accuracy(rule, logits, labels)
        table.add_row(str(combine), *(f"{accuracy:.2%}" for accuracy in scores[combine]))
    best = max(scores, key=lambda combine: sum(scores[combine]))
    Console().print(table, f"chosen: {best}")

    parts = {name: slice(begin - TRAIN_IMAGES, end - TRAIN_IMAGES) for name, (begin, end) in SPLITS.items()}
    fitted, calibrated = parts["validation"], parts["calibration"]
    cascade = cascade_of(stages, "auto", best, data.classes)
    fit_selector(cascade, logits[:, fitted], labels[fitted])
    seen = Trace.from_logits(cascade, logits[:, calibrated], labels[calibrated])
    for name, macs in BUDGETS.items():
        fc.calibrate(cascade, seen, name=name, budget_macs=macs)
    cascade.save(arguments.out, overwrite=True, half=True)
    for point in cascade.operating_points.values():
        print(point)
    print(cascade.selector, cascade.temperatures, cascade.comparison)


if __name__ == "__main__":
    main()
