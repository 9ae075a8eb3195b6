"""Cascades that the resident kernel takes, small enough for the emulator, and what is planned for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends.gpu.resident_stage import choose_resident
from fastcascade.kernels.cuda.machine import A100, H100, Machine
from fastcascade.kernels.cuda.resident_plan import ResidentPlan
from fastcascade.lowering.plan import Plan
from fastcascade.model.pooled_net import PooledNet, mirrored_pooled_net, pooled_net
from fastcascade.model.resnet import (
    BasicBlock,
    Head,
    IdentityResidual,
    cut_into_segments,
    resnet9,
    resnet_cifar,
)
from fastcascade.testing.networks import randomise_statistics

__all__ = [
    "CASES",
    "MORE_CASES",
    "POOLED_CASES",
    "SLOW_CASES",
    "WIDE_CASES",
    "Case",
    "images",
    "in_widest_gaps",
]

NORMALIZE = fc.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))


class Case(NamedTuple):
    """A cascade; ``build`` makes it from a fixed seed."""

    build: Callable[[], fc.Cascade]
    images: int = 8
    machine: Machine = H100

    def cascade(self) -> fc.Cascade:
        """With statistics and logits as after training."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            cascade = self.build()
            for stage in cascade.stages:
                for module in (stage.module, stage.exit):
                    if module is not None:
                        randomise_statistics(module)
                        spread(module)
            return cascade.eval()

    def plan(self) -> tuple[fc.Cascade, Plan, ResidentPlan]:
        """The cascade, its plan, and that of the kernel, which takes all of it."""
        cascade = self.cascade()
        plan = fc.plan(cascade)
        choice = choose_resident(plan, self.machine)
        assert choice.plan is not None
        assert choice.reasons == (None,) * len(plan.stages)
        return cascade, plan, choice.plan


def spread(module: nn.Module) -> None:
    """Small activations; logits that differ from image to image, so that few rows lie near a threshold."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data *= 0.7
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=2.0 / m.in_features**0.5)
            if m.bias is not None:
                nn.init.normal_(m.bias, std=0.1)


def independent(
    networks: Callable[[], list[nn.Module]],
    selector: Callable[[], nn.Module] | None = fc.MLPSelector,
    *,
    classes: int = 10,
    shape: tuple[int, int, int] = (3, 16, 16),
    combine: Any = "last",
) -> Callable[[], fc.Cascade]:
    """Networks that all read the image."""

    def build() -> fc.Cascade:
        stages = networks()
        own = selector() if selector is not None and len(stages) > 1 else None
        preprocess = NORMALIZE if shape[0] == 3 else None
        return fc.Cascade(stages, own, classes, shape, combine if own else "last", preprocess=preprocess)

    return build


def segments(
    depth: int, after: list[int], selector: Callable[[], nn.Module], **options: Any
) -> Callable[[], fc.Cascade]:
    """One backbone with exits."""

    def build() -> fc.Cascade:
        network = resnet_cifar(depth, shortcut=options.get("shortcut", "A"))
        parts = cut_into_segments(network, after)
        stages = [
            fc.Stage(body, head, input="previous" if k else "image") for k, (body, head) in enumerate(parts)
        ]
        shape, combine = options.get("shape", (3, 16, 16)), options.get("combine", "mean")
        return fc.Cascade(stages, selector(), 10, shape, combine, preprocess=NORMALIZE)

    return build


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    options.setdefault("padding", kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def pooled_network() -> nn.Module:
    """A 2×2 stem, odd sizes, pooling in the convolutions' epilogues, widths that are no multiple of 16."""
    return nn.Sequential(
        conv(3, 24, 2, padding=0),  # 16 → 15
        conv(24, 40),
        nn.MaxPool2d(2),  # 7
        conv(40, 64),
        nn.MaxPool2d(2),  # 3
        conv(64, 128),
        Head(128, 10),
    )


def many_poolings() -> nn.Module:
    """Poolings that no convolution can take: overlapping, padded, averages; a global maximum."""
    return nn.Sequential(
        conv(3, 16),
        nn.MaxPool2d(3, 2, 1),
        IdentityResidual(nn.Sequential(conv(16, 16), conv(16, 16))),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        conv(16, 32, 1),
        nn.AvgPool2d(2),
        conv(32, 16, stride=2),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def pooling_network(
    widths: tuple[int, int, int], activation: Callable[[], nn.Module], stem: int = 24
) -> nn.Module:
    """As ``pooled_net``, with another activation: a 2×2 stem, and blocks that pool after their first conv."""
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 2), activation()]
    for before, after in zip((stem, *widths), widths, strict=False):
        for inputs, pool in ((before, [nn.MaxPool2d(2)]), (after, [])):
            convolution = nn.Conv2d(inputs, after, 3, padding=1, bias=False)
            layers += [convolution, *pool, nn.BatchNorm2d(after), activation()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def selectors(name: str) -> Callable[[], nn.Module]:
    """A built-in selector; MLPs with random weights."""

    def build() -> nn.Module:
        if name in ("max_prob", "margin", "entropy"):
            return fc.ThresholdSelector(name)
        selector = fc.MLPSelector(name)
        for parameter in selector.parameters():
            nn.init.normal_(parameter, std=0.5)
        return selector

    return build


def resnets(*depths: int, **options: Any) -> Callable[[], list[nn.Module]]:
    """CIFAR ResNets."""
    return lambda: [resnet_cifar(depth, **options) for depth in depths]


CASES: dict[str, Case] = {
    "ResNet-8": Case(independent(resnets(8)), 3),
    "ResNet-8 then 14, mean": Case(independent(resnets(8, 14), selectors("stats"), combine="mean")),
    "four exits of a ResNet-20": Case(segments(20, [2, 3, 5], selectors("stats")), 10),
    "ResNet-9 of width 8": Case(independent(lambda: [resnet9(8, stem=16)]), 3),
    "2×2 stem, odd sizes": Case(independent(lambda: [pooled_network()]), 4),
    "all kinds of pooling": Case(independent(lambda: [many_poolings()]), 4),
    "pooled networks in groups, one with GELU, one mirrored": Case(
        independent(
            lambda: [
                pooled_net(16, deep=32),
                PooledNet(widths=(16, 32, 64), activation="gelu"),
                mirrored_pooled_net(16, deep=64),
            ],
            selectors("stats"),
            combine="mean",
        ),
        13,
        H100._replace(l2_bytes=1e12),
    ),
}
"""Of ``make test``; four warps, and one compilation for all of them."""

MORE_CASES: dict[str, Case] = {
    "shortcut B, 100 classes, topk": Case(
        independent(
            lambda: [resnet_cifar(8, 100, shortcut="B") for _ in range(2)], selectors("topk"), classes=100
        )
    ),
    "two exits, margin": Case(segments(14, [2], selectors("margin"), combine="last", shortcut="B")),
    "probs, weighted mean": Case(
        independent(resnets(8, 8, 8), selectors("probs"), combine=(0.2, 0.5, 1.0)), 10
    ),
    "max_prob": Case(independent(resnets(8, 8), selectors("max_prob"))),
    "entropy": Case(independent(resnets(8, 8), selectors("entropy"))),
    "1,000 classes": Case(
        independent(lambda: [resnet_cifar(8, 1000) for _ in range(2)], selectors("stats"), classes=1000)
    ),
    "ResNet-9 of width 8 then 16": Case(
        independent(lambda: [resnet9(8, stem=16), resnet9(16)], selectors("stats"), combine="mean")
    ),
    "residuals, one before a ReLU and a pooling": Case(
        independent(
            lambda: [
                nn.Sequential(
                    conv(3, 16),
                    BasicBlock(16, 16, 1, "A"),
                    nn.MaxPool2d(2),
                    IdentityResidual(nn.Sequential(conv(16, 16), conv(16, 16))),
                    Head(16, 10),
                )
            ]
        ),
        3,
    ),
    "one grey channel, 12×20": Case(
        independent(
            lambda: [nn.Sequential(conv(1, 16), conv(16, 32, stride=2), Head(32, 10))], shape=(1, 12, 20)
        ),
        3,
    ),
}
"""Every selector, and shapes that the quick ones leave out."""

SLOW_CASES: dict[str, Case] = {
    "ResNet-20 on 32×32": Case(independent(resnets(20), shape=(3, 32, 32)), 2),
    "ResNet-8 then 20 on 32×32": Case(independent(resnets(8, 20), selectors("stats"), shape=(3, 32, 32))),
    "ResNet-56 on 32×32": Case(independent(resnets(56), shape=(3, 32, 32)), 1),
    "five exits of a ResNet-32": Case(
        segments(32, [2, 5, 6, 12], selectors("stats"), shape=(3, 32, 32), shortcut="B"), 8
    ),
    "three ResNet-9": Case(
        independent(
            lambda: [resnet9(8, stem=16), resnet9(16), resnet9(32)],
            selectors("stats"),
            shape=(3, 32, 32),
            combine="mean",
        ),
        6,
    ),
}
"""Of the sizes that people use."""

WIDE_CASES: dict[str, Case] = {
    "ResNet-14 of twice the width": Case(independent(resnets(14, width=32), shape=(3, 32, 32)), 1),
    "ResNet-14 of twice the width, A100": Case(
        independent(resnets(14, width=32), shape=(3, 32, 32)), 1, A100
    ),
}
"""Eight warps: one block fills a multiprocessor."""

POOLED_CASES: dict[str, Case] = {
    "the shipped example's networks": Case(
        independent(
            lambda: [pooled_net(16), pooled_net(32), pooled_net(64), mirrored_pooled_net(64)],
            selectors("entropy"),
            shape=(3, 32, 32),
            combine="mean",
        ),
        7,
    ),
    "the largest with GELU": Case(
        independent(lambda: [PooledNet(widths=(64, 256, 256), activation="gelu")], shape=(3, 32, 32)), 3
    ),
    "the largest with GELU by tanh": Case(
        independent(
            lambda: [pooling_network((64, 256, 256), lambda: nn.GELU(approximate="tanh"))],
            shape=(3, 32, 32),
        ),
        3,
    ),
}
"""Networks that pool early, at full size: groups of images."""


def images(n: int, shape: tuple[int, int, int], seed: int = 2) -> Tensor:
    """Bytes where the cascade has three channels, half of them with little contrast; floats otherwise."""
    generator = torch.Generator().manual_seed(seed)
    if shape[0] != 3:
        return torch.randn(n, *shape, generator=generator)
    x = torch.randint(0, 256, (n, *shape), generator=generator)
    x[: n // 2] = x[: n // 2] // 3 + 60
    return x.to(torch.uint8)


def in_widest_gaps(scores: Tensor) -> Tensor:
    """(K−1, N) stop scores → thresholds (K−1,) in the middle of the widest gap of each one's middle half."""
    quarter = max(scores.shape[1] // 4, 1)
    middle = scores.sort(1).values[:, quarter - 1 : scores.shape[1] - quarter + 1]
    at = middle.diff(dim=1).argmax(1, keepdim=True)
    return (middle.gather(1, at) + middle.gather(1, at + 1))[:, 0] / 2
