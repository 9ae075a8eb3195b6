"""Every int8 kernel on every instruction set against its twin, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcascade import _C
from fastcascade.lowering.operations import Flatten, Op, Pool
from fastcascade.lowering.quantized_operations import (
    Dequantize,
    Quantize,
    QuantizedConv2d,
    QuantizedLinear,
)

RunOps = Callable[..., tuple[Tensor, Tensor]]
CHANNELS = [(1, 3), (3, 16), (15, 17), (16, 1), (17, 31), (33, 15), (64, 65), (65, 64)]


@pytest.fixture(params=[name for name, _ in _C.int8_kernels()])
def kernels(request: pytest.FixtureRequest) -> str:
    """The name of a set of int8 kernels; skips those that this machine lacks."""
    reason = dict(_C.int8_kernels())[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape).float()


def random_layer(channels: int, out: int, kernel: tuple[int, int], **fields: Any) -> QuantizedConv2d:
    """A convolution of value 1 whose outputs spread over the range of bytes."""
    groups = fields.get("groups", 1)
    weight = torch.randint(-127, 128, (out, channels // groups, *kernel), dtype=torch.int8)
    spread = 60 / (100 * 75 * math.sqrt(weight[0].numel()))
    return QuantizedConv2d(
        **{
            "output": 2,
            "input": 1,
            "weight": weight,
            "multiplier": spread * (torch.rand(out) + 0.5),
            "bias": 40 * torch.randn(out),
            "zero_point": 0,
            **fields,
        }
    )


def run_bytes(
    run_ops: RunOps, x: Tensor, layers: list[Op], kernels: str, threads: int = 1, isa: str = ""
) -> tuple[Tensor, Tensor]:
    """Run layers on bytes ``x``, which a quantize of scale 1 makes of floats; the results as float32."""
    first = layers[0]
    zero_point = getattr(first, "zero_point", 0)
    ops: list[Op] = [Quantize(1, 0, 1.0, zero_point), *layers]
    last = layers[-1]
    if getattr(last, "output_zero_point", 0) is not None and not isinstance(last, Dequantize):
        ops.append(Dequantize(len(ops) + 1, len(ops), 0.5, getattr(last, "output_zero_point", 0)))
    got, expected = run_ops(x - zero_point, ops, isa, kernels, threads)
    return got, expected.float()


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got, expected)
    assert expected.numel() < 1000 or len(expected.unique()) > 3, "constants prove nothing"


def as_bytes(layer: QuantizedConv2d, zero_point: int) -> QuantizedConv2d:
    limits = {"low": float(-zero_point), "high": float(255 - zero_point)}
    return replace(layer, output_zero_point=zero_point, **limits)


@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("image", [(1, 1), (5, 7), (17, 16)])
def test_convolution(
    run_ops: RunOps, kernels: str, image: tuple[int, int], kernel: tuple[int, int], zero_point: int
) -> None:
    pad = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    for (channels, out), n, stride in product(CHANNELS, [0, 3], [(1, 1), (2, 2)]):
        layer = random_layer(channels, out, kernel, padding=pad, stride=stride, zero_point=zero_point)
        x = random_bytes(n, channels, *image)
        for made in (layer, as_bytes(layer, 0), as_bytes(layer, 128)):
            got, expected = run_bytes(run_ops, x, [made], kernels)
            assert_same_bits(got, expected)


@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
def test_windows_of_every_kind(run_ops: RunOps, kernels: str, zero_point: int) -> None:
    windows: list[dict[str, Any]] = [
        {"padding": (2, 0, 3, 1), "dilation": (2, 1)},
        {"padding": (0, 0, 0, 0), "stride": (1, 3)},
        {"padding": (1, 2, 0, 4), "stride": (3, 1), "dilation": (1, 3)},
    ]
    for window, groups, (channels, out) in product(windows, [1, 3], [(6, 9), (48, 24), (51, 96)]):
        layer = random_layer(channels, out, (3, 3), groups=groups, zero_point=zero_point, **window)
        got, expected = run_bytes(run_ops, random_bytes(2, channels, 9, 11), [as_bytes(layer, 128)], kernels)
        assert_same_bits(got, expected)


@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (2, 7)])
def test_depthwise(run_ops: RunOps, kernels: str, kernel: tuple[int, int], zero_point: int) -> None:
    for channels, stride, dilation in product([2, 16, 17, 65], [(1, 1), (2, 2)], [(1, 1), (2, 1)]):
        layer = random_layer(
            channels,
            channels,
            kernel,
            groups=channels,
            padding=(1, 2, 3, 0),
            stride=stride,
            dilation=dilation,
            zero_point=zero_point,
        )
        for made in (layer, as_bytes(layer, 128)):
            got, expected = run_bytes(run_ops, random_bytes(2, channels, 9, 13), [made], kernels)
            assert_same_bits(got, expected)


@pytest.mark.parametrize("groups", [1, 17])
def test_residuals_and_limits(run_ops: RunOps, kernels: str, groups: int) -> None:
    """ReLU and ReLU6 as limits; a residual of another scale and zero point."""
    for residual_zero, output_zero, high in product([0, 128], [0, 128, None], [6.0 / 0.1, math.inf]):
        first = as_bytes(random_layer(17, 17, (1, 1)), residual_zero)
        layer = random_layer(17, 17, (3, 3), groups=groups, padding=(1, 1, 1, 1), output=3)
        layer = replace(
            layer,
            residual=2,
            residual_scale=0.37,
            residual_zero_point=residual_zero,
            low=0.0,
            high=high if output_zero is None else min(high, 255.0 - output_zero),
            output_zero_point=output_zero,
        )
        got, expected = run_bytes(run_ops, random_bytes(3, 17, 6, 5), [first, layer], kernels)
        assert_same_bits(got, expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("out", [8, 16, 24])
def test_joined_pixels(run_ops: RunOps, kernels: str, out: int, size: int, stride: int) -> None:
    """Few channels: neighbouring output pixels may be multiplied as one, in rows of any length."""
    window: dict[str, Any] = {"kernel": (size, size), "padding": (size // 2,) * 4}
    for width in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 18):
        first = random_layer(3, out, stride=(stride, stride), zero_point=7, **window)
        second = random_layer(out, out, zero_point=128, input=2, output=3, **window)
        second = replace(second, residual=2, residual_scale=0.37, residual_zero_point=128)
        last = random_layer(out, 8, zero_point=31, input=3, output=4, **window)
        layers: list[Op] = [as_bytes(first, 128), as_bytes(second, 31), last]
        got, expected = run_bytes(run_ops, random_bytes(2, 3, 6, width), layers, kernels)
        assert_same_bits(got, expected)


@pytest.mark.parametrize(("channels", "out"), [(1, 2), (15, 17), (64, 33), (257, 65)])
def test_linear(run_ops: RunOps, kernels: str, channels: int, out: int) -> None:
    conv = random_layer(channels, out, (1, 1), zero_point=128)
    linear = QuantizedLinear(3, 2, conv.weight.flatten(1), conv.multiplier, conv.bias, 128, 0.0, 255.0, 0)
    ops: list[Op] = [
        Quantize(2, 1, 1.0, 128),
        linear,
        Dequantize(4, 3, 0.5, 0),
    ]
    x = torch.randint(-128, 128, (19, channels, 1, 1)).float()
    got, expected = run_ops(x, [Flatten(1, 0), *ops], "", kernels)
    assert_same_bits(got, expected.float())


@pytest.mark.parametrize(("value", "weight"), [(255, 127), (255, -127), (0, 127), (0, -127)])
@pytest.mark.parametrize("groups", [1, 40])
def test_the_largest_sums(run_ops: RunOps, kernels: str, value: int, weight: int, groups: int) -> None:
    """Pairs of such products do not fit in 16 bits."""
    for zero_point in (0, 7, 128, 255):
        layer = random_layer(40, 40, (3, 3), groups=groups, padding=(1, 1, 1, 1), zero_point=zero_point)
        layer.weight.fill_(weight)
        x = torch.full((1, 40, 5, 5), float(value))
        got, expected = run_bytes(run_ops, x, [layer], kernels)
        assert torch.equal(got, expected)
        sums = (got.reshape(40, 5, 5) - layer.bias[:, None, None]) / layer.multiplier[:, None, None]
        exact = (value - zero_point) * weight * 9 * 40 // groups
        assert sums[:, 2, 2].double().sub(exact).abs().max() <= 1e-5 * abs(exact) + 2


@pytest.mark.parametrize(("value", "weight"), [(255, 127), (255, -127)])
@pytest.mark.parametrize("channels", [1800, 1801])
def test_the_largest_sums_of_winograd(
    run_ops: RunOps, kernels: str, channels: int, value: int, weight: int
) -> None:
    """Winograd's sums are four times as large, so it stops where they would not fit in 32 bits."""
    layer = random_layer(channels, 3, (3, 3), padding=(1, 1, 1, 1))
    layer.weight.fill_(weight)
    got, expected = run_bytes(run_ops, torch.full((1, channels, 3, 3), float(value)), [layer], kernels)
    assert torch.equal(got, expected)
    center = (got.reshape(3, 3, 3)[:, 1, 1] - layer.bias) / layer.multiplier
    assert (center / (9.0 * channels * value * weight) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    "pool",
    [
        Pool(2, 1, "max", (2, 2), (2, 2)),
        Pool(2, 1, "max", (3, 3), (2, 2), (1, 1, 1, 1)),
        Pool(2, 1, "max", (3, 2), (1, 2), (1, 0, 0, 1), ceil_mode=True),
    ],
    ids=["2×2", "padding", "ceil"],
)
def test_max_pool(run_ops: RunOps, kernels: str, pool: Pool) -> None:
    for channels in (1, 16, 33, 64, 128):  # padded to 16, 48, 64 and 128
        got, expected = run_bytes(run_ops, random_bytes(3, channels, 9, 7), [pool], kernels)
        assert_same_bits(got, expected)


@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
@pytest.mark.parametrize("scale", [1.0, 0.1, 3e-5, 7e4])
def test_rounding(run_ops: RunOps, kernels: str, scale: float, zero_point: int) -> None:
    """Halves round to even; values beyond the range are its ends, however large."""
    steps = torch.cat([torch.tensor([3e38, -3e38]), torch.arange(-600, 601) / 2, torch.randn(612) * 200])
    x = (steps * torch.tensor(scale)).nan_to_num(posinf=3e38, neginf=-3e38).reshape(5, 33, 11, 1)
    scale = float(torch.tensor(scale))
    ops: list[Op] = [Quantize(1, 0, scale, zero_point), Dequantize(2, 1, scale, zero_point)]
    got, expected = run_ops(x, ops, "", kernels)
    assert torch.equal(got, expected.float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_what_is_not_finite_makes_its_instance_invalid(
    run_ops: RunOps, kernels: str, value: float, n: int, kernel: tuple[int, int]
) -> None:
    layers: list[Op] = [
        as_bytes(random_layer(17, 33, (3, 3), padding=(1, 1, 1, 1)), 0),
        random_layer(33, 20, kernel, input=2, output=3),
    ]
    x = random_bytes(n, 17, 5, 6)
    clean, _ = run_bytes(run_ops, x, layers, kernels)
    bad = torch.arange(n) % 3 == 0
    x[bad, 3, 4, 5] = value
    for threads in (1, 3):
        got, _ = run_bytes(run_ops, x, layers, kernels, threads)
        assert got[bad].isnan().all()
        assert torch.equal(got[~bad], clean[~bad])
    again, _ = run_bytes(run_ops, x, [*layers[:1], Dequantize(3, 2, 1.0, 0)], kernels)
    assert again[bad].isnan().all()
    assert again[~bad].isfinite().all()


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("image", [(1, 1), (1, 3), (5, 5), (4, 8), (9, 7)])
def test_images_of_few_channels(run_ops: RunOps, kernels: str, image: tuple[int, int], channels: int) -> None:
    """A vector may hold pixels of two images, of which one has a NaN in its first or last value."""
    n = 7
    layer = random_layer(channels, 20, (3, 3), padding=(1, 1, 1, 1), zero_point=7)
    x = random_bytes(n, channels, *image)
    clean, expected = run_bytes(run_ops, x, [layer], kernels)
    assert_same_bits(clean, expected)
    bad = torch.arange(n) % 2 == 1
    for channel, row, column in [(0, 0, 0), (-1, -1, -1)]:
        spoilt = x.clone()
        spoilt[bad, channel, row, column] = math.nan
        for threads in (1, 3):
            got, _ = run_bytes(run_ops, spoilt, [layer], kernels, threads)
            assert got[bad].isnan().all()
            assert torch.equal(got[~bad], clean[~bad])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_give_the_same_bits(run_ops: RunOps, kernels: str, threads: int) -> None:
    """One image, so that threads share every layer: by pixels, or by panels where pixels are few."""
    layers: list[Op] = [
        as_bytes(random_layer(3, 40, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1)), 0),
        as_bytes(random_layer(40, 40, (3, 3), groups=40, input=2, output=3), 0),
        as_bytes(random_layer(40, 40, (3, 3), groups=5, input=3, output=4), 0),
        as_bytes(random_layer(40, 100, (3, 3), groups=5, stride=(7, 7), input=4, output=5), 0),
        as_bytes(random_layer(100, 90, (3, 3), padding=(1, 1, 1, 1), input=5, output=6), 0),
        random_layer(90, 90, (1, 1), input=6, output=7),
    ]
    x = random_bytes(1, 3, 33, 27)
    one, expected = run_bytes(run_ops, x, layers, kernels)
    many, _ = run_bytes(run_ops, x, layers, kernels, threads)
    assert_same_bits(one, expected)
    assert torch.equal(one, many)


def test_portable_kernels_with_portable_vectors(run_ops: RunOps) -> None:
    layer = as_bytes(random_layer(33, 15, (3, 3), padding=(1, 1, 1, 1), zero_point=128), 0)
    got, expected = run_bytes(run_ops, random_bytes(2, 33, 6, 7), [layer], "", isa="portable")
    assert_same_bits(got, expected)


@pytest.mark.parametrize(
    ("kernel", "isa", "message"),
    [
        ("int8_neon", "", "unknown kernels 'int8_neon'; expected one of int8_amx, int8_avx512vnni, "),
        ("int8_avx2", "portable", "wider vectors than instruction set 'portable'|are|need"),
    ],
)
def test_kernels_that_cannot_run_are_refused(run_ops: RunOps, kernel: str, isa: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_bytes(run_ops, random_bytes(1, 3, 4, 4), [random_layer(3, 4, (1, 1))], kernel, isa=isa)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_point": 256}, "zero point is 256, expected 0 to 255"),
        ({"multiplier": torch.full((4,), math.inf)}, "multiplier or bias is not finite"),
        ({"multiplier": torch.ones(3)}, "multiplier has 3 numbers, expected 4"),
        ({"low": 2.0, "high": 1.0}, "clamped to 2.0* to 1.0*"),
        ({"low": -1.0, "high": 9.0, "output_zero_point": 0}, "clamped to -1"),
        ({"weight": torch.full((4, 4, 1, 1), -128, dtype=torch.int8)}, "weight is beyond -127 to 127"),
        ({"residual": 0, "residual_scale": 1.0}, "reads float32, which it cannot"),
        ({"input": 0}, "reads float32, which it cannot"),
    ],
)
def test_forged_layers_are_refused(run_ops: RunOps, change: dict[str, Any], message: str) -> None:
    """The engine trusts no plan: it checks what its kernels rely on."""
    layer = random_layer(4, 4, (1, 1))
    for name, value in change.items():
        object.__setattr__(layer, name, value)  # the plan itself would refuse it
    object.__setattr__(layer, "output_shape", lambda *_: (4, 4, 4))
    with pytest.raises(ValueError, match=message):
        run_ops(random_bytes(1, 4, 4, 4), [Quantize(1, 0, 1.0, 0), layer], "", "")
