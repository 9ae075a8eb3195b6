"""Measure the trained cascade on the 10,000 test images against its last network alone.

    python examples/cifar10/measure.py cifar10:data [--earlier last-before-joint.safetensors]

Writes results.json (accuracies, costs, paired 95 % intervals, and the same for test-images.npz alone),
logits.safetensors (every stage on the validation, calibration and test images, for the selection study), and
the tables of README.md here and in the root folder.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
DOCUMENTS = (HERE / "README.md", HERE.parents[1] / "README.md")
SHIPPED_IMAGES = HERE / "test-images.npz"
"""The first of the test images."""
PARTS = ("validation", "calibration", "test")


def all_logits(cascade: fc.Cascade, source: str) -> dict[str, Tensor]:
    """Logits (K, N, 10) and labels ``y_*`` (N,) of the images that no stage was trained on."""
    splits = read_config(HERE / "config.toml").splits.spans()
    images, labels = arrays(load_data(source, "train"))
    parts = {name: (images[slice(*splits[name])], labels[slice(*splits[name])]) for name in PARTS[:2]}
    parts["test"] = arrays(load_data(source, "test"))
    result = {}
    for name, (x, y) in parts.items():
        result[name] = collect_logits(cascade, cascade.input.nchw(x)).contiguous()
        result[f"y_{name}"] = y
    return result


def earlier_labels(cascade: fc.Cascade, weights: Path, source: str) -> Tensor:
    """(N,) labels of the test images by the last network as it was before the joint phase."""
    last = cascade.stage(len(cascade.stages) - 1)
    after = {name: value.clone() for name, value in last.module.state_dict().items()}
    last.module.load_state_dict(load_file(weights))
    images, _ = arrays(load_data(source, "test"))
    labels = collect_logits(cascade, cascade.input.nchw(images))[-1].argmax(1)
    last.module.load_state_dict(after)
    return labels


def report_of(cascade: fc.Cascade, logits: dict[str, Tensor], earlier: Tensor | None) -> dict[str, Any]:
    """What results.json holds.

    Args:
        earlier: labels of the last network before the joint phase. The better of the two is the baseline.
    """
    truth = logits["y_test"]
    trace = Trace.from_logits(cascade, logits["test"], truth)
    alone = {"after the joint phase": logits["test"][-1].argmax(1)}
    if earlier is not None:
        alone["before the joint phase"] = earlier
    right = {name: (labels == truth).numpy() for name, labels in alone.items()}
    better = max(right, key=lambda name: right[name].mean())
    points = []
    for name, point in cascade.operating_points.items():
        correct = trace.correct[trace.exits(point), range(trace.n)]
        difference, low, high = paired_interval(correct, right[better])
        row = point_figures(cascade, trace, name)
        points.append({**row, "difference": difference, "interval_95": [low, high]})
    with np.load(SHIPPED_IMAGES) as shipped:
        n = len(shipped["labels"])
    few = Trace.from_logits(cascade, logits["test"][:, :n], truth[:n])
    return {
        "n": trace.n,
        "dense_macs": cascade.dense_macs,
        "last_network": {name: float(r.mean()) for name, r in right.items()},
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
        "share_of_dense_macs": result.mean_macs / cascade.dense_macs,
        "exit_shares": list(result.exit_shares),
        "exit_accuracy": list(result.exit_accuracy),
    }


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Markdown tables of the documents, by name."""
    last = max(report["last_network"].values())
    points = [
        "| | test accuracy | MACs, of the last network's | difference in points (95 %, paired) |",
        "|---|---|---|---|",
        f"| last network alone | {100 * last:.2f} % | 100 % | |",
    ]
    for row in report["operating_points"]:
        difference, low, high = (
            f"{100 * x:+.2f}".replace("-", "−") for x in (row["difference"], *row["interval_95"])
        )
        points.append(
            f"| `{row['operating_point']}` | {100 * row['accuracy']:.2f} % "
            f"| {100 * row['share_of_dense_macs']:.1f} % | {difference} ({low} … {high}) |"
        )
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
    earlier = earlier_labels(cascade, arguments.earlier, arguments.source) if arguments.earlier else None
    report = report_of(cascade, logits, earlier)
    write_atomically(HERE / "results.json", (json.dumps(report, indent=1) + "\n").encode())
    for document in DOCUMENTS:
        document.write_text(write_tables(document.read_text(), report))
    print("\n\n".join(tables(report).values()))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
