"""Single convolutions by kernel, in the shapes of the CIFAR ResNets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastcascade as fc
from bench.cases import noise
from fastcascade.backends.cpu import CpuProgram
from fastcascade.lowering.export import plan as lower_plan

BATCH = 32
SHAPES = [
    # channels in, out, side, kernel, stride
    (3, 16, 32, 3, 1),
    (16, 16, 32, 3, 1),
    (16, 32, 32, 3, 2),
    (32, 32, 16, 3, 1),
    (32, 64, 16, 3, 2),
    (64, 64, 8, 3, 1),
    (64, 128, 8, 1, 1),
]
KERNELS = ["conv_direct_f32", "conv3x3_winograd_f32"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_convolution(shape: tuple[int, ...], kernel: str, benchmark: Any, timed: Any) -> None:
    inputs, outputs, side, size, stride = shape
    benchmark.group = "convolution {}→{} on {}×{}, {}×{}/{}".format(
        *shape[:2], side, side, size, size, stride
    )
    torch.manual_seed(0)
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)
    network = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.from_numpy(noise(BATCH * inputs)).reshape(BATCH, -1)[:, : inputs * side * side]
    x = x.reshape(BATCH, inputs, side, side).contiguous()
    program = CpuProgram(
        lower_plan(fc.Cascade([network], None, outputs, (inputs, side, side))), 1, kernel=kernel
    )
    if all(choice.kernel != kernel for choice in program.describe()[0].kernels):
        pytest.skip(f"{kernel} cannot run this shape")
    none = torch.empty(0)
    with torch.no_grad():
        torch.testing.assert_close(
            program.run(x, none).log_probs, network(x).log_softmax(1), rtol=0, atol=1e-4
        )
    gflop = 2e-9 * BATCH * outputs * inputs * size * size * (side // stride) ** 2
    timed(lambda: program.run(x, none), gflop)
