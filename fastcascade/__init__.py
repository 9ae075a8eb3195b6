"""Cascades of image classifiers with learned early exit, run in batches at the speed their FLOPs promise."""

from fastcascade.bench import benchmark
from fastcascade.calibrate import calibrate
from fastcascade.cascade import Cascade, Stage
from fastcascade.engine import compile
from fastcascade.errors import FastCascadeError
from fastcascade.evaluate import evaluate
from fastcascade.lower import plan
from fastcascade.plan_file import load_plan
from fastcascade.selector import MLPSelector, ThresholdSelector
from fastcascade.store import load_cascade as load
from fastcascade.train import Recipe, fit
from fastcascade.types import CascadeOutput, Evaluation, Normalize, OperatingPoint

__version__ = "0.1.0"

__all__ = [
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
    "compile",
    "evaluate",
    "fit",
    "load",
    "load_plan",
    "plan",
]
