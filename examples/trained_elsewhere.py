"""Networks that were trained elsewhere, at their own input sizes, as one cascade.

    python examples/trained_elsewhere.py photos/ model mobilenet.onnx resnet18.a1_in1k checkpoints/convnext

A network is an ONNX file, the folder of a Hugging Face checkpoint, or a name of timm, from cheap to dear. All
have the same classes in the same order, those of the folders in ``photos``: labelled images that trained none
of the networks. Half of them fit temperatures and selector, the other half the thresholds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import fastcascade as fc

IMAGENET = fc.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What ONNX files get, which do not say how their networks were trained; other stages have their own."""


def stage_of(network: str) -> fc.Stage:
    """The network as a stage, with the size and normalisation of its images."""
    if network.endswith(".onnx"):
        return fc.Stage.from_onnx(network)
    if Path(network).is_dir():
        return fc.Stage.from_huggingface(network)
    return fc.Stage.from_timm(network)


def main(source: str, directory: str, networks: Sequence[str], side: int) -> fc.Cascade:
    """Fit the selector on the images of ``source``, save the cascade, and print what it costs."""
    data = fc.load_data(source, shape=(3, side, side), resize=True)
    cascade = fc.Cascade(
        [stage_of(network) for network in networks],
        "auto",  # a learned selector, unless a rule of confidence is clearly better
        num_classes=len(data.classes),
        input_shape=(3, side, side),
        preprocess=IMAGENET,
        classes=data.classes,
    )
    fc.fit(cascade, None, data.take(range(0, len(data), 2)), freeze_stages=True)
    others = data.take(range(1, len(data), 2))
    last = fc.evaluate(cascade, others, [float("inf")] * (len(networks) - 1))
    print(f"last network: {last.accuracy:.1%} at {cascade.dense_macs / 1e6:.0f} M MACs")
    point = fc.calibrate(cascade, others, min_accuracy=last.accuracy)
    shares = ", ".join(f"{share:.0%}" for share in point.exit_shares)
    print(f"cascade: {point.accuracy:.1%} at {point.mean_macs / 1e6:.0f} M MACs; exits {shares}")
    cascade.save(directory, overwrite=True)  # with its plan, which runs without these libraries
    return cascade


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="labelled images, as fc.load_data takes them")
    parser.add_argument("directory", help="receives the cascade and its plan")
    parser.add_argument("networks", nargs="+", help="from cheap to dear")
    parser.add_argument("--side", type=int, default=256, help="height and width of the cascade's images")
    arguments = parser.parse_args()
    main(arguments.source, arguments.directory, arguments.networks, arguments.side)
