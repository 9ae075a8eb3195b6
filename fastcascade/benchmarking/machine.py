"""The machine that a benchmark runs on: what it is, its ceilings measured now, its energy counters."""

from __future__ import annotations

import importlib
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fastcascade.engine import CompiledCascade

__all__ = [
    "Ceilings",
    "clocks_of",
    "describe_machine",
    "measure_ceilings",
    "measure_energy",
    "seconds_of",
    "torch_threads",
]

_BYTES = 4
_ENERGY_SECONDS = 1.0


@dataclass(frozen=True)
class Ceilings:
    """What this machine did in the same run with the same threads.

    Attributes:
        gflops: a large fp32 matrix product through torch, 2 operations per multiply. Winograd convolutions
            do fewer multiplies than they are credited with and can exceed it.
        copy_gbs: GB read plus GB written per second by a copy that fits no cache.
    """

    gflops: float
    copy_gbs: float


def clocks_of(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """How long a call takes, and how long each of torch's number of threads worked for it in the mean.

    The second is the processor time of this process over the number of threads; on a GPU, whose work no
    processor clock sees, it is the first again.
    """
    before = time.process_time()
    seconds = seconds_of(call, device)
    if device.type == "cuda":
        return seconds, seconds
    return seconds, (time.process_time() - before) / torch.get_num_threads()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, a GPU's work included."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run a block with this number of torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Ceilings of a device, with torch's current number of threads."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    source = torch.ones(2**24, device=device)  # 64 MiB, beyond any core's share of a cache
    target = torch.empty_like(source)
    product = min(seconds_of(lambda: a @ b, device) for _ in range(4))
    copy = min(seconds_of(lambda: target.copy_(source), device) for _ in range(8))
    return Ceilings(2e-9 * size**3 / product, 2e-9 * source.numel() * _BYTES / copy)


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
