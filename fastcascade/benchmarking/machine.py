"""The machine that a benchmark runs on, and its energy counters."""

from __future__ import annotations

import importlib
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastcascade.engine import CompiledCascade

__all__ = ["busy_share", "describe_machine", "measure_energy"]

_ENERGY_SECONDS = 1.0


def describe_machine(program: CompiledCascade) -> dict[str, str]:
    """Processor, device, instruction set, threads and versions, as text."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    device = program.device
    return {
        "cpu": names[0] if names else platform.processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "isa": ", ".join(sorted({report.isa for report in program.program.describe()})),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def busy_share(seconds: float = 0.5) -> float | None:
    """Share of the processors' time that others take while this process sleeps; None where it is unknown."""

    def times() -> tuple[int, int]:
        numbers = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(numbers[:8]), numbers[3] + numbers[4]  # all; idle and waiting for a disk

    try:
        before = times()
        time.sleep(seconds)
        after = times()
    except (OSError, ValueError, IndexError):
        return None
    whole = after[0] - before[0]
    return 1 - (after[1] - before[1]) / whole if whole else None


def measure_energy(call: Callable[[], object], images: int) -> tuple[float | None, str]:
    """Millijoules per image through zeus, or None and the reason."""
    try:
        monitor = importlib.import_module("zeus.monitor").ZeusMonitor()
    except ImportError:
        return None, "energy was not measured: the package zeus is not installed"
    except Exception as error:
        return None, f"energy was not measured: zeus finds no counter here ({type(error).__name__}: {error})"
    monitor.begin_window("cascade")
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < _ENERGY_SECONDS:
        call()
        calls += 1
    window = monitor.end_window("cascade")
    joules = sum((window.gpu_energy or {}).values()) + sum((window.cpu_energy or {}).values())
    if not joules:
        return None, "energy was not measured: zeus reads no energy from this machine's counters"
    return 1e3 * joules / (calls * images), "energy of processor and GPU, by zeus"
