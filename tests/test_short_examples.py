"""The short examples run from data to a saved cascade, on stand-in images."""

from __future__ import annotations

import warnings
from pathlib import Path

import files_as_modules
import numpy as np
import pytest
import torch
from torch import nn

import fastcascade as fc
from fastcascade.types import InputSpec

EXAMPLES = Path(__file__).parents[1] / "examples"
CLASSES = ("blue", "green", "red")


def coloured(n: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, side, side, 3) uint8 noise, a little stronger in one colour, and which colour that is."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    strength = draw.uniform(0, 60, n)
    images = draw.integers(0, 196, (n, side, side, 3)).astype(float)
    images[np.arange(n), :, :, 2 - labels] += strength[:, None, None]
    return images.astype(np.uint8), labels


@pytest.mark.filterwarnings(
    "ignore:stage . keeps temperature", "ignore:got 20 images"
)  # stand-in data are few
def test_multi_exit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = coloured(400, 32, seed=0)
    np.savez(
        tmp_path / "data.npz",
        x_train=images,
        y_train=labels,
        x_test=images[:9],
        y_test=labels[:9],
        classes=CLASSES,
    )
    script = files_as_modules.load(EXAMPLES / "multi_exit.py")
    cascade = script.main(str(tmp_path / "data.npz"), str(tmp_path / "model"), epochs=1)
    assert [cascade.stage(k).input for k in range(3)] == ["image", "previous", "previous"]
    assert capsys.readouterr().out.count("of the backbone's cost") == 3
    assert fc.compile(tmp_path / "model")(images[:9]).label.shape == (9,)


def network(width: int) -> nn.Module:
    """A linear classifier of the mean colour, with a width that sets its cost."""
    torch.manual_seed(width)
    first = nn.Conv2d(3, width, 3, padding=1)
    pooled = nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
    images, labels = coloured(300, 32, seed=1)
    spec = InputSpec((3, 32, 32), fc.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = spec.to_float(spec.nchw(images))
    optimizer = torch.optim.Adam(pooled.parameters(), 0.02)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(pooled(x), torch.from_numpy(labels)).backward()
        optimizer.step()
    return pooled.eval()


def test_networks_trained_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx", reason="the package onnx is not installed")
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    images, labels = coloured(120, 40, seed=2)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "photos" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        pillow.fromarray(image).save(folder / f"{i}.png")
    sizes = {"small": 16, "medium": 24, "large": 40}
    for width, (name, side) in enumerate(sizes.items(), 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            example = (torch.zeros(1, 3, side, side),)
            torch.onnx.export(network(4 * width), example, tmp_path / f"{name}.onnx", dynamo=False)
    script = files_as_modules.load(EXAMPLES / "trained_elsewhere.py")
    files = [str(tmp_path / f"{name}.onnx") for name in sizes]
    cascade = script.main(str(tmp_path / "photos"), str(tmp_path / "model"), files, side=40)
    assert [cascade.stage(k).transform.size[0] for k in range(3)] == list(sizes.values())
    assert cascade.classes == CLASSES
    assert "last network" in capsys.readouterr().out
    fresh, wanted = coloured(90, 40, seed=3)
    out = fc.compile(tmp_path / "model")(fresh)  # the plan: neither onnx nor the files are needed
    assert float((out.label.numpy() == wanted).mean()) > 0.6
    assert cascade.operating_points["default"].mean_macs < cascade.exit_macs[-1]
