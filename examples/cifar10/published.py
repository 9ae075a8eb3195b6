"""A family of stages for study.py that somebody else trained: published CIFAR-10 ResNets.

    python examples/cifar10/published.py FOLDER cifar10:data

FOLDER holds resnet.py (MIT) and the weights resnet20-….th, resnet32-….th and resnet56-….th of
akamaster/pytorch_resnet_cifar10. Neither is part of this repository; what the networks say about the 10,000
test images is, as float16. They were trained on all 50,000 training images, so only test images are unseen.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import fastcascade as fc
from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.evaluation.logits import collect_logits

HERE = Path(__file__).parent
NETWORKS = ("resnet20", "resnet32", "resnet56")
NORMALIZE = fc.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def published_network(folder: Path, name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """One network with its published weights, which were saved from an ``nn.DataParallel``."""
    files = sorted(folder.glob(f"{name}-*.th"))
    if len(files) != 1:
        raise SystemExit(f"{folder} has {len(files)} files {name}-*.th; expected one")
    weights = torch.load(files[0], map_location="cpu", weights_only=True)["state_dict"]
    network = build()
    network.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})
    return network.eval()


def published_cascade(folder: Path) -> fc.Cascade:
    """The networks as a cascade; only their logits are of interest, so the selector does not matter."""
    spec = importlib.util.spec_from_file_location("published_resnet", folder / "resnet.py")
    if spec is None or spec.loader is None or not (folder / "resnet.py").exists():
        raise SystemExit(f"{folder} has no resnet.py; expected the published architecture")
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    stages = [fc.Stage(published_network(folder, n, getattr(source, n)), name=n) for n in NETWORKS]
    return fc.Cascade(stages, fc.ThresholdSelector("margin"), 10, (3, 32, 32), preprocess=NORMALIZE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="resnet.py and the published weights")
    parser.add_argument("source", help="CIFAR-10, for example cifar10:data")
    parser.add_argument("--output", type=Path, default=HERE / "family-published.safetensors")
    arguments = parser.parse_args()
    cascade = published_cascade(arguments.folder)
    images, labels = arrays(load_data(arguments.source, "test"))
    assert labels is not None
    logits = collect_logits(cascade, cascade.input.nchw(images), compiled=True, progress=True)
    for name, stage in zip(NETWORKS, logits, strict=True):
        print(f"{name}: {(stage.argmax(1) == labels).double().mean():.2%}")
    tensors = {
        "macs": torch.tensor(cascade.stage_macs),
        "unseen": logits.half(),
        "y_unseen": labels.to(torch.uint8),
    }
    save_file(tensors, arguments.output)


if __name__ == "__main__":
    main()
