"""What int8 costs the example's networks in accuracy.

    python examples/cifar10/int8_accuracy.py cifar10:data [--published FOLDER] [--test]

Every stage is quantised on 512 of the training images that no network was trained on, and judged on the
other held-out images, or, with ``--test``, on the 10,000 test images, which adds a line to test-looks.jsonl.
Published networks were trained on all training images, so only the test images are unseen to them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from measure import record_look
from torch import Tensor

import fastcascade as fc
from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.evaluation.curve import paired_interval
from fastcascade.evaluation.logits import plan_logits
from fastcascade.lowering.plan import Plan
from fastcascade.lowering.quantization import MOST_IMAGES

HERE = Path(__file__).parent
HELD_OUT = range(45_000, 50_000)


def stage_labels(plan: Plan, images: Tensor) -> Tensor:
    """(K, N) each stage's own labels, by the engine."""
    run = plan_logits(replace(plan, combine="last"))
    return torch.cat([run(part).argmax(2) for part in images.split(500)], 1)


def compare(
    cascade: fc.Cascade, calibration: Tensor, images: Tensor, labels: Tensor
) -> dict[str, dict[str, float]]:
    """Print a row per stage: accuracy in fp32 and in int8, layers in int8. Returns the accuracies."""
    calibration, images = cascade.input.nchw(calibration), cascade.input.nchw(images)
    exact = fc.plan(cascade)
    quantized = fc.quantize(exact, calibration)
    before, after = (stage_labels(plan, images) == labels for plan in (exact, quantized))
    seen = {}
    for k, stage in enumerate(quantized.stages):
        exact_accuracy, accuracy = (float(right[k].double().mean()) for right in (before, after))
        seen[stage.name] = {"fp32": exact_accuracy, "int8": accuracy}
        layers = sum(type(op).__name__ in ("Conv2d", "Linear") for op in exact.stages[k].ops)
        change, low, high = (100 * x for x in paired_interval(after[k].numpy(), before[k].numpy()))
        print(
            f"| {stage.name} | {exact_accuracy:.2%} | {accuracy:.2%} | "
            f"{change:+.2f} ({low:+.2f} … {high:+.2f}) | {len(stage.layer_errors)} of {layers} |"
        )
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="CIFAR-10, for example cifar10:data")
    parser.add_argument("--published", type=Path, help="folder of the published networks; see published.py")
    parser.add_argument("--test", action="store_true", help="judge on the test images")
    arguments = parser.parse_args()
    held_out, labels = arrays(load_data(arguments.source, "train").take(HELD_OUT))
    assert labels is not None
    calibration, judged, true = held_out[:MOST_IMAGES], held_out[MOST_IMAGES:], labels[MOST_IMAGES:]
    if arguments.test:
        judged, test_labels = arrays(load_data(arguments.source, "test"))
        assert test_labels is not None
        true = test_labels
    cascades = [fc.load(HERE / "model")]
    if arguments.published is not None:
        from published import published_cascade

        cascades.append(published_cascade(arguments.published))
    print(f"{len(judged):,} images\n| network | fp32 | int8 | points | int8 layers |")
    print("|---|---|---|---|---|")
    seen = [compare(cascade, calibration, judged, true) for cascade in cascades]
    if arguments.test:
        record_look("int8_accuracy.py", {name: pair for found in seen for name, pair in found.items()})


if __name__ == "__main__":
    main()
