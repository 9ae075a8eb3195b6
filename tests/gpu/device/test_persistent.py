"""The persistent kernel agrees with its twin, on every kind of network that it can run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends.registry import load_backend
from fastcascade.kernels import reference
from fastcascade.lowering.export import plan
from fastcascade.lowering.plan import Plan
from fastcascade.model.resnet import BasicBlock, Head, ResNet, cut_into_segments

pytest.importorskip("triton", reason="triton is not installed")

from fastcascade.backends.gpu import persistent_stage as backend
from fastcascade.backends.gpu.layer_lowering import stage_layers
from fastcascade.kernels.triton import persistent as kernels

CLASSES = 7


def stem(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


def residual_network(shortcut: str) -> ResNet:
    blocks = [BasicBlock(16, 16), BasicBlock(16, 32, 2, shortcut), BasicBlock(32, 32)]
    return ResNet(stem(16), blocks, Head(32, CLASSES))


def chain() -> nn.Module:
    """1×1 and 3×3 convolutions, odd channel counts, max pooling, an addition without activation."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU6(), nn.Conv2d(20, 24, 3, 2, 1), nn.ReLU())
            self.body = nn.Sequential(nn.Conv2d(24, 24, 1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.max_pool2d(self.first(x), 2)
            return x + self.body(x)

    return nn.Sequential(Body(), Head(24, CLASSES))


def planned(*stages: nn.Module | fc.Stage) -> Plan:
    selector = fc.MLPSelector() if len(stages) > 1 else None
    normalize = fc.Normalize((0.5,) * 3, (0.2,) * 3)
    return plan(fc.Cascade(stages, selector, CLASSES, (3, 8, 8), preprocess=normalize))


def segments() -> Plan:
    parts = cut_into_segments(residual_network("A"), after=[1, 2])
    return planned(*(fc.Stage(m, e, "previous" if k else "image") for k, (m, e) in enumerate(parts)))


NETWORKS = {
    "shortcut A": lambda: planned(residual_network("A")),
    "shortcut B": lambda: planned(residual_network("B")),
    "chain": lambda: planned(chain()),
}


class Case:
    """One stage on the kernel and on the twin, with poisoned rows beyond the active ones."""

    def __init__(self, lowered: Plan, k: int, dtype: torch.dtype, device: torch.device) -> None:
        stage = lowered.stages[k]
        following = lowered.stages[k + 1].input if k + 1 < len(lowered.stages) else None
        self.kept = stage.features if following == "previous" else None
        self.layers = stage_layers(stage, dtype, torch.device("cpu"))
        self.table = kernels.layer_table(stage_layers(stage, dtype, device), self.kept)
        self.out = next((layer.work.out for layer in self.layers if layer.output == self.kept), None)
        self.dtype, self.device = dtype, device

    def agrees(self, source: Tensor, index: Tensor, n: int, pixels: Tensor | None = None) -> Tensor:
        """Assert that kernel and twin agree on the first n rows and write no others; returns the logits."""
        capacity = len(index)
        got = torch.full((capacity, CLASSES), torch.nan, device=self.device)
        want = torch.empty(n, CLASSES)
        got_rows = want_rows = None
        if self.out is not None:
            got_rows = torch.full((capacity, *self.out), torch.nan, dtype=self.dtype, device=self.device)
            want_rows = torch.empty(n, *self.out, dtype=self.dtype)
        count = torch.tensor([n], dtype=torch.int32, device=self.device)
        there = [None if t is None else t.to(self.device) for t in (source, index.int(), pixels)]
        kernels.persistent(self.table, there[0], there[1], count, got_rows, got, pixel_table=there[2])
        rows = source if source.shape[1] == 3 else source[:n]
        reference.persistent(
            self.layers, rows, index[:n], want_rows, want, kept=self.kept, pixel_table=pixels
        )
        tolerance = 1e-4 if self.dtype == torch.float32 else 1e-2
        assert got[n:].isnan().all()
        torch.testing.assert_close(got[:n].cpu(), want, atol=tolerance, rtol=tolerance)
        if got_rows is not None:
            assert got_rows[n:].isnan().all()
            torch.testing.assert_close(got_rows[:n].cpu(), want_rows, atol=tolerance, rtol=tolerance)
        return want


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_every_network(device: torch.device, network: str, dtype: torch.dtype) -> None:
    case = Case(NETWORKS[network](), 0, dtype, device)
    logits = case.agrees(torch.randn(5, 3, 8, 8), torch.tensor([4, 0, 3, 1]), 3)
    assert logits.std(0).min() > 1e-3, "the logits must differ between images, or swapped rows would pass"


@torch.no_grad()
def test_segments_read_rows_and_leave_rows(device: torch.device) -> None:
    lowered = segments()
    first = Case(lowered, 0, torch.float32, device)
    first.agrees(torch.randn(4, 3, 8, 8), torch.tensor([2, 0, 1]), 2)
    for k in (1, 2):
        case = Case(lowered, k, torch.float32, device)
        assert (case.out is None) == (k == 2)
        channels = lowered.stages[k].shapes[0][0]
        rows = torch.randn(3, 8 // k, 8 // k, channels)
        rows[2] = torch.nan
        case.agrees(rows, torch.tensor([7, 5, 6]), 2)


@torch.no_grad()
def test_bytes(device: torch.device) -> None:
    lowered = NETWORKS["chain"]()
    assert lowered.input.preprocess is not None
    pixels = lowered.input.preprocess.table()
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    Case(lowered, 0, torch.float32, device).agrees(images, torch.tensor([2, 1]), 2, pixels)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17])
@torch.no_grad()
def test_every_count(device: torch.device, n: int) -> None:
    case = Case(NETWORKS["chain"](), 0, torch.float32, device)
    case.agrees(torch.randn(20, 3, 8, 8), torch.randperm(20)[:18], n)


@pytest.mark.parametrize("network", NETWORKS)
def test_values_alive_together_share_no_scratch(network: str) -> None:
    stage = NETWORKS[network]().stages[0]
    layers = stage_layers(stage, torch.float16, torch.device("cpu"))
    table = kernels.layer_table(layers, None)
    begin = {layer.output: 16 * entry[3] for layer, entry in zip(layers, table.entries.tolist(), strict=True)}
    size = {layer.output: layer.work.out[0] * layer.work.out[1] * layer.work.out[2] for layer in layers}
    compared = 0
    for i, layer in enumerate(layers[:-1]):
        needed = {value for later in layers[i:] for value in later.reads}
        alive = [earlier.output for earlier in layers[:i] if earlier.output in needed]
        for value in alive:
            apart = begin[value] + size[value] <= begin[layer.output]
            assert apart or begin[layer.output] + size[layer.output] <= begin[value]
            compared += 1
        assert begin[layer.output] + size[layer.output] <= table.scratch_size
    assert compared >= len(layers) - 2
    assert table.scratch_size < sum(size.values()), "memory of dead values is used again"


def report_lines(lowered: Plan, device: torch.device) -> list[str]:
    program = load_backend("triton").lower(lowered, precision="fp16", device=device, threads=None)
    return [f"{choice.operation}: {choice.kernel}" for choice in program.describe()[0].kernels]


def test_the_report_says_that_it_is_one_launch(device: torch.device) -> None:
    lines = report_lines(NETWORKS["shortcut A"](), device)
    assert "one launch" in lines[0]
    assert any("strided, zero-padded view: triton persistent, conv" in line for line in lines)


@pytest.mark.parametrize(
    ("limit", "words"),
    [("SCRATCH_LIMIT", "activations"), ("WEIGHT_LIMIT", "weights"), ("KIND_LIMIT", "distinct layers")],
)
def test_what_does_not_fit_runs_layer_by_layer_and_says_why(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, limit: str, words: str
) -> None:
    monkeypatch.setattr(backend, limit, 8)
    lines = report_lines(NETWORKS["shortcut A"](), device)
    assert "one launch per layer" in lines[0]
    assert words in lines[0]
    assert not any("persistent" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": torch.empty(2, CLASSES, dtype=torch.float16)}, "float16"),
        ({"logits": torch.empty(CLASSES, 2).T}, "strides"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, "int64"),
        ({"index": torch.zeros(1, dtype=torch.int32)}, "at least 2"),
        ({"source": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "no pixel table"),
        ({"features": torch.empty(2, 8, 8, 16)}, "features"),
        ({"count": torch.ones(1, dtype=torch.int32, device="meta")}, "one device"),
    ],
    ids=["dtype", "strides", "index dtype", "short index", "bytes", "features", "device"],
)
def test_tensors_that_would_be_misread_are_refused(change: dict[str, Tensor], words: str) -> None:
    lowered = NETWORKS["chain"]()
    table = kernels.layer_table(stage_layers(lowered.stages[0], torch.float32, torch.device("cpu")), None)
    arguments = {
        "source": torch.zeros(2, 3, 8, 8),
        "index": torch.zeros(2, dtype=torch.int32),
        "count": torch.ones(1, dtype=torch.int32),
        "features": None,
        "logits": torch.empty(2, CLASSES),
        **change,
    }
    with pytest.raises(ValueError, match=words):
        kernels.persistent(table, **arguments)
