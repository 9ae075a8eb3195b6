"""Plans run without torch, with the same bits as with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastcascade as fc
from fastcascade import runtime
from fastcascade.engine import CompiledCascade
from fastcascade.errors import FastCascadeError, FileFormatError, InvalidArgument
from fastcascade.model.resnet import resnet_cifar
from fastcascade.storage.bundle import PLAN_FORMAT, load_bundle, save_bundle
from fastcascade.testing.networks import random_network


def cascade(selector: nn.Module | None = None, **options: object) -> fc.Cascade:
    stages = [random_network(seed) for seed in (3, 4, 5)]
    return fc.Cascade(stages, selector or fc.MLPSelector(), 5, (3, 9, 8), **options)


def saved(model: fc.Cascade, folder: Path) -> CompiledCascade:
    fast = fc.compile(model, backend="cpu", threads=1)
    fast.plan.save(folder)
    return fast


def assert_same_bits(
    fast: CompiledCascade, plain: runtime.Runtime, x: torch.Tensor, thresholds: object
) -> None:
    want, got = fast(x, thresholds), plain(x.numpy(), thresholds)
    for expected, value in zip(want, got, strict=True):
        assert np.array_equal(expected.numpy(), value, equal_nan=True)


@pytest.mark.parametrize("combine", ["last", "mean", (0.2, 0.5, 1.0)], ids=str)
@pytest.mark.parametrize("kind", ["stats", "topk", "probs", "max_prob", "margin", "entropy"])
def test_same_bits_for_every_selector(kind: str, combine: object, tmp_path: Path) -> None:
    mlp = kind in ("stats", "topk", "probs")
    model = cascade(fc.MLPSelector(kind) if mlp else fc.ThresholdSelector(kind), combine=combine)
    fast, x = saved(model, tmp_path), torch.randn(33, 3, 9, 8)
    x[5] = torch.nan
    plain = runtime.load(tmp_path, threads=1)
    for thresholds in ([0.1, 0.2], [np.inf, -np.inf], [np.inf, np.inf]):
        assert_same_bits(fast, plain, x, thresholds)


@pytest.mark.parametrize("seed", range(6))
def test_same_bits_for_random_networks(seed: int, tmp_path: Path) -> None:
    fast = saved(fc.Cascade([random_network(seed + 20)], None, 5, (3, 9, 8)), tmp_path)
    assert_same_bits(fast, runtime.load(tmp_path, threads=2), torch.randn(9, 3, 9, 8), [])


def test_same_bits_for_bytes_segments_and_mirror_images(tmp_path: Path) -> None:
    class Mirrored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = random_network(9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x.flip(3))  # type: ignore[no-any-return]

    def head(channels: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))

    stages = [
        fc.Stage(nn.Conv2d(3, 6, 3), exit=head(6)),
        fc.Stage(nn.Sequential(nn.Conv2d(6, 7, 3), nn.SiLU()), exit=head(7), input="previous"),
        fc.Stage(Mirrored(), input="image"),
    ]
    preprocess = fc.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    model = fc.Cascade(stages, fc.ThresholdSelector("margin"), 5, (3, 9, 8), preprocess=preprocess)
    fast, plain = saved(model, tmp_path), runtime.load(tmp_path, threads=1)
    x = torch.randint(0, 256, (40, 9, 8, 3), dtype=torch.uint8)
    assert_same_bits(fast, plain, x, [0.5, 0.5])
    assert_same_bits(fast, plain, x.permute(0, 3, 1, 2), [0.5, 0.5])


def test_operating_points_and_defaults(tmp_path: Path) -> None:
    model = cascade()
    fast, x = saved(model, tmp_path), torch.randn(20, 3, 9, 8)
    plain = runtime.load(tmp_path, threads=1)
    assert_same_bits(fast, plain, x, None)
    with pytest.raises(InvalidArgument, match="unknown operating point 'fast'"):
        plain(x.numpy(), "fast")
    with pytest.raises(InvalidArgument, match="thresholds have 3 numbers"):
        plain(x.numpy(), [1, 2, 3])


def test_a_threshold_selector_without_a_point_says_what_to_pass(tmp_path: Path) -> None:
    saved(cascade(fc.ThresholdSelector("margin")), tmp_path)
    with pytest.raises(InvalidArgument, match="no default thresholds"):
        runtime.load(tmp_path, threads=1)(np.zeros((1, 3, 9, 8), np.float32))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3, 9, 9), np.float32), "expected an array of shape"),
        (np.zeros((2, 3, 9, 8), np.int32), "dtype int32"),
        (np.zeros((2, 3, 9, 8), np.uint8), "no preprocess"),
        ([[1.0]], "got list"),
    ],
)
def test_bad_images_are_named(images: object, message: str, tmp_path: Path) -> None:
    saved(cascade(), tmp_path)
    with pytest.raises(InvalidArgument, match=message):
        runtime.load(tmp_path, threads=1)(images)  # type: ignore[arg-type]


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    saved(cascade(), tmp_path)
    content, tensors = load_bundle(tmp_path, PLAN_FORMAT)
    for damage in ({"stages": 3}, {"num_classes": "many"}, {"input": {}}, {"combine": [1.0]}):
        save_bundle(tmp_path, PLAN_FORMAT, content | damage, tensors, overwrite=True)
        with pytest.raises(FileFormatError, match="does not contain a valid plan"):
            runtime.load(tmp_path, threads=1)
    with pytest.raises(FastCascadeError):
        runtime.load(tmp_path / "nowhere")


def test_neither_torch_nor_anything_else_is_imported(tmp_path: Path) -> None:
    fc.compile(fc.Cascade([resnet_cifar(8)], None, 10, (3, 32, 32)), backend="cpu").plan.save(tmp_path)
    script = (
        "import sys\n"
        "for name in ('torch', 'rich', 'typer', 'pydantic', 'PIL', 'triton'): sys.modules[name] = None\n"
        "import numpy as np, fastcascade.runtime as runtime\n"
        "out = runtime.load(sys.argv[1])(np.zeros((2, 3, 32, 32), np.float32))\n"
        "print(out.label.shape)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "(2,)\n"
