"""Opaque stages in torch: on active rows only, in the better layout, compiled for few numbers of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends.torch_module import BUCKETS, ChannelsLast, CompiledModule, in_best_layout
from fastcascade.testing.networks import random_network

SHAPE = (3, 8, 8)


class Attention(nn.Module):
    """A convolution, one block of self-attention over its pixels, and a linear head.

    ``kernel`` 3 gives a hybrid, 2 a patch embedding. It remembers the shapes and strides of its input.
    """

    def __init__(self, kernel: int = 3, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, kernel, stride=2, padding=kernel % 2)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True)
        self.head = nn.Linear(width, 5)
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.inputs.append(x)
        tokens = self.norm(self.embed(x).flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return self.head(tokens.mean(1))  # type: ignore[no-any-return]


class Viewing(nn.Module):
    """A network that only works on contiguous features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(torch.sin(y.view(y.shape[0], -1)))  # type: ignore[no-any-return]


class Strided(nn.Module):
    """A network that reads features by strides, so that it computes something else in another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(torch.sin(y.as_strided((y.shape[0], 144), (144, 1))))  # type: ignore[no-any-return]


def cascade(*networks: nn.Module) -> fc.Cascade:
    torch.manual_seed(0)
    selector = fc.ThresholdSelector("margin") if len(networks) > 1 else None
    return fc.Cascade(list(networks), selector, 5, SHAPE).eval()


def opaque_module(compiled: fc.CompiledCascade, k: int) -> Any:
    """The module that runs stage k."""
    return compiled.program.plan.stages[k].module  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("network", "last"),
    [(Attention(3), True), (Attention(2), False), (Viewing(), False), (Strided(), False)],
    ids=["hybrid", "patches", "view", "strides"],
)
def test_the_layout_is_channels_last_where_convolutions_gain_and_results_stay(
    network: nn.Module, last: bool
) -> None:
    model = cascade(network)
    fast = fc.compile(model, backend="cpu")
    assert isinstance(opaque_module(fast, 0), ChannelsLast) == last
    assert ("torch, channels_last, active rows only" in fast.describe()) == last
    x = torch.randn(5, *SHAPE)
    torch.testing.assert_close(fast(x).probs, model(x).probs)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_a_hybrid_cascade_runs_attention_on_active_rows_only() -> None:
    hybrid = Attention()
    model = cascade(random_network(1, input_shape=SHAPE), hybrid)
    fast = fc.compile(model, backend="cpu")
    x = torch.randn(40, *SHAPE)
    scores = model.all_exits(x)[1].detach().sort(1).values
    point = scores[:, 19:21].mean(1)
    inner = opaque_module(fast, 1).module.module.inputs
    inner.clear()
    out = fast(x, point)
    (rows,) = inner
    assert len(rows) == int((out.exit_stage == 1).sum()) == 20
    assert rows.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.probs, model(x, point).probs)
    assert "opaque: operator aten" in fast.describe() or "opaque: torch.export" in fast.describe()


def fake_compile(seen: list[int]) -> Callable[..., Any]:
    """``torch.compile`` that records the numbers of rows that it is called with."""

    def compile(call: Callable[[Tensor], Any], dynamic: bool) -> Callable[[Tensor], Any]:
        def recorded(x: Tensor) -> Any:
            seen.append(len(x))
            return call(x)

        return recorded

    return compile


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 63, 64, 65, 130])
def test_compiled_modules_see_padded_numbers_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch, "compile", fake_compile(seen))
    model = cascade(Attention())
    fast = fc.compile(model, backend="cpu", torch_compile=True)
    x = torch.randn(rows, *SHAPE)
    torch.testing.assert_close(fast(x).probs, model(x).probs)
    assert set(seen) <= set(BUCKETS)
    assert rows <= sum(seen) < 2 * rows
    assert "torch.compile, rows padded to 1, 2, 4, 8, 16, 32, 64" in fast.describe()


def test_a_nan_in_a_row_stays_there_and_in_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", fake_compile([]))
    fast = fc.compile(cascade(Attention()), backend="cpu", torch_compile=True)
    x = torch.randn(5, *SHAPE)
    x[2, 0, 0, 0] = torch.nan
    assert fast(x).label.eq(-1).tolist() == [False, False, True, False, False]


def test_torch_compile_keeps_the_layout() -> None:
    module = fc.plan(cascade(Attention())).stages[0].module
    assert module is not None
    prepared = in_best_layout(CompiledModule(module), SHAPE)
    assert isinstance(prepared, CompiledModule)
    assert isinstance(prepared.module, ChannelsLast)


@pytest.mark.slow
def test_torch_compile_compiles_each_bucket_once() -> None:
    """Two stages of one class, more than eight numbers of rows: torch would give up and run eagerly."""
    torch._dynamo.reset()
    model = cascade(Attention(), Attention())
    fast = fc.compile(model, backend="cpu", torch_compile=True)
    never = torch.tensor([float("inf")])
    for rows in (1, 2, 3, 5, 9, 17, 33, 64, 70, 6, 40, 1):
        x = torch.randn(rows, *SHAPE)
        torch.testing.assert_close(fast(x, never).probs, model(x, never).probs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * len(BUCKETS)
