"""What joint training adds: the same pretrained stages frozen, trained jointly, and as in the paper.

    python examples/cifar10/joint_study.py cifar10:data --work runs/joint

Trains ResNet-8, -14 and -20 on 15,000 training images (about twenty minutes on two cores; started again, it
goes on where it was), then measures each arm on the test images at matched mean cost and rewrites its table
in docs/selection.md.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from study import ALPHA, SEEDS, budget_accuracies, budget_heads, mean_and_spread, rewrite_document, table
from torch import Tensor

import fastcascade as fc
from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.evaluation.evaluation import Trace, trace
from fastcascade.model.resnet import resnet_cifar
from fastcascade.training.objective import Objective
from fastcascade.training.refit import collect_logits

DEPTHS = (8, 14, 20)
BUDGETS = (0.4, 0.6, 0.8)
"""Shares of the last network's cost; the first stage alone costs 0.3."""

TRAIN, SELECTOR, CALIBRATION = slice(0, 15000), slice(45000, 47500), slice(47500, 50000)
PRETRAINING = fc.Recipe(pretrain_epochs=16, joint_epochs=0, batch_size=128, learning_rate=0.1)
JOINT = replace(PRETRAINING, pretrain_epochs=0, joint_epochs=5, joint_learning_rate=0.01)


class Arm(NamedTuple):
    """One way to train; no joint objective leaves the stages as they were."""

    name: str
    joint: Objective | None
    refit: bool


ARMS = (
    Arm("frozen stages, selector fitted on held-out images", None, True),
    Arm("joint, exact expectation, selector refitted on held-out images", "exact", True),
    Arm("joint, REINFORCE, selector as the joint phase left it (the paper)", "reinforce", False),
)
Images = tuple[Tensor, Tensor]


def pretrained(train: Images, validation: Images, work: Path) -> fc.Cascade:
    """The three networks after classification alone."""
    torch.manual_seed(0)
    stages = [resnet_cifar(depth) for depth in DEPTHS]
    preprocess = fc.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    cascade = fc.Cascade(stages, fc.MLPSelector(), 10, (3, 32, 32), combine="mean", preprocess=preprocess)
    fc.fit(
        cascade,
        train,
        validation,
        refit_selector=False,
        checkpoint_dir=work / "stages",
        recipe=PRETRAINING,
    )
    return cascade


def trained(start: fc.Cascade, arm: Arm, train: Images, validation: Images, work: Path) -> fc.Cascade:
    """A copy of the pretrained cascade, trained as the arm says."""
    cascade = copy.deepcopy(start)
    if arm.joint is None:
        fc.fit(cascade, None, validation, alpha=ALPHA, freeze_stages=True)
        return cascade
    fc.fit(
        cascade,
        train,
        validation,
        objective=arm.joint,
        alpha=ALPHA,
        refit_selector=arm.refit,
        checkpoint_dir=work / arm.joint,
        recipe=JOINT,
    )
    return cascade


def results(cascade: fc.Cascade, calibration: Images, test: Images) -> list[str]:
    """Accuracy and MACs at the selector's own thresholds, then accuracy at each budget.

    The spread is over random halves of the calibration images.
    """
    z = collect_logits(cascade, cascade.input.nchw(calibration[0]))
    on_test = trace(cascade, test)
    own = on_test.run(cascade.thresholds())
    rows = []
    for seed in SEEDS:
        half = torch.from_numpy(np.random.default_rng(seed).permutation(z.shape[1])[: z.shape[1] // 2])
        found_on = Trace.from_logits(cascade, z[:, half], calibration[1][half])
        rows.append(budget_accuracies(found_on, on_test, cascade.dense_macs, BUDGETS))
    share = own.mean_macs / cascade.dense_macs
    return [f"{own.accuracy:.2%} at {share:.0%}", *mean_and_spread(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="CIFAR-10, for example cifar10:data")
    parser.add_argument("--work", type=Path, default=Path("runs/joint"), help="checkpoints")
    arguments = parser.parse_args()
    images, labels = arrays(load_data(arguments.source, "train"))
    assert labels is not None
    train, validation, calibration = ((images[s], labels[s]) for s in (TRAIN, SELECTOR, CALIBRATION))
    test_images, test_labels = arrays(load_data(arguments.source, "test"))
    assert test_labels is not None
    start = pretrained(train, validation, arguments.work)
    rows = []
    for arm in ARMS:
        cascade = trained(start, arm, train, validation, arguments.work)
        single = " / ".join(f"{a:.2%}" for _, a in trace(cascade, (test_images, test_labels)).single_stages())
        rows.append([arm.name, single, *results(cascade, calibration, (test_images, test_labels))])
    heads = ["training", "stages alone", "at its own thresholds", *budget_heads(BUDGETS)]
    rewrite_document({"joint": table(heads, rows)})


if __name__ == "__main__":
    main()
