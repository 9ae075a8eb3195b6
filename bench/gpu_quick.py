"""The short GPU benchmark: images/s of every way to run a stage, beside torch at its best.

``bench/gpu.py --quick`` runs it on a ResNet-20 with random weights and on the shipped cascade at its
operating point "fast". Labels are compared with fp32 on the CPU before anything is timed, and the report says
whether the host waited for the device.

The baseline is one graph of normalisation, network and argmax, which torch.compile builds for the exact
batch, in fp16, channels last, with CUDA graphs.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends.gpu.stage_ways import VARIABLE, WAYS
from fastcascade.kernels import reference
from fastcascade.lowering.plan import Plan

BATCHES = (4096, 16384, 1024)
"""The batch size of the targets comes first, so that an interrupted run has it."""

CHECKED = 256
FLIPS = 0.02
WARM_UP, ROUNDS = 3, 15

Answer = tuple[Tensor, Tensor | None]
"""Labels and exits; None if there is only one exit."""


class Subject(NamedTuple):
    """A cascade to measure, with thresholds and uint8 images."""

    name: str
    cascade: fc.Cascade
    plan: Plan
    thresholds: Tensor
    images: Tensor


def own_form(
    subject: Subject, way: str | None, device: torch.device, dry_run: bool
) -> Callable[[Tensor], Answer]:
    """fastcascade, with one way forced or with its own choice."""
    backend = "triton" if dry_run or way in ("persistent", "layers") else "cuda"
    os.environ.pop(VARIABLE, None)
    if way is not None:
        os.environ[VARIABLE] = way
    try:
        compiled = fc.compile(subject.plan, backend=backend, precision="fp16", device=device)
    finally:
        os.environ.pop(VARIABLE, None)

    def run(x: Tensor) -> Answer:
        results = compiled.program.run(x, subject.thresholds)
        return results.label, results.exit_stage

    return run


def half(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy in fp16, channels last."""
    own = copy.deepcopy(module).eval().half()
    return own.to(device, memory_format=torch.channels_last)


def dense_form(subject: Subject, device: torch.device, dry_run: bool) -> Callable[[Tensor], Answer]:
    """The last network on every image, as one compiled graph from bytes to labels."""
    network = half(subject.cascade.stages[-1].module, device)
    preprocess = subject.plan.input.preprocess
    assert preprocess is not None
    mean = torch.tensor(preprocess.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(preprocess.std, device=device).view(1, -1, 1, 1)

    def whole(x: Tensor) -> Tensor:
        image = ((x.float() / 255 - mean) / std).half().contiguous(memory_format=torch.channels_last)
        labels: Tensor = network(image).argmax(1)
        return labels

    mode: dict[str, Any] = {"backend": "eager"} if dry_run else {"mode": "reduce-overhead", "dynamic": False}
    compiled = torch.compile(whole, fullgraph=True, **mode)
    return lambda x: (compiled(x), None)


def hand_written_form(subject: Subject, device: torch.device, dry_run: bool) -> Callable[[Tensor], Answer]:
    """A hand-written loop over compiled stages with boolean indexing; the host waits at every stage."""
    mode: dict[str, Any] = {"backend": "eager"} if dry_run else {"dynamic": True}
    stages = [torch.compile(half(stage.module, device), **mode) for stage in subject.cascade.stages]
    selector = copy.deepcopy(subject.cascade.selector).to(device)
    plan = subject.plan

    def run(x: Tensor) -> Answer:
        images = plan.input.to_float(x).half().contiguous(memory_format=torch.channels_last)
        tables = reference.exit_tables(len(x), plan.num_classes, x.device)
        index = torch.arange(len(x), device=x.device)
        for k, stage in enumerate(stages):
            last = k + 1 == len(stages)
            stays = reference.exit_step(
                tables,
                stage(images if k == 0 else images[index]).float(),
                index,
                k,
                stage_weight=plan.stage_weights[k],
                score=None
                if last
                else (lambda log_probs, previous, own, k=k: selector(k, log_probs, previous)),
                threshold=math.inf if last else float(subject.thresholds[k]),
            )
            index = index[stays]
            if len(index) == 0:
                break
        return tables.label, tables.exit_stage

    return run


def forms(
    subject: Subject, device: torch.device, dry_run: bool
) -> dict[str, Callable[[], Callable[[Tensor], Answer]]]:
    """What builds each form, by name; the most important first."""
    several = len(subject.plan.stages) > 1
    found: dict[str, Callable[[], Callable[[Tensor], Answer]]] = {}
    if not dry_run:
        found["fastcascade, resident"] = lambda: own_form(subject, "resident", device, dry_run)
    name = "torch.compile, last network on everything" if several else "torch.compile"
    found[name] = lambda: dense_form(subject, device, dry_run)
    if several:
        found["torch.compile per stage, boolean indexing"] = lambda: hand_written_form(
            subject, device, dry_run
        )
    found["fastcascade, its own choice"] = lambda: own_form(subject, None, device, dry_run)
    for way in WAYS[1:]:
        found[f"fastcascade, {way}"] = lambda way=way: own_form(subject, way, device, dry_run)
    return found


def is_core(name: str, batch: int, batches: tuple[int, ...]) -> bool:
    """Whether an entry helps to show if the resident kernel is faster than torch at its best."""
    return batch == batches[0] and (name == "fastcascade, resident" or name.startswith("torch.compile"))


def expected(subject: Subject, few: Tensor) -> tuple[Answer, Tensor]:
    """fp32 on the CPU: the cascade's labels and exits, and the labels of its last network alone."""
    own = fc.compile(subject.plan, backend="reference", device="cpu").program.run(
        few.cpu(), subject.thresholds
    )
    with torch.no_grad():
        last = subject.cascade.stages[-1].module.eval()(subject.plan.input.to_float(few.cpu()))
    return (own.label, own.exit_stage), last.argmax(1)


def agreement(got: Answer, want: Answer, last: Tensor) -> dict[str, float]:
    """Shares of labels and exits that differ.

    Raises:
        AssertionError: more than :data:`FLIPS` of either.
    """
    labels, exits = got[0].cpu()[: len(last)], None if got[1] is None else got[1].cpu()[: len(last)]
    if exits is None or want[1] is None:
        found = {"other_labels": float((labels != last).float().mean())}
    else:
        found = {
            "other_labels": float((labels != want[0]).float().mean()),
            "other_exits": float((exits != want[1]).float().mean()),
        }
    assert max(found.values()) <= FLIPS, f"{found}; at most {FLIPS} allowed"
    return found


def synchronises(run: Callable[[Tensor], Answer], x: Tensor) -> str | None:
    """What the host waited for in one call, or None."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x)
    except Exception as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def measure(run: Callable[[Tensor], Answer], x: Tensor) -> dict[str, Any]:
    """Seconds per call, with quartiles, by the device's clock."""
    for _ in range(WARM_UP):
        run(x)
    spans = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run(x)
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end) / 1e3)
    low, median, high = statistics.quantiles(spans, n=4, method="inclusive")
    return {"seconds": median, "quartiles": [low, high], "images_per_s": len(x) / median}


def entry(
    run: Callable[[Tensor], Answer], x: Tensor, check: tuple[Answer, Tensor], dry_run: bool
) -> dict[str, Any]:
    """One form at one batch: checked, then timed."""
    try:
        found: dict[str, Any] = dict(agreement(run(x), *check))
        if not dry_run:
            found["waits"] = synchronises(run, x)
            found |= measure(run, x)
        return found
    except Exception as error:  # one form that fails must not stop the others
        return {"refused": f"{type(error).__name__}: {str(error).strip()[:1000]}"}


@torch.no_grad()
def quick_report(
    subjects: list[Subject],
    device: torch.device,
    seconds: float,
    dry_run: bool,
    batches: tuple[int, ...] = BATCHES,
    part: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the report so far after every entry. Forms that are out of time are in it as skipped.

    Args:
        part: "core" for the entries for which :func:`is_core`, "rest" for the others.
    """
    begin = time.monotonic()
    found: dict[str, Any] = {}
    built: dict[tuple[str, str], Any] = {}
    for batch in batches:
        for subject in subjects:
            entries = found.setdefault(subject.name, {}).setdefault(str(batch), {})
            x = subject.images.repeat(-(-batch // len(subject.images)), 1, 1, 1)[:batch].to(device)
            check = expected(subject, x[:CHECKED])
            for name, build in forms(subject, device, dry_run).items():
                if part is not None and is_core(name, batch, batches) != (part == "core"):
                    continue
                if time.monotonic() - begin > seconds:
                    entries[name] = {"skipped": "out of time"}
                    continue
                try:
                    run = built.get((subject.name, name)) or build()
                    built[subject.name, name] = run
                except Exception as error:
                    entries[name] = {"refused": f"{type(error).__name__}: {str(error).strip()[:1000]}"}
                else:
                    entries[name] = entry(run, x, check, dry_run)
                print(line(subject.name, batch, name, entries[name]), flush=True)
                yield found
    yield found


def line(subject: str, batch: int, name: str, found: dict[str, Any]) -> str:
    """One row of the table that is printed during the run."""
    if "images_per_s" in found:
        waits = "waits" if found["waits"] else "no wait"
        result = f"{found['images_per_s'] / 1e6:8.3f} M images/s  {waits}"
    else:
        result = found.get("refused") or found.get("skipped") or "agrees"
    return f"{subject:28} {batch:6} {name:44} {result[:90]}"
