"""Float images of the wrong scale warn once; normalised ones, noise and flat images never do."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.errors import ScaleWarning
from fastcascade.pixel_scale import ScaleCheck
from fastcascade.types import InputSpec

IMAGES = Path(__file__).parents[1] / "examples" / "cifar10" / "test-images.npz"
SHAPE = (3, 32, 32)
NORMALIZATIONS = [
    fc.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    fc.Normalize((0.5,) * 3, (0.5,) * 3),
    fc.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """The example's test images, (2000, 3, 32, 32) uint8."""
    return torch.from_numpy(np.load(IMAGES)["images"]).permute(0, 3, 1, 2)


def cascade(normalize: fc.Normalize | None = NORMALIZATIONS[0]) -> fc.Cascade:
    stages = [nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)) for _ in range(2)]
    return fc.Cascade(stages, fc.MLPSelector(), 4, SHAPE, preprocess=normalize)


def warned(call: Callable[..., object], *batches: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches:
            call(batch)
    return [str(w.message) for w in caught if issubclass(w.category, ScaleWarning)]


def check(normalize: fc.Normalize) -> ScaleCheck:
    return ScaleCheck(InputSpec(SHAPE, normalize))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_normalised_images_never_warn(pixels: Tensor, normalize: fc.Normalize, batch: int) -> None:
    images = InputSpec(SHAPE, normalize).to_float(pixels)
    brighter = images * 1.2 + 0.3  # as augmentation makes them
    for part in images.split(16 * batch):
        assert not warned(check(normalize), *part.split(batch))
    assert not warned(check(normalize), *brighter[:500].split(batch))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_flat_images_and_noise_never_warn(normalize: fc.Normalize) -> None:
    for value in (-2.0, -0.5, 0.0, 0.5, 1.0, 2.0, torch.nan):
        assert not warned(check(normalize), torch.full((8, *SHAPE), value))
    for value in (0, 128, 255):
        flat = torch.full((8, *SHAPE), value, dtype=torch.uint8)
        assert not warned(check(normalize), InputSpec(SHAPE, normalize).to_float(flat))
    assert not warned(check(normalize), torch.randn(256, *SHAPE))
    assert not warned(check(normalize), torch.empty(0, *SHAPE))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("highest", [1, 255])
def test_other_scales_warn_at_every_batch_size(pixels: Tensor, normalize: fc.Normalize, highest: int) -> None:
    images = pixels.float() / 255 * highest
    for batch in (1, 4, 64):
        (message,) = warned(check(normalize), *images[: 16 * batch].split(batch))
        assert re.search(r"from [\d.]+ to (0\.9|1|2\d\d).*expects normalised", message), message


def test_a_warm_up_on_noise_or_zeros_hides_nothing(pixels: Tensor) -> None:
    for warm_up in (torch.zeros(8, *SHAPE), torch.randn(8, *SHAPE)):
        assert warned(check(NORMALIZATIONS[0]), warm_up, warm_up, pixels[:8] / 255)


def test_cascades_programs_and_evaluation_warn_once(pixels: Tensor) -> None:
    wrong, labels = pixels[:64] / 255, torch.zeros(64, dtype=torch.int64)
    model = cascade()
    compiled = fc.compile(model, backend="reference")
    assert len(warned(model, wrong, wrong)) == 1
    assert len(warned(compiled, wrong, wrong)) == 1
    assert len(warned(lambda x: fc.evaluate(cascade(), (x, labels)), wrong)) == 1
    assert len(warned(lambda x: fc.evaluate(fc.compile(cascade()), (x, labels)), wrong)) == 1
    assert len(warned(copy.deepcopy(cascade()), wrong)) == 1


def test_uint8_images_and_cascades_without_preprocessing_never_warn(pixels: Tensor) -> None:
    for model in (cascade(), fc.compile(cascade(), backend="reference")):
        assert not warned(model, pixels[:64])
    for model in (cascade(None), fc.compile(cascade(None), backend="reference")):
        assert not warned(model, pixels[:64] / 255)


def test_after_the_first_batches_nothing_is_checked(pixels: Tensor) -> None:
    images = InputSpec(SHAPE, NORMALIZATIONS[0]).to_float(pixels[:4])
    model = cascade()
    for _ in range(20):
        model(images)
    assert not model.scale_check.open
    assert not cascade(None).scale_check.open
