"""Elementwise functions on every instruction set, in units of the last place of float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast, get_args

import pytest
import torch
from torch import Tensor

from fastcascade.lowering.operations import PARAMETRIC, Activation, ActivationKind, Add, Conv2d

RunOps = Callable[..., tuple[Tensor, Tensor]]
KINDS = [kind for kind in get_args(ActivationKind) if kind != "none"]
PARAMETERS = {"leaky_relu": 0.1, "elu": 1.5}
ULPS = 4
SMALLEST = 2.0**-126  # below it, results may be rounded to 0
EXTREMES = [0.0, -0.0, 1e-38, 1e-8, -1e-8, 1.0, 80.0, 88.5, 89.0, 1e20, 1e38, math.inf, math.nan, -1e-38]
EXTREMES += [-1.0, -80.0, -87.5, -88.5, -104.0, -1e20, -1e38, -math.inf]


def activation(kind: str, output: int = 1, source: int = 0) -> Activation:
    return Activation(output, source, cast(ActivationKind, kind), PARAMETERS.get(kind, 0.0))


def samples() -> Tensor:
    """(1, 17, 64, 61) floats: a fine grid around 0, a coarse one, and every magnitude of both signs."""
    count = 17 * 64 * 61
    magnitudes = torch.logspace(-30, 30, count // 8)
    parts = [
        torch.linspace(-12, 12, count // 2),
        torch.linspace(-110, 110, count // 4),
        magnitudes,
        -magnitudes,
    ]
    x = torch.cat(parts)
    return torch.cat([x, torch.ones(count - len(x))]).view(1, 17, 64, 61)


def exact_function(kind: str, x: Tensor) -> Tensor | None:
    """Float64 values of functions whose own definition cancels in float64; None for others."""
    if kind == "gelu":
        return x / 2 * torch.special.erfc(-x / math.sqrt(2))
    if kind == "gelu_tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_error_in_last_places(run_ops: RunOps, isa: str, kind: str) -> None:
    x = samples().abs() if kind == "sqrt" else samples()
    got, expected = run_ops(x, [activation(kind)], isa)
    x = x.flatten(1).double()
    exact = expected if (better := exact_function(kind, x)) is None else better
    finite = exact.abs() <= torch.finfo(torch.float32).max
    assert torch.equal(
        got[~finite].double(), torch.full_like(exact[~finite], math.inf).copysign(exact[~finite])
    )
    # A factor of the result that float32 holds as a subnormal number may become 0.
    flushed = 2 * SMALLEST * x.abs().clamp(min=1)
    error = (((got - exact).abs() - flushed).clamp(min=0) / (exact.abs().clamp(min=SMALLEST) * 2.0**-23))[
        finite
    ]
    print(f"{kind}: {error.max():.2f} units in the last place at {x[finite][error.argmax()]:g}")  # pytest -s
    # The tails of GELU are as exact as the exponent of an exponential, up to x² here, is.
    allowed = ULPS + (x[finite] ** 2 if kind.startswith("gelu") else 0)
    assert (error <= allowed).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinities(run_ops: RunOps, isa: str, kind: str) -> None:
    x = torch.tensor(EXTREMES).view(1, len(EXTREMES), 1, 1).repeat(1, 2, 1, 1)
    got, expected = run_ops(x, [activation(kind)], isa)
    torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=3e-36, equal_nan=True)


def convolution(channels: int, kind: str, **fields: object) -> Conv2d:
    weight = torch.randn(channels, channels, 3, 3) / math.sqrt(9 * channels)
    fields = {"output": 1, "input": 0, "padding": (1, 1, 1, 1), "activation": kind, **fields}
    return Conv2d(weight=weight, bias=torch.randn(channels), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["conv_direct_f32", "conv3x3_winograd_f32"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (*PARAMETRIC, "sqrt", "reciprocal")])
def test_epilogue(run_ops: RunOps, isa: str, kind: str, kernel: str) -> None:
    """A function after the bias and a residual, or before a residual; threads give the same bits."""
    for channels in (1, 17, 33):
        first = convolution(channels, "none")
        before = [first, convolution(channels, kind, output=2, input=1, residual=1)]
        after = [first, convolution(channels, kind, output=2, input=1), Add(3, 2, 1)]
        x = torch.randn(3, channels, 6, 5)
        for ops in (before, after):
            got, expected = run_ops(x, ops, isa, kernel)
            error = ((got - expected).abs().max() / expected.abs().max()).item()
            assert error <= 2e-5, f"{error:.1e} of the largest value"
            assert torch.equal(got, run_ops(x, ops, isa, kernel, threads=3)[0])
