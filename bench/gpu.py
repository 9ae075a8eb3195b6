"""GPU benchmarks in one file: kernels against their twins, the cascade against torch, single stages.

``make test-gpu`` runs it after the tests. It needs the installed package and a GPU, and writes a JSON report
with the device's name and all versions. Nothing is timed unless its results agree in the same run; what
disagrees is reported as refused, with the difference and without a figure.

``--dry-run`` runs the same code in Triton's interpreter on a few images, without figures.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends.interface import ExitResults
from fastcascade.kernels import reference
from fastcascade.kernels.layers import Conv, ConvShape, Elementwise, Layer, Pooling, View, pack_weight
from fastcascade.lowering.export import plan as lower_plan
from fastcascade.model.resnet import resnet_cifar

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_quick import BATCHES as BATCHES_QUICK
from gpu_quick import Subject, quick_report

ROOT = Path(__file__).resolve().parent.parent
CASCADE = ROOT / "examples" / "cifar10" / "resnet9" / "model"
IMAGES = ROOT / "examples" / "cifar10" / "test-images.npz"
BATCHES = (1, 8, 64, 256, 1024, 4096, 16384)
TOLERANCE = 5e-2
"""Largest difference of fp16 values, or of log-probabilities, from fp32."""
FLIPS = 0.02
"""Largest share of images whose exit may differ, because a score is within rounding of its threshold."""
WARM_UP, ROUNDS = 3, 20


@dataclass(frozen=True)
class Run:
    """Where and how large.

    Attributes:
        rows: of the kernel cases; batches: of the throughput.
        timed: whether figures are taken; a dry run takes none.
    """

    device: torch.device
    rows: int = 4096
    batches: tuple[int, ...] = BATCHES
    timed: bool = True

    def seconds(self, work: Callable[[], object]) -> list[float] | None:
        """Per round, the device's time for one call; None in a dry run."""
        if not self.timed:
            return None
        for _ in range(WARM_UP):
            work()
        spans = []
        for _ in range(ROUNDS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            spans.append(begin.elapsed_time(end) / 1e3)
        return spans


def gated(run: Run, agreement: Callable[[], dict[str, Any]], work: Callable[[], object]) -> dict[str, Any]:
    """Check, then time: the check's figures and seconds with quartiles, or the reason for a refusal."""
    try:
        found = agreement()
    except (AssertionError, ValueError, RuntimeError) as error:
        return {"refused": str(error).strip()}
    spans = run.seconds(work)
    if spans is None:
        return found
    low, median, high = statistics.quantiles(spans, n=4, method="inclusive")
    return {**found, "seconds": median, "quartiles": [low, high]}


def closeness(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """The largest difference; raises AssertionError beyond the tolerance (absolute and relative)."""
    got, want = got.detach().float().cpu(), want.detach().float().cpu()
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, equal_nan=True)
    return {"max_error": float((got - want).abs().nan_to_num().max()) if got.numel() else 0.0}


def labels_agree(labels: Tensor, want: Tensor, want_labels: Tensor) -> None:
    """Labels against the reference's, wherever its two best classes are further apart than the tolerance.

    Raises:
        AssertionError: one of them differs.
    """
    best = want.float().topk(2, 1).values
    clear = ~(best[:, 0] - best[:, 1] <= 2 * TOLERANCE * (1 + best[:, 1].abs()))  # also where they are NaN
    differ = int((labels.cpu() != want_labels)[clear].sum())
    assert not differ, f"{differ} of {len(want)} labels differ"


def rates(entry: dict[str, Any], moved: float, flops: float = 0.0) -> dict[str, Any]:
    """An entry with its minimal bytes and FLOPs and, if it was timed, the rates."""
    entry |= {"bytes": moved, "flops": flops}
    if "seconds" in entry:
        entry |= {"gb_per_s": moved / entry["seconds"] / 1e9, "tflop_per_s": flops / entry["seconds"] / 1e12}
    return entry


# ---- kernels ----


def layer_cases() -> dict[str, Layer]:
    """One layer of each kernel, in the sizes of CIFAR ResNets; weights are random."""

    def conv(size: int, i: int, o: int, kernel: int = 3, stride: int = 1, residual: bool = False) -> Layer:
        edges = (size * stride, size * stride, i, size, size, o, (kernel, kernel), (stride, stride))
        view = View(size, size, o, o) if residual else None
        work = Conv(ConvShape(*edges, corner=(kernel // 2, kernel // 2)), view, "relu")
        weight = torch.randn(o, i, kernel, kernel) / (i * kernel**2) ** 0.5
        return Layer(work, 2, 0, 1 if residual else None, pack_weight(weight, i), torch.randn(o), "")

    maps = ((32, 32, 64), (16, 16, 64))
    pool = Pooling(*maps, "max", (2, 2), (2, 2), (0, 0, 0, 0), True)
    add = Elementwise(maps[1], maps[1], (64, 64), other=True, activation="relu")
    return {
        "conv 16→16 on 32": conv(32, 16, 16),
        "conv 32→32 on 16, residual": conv(16, 32, 32, residual=True),
        "conv 32→64 on 8, stride 2": conv(8, 32, 64, stride=2),
        "conv 64→64 on 8": conv(8, 64, 64),
        "conv 128→128 on 16": conv(16, 128, 128),
        "conv 1×1 64→256 on 8": conv(8, 64, 256, kernel=1),
        "pool max 2×2 on 32": Layer(pool, 1, 0, None, None, None, ""),
        "elementwise add on 16": Layer(add, 2, 0, 1, None, None, ""),
    }


def layer_entry(run: Run, layer: Layer) -> dict[str, Any]:
    """One layer in fp16 against its fp32 twin."""
    from fastcascade.kernels.triton.layer_launch import run_layer

    work = layer.work
    shape = work.shape if isinstance(work, Conv) else None
    source = (shape.height, shape.width, shape.channels) if shape else work.source
    x = torch.randn(run.rows, *source, dtype=torch.float16)
    other = None if layer.other is None else torch.randn(run.rows, *work.out, dtype=torch.float16)
    there = layer._replace(
        weight=None if layer.weight is None else layer.weight.half().to(run.device),
        vectors=None if layer.vectors is None else layer.vectors.to(run.device),
    )
    device_x, device_other = x.to(run.device), None if other is None else other.to(run.device)
    out = torch.empty(run.rows, *work.out, dtype=torch.float16, device=run.device)
    count = torch.tensor([run.rows], dtype=torch.int32, device=run.device)

    def call() -> None:
        run_layer(there, device_x, device_other, count, out)

    def agreement() -> dict[str, Any]:
        call()
        few = min(run.rows, 8)  # the twin is slow, and every row takes the same path
        second = None if other is None else other[-few:].float()
        if isinstance(work, Conv):
            assert layer.weight is not None
            assert layer.vectors is not None
            weight = layer.weight.half().float()
            want = reference.conv(work, x[-few:].float(), second, weight, layer.vectors)
        elif isinstance(work, Pooling):
            want = reference.pool(work, x[-few:].float())
        else:
            want = reference.elementwise(work, x[-few:].float(), second, None)
        return closeness(out[-few:], want)

    read = x.numel() + (0 if other is None else other.numel()) + out.numel()
    constant = 0 if layer.weight is None else layer.weight.numel()
    macs = 0
    if shape is not None:
        taps = shape.kernel[0] * shape.kernel[1] * shape.channels
        macs = run.rows * shape.out_height * shape.out_width * taps * shape.out_channels
    return rates(gated(run, agreement, call), 2.0 * (read + constant), 2.0 * macs)


def exit_entry(run: Run, classes: int) -> dict[str, Any]:
    """The exit head with an MLP on statistics, half of the rows stopping."""
    from fastcascade.kernels.triton import exit_head as kernels

    n = run.rows
    logits = (3 * torch.randn(n, classes)).half()
    weights = reference.MLPWeights(
        torch.zeros(4), torch.ones(4), torch.randn(16, 4), torch.randn(16), torch.randn(16), torch.zeros(())
    )
    threshold = torch.tensor([0.0])
    want = reference.exit_tables(n, classes)
    index = torch.arange(n, dtype=torch.int32)
    options = {"stage_weight": None, "selector": "stats"}
    reference.exit_head(want, logits.float(), index, 0, **options, weights=weights)
    tables = reference.exit_tables(n, classes, run.device)
    keep = kernels.new_keep(n, classes, run.device)
    there = [t.to(run.device) for t in (logits, index, torch.tensor([n], dtype=torch.int32))]
    settings = {
        "weights": reference.MLPWeights(*(w.to(run.device) for w in weights)),
        "threshold": threshold.to(run.device),
        **options,
    }

    def call() -> None:
        kernels.exit_head(tables, *there, 0, keep, **settings)

    def agreement() -> dict[str, Any]:
        call()
        same = (tables.exit_stage.cpu() == want.exit_stage) & (want.exit_stage == 0)
        flips = float((tables.exit_stage.cpu() != want.exit_stage).float().mean())
        assert flips <= FLIPS, f"{flips:.1%} of exits differ; {FLIPS:.0%} allowed"
        labels_agree(tables.label.cpu()[same], want.log_probs[same], want.label[same])
        return {**closeness(tables.log_probs.cpu()[same], want.log_probs[same]), "flips": flips}

    stopped = float((want.exit_stage == 0).float().mean())
    return rates(gated(run, agreement, call), n * (2.0 * classes + 9 + stopped * (4 * classes + 16)))


def compact_entries(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    """The three compactions, two thirds of the rows surviving."""
    from fastcascade.kernels.triton import compact as kernels
    from fastcascade.kernels.triton.exit_head import new_keep

    n, width = run.rows, 16 * 16 * 32
    stays = torch.arange(n) % 3 != 0
    m = int(stays.sum())
    keep = new_keep(n, 10, run.device)
    keep.flags.copy_(stays)
    blocks = torch.nn.functional.pad(stays.int(), (0, -n % keep.rows)).view(-1, keep.rows).sum(1)
    keep.counts.copy_(blocks)
    index = torch.arange(n, dtype=torch.int32, device=run.device)
    count = torch.tensor([n], dtype=torch.int32, device=run.device)
    out_index, out_count = torch.zeros_like(index), torch.zeros_like(count)
    rows = torch.randn(n, width, device=run.device).half()
    survivors = torch.arange(n, dtype=torch.int32)[stays]

    def compact_index() -> None:
        kernels.compact_index(index, count, keep, out_index, out_count)

    def index_agreement() -> dict[str, Any]:
        compact_index()
        return closeness(out_index[:m], survivors, 0.0)

    yield "compact_index", rates(gated(run, index_agreement, compact_index), 5.0 * n + 4 * m)

    moved, moved_index = rows.clone(), index.clone()

    def fill_holes() -> None:
        kernels.fill_holes(moved, moved_index, count, keep, out_count)

    def fill_agreement() -> dict[str, Any]:
        fill_holes()
        assert sorted(moved_index[:m].tolist()) == survivors.tolist(), "other rows survived"
        return closeness(moved[:m], rows[moved_index[:m].long()], 0.0)

    moves = float((~stays[:m]).sum())
    yield "fill_holes", rates(gated(run, fill_agreement, fill_holes), 4.0 * width * moves + 5 * n)

    bucket, bucket_index = torch.empty_like(rows), torch.empty_like(index)
    order = torch.randperm(n, device=run.device, dtype=torch.int32)
    chunk = torch.zeros_like(count)

    def gather_rows() -> None:
        kernels.gather_rows(rows, order, count, chunk, bucket, bucket_index, out_count)

    def gather_agreement() -> dict[str, Any]:
        gather_rows()
        return closeness(bucket, rows[order.long()], 0.0)

    yield "gather_rows", rates(gated(run, gather_agreement, gather_rows), 4.0 * width * n + 8 * n)


def kernel_entries(run: Run) -> dict[str, Any]:
    """Every kernel but the persistent one, whose unit is a stage."""
    entries = {name: layer_entry(run, layer) for name, layer in layer_cases().items()}
    entries |= {f"exit_head C={classes}": exit_entry(run, classes) for classes in (10, 1000)}
    return {**entries, **dict(compact_entries(run))}


# ---- dense networks and cascades ----


class Model:
    """A cascade on the device, in the forms that are compared; a dense network is a cascade of one stage."""

    def __init__(self, cascade: fc.Cascade, thresholds: Tensor, images: Tensor, run: Run) -> None:
        self.thresholds, self.images, self.run = thresholds, images, run
        device = run.device
        self.plan = lower_plan(cascade)
        self.compiled = fc.compile(self.plan, backend="triton", precision="fp16", device=device)
        self.half = [self._half(stage.module) for stage in cascade.stages]
        selector = cascade.selector
        self.selector = None if selector is None else copy.deepcopy(selector).to(device)
        compiler: dict[str, Any] = {"mode": "max-autotune"} if run.timed else {"backend": "eager"}
        compiled = [torch.compile(stage, **compiler) for stage in self.half]
        self.programs = {
            "fastcascade": self._own,
            "eager fp16 channels_last, per stage with boolean indexing": lambda x: self._masked(self.half, x),
            "torch.compile per stage with boolean indexing": lambda x: self._masked(compiled, x),
        }

    def _half(self, module: nn.Module) -> nn.Module:
        own = copy.deepcopy(module).eval().half()
        return own.to(self.run.device, memory_format=torch.channels_last)

    def _own(self, x: Tensor) -> ExitResults:
        return self.compiled.program.run(x, self.thresholds)

    def _masked(self, stages: list[Callable[[Tensor], Tensor]], x: Tensor) -> ExitResults:
        """The hand-written loop: run a stage, select the survivors, repeat. Synchronises at every stage."""
        images = self.plan.input.to_float(x).half().contiguous(memory_format=torch.channels_last)
        tables = reference.exit_tables(len(x), self.plan.num_classes, x.device)
        index = torch.arange(len(x), device=x.device)
        for k, stage in enumerate(stages):
            last = k + 1 == len(stages)
            score = None if last or self.selector is None else partial(self.selector, k)
            logits = stage(images if k == 0 else images[index]).float()
            stays = reference.exit_step(
                tables,
                logits,
                index,
                k,
                stage_weight=self.plan.stage_weights[k],
                score=score,
                threshold=math.inf if last else float(self.thresholds[k]),
            )
            index = index[stays]
            if len(index) == 0:
                break
        return ExitResults(tables.log_probs, tables.label, tables.exit_stage)

    def reference(self, x: Tensor) -> ExitResults:
        """fp32 on the CPU."""
        own = fc.compile(self.plan, backend="reference", device="cpu")
        return own.program.run(x.cpu(), self.thresholds)

    def entries(self, batch: int) -> dict[str, Any]:
        """Throughput of every form at one batch size."""
        x = self.images.repeat(-(-batch // len(self.images)), 1, 1, 1)[:batch].to(self.run.device)
        few = x[: min(batch, 256)]
        want = self.reference(few)
        found = {}
        for name, program in self.programs.items():

            def agreement(program: Any = program) -> dict[str, Any]:
                got = ExitResults(*(t.cpu()[: len(few)] for t in program(x)))
                same = got.exit_stage == want.exit_stage
                flips = 1 - float(same.float().mean())
                assert flips <= FLIPS, f"{flips:.1%} of exits differ; {FLIPS:.0%} allowed"
                labels_agree(got.label[same], want.log_probs[same], want.label[same])
                near = closeness(got.log_probs[same].clamp_min(-20), want.log_probs[same].clamp_min(-20))
                return {**near, "flips": flips}

            entry = gated(self.run, agreement, lambda program=program: program(x))
            if "seconds" in entry:
                entry["images_per_s"] = batch / entry["seconds"]
            found[name] = entry
        return found

    def stages(self, batch: int) -> list[dict[str, Any]]:
        """Every stage alone over a whole batch, by the schedule that the backend chose."""
        from fastcascade.backends.gpu.scheduler import Active

        x = self.images.repeat(-(-batch // len(self.images)), 1, 1, 1)[:batch].to(self.run.device)
        index = torch.arange(batch, dtype=torch.int32, device=self.run.device)
        active = Active(index, torch.tensor([batch], dtype=torch.int32, device=self.run.device), batch)
        entries: list[dict[str, Any]] = []
        for stage, runner in zip(self.plan.stages, self.compiled.program.runners, strict=True):
            entry = gated(self.run, dict, lambda runner=runner, active=active: runner.run(x, active))
            schedule = " ".join(runner.report().kernels[0])
            entry |= {"name": stage.name, "schedule": schedule, "macs": stage.macs}
            entries.append(rates(entry, 0.0, 2.0 * stage.macs * batch))
            active.features = runner.run(x, active)[0]
        return entries


def models(run: Run) -> dict[str, Model]:
    """ResNet-20 alone, with random weights, and the trained example at its operating point "fast".

    A dry run has two small networks with random weights on the corners of the images instead.
    """
    with np.load(IMAGES) as archive:
        images = torch.from_numpy(archive["images"].transpose(0, 3, 1, 2).copy())
    normalize = fc.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    if not run.timed:
        stages = [resnet_cifar(8), resnet_cifar(8)]
        small = fc.Cascade(stages, fc.MLPSelector(), 10, (3, 8, 8), preprocess=normalize)
        return {"small": Model(small, torch.zeros(1), images[:, :, :8, :8], run)}
    dense = fc.Cascade([resnet_cifar(20)], None, 10, (3, 32, 32), preprocess=normalize)
    example = fc.load(CASCADE)
    last = fc.Cascade([example.stages[-1].module], None, 10, (3, 32, 32), preprocess=normalize)
    return {
        "examples/cifar10, last stage on everything": Model(last, torch.empty(0), images, run),
        "ResNet-20, random weights": Model(dense, torch.empty(0), images, run),
        "examples/cifar10 at fast": Model(example, lower_plan(example).thresholds("fast"), images, run),
    }


def versions(device: torch.device) -> dict[str, Any]:
    """The device's name and what runs on it."""
    packages = {}
    for name in ("torch", "triton", "numpy", "fastcascade"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "Triton's interpreter: no figure is taken",
        "runtime": torch.version.cuda or torch.version.hip,
        "packages": packages,
        "platform": f"{platform.system()} {platform.release()} Python {platform.python_version()}",
    }


@torch.no_grad()
def report(run: Run) -> Iterator[dict[str, Any]]:
    """The report so far, after every part."""
    torch.manual_seed(0)
    found: dict[str, Any] = {"machine": versions(run.device), "kernels": kernel_entries(run), "models": {}}
    yield found
    for name, model in models(run).items():
        entry = found["models"].setdefault(name, {"batches": {}})
        entry["description"] = model.compiled.describe().splitlines()
        entry["stages"] = model.stages(max(run.batches))
        for batch in run.batches:
            entry["batches"][batch] = model.entries(batch)
            yield found


def refusals(found: dict[str, Any]) -> list[str]:
    """Our own entries that disagreed with their reference; peers' do not count."""
    entries = {f"kernel {name}": entry for name, entry in found["kernels"].items()}
    for model, parts in found["models"].items():
        for batch, forms in parts["batches"].items():
            entries[f"{model}, batch {batch}"] = forms["fastcascade"]
    return [f"{name}: {entry['refused']}" for name, entry in entries.items() if "refused" in entry]


def quick_subjects(run: Run) -> list[Subject]:
    """A ResNet-20 with random weights and the shipped cascade; two small networks in a dry run."""
    with np.load(IMAGES) as archive:
        images = torch.from_numpy(archive["images"].transpose(0, 3, 1, 2).copy())
    normalize = fc.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    if not run.timed:
        stages = [resnet_cifar(8), resnet_cifar(8)]
        small = fc.Cascade(stages, fc.MLPSelector(), 10, (3, 8, 8), preprocess=normalize)
        return [Subject("small", small, lower_plan(small), torch.zeros(1), images[:, :, :8, :8])]
    dense = fc.Cascade([resnet_cifar(20)], None, 10, (3, 32, 32), preprocess=normalize)
    example = fc.load(CASCADE)
    shipped = lower_plan(example)
    return [
        Subject("ResNet-20", dense, lower_plan(dense), torch.empty(0), images),
        Subject("examples/cifar10 at fast", example, shipped, shipped.thresholds("fast"), images),
    ]


def quick(run: Run, output: Path, seconds: float, part: str | None) -> int:
    """Measure every way to run a stage; write the report after every entry; 1 if one of our own disagreed.

    Args:
        part: "core", "rest" or None for both; see ``gpu_quick.is_core``.
    """
    torch.manual_seed(0)
    whole: dict[str, Any] = {"machine": versions(run.device)}
    batches = BATCHES_QUICK if run.timed else (4,)
    for found in quick_report(quick_subjects(run), run.device, seconds, not run.timed, batches, part):
        output.write_text(json.dumps(whole | {"models": found}, indent=1) + "\n")
    refused = [
        f"{subject}, batch {batch}, {name}: {entry['refused']}"
        for subject, by_batch in found.items()
        for batch, entries in by_batch.items()
        for name, entry in entries.items()
        if "refused" in entry and name.startswith("fastcascade")
    ]
    print(*refused, sep="\n", file=sys.stderr)
    return 1 if refused else 0


def main() -> int:
    """Measure and write the report after every part; 1 if something of our own disagreed."""
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-report.json"))
    parser.add_argument("--dry-run", action="store_true", help="a few images under Triton's interpreter")
    parser.add_argument(
        "--quick", action="store_true", help="minutes: every way to run a stage, beside torch"
    )
    parser.add_argument(
        "--part", choices=("core", "rest"), help="of --quick: the resident kernel beside torch, or all else"
    )
    parser.add_argument("--seconds", type=float, default=280, help="of --quick: starts nothing after so long")
    arguments = parser.parse_args()
    if arguments.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":  # read when triton is imported, which torch has done
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
        run = Run(torch.device("cpu"), rows=3, batches=(2,), timed=False)
    elif torch.cuda.is_available():
        run = Run(torch.device("cuda", torch.cuda.current_device()))
    else:
        sys.exit("torch sees no GPU here, so nothing can be measured; --dry-run checks the code without one")
    if arguments.quick:
        return quick(run, arguments.output, arguments.seconds, arguments.part)
    begin = time.perf_counter()
    for found in report(run):
        found["took_s"] = time.perf_counter() - begin
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    for line in refusals(found):
        print(line, file=sys.stderr)
    return 1 if refusals(found) else 0


if __name__ == "__main__":
    sys.exit(main())
