"""A training run described by a TOML file: which networks, which images, how long, which operating points."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.errors import InvalidArgument
from fastcascade.evaluation.calibration import calibrate
from fastcascade.model.cascade import Cascade
from fastcascade.model.registry import build_network
from fastcascade.model.selector import FeatureKind, MLPSelector, ScoreKind, Selector, ThresholdSelector
from fastcascade.training.distributed import process_group, rank
from fastcascade.training.objective import Objective
from fastcascade.training.trainer import Recipe, fit
from fastcascade.types import Combine, Normalize

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["TrainingConfig", "read_config", "train_from_config"]

_SPLITS = ("train", "validation", "calibration")


@dataclass(frozen=True)
class TrainingConfig:
    """What the file says.

    Attributes:
        stages: registry names, from small to large.
        num_classes, input_shape, combine, mean, std: of the cascade.
        features: of the MLP selector, or score: of a threshold rule, or selector: "auto" for the better.
        splits: [first, end) image numbers of "train", "validation" (selector) and "calibration".
        objective, alpha: of :func:`fastcascade.fit`.
        recipe: overrides of :class:`Recipe`'s defaults.
        operating_points: name → target of :func:`fastcascade.calibrate`, where ``budget`` is
            a share of the dense cost.
    """

    stages: tuple[str, ...]
    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: Mapping[str, tuple[int, int]]
    combine: Combine = "last"
    features: FeatureKind = "stats"
    score: ScoreKind | None = None
    selector: Literal["auto"] | None = None
    objective: Objective = "exact"
    alpha: float = 0.05
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    operating_points: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def build(self) -> Cascade:
        """The untrained cascade, its weights drawn from the recipe's seed."""
        torch.manual_seed(int(self.recipe.get("seed", 0)))
        stages = [build_network(name, self.num_classes) for name in self.stages]
        if self.selector not in (None, "auto") or (
            self.selector and (self.score or self.features != "stats")
        ):
            raise InvalidArgument(
                f"selector is {self.selector!r}, score {self.score!r}, features {self.features!r}; expected "
                'selector = "auto" alone, or a score, or features'
            )
        selector: Selector | Literal["auto"] = self.selector or MLPSelector(self.features)
        if self.score is not None:
            selector = ThresholdSelector(self.score)
        return Cascade(
            stages,
            selector if len(stages) > 1 else None,
            self.num_classes,
            self.input_shape,
            self.combine,
            Normalize(self.mean, self.std),
        )


def read_config(path: str | Path) -> TrainingConfig:
    """Read a TOML file with the tables [cascade], [splits], [train], [recipe] and [operating_points.NAME].

    Raises:
        InvalidArgument: unreadable, not TOML, or with keys that are missing or unknown.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"cannot read the config {path}: {error}") from error
    tables = {"cascade", "splits", "train", "recipe", "operating_points"}
    if unknown := sorted(set(document) - tables):
        raise InvalidArgument(f"{path} has unknown tables {unknown}; expected {sorted(tables)}")
    flat = {**document.get("cascade", {}), **document.get("train", {})}
    splits = document.get("splits", {})
    if set(splits) != set(_SPLITS):
        raise InvalidArgument(f"{path}: [splits] has {sorted(splits)}; expected {list(_SPLITS)}")
    fields = {f.name for f in dataclasses.fields(TrainingConfig)}
    recipe_fields = {f.name for f in dataclasses.fields(Recipe)}
    recipe = document.get("recipe", {})
    if unknown := sorted((set(flat) - fields) | (set(recipe) - recipe_fields)):
        raise InvalidArgument(f"{path} has unknown keys {unknown}; see fastcascade.Recipe and TrainingConfig")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()}
    try:
        return TrainingConfig(
            **values,
            splits={name: (int(first), int(end)) for name, (first, end) in splits.items()},
            recipe=recipe,
            operating_points=document.get("operating_points", {}),
        )
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{path} is incomplete: {error}") from error


def train_from_config(
    config: str | Path, source: str, directory: str | Path, overwrite: bool = False, progress: bool = True
) -> Cascade:
    """Train, calibrate and save as a config says; a run that was stopped goes on where it was.

    Under torchrun every process calls this with the same arguments, and the first one writes.

    Args:
        source: images for :func:`fastcascade.data.sources.load_data`; its training part is used.
        directory: receives ``checkpoint/`` while training and ``model/`` at the end.
        overwrite: replace an existing ``model/``.

    Returns:
        the trained cascade with its operating points.

    Raises:
        InvalidArgument: a bad config, or a model that exists already.
    """
    directory = Path(directory)
    plan = read_config(config)
    if (directory / "model").exists() and not overwrite:
        raise InvalidArgument(f"{directory / 'model'} exists; choose another directory or pass --overwrite")
    data = load_data(source, "train", shape=plan.input_shape)
    images, labels = arrays(data, plan.num_classes)
    if labels is None:
        raise InvalidArgument(f"{source} has no labels; training needs them")
    cascade = plan.build()
    cascade.classes = data.classes
    parts = {name: _part(images, labels, name, span) for name, span in plan.splits.items()}
    with process_group():
        fit(
            cascade,
            parts["train"],
            parts["validation"],
            objective=plan.objective,
            alpha=plan.alpha,
            checkpoint_dir=directory / "checkpoint",
            recipe=Recipe(**plan.recipe),
            progress=progress and rank() == 0,
        )
        for name, target in plan.operating_points.items():
            calibrate(cascade, parts["calibration"], name=name, **_absolute(target, cascade))
        if rank() == 0:
            cascade.save(directory / "model", overwrite=overwrite)
    return cascade


def _part(images: Tensor, labels: Tensor, name: str, span: tuple[int, int]) -> tuple[Tensor, Tensor]:
    first, end = span
    if not 0 <= first < end <= len(images):
        raise InvalidArgument(f"split {name} is {first} … {end}; the data have images 0 … {len(images)}")
    return images[first:end], labels[first:end]


def _absolute(target: Mapping[str, Any], cascade: Cascade) -> dict[str, Any]:
    """Targets as :func:`calibrate` takes them: ``budget`` is a share of the dense cost."""
    result = dict(target)
    if "budget" in result:
        result["budget_macs"] = float(result.pop("budget")) * cascade.dense_macs
    return result
