"""Measure the trained cascade on the 10,000 test images against its last network alone.

    python examples/cifar10/measure.py cifar10:data

Writes results.json (accuracies, costs, paired 95 % intervals, and the same for test-images.npz alone),
logits.safetensors (every stage on the validation, calibration and test images) and the tables of README.md
here and in the root folder. Adds a line to test-looks.jsonl: when, at which commit, and what was seen.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastcascade as fc
from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.evaluation.curve import paired_interval
from fastcascade.evaluation.evaluation import Trace
from fastcascade.evaluation.logits import collect_logits
from fastcascade.storage.files import write_atomically

HERE = Path(__file__).parent
DOCUMENTS = (HERE / "README.md", HERE.parents[1] / "README.md")
SHIPPED_IMAGES = HERE / "test-images.npz"
"""The first of the test images."""
SPLITS = {"validation": (45_000, 47_500), "calibration": (47_500, 50_000)}
"""The training images that no stage was trained on: for temperatures and selector, and for thresholds."""

RESNET_110_MACS = 252.9e6


def all_logits(cascade: fc.Cascade, source: str) -> dict[str, Tensor]:
    """Logits (K, N, 10) and labels ``y_*`` (N,) of the images that no stage was trained on."""
    images, labels = arrays(load_data(source, "train"))
    parts = {name: (images[slice(*span)], labels[slice(*span)]) for name, span in SPLITS.items()}
    parts["test"] = arrays(load_data(source, "test"))
    result = {}
    for name, (x, y) in parts.items():
        result[name] = collect_logits(cascade, cascade.input.nchw(x), compiled=True).contiguous()
        result[f"y_{name}"] = y
    return result


def report_of(cascade: fc.Cascade, logits: dict[str, Tensor]) -> dict[str, Any]:
    """What results.json holds."""
    truth = logits["y_test"]
    trace = Trace.from_logits(cascade, logits["test"], truth)
    last = (logits["test"][-1].argmax(1) == truth).numpy()
    points = []
    for name, point in cascade.operating_points.items():
        correct = trace.correct[trace.exits(point), range(trace.n)]
        difference, low, high = paired_interval(correct, last)
        row = point_figures(cascade, trace, name)
        points.append({**row, "difference": difference, "interval_95": [low, high]})
    with np.load(SHIPPED_IMAGES) as shipped:
        n = len(shipped["labels"])
    few = Trace.from_logits(cascade, logits["test"][:, :n], truth[:n])
    return {
        "n": trace.n,
        "dense_macs": cascade.dense_macs,
        "last_network": float(last.mean()),
        "stages": [{"macs": m, "accuracy": a} for m, a in trace.single_stages()],
        "operating_points": points,
        "shipped_images": {
            "n": n,
            "last_network": few.single_stages()[-1][1],
            "operating_points": [point_figures(cascade, few, name) for name in cascade.operating_points],
        },
    }


def point_figures(cascade: fc.Cascade, trace: Trace, name: str) -> dict[str, Any]:
    """Accuracy, cost and exits at an operating point."""
    result = trace.run(cascade.operating_points[name])
    return {
        "operating_point": name,
        "accuracy": result.accuracy,
        "mean_macs": result.mean_macs,
        "share_of_dense_macs": result.mean_macs / cascade.dense_macs,
        "exit_shares": list(result.exit_shares),
        "exit_accuracy": list(result.exit_accuracy),
    }


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Markdown tables of the documents, by name."""

    def row(name: str, accuracy: float, macs: float, difference: str) -> str:
        share = f"{macs / RESNET_110_MACS:.0%}".replace("%", " %")
        return f"| {name} | {100 * accuracy:.2f} % | {macs / 1e6:.1f} M | {share} | {difference} |"

    points = [
        "| | test accuracy | MACs | of ResNet-110's | difference in points (95 %, paired) |",
        "|---|---|---|---|---|",
        row("last network alone", report["last_network"], report["dense_macs"], ""),
    ]
    for point in report["operating_points"]:
        difference, low, high = (
            f"{100 * x:+.2f}".replace("-", "−") for x in (point["difference"], *point["interval_95"])
        )
        interval = f"{difference} ({low} … {high})"
        points.append(row(f"`{point['operating_point']}`", point["accuracy"], point["mean_macs"], interval))
    stages = ["| network alone | MACs | test accuracy |", "|---|---|---|"]
    for k, stage in enumerate(report["stages"]):
        stages.append(f"| {k} | {stage['macs'] / 1e6:.1f} M | {100 * stage['accuracy']:.2f} % |")
    return {"operating points": "\n".join(points), "networks": "\n".join(stages)}


def write_tables(text: str, report: dict[str, Any]) -> str:
    """A document with the tables between ``<!-- NAME -->`` and ``<!-- end -->`` made from the results."""
    for name, table in tables(report).items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(
            pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL
        )
    return text


def record_look(script: str, accuracy: dict[str, Any]) -> None:
    """Append the date, the commit and the accuracies that a script has seen to test-looks.jsonl."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    look = {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "commit": commit or None,
        "script": script,
        "accuracy": accuracy,
    }
    with (HERE / "test-looks.jsonl").open("a") as file:
        file.write(json.dumps(look) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="CIFAR-10, for example cifar10:data")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    arguments = parser.parse_args()
    cascade = fc.load(arguments.model)
    logits = all_logits(cascade, arguments.source)
    save_file(logits, HERE / "logits.safetensors")
    report = report_of(cascade, logits)
    seen = {point["operating_point"]: point["accuracy"] for point in report["operating_points"]}
    record_look("measure.py", {"last network": report["last_network"], **seen})
    write_atomically(HERE / "results.json", (json.dumps(report, indent=1) + "\n").encode())
    for document in DOCUMENTS:
        document.write_text(write_tables(document.read_text(), report))
    print("\n\n".join(tables(report).values()))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
