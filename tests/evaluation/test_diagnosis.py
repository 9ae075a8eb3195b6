"""What a cascade gets wrong: counted by hand on a few images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastcascade as fc
from fastcascade.data.image_data import ImageData
from fastcascade.engine import CompiledCascade
from fastcascade.errors import DataError
from fastcascade.evaluation.diagnosis import Reliability, diagnose


class Table(torch.nn.Module):
    """Logits by the number in an image's first pixel."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x[:, 0, 0, 0].long()]


EARLY = [[9.0, 0.0], [9.0, 0.0], [1.0, 0.0], [0.0, 9.0]]
LATE = [[0.0, 5.0], [5.0, 0.0], [0.0, 5.0], [math.nan, 0.0]]
TRUTH = np.array([0, 1, 1, 0])


@pytest.fixture
def cascade() -> fc.Cascade:
    """Images 0, 1 and 3 stop at once, and only 0 is right; the last exit is right for none of the three."""
    selector = fc.ThresholdSelector("max_prob")
    cascade = fc.Cascade(
        [fc.Stage(Table(EARLY), macs=1), fc.Stage(Table(LATE), macs=10)],
        selector,
        2,
        (1, 1, 1),
        classes=("a", "b"),
    )
    cascade.operating_points["default"] = fc.OperatingPoint("default", (4.0,), {}, None, 1.0, (0.5, 0.5), 1)
    return cascade


@pytest.fixture
def model(cascade: fc.Cascade) -> CompiledCascade:
    return fc.compile(cascade, backend="reference")


def data(labels: np.ndarray | None = TRUTH) -> ImageData:
    images = np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1)
    return ImageData([f"{i}.png" for i in range(4)], images, labels)


def test_confusions_are_counted_at_the_exit_where_images_stop(model: CompiledCascade) -> None:
    assert diagnose(model, data()).confusion.tolist() == [[1, 1], [1, 1]]
    # Image 3 is invalid at the last exit, and left out.
    assert diagnose(model, data(), [math.inf]).confusion.tolist() == [[0, 1], [1, 1]]


def test_images_on_which_exits_disagree_are_kept_with_what_each_exit_says(model: CompiledCascade) -> None:
    found = diagnose(model, data())
    assert (found.helped, found.hurt) == (1, 0)
    (seen,) = found.examples
    assert (seen.id, seen.truth, seen.labels, seen.exit_stage, seen.helped) == ("0.png", 0, (0, 1), 0, True)
    assert seen.image.shape == (1, 1, 3)
    hurt = diagnose(model, data(np.array([1, 1, 1, 0])))
    assert (hurt.helped, hurt.hurt, hurt.examples[0].helped) == (0, 1, False)
    assert diagnose(model, data(), examples=0).examples == ()
    assert diagnose(model, data(), examples=0).helped == 1


def test_reliability_is_of_every_exit_with_and_without_its_temperature(
    cascade: fc.Cascade,
) -> None:
    cascade.temperatures.copy_(torch.tensor([3.0, 1.0]))
    model = fc.compile(cascade, backend="reference")
    found = diagnose(model, data(), cascade=cascade)
    sure = np.array([9.0, 9.0, 1.0, 9.0])
    right = np.array([True, False, False, False])
    for reliability, temperature in ((found.after[0], 3), (found.before[0], 1)):
        expected = Reliability.of(1 / (1 + np.exp(-sure / temperature)), right)
        assert np.allclose(reliability.accuracy, expected.accuracy, equal_nan=True)
        assert np.allclose(reliability.confidence, expected.confidence, equal_nan=True)
        assert reliability.error == pytest.approx(expected.error)
    assert found.after[1].share.sum() == pytest.approx(1)  # of the three valid images
    assert cascade.temperatures.tolist() == [3.0, 1.0]
    assert diagnose(model, data()).before == ()


def test_without_labels_or_images_it_says_so(model: CompiledCascade) -> None:
    with pytest.raises(DataError, match="no labels"):
        diagnose(model, data(None))
    with pytest.raises(DataError, match="0 readable images"):
        diagnose(model, data().take(range(0)))


def test_confidence_of_one_and_no_images_have_bins() -> None:
    assert Reliability.of(np.array([1.0, 0.0]), np.array([True, False]), 4).share.tolist() == [0.5, 0, 0, 0.5]
    assert Reliability.of(np.array([math.nan]), np.array([False])).error == 0


@pytest.mark.parametrize("shape", [(5, 4, 3), (3, 5, 4)])
def test_pictures_are_upright_and_in_colour(shape: tuple[int, ...]) -> None:
    """uint8 images keep their pixels in both layouts."""
    stages = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 2)) for _ in range(2)]
    cascade = fc.Cascade(
        stages, fc.MLPSelector(), 2, (3, 5, 4), preprocess=fc.Normalize((0.5,) * 3, (0.2,) * 3)
    )
    images = np.random.default_rng(0).integers(0, 256, (60, *shape), np.uint8)
    model = fc.compile(cascade, backend="reference")
    found = diagnose(model, ImageData([str(i) for i in range(60)], images, np.arange(60) % 2), [-math.inf])
    assert found.examples, "some of sixty random images are told apart by two random stages"
    for seen in found.examples:
        image = images[int(seen.id)]
        assert (seen.image == (image if shape[2] == 3 else image.transpose(1, 2, 0))).all()
