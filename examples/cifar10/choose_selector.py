"""Choose the selector of the trained stages on held-out images, then calibrate and save the cascade.

    python examples/cifar10/choose_selector.py cifar10:data --model examples/cifar10/run/model

Every way to combine the stages and to train the selector is judged on random thirds of the 5,000 held-out
images: one fits it, one finds its thresholds for each budget of config.toml, one measures accuracy. The
winner is then fitted on the validation images and calibrated on the calibration images, as ``fit`` and
``calibrate`` would do it. The test images take no part.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from study import ALPHA, with_selector
from torch import Tensor

import fastcascade as fc
from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.evaluation.calibration import find_thresholds
from fastcascade.evaluation.evaluation import Trace
from fastcascade.training.config import read_config
from fastcascade.training.objective import Objective
from fastcascade.training.refit import collect_logits, fit_selector
from fastcascade.types import Combine

HERE = Path(__file__).parent
SEEDS = range(6)


class Choice(NamedTuple):
    """A way to combine the stages' answers and to train the selector."""

    combine: Combine
    objective: Objective


COMBINES: tuple[Combine, ...] = ("last", "mean", (0.05, 0.25, 1.0), (0.1, 0.5, 1.0))
CHOICES = [Choice(*pair) for pair in product(COMBINES, ("exact", "reinforce", "imitation"))]


def held_out_accuracy(
    cascade: fc.Cascade, choice: Choice, z: Tensor, y: Tensor, budgets: list[float]
) -> float:
    """Mean accuracy over seeds and budgets in MACs; logits z (K, N, C), labels y (N,)."""
    found = []
    for seed in SEEDS:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
        fitted, calibrated, judged = order.tensor_split(3)
        fit_selector(cascade, z[:, fitted], y[fitted], choice.objective, ALPHA, seed=seed)
        search = Trace.from_logits(cascade, z[:, calibrated], y[calibrated])
        judge = Trace.from_logits(cascade, z[:, judged], y[judged])
        found += [judge.run(find_thresholds(search, budget_macs=macs)).accuracy for macs in budgets]
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="CIFAR-10, for example cifar10:data")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    arguments = parser.parse_args()
    config, trained = read_config(HERE / "config.toml"), fc.load(arguments.model)
    images, labels = arrays(load_data(arguments.source, "train"))
    assert labels is not None
    spans = [slice(*config.splits.validation), slice(*config.splits.calibration)]
    logits = [collect_logits(trained, trained.input.nchw(images[span])) for span in spans]
    z, y = torch.cat(logits, 1), torch.cat([labels[span] for span in spans])

    targets = {
        name: point.target(trained.dense_macs)["budget_macs"]
        for name, point in config.operating_points.items()
    }
    scores = {
        choice: held_out_accuracy(
            with_selector(trained, fc.MLPSelector(), choice.combine), choice, z, y, list(targets.values())
        )
        for choice in track(CHOICES, "judging", console=Console(stderr=True))
    }
    best = max(scores, key=lambda choice: scores[choice])
    cascade = with_selector(trained, fc.MLPSelector(), best.combine)
    fit_selector(cascade, logits[0], labels[spans[0]], best.objective, ALPHA)
    seen = Trace.from_logits(cascade, logits[1], labels[spans[1]])
    for name, macs in targets.items():
        fc.calibrate(cascade, seen, name=name, budget_macs=macs)
    cascade.save(arguments.model, overwrite=True)

    table = Table("combine", "objective", "held-out accuracy", "")
    for choice, score in scores.items():
        table.add_row(*map(str, choice), f"{score:.2%}", "chosen" if choice == best else "")
    Console().print(table)


if __name__ == "__main__":
    main()
