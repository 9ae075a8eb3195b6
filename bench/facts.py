"""Facts about our engine alone: schedule efficiency, memory, and errors against float64.

Each function runs in a worker process and returns plain data for the results file.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastcascade as fc
from bench.cases import cascade_images, load_model, model_file, noise
from fastcascade.backends.cpu import CpuProgram
from fastcascade.benchmarking.parts import stage_alone
from fastcascade.benchmarking.runner import benchmark
from fastcascade.lowering.export import plan as lower_plan

__all__ = ["errors", "memory", "schedule"]

_ERROR_IMAGES = 1024
_CALLS = 4


def schedule(model: str, batches: Sequence[int], rounds: int, seconds: float, threads: int) -> dict[str, Any]:
    """The cascade and its stages alone, in turns; see :func:`fastcascade.benchmark`."""
    images = torch.from_numpy(cascade_images(model, max(batches)))
    measured = benchmark(
        load_model(model),
        (images, None),
        batches=batches,
        threads=(threads,),
        backend="cpu",
        rounds=rounds,
        seconds=seconds,
    )
    return measured.to_json()


def memory(model: str, batches: Sequence[int], threads: int) -> dict[str, Any]:
    """Bytes that calls need besides weights, images and results.

    ``buffers_per_thread`` is the engine's own count. ``grown_per_thread`` is the growth of this process's
    resident set from the first call to the last, which includes anything the engine does not count.
    """
    torch.set_num_threads(threads)
    engine = fc.compile(load_model(model), backend="cpu", threads=threads)
    images = {batch: torch.from_numpy(noise(batch)) for batch in batches}
    engine(images[min(batches)][:0])
    gc.collect()
    before = _resident_bytes()
    for batch in batches:
        for _ in range(_CALLS):
            engine(images[batch])
    grown = _resident_bytes() - before
    for batch in batches:
        for _ in range(_CALLS):
            engine(images[batch])
    program = engine.program
    assert isinstance(program, CpuProgram)
    return {
        "buffers_per_thread": program.memory_bytes / threads,
        "grown_per_thread": grown / threads,
        "grown_when_warm": _resident_bytes() - before - grown,
    }


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@torch.no_grad()
def errors(model: str, threads: int) -> dict[str, Any]:
    """The largest errors of logits against float64: ours with each kernel, and PyTorch's fp32.

    Every stage is a network of its own here. ``labels_differ`` counts images whose label differs from
    float64's although the two best classes are further apart than twice the error.
    """
    torch.set_num_threads(threads)
    cascade = load_model(model)
    images = _error_images(model)
    plan = lower_plan(cascade)
    stages = []
    for k in range(len(cascade.stages)):
        network, part = cascade.stage(k).module, stage_alone(plan, k)
        plain, exact = network(images), _exact_logits(network, images)
        facts: dict[str, Any] = {"stage": k, "torch": float((plain - exact).abs().max())}
        facts["labels_seen"] = len(exact.argmax(1).unique())
        for name, kernel in (("direct", "conv_direct_f32"), ("winograd", "")):
            logits = _engine_logits(CpuProgram(part, threads, kernel=kernel), images)
            error = float((logits - exact).abs().max())
            facts[name] = error
            facts[f"{name}_labels_differ"] = _differing(logits, exact, 2 * error)
        stages.append(facts)
    return {"images": len(images), "stages": stages}


def _error_images(model: str) -> Tensor:
    if model.startswith("cascade:"):
        return torch.from_numpy(cascade_images(model, 64)[:_ERROR_IMAGES])
    return torch.from_numpy(noise(_ERROR_IMAGES // 4, seed=1))


def _engine_logits(program: CpuProgram, images: Tensor) -> Tensor:
    """(N, C) float32 from the engine's last layer; a call returns log-probabilities instead."""
    return torch.from_numpy(program._cascade.run_stage(0, images.numpy())[0])


def _exact_logits(network: nn.Module, images: Tensor) -> Tensor:
    """(N, C) float64, cached by a hash of the weights and the number of images."""
    path = model_file(network, f".{len(images)}.safetensors")
    if not path.exists():
        exact = copy.deepcopy(network).double()(images.double())
        save_file({"logits": exact}, path)
    return load_file(path)["logits"]


def _differing(logits: Tensor, exact: Tensor, band: float) -> int:
    top = exact.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > band
    return int(((logits.argmax(1) != exact.argmax(1)) & clear).sum())
