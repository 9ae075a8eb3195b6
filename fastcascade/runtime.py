"""Saved plans without torch: numpy arrays in and out, with the same bits as :func:`fastcascade.compile`.

Only numpy and safetensors are imported, so a server or a small container needs neither torch nor the model's
code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastcascade.errors import BackendUnavailable, FastCascadeError, FileFormatError, InvalidArgument
from fastcascade.storage.bundle import PLAN_FORMAT, load_arrays

__all__ = ["Output", "Runtime", "load"]

Array: TypeAlias = NDArray[Any]
Fields: TypeAlias = Mapping[str, Any]


class Output(NamedTuple):
    """Output for N images, in input order; see :class:`fastcascade.CascadeOutput`.

    Attributes:
        probs: (N, C) float32; NaN for an image that is invalid at the last exit.
        label: (N,) int64; −1 if invalid.
        exit_stage: (N,) int64.
        cost_macs: (N,) int64.
    """

    probs: NDArray[np.float32]
    label: NDArray[np.int64]
    exit_stage: NDArray[np.int64]
    cost_macs: NDArray[np.int64]


def load(
    directory: str | Path, threads: int | None = None, precision: Literal["bf16"] | None = None
) -> Runtime:
    """Load a plan that ``plan.save`` wrote, for the CPU engine.

    Args:
        threads: CPU threads of a call; by default as many as the process may run on.
        precision: "bf16" on a CPU with AVX512-BF16; None for what the plan is quantised to, else fp32.

    Raises:
        FileFormatError: missing, damaged, not a valid plan, or written by a newer version.
        BackendUnavailable: the engine cannot run here, or not at this precision, or refuses the plan.
        InvalidArgument: another precision, or bf16 for a quantised plan.

    Example:
        >>> import tempfile
        >>> import fastcascade as fc
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> plan = fc.plan(fc.Cascade([resnet_cifar(8)], None, num_classes=10, input_shape=(3, 32, 32)))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     content_hash = plan.save(directory)
        ...     runtime = load(directory, threads=1)
        >>> runtime(np.zeros((4, 3, 32, 32), np.float32)).probs.shape
        (4, 10)
    """
    if precision not in (None, "bf16"):
        raise InvalidArgument(f"precision is {precision!r}; expected 'bf16', or None for the plan's own")
    if precision == "bf16":
        _require_bf16()
    directory = Path(directory)
    if (directory / "cascade.json").exists() and not (directory / "plan.json").exists():
        raise FileFormatError(
            f"{directory} holds a cascade without its plan; save that where torch is installed, with "
            "cascade.save(directory, plan=True, overwrite=True)"
        )
    content, arrays = load_arrays(directory, PLAN_FORMAT)
    try:
        return Runtime(content, arrays, threads, precision)
    except InvalidArgument:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise FileFormatError(f"{directory} does not contain a valid plan: {reason}") from error


class Runtime:
    """A plan on the CPU engine.

    Attributes:
        input_shape: (C, H, W) of an image.
        classes: names of the classes, or None.
        operating_points: stored name → thresholds, of the points measured at the precision that runs.
    """

    def __init__(
        self,
        content: Fields,
        arrays: Mapping[str, Array],
        threads: int | None,
        precision: Literal["bf16"] | None = None,
    ) -> None:
        stages: Sequence[Fields] = content["stages"]
        self.input_shape: tuple[int, ...] = tuple(content["input"]["shape"])
        self.classes: list[str] | None = content["classes"]
        points: Mapping[str, Fields] = content["operating_points"]
        recorded = _recorded_precision(stages, precision)
        self.operating_points = {
            name: [float(t) for t in point["thresholds"]]
            for name, point in points.items()
            if point.get("precision", []) == recorded
        }
        self._unusable = set(points) - set(self.operating_points)
        default = content["default_thresholds"]
        self._default = None if default is None else arrays[default]
        self._table = _table(content["input"]["preprocess"])
        costs = [(stage["macs"], stage["selector_macs"]) for stage in stages]
        self._exit_macs = np.cumsum(np.array(costs, np.int64).sum(1))
        count = threads or len(os.sched_getaffinity(0))
        self._engine = _engine(content, stages, arrays, count, precision or "fp32")

    def __call__(self, images: Array, operating_point: str | Sequence[float] | Array | None = None) -> Output:
        """Classify images.

        Args:
            images: (N, C, H, W) or (N, H, W, C), floating, or uint8 where the plan has a preprocess.
            operating_point: a stored name or K−1 thresholds; None means "default" if stored, else the
                selector's own thresholds.

        Raises:
            InvalidArgument: wrong shape, dtype or operating point.
            FastCascadeError: the batch does not fit into memory.
        """
        thresholds = self._thresholds(operating_point)
        try:
            log_probs, label, exit_stage = self._engine.run(self._nchw(images), self._table, thresholds)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error
        except MemoryError as error:
            raise FastCascadeError(str(error)) from error
        return Output(np.exp(log_probs), label, exit_stage, self._exit_macs[exit_stage])

    def _thresholds(self, operating_point: str | Sequence[float] | Array | None) -> NDArray[np.float32]:
        name = "default" if operating_point is None else operating_point
        if isinstance(name, str) and name in self._unusable:
            raise InvalidArgument(
                f"operating point {name!r} was measured at another precision than runs here, which shifts "
                "the stop scores; measure it anew with fc.calibrate"
            )
        if operating_point is None:
            operating_point = self.operating_points.get("default", self._default)
        if operating_point is None:
            raise InvalidArgument(
                "this selector has no default thresholds; pass the name of an operating point "
                f"({', '.join(self.operating_points) or 'none is stored'}) or a list of thresholds"
            )
        if isinstance(operating_point, str):
            if operating_point not in self.operating_points:
                known = ", ".join(sorted(self.operating_points)) or "none stored"
                raise InvalidArgument(f"unknown operating point {operating_point!r}; known: {known}")
            operating_point = self.operating_points[operating_point]
        return np.asarray(operating_point, np.float32)

    def _nchw(self, images: Array) -> Array:
        if not isinstance(images, np.ndarray):
            raise InvalidArgument(f"got {type(images).__name__}; expected a numpy array of images")
        if images.dtype == np.uint8 and self._table is None:
            raise InvalidArgument("got uint8 images, but the plan has no preprocess; pass normalised floats")
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise InvalidArgument(f"images have dtype {images.dtype}; expected uint8 or a floating dtype")
        channels, height, width = self.input_shape
        if images.shape[1:] == (height, width, channels) != self.input_shape:
            images = images.transpose(0, 3, 1, 2)
        return images if images.dtype == np.uint8 else images.astype(np.float32, copy=False)


def _require_bf16() -> None:
    refusal = _compiled_module().bf16_refusal()
    if refusal is not None:
        raise BackendUnavailable(f"precision 'bf16' was asked for, but {refusal}")


def _recorded_precision(stages: Sequence[Fields], precision: Literal["bf16"] | None) -> list[str]:
    """Of each stage, as operating points record it: [] where all are in fp32; see ``Plan.precision``."""
    of_stages = [
        "int8" if any(op["op"] in ("QuantizedConv2d", "QuantizedLinear") for op in stage["ops"]) else "fp32"
        for stage in stages
    ]
    if "int8" in of_stages and precision is not None:
        raise InvalidArgument(f"the plan is quantised to {of_stages}, which cannot become {precision!r}")
    if precision is not None:
        return [precision] * len(stages)
    return of_stages if "int8" in of_stages else []


def _table(preprocess: Fields | None) -> NDArray[np.float32] | None:
    """(C, 256) normalised values of the bytes, with the bits of ``Normalize.table``."""
    if preprocess is None:
        return None
    mean, std = (np.array(preprocess[name], np.float32)[:, None] for name in ("mean", "std"))
    return (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std  # type: ignore[no-any-return]


def _compiled_module() -> Any:
    try:
        from fastcascade import _C
    except ImportError as error:
        raise BackendUnavailable(f"the compiled engine cannot be loaded: {error}") from error
    return _C


def _engine(
    content: Fields, stages: Sequence[Fields], arrays: Mapping[str, Array], threads: int, precision: str
) -> Any:
    """The compiled engine for a plan, which checks every field."""
    feeds_next = [stage["input"] == "previous" for stage in stages[1:]] + [False]
    specs = [_stage(stage, arrays, feeds) for stage, feeds in zip(stages, feeds_next, strict=True)]
    selectors = [_selector(stage["selector"], arrays) for stage in stages]
    combine = content["combine"]
    weights = [] if combine == "last" else [1.0] * len(stages) if combine == "mean" else combine
    try:
        return _compiled_module().Cascade(
            specs,
            selectors,
            content["num_classes"],
            stage_weights=weights,
            threads=threads,
            precision=precision,
        )
    except MemoryError as error:
        raise BackendUnavailable(f"the engine refuses the plan: {error}") from error


def _stage(stage: Fields, arrays: Mapping[str, Array], keeps_features: bool) -> dict[str, Any]:
    shapes = [(*shape, 1, 1)[:3] for shape in stage["shapes"]]
    return {
        "name": stage["name"],
        "input": stage["input"],
        "keeps_features": keeps_features,
        "shape": shapes[0],
        "ops": [_op(op, arrays, shapes) for op in stage["ops"]],
        "features": stage["features"],
        "logits": stage["logits"],
    }


def _op(op: Fields, arrays: Mapping[str, Array], shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """One operation as the engine reads it; see ``backends.cpu``, which makes the same of a plan."""
    fields = {name: _value(value, arrays) for name, value in op.items()}
    others = [fields["other"]] if "other" in fields else []
    fields["inputs"] = fields.get("inputs") or [fields["input"], *others]
    if op["op"] == "Activation":
        fields["activation"] = fields.pop("kind")
    if op["op"] == "Flip":
        channels, height, width = shapes[op["input"]]
        backwards = {"start": (0, 0, width - 1), "stop": (channels, height, -1), "step": (1, 1, -1)}
        fields |= {"op": "Slice", **backwards}
    return fields


def _selector(selector: Fields | None, arrays: Mapping[str, Array]) -> dict[str, Any] | None:
    if selector is None:
        return None
    if selector["kind"] != "mlp":
        return {"score": selector["kind"]}
    weights = {name: arrays[selector[name]] for name in ("mean", "std", "w1", "b1", "w2")}
    return {**weights, "score": selector["features"], "b2": float(arrays[selector["b2"]])}


def _value(value: Any, arrays: Mapping[str, Array]) -> Any:
    """A field of an operation: the array that a name stands for, infinity from text, or the value itself."""
    if not isinstance(value, str):
        return value
    return arrays.get(value, {"inf": math.inf, "-inf": -math.inf}.get(value, value))
