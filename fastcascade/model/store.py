"""Cascades as files: networks by registry name, everything else as plain data.

A *custom* module is a stage, exit or selector that the registry cannot build. Its weights and name are saved,
and the caller supplies the module when loading. Nothing in a file is executed or unpickled. Networks from the
registry are built on the meta device, so that no memory is allocated before the file's tensors fit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastcascade.errors import FastCascadeError, FileFormatError, InvalidArgument, LoweringError
from fastcascade.model.cascade import Cascade, Stage
from fastcascade.model.image_transform import ImageTransform
from fastcascade.model.registry import build_module
from fastcascade.model.selector import FeatureKind, MLPSelector, ScoreKind, ThresholdSelector
from fastcascade.storage.bundle import BundleFormat, bundle_exists, load_bundle, save_bundle
from fastcascade.storage.codec import ADDED, Reader, encode
from fastcascade.types import Combine, InputSpec, OperatingPoint, OutOfFoldScores, SelectorComparison

__all__ = ["PlanNote", "cascade_exists", "load_cascade", "plan_note", "save_cascade"]

FORMAT = BundleFormat("cascade", 1)
MAX_INPUT_VALUES = 2**24
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Module:
    """A network: its registry name, or None for a custom module; the class name is for error messages."""

    architecture: str | None
    class_name: str


@dataclass(frozen=True)
class _Stage:
    name: str | None
    module: _Module
    exit: _Module | None
    input: Literal["image", "previous"]
    macs: int | None
    transform: ImageTransform | None = field(default=None, metadata=ADDED)


@dataclass(frozen=True)
class _Selector:
    """The selector: one of the classes below."""


@dataclass(frozen=True)
class _Mlp(_Selector):
    features: FeatureKind
    hidden: int


@dataclass(frozen=True)
class _Threshold(_Selector):
    score: ScoreKind


@dataclass(frozen=True)
class _Custom(_Selector):
    class_name: str


@dataclass(frozen=True)
class _Costs:
    """For readers of the file; loading recomputes them."""

    stage_macs: tuple[int, ...]
    selector_macs: tuple[int, ...]
    dense_macs: int


@dataclass(frozen=True)
class _OutOfFold:
    """:class:`fastcascade.types.OutOfFoldScores` as tensors."""

    images: Tensor
    scores: Tensor


@dataclass(frozen=True)
class _Cascade:
    stages: tuple[_Stage, ...]
    selector: _Selector | None
    num_classes: int
    input: InputSpec
    combine: Combine
    classes: tuple[str, ...] | None
    operating_points: Mapping[str, OperatingPoint]
    costs: _Costs
    seen_images: Tensor  # (n,) uint64, increasing
    auto_selector: bool = field(default=False, metadata=ADDED)
    comparison: SelectorComparison | None = field(default=None, metadata=ADDED)
    out_of_fold: _OutOfFold | None = field(default=None, metadata=ADDED)
    half: bool = field(default=False, metadata=ADDED)  # float32 stages are stored as float16
    plan: str | None = field(default=None, metadata=ADDED)  # hash of the plan that was saved with it
    no_plan: str | None = field(default=None, metadata=ADDED)  # why there is none


def cascade_exists(directory: str | Path) -> bool:
    """Whether a directory holds a completely saved cascade."""
    return bundle_exists(directory, FORMAT)


class PlanNote(NamedTuple):
    """What a saved cascade says of its plan.

    Attributes:
        sha256: hash of the plan that was saved with it, or None.
        missing_reason: why there is none, if that is known.
        custom_modules: names of the modules that only the user's code can build.
    """

    sha256: str | None
    missing_reason: str | None
    custom_modules: tuple[str, ...]


def plan_note(directory: str | Path) -> PlanNote:
    """What the cascade in a directory says of its plan.

    Raises:
        FileFormatError: missing, damaged, or written by a newer version.
    """
    saved, _ = _read_saved(directory)
    return PlanNote(saved.plan, saved.no_plan, tuple(name for name, _ in _custom_modules(saved)))


SavePlan = Callable[[Cascade], str]
"""Saves a cascade's plan beside it and returns its hash."""


def save_cascade(
    cascade: Cascade,
    directory: str | Path,
    overwrite: bool = False,
    half: bool = False,
    plan: bool | None = None,
    save_plan: SavePlan | None = None,
) -> None:
    """Save as ``cascade.json`` and ``cascade-<sha256>.safetensors``.

    The plan is saved first and named by its hash in the cascade's file. After a crash between the two, the
    old cascade names another plan than the one beside it, which is therefore not used.

    Args:
        directory: created if missing; unrelated files in it are kept.
        overwrite: replace an existing cascade.
        half: store the stages' float32 weights as float16. They load as float32, rounded.
        plan: also save the plan. None saves it if the cascade has custom modules and the plan can be saved.
        save_plan: saves the plan of a cascade.

    Raises:
        InvalidArgument: a cascade exists, two custom modules have the same name, a module has state that is
            not tensors, or a weight is too large for float16.
        SaveError: the operating system reported an error; an existing cascade is intact.
    """
    tensors = dict(cascade.state_dict())
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InvalidArgument(f"{name} is a {type(value).__name__}; only tensors can be saved")
        if half and name.startswith("stages.") and value.dtype == torch.float32:
            tensors[name] = _halved(name, value)
    kept = cascade.out_of_fold
    saved = _Cascade(
        stages=tuple(_describe_stage(cascade, k) for k in range(len(cascade.stages))),
        selector=_describe_selector(cascade.selector),
        num_classes=cascade.num_classes,
        input=cascade.input,
        combine=cascade.combine,
        classes=cascade.classes,
        operating_points=cascade.operating_points,
        costs=_Costs(cascade.stage_macs, cascade.selector_macs, cascade.dense_macs),
        seen_images=torch.from_numpy(cascade.seen_images.copy()),
        auto_selector=cascade.auto_selector,
        comparison=cascade.comparison,
        out_of_fold=None
        if kept is None
        else _OutOfFold(torch.from_numpy(kept.images.copy()), torch.from_numpy(kept.scores.copy())),
        half=half,
    )
    custom = [name for name, _ in _custom_modules(saved)]
    if len(set(custom)) != len(custom):
        raise InvalidArgument(f"custom modules have the names {custom}; give each Stage its own name")
    if not overwrite and cascade_exists(directory):
        raise InvalidArgument(
            f"{directory} holds a cascade; choose another directory, or pass overwrite=True"
        )
    if save_plan is not None and (plan or (plan is None and custom)):
        try:
            saved = replace(saved, plan=save_plan(_rounded(cascade) if half else cascade))
        except LoweringError as error:
            if plan:
                raise
            saved = replace(saved, no_plan=str(error))
    save_bundle(directory, FORMAT, encode(saved, tensors), tensors, overwrite=overwrite)


def _rounded(cascade: Cascade) -> Cascade:
    """A copy with the weights that a file in half precision gives."""
    rounded = copy.deepcopy(cascade)
    for parameter in (*rounded.stages.parameters(), *rounded.stages.buffers()):
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.half().float()
    return rounded


def _halved(name: str, weight: Tensor) -> Tensor:
    rounded = weight.half()
    if not bool((rounded.isfinite() | ~weight.isfinite()).all()):
        largest = float(weight.abs().max())
        raise InvalidArgument(
            f"{name} has a weight of {largest:.3g}, too large for float16; save without half"
        )
    return rounded


def _describe_stage(cascade: Cascade, k: int) -> _Stage:
    stage = cascade.stage(k)
    exit_module = None if stage.exit is None else _describe_module(stage.exit, cascade.num_classes)
    module = _describe_module(stage.module, cascade.num_classes)
    return _Stage(stage.name, module, exit_module, stage.input, stage.macs, stage.transform)


def _describe_module(module: nn.Module, num_classes: int) -> _Module:
    """The registry name, unless the network was changed after it was built."""
    architecture = getattr(module, "architecture", None)
    if isinstance(architecture, str):
        try:
            with torch.device("meta"):
                twin = build_module(architecture, num_classes)
        except InvalidArgument:
            return _Module(None, type(module).__name__)
        if repr(twin) == repr(module) and _shapes(twin) == _shapes(module):
            return _Module(architecture, type(module).__name__)
    return _Module(None, type(module).__name__)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _describe_selector(selector: nn.Module | None) -> _Selector | None:
    if selector is None:
        return None
    if type(selector) is MLPSelector:
        return _Mlp(selector.features, selector.hidden)
    if type(selector) is ThresholdSelector:
        return _Threshold(selector.score)
    return _Custom(type(selector).__name__)


def load_cascade(directory: str | Path, modules: Mapping[str, nn.Module] | None = None) -> Cascade:
    """Load a cascade saved by :meth:`Cascade.save`, on the CPU.

    Args:
        modules: custom modules by name, which receive the saved weights: a stage by its own name or
            ``stage<k>``, its exit head by ``<stage>.exit``, the selector by ``selector``.

    Raises:
        FileFormatError: missing, damaged, written by a newer version, or not a valid cascade.
        InvalidArgument: a custom module is missing, superfluous, or does not fit its weights.

    Example:
        >>> import tempfile
        >>> import fastcascade as fc
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> cascade = fc.Cascade([resnet_cifar(8)], None, num_classes=10, input_shape=(3, 32, 32))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     cascade.save(directory)
        ...     load_cascade(directory).stage(0).module.architecture
        'resnet_cifar:8'
    """
    saved, tensors = _read_saved(directory)
    if saved.half:
        tensors = {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
    custom = dict(modules or {})
    _check_custom_modules(saved, custom)
    loader = _Loader(tensors, custom, saved.num_classes)
    stages = [loader.stage(k, stage) for k, stage in enumerate(saved.stages)]
    selector = loader.selector(saved)
    temperatures = _temperatures(loader.tensors.pop("temperatures", None), len(stages), directory)
    if loader.tensors:
        raise FileFormatError(f"{directory} holds tensors of no module: {sorted(loader.tensors)[:5]}")
    try:
        cascade = Cascade(
            stages,
            selector,
            saved.num_classes,
            saved.input.shape,
            saved.combine,
            saved.input.preprocess,
            saved.classes,
        )
    except (FastCascadeError, RuntimeError, TypeError, ValueError) as error:
        raise FileFormatError(f"{directory} holds parts that do not make a cascade: {error}") from error
    cascade.temperatures.copy_(temperatures)
    cascade.auto_selector = saved.auto_selector
    cascade.comparison = saved.comparison
    cascade.out_of_fold = _out_of_fold(saved)
    cascade.operating_points = dict(saved.operating_points)
    cascade.seen_images = saved.seen_images.numpy()
    return cascade


def _read_saved(directory: str | Path) -> tuple[_Cascade, dict[str, Tensor]]:
    """The structure of a saved cascade, checked, and the tensors of its modules."""
    content, tensors = load_bundle(directory, FORMAT)
    reader = Reader(tensors)
    try:
        saved = cast(_Cascade, reader.decode(_Cascade, content, "cascade"))
        _check_saved(saved)
        _out_of_fold(saved)
    except InvalidArgument as error:
        raise FileFormatError(f"{directory} does not hold a valid cascade: {error}") from error
    return saved, {name: tensors[name] for name in reader.unused}


def _temperatures(saved: Tensor | None, stages: int, directory: str | Path) -> Tensor:
    """(K,) temperatures of the stages; 1 in files from before there were any."""
    if saved is None:
        return torch.ones(stages)
    if saved.shape != (stages,) or not saved.is_floating_point() or not bool(saved.isfinite().all()):
        raise FileFormatError(f"{directory} holds temperatures {saved}; expected {stages} finite numbers")
    if not bool((saved > 0).all()):
        raise FileFormatError(f"{directory} holds temperatures {saved.tolist()}; expected positive ones")
    return saved


def _out_of_fold(saved: _Cascade) -> OutOfFoldScores | None:
    """The scores as arrays.

    Raises:
        InvalidArgument: they do not fit each other or the stages.
    """
    if saved.out_of_fold is None:
        return None
    kept = OutOfFoldScores(saved.out_of_fold.images.numpy(), saved.out_of_fold.scores.numpy())
    if len(kept.scores) != len(saved.stages) - 1:
        raise InvalidArgument(
            f"its out-of-fold scores are for {len(kept.scores) + 1} stages, not {len(saved.stages)}"
        )
    return kept


def _check_saved(saved: _Cascade) -> None:
    """Check what the types of the fields cannot express.

    Raises:
        InvalidArgument: a value out of range.
    """
    exits = len(saved.stages)
    seen = saved.seen_images
    checks = [
        (exits >= 1, "it has no stages"),
        (2 <= saved.num_classes <= 2**20, f"num_classes is {saved.num_classes}"),
        (
            math.prod(saved.input.shape) <= MAX_INPUT_VALUES,
            f"images of shape {saved.input.shape} are too large",
        ),
        (seen.dtype == torch.uint64 and seen.ndim == 1, "seen_images is not a row of uint64"),
        (not isinstance(saved.selector, _Mlp) or saved.selector.hidden <= 2**16, "its selector is too wide"),
    ]
    for stage in saved.stages:
        if stage.transform is not None:
            values = saved.input.shape[0] * math.prod(stage.transform.resized)
            checks.append((values <= MAX_INPUT_VALUES, f"{stage.transform} makes images too large"))
    for name, point in saved.operating_points.items():
        fits = len(point.thresholds) == exits - 1 and len(point.exit_shares) == exits and point.name == name
        checks.append((fits, f"operating point {name!r} does not fit {exits} stages"))
        checks.append((not any(map(math.isnan, point.thresholds)), f"operating point {name!r} has a NaN"))
    for passed, problem in checks:
        if not passed:
            raise InvalidArgument(problem)


def _custom_modules(saved: _Cascade) -> Iterator[tuple[str, str]]:
    """(name, class name) of every custom module."""
    for k, stage in enumerate(saved.stages):
        name = _stage_name(k, stage)
        if stage.module.architecture is None:
            yield name, stage.module.class_name
        if stage.exit is not None and stage.exit.architecture is None:
            yield f"{name}.exit", stage.exit.class_name
    if isinstance(saved.selector, _Custom):
        yield "selector", saved.selector.class_name


def _stage_name(k: int, stage: _Stage) -> str:
    return f"stage{k}" if stage.name is None else stage.name


def _check_custom_modules(saved: _Cascade, given: Mapping[str, nn.Module]) -> None:
    wanted = dict(_custom_modules(saved))
    missing = [f"{name!r}: a {wanted[name]}" for name in wanted if name not in given]
    if missing:
        raise InvalidArgument(
            "this cascade has modules that the registry does not know; "
            f"pass modules={{{', '.join(missing)}}} with a module of that class for each"
        )
    if set(given) - set(wanted):
        raise InvalidArgument(
            f"modules names {sorted(set(given) - set(wanted))}, which this cascade does not need; "
            f"it needs {sorted(wanted) or 'none'}"
        )


class _Loader:
    """Builds modules and loads their tensors; ``tensors`` holds those that no module has taken yet."""

    def __init__(self, tensors: dict[str, Tensor], custom: Mapping[str, nn.Module], num_classes: int) -> None:
        self.tensors = tensors
        self.custom = custom
        self.num_classes = num_classes

    def stage(self, k: int, saved: _Stage) -> Stage:
        name, prefix = _stage_name(k, saved), f"stages.{k}"
        module = self.module(saved.module, name, f"{prefix}.module.")
        exit_module = (
            None if saved.exit is None else self.module(saved.exit, f"{name}.exit", f"{prefix}.exit.")
        )
        return Stage(module, exit_module, saved.input, saved.name, saved.macs, saved.transform)

    def module(self, saved: _Module, name: str, prefix: str) -> nn.Module:
        if saved.architecture is None:
            return self.fill_custom(self.custom[name], name, prefix)
        try:
            with torch.device("meta"):
                module = build_module(saved.architecture, self.num_classes)
        except (InvalidArgument, RuntimeError) as error:
            raise FileFormatError(f"stage {name!r} cannot be built: {error}") from error
        return self.fill(module, name, prefix)

    def selector(self, saved: _Cascade) -> nn.Module | None:
        kind, prefix = saved.selector, "selector."
        if isinstance(kind, _Mlp):
            selector = MLPSelector(kind.features, kind.hidden)
            try:
                with torch.device("meta"):
                    selector.build(len(saved.stages), saved.num_classes)
            except (InvalidArgument, RuntimeError) as error:
                raise FileFormatError(f"the selector cannot be built: {error}") from error
            return self.fill(selector, "selector", prefix)
        if isinstance(kind, _Threshold):
            return ThresholdSelector(kind.score)
        return None if kind is None else self.fill_custom(self.custom["selector"], "selector", prefix)

    def fill(self, module: nn.Module, name: str, prefix: str) -> nn.Module:
        """Assign the file's tensors to a module on the meta device; the floating dtype may differ."""
        weights = self.take(prefix)
        difference = _difference(module, weights, any_float=True)
        if difference:
            raise FileFormatError(f"the weights of {name!r} do not fit: {difference}")
        module.load_state_dict(weights, assign=True)
        return module

    def fill_custom(self, module: nn.Module, name: str, prefix: str) -> nn.Module:
        """Copy the weights into a custom module."""
        weights = self.take(prefix)
        difference = _difference(module, weights, any_float=False)
        if difference:
            raise InvalidArgument(f"modules[{name!r}] does not fit the saved weights: {difference}")
        module.load_state_dict(weights)
        return module

    def take(self, prefix: str) -> dict[str, Tensor]:
        """Remove and return the tensors whose names begin with ``prefix``."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensors.pop(name) for name in names}


def _difference(module: nn.Module, weights: Mapping[str, Tensor], any_float: bool) -> str | None:
    """The first difference between a module's tensors and the saved ones, or None."""
    expected = module.state_dict()
    if set(expected) != set(weights):
        missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
        return f"missing {missing[:5]}, superfluous {extra[:5]}"
    for name, tensor in weights.items():
        wanted = expected[name]
        same_kind = any_float and wanted.dtype in _FLOATS and tensor.dtype in _FLOATS
        if tensor.shape != wanted.shape or not (tensor.dtype == wanted.dtype or same_kind):
            return (
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}; "
                f"expected {tuple(wanted.shape)} {wanted.dtype}"
            )
    return None
