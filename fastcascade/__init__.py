"""Cascades of image classifiers with learned early exit, run in batches on custom CPU and GPU kernels."""

from fastcascade.benchmarking.runner import benchmark
from fastcascade.data.sources import load_data
from fastcascade.engine import compile
from fastcascade.errors import FastCascadeError
from fastcascade.evaluation.calibration import calibrate
from fastcascade.evaluation.evaluation import evaluate
from fastcascade.evaluation.stage_choice import choose_stages
from fastcascade.lowering.export import plan
from fastcascade.lowering.plan_file import load_plan
from fastcascade.model.cascade import Cascade, Stage
from fastcascade.model.selector import MLPSelector, ThresholdSelector
from fastcascade.model.store import load_cascade as load
from fastcascade.prediction.batcher import Batcher, BatcherStats
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
    "MLPSelector",
    "Normalize",
    "OperatingPoint",
    "Recipe",
    "Stage",
    "ThresholdSelector",
    "benchmark",
    "calibrate",
    "choose_stages",
    "compile",
    "evaluate",
    "fit",
    "load",
    "load_data",
    "load_plan",
    "plan",
]
