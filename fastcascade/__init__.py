"""Cascades of image classifiers with learned early exit, run in batches on custom CPU and GPU kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcascade.benchmarking.runner import benchmark
    from fastcascade.data.sources import load_data
    from fastcascade.engine import compile, quantize
    from fastcascade.errors import FastCascadeError
    from fastcascade.evaluation.calibration import calibrate
    from fastcascade.evaluation.evaluation import evaluate
    from fastcascade.evaluation.precision_choice import choose_precision
    from fastcascade.evaluation.stage_choice import choose_stages
    from fastcascade.lowering.export import plan
    from fastcascade.lowering.plan_file import load_plan
    from fastcascade.model.cascade import Cascade, Stage
    from fastcascade.model.image_transform import ImageTransform
    from fastcascade.model.selector import MLPSelector, ThresholdSelector
    from fastcascade.model.store import load_cascade as load
    from fastcascade.prediction import ray
    from fastcascade.prediction.batcher import Batcher, BatcherStats
    from fastcascade.prediction.predictions import Predictions
    from fastcascade.prediction.predictor import predict
    from fastcascade.scikit_learn import CascadeClassifier as CascadeClassifier
    from fastcascade.training.trainer import Recipe, fit
    from fastcascade.types import CascadeOutput, Evaluation, Normalize, OperatingPoint

__version__ = "0.1.0"

__all__ = [
    "Batcher",
    "BatcherStats",
    "Cascade",
    "CascadeOutput",
    "Evaluation",
    "FastCascadeError",
    "ImageTransform",
    "MLPSelector",
    "Normalize",
    "OperatingPoint",
    "Predictions",
    "Recipe",
    "Stage",
    "ThresholdSelector",
    "benchmark",
    "calibrate",
    "choose_precision",
    "choose_stages",
    "compile",
    "evaluate",
    "fit",
    "load",
    "load_data",
    "load_plan",
    "plan",
    "predict",
    "quantize",
    "ray",
]

_HOMES = {
    "Batcher": "fastcascade.prediction.batcher:Batcher",
    "BatcherStats": "fastcascade.prediction.batcher:BatcherStats",
    "Cascade": "fastcascade.model.cascade:Cascade",
    "CascadeClassifier": "fastcascade.scikit_learn:CascadeClassifier",
    "CascadeOutput": "fastcascade.types:CascadeOutput",
    "Evaluation": "fastcascade.types:Evaluation",
    "FastCascadeError": "fastcascade.errors:FastCascadeError",
    "ImageTransform": "fastcascade.model.image_transform:ImageTransform",
    "MLPSelector": "fastcascade.model.selector:MLPSelector",
    "Normalize": "fastcascade.types:Normalize",
    "OperatingPoint": "fastcascade.types:OperatingPoint",
    "Predictions": "fastcascade.prediction.predictions:Predictions",
    "Recipe": "fastcascade.training.trainer:Recipe",
    "Stage": "fastcascade.model.cascade:Stage",
    "ThresholdSelector": "fastcascade.model.selector:ThresholdSelector",
    "benchmark": "fastcascade.benchmarking.runner:benchmark",
    "calibrate": "fastcascade.evaluation.calibration:calibrate",
    "choose_precision": "fastcascade.evaluation.precision_choice:choose_precision",
    "choose_stages": "fastcascade.evaluation.stage_choice:choose_stages",
    "compile": "fastcascade.engine:compile",
    "evaluate": "fastcascade.evaluation.evaluation:evaluate",
    "fit": "fastcascade.training.trainer:fit",
    "load": "fastcascade.model.store:load_cascade",
    "load_data": "fastcascade.data.sources:load_data",
    "load_plan": "fastcascade.lowering.plan_file:load_plan",
    "plan": "fastcascade.lowering.export:plan",
    "predict": "fastcascade.prediction.predictor:predict",
    "quantize": "fastcascade.engine:quantize",
    "ray": "fastcascade.prediction.ray",
}
"""Where each public name is defined. Modules are imported at first use, because torch takes seconds.

``CascadeClassifier`` is not in ``__all__``: without scikit-learn, a star import would fail.
"""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcascade' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(import_module(module), attribute) if attribute else import_module(module)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
