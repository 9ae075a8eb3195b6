"""Measure the trained cascade on the 10,000 test images, once, against the last network alone.

    python examples/cifar10/measure.py cifar10:data [--earlier last-before-joint.safetensors]

Writes results.json (accuracies, costs, paired 95 % intervals) and logits.safetensors (every stage on the
validation, calibration and test images), which the selection study reads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastcascade as fc
from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.evaluation.curve import paired_interval
from fastcascade.evaluation.evaluation import Trace
from fastcascade.storage.files import write_atomically
from fastcascade.training.config import read_config
from fastcascade.training.refit import collect_logits

HERE = Path(__file__).parent
PARTS = ("validation", "calibration", "test")


def all_logits(cascade: fc.Cascade, source: str) -> dict[str, Tensor]:
    """Logits (3, N, 10) and labels ``y_*`` of the images that training left alone."""
    splits = read_config(HERE / "config.toml").splits.spans()
    images, labels = arrays(load_data(source, "train"))
    parts = {name: (images[slice(*splits[name])], labels[slice(*splits[name])]) for name in PARTS[:2]}
    parts["test"] = arrays(load_data(source, "test"))
    result = {}
    for name, (x, y) in parts.items():
        result[name] = collect_logits(cascade, cascade.input.nchw(x)).contiguous()
        result[f"y_{name}"] = y
    return result


def earlier_answers(cascade: fc.Cascade, weights: Path, source: str) -> Tensor:
    """(N,) labels on the test images by the last network as it was before the joint phase."""
    last = cascade.stage(len(cascade.stages) - 1)
    after = {name: value.clone() for name, value in last.module.state_dict().items()}
    last.module.load_state_dict(load_file(weights))
    images, _ = arrays(load_data(source, "test"))
    labels = collect_logits(cascade, cascade.input.nchw(images))[-1].argmax(1)
    last.module.load_state_dict(after)
    return labels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="CIFAR-10, for example cifar10:data")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--earlier", type=Path, help="weights of the last network before the joint phase")
    arguments = parser.parse_args()
    cascade = fc.load(arguments.model)
    logits = all_logits(cascade, arguments.source)
    save_file(logits, HERE / "logits.safetensors")
    truth = logits["y_test"]
    trace = Trace.from_logits(cascade, logits["test"], truth)
    alone = {"after the joint phase": logits["test"][-1].argmax(1)}
    if arguments.earlier:
        alone["before the joint phase"] = earlier_answers(cascade, arguments.earlier, arguments.source)
    right = {name: (labels == truth).numpy() for name, labels in alone.items()}
    better = max(right, key=lambda name: right[name].mean())
    rows = []
    for name, point in cascade.operating_points.items():
        result = trace.run(point)
        exits = trace.exits(point)
        correct = trace.correct[exits, range(trace.n)]
        difference, low, high = paired_interval(correct, right[better])
        rows.append(
            {
                "operating_point": name,
                "accuracy": result.accuracy,
                "share_of_dense_macs": result.mean_macs / cascade.dense_macs,
                "exit_shares": list(result.exit_shares),
                "exit_accuracy": list(result.exit_accuracy),
                "difference": difference,
                "interval_95": [low, high],
            }
        )
    report = {
        "n": trace.n,
        "dense_macs": cascade.dense_macs,
        "last_network": {name: float(r.mean()) for name, r in right.items()},
        "stages": [{"macs": m, "accuracy": a} for m, a in trace.single_stages()],
        "operating_points": rows,
    }
    write_atomically(HERE / "results.json", (json.dumps(report, indent=1) + "\n").encode())
    show(report, better)


def show(report: dict, better: str) -> None:
    base = report["last_network"][better]
    table = Table("", "test accuracy", "of the last network's cost", "difference in points (95 %)")
    table.add_row(f"last network {better}", f"{base:.2%}", "100 %", "")
    for row in report["operating_points"]:
        low, high = (f"{100 * x:+.2f}" for x in row["interval_95"])
        table.add_row(
            row["operating_point"],
            f"{row['accuracy']:.2%}",
            f"{row['share_of_dense_macs']:.1%}",
            f"{100 * row['difference']:+.2f} ({low} … {high})",
        )
    Console().print(table)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
