"""Every kernel on every instruction set against its float64 twin, at sizes that do not fit its vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcascade.lowering.operations import (
    Activation,
    AdaptivePool,
    Add,
    ChannelReduce,
    Concat,
    Conv2d,
    Flatten,
    Flip,
    LayerNorm,
    Linear,
    Multiply,
    Op,
    Pad,
    Pool,
    Reorder,
    Reshape,
    Resize,
    ScaleShift,
    Slice,
    Softmax,
)

RunOps = Callable[..., tuple[Tensor, Tensor]]
DIRECT, WINOGRAD = "conv_direct_f32", "conv3x3_winograd_f32"
CHANNELS = [(1, 3), (3, 16), (15, 17), (16, 1), (17, 31), (31, 33), (33, 15), (63, 65), (65, 64), (64, 63)]
IMAGES = [(1, 1), (5, 7), (31, 33)]
# bf16 keeps 8 bits: its errors are some 4e-3 of the largest value.
TOLERANCE = {DIRECT: 3e-6, WINOGRAD: 2e-5}


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Errors are measured against the largest value, and most values must not be zero."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return
    assert (expected != 0).double().mean() > 0.2, "mostly zeros prove nothing"
    error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"error {error:.2e} of the largest value, allowed {tolerance:.0e}"


def random_conv(
    channels: int, out: int, kernel: tuple[int, int] = (3, 3), groups: int = 1, **fields: object
) -> Conv2d:
    """A convolution, of value 0 unless told otherwise."""
    weight = torch.randn(out, channels // groups, *kernel) / math.sqrt(channels * math.prod(kernel))
    fields = {"output": 1, "input": 0, **fields}
    return Conv2d(weight=weight, bias=torch.randn(out), groups=groups, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", [DIRECT, WINOGRAD])
@pytest.mark.parametrize("image", IMAGES)
def test_conv3x3_at_odd_sizes(run_ops: RunOps, isa: str, kernel: str, image: tuple[int, int]) -> None:
    for (channels, out), n in product(CHANNELS, [0, 1, 3]):
        conv = random_conv(channels, out, padding=(1, 1, 1, 1))
        got, expected = run_ops(torch.randn(n, channels, *image), [conv], isa, kernel)
        assert_near(got, expected, TOLERANCE[kernel])


@pytest.mark.parametrize("n", [15, 16, 17, 33])
def test_batches_around_a_tile(run_ops: RunOps, isa: str, n: int) -> None:
    conv = random_conv(16, 16, padding=(1, 1, 1, 1), activation="relu")
    got, expected = run_ops(torch.randn(n, 16, 9, 9), [conv], isa)
    assert_near(got, expected, TOLERANCE[WINOGRAD])


def test_large_weights(run_ops: RunOps, isa: str) -> None:
    """A network with more weights than caches hold transforms them anew for few tiles: the same bits."""
    ops = [random_conv(243, 517, padding=(1, 1, 1, 1)), Pool(2, 1, "max", (9, 9), (9, 9))]
    x = torch.randn(20, 243, 9, 9)
    many, expected = run_ops(x, ops, isa, WINOGRAD)
    few, _ = run_ops(x[:1], ops, isa, WINOGRAD)
    assert_near(many, expected, TOLERANCE[WINOGRAD])
    assert torch.equal(few, many[:1])


def integers(tensor: Tensor, limit: int) -> Tensor:
    """Fill with whole numbers of at most this size."""
    return tensor.copy_(torch.randint(-limit, limit + 1, tensor.shape))


def exact_layers(channels: int, image: tuple[int, int]) -> dict[str, Op]:
    """Every kernel that sums, with weights for which fp32 sums are exact."""
    out, area = (1 if channels == 16 else channels + 1), math.prod(image)
    same: dict[str, Any] = {"padding": (1, 1, 1, 1), "activation": "relu"}
    layers = {
        "1×1": random_conv(channels, out, (1, 1)),
        "3×3": random_conv(channels, out, **same),
        "3×3, stride 2": random_conv(channels, out, stride=(2, 2), **same),
        "3×3, stride 2×1, dilation": random_conv(
            channels, out, stride=(2, 1), dilation=(2, 1), padding=(2, 2, 1, 1)
        ),
        "5×5": random_conv(channels, out, (5, 5), padding=(2, 2, 2, 2)),
        "7×7, stride 2": random_conv(channels, out, (7, 7), stride=(2, 2), padding=(3, 3, 3, 3)),
        "depthwise": random_conv(channels, channels, groups=channels, **same),
        "depthwise, 5×5, stride 2": random_conv(
            channels, channels, (5, 5), channels, stride=(2, 2), padding=(2, 2, 2, 2)
        ),
        "grouped": random_conv(3 * channels, 6, groups=3, **same),
        "winograd": random_conv(channels, out, **same),
    }
    for name, conv in layers.items():
        integers(conv.weight, 1 if name == "winograd" else 4)
        integers(conv.bias, 50).abs_()  # or ReLU might leave nothing
    # Winograd's weight transform divides by 24 along each axis.
    layers["winograd"].weight.mul_(576)
    linear = Linear(2, 1, integers(torch.empty(out, channels * area), 4), integers(torch.empty(out), 50))
    return {**layers, "linear": linear}


@pytest.mark.parametrize("name", exact_layers(1, (1, 1)))
@pytest.mark.parametrize(("image", "n"), [((1, 1), 17), ((5, 7), 16), ((31, 33), 1), ((5, 7), 0)])
def test_sums_of_integers_are_exact(
    run_ops: RunOps, isa: str, name: str, image: tuple[int, int], n: int
) -> None:
    kernel = WINOGRAD if name == "winograd" else "" if name.startswith("depthwise") else DIRECT
    for channels in (1, 3, 15, 16, 17, 31, 33, 63, 65):
        layer = exact_layers(channels, image)[name]
        ops: list[Op] = [Flatten(1, 0), layer] if name == "linear" else [layer]
        x = integers(torch.empty(n, 3 * channels if name == "grouped" else channels, *image), 3)
        got, expected = run_ops(x, ops, isa, kernel)
        assert n == 0 or (expected != 0).double().mean() > 0.2, "mostly zeros prove nothing"
        assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("kernel", [DIRECT, WINOGRAD])
def test_residual_and_activation(run_ops: RunOps, isa: str, kernel: str, activation: str) -> None:
    first = random_conv(17, 17, (1, 1))
    conv = random_conv(17, 17, padding=(1, 1, 1, 1), activation=activation, residual=1)
    conv.bias.add_(3.0)  # so that relu6 has something to cut
    got, expected = run_ops(torch.randn(3, 17, 6, 5), [first, _moved(conv, 2)], isa, kernel)
    assert_near(got, expected, TOLERANCE[kernel])


@pytest.mark.parametrize("kernel", [DIRECT, WINOGRAD])
def test_residual_after_the_activation(run_ops: RunOps, isa: str, kernel: str) -> None:
    first = random_conv(17, 17, (1, 1))
    conv = random_conv(17, 17, padding=(1, 1, 1, 1), activation="relu")
    ops = [first, _moved(conv, 2), Add(output=3, input=1, other=2)]
    got, expected = run_ops(torch.randn(3, 17, 6, 5), ops, isa, kernel)
    assert_near(got, expected, TOLERANCE[kernel])


def _moved(conv: Conv2d, output: int) -> Conv2d:
    return Conv2d(**{**vars(conv), "output": output})


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Conv2d, Tensor]:
    """Any convolution that fits an image of at most 12 × 12."""
    sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))
    kernel, dilation = draw(sizes), draw(st.sampled_from([(1, 1), (2, 1), (2, 3)]))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    height, width = (draw(st.integers(r, max(r, 12))) for r in reach)
    groups, per_group = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    channels, out = groups * per_group, groups * draw(st.integers(1, 20))
    conv = random_conv(
        channels,
        out,
        kernel,
        groups,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=draw(st.tuples(*[st.integers(0, 3)] * 4)),
        dilation=dilation,
        activation=draw(st.sampled_from(["none", "relu6"])),
    )
    conv.bias.add_(1.0)
    return conv, torch.randn(draw(st.integers(1, 3)), channels, height, width)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=convolutions())
def test_any_convolution(run_ops: RunOps, isa: str, case: tuple[Conv2d, Tensor]) -> None:
    conv, x = case
    got, expected = run_ops(x, [conv], isa)
    error = (got.double() - expected).abs().max().item()
    assert error <= TOLERANCE[WINOGRAD] * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (1, 3), (4, 2)])
def test_depthwise_convolution(
    run_ops: RunOps, isa: str, kernel: tuple[int, int], stride: tuple[int, int]
) -> None:
    """Maps narrower and wider than a tile of seven columns, and kernels that reach beyond both sides."""
    for width, pad, channels in [(1, 3, 1), (6, 1, 8), (7, 1, 17), (13, 2, 33), (16, 3, 15), (29, 0, 16)]:
        padding = (min(pad, kernel[0] - 1), pad, pad, min(pad, kernel[1] - 1))
        if width + padding[2] + padding[3] < kernel[1]:
            continue
        conv = random_conv(
            channels, channels, kernel, channels, stride=stride, padding=padding, activation="relu6"
        )
        conv.bias.abs_()  # or a lone channel might be all zeros
        got, expected = run_ops(torch.randn(2, channels, 9, width), [conv], isa)
        assert_near(got, expected, TOLERANCE[DIRECT])


def test_depthwise_residual_and_dilation(run_ops: RunOps, isa: str) -> None:
    first = random_conv(17, 17, (1, 1))
    for dilation in (1, 2):
        conv = random_conv(17, 17, groups=17, padding=(dilation,) * 4, dilation=(dilation,) * 2, residual=1)
        got, expected = run_ops(torch.randn(2, 17, 10, 11), [first, _moved(conv, 2)], isa)
        assert_near(got, expected, TOLERANCE[DIRECT])


@pytest.mark.parametrize("width", [4, 8, 16, 24, 32])
@pytest.mark.parametrize("kernel", [DIRECT, WINOGRAD])
def test_grouped_convolution(run_ops: RunOps, isa: str, kernel: str, width: int) -> None:
    """Groups that are merged to whole vectors, that fill them, and that make up more than one panel."""
    for stride, n in product([1, 2], [1, 3]):
        conv = random_conv(
            8 * width, 8 * width, groups=8, stride=(stride, stride), padding=(1, 1, 1, 1), activation="relu"
        )
        got, expected = run_ops(torch.randn(n, 8 * width, 9, 10), [conv], isa, kernel)
        assert_near(got, expected, TOLERANCE[kernel])


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("image", [(2, 2), (3, 9), (6, 7), (8, 8), (17, 12)])
def test_max_pool_in_the_epilogue(run_ops: RunOps, isa: str, image: tuple[int, int], activation: str) -> None:
    """Winograd pools its own tiles: the twin's values, and the same NaN as a pool of its own gives."""
    for channels, out, n in [(16, 16, 1), (17, 33, 2), (33, 8, 3)]:
        conv = random_conv(channels, out, padding=(1, 1, 1, 1), activation=activation)
        ops = [conv, Pool(2, 1, "max", (2, 2), (2, 2))]
        x = torch.randn(n, channels, *image)
        got, expected = run_ops(x, ops, isa, WINOGRAD)
        assert_near(got, expected, TOLERANCE[WINOGRAD])
        x[0, 0, 0, 0] = math.nan
        fused, _ = run_ops(x, ops, isa, WINOGRAD, 3)
        ops = [conv, Pool(2, 1, "max", (1, 1), (1, 1)), Pool(3, 2, "max", (2, 2), (2, 2))]
        apart, _ = run_ops(x, ops, isa, WINOGRAD)
        assert torch.equal(fused.nan_to_num(), apart.nan_to_num())
        assert torch.equal(fused.isnan(), apart.isnan())


@pytest.mark.parametrize(
    "pool",
    [
        Pool(2, 1, "max", (2, 2), (2, 2), ceil_mode=True),
        Pool(2, 1, "max", (3, 3), (2, 2), (1, 1, 1, 1)),
        Pool(2, 1, "max", (2, 2), (1, 1)),
        Pool(2, 1, "average", (2, 2), (2, 2)),
    ],
    ids=["ceil", "3×3", "stride 1", "average"],
)
def test_other_pools_stay_behind_the_convolution(run_ops: RunOps, isa: str, pool: Pool) -> None:
    conv = random_conv(16, 16, padding=(1, 1, 1, 1))
    got, expected = run_ops(torch.randn(2, 16, 9, 7), [conv, pool], isa, WINOGRAD)
    assert_near(got, expected, TOLERANCE[WINOGRAD])


@pytest.mark.parametrize("out", [8, 17, 24, 33, 40, 65, 100, 112])
def test_panels_of_one_to_three_blocks(run_ops: RunOps, isa: str, out: int) -> None:
    for depth, width in [(3, 1), (129, 2), (64, 13), (257, 2), (300, 50)]:
        got, expected = run_ops(torch.randn(2, depth, 1, width), [random_conv(depth, out, (1, 1))], isa)
        assert_near(got, expected, TOLERANCE[DIRECT])


@pytest.mark.parametrize(("channels", "stride"), [(132, (1, 1)), (260, (2, 2)), (517, (2, 1))])
def test_taps_of_many_channels(run_ops: RunOps, isa: str, channels: int, stride: tuple[int, int]) -> None:
    """Sums are added up tap by tap or in parts of a tap, inside the image and where a tap lies outside."""
    # An image's pixels under a row of the kernel would be taken together.
    conv = random_conv(channels, 40, stride=stride, padding=(1, 2, 0, 1), input=1, output=2)
    got, expected = run_ops(torch.randn(2, channels, 6, 7), [Activation(1, 0, "relu"), conv], isa, DIRECT)
    assert_near(got, expected, TOLERANCE[DIRECT])


def assert_same_bits(
    share_ops: Callable[..., Tensor], x: Tensor, ops: Sequence[Op], isa: str, threads: int
) -> None:
    """Layers in a row, on one thread and again and again on several."""
    ops = [Conv2d(**{**vars(op), "input": i}) for i, op in enumerate(ops)]
    one = share_ops(x, ops, isa)
    for _ in range(20):
        assert torch.equal(one, share_ops(x, ops, isa, "", threads))


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_threads_give_the_same_bits(share_ops: Callable[..., Tensor], isa: str, threads: int) -> None:
    """One image, so that threads share every layer: by rows, or by channels where rows are few."""
    ops = [
        random_conv(3, 24, stride=(2, 2), padding=(1, 1, 1, 1), activation="relu6"),
        _moved(random_conv(24, 72, (1, 1), activation="relu6"), 2),
        _moved(random_conv(72, 72, groups=72, stride=(2, 2), padding=(1, 1, 1, 1)), 3),
        _moved(random_conv(72, 96, groups=6, stride=(2, 2), padding=(1, 1, 1, 1)), 4),
        _moved(random_conv(96, 96, groups=6, padding=(1, 1, 1, 1)), 5),
        _moved(random_conv(96, 200, (1, 1)), 6),
    ]
    assert_same_bits(share_ops, torch.randn(1, 3, 53, 45), ops, isa, threads)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_divide_large_weights(share_ops: Callable[..., Tensor], isa: str, threads: int) -> None:
    """Also where rows are many, by channels, if weights do not fit the second-level cache."""
    ops: list[Op] = [
        random_conv(72, 136, padding=(1, 1, 1, 1)),
        _moved(random_conv(136, 340, (1, 1), stride=(2, 2)), 2),
        _moved(random_conv(340, 330, (1, 1)), 3),
    ]
    assert_same_bits(share_ops, torch.randn(1, 72, 17, 15), ops, isa, threads)


def _layers(channels: int) -> dict[str, list[Op]]:
    vector = torch.randn(channels)
    return {
        "max pool": [Pool(1, 0, "max", (3, 3), (2, 2), (1, 1, 1, 1))],
        "max pool, ceil": [Pool(1, 0, "max", (2, 3), (2, 2), (0, 0, 0, 1), ceil_mode=True)],
        "average pool": [Pool(1, 0, "average", (3, 3), (2, 1), (1, 0, 1, 1))],
        "average pool, ceil": [Pool(1, 0, "average", (3, 3), (2, 2), (1, 1, 1, 1), ceil_mode=True)],
        "average pool, inside": [Pool(1, 0, "average", (3, 2), (2, 2), (1, 1, 1, 1), include_padding=False)],
        "global pool and linear": [
            Pool(1, 0, "average", (7, 6), (1, 1)),
            Flatten(2, 1),
            Linear(3, 2, torch.randn(10, channels), torch.randn(10), "relu"),
        ],
        "flatten and linear": [
            Flatten(1, 0),
            Linear(2, 1, torch.randn(9, channels * 42) / channels, torch.randn(9)),
        ],
        "activation": [Activation(1, 0, "relu")],
        "scale and shift": [ScaleShift(1, 0, vector, vector.flip(0))],
        "slice": [Slice(1, 0, (channels // 2, 1, 0), (channels, 7, 6), (1, 2, 3))],
        "pad": [Pad(1, 0, (3, 0, 1), (channels, 2, 0), 0.5)],
        "flip": [Flip(1, 0)],
        "concat": [Slice(1, 0, (0, 0, 0), (1, 7, 6), (1, 1, 1)), Concat(2, (0, 1, 0))],
        "add": [ScaleShift(1, 0, vector, vector.flip(0)), Add(2, 1, 0, "relu6")],
        "pad, reflect": [Pad(1, 0, (0, 3, 1), (0, 2, 5), mode="reflect")],
        "pad, replicate": [Pad(1, 0, (0, 3, 1), (0, 2, 9), mode="replicate")],
        "scale and shift, per element": [
            ScaleShift(1, 0, torch.randn(channels, 7, 6), torch.randn(channels, 7, 6))
        ],
        "adaptive average pool": [AdaptivePool(1, 0, "average", (3, 5))],
        "adaptive max pool": [AdaptivePool(1, 0, "max", (9, 4))],
        "reorder": [Reorder(1, 0, (*reversed(range(channels)), 0, channels // 2))],
        "reshape": [Reshape(1, 0, (7, channels, 6))],
        "reshape to a vector": [Reshape(1, 0, (channels * 42,)), Reshape(2, 1, (6, 7, channels))],
        "nearest resize": [Resize(1, 0, "nearest", (15, 4))],
        "bilinear resize": [Resize(1, 0, "bilinear", (15, 4))],
        "bilinear resize, aligned corners": [Resize(1, 0, "bilinear", (13, 1), align_corners=True)],
        "bilinear resize, antialiased": [Resize(1, 0, "bilinear", (3, 9), antialias=True)],
        "bicubic resize": [Resize(1, 0, "bicubic", (15, 2), antialias=True)],
        "layer norm": [LayerNorm(1, 0, vector, vector.flip(0) + 1, 1e-6)],
        "layer norm of a vector": [
            Flatten(1, 0),
            LayerNorm(2, 1, torch.randn(42 * channels), torch.ones(42 * channels), 0.01),
        ],
        "mean over channels": [ChannelReduce(1, 0, "mean")],
        "maximum over channels": [ChannelReduce(1, 0, "max")],
        "softmax": [Softmax(1, 0, channels)],
        "multiply": [ScaleShift(1, 0, vector, vector.flip(0)), Multiply(2, 1, 0)],
        "square": [Multiply(1, 0, 0)],
        "channel gate": [AdaptivePool(1, 0, "average", (1, 1)), Multiply(2, 0, 1)],
        "channel gate first": [AdaptivePool(1, 0, "max", (1, 1)), Multiply(2, 1, 0)],
        "spatial gate": [ChannelReduce(1, 0, "max"), Activation(2, 1, "sigmoid"), Multiply(3, 0, 2)],
        "outer sum": [AdaptivePool(1, 0, "max", (7, 1)), Pool(2, 0, "max", (7, 1), (1, 1)), Add(3, 1, 2)],
        "outer product": [AdaptivePool(1, 0, "max", (1, 1)), ChannelReduce(2, 0, "mean"), Multiply(3, 1, 2)],
        "squeeze and excitation": [
            AdaptivePool(1, 0, "average", (1, 1)),
            random_conv(channels, 5, (1, 1), output=2, input=1, activation="silu"),
            random_conv(5, channels, (1, 1), output=3, input=2, activation="sigmoid"),
            Multiply(4, 0, 3),
            Activation(5, 4, "silu"),
        ],
        "root of a product": [Multiply(1, 0, 0), Activation(2, 1, "sqrt"), Activation(3, 2, "exp")],
    }


def _split_attention(channels: int) -> list[Op]:
    """Softmax over two and over three parts, as many channels each as given."""
    parts = [Softmax(3, 2, 3), Slice(4, 3, (0, 0, 0), (2 * channels, 7, 6), (1, 1, 1)), Softmax(5, 4, 2)]
    return [Activation(1, 0, "silu"), Concat(2, (0, 1, 0)), *parts]


@pytest.mark.parametrize("name", _layers(1))
@pytest.mark.parametrize("channels", [1, 3, 16, 17, 33])
def test_other_layers(run_ops: RunOps, isa: str, name: str, channels: int) -> None:
    x, ops = torch.randn(5, channels, 7, 6), _layers(channels)[name]
    got, expected = run_ops(x, ops, isa)
    assert_near(got, expected, TOLERANCE[DIRECT])
    assert torch.equal(got, run_ops(x, ops, isa, threads=3)[0])


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 33, 65])
def test_softmax_over_parts(run_ops: RunOps, isa: str, channels: int) -> None:
    got, expected = run_ops(torch.randn(3, channels, 7, 6), _split_attention(channels), isa)
    assert_near(got, expected, TOLERANCE[DIRECT])


@pytest.mark.parametrize("size", [(1, 1), (1, 65), (64, 63)])
def test_global_pools_of_integers_are_exact(run_ops: RunOps, isa: str, size: tuple[int, int]) -> None:
    for channels, kind in product((1, 15, 33, 65, 130), ("average", "max")):
        x = integers(torch.empty(2, channels, *size), 9)
        pool = AdaptivePool(1, 0, kind, (1, 1))  # type: ignore[arg-type]
        area = ScaleShift(2, 1, torch.full((channels,), float(math.prod(size))), torch.zeros(channels))
        got, expected = run_ops(x, [pool, area], isa)
        assert torch.equal(got.round(), expected.round().float())
        assert torch.equal(got, run_ops(x, [pool, area], isa, threads=4)[0])


# Functions and products of padded channels may not be finite; a Winograd convolution reads one of them.
@pytest.mark.parametrize("kind", ["reciprocal", "exp", "sqrt"])
def test_padded_channels_stay_finite(run_ops: RunOps, isa: str, kind: Any) -> None:
    x = torch.rand(2, 3, 5, 5) + 1
    first = random_conv(3, 3, (1, 1), activation=kind)
    first.weight.abs_()
    first.bias.abs_().add_(1)
    padded = Slice(2, 1, (0, 0, 0), (1, 5, 5), (1, 1, 1))
    alone = Activation(3, 2, kind)
    got, expected = run_ops(x, [first, padded, alone, random_conv(1, 5, input=3, output=4)], isa, WINOGRAD)
    assert_near(got, expected, TOLERANCE[WINOGRAD])


GATED = ["channel gate", "spatial gate", "squeeze and excitation", "softmax", "layer norm", "outer product"]


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gates_keep_to_their_instance(run_ops: RunOps, isa: str, name: str, value: float) -> None:
    """What is not finite shows in its instance, and nowhere else."""
    x, ops = torch.randn(20, 17, 7, 6), _layers(17)[name]
    clean, _ = run_ops(x, ops, isa)
    bad = torch.arange(20) % 3 == 1
    x[bad, 3, 2, 2] = value
    got, expected = run_ops(x, ops, isa)
    assert torch.equal(got[~bad], clean[~bad])
    assert torch.equal(got.isfinite(), expected.isfinite())


@pytest.mark.parametrize("position", range(9))
def test_nan_passes_max_pool_and_relu(run_ops: RunOps, isa: str, position: int) -> None:
    x = torch.randn(2, 17, 3, 3)
    x[0, 5, position // 3, position % 3] = math.nan
    ops = [Activation(1, 0, "relu"), Pool(2, 1, "max", (3, 3), (3, 3))]
    got, expected = run_ops(x, ops, isa)
    assert torch.equal(got.isnan(), expected.isnan())
    assert got.isnan().sum() == 1


@pytest.mark.parametrize("kernel", [DIRECT, WINOGRAD])
def test_nan_stays_in_its_instance(run_ops: RunOps, isa: str, kernel: str) -> None:
    x = torch.randn(20, 16, 4, 4)
    conv = random_conv(16, 16, padding=(1, 1, 1, 1), activation="relu")
    clean, _ = run_ops(x, [conv], isa, kernel)
    bad = torch.arange(20) % 3 == 1
    x[bad] = math.nan
    got, _ = run_ops(x, [conv], isa, kernel)
    assert got[bad].isnan().all()
    assert torch.equal(got[~bad], clean[~bad])
