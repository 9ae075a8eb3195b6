"""Peak arithmetic of this machine, by fused multiply-adds from registers, and its copy bandwidth."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

from bench.machine import CACHE

__all__ = ["fma_peaks"]


def fma_peaks(threads: int, milliseconds: int = 100) -> dict[str, float]:
    """Peak arithmetic (GFLOP/s) and copy bandwidth (GB/s, read + write) of ``threads`` threads, measured now.

    Raises:
        subprocess.CalledProcessError: no C++ compiler, or it rejects the source.
    """
    source = Path(__file__).with_name("fma_peaks.cpp")
    binary = CACHE / f"fma-peaks-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not binary.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, "-O3", "-std=c++17", "-pthread", source, "-o", binary], check=True)
    report = subprocess.run([binary, str(threads), str(milliseconds)], check=True, capture_output=True)
    return {key: float(value) for key, value in json.loads(report.stdout).items()}
