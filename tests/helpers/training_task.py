"""A small classification task that training solves in a second, for tests and the processes they start."""

import torch
from torch import Tensor, nn

import fastcascade as fc


def net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise images whose central square is darker, equal or brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    images = torch.randn(n, 1, 8, 8, generator=generator)
    images[:, 0, 2:6, 2:6] += (labels[:, None, None] - 1) * 1.2
    return images, labels


def cascade() -> fc.Cascade:
    torch.manual_seed(0)
    return fc.Cascade([net(4), net(8)], fc.MLPSelector(), 3, (1, 8, 8))


def recipe(**changes: object) -> fc.Recipe:
    defaults = {
        "pretrain_epochs": 3,
        "joint_epochs": 3,
        "batch_size": 64,
        "crop_padding": 1,
        "learning_rate": 0.2,
        "selector_steps": 60,
    }
    return fc.Recipe(**{**defaults, **changes})
