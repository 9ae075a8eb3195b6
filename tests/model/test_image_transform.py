"""Stages that see the images at another size and normalisation than the cascade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forgery import reseal
from torch import nn
from torch.nn import functional as F

import fastcascade as fc
from fastcascade import runtime
from fastcascade.backends.registry import NAMES, load_backend
from fastcascade.errors import FileFormatError, InvalidArgument
from fastcascade.lowering.operations import Resize, ScaleShift, Slice
from fastcascade.model.resnet import resnet_cifar
from fastcascade.testing import assert_drop_in
from fastcascade.testing.networks import random_network
from fastcascade.types import InputSpec

OWN = fc.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = fc.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHAPE = (3, 24, 21)


def three_sizes(selector: Any = None) -> fc.Cascade:
    torch.manual_seed(2)
    transforms = [
        fc.ImageTransform((9, 8), normalize=OWN),
        fc.ImageTransform((15, 13), crop=0.75, interpolation="bicubic", normalize=IMAGENET),
        fc.ImageTransform((27, 24), crop=0.9),
    ]
    stages = [
        fc.Stage(random_network(seed, input_shape=(3, *transform.size)), transform=transform)
        for seed, transform in zip((3, 6, 9), transforms, strict=True)
    ]
    cascade = fc.Cascade(stages, selector or fc.MLPSelector(), 5, SHAPE, preprocess=IMAGENET)
    _spread(cascade, photos(64))
    return cascade


@torch.no_grad()
def _spread(cascade: fc.Cascade, x: torch.Tensor) -> None:
    """Centre and scale the last layers, so that labels and confidence vary between images."""
    for k, logits in enumerate(cascade.all_logits(x)):
        linear = [m for m in cascade.stage(k).modules() if isinstance(m, nn.Linear)][-1]
        scale = 3 / logits.std(0)
        linear.weight.mul_(scale[:, None])
        linear.bias.sub_(logits.mean(0)).mul_(scale)


def photos(n: int) -> torch.Tensor:
    coarse = torch.rand(n, 3, 5, 4)
    return (F.interpolate(coarse, SHAPE[1:], mode="bilinear") * 255).round().to(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_every_backend_is_a_drop_in(name: str) -> None:
    reason = load_backend(name).unavailable_reason()
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    cascade = three_sizes()
    fast = fc.compile(cascade, backend=name)
    assert_drop_in(fast, cascade, photos(70))
    assert_drop_in(fast, cascade, torch.randn(17, *SHAPE))


def test_the_transform_is_resize_crop_and_normalisation() -> None:
    x = photos(3)
    seen = three_sizes().stage_images(1, InputSpec(SHAPE, IMAGENET).to_float(x))
    pixels = F.interpolate(x.double() / 255, (20, 17), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET.mean, IMAGENET.std))
    want = (pixels[:, :, 2:17, 2:15] - mean) / std
    assert seen.shape == (3, 3, 15, 13)
    torch.testing.assert_close(seen.double(), want, rtol=1e-5, atol=1e-5)


def test_a_stage_with_its_own_normalisation_sees_it() -> None:
    x = photos(3)
    cascade = fc.Cascade(
        [
            fc.Stage(
                random_network(1, input_shape=SHAPE), transform=fc.ImageTransform(SHAPE[1:], normalize=OWN)
            )
        ],
        None,
        5,
        SHAPE,
        preprocess=IMAGENET,
    )
    seen = cascade.stage_images(0, cascade.images(x))
    torch.testing.assert_close(seen, x / 127.5 - 1, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(op, Resize) for op in fc.plan(cascade).stages[0].ops)


def test_a_transform_becomes_operations_of_its_stage() -> None:
    plan = fc.plan(three_sizes())
    assert [type(op) for op in plan.stages[0].ops[:2]] == [Resize, ScaleShift]
    assert [type(op) for op in plan.stages[1].ops[:2]] == [Resize, Slice]
    assert all(stage.shapes[0] == SHAPE for stage in plan.stages)


def test_only_active_images_are_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade, sizes = three_sizes(fc.ThresholdSelector("margin")), []
    resize = F.interpolate

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(x))
        return resize(x, *args, **kwargs)

    monkeypatch.setattr(F, "interpolate", counted)
    x = torch.randn(40, *SHAPE)
    _, scores = cascade.all_exits(x)
    sizes.clear()
    middle = scores[0].median().item()
    out = cascade(x, [middle, float("-inf")])
    assert sizes == [40, int((out.exit_stage > 0).sum())]
    assert 0 < sizes[1] < 40


def test_the_normalisation_of_the_first_stage_is_the_default() -> None:
    stages = [fc.Stage(random_network(1), transform=fc.ImageTransform((9, 8), normalize=OWN))]
    assert fc.Cascade(stages, None, 5, SHAPE).input.preprocess == OWN
    assert fc.Cascade(stages, None, 5, SHAPE, preprocess=IMAGENET).input.preprocess == IMAGENET


def test_saved_and_loaded(tmp_path: Path) -> None:
    transform = fc.ImageTransform(20, crop=0.9, interpolation="bicubic", normalize=OWN)
    cascade = fc.Cascade([fc.Stage(resnet_cifar(8), transform=transform)], None, 10, (3, 32, 32))
    cascade.save(tmp_path)
    loaded = fc.load(tmp_path)
    assert loaded.stage(0).transform == transform
    x = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(loaded(x).probs, cascade(x).probs)


def test_the_runtime_without_torch_has_the_same_bits(tmp_path: Path) -> None:
    fast = fc.compile(three_sizes(), backend="cpu", threads=1)
    fast.plan.save(tmp_path)
    x = photos(33)
    for want, got in zip(fast(x), runtime.load(tmp_path, threads=1)(x.numpy()), strict=True):
        assert np.array_equal(want.numpy(), got)


@pytest.mark.filterwarnings("ignore::UserWarning")  # forty images are too few for temperatures
def test_training_reaches_every_stage() -> None:
    torch.manual_seed(0)
    stages = [fc.Stage(resnet_cifar(8, num_classes=5), transform=fc.ImageTransform(side)) for side in (9, 16)]
    cascade = fc.Cascade(stages, fc.MLPSelector(), 5, SHAPE, preprocess=IMAGENET)
    before = [p.clone() for p in cascade.parameters()]
    labels = torch.arange(60) % 5
    recipe = fc.Recipe(pretrain_epochs=1, joint_epochs=1, crop_padding=0)
    fc.fit(cascade, (photos(60), labels), (photos(40), labels[:40]), recipe=recipe)
    changed = [not torch.equal(a, b) for a, b in zip(before, cascade.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


BAD: dict[str, Any] = {
    "a size of three": (lambda: fc.ImageTransform((3, 9, 8)), "size is"),
    "an empty size": (lambda: fc.ImageTransform((0, 8)), "size is"),
    "a crop of 0": (lambda: fc.ImageTransform(9, crop=0), "crop is 0"),
    "a tiny crop": (lambda: fc.ImageTransform(9, crop=1e-4), "expected at most"),
    "another interpolation": (lambda: fc.ImageTransform(9, interpolation="area"), "interpolation is 'area'"),
    "a mean": (lambda: fc.ImageTransform(9, normalize=0.5), "normalize is 0.5"),
    "a number for a transform": (lambda: fc.Stage(nn.Flatten(), transform=9), "transform is 9"),
    "a transform of features": (
        lambda: fc.Stage(nn.Flatten(), input="previous", transform=fc.ImageTransform(9)),
        "reads features",
    ),
    "one channel for three": (
        lambda: fc.Cascade(
            [
                fc.Stage(
                    random_network(1),
                    transform=fc.ImageTransform((9, 8), normalize=fc.Normalize((0.5,), (1,))),
                )
            ],
            None,
            5,
            SHAPE,
            preprocess=IMAGENET,
        ),
        "stage 0 cannot see",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


def test_a_file_that_asks_for_huge_images_is_refused(tmp_path: Path) -> None:
    cascade = fc.Cascade([fc.Stage(resnet_cifar(8), transform=fc.ImageTransform(16))], None, 10, (3, 32, 32))
    cascade.save(tmp_path)

    def enlarge(document: dict[str, Any]) -> None:
        (stage,) = document["content"]["stages"] if "content" in document else document["stages"]
        stage["transform"]["size"] = [16000, 16000]

    reseal(tmp_path / "cascade.json", enlarge)
    with pytest.raises(FileFormatError, match="images too large"):
        fc.load(tmp_path)
