"""The targets of this project, with the figures of a results file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.engines import AVX2_OURS, AVX2_PEER, BF16_PEERS, FP32_PEERS, LAST, ONE_THREAD, OURS
from bench.machine import ROOT
from bench.ratios import ratio

__all__ = ["TRAINING", "Row", "Speed", "at_least", "target_rows", "target_table"]

TRAINING = ROOT / "examples" / "cifar10" / "results.json"
"""Accuracy and cost on the 10,000 test images, written by ``examples/cifar10/measure.py``."""
LEAST_BATCHES = 64
MIB = 2**20

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One target and its measurement, as text for a table.

    Attributes:
        work: what is measured.
        beside: what it is compared with.
        verdict: "pass" or the distance, or why there is no measurement. Both say "within the noise" where the
            interval of the measurement contains the target.
    """

    work: str
    wanted: str
    beside: str = ""
    measured: str = ""
    verdict: str = "not measured"


@dataclass(frozen=True)
class Speed:
    """How many times faster one engine must be than others of the same run.

    Attributes:
        case: beginning of the case's key, see ``Case.key``.
        others: the fastest of these is the comparison.
        wanted: the smallest ratio of speeds that passes.
        ours: the engine that must reach it.
    """

    work: str
    case: str
    others: tuple[str, ...]
    wanted: float
    ours: str = OURS

    def row(self, results: Results) -> Row:
        """The ratio over the fastest of the others; refused engines are named."""
        wanted = f"≥ {self.wanted:g}×"
        entry = next((e for key, e in results["cases"].items() if key.startswith(self.case)), None)
        if entry is None:
            return Row(self.work, wanted)
        refused = [name for name, engine in entry["engines"].items() if "refused" in engine]
        timed = {name: engine for name, engine in entry["engines"].items() if "refused" not in engine}
        others = [name for name in self.others if name in timed]
        missing = [name for name in (self.ours, *self.others) if name in refused]
        note = f"refused: {', '.join(missing)}" if missing else ""
        if self.ours not in timed or not others:
            return Row(self.work, wanted, verdict=note or "not measured")
        best = max(others, key=lambda name: float(timed[name]["images_per_s"]))
        found = ratio(timed[self.ours]["seconds_per_image"], timed[best]["seconds_per_image"])
        beside = best if not note else f"{best} ({note})"
        distance = f"{found.value / self.wanted:.0%} of it"
        verdict = at_least(self.wanted, found.value, (found.low, found.high), distance)
        return Row(self.work, wanted, beside, str(found), verdict)


def at_least(wanted: float, value: float, interval: tuple[float, float], distance: str) -> str:
    """The verdict on a lower bound: by the value, with a note where the interval contains the target.

    Example:
        >>> at_least(2.5, 2.6, (2.4, 2.8), "104%"), at_least(2.5, 2.3, (2.2, 2.4), "92%")
        ('pass, within the noise', '92%')
    """
    low, high = interval
    return ("pass" if value >= wanted else distance) + (", within the noise" if low < wanted <= high else "")


def target_rows(results: Results) -> list[Row]:
    """Every target."""
    speeds = [*_dense_speeds(), *_cascade_speeds(results)]
    return [
        *(speed.row(results) for speed in speeds),
        *_paced_rows(results.get("paced")),
        *_schedule_rows(results["facts"].get("schedule")),
        *_error_rows(results["facts"].get("errors", {})),
        *_memory_rows(results["facts"].get("memory", {})),
        *_training_rows(json.loads(TRAINING.read_text()) if TRAINING.exists() else None),
    ]


def _dense_speeds() -> Iterator[Speed]:
    def dense(depth: int, batch: int, what: str, others: tuple[str, ...], wanted: float, ours: str) -> Speed:
        work = f"ResNet-{depth}, batch {batch}: {what}"
        return Speed(work, f"resnet_cifar:{depth} batch {batch} ", others, wanted, ours)

    for batch, wanted in ((256, (2.5, 2.5, 2.5)), (8, (2.8, 2.8, 2.4)), (1, (2.5, 2.5, 2.5))):
        for depth, least in zip((20, 56, 110), wanted, strict=True):
            yield dense(depth, batch, "best fp32 peer", FP32_PEERS, least, OURS)
    for depth in (20, 56, 110):
        yield dense(depth, 256, "the peers' bf16", BF16_PEERS, 1.0, OURS)
    for depth in (20, 56, 110):
        yield dense(depth, 1, "latency mode over one thread", (ONE_THREAD,), 1.4, OURS)
    for depth in (20, 56, 110):
        yield dense(depth, 256, "AVX2, over OpenVINO on AVX2", (AVX2_PEER,), 2.0, AVX2_OURS)
    for depth in (20, 56, 110):
        yield dense(depth, 256, "two threads over one", (ONE_THREAD,), 1.9, OURS)


def _cascade_speeds(results: Results) -> Iterator[Speed]:
    """Of the cascade that was measured, whatever the name of its folder."""
    names = {key.partition(" batch ")[0] for key in results["cases"] if key.startswith("cascade:")}
    for batch in (256, 8):
        for name in sorted(names) or ["cascade:"]:
            case = f"{name} batch {batch} "
            yield Speed(f"cascade, batch {batch}: best hand-written one", case, FP32_PEERS, 2.5)
            yield Speed(f"cascade, batch {batch}: eager, last network on everything", case, (LAST,), 20.0)


def _paced_rows(facts: Results | None) -> Iterator[Row]:
    """A call after a pause, against calls in a loop and the best peer after the same pause; its tail."""

    def at_most(work: str, limit: float, beside: str, value: float | None) -> Row:
        if value is None:
            return Row(work, f"≤ {limit:g}×", beside)
        verdict = "pass" if value <= limit else f"{value / limit:.2f} times too long"
        return Row(work, f"≤ {limit:g}×", beside, f"{value:.2f}×", verdict)

    engines = {} if facts is None else {n: e for n, e in facts["engines"].items() if "refused" not in e}
    ours = engines.pop(OURS, None)
    for pattern, limit in (("after 1 ms", 1.1), ("after 30 ms", 1.7), ("after torch", 1.3)):
        value = ours and ours[pattern]["p50"] / ours["loop"]["p50"]
        yield at_most(f"ResNet-20, 8 images {pattern}: median", limit, "its own loop's median", value)
    for pattern in ("after 1 ms", "after 30 ms", "after torch"):
        value = ours and ours[pattern]["p99"] / ours[pattern]["p50"]
        yield at_most(f"ResNet-20, 8 images {pattern}: p99", 1.5, "its own median", value)
    work = "ResNet-20, 8 images after 30 ms: best fp32 peer"
    if ours is None or not engines:
        yield Row(work, "≥ 1.6×")
        return
    best = min(engines, key=lambda name: float(engines[name]["after 30 ms"]["p50"]))
    ratio = engines[best]["after 30 ms"]["p50"] / ours["after 30 ms"]["p50"]
    verdict = "pass" if ratio >= 1.6 else f"{ratio / 1.6:.0%} of it"
    yield Row(work, "≥ 1.6×", best, f"{ratio:.2f}×", verdict)


def _unknown(work: str, wanted: str, fact: Results | None) -> Row:
    """A target without a measurement: nobody took it, or it failed."""
    if fact is None:
        return Row(work, wanted)
    return Row(work, wanted, verdict=f"refused: {fact['refused'].splitlines()[0]}")


def _schedule_rows(facts: Results | None) -> Iterator[Row]:
    for batch, wanted in ((256, 0.95), (64, 0.95), (8, 0.9)):
        work, beside = f"cascade, batch {batch}: schedule efficiency", "its stages alone"
        if facts is None or "refused" in facts:
            yield _unknown(work, f"≥ {wanted:.2f}", facts)
            continue
        found = next(b for b in facts["batches"] if b["batch"] == batch)
        value = found["schedule_efficiency"]
        measured = f"{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        distance = f"{value['median'] - wanted:+.3f}"
        verdict = at_least(wanted, value["median"], (value["low"], value["high"]), distance)
        if found["batches"] < LEAST_BATCHES:
            verdict = f"only {found['batches']} of {LEAST_BATCHES} different batches"
        yield Row(work, f"≥ {wanted:.2f}", f"{beside}, {found['batches']} batches", measured, verdict)


def _error_rows(facts: Results) -> Iterator[Row]:
    for model in (*(f"resnet_cifar:{depth}" for depth in (20, 56, 110)), "cascade"):
        for kernel, wanted in (("direct", 2.0), ("winograd", 6.0)):
            work = f"{model}: largest logit error, {kernel} kernels"
            if "stages" not in facts.get(model, ()):
                yield _unknown(work, f"≤ {wanted:g}×", facts.get(model))
                continue
            stages = facts[model]["stages"]
            ours, torch = (max(stage[name] for stage in stages) for name in (kernel, "torch"))
            differ = sum(stage[f"{kernel}_labels_differ"] for stage in stages)
            seen = min(stage["labels_seen"] for stage in stages)
            verdict = "pass" if ours <= wanted * torch else f"{ours / torch / wanted:.2f} times too large"
            if differ or seen < 5:
                verdict = f"{differ} labels differ, {seen} labels seen"
            beside = f"PyTorch fp32: {torch:.1e}, {facts[model]['images']} images"
            yield Row(work, f"≤ {wanted:g}×", beside, f"{ours / torch:.2f}× ({ours:.1e})", verdict)


def _memory_rows(facts: Results) -> Iterator[Row]:
    for model in (*(f"resnet_cifar:{depth}" for depth in (20, 56, 110)), "cascade"):
        work = f"{model}: memory of a thread beyond weights"
        if "buffers_per_thread" not in facts.get(model, ()):
            yield _unknown(work, "≤ 8 MiB", facts.get(model))
            continue
        fact = facts[model]
        used = max(fact["buffers_per_thread"], fact["grown_per_thread"]) / MIB
        verdict = "pass" if used <= 8 else f"{used - 8:.1f} MiB too much"
        beside = f"process when warm: {fact['grown_when_warm'] / MIB:+.1f} MiB"
        yield Row(work, "≤ 8 MiB", beside, f"{used:.1f} MiB", verdict)


def _training_rows(facts: Results | None) -> Iterator[Row]:
    """The trained cascade: test accuracy within a mean cost. 50.6 M MACs are a fifth of ResNet-110's."""
    if facts is None:
        yield Row("last network alone, accuracy", "≥ 94.6 %")
    else:
        accuracy = facts["last_network"]
        verdict = "pass" if accuracy >= 0.946 else f"{100 * (accuracy - 0.946):+.2f} points"
        yield Row("last network alone, accuracy", "≥ 94.6 %", "", f"{accuracy:.2%}", verdict)
    points = {p["operating_point"]: p for p in (facts or {"operating_points": ()})["operating_points"]}
    for name, wanted, macs in (("default", 0.939, 50.6e6), ("fast", 0.92, 20e6), ("accurate", 0.946, 100e6)):
        target = f"≥ {wanted:.1%} at ≤ {macs / 1e6:g} M MACs"
        if name not in points:
            yield Row(f'operating point "{name}"', target)
            continue
        accuracy, cost = points[name]["accuracy"], points[name]["mean_macs"]
        misses = [f"{100 * (accuracy - wanted):+.2f} points"] * (accuracy < wanted)
        misses += [f"{(cost - macs) / 1e6:+.1f} M MACs"] * (cost > macs)
        measured = f"{accuracy:.2%} at {cost / 1e6:.1f} M"
        yield Row(f'operating point "{name}"', target, "", measured, ", ".join(misses) or "pass")


def target_table(results: Results) -> Table:
    """Every target with its measurement and verdict."""
    table = Table(title="Targets, ratios of speeds in the same run", title_justify="left")
    for column in ("work", "target", "measured", "verdict", "beside"):
        table.add_column(column, overflow="fold")
    for row in target_rows(results):
        table.add_row(row.work, row.wanted, row.measured, row.verdict, row.beside)
    return table
