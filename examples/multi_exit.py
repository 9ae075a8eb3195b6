"""One backbone with exits: a ResNet-20 cut into three segments, trained and calibrated as a cascade.

    fastcascade download cifar10 data
    python examples/multi_exit.py cifar10:data model

Segment k + 1 reads the features of segment k, so a hard image pays for the backbone once, and for two small
exit heads. Training takes hours on a CPU; ``--epochs 1`` shows the steps.
"""

from __future__ import annotations

import argparse

import fastcascade as fc
from fastcascade.model.resnet import cut_into_segments, resnet_cifar

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # of CIFAR-10's training images, in 0–1
VALIDATION, CALIBRATION = 0.05, 0.05
"""Shares of the training images that choose the selector and the thresholds."""


def build(num_classes: int) -> fc.Cascade:
    """Three segments of three residual blocks each, with an exit after each."""
    segments = cut_into_segments(resnet_cifar(20, num_classes), after=[3, 6])
    stages = [
        fc.Stage(segment, exit_head, input="previous" if k else "image", name=f"segment-{k}")
        for k, (segment, exit_head) in enumerate(segments)
    ]
    return fc.Cascade(
        stages, fc.MLPSelector(), num_classes, (3, 32, 32), combine="mean", preprocess=fc.Normalize(MEAN, STD)
    )


def main(source: str, directory: str, epochs: int) -> fc.Cascade:
    """Train on the images of ``source``, save the cascade in ``directory``, and print what it costs."""
    data = fc.load_data(source, "train")
    n = len(data)
    first, second = n - int((VALIDATION + CALIBRATION) * n), n - int(CALIBRATION * n)
    train, validation, calibration = (
        data.take(range(*ends)) for ends in ((0, first), (first, second), (second, n))
    )
    cascade = build(len(data.classes))
    recipe = fc.Recipe(pretrain_epochs=epochs, joint_epochs=max(1, epochs // 5))
    fc.fit(cascade, train, validation, recipe=recipe)
    for name, share in (("fast", 0.6), ("default", 0.8), ("accurate", 1.0)):
        fc.calibrate(cascade, calibration, name=name, budget_macs=share * cascade.dense_macs)
    cascade.save(directory, overwrite=True)
    for name, point in cascade.operating_points.items():
        shares = ", ".join(f"{share:.0%}" for share in point.exit_shares)
        cost = point.mean_macs / cascade.dense_macs
        print(f"{name}: {point.accuracy:.1%} at {cost:.0%} of the backbone's cost; exits {shares}")
    return cascade


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="labelled images, as fc.load_data takes them")
    parser.add_argument("directory", help="receives the cascade")
    parser.add_argument("--epochs", type=int, default=100)
    arguments = parser.parse_args()
    main(arguments.source, arguments.directory, arguments.epochs)
