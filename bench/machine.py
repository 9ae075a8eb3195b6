"""The machine line and the ceilings that every result stands beside."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["CACHE", "ROOT", "THREADS", "ceilings", "machine", "machine_slug"]

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".benchmarks"
"""Exported models and compiled helpers; safe to delete."""

THREADS = min(2, len(os.sched_getaffinity(0)))
"""What the targets are set for."""

_PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "openvino", "ncnn", "pnnx", "fastcascade")
_ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


def machine() -> dict[str, Any]:
    """CPU, instruction sets, threads and the versions of everything that was measured.

    Example:
        >>> sorted(machine())
        ['cpu', 'flags', 'packages', 'platform', 'threads']
    """
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "threads": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in _ISA_FLAGS if flag in present],
        "platform": f"{platform.system()} {platform.release()} Python {platform.python_version()}",
        "packages": packages,
    }


def machine_slug(facts: dict[str, Any]) -> str:
    """A file name for results of such machines, for example ``amd-epyc-2-avx512f``."""
    isa = next((flag for flag in ("avx512f", "avx2") if flag in facts["flags"]), platform.machine())
    name = re.sub(r"[^a-z0-9]+", "-", facts["cpu"].lower()).strip("-")
    return f"{name}-{facts['threads']}-{isa}"


def ceilings(threads: int, milliseconds: int = 100) -> dict[str, float]:
    """Peak arithmetic (GFLOP/s) and copy bandwidth (GB/s, read + write) of ``threads`` threads, measured now.

    Raises:
        subprocess.CalledProcessError: no C++ compiler, or it refuses the source.
    """
    source = Path(__file__).with_name("ceilings.cpp")
    binary = CACHE / f"ceilings-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not binary.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, "-O3", "-std=c++17", "-pthread", source, "-o", binary], check=True)
    answer = subprocess.run([binary, str(threads), str(milliseconds)], check=True, capture_output=True)
    return {key: float(value) for key, value in json.loads(answer.stdout).items()}
