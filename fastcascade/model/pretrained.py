"""Networks of timm and of Hugging Face, with the transforms that they were trained with.

Both libraries are optional and imported at first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from fastcascade.errors import InvalidArgument
from fastcascade.model.image_transform import ImageTransform
from fastcascade.types import Normalize

__all__ = ["Logits", "PretrainedNetwork", "huggingface_network", "timm_network"]

_PILLOW_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""By Pillow's numbers, which Hugging Face stores."""

_CROPPED_BELOW = 384
"""Hugging Face's ConvNext processor crops images only below this size."""


class PretrainedNetwork(NamedTuple):
    """A network (N, C, H, W) → logits, and the transform of the images that it was trained on."""

    module: nn.Module
    transform: ImageTransform


class Logits(nn.Module):
    """The logits of a Hugging Face model, which returns them in an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.model(pixel_values=x, return_dict=False)[0])


def timm_network(
    model: str,
    num_classes: int | None,
    pretrained: bool,
    transform: ImageTransform | None,
    options: Mapping[str, Any],
) -> PretrainedNetwork:
    """A network of timm; see :meth:`fastcascade.Stage.from_timm`."""
    timm = _required("timm")
    if num_classes is not None:
        options = {**options, "num_classes": num_classes}
    try:
        module = timm.create_model(model, pretrained=pretrained, **options)
    except Exception as error:  # unknown names, options, failed downloads: timm raises many types
        raise InvalidArgument(
            f"timm cannot create {model!r}: {_first_line(error)}{_similar(timm, model)}"
        ) from error
    config = timm.data.resolve_model_data_config(module)
    _, height, width = config["input_size"]
    return PretrainedNetwork(
        module,
        transform
        or _transform(
            f"timm's {model}",
            (height, width),
            config["crop_pct"],
            config["interpolation"],
            config["mean"],
            config["std"],
        ),
    )


def _similar(timm: ModuleType, model: str) -> str:
    family = model.split("_")[0].split(".")[0]
    known = timm.list_models(f"{family}*")[:5] if not timm.is_model(model.split(".")[0]) else []
    return f"; similar names: {', '.join(known)}" if known else ""


def huggingface_network(path: str | Path, transform: ImageTransform | None) -> PretrainedNetwork:
    """An image classifier of Hugging Face; see :meth:`fastcascade.Stage.from_huggingface`."""
    transformers = _required("transformers")
    try:
        model = transformers.AutoModelForImageClassification.from_pretrained(path)
        config: Mapping[str, Any] = {}
        if transform is None:
            config, _ = transformers.ImageProcessingMixin.get_image_processor_dict(path)
    except Exception as error:  # a missing folder, file or network connection; an unknown kind of model
        raise InvalidArgument(
            f"transformers cannot load an image classifier from {path}: {_first_line(error)}. Expected a "
            "folder with config.json, weights and preprocessor_config.json, or the name of a checkpoint"
        ) from error
    return PretrainedNetwork(Logits(model), transform or _processor_transform(str(path), config))


def _processor_transform(path: str, config: Mapping[str, Any]) -> ImageTransform:
    """The transform that an image processor's settings describe."""
    size = config.get("size", 224)
    sides = _sides(size)
    crop = 1.0
    if config.get("do_center_crop"):
        cropped = _sides(config.get("crop_size", size))
        crop, sides = min(cropped[0] / sides[0], 1.0), cropped
    elif config.get("crop_pct") is not None and sides[0] < _CROPPED_BELOW:
        crop = config["crop_pct"]
    scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if abs(255 * scale - 1) > 1e-3:
        raise InvalidArgument(
            f"the image processor of {path} scales pixels by {scale}; expected 1/255. Pass transform=…"
        )
    normalises = config.get("do_normalize", True) and config.get("image_mean") is not None
    return _transform(
        f"the image processor of {path}",
        sides,
        crop,
        _PILLOW_RESAMPLING[config.get("resample", 2)],
        config["image_mean"] if normalises else (0.0, 0.0, 0.0),
        config["image_std"] if normalises else (1.0, 1.0, 1.0),
    )


def _sides(size: Any) -> tuple[int, int]:
    """(height, width) of a size as Hugging Face writes it: a number, or an object."""
    if not isinstance(size, Mapping):
        return size, size
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]


def _transform(
    what: str,
    size: tuple[int, int],
    crop: float,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> ImageTransform:
    if interpolation not in ("bilinear", "bicubic"):
        raise InvalidArgument(
            f"{what} resizes images by {interpolation!r} interpolation; expected 'bilinear' or 'bicubic'. "
            "Pass transform=fc.ImageTransform(size, interpolation='bicubic', normalize=…) to choose one"
        )
    how = cast(Literal["bilinear", "bicubic"], interpolation)
    return ImageTransform(size, crop, how, Normalize(tuple(mean), tuple(std)))


def _required(package: str) -> ModuleType:
    """An optional package.

    Raises:
        InvalidArgument: it is missing, or cannot be imported; says what to install.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise InvalidArgument(
            f"this needs {package} ({_first_line(error)}): pip install 'fastcascade[{package}]'"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removesuffix(".")
