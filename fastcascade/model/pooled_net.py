"""Networks for 32×32 images that pool early: few multiplies, and few epochs to a given accuracy.

The architecture follows Jordan, *94% on CIFAR-10 in 3.29 Seconds on a Single GPU* (arXiv 2404.00498): a fixed
whitening convolution of 2×2, then three blocks that pool right after their first 3×3 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcascade.errors import InvalidArgument
from fastcascade.model.families import checked_channels, family

__all__ = ["Mirrored", "PooledNet", "mirrored_pooled_net", "pooled_net"]

WHITENING_IMAGES = 5000
WHITENING_EPS = 5e-4
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class PooledBlock(nn.Module):
    """conv 3×3, max-pool 2, norm, activation; conv 3×3, norm, activation.

    The norms have a bias and no trained scale. A positive factor per channel commutes with the maximum, so
    both norms fold into their convolutions. Convolutions start as the identity on their first channels.
    """

    def __init__(self, in_channels: int, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.convs = nn.ModuleList(
            nn.Conv2d(width, channels, 3, padding=1, bias=False) for width in (in_channels, channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels, momentum=0.2) for _ in range(2))
        self.pool = nn.MaxPool2d(2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            weight = cast(nn.Conv2d, conv).weight
            nn.init.dirac_(weight.data[: min(weight.shape[:2])])
            cast(nn.BatchNorm2d, norm).weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norms[0](self.pool(self.convs[0](x))))
        return self.activation(self.norms[1](self.convs[1](x)))  # type: ignore[no-any-return]


class PooledNet(nn.Module):
    """Whitening convolution, three :class:`PooledBlock`, global max-pool, linear head without bias.

    Args:
        widths: channels of the three blocks.
        activation: "relu" or "gelu".

    Attributes:
        architecture: the registry name that rebuilds this network, or None for one made by hand.

    Example:
        >>> PooledNet(widths=(16, 64, 64))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        widths: Sequence[int] = (64, 256, 256),
        in_channels: int = 3,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if len(widths) != 3 or min(widths) < 1 or in_channels < 1:
            raise InvalidArgument(
                f"widths are {tuple(widths)}, in_channels is {in_channels}; expected three positive widths"
            )
        if activation not in ACTIVATIONS:
            raise InvalidArgument(f"activation is {activation!r}; expected {' or '.join(ACTIVATIONS)}")
        self.architecture: str | None = None
        self.activation = ACTIVATIONS[activation]()
        self.whiten = nn.Conv2d(in_channels, 8 * in_channels, 2)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(cast(Tensor, self.whiten.bias))
        channels = [self.whiten.out_channels, *widths]
        self.blocks = nn.Sequential(
            *(PooledBlock(c, width, self.activation) for c, width in zip(channels, widths, strict=False))
        )
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        nn.init.normal_(self.head.weight, std=1 / widths[-1])

    @torch.no_grad()
    def set_whitening(self, images: Tensor) -> None:
        """Set the first convolution to the whitened eigenvectors of 2×2 patches, and their negatives.

        Args:
            images: (N, C, H, W) normalised training images; the first 5,000 are used.
        """
        patches = F.unfold(images[:WHITENING_IMAGES].float(), 2).transpose(1, 2).flatten(0, 1)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + WHITENING_EPS).sqrt()).T.reshape(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.activation(self.whiten(x)))
        return self.head(self.pool(x).flatten(1))  # type: ignore[no-any-return]


class Mirrored(nn.Module):
    """A network on the mirrored image: a second opinion that needs no training.

    Example:
        >>> Mirrored(PooledNet(widths=(16, 64, 64)))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.architecture: str | None = None
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.flip(3))  # type: ignore[no-any-return]


@family
def pooled_net(
    width: int,
    num_classes: int = 10,
    deep: int | None = None,
    activation: str = "relu",
    in_channels: int = 3,
) -> PooledNet:
    """:class:`PooledNet` of widths (width, deep, deep).

    Args:
        deep: channels of the second and third block; 4·width if None.
        activation: "relu" or "gelu".
        in_channels: of the images; 1 for gray.

    Example:
        >>> pooled_net(32).architecture
        'pooled_net:32'
    """
    deep = 4 * width if deep is None else deep
    return PooledNet(num_classes, (width, deep, deep), checked_channels(in_channels), activation)


@family
def mirrored_pooled_net(
    width: int,
    num_classes: int = 10,
    deep: int | None = None,
    activation: str = "relu",
    in_channels: int = 3,
) -> Mirrored:
    """:func:`pooled_net` on the mirrored image.

    Example:
        >>> mirrored_pooled_net(32).architecture
        'mirrored_pooled_net:32'
    """
    return Mirrored(pooled_net(width, num_classes, deep, activation, in_channels))
