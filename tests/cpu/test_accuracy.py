"""Logits against float64 on real images: the shipped cascade, and deep networks with statistics as after training.

Errors are measured as multiples of torch fp32's own, on the same images.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends.cpu import CpuProgram
from fastcascade.cost import eval_mode
from fastcascade.plan import Plan
from fastcascade.resnet import resnet_cifar
from fastcascade.testing import reference_logits

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cifar10"
BOUNDS = {
    "conv_direct_f32": 2.0,
    "": 6.0,
}  # direct kernels; the measured choice, which is Winograd where it can


def real_images(count: int) -> Tensor:
    """(count, 3, 32, 32) uint8 images that no network was trained on."""
    with np.load(EXAMPLE / "test-images.npz") as arrays:
        return torch.from_numpy(arrays["images"][:count]).permute(0, 3, 1, 2)


def error_ratios(plan: Plan, images: Tensor, kernel: str) -> Iterator[float]:
    """For each stage the largest error of a logit, over that of torch in fp32."""
    exact = reference_logits(plan, images)
    plain = reference_logits(plan, images, torch.float32)
    program = CpuProgram(plan, 1, kernel=kernel)
    assert plan.input.preprocess is not None
    table = plan.input.preprocess.table().numpy()
    for k in range(len(plan.stages)):
        got = torch.from_numpy(program._cascade.run_stage(k, images.numpy(), table)[0])
        yield ((got - exact[k]).abs().max() / (plain[k] - exact[k]).abs().max()).item()


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
@pytest.mark.parametrize("kernel", BOUNDS)
def test_shipped_cascade(kernel: str) -> None:
    plan = fc.plan(fc.load(EXAMPLE / "model"))
    ratios = list(error_ratios(plan, real_images(1000), kernel))
    assert max(ratios) <= BOUNDS[kernel], ratios


@pytest.mark.parametrize("depth", [20, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (56, 110))])
def test_deep_networks(depth: int) -> None:
    normalize, images = fc.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)), real_images(64)
    floats = torch.from_numpy(normalize.table().numpy())[torch.arange(3)[:, None, None], images.long()]
    network = as_if_trained(resnet_cifar(depth), floats)
    plan = fc.plan(fc.Cascade([network], None, 10, (3, 32, 32), preprocess=normalize))
    assert len(reference_logits(plan, images)[0].argmax(1).unique()) >= 5
    for kernel, bound in BOUNDS.items():
        (ratio,) = error_ratios(plan, images, kernel)
        assert ratio <= bound, f"{kernel or 'measured choice'}: {ratio:.2f} times torch's error"
