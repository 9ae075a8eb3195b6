"""Estimates of the speed of the ways to run a stage outside the resident kernel. Nothing here is measured.

``kernels/cuda/resident_estimate.py`` estimates the resident kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastcascade.kernels.cuda.machine import Machine
from fastcascade.kernels.layers import Conv, Layer

__all__ = ["launch_rates"]

TRITON_SHARE = 0.4
"""Share of the tensor cores' peak that a Triton convolution of these sizes reaches; a guess."""


def launch_rates(layers: Sequence[Layer], machine: Machine) -> dict[str, float]:
    """Images/s of a stage by way: "persistent" (one launch), "layers" (one launch per layer).

    Both compute at :data:`TRITON_SHARE` of the tensor cores' peak and overlap nothing. A launch per layer
    moves every activation through device memory; one launch moves them, and the weights for every image,
    through L2.
    """
    flops = moved = weights = 0.0
    for layer in layers:
        out = math.prod(layer.work.out)
        if isinstance(layer.work, Conv):
            shape = layer.work.shape
            taps = shape.kernel[0] * shape.kernel[1] * max(shape.channels, 16)
            flops += (
                2.0
                * shape.out_height
                * shape.out_width
                * taps
                * max(out // shape.out_height // shape.out_width, 16)
            )
            moved += 2.0 * (shape.height * shape.width * shape.channels + out)
        else:
            moved += 2.0 * (math.prod(layer.work.source) + out)
        moved += 0.0 if layer.other is None else 2.0 * out
        weights += 0.0 if layer.weight is None else 2.0 * layer.weight.numel()
    # m16n8k16 is 4,096 FLOPs; at wgmma's rate, which is mma.sync's before Hopper.
    cycles = 4.0 if machine.capability >= (9, 0) else machine.mma_cycles
    compute = flops / (machine.multiprocessors * machine.clock * 4 * 4096 / cycles * TRITON_SHARE)
    return {
        "persistent": 1 / (compute + (moved + weights) / machine.l2_bytes),
        "layers": 1 / (compute + moved / machine.memory_bytes),
    }
