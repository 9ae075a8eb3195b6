"""The machine line of every result, and where this checkout keeps things."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

__all__ = ["CACHE", "ROOT", "THREADS", "machine", "machine_slug"]

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".benchmarks"
"""Exported models and compiled helpers; safe to delete."""

THREADS = min(2, len(os.sched_getaffinity(0)))
"""The number of threads that the targets are set for."""

_PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "openvino", "ncnn", "pnnx", "fastcascade")
_ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


def machine() -> dict[str, Any]:
    """CPU, instruction sets, threads and package versions.

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
    """File name for results of this kind of machine, for example ``amd-epyc-2-avx512f``."""
    isa = next((flag for flag in ("avx512f", "avx2") if flag in facts["flags"]), platform.machine())
    name = re.sub(r"[^a-z0-9]+", "-", facts["cpu"].lower()).strip("-")
    return f"{name}-{facts['threads']}-{isa}"
