"""Train the networks of the example's cascade on CIFAR-10, one after the other.

    python examples/cifar10/train_stages.py cifar10:data --out examples/cifar10/run

The recipe is that of Jordan, *94% on CIFAR-10 in 3.29 Seconds on a Single GPU* (arXiv 2404.00498): a first
convolution that whitens, orthogonalised momentum (Muon), label smoothing, alternating flips. A second phase
raises the rates once more and changes the images more. Images 0 … 44,999 train; the other 5,000 training
images only say how good an epoch was. A run that was stopped continues where it was. The arithmetic is
bfloat16 where the CPU can do it fast.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.model.pooled_net import PooledNet
from fastcascade.model.registry import build_network
from fastcascade.training.augmentation import epoch_order, uniforms
from fastcascade.training.checkpoint import Position, load_checkpoint, restore_optimizers, save_checkpoint
from fastcascade.training.progress import EpochProgress
from fastcascade.types import Normalize

HERE = Path(__file__).parent
WEIGHTS = "weights.safetensors"
TRAIN_IMAGES = 45_000
NORMALIZE = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
FAST_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
"""Without such instructions bfloat16 is several times slower than float32."""


@dataclass(frozen=True)
class Run:
    """One network and how it is trained.

    Attributes:
        network: registry name.
        epochs: passes over the training images. Every rate falls to zero linearly.
        rate: share of all peak rates.
        muon_rate, muon_momentum: of the 3×3 convolutions.
        bias_rate, head_rate: peaks for losses summed over a batch; the head's is divided by 256·its width.
        decay: weight decay of biases and head, per image.
        smoothing: of the labels.
        padding: random shifts by up to so many pixels, with reflected borders.
        cutout: side of a square at a random place that is set to the mean colour, in pixels.
        whitening_epochs: after which the first convolution's bias is fixed, too.
        teacher: a network that is trained already; its mean over both directions is ``distillation`` of
            the target.
    """

    network: str
    epochs: int
    rate: float = 1.0
    batch_size: int = 500
    muon_rate: float = 0.1
    muon_momentum: float = 0.6
    bias_rate: float = 0.053
    head_rate: float = 0.67
    decay: float = 2e-6
    smoothing: float = 0.2
    padding: int = 2
    cutout: int = 0
    whitening_epochs: int = 3
    teacher: str | None = None
    distillation: float = 0.5
    seed: int = 0


FIRST_PHASE = (
    Run("pooled_net:32", 14),
    Run("pooled_net:16", 12, teacher="pooled_net:32"),
    Run("pooled_net:64", 20),
)
"""In the order of training."""

SECOND_PHASE = (
    Run("pooled_net:32", 18, rate=0.6, padding=3, whitening_epochs=0, teacher="pooled_net:64", seed=1),
    Run("pooled_net:16", 24, rate=0.6, whitening_epochs=0, teacher="pooled_net:32", seed=1),
    Run("pooled_net:64", 9, rate=0.6, padding=4, cutout=8, whitening_epochs=0, seed=1),
)
"""Each goes on with the network of the same name."""


def orthogonalised(matrix: Tensor, steps: int = 3) -> Tensor:
    """About U·Vᵀ of a matrix U·S·Vᵀ: a quintic Newton–Schulz iteration (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if FAST_BFLOAT16 else matrix
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return (x.T if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised steps, for convolutions in front of a batch norm.

    Every step first scales a weight to unit RMS norm per filter. So the rate alone sets the size of a step
    relative to the weight, and there is no weight decay.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(weight))
                momentum.mul_(group["momentum"]).add_(weight.grad)
                gradient = weight.grad + group["momentum"] * momentum
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                change = orthogonalised(gradient.reshape(len(gradient), -1)).view(weight.shape)
                weight.add_(change, alpha=-group["lr"])


def optimizers_of(network: PooledNet, run: Run) -> list[torch.optim.Optimizer]:
    """Muon for the 3×3 convolutions; Nesterov SGD for biases and the head. Losses are sums over a batch."""
    head_rate = run.head_rate / (256 * network.head.in_features)
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    decay = run.decay * run.batch_size
    groups: list[dict[str, Any]] = [
        {"params": biases, "lr": run.bias_rate, "weight_decay": decay / run.bias_rate},
        {"params": [network.head.weight], "lr": head_rate, "weight_decay": decay / head_rate},
    ]
    convolutions = [m.weight for m in network.blocks.modules() if isinstance(m, nn.Conv2d)]
    made: list[torch.optim.Optimizer] = [
        torch.optim.SGD(groups, momentum=0.85, nesterov=True),
        Muon(convolutions, run.muon_rate, run.muon_momentum),
    ]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = run.rate * group["lr"]
    return made


class Images:
    """Augmented, normalised training images.

    Each image is shifted at random every epoch, and mirrored every other epoch, starting with a random one.
    Then a square of it may be cut out.
    """

    def __init__(self, images: Tensor, run: Run) -> None:
        self.padding, self.cutout, self.seed = run.padding, run.cutout, run.seed
        self.padded = F.pad(
            images.float(), (run.padding,) * 4, mode="reflect"
        ).byte()  # (N, 3, H + 2p, W + 2p)
        self.table = NORMALIZE.table()
        self.size = images.shape[2]

    def batch(self, index: np.ndarray[Any, Any], epoch: int) -> Tensor:
        """(n, 3, H, W) float32, channels last."""
        draws = torch.from_numpy(uniforms(self.seed, epoch, index, 4))
        shifts = (draws[:, :2] * (2 * self.padding + 1)).long()
        along = torch.arange(self.size)
        rows = (shifts[:, 0, None] + along)[:, :, None]
        columns = shifts[:, 1, None] + along
        first = uniforms(self.seed, -1 % 2**32, index, 1)[:, 0] < 0.5
        mirror = torch.from_numpy(first ^ bool(epoch % 2))[:, None]
        columns = torch.where(mirror, columns.flip(1), columns)[:, None, :]
        which = torch.from_numpy(index)[:, None, None]
        pixels = self.padded.movedim(1, -1)[which, rows, columns].long()  # (n, H, W, 3)
        result = self.table[torch.arange(3), pixels]
        corner = (draws[:, 2:] * (self.size - self.cutout + 1)).long()[:, :, None]
        inside = (along >= corner) & (along < corner + self.cutout)  # (n, 2, size)
        result[inside[:, 0, :, None] & inside[:, 1, None, :]] = 0
        return result.movedim(-1, 1)


def train(
    run: Run,
    start: PooledNet | None,
    images: Tensor,
    targets: Tensor,
    held_out: tuple[Tensor, Tensor],
    folder: Path,
) -> PooledNet:
    """Train one network.

    Args:
        start: the network to go on with; a new one if None.
        images: (n, 3, H, W) uint8.
        targets: (n, 10) probabilities to learn.
        held_out: images and labels that measure each epoch.
        folder: receives the checkpoint and, at the end, ``weights.safetensors`` in half precision.
    """
    torch.manual_seed(run.seed)
    network = cast(PooledNet, build_network(run.network, 10))
    if start is None:
        network.set_whitening(normalised(images[:5000]))
    else:
        network.load_state_dict(start.state_dict())
    network.to(memory_format=torch.channels_last)
    settings = asdict(run)
    position, states = load_checkpoint(folder, settings, network)
    optimizers = optimizers_of(network, run)
    restore_optimizers(optimizers, states)
    source = Images(images, run)
    history = list(position.history)
    for epoch in range(position.epoch, run.epochs):
        network.train()
        cast(nn.Parameter, network.whiten.bias).requires_grad_(epoch < run.whitening_epochs)
        order = epoch_order(run.seed, epoch, len(images))
        steps = len(images) // run.batch_size
        with EpochProgress(f"{run.network} {epoch + 1}/{run.epochs}", enabled=True) as bar:
            for step in bar.steps(range(steps)):
                index = order[step * run.batch_size : (step + 1) * run.batch_size]
                share = 1 - (epoch + step / steps) / run.epochs
                loss = train_step(network, optimizers, source.batch(index, epoch), targets[index], share)
                bar.note(loss=loss)
        right = logits_of(network, held_out[0]).argmax(1) == held_out[1]
        history.append({"epoch": epoch + 1, "held_out_accuracy": round(float(right.float().mean()), 4)})
        print(f"{run.network}: {history[-1]}")
        save_checkpoint(folder, Position(0, epoch + 1, 0.0, tuple(history)), settings, network, optimizers)
    weights = {name: w.half() if w.is_floating_point() else w for name, w in network.state_dict().items()}
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / WEIGHTS)
    return network


def trained_network(folder: Path) -> PooledNet:
    """The network that :func:`train` left in a folder named after it."""
    network = cast(PooledNet, build_network(folder.name.replace("-", ":"), 10))
    weights = load_file(folder / WEIGHTS)
    network.load_state_dict({key: w.float() if w.is_floating_point() else w for key, w in weights.items()})
    return network.eval()


def newest(out: Path, network: str) -> PooledNet:
    """A network by its registry name, of the last phase that has finished it."""
    folders = [out / phase / network.replace(":", "-") for phase in ("second", "first")]
    return trained_network(next((f for f in folders if (f / WEIGHTS).exists()), folders[-1]))


def train_step(
    network: PooledNet,
    optimizers: list[torch.optim.Optimizer],
    images: Tensor,
    targets: Tensor,
    share: float,
) -> float:
    """One step at a share of the peak rates; returns the mean loss."""
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
    with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BFLOAT16):
        logits = network(images)
    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach()) / len(targets)


def targets_of(run: Run, labels: Tensor, images: Tensor, teacher: nn.Module | None) -> Tensor:
    """(n, 10): smoothed labels, mixed with the teacher's mean probabilities of both directions."""
    smoothed = F.one_hot(labels, 10) * (1 - run.smoothing) + run.smoothing / 10
    if teacher is None:
        return smoothed
    taught = (logits_of(teacher, images).softmax(1) + logits_of(teacher, images.flip(3)).softmax(1)) / 2
    return (1 - run.distillation) * smoothed + run.distillation * taught


def normalised(images: Tensor) -> Tensor:
    """uint8 → float32, both (n, 3, H, W)."""
    return NORMALIZE.table()[torch.arange(3)[:, None, None], images.long()]


@torch.inference_mode()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """(n, 10) in the arithmetic of the training, in eval mode."""
    network.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BFLOAT16):
        return torch.cat([network(normalised(part)).float() for part in images.split(500)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="CIFAR-10, for example cifar10:data")
    parser.add_argument("--out", type=Path, default=HERE / "run")
    parser.add_argument("--phase", type=int, choices=(1, 2), help="this phase alone")
    parser.add_argument("--network", help="this network alone")
    arguments = parser.parse_args()
    images, labels = arrays(load_data(arguments.source, "train"), 10)
    images = images.movedim(-1, 1)
    assert labels is not None
    held_out = images[TRAIN_IMAGES:], labels[TRAIN_IMAGES:]
    first, second = arguments.out / "first", arguments.out / "second"
    for phase, runs in enumerate((FIRST_PHASE, SECOND_PHASE), 1):
        for run in runs:
            if arguments.phase not in (None, phase) or arguments.network not in (None, run.network):
                continue
            folder = (first, second)[phase - 1] / run.network.replace(":", "-")
            start = trained_network(first / folder.name) if phase == 2 else None
            teacher = None if run.teacher is None else newest(arguments.out, run.teacher)
            targets = targets_of(run, labels[:TRAIN_IMAGES], images[:TRAIN_IMAGES], teacher)
            train(run, start, images[:TRAIN_IMAGES], targets, held_out, folder)


if __name__ == "__main__":
    main()
