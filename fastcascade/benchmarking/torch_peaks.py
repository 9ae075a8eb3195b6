"""The peaks that a benchmark reports beside its figures: torch's matrix product and copy on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastcascade.benchmarking.clocks import seconds_of

__all__ = ["Peaks", "measure_peaks"]

_BYTES = 4


@dataclass(frozen=True)
class Peaks:
    """Rates measured in the same run with the same threads.

    Attributes:
        gflops: a large fp32 matrix product in torch, two operations per multiply. Winograd convolutions do
            fewer multiplies than they are credited with and can exceed it.
        copy_gbs: GB read plus GB written per second by a copy that fits no cache.
    """

    gflops: float
    copy_gbs: float


def measure_peaks(device: torch.device) -> Peaks:
    """Peaks of a device, with torch's current number of threads."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    source = torch.ones(2**24, device=device)  # 64 MiB, more than any core's share of a cache
    target = torch.empty_like(source)
    product = min(seconds_of(lambda: a @ b, device) for _ in range(4))
    copy = min(seconds_of(lambda: target.copy_(source), device) for _ in range(8))
    return Peaks(2e-9 * size**3 / product, 2e-9 * source.numel() * _BYTES / copy)
