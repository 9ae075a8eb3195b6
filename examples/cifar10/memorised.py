"""A second family of stages for study.py: small networks that know their training images by heart.

    python examples/cifar10/memorised.py cifar10:data

Trains three networks on 6,000 images without augmentation or label smoothing (a few minutes on a core)
and writes what they say about the held-out and the test images, as float16: they are wrong on a
third of new images, and sure of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

import fastcascade as fc
from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.evaluation.logits import collect_logits
from fastcascade.model.registry import build_network

HERE = Path(__file__).parent
STAGES = ("resnet_cifar:8,width=8", "resnet9:8,stem=16", "resnet_cifar:8")
TRAIN, HELD_OUT = slice(0, 6_000), slice(45_000, 50_000)
RECIPE = fc.Recipe(
    pretrain_epochs=12,
    joint_epochs=0,
    batch_size=64,
    learning_rate=0.05,
    weight_decay=0.0,
    label_smoothing=0.0,
    crop_padding=0,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="CIFAR-10, for example cifar10:data")
    parser.add_argument("--output", type=Path, default=HERE / "family-memorised.safetensors")
    parser.add_argument("--work", type=Path, default=Path("runs/memorised"), help="checkpoints")
    arguments = parser.parse_args()
    images, labels = arrays(load_data(arguments.source, "train"))
    test = arrays(load_data(arguments.source, "test"))
    assert labels is not None
    assert test[1] is not None
    torch.manual_seed(0)
    stages = [build_network(name, 10) for name in STAGES]
    preprocess = fc.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    cascade = fc.Cascade(stages, fc.MLPSelector(), 10, (3, 32, 32), preprocess=preprocess)
    few = slice(HELD_OUT.start, HELD_OUT.start + 500)
    fc.fit(
        cascade,
        (images[TRAIN], labels[TRAIN]),
        (images[few], labels[few]),
        refit_selector=False,
        checkpoint_dir=arguments.work,
        recipe=RECIPE,
    )
    tensors = {"macs": torch.tensor(cascade.stage_macs), "y_test": test[1].to(torch.uint8)}
    tensors["y_held_out"] = labels[HELD_OUT].to(torch.uint8)
    for name, part in (("held_out", images[HELD_OUT]), ("test", test[0])):
        logits = collect_logits(cascade, cascade.input.nchw(part), compiled=True, progress=True)
        tensors[name] = logits.half()
    save_file(tensors, arguments.output)


if __name__ == "__main__":
    main()
