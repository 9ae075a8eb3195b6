"""int8 beside other runtimes in int8, and beside fp32: ``make bench-int8``.

The last networks of the example's cascades, which are trained, and random networks. Every runtime quantises
from the same images with its own tool, and all layers that it can: none stays in fp32 because int8 would hurt
it. Random networks multiply rounding errors, so those of torchvision are "calm" (see
:func:`bench.architectures.build`); engines that still differ too much are refused.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from rich.console import Console

from bench.cases import Case, load_model, network_images
from bench.engines import OURS
from bench.machine import ROOT, THREADS, machine, machine_slug
from bench.measure import Engine
from bench.quantized_peers import INT8_PEERS, INT8_TOLERANCE
from bench.run import load_results, measure_cases, results_table
from bench.worker import OURS_INT8

__all__ = ["main"]

NETWORKS = {
    f"last:{ROOT / 'examples' / 'cifar10' / 'resnet9' / 'model'}": (256, 8),
    f"last:{ROOT / 'examples' / 'cifar10' / 'model'}": (256, 8),
    "resnet_cifar:20": (256, 8),
    "resnet_cifar:56": (256, 8),
    "resnet_cifar:110": (256, 8),
    "torchvision:resnet18?calm": (8, 1),
    "torchvision:resnet50?calm": (8, 1),
    "torchvision:mobilenet_v2?calm": (8, 1),
    "torchvision:efficientnet_b0?calm": (8, 1),
}
"""Batch sizes by network."""

ENGINES = (
    Engine(OURS, OURS),
    Engine(OURS_INT8, OURS_INT8, INT8_TOLERANCE),
    *(Engine(peer.name, peer.name, peer.tolerance) for peer in INT8_PEERS),
)


def main() -> None:
    """Measure, and store the results after every case."""
    parser = argparse.ArgumentParser(prog="python -m bench.int8", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one engine's turn in a round")
    parser.add_argument("--tuning", type=float, default=1.0, help="seconds to choose a schedule")
    arguments = parser.parse_args()
    path = ROOT / "bench" / "results" / f"{machine_slug(machine())}.json"
    results = load_results(path) | {"machine": machine()}
    stored = results.setdefault("int8", {})
    cases = [Case(network, batch, THREADS) for network, batches in NETWORKS.items() for batch in batches]
    wanted = [c for c in cases if arguments.only is None or any(part in c.key for part in arguments.only)]
    shapes = {model: load_model(model).input.shape for model in {case.model for case in wanted}}

    def images(case: Case) -> np.ndarray:
        return network_images(case.model, shapes[case.model], case.batch)

    settings = (arguments.rounds, arguments.seconds, arguments.tuning)
    for case, entry in measure_cases(dict.fromkeys(wanted, ENGINES), images, *settings):
        stored[case.key] = entry
        path.write_text(json.dumps(results, indent=1) + "\n")
        Console().print(results_table(entry, case.key))


if __name__ == "__main__":
    main()
