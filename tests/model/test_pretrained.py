"""Networks of timm and Hugging Face as stages, with the transforms that their libraries have for them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import files_as_modules
import pytest
import torch

import fastcascade as fc
from fastcascade.errors import InvalidArgument
from fastcascade.types import forced_exit

architectures = files_as_modules.load(Path(__file__).parents[2] / "bench" / "architectures.py")
IMAGENET = fc.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def timm() -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    architectures.load_libraries()


@pytest.fixture(scope="module")
def transformers(timm: None) -> Any:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    return importlib.import_module("transformers")


def test_timm_knows_size_crop_interpolation_and_normalisation(timm: None) -> None:
    stage = fc.Stage.from_timm("efficientnet_b0", pretrained=False)
    assert stage.name == "efficientnet_b0"
    assert stage.transform == fc.ImageTransform((224, 224), 0.875, "bicubic", IMAGENET)
    assert stage.transform.resized == (256, 256)


def assert_runs_as_operations(cascade: fc.Cascade) -> None:
    """Every stage lowers, and every exit has the cascade's probabilities, which differ between images."""
    coarse = torch.rand(6, 3, 4, 4)
    x = (torch.nn.functional.interpolate(coarse, (64, 64)) * 255).to(torch.uint8)
    with torch.no_grad():
        for _ in range(20):  # the batch norms of untrained networks would let nothing through
            cascade.train().all_logits(x)
    cascade.eval()
    fast = fc.compile(cascade)
    assert [stage.opaque_reason for stage in fast.plan.stages] == [None] * len(cascade.stages)
    for j in range(len(cascade.stages)):
        want = cascade(x, forced_exit(j, len(cascade.stages))).probs
        assert want.std(0).max() > 1e-4
        torch.testing.assert_close(
            fast(x, forced_exit(j, len(cascade.stages))).probs, want, atol=1e-6, rtol=1e-4
        )


def test_a_timm_stage_in_a_cascade(timm: None) -> None:
    torch.manual_seed(0)
    small = fc.ImageTransform(48, interpolation="bicubic", normalize=IMAGENET)
    stages = [
        fc.Stage.from_timm("lcnet_035", 4, pretrained=False, transform=small),
        fc.Stage.from_timm("resnet10t", 4, pretrained=False, transform=fc.ImageTransform(64)),
    ]
    cascade = fc.Cascade(stages, fc.ThresholdSelector("margin"), 4, (3, 64, 64))
    assert cascade.input.preprocess == IMAGENET
    assert_runs_as_operations(cascade)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("lcnet_999", "cannot create 'lcnet_999'.*similar names: lcnet_"),
        ("no such", "cannot create 'no such'"),
    ],
)
def test_an_unknown_timm_model_is_named(timm: None, model: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        fc.Stage.from_timm(model, pretrained=False)


def test_an_interpolation_that_has_no_kernel(timm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm as library

    config = {"input_size": (3, 8, 8), "crop_pct": 1, "interpolation": "lanczos", "mean": (0,), "std": (1,)}
    monkeypatch.setattr(library.data, "resolve_model_data_config", lambda _: config)
    with pytest.raises(InvalidArgument, match="'lanczos' interpolation; expected 'bilinear' or 'bicubic'"):
        fc.Stage.from_timm("lcnet_035", pretrained=False)


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("timm", lambda: fc.Stage.from_timm("resnet18")),
        ("transformers", lambda: fc.Stage.from_huggingface("folder")),
    ],
)
def test_a_missing_library_names_the_extra(package: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InvalidArgument, match=rf"pip install 'fastcascade\[{package}\]'"):
        make()


def save_resnet(transformers: Any, folder: Path, **processor: Any) -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4, layer_type="basic"
    )
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    usual = {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 56},
        "crop_pct": 0.875,
        "resample": 3,
        "image_mean": list(IMAGENET.mean),
        "image_std": list(IMAGENET.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(usual | processor))


def test_a_hugging_face_folder_in_a_cascade(transformers: Any, tmp_path: Path) -> None:
    save_resnet(transformers, tmp_path / "tiny")
    stage = fc.Stage.from_huggingface(tmp_path / "tiny")
    assert stage.name == "tiny"
    assert stage.transform == fc.ImageTransform((56, 56), 0.875, "bicubic", IMAGENET)
    cascade = fc.Cascade([stage], None, 4, (3, 64, 64))
    assert_runs_as_operations(cascade)
    x = torch.randint(0, 256, (9, 3, 64, 64), dtype=torch.uint8)
    pixels = cascade.stage_images(0, cascade.images(x))
    with torch.no_grad():
        want = stage.module.eval().model(pixels).logits.softmax(1)
    torch.testing.assert_close(cascade(x).probs, want, atol=1e-5, rtol=1e-4)


def test_a_processor_that_crops(transformers: Any, tmp_path: Path) -> None:
    save_resnet(
        transformers,
        tmp_path,
        size={"height": 64, "width": 64},
        do_center_crop=True,
        crop_size=56,
        resample=2,
    )
    transform = fc.Stage.from_huggingface(tmp_path).transform
    assert transform == fc.ImageTransform((56, 56), 0.875, "bilinear", IMAGENET)


@pytest.mark.parametrize(
    ("processor", "message"),
    [({"resample": 1}, "lanczos"), ({"rescale_factor": 1.0}, "scales pixels by 1.0")],
)
def test_a_processor_that_does_something_else(
    transformers: Any, processor: Any, message: str, tmp_path: Path
) -> None:
    save_resnet(transformers, tmp_path, **processor)
    with pytest.raises(InvalidArgument, match=message):
        fc.Stage.from_huggingface(tmp_path)
    assert fc.Stage.from_huggingface(tmp_path, transform=fc.ImageTransform(56)).transform is not None


def test_a_folder_without_a_model(transformers: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot load an image classifier"):
        fc.Stage.from_huggingface(tmp_path)
