"""What is measured: networks and their weights, images, batch sizes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastcascade
from bench import architectures
from bench.machine import CACHE, ROOT
from fastcascade import Cascade, MLPSelector, OperatingPoint
from fastcascade.data.sources import load_data
from fastcascade.model.registry import build_network
from fastcascade.model.resnet import ResNet

__all__ = [
    "BATCHES",
    "INPUT_SHAPE",
    "NETWORKS",
    "NUM_CLASSES",
    "Case",
    "Reference",
    "calibration_images",
    "cascade_images",
    "dense_network",
    "load_model",
    "model_file",
    "network_images",
    "noise",
    "reference_exits",
]

NETWORKS = ("resnet_cifar:20", "resnet_cifar:56", "resnet_cifar:110")
BATCHES = (256, 8, 1)
INPUT_SHAPE = (3, 32, 32)
NUM_CLASSES = 10
EXAMPLE_IMAGES = ROOT / "examples" / "cifar10" / "test-images.npz"


@dataclass(frozen=True)
class Case:
    """A model on a batch size.

    Attributes:
        model: see :func:`load_model`.
        threads: of every engine.
    """

    model: str
    batch: int
    threads: int

    @property
    def is_cascade(self) -> bool:
        """Whether instances may stop early."""
        return self.model.startswith("cascade:")

    @property
    def key(self) -> str:
        """The case's name in the results; models of this checkout by their relative path."""
        return f"{self.model.replace(f'{ROOT}/', '')} batch {self.batch} threads {self.threads}"


_LOGIT_SD = 3.0
_SEED = 20


def noise(n: int, seed: int = 0) -> np.ndarray:
    """(n, 3, 32, 32) float32 standard normal: for timing, in place of normalised images."""
    return np.random.default_rng(seed).standard_normal((n, *INPUT_SHAPE), dtype=np.float32)


def network_images(model: str, shape: tuple[int, int, int], n: int) -> np.ndarray:
    """(n, *shape) float32 for a single network: the example's first test images for "last:FOLDER".

    For random networks, images like those from which their batch norms have statistics.
    """
    if model.startswith("last:"):
        return _example_images(model.replace("last:", "cascade:"), range(n))
    if model.startswith(("torchvision:", "timm:")):
        return architectures.sample_images(n, shape, seed=0).numpy()
    return noise(n)


def calibration_images(model: str, shape: tuple[int, int, int]) -> np.ndarray:
    """(n, *shape) float32: what every engine quantises from, others than those of :func:`network_images`."""
    if model.startswith("last:"):
        return _example_images(model.replace("last:", "cascade:"), range(1500, 2000))
    if model.startswith(("torchvision:", "timm:")):
        return architectures.sample_images(64, shape, seed=5).numpy()
    return noise(256, seed=5)


def _example_images(cascade: str, rows: range) -> np.ndarray:
    loaded = load_model(cascade)
    images = load_data(EXAMPLE_IMAGES, classes=loaded.classes).take(rows).images
    floats: np.ndarray = loaded.images(np.array(images)).numpy()
    return floats


def dense_network(name: str) -> ResNet:
    """A network in eval mode with random but realistic weights, the same in every process.

    Batch norms hold the statistics of noise images and gains around 1, so that folding them matters and
    activations neither vanish nor explode. The head is scaled to logits of standard deviation 3, so
    numerical errors change probabilities as in a trained network.
    """
    path = CACHE / f"{hashlib.sha256(f'{name} {_SEED}'.encode()).hexdigest()[:12]}.safetensors"
    network = build_network(name, NUM_CLASSES)
    if not path.exists():
        _randomise(network)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(network.state_dict(), partial)
        partial.rename(path)
    network.load_state_dict(load_file(path))
    return network.eval()


@torch.no_grad()
def _randomise(network: ResNet) -> None:
    generator = torch.Generator().manual_seed(_SEED)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
            module.momentum = None  # a plain mean over the batches seen
    images = torch.from_numpy(noise(256, _SEED))
    network.train()(images)
    logits: Tensor = network.eval()(images)
    head = network.head[-1]
    assert isinstance(head, nn.Linear)
    head.bias.sub_(logits.mean(0))
    scale = _LOGIT_SD / logits.std(0).mean()
    head.weight.mul_(scale)
    head.bias.mul_(scale)


def cascade_images(model: str, batch: int) -> np.ndarray:
    """64 batches, or all 2,000, of the example's images; noise for "random"."""
    count = min(64 * batch, 2000)
    if model.endswith(":random"):
        return noise(count)
    return _example_images(model, range(count - count % batch))


def model_file(network: nn.Module, suffix: str) -> Path:
    """The cache file of this network's converted form, named by a hash of its weights."""
    digest = hashlib.sha256()
    for key, tensor in network.state_dict().items():
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return CACHE / f"{digest.hexdigest()[:16]}{suffix}"


def load_model(name: str) -> Cascade:
    """A case's model, as a cascade in eval mode.

    Args:
        name: ``cascade:FOLDER`` for a saved cascade ("random" for random weights), ``last:FOLDER`` for its
            last network alone, ``torchvision:NAME`` or ``timm:NAME`` (see :mod:`bench.architectures`), or a
            network's registry name. Single networks become cascades of one stage.
    """
    kind, _, folder = name.partition(":")
    if kind in ("torchvision", "timm"):
        network, shape = architectures.build(name)
        return Cascade([network], None, architectures.NUM_CLASSES, shape).eval()
    if kind not in ("cascade", "last"):
        return Cascade([dense_network(name)], None, NUM_CLASSES, INPUT_SHAPE).eval()
    cascade = _random_cascade() if folder == "random" else fastcascade.load(folder).eval()
    if kind == "cascade":
        return cascade
    last = cascade.stage(len(cascade.stages) - 1)
    return Cascade([last.module], None, cascade.num_classes, cascade.input.shape).eval()


@torch.no_grad()
def _random_cascade() -> Cascade:
    """ResNet-8, -20 and -56 with random weights.

    70 % of noise images stop at the first exit and two thirds of the rest at the second.
    """
    networks = [dense_network(f"resnet_cifar:{depth}") for depth in (8, 20, 56)]
    torch.manual_seed(_SEED)
    cascade = Cascade(networks, MLPSelector(), NUM_CLASSES, INPUT_SHAPE)
    scores = cascade.all_exits(torch.from_numpy(noise(128, _SEED)))[1]
    first = float(scores[0].quantile(0.3))
    thresholds = (first, float(scores[1][scores[0] < first].quantile(1 / 3)))
    shares = (0.7, 0.2, 0.1)
    mean_macs = float(cascade.exit_macs.float() @ torch.tensor(shares))
    point = OperatingPoint("default", thresholds, {"exit_shares": shares}, None, mean_macs, shares, 128)
    cascade.operating_points["default"] = point
    return cascade.eval()


class Reference(NamedTuple):
    """What torch's fp32 answers, for engines to be checked against.

    Attributes:
        log_probs: (N, C) at the exit.
        exits: (N,) where each instance stops.
        margin: (N,) the smallest distance between a stop score and its threshold over the exits that the
            instance reached; inf for a single network.
        gflop: mean per image, two operations per multiplication.
    """

    log_probs: np.ndarray
    exits: np.ndarray
    margin: np.ndarray
    gflop: float


@torch.no_grad()
def reference_exits(model: str, images: np.ndarray) -> Reference:
    """The results of torch's fp32 for images (N, C, H, W) float32."""
    cascade = load_model(model)
    x = torch.from_numpy(images)
    if len(cascade.stages) == 1:
        log_probs = cascade.stage(0).module(x).log_softmax(1).numpy()
        gflop = 2e-9 * cascade.dense_macs
        return Reference(log_probs, np.zeros(len(x), np.int64), np.full(len(x), np.inf), gflop)
    judged = cascade.judge(cascade.all_logits(x))
    thresholds = cascade.thresholds()
    stop = torch.cat([judged.scores >= thresholds[:, None], torch.ones(1, len(x), dtype=torch.bool)])
    exits = stop.int().argmax(0)
    distance = (judged.scores - thresholds[:, None]).abs()
    distance[torch.arange(len(distance))[:, None] > exits] = torch.inf
    return Reference(
        judged.log_probs[exits, torch.arange(len(x))].numpy(),
        exits.numpy(),
        distance.min(0).values.numpy(),
        2e-9 * float(cascade.exit_macs[exits].double().mean()),
    )
