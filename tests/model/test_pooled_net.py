"""Networks that pool early: whitening, lowering to fused operations, and the mirrored twin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastcascade as fc
from fastcascade.errors import InvalidArgument
from fastcascade.lowering.operations import Activation, Conv2d, Flatten, Flip, Linear, Pool, ScaleShift
from fastcascade.model.cost import count_macs
from fastcascade.model.pooled_net import Mirrored, PooledNet, mirrored_pooled_net, pooled_net
from fastcascade.model.registry import build_module
from fastcascade.testing import assert_drop_in, randomise_statistics


def trained(network: torch.nn.Module) -> torch.nn.Module:
    """Statistics as after training; these norms have no trained scale."""
    randomise_statistics(network)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    torch.nn.init.normal_(
        next(m for m in network.modules() if isinstance(m, torch.nn.Linear)).weight, std=0.3
    )
    return network.eval()


def test_patches_are_white_behind_the_first_convolution() -> None:
    images = torch.randn(300, 3, 32, 32).cumsum(2).cumsum(3)
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    network = pooled_net(16)
    network.set_whitening(images)
    out = network.whiten(images).movedim(1, 0).flatten(1)
    assert torch.equal(out[:12], -out[12:])
    covariance = out[:12] @ out[:12].T / out.shape[1]
    strong = covariance.diagonal() > 0.5  # eps keeps directions of no variance small
    assert strong.any()
    off = covariance - covariance.diagonal().diag()
    assert off.abs().max() < 0.02


@pytest.mark.parametrize(("width", "macs"), [(16, 10_135_072), (64, 118_000_000)])
def test_macs(width: int, macs: int) -> None:
    assert count_macs(pooled_net(width), torch.zeros(1, 3, 32, 32))[1] == pytest.approx(macs, rel=0.02)


def test_every_norm_and_activation_joins_a_convolution() -> None:
    cascade = fc.Cascade(
        [trained(pooled_net(4)), trained(mirrored_pooled_net(4))], fc.MLPSelector(), 10, (3, 32, 32)
    )
    plain, mirrored = fc.plan(cascade).stages
    assert not [op for op in (*plain.ops, *mirrored.ops) if isinstance(op, ScaleShift | Activation)]
    assert [type(op) for op in plain.ops] == [Conv2d, *[Conv2d, Pool, Conv2d] * 3, Pool, Flatten, Linear]
    assert [type(op) for op in mirrored.ops] == [Flip, *(type(op) for op in plain.ops)]


def test_compiled_cascades_of_them_are_drop_in_replacements() -> None:
    stages = [trained(pooled_net(4)), trained(pooled_net(4, deep=24)), trained(mirrored_pooled_net(4))]
    cascade = fc.Cascade(stages, fc.MLPSelector(), 10, (3, 32, 32))
    assert_drop_in(fc.compile(cascade), cascade, torch.randn(120, 3, 32, 32), band=3e-4)


def test_the_activation_is_a_choice() -> None:
    network = trained(pooled_net(4, activation="gelu"))
    twin = pooled_net(4)
    twin.load_state_dict(network.state_dict())
    for block in twin.eval().blocks:
        block.activation = torch.nn.GELU()
    twin.activation = torch.nn.GELU()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(x), twin(x))
        assert not torch.equal(network(x), trained(pooled_net(4))(x))
    with pytest.raises(InvalidArgument, match="expected relu or gelu"):
        pooled_net(4, activation="tanh")


def test_the_mirrored_network_reads_the_mirrored_image() -> None:
    network = trained(PooledNet(widths=(8, 16, 16)))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(Mirrored(network)(x), network(x.flip(3)))


def test_names_rebuild_them(tmp_path: Path) -> None:
    for name in ("pooled_net:4", "pooled_net:4,deep=12", "mirrored_pooled_net:4,activation=gelu"):
        assert build_module(name, 10).architecture == name
    cascade = fc.Cascade([pooled_net(4), mirrored_pooled_net(4)], fc.MLPSelector(), 10, (3, 32, 32))
    cascade.save(tmp_path / "model")
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(fc.load(tmp_path / "model").all_exits(x)[0], cascade.all_exits(x)[0])


def test_bad_widths_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="expected three positive widths"):
        PooledNet(widths=(16, 64))
    with pytest.raises(InvalidArgument, match="only ResNets are cut"):
        build_module("pooled_net:4[0:1]", 10)
