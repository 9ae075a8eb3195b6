"""Operators of the networks people use: each lowers to operations that compute what eager mode does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fastcascade as fc
from fastcascade.lowering.axes import channel_order, regroup, stored_axes, to_stored_order
from fastcascade.lowering.operations import Flip, Multiply, Reorder, Slice
from fastcascade.testing.networks import randomise_statistics
from fastcascade.testing.oracle import reference_logits

SHAPE = (8, 6, 5)


class Block(nn.Module):
    """A stem, ``function`` of its features, and a linear head."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.function = function
        self.layers = nn.ModuleDict(layers)
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.stem(x), **self.layers) if len(self.layers) else self.function(self.stem(x))
        return self.head(y.flatten(1))  # type: ignore[no-any-return]


def lower(block: Block) -> Any:
    block(torch.zeros(2, 3, *SHAPE[1:]))
    return fc.plan(fc.Cascade([randomise_statistics(block).eval()], None, 5, (3, *SHAPE[1:]))).stages[0]


def check(block: Block) -> Any:
    """Lower, require operations throughout, compare with eager mode in float64."""
    block(torch.zeros(2, 3, *SHAPE[1:]))
    plan = fc.plan(fc.Cascade([randomise_statistics(block).eval()], None, 5, (3, *SHAPE[1:])))
    assert plan.stages[0].opaque_reason is None
    x = 3 * torch.randn(3, 3, *SHAPE[1:], dtype=torch.float64)
    with torch.no_grad():
        want = block.double()(x.clone())
    got = reference_logits(plan, x)[0]
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    return plan.stages[0]


ACTIVATIONS = {
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 0.7),
    "mish": F.mish,
    "squared relu": lambda x: torch.square(F.relu(x)),
    "tanh": torch.tanh,
    "clamp": lambda x: x.clamp(-0.5, 1.25),
    "squares": lambda x: x**2,
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "divided": lambda x: x / (1 + x * x),
    "in place": lambda x: F.silu(x, inplace=True) + x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_elementwise_functions(name: str) -> None:
    check(Block(ACTIVATIONS[name]))


def test_parametric_relu() -> None:
    check(Block(lambda x, f: f(x), f=nn.PReLU(8)))


def squeeze_excite(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
    return x * up(F.silu(down(x.mean((2, 3), keepdim=True)))).sigmoid()


def squeeze_excite_linear(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
    gate = up(F.relu(down(F.adaptive_avg_pool2d(x, 1).flatten(1)))).sigmoid()
    return x * gate.view(*gate.shape, 1, 1).expand_as(x)


def eca(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x.mean((2, 3)).view(x.shape[0], 1, -1))
    return x * y.view(x.shape[0], -1, 1, 1).sigmoid()


def spatial_gate(x: Tensor, conv: nn.Module) -> Tensor:
    y = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * conv(y).sigmoid()


def channel_max(x: Tensor) -> Tensor:
    return x * x.max(1, keepdim=True)[0]


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    left, right = y.chunk(2, 1)
    return torch.cat([left, F.relu(right)], 1)


def split_attention(x: Tensor, conv: nn.Module) -> Tensor:
    """As in ResNeSt: two parts of the channels, weighted by a softmax over the parts."""
    n, c, h, w = x.shape
    parts = x.reshape(n, 2, c // 2, h, w)
    gap = parts.sum(1).mean((2, 3), keepdim=True)
    weights = conv(gap).view(n, 1, 2, -1).transpose(1, 2).softmax(1).reshape(n, -1)
    return (parts * weights.reshape(n, 2, c // 2, 1, 1)).sum(1)


def selective_kernel(x: Tensor, first: nn.Module, second: nn.Module, attention: nn.Module) -> Tensor:
    paths = torch.stack([first(x), second(x)], 1)
    weights = attention(paths.sum(1).mean((2, 3), keepdim=True))
    weights = weights.view(x.shape[0], 2, 8, 1, 1).softmax(1)
    return (paths * weights).sum(1)


def nhwc_block(x: Tensor, norm: nn.Module, up: nn.Module, down: nn.Module, scale: nn.Module) -> Tensor:
    """As in ConvNeXt."""
    y = norm(x.permute(0, 2, 3, 1))
    y = down(F.gelu(up(y))) * scale.weight
    return x + y.permute(0, 3, 1, 2)


def response_norm(x: Tensor, scale: nn.Module) -> Tensor:
    """Global response normalisation, as in ConvNeXt V2."""
    y = x.permute(0, 2, 3, 1)
    norm = y.norm(p=2, dim=(1, 2), keepdim=True)
    norm = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
    return (
        y + torch.addcmul(scale.bias.view(1, 1, 1, -1), scale.weight.view(1, 1, 1, -1), y * norm)
    ).permute(0, 3, 1, 2)


def layer_norm_2d(x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    var = (x - mean).pow(2).mean(1, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt()


def pyramid(x: Tensor) -> Tensor:
    small = F.avg_pool2d(x[:, :, :, :4], 2)
    up = F.interpolate(small, scale_factor=2, mode="nearest")
    return x[:, :, :, :4] + up + F.interpolate(small, size=(6, 4), mode="bilinear")


def blur(x: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype)
    weight = (kernel[:, None] * kernel / 16).expand(8, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), weight, stride=2, groups=8)


def randomised(norm: nn.GroupNorm) -> nn.GroupNorm:
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def space_to_depth(x: Tensor) -> Tensor:
    """As in TResNet's stem, with cells of two rows: places in a cell come before the channels."""
    n, c, h, w = x.shape
    y = x.view(n, c, h // 2, 2, w, 1).permute(0, 3, 5, 1, 2, 4)
    return F.relu(y.contiguous().view(n, 2 * c, h // 2, w))


def unshuffle(x: Tensor) -> Tensor:
    """As ``pixel_unshuffle``: channels come before the pixels of a cell."""
    n, c, h, _ = x.shape
    y = x[..., :4].reshape(n, c, h // 3, 3, 2, 2).permute(0, 1, 3, 5, 2, 4)
    return F.relu(y.reshape(n, 6 * c, h // 3, 2))


BLOCKS: dict[str, Callable[[], Block]] = {
    "squeeze and excite": lambda: Block(squeeze_excite, down=nn.Conv2d(8, 2, 1), up=nn.Conv2d(2, 8, 1)),
    "squeeze by linear": lambda: Block(squeeze_excite_linear, down=nn.Linear(8, 2), up=nn.Linear(2, 8)),
    "eca": lambda: Block(eca, conv=nn.Conv1d(1, 1, 3, padding=1, bias=False)),
    "spatial gate": lambda: Block(spatial_gate, conv=nn.Conv2d(2, 1, 3, padding=1)),
    "maximum over channels": lambda: Block(channel_max),
    "channel shuffle": lambda: Block(shuffle),
    "antialiased bilinear": lambda: Block(
        lambda x: F.interpolate(x, (3, 7), mode="bilinear", antialias=True)
    ),
    "antialiased bicubic": lambda: Block(lambda x: F.interpolate(x, (2, 4), mode="bicubic", antialias=True)),
    "channels in any order": lambda: Block(lambda x: x.relu().index_select(1, torch.tensor([3, 0, 0, 7, 1]))),
    "native channel shuffle": lambda: Block(lambda x: F.relu(F.channel_shuffle(x, 4))),
    "split attention": lambda: Block(split_attention, conv=nn.Conv2d(4, 8, 1)),
    "selective kernel": lambda: Block(
        selective_kernel,
        first=nn.Conv2d(8, 8, 1),
        second=nn.Conv2d(8, 8, 3, padding=1),
        attention=nn.Conv2d(8, 16, 1),
    ),
    "nhwc block": lambda: Block(
        nhwc_block, norm=nn.LayerNorm(8), up=nn.Linear(8, 12), down=nn.Linear(12, 8), scale=nn.LayerNorm(8)
    ),
    "response norm": lambda: Block(response_norm, scale=nn.LayerNorm(8)),
    "layer norm by hand": lambda: Block(layer_norm_2d),
    "layer norm of a vector": lambda: Block(lambda x, f: f(x.mean((2, 3))), f=nn.LayerNorm(8)),
    "group norm": lambda: Block(lambda x, f: f(x), f=randomised(nn.GroupNorm(4, 8))),
    "one group": lambda: Block(lambda x, f: f(x), f=randomised(nn.GroupNorm(1, 8))),
    "groups of one": lambda: Block(lambda x, f: f(x), f=nn.GroupNorm(8, 8, affine=False)),
    "space to depth": lambda: Block(space_to_depth),
    "unshuffle": lambda: Block(unshuffle),
    "pyramid": lambda: Block(pyramid),
    "blur pool": lambda: Block(blur),
    "replicate padding": lambda: Block(lambda x: F.pad(x, (2, 1, 0, 3), "replicate")),
    "adaptive average pool": lambda: Block(lambda x: F.adaptive_avg_pool2d(x, (4, 3))),
    "adaptive max pool": lambda: Block(lambda x: F.adaptive_max_pool2d(x, (4, 3))),
    "divisor": lambda: Block(lambda x: F.avg_pool2d(x, 2, padding=1, divisor_override=3)),
    "position embedding": lambda: Block(lambda x, e: x + e.weight.view(1, 8, 6, 5), e=nn.Embedding(8, 30)),
    "mirrored": lambda: Block(lambda x: x + x.flip(3)),
    "tokens": lambda: Block(
        lambda x, f: f(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape), f=nn.Linear(8, 8)
    ),
    "unbind and stack": lambda: Block(
        lambda x: torch.stack([p.relu() for p in x.unflatten(1, (4, 2)).unbind(1)], 2).flatten(1, 2)
    ),
    "every other channel": lambda: Block(lambda x: x[:, 1::2] * x[:, 0::2]),
    "cat of channels-last": lambda: Block(
        lambda x: torch.cat([x.permute(0, 2, 3, 1), x.relu().permute(0, 2, 3, 1)], -1).permute(0, 3, 1, 2)
    ),
    "constant gate": lambda: Block(lambda x: x * torch.arange(5.0).to(x.dtype)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    check(BLOCKS[name]())


def test_a_gate_is_one_multiplication() -> None:
    stage = check(BLOCKS["squeeze and excite"]())
    assert [type(op) for op in stage.ops].count(Multiply) == 1


def test_shuffles_move_channels_once() -> None:
    stage = check(BLOCKS["channel shuffle"]())
    assert [type(op) for op in stage.ops].count(Reorder) <= 2
    assert not [op for op in stage.ops if isinstance(op, Flip | Slice)]


def test_weight_standardisation_folds_into_the_weights() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(self.weight.reshape(1, 8, -1), None, None, training=True, momentum=0.0)
            return F.conv2d(x, weight.reshape_as(self.weight), self.bias)

    stage = check(Block(lambda x, f: f(x), f=Standardised(8, 8, 3)))
    assert len([op for op in stage.ops if hasattr(op, "stride")]) == 2


def overwritten_after_a_view(x: Tensor) -> Tensor:
    """The slice sees the square root: it is a view of what the in-place operator changes."""
    y = x * 1.0
    part = y[:, 2:5]
    y.sigmoid_()
    return torch.cat([part, y], 1)


def overwritten_through_a_view(x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, 2:5].sigmoid_()
    return y


def overwritten_twice(x: Tensor) -> Tensor:
    y = x * 1.0
    alias = y.view(x.shape[0], 4, 2, *x.shape[2:])
    y.relu_()
    y.add_(1.0)
    return alias.flatten(1, 2) * y


@pytest.mark.parametrize("function", [overwritten_after_a_view, overwritten_twice])
def test_in_place_operators_reach_every_view(function: Callable[[Tensor], Tensor]) -> None:
    check(Block(function))


def test_writing_through_a_view_stays_opaque() -> None:
    assert "slice_scatter" in lower(Block(overwritten_through_a_view)).opaque_reason


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_views_run_through_the_elements_that_torch_does(data: st.DataObject) -> None:
    """Random reshapes and transpositions of a map; constants come back in the stored layout."""
    shape = (12, 4, 6)
    tensor = torch.arange(12 * 4 * 6.0).reshape(shape)
    axes = stored_axes(shape)
    for _ in range(data.draw(st.integers(1, 4))):
        order = data.draw(st.permutations(range(len(axes))))
        axes, tensor = tuple(axes[i] for i in order), tensor.permute(order)
        position = data.draw(st.integers(0, len(axes) - 1))
        size = tensor.shape[position]
        divisor = data.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        target = (*tensor.shape[:position], divisor, size // divisor, *tensor.shape[position + 1 :])
        grouped = regroup(axes, target)
        if grouped is None:
            return
        axes, tensor = grouped, tensor.reshape(target)
    stored = to_stored_order(tensor, axes, shape)
    assert torch.equal(stored, torch.arange(12 * 4 * 6.0).reshape(shape))
    channels = torch.from_numpy(channel_order(axes))
    assert torch.equal(channels.expand(tensor.shape), (tensor // 24).long())
