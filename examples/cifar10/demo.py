"""Classify 2,000 test images with the trained cascade, and compare it with its last network on every image.

Measures accuracy, cost and speed, and writes predictions and a chart to ``demo/``. ``make demo`` runs it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import fastcascade as fc
from fastcascade.data.sources import load_data
from fastcascade.engine import CompiledCascade
from fastcascade.evaluation.curve import Curves, cost_accuracy_curve, plot_curves
from fastcascade.evaluation.evaluation import Trace, traces
from fastcascade.model.cost import eval_mode
from fastcascade.model.selector import ScoreKind
from fastcascade.prediction.predictor import predict_batches
from fastcascade.prediction.writers import save_predictions

HERE = Path(__file__).parent
OUTPUT = Path("demo")
ROUNDS = 3
TORCH_BATCH = 50
RESNET_110 = (252.9e6, 0.9357)
"""Multiplies, and the best published accuracy on the 10,000 test images (He et al. 2016, table 6)."""


class Result(NamedTuple):
    """Accuracy, cost and median speed of one way to classify the images."""

    accuracy: float
    mean_macs: float
    images_per_s: float


def main() -> None:
    """Measure, print, and write the predictions and the chart."""
    console = Console()
    cascade = fc.load(HERE / "model")
    data = load_data(HERE / "test-images.npz", classes=cascade.classes)
    images, labels = torch.from_numpy(np.array(data.images)), torch.from_numpy(data.labels)
    fast = fc.compile(cascade)
    console.print(
        f"{len(images):,} CIFAR-10 test images, {torch.get_num_threads()} threads, backend {fast.backend}"
    )
    results = race(contestants(cascade, fast), images, labels, cascade.dense_macs)
    console.print(comparison(results, cascade.dense_macs))
    console.print(exits(fast, images, labels))
    save_predictions(predict_batches(fast, data, top_k=0), OUTPUT / "predictions.parquet", overwrite=True)
    draw(cascade, (images, labels))
    console.print(f"wrote {OUTPUT / 'predictions.parquet'} and {OUTPUT / 'curve.png'}")


Classify = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Images → labels (N,) and costs (N,); None if every image costs as much as the dense network."""


def contestants(cascade: fc.Cascade, fast: CompiledCascade) -> dict[str, Classify]:
    """The last network on every image, in plain PyTorch and in this engine, and the operating points."""
    last = cascade.stage(-1)
    alone = fc.Cascade(
        [last], None, cascade.num_classes, cascade.input.shape, preprocess=cascade.input.preprocess
    )
    dense = fc.compile(alone)
    last.to(memory_format=torch.channels_last)

    def in_pytorch(images: Tensor) -> tuple[Tensor, None]:
        # channels_last and small batches are the fastest for PyTorch on a CPU.
        with torch.inference_mode(), eval_mode(alone):
            pixels = (alone.images(batch) for batch in torch.split(images, TORCH_BATCH))
            logits = [last(p.contiguous(memory_format=torch.channels_last))[1] for p in pixels]
            return torch.cat(logits).argmax(1), None

    def at(name: str) -> Classify:
        def classify(images: Tensor) -> tuple[Tensor, Tensor]:
            out = fast(images, name)
            return out.label, out.cost_macs

        return classify

    return {
        "last network, PyTorch": in_pytorch,
        "last network": lambda images: (dense(images).label, None),
        **{f'cascade "{name}"': at(name) for name in cascade.operating_points},
    }


def race(ways: dict[str, Classify], images: Tensor, labels: Tensor, dense_macs: int) -> dict[str, Result]:
    """Warm up every way, then time them in turns, so a machine that slows down slows all of them."""
    results = {name: way(images) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in track(range(ROUNDS), "measuring in turns", console=Console(stderr=True)):
        for name, way in ways.items():
            start = time.perf_counter()
            way(images)
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Result(
            float((label == labels).float().mean()),
            dense_macs if cost is None else float(cost.double().mean()),
            len(images) / statistics.median(seconds[name]),
        )
        for name, (label, cost) in results.items()
    }


def comparison(results: dict[str, Result], dense_macs: int) -> Table:
    """One row per way, with its speed-up over the last network in the same engine."""
    table = Table("", "accuracy", "M MACs", "share", "images/s", "speed-up")
    table.caption = "MACs per image, their share of the last network's, and the speed over it"
    for column in table.columns[1:]:
        column.justify = "right"
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.accuracy:.2%}",
            f"{result.mean_macs / 1e6:.2f}",
            f"{result.mean_macs / dense_macs:.1%}",
            f"{result.images_per_s:,.0f}",
            f"{result.images_per_s / results['last network'].images_per_s:.2f}×",
        )
    return table


def exits(fast: CompiledCascade, images: Tensor, labels: Tensor) -> Table:
    """Share and accuracy of each exit at the default operating point."""
    result = fc.evaluate(fast, (images, labels))
    table = Table("exit", "network", "cost there", "share", "accuracy", title='exits at "default"')
    for column in table.columns[2:]:
        column.justify = "right"
    for k, stage in enumerate(fast.plan.stages):
        table.add_row(
            str(k),
            stage.name,
            f"{int(fast.plan.exit_macs[k]) / 1e6:.2f} M MACs",
            f"{result.exit_shares[k]:.1%}",
            f"{result.exit_accuracy[k]:.1%}",
        )
    return table


def draw(cascade: fc.Cascade, data: tuple[Tensor, Tensor]) -> None:
    """Plot accuracy against cost: thresholds found on the calibration images, judged on these images."""
    stored = load_file(HERE / "logits.safetensors")
    ways: dict[str, ScoreKind | None] = {"cascade": None, "margin threshold": "margin"}
    selections = [
        Trace.from_logits(cascade, stored["calibration"], stored["y_calibration"], score)
        for score in ways.values()
    ]
    reports = traces(cascade, data, list(ways.values()))
    found = zip(ways, selections, reports, strict=True)
    curves = Curves(
        {name: cost_accuracy_curve(selection, report) for name, selection, report in found},
        reports[0].single_stages(),
        {name: reports[0].run(point) for name, point in cascade.operating_points.items()},
        {"ResNet-110 (He et al.)": RESNET_110, "a fifth of ResNet-110": (RESNET_110[0] / 5, None)},
    )
    plot_curves(curves, OUTPUT / "curve.png", "2,000 test images of CIFAR-10")


if __name__ == "__main__":
    main()
