"""Logits against float64 on real images: the shipped cascade, and deep networks as if trained.

Errors are measured as multiples of torch fp32's own, on the same images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends.cpu import CpuProgram
from fastcascade.lowering.plan import Plan
from fastcascade.model.cost import eval_mode
from fastcascade.model.resnet import resnet_cifar
from fastcascade.testing.oracle import reference_logits

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cifar10"
BOUNDS = {"conv_direct_f32": 2.0, "": 6.0}  # "" is the engine's own choice: Winograd where it can


def real_images(count: int) -> Tensor:
    """(count, 3, 32, 32) uint8 images that no network was trained on."""
    with np.load(EXAMPLE / "test-images.npz") as arrays:
        return torch.from_numpy(arrays["images"][:count]).permute(0, 3, 1, 2)


def assert_accurate(plan: Plan, images: Tensor) -> None:
    """For every stage, the largest error of a logit is within its bound times that of torch in fp32."""
    exact = reference_logits(plan, images)
    allowed = (reference_logits(plan, images, torch.float32) - exact).abs().amax((1, 2))
    assert plan.input.preprocess is not None
    table = plan.input.preprocess.table().numpy()
    for kernel, bound in BOUNDS.items():
        engine = CpuProgram(plan, 1, kernel=kernel)._cascade
        stages = range(len(plan.stages))
        got = torch.stack([torch.from_numpy(engine.run_stage(k, images.numpy(), table)[0]) for k in stages])
        ratios = ((got - exact).abs().amax((1, 2)) / allowed).tolist()
        print(f"{kernel or 'choice'}: {[round(r, 2) for r in ratios]} times torch's error")  # pytest -s
        assert max(ratios) <= bound, f"kernel {kernel!r}: {ratios} times torch's error"


@torch.no_grad()
def as_if_trained(network: nn.Module, floats: Tensor) -> nn.Module:
    """Give a new network statistics of real images, and logits of standard deviation 3 around 0."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the average over what it sees
    network.train()(floats)
    (linear,) = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    with eval_mode(network):
        logits = network(floats)
    scale = 3 / logits.std(0)
    linear.weight.mul_(scale[:, None])
    linear.bias.sub_(logits.mean(0)).mul_(scale)
    return network.eval()


@pytest.mark.slow
def test_shipped_cascade() -> None:
    assert_accurate(fc.plan(fc.load(EXAMPLE / "model")), real_images(1000))


@pytest.mark.parametrize("depth", [20, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (56, 110))])
def test_deep_networks(depth: int) -> None:
    normalize, images = fc.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)), real_images(64)
    floats = normalize.table()[torch.arange(3)[:, None, None], images.long()]
    network = as_if_trained(resnet_cifar(depth), floats)
    plan = fc.plan(fc.Cascade([network], None, 10, (3, 32, 32), preprocess=normalize))
    assert len(reference_logits(plan, images, torch.float32)[0].argmax(1).unique()) >= 5
    assert_accurate(plan, images)
