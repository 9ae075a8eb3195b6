"""Training from a TOML file that names networks, data splits, schedule and operating points.

The models below are the schema of the file; ``docs/config.md`` is generated from them. Whatever can be
checked without training is checked before the first epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel, Field, model_validator
from torch import Tensor

from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.evaluation.calibration import calibrate
from fastcascade.model.cascade import Cascade
from fastcascade.model.registry import build_network
from fastcascade.model.selector import FeatureKind, MLPSelector, ScoreKind, Selector, ThresholdSelector
from fastcascade.model.store import cascade_exists
from fastcascade.storage.files import require_writable
from fastcascade.training.distributed import process_group, rank
from fastcascade.training.objective import Objective
from fastcascade.training.progress import announce
from fastcascade.training.trainer import Recipe, fit
from fastcascade.training.validation import STRICT, validated
from fastcascade.types import Normalize, checked_combine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "CascadeTable",
    "OperatingPointTable",
    "SplitsTable",
    "TrainTable",
    "TrainingConfig",
    "read_config",
    "train_from_config",
]


def _network(name: str) -> str:
    """Check a network's registry name; the meta device allocates no weights."""
    with torch.device("meta"):
        build_network(name, num_classes=2)
    return name


def _ascending(span: tuple[int, int]) -> tuple[int, int]:
    if not span[0] < span[1]:
        raise ValueError("expected [first, end] with first < end")
    return span


Network = Annotated[str, AfterValidator(_network)]
Positive = Annotated[float, Gt(0)]
Size = Annotated[int, Ge(1)]
Index = Annotated[int, Ge(0)]
Span = Annotated[tuple[Index, Index], AfterValidator(_ascending)]
OpenShare = Annotated[float, Gt(0), Lt(1)]


class CascadeTable(BaseModel):
    """The networks and the selector.

    Attributes:
        stages: registry names of the networks, from small to large, for example ``"resnet9:16"``.
        num_classes: number of classes in the data.
        input_shape: ``[channels, height, width]`` of an image. The networks read as many channels, unless
            their names say otherwise: ``"resnet9:16,in_channels=1"``.
        mean: mean of each channel, for pixels scaled to 0–1.
        std: standard deviation of each channel, for pixels scaled to 0–1.
        combine: ``"last"`` uses the probabilities of the stage where an instance stops, ``"mean"`` their mean
            over the stages visited; a list of one weight per stage makes it a weighted mean.
        features: inputs of the learned selector.
        score: stop on this confidence score instead of a learned selector; excludes ``features``.
        selector: ``"auto"`` learns one, unless a confidence score is clearly better on held-out images;
            excludes ``features`` and ``score``.
    """

    model_config = STRICT

    stages: Annotated[tuple[Network, ...], MinLen(1)]
    num_classes: Annotated[int, Ge(2)]
    input_shape: tuple[Size, Size, Size]
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    combine: Literal["last", "mean"] | tuple[float, ...] = "last"
    features: FeatureKind = "stats"
    score: ScoreKind | None = None
    selector: Literal["auto"] | None = None

    @model_validator(mode="after")
    def _check(self) -> CascadeTable:
        channels = self.input_shape[0]
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} entries; "
                f"expected {channels}, one per channel"
            )
        checked_combine(self.combine, len(self.stages))
        if self.score is not None and "features" in self.model_fields_set:
            raise ValueError("features and score exclude each other; remove one")
        if self.selector is not None and {"features", "score"} & self.model_fields_set:
            raise ValueError("selector = 'auto' chooses by itself; remove features and score")
        if self.score is None and self.features == "topk" and self.num_classes < 3:
            raise ValueError("features = 'topk' needs at least 3 classes; use 'stats'")
        return self


class SplitsTable(BaseModel):
    """Ranges ``[first, end)`` of the training images. They must not overlap.

    Attributes:
        train: trains the stages and the selector.
        validation: measures each epoch and refits the selector.
        calibration: chooses the thresholds of the operating points.
    """

    model_config = STRICT

    train: Span
    validation: Span
    calibration: Span

    @model_validator(mode="after")
    def _check(self) -> SplitsTable:
        for (a, span_a), (b, span_b) in combinations(self.spans().items(), 2):
            if max(span_a[0], span_b[0]) < min(span_a[1], span_b[1]):
                raise ValueError(
                    f"{a} {list(span_a)} and {b} {list(span_b)} overlap; "
                    "expected disjoint ranges [first, end)"
                )
        return self

    def spans(self) -> dict[str, tuple[int, int]]:
        """Name → (first, end)."""
        return {"train": self.train, "validation": self.validation, "calibration": self.calibration}


class TrainTable(BaseModel):
    """The training objective.

    Attributes:
        objective: how the selector's gradient is computed: in closed form, by REINFORCE (the paper), or by
            imitating the best exit.
        alpha: price of one dense cost, in nats of cross-entropy. Higher values stop earlier.
    """

    model_config = STRICT

    objective: Objective = "exact"
    alpha: Annotated[float, Ge(0)] = 0.05


class OperatingPointTable(BaseModel):
    """The target of one operating point. Give exactly one.

    Attributes:
        budget: highest accuracy at this mean cost, as a share of the dense cost.
        budget_macs: highest accuracy at this mean cost, in MACs per instance.
        min_accuracy: lowest cost at this accuracy, 0 to 1.
        max_risk: ``[eps, delta]``: with probability 1 − delta, the label differs from the last exit's on at
            most a share eps of new instances.
    """

    model_config = STRICT

    budget: Positive | None = None
    budget_macs: Positive | None = None
    min_accuracy: Annotated[float, Ge(0), Le(1)] | None = None
    max_risk: tuple[OpenShare, OpenShare] | None = None

    @model_validator(mode="after")
    def _check(self) -> OperatingPointTable:
        given = [name for name in OperatingPointTable.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"got {' and '.join(given) or 'no target'}; expected exactly one of "
                f"{', '.join(OperatingPointTable.model_fields)}"
            )
        return self

    def target(self, dense_macs: int) -> dict[str, Any]:
        """Arguments of :func:`fastcascade.calibrate`."""
        if self.budget is not None:
            return {"budget_macs": self.budget * dense_macs}
        return self.model_dump(exclude_none=True)


class TrainingConfig(BaseModel):
    """A training run.

    Attributes:
        cascade: the networks and the selector.
        splits: which training images are used for what.
        train: the training objective.
        recipe: overrides of the training schedule.
        operating_points: name → target, calibrated after training.
    """

    model_config = STRICT

    cascade: CascadeTable
    splits: SplitsTable
    train: TrainTable = TrainTable()
    recipe: Recipe = Field(default_factory=Recipe)
    operating_points: dict[Annotated[str, MinLen(1)], OperatingPointTable] = {}

    def build(self) -> Cascade:
        """The untrained cascade; the recipe's seed determines its weights."""
        torch.manual_seed(self.recipe.seed)
        table = self.cascade
        stages = [build_network(name, table.num_classes, table.input_shape[0]) for name in table.stages]
        selector: Selector | Literal["auto"] = table.selector or MLPSelector(table.features)
        if table.score is not None:
            selector = ThresholdSelector(table.score)
        return Cascade(
            stages,
            selector if len(stages) > 1 else None,
            table.num_classes,
            table.input_shape,
            table.combine,
            Normalize(table.mean, table.std),
        )


def read_config(path: str | Path) -> TrainingConfig:
    """Read and validate a TOML file.

    Raises:
        InvalidArgument: unreadable, not TOML, or invalid; names every wrong key and its value.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"cannot read {path}: {error}") from error
    return validated(TrainingConfig, document, str(path))


def train_from_config(
    config: str | Path, source: str, directory: str | Path, overwrite: bool = False, progress: bool = True
) -> Cascade:
    """Train, calibrate and save a cascade; an interrupted run resumes from its checkpoint.

    Under torchrun, every process calls this with the same arguments, and the first one writes.

    Args:
        source: images for :func:`fastcascade.load_data`; the training part is used.
        directory: receives ``checkpoint/`` during training and ``model/`` at the end.
        overwrite: replace an existing ``model/``.
        progress: on standard error, print a line before each phase and draw a bar.

    Returns:
        the trained cascade with its operating points.

    Raises:
        InvalidArgument: an invalid config, or ``model/`` exists and ``overwrite`` is False.
        DataError: the images have no labels, or do not fit the config.
        SaveError: ``directory`` cannot be written.
    """
    directory = Path(directory)
    settings = read_config(config)
    if cascade_exists(directory / "model") and not overwrite:
        raise InvalidArgument(f"{directory / 'model'} exists; choose another directory or pass --overwrite")
    require_writable(directory)
    try:
        cascade = settings.build()
    except InvalidArgument as error:
        raise InvalidArgument(f"{config}: [cascade]: {error}") from error
    _check_budgets(settings.operating_points, cascade, config)
    images, labels, cascade.classes = _read_training_images(source, settings.cascade)
    parts = {
        name: _part(images, labels, f"{config}: splits.{name}", span)
        for name, span in settings.splits.spans().items()
    }
    with process_group():
        fit(
            cascade,
            parts["train"],
            parts["validation"],
            objective=settings.train.objective,
            alpha=settings.train.alpha,
            checkpoint_dir=directory / "checkpoint",
            recipe=settings.recipe,
            progress=progress and rank() == 0,
        )
        if settings.operating_points:
            points, n = len(settings.operating_points), len(parts["calibration"][0])
            announce(f"calibration: {points} operating point{'s' * (points > 1)}, {n:,} images", progress)
        for name, point in settings.operating_points.items():
            calibrate(cascade, parts["calibration"], name=name, **point.target(cascade.dense_macs))
        if rank() == 0:
            cascade.save(directory / "model", overwrite=overwrite)
    return cascade


def _check_budgets(points: Mapping[str, OperatingPointTable], cascade: Cascade, config: str | Path) -> None:
    """Refuse budgets below the cost of the first exit: calibration could only fail, after training."""
    least = int(cascade.exit_macs[0])
    for name, point in points.items():
        for key, unit, minimum in (
            ("budget", "of the dense cost", least / cascade.dense_macs),
            ("budget_macs", "MACs", least),
        ):
            value = getattr(point, key)
            if value is not None and value < minimum:
                raise InvalidArgument(
                    f"{config}: operating_points.{name}.{key} is {value}; expected at least "
                    f"{minimum:.4g} {unit}, the cost of stopping every instance at the first exit"
                )


def _read_training_images(source: str, table: CascadeTable) -> tuple[Tensor, Tensor, tuple[str, ...] | None]:
    """(N, …) images, (N,) labels and the class names."""
    data = load_data(source, "train", shape=table.input_shape)
    if data.classes is not None and len(data.classes) != table.num_classes:
        raise DataError(f"{source} has {len(data.classes)} classes; num_classes is {table.num_classes}")
    images, labels = arrays(data, table.num_classes)
    if labels is None:
        raise DataError(f"{source} has no labels; training needs them")
    return images, labels, data.classes


def _part(images: Tensor, labels: Tensor, key: str, span: tuple[int, int]) -> tuple[Tensor, Tensor]:
    first, end = span
    if end > len(images):
        raise InvalidArgument(
            f"{key} is [{first}, {end}]; expected an end of at most {len(images)}: there are {len(images)} "
            "training images"
        )
    return images[first:end], labels[first:end]
