"""The harness of the comparisons: wrong answers are refused, every target is shown, nothing is dropped."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import fastcascade as fc
from fastcascade.benchmarking.pacing import PATTERNS
from fastcascade.testing.oracle import balanced_thresholds
from fastcascade.types import Combine

sys.path.append(str(Path(__file__).parents[2]))  # at the end: fastcascade itself stays the installed one

from bench import serving, tables, targets
from bench.cases import Case, Reference, noise
from bench.engines import OURS, engines_for, left_out
from bench.handmade import PeerCascade
from bench.machine import ROOT
from bench.measure import Engine, Timing, Worker, check, measure
from bench.paced import measure_paced
from bench.peers import PEERS, WHOLE, Peer, Schedule, make_peer
from bench.stored import PEAK, beside, beside_table
from bench.targets import TRAINING, Row, at_least, target_rows
from bench.worker import PeerCascadeSubject


@pytest.fixture
def expected() -> Reference:
    logits = np.random.default_rng(0).standard_normal((200, 10)).astype(np.float32)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    margin = np.full(200, 1.0)
    margin[:2] = 1e-5
    return Reference(log_probs, np.arange(200) % 3, margin, 1.0)


def answers(expected: Reference) -> dict[str, np.ndarray]:
    log_probs = expected.log_probs.copy()
    return {"log_probs": log_probs, "labels": log_probs.argmax(1), "exits": expected.exits.copy()}


def test_equal_answers_pass(expected: Reference) -> None:
    gate = check(answers(expected), expected, 1e-4)
    assert gate.max_error < 1e-6
    assert gate.flips == 0


def test_a_wrong_row_is_refused(expected: Reference) -> None:
    wrong = answers(expected)
    wrong["log_probs"][17, 3] += 0.01
    with pytest.raises(RuntimeError, match=r"differ from torch's by 0\.00.*allowed: 0\.0001"):
        check(wrong, expected, 1e-4)


def test_a_wrong_label_is_refused_unless_two_classes_tie(expected: Reference) -> None:
    wrong = answers(expected)
    wrong["labels"][17] = (wrong["labels"][17] + 1) % 10
    with pytest.raises(RuntimeError, match="1 of 200 labels differ"):
        check(wrong, expected, 1e-4)
    first, second = np.argsort(-expected.log_probs[17])[:2]
    expected.log_probs[17, second] = expected.log_probs[17, first]
    tied = answers(expected)
    tied["labels"][17] = second
    check(tied, expected, 1.0)


def test_missing_rows_are_refused(expected: Reference) -> None:
    wrong = {name: rows[:-1] for name, rows in answers(expected).items()}
    with pytest.raises(RuntimeError, match="199 results for 200"):
        check(wrong, expected, 1e-4)


def test_answers_that_are_not_numbers_are_refused(expected: Reference) -> None:
    wrong = answers(expected)
    wrong["log_probs"][5] = np.nan
    with pytest.raises(RuntimeError, match="differ from torch's by nan"):
        check(wrong, expected, 1e-4)


def test_an_exit_may_flip_at_its_threshold_only(expected: Reference) -> None:
    near, far = answers(expected), answers(expected)
    near["exits"][0] += 1
    assert check(near, expected, 1e-4).flips == 1 / 200
    far["exits"][50] += 1
    with pytest.raises(RuntimeError, match="leave at another exit"):
        check(far, expected, 1e-4)


def timing(images_per_s: float) -> dict[str, Any]:
    return Timing("", "whole batch", tuple(r / images_per_s for r in (1.0, 1.01, 0.99))).as_json()


def results(**engines: dict[str, Any]) -> dict[str, Any]:
    return {"cases": {"resnet_cifar:20 batch 256 threads 2": {"engines": engines}}, "facts": {}}


def find(rows: list[Row], work: str) -> Row:
    return next(row for row in rows if row.work == work)


def test_the_fastest_peer_is_the_measure() -> None:
    rows = target_rows(results(fastcascade=timing(300), eager=timing(10), ncnn=timing(100)))
    row = find(rows, "ResNet-20, batch 256: best fp32 peer")
    assert (row.beside, row.verdict) == ("ncnn", "pass")
    assert row.measured.startswith("3.00×")


def test_a_missed_target_shows_its_distance() -> None:
    row = find(
        target_rows(results(fastcascade=timing(200), ncnn=timing(100))),
        "ResNet-20, batch 256: best fp32 peer",
    )
    assert row.verdict == "80% of it"


@pytest.mark.parametrize(
    ("value", "interval", "verdict"),
    [
        (2.6, (2.51, 2.7), "pass"),
        (2.6, (2.4, 2.8), "pass, within the noise"),
        (2.4, (2.3, 2.6), "96% of it, within the noise"),
        (2.4, (2.3, 2.49), "96% of it"),
    ],
)
def test_passes_and_misses_within_the_noise_get_the_same_words(
    value: float, interval: tuple[float, float], verdict: str
) -> None:
    assert at_least(2.5, value, interval, f"{value / 2.5:.0%} of it") == verdict


def test_a_refused_peer_is_named() -> None:
    refused = {"engine": "OpenVINO", "refused": "package openvino is not installed"}
    rows = target_rows(results(fastcascade=timing(300), ncnn=timing(100), OpenVINO=refused))
    assert find(rows, "ResNet-20, batch 256: best fp32 peer").beside == "ncnn (refused: OpenVINO)"
    rows = target_rows(results(fastcascade=timing(300), OpenVINO=refused))
    assert find(rows, "ResNet-20, batch 256: best fp32 peer").verdict == "refused: OpenVINO"


def test_every_target_is_shown_when_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "TRAINING", Path("nowhere"))
    rows = target_rows({"cases": {}, "facts": {}})
    assert {row.verdict for row in rows} == {"not measured"}
    assert len({row.work for row in rows}) == len(rows)
    text = "\n".join(f"{row.work} {row.wanted}" for row in rows)
    for depth in (20, 56, 110):
        for batch in (256, 8, 1):
            assert f"ResNet-{depth}, batch {batch}: best fp32 peer" in text
    for word in (
        "bf16",
        "latency mode",
        "AVX2",
        "hand-written",
        "≥ 20×",
        "schedule efficiency",
        "two threads over one",
        "≥ 1.9×",
        "logit error",
        "≤ 8 MiB",
        "≥ 94.6 %",
    ):
        assert word in text


def test_a_fact_that_could_not_be_measured_says_why() -> None:
    failed = {"refused": "it broke\ntraceback"}
    facts = {"schedule": failed, "errors": {"cascade": failed}, "memory": {"cascade": failed}}
    rows = target_rows({"cases": {}, "facts": facts})
    assert sum(row.verdict == "refused: it broke" for row in rows) == 3 + 2 + 1


def test_few_batches_prove_no_efficiency() -> None:
    batch = {"batch": 256, "schedule_efficiency": {"median": 0.99, "low": 0.98, "high": 1.0}}
    for count, verdict in ((64, "pass"), (63, "only 63 of 64 different batches")):
        facts = {"schedule": {"batches": [batch | {"batches": count, "batch": b} for b in (8, 64, 256)]}}
        row = find(target_rows({"cases": {}, "facts": facts}), "cascade, batch 256: schedule efficiency")
        assert row.verdict == verdict


def test_labels_that_differ_fail_whatever_the_error() -> None:
    stage = {
        "torch": 1e-6,
        "direct": 1e-6,
        "winograd": 3e-6,
        "labels_seen": 10,
        "direct_labels_differ": 0,
        "winograd_labels_differ": 1,
    }
    rows = target_rows({"cases": {}, "facts": {"errors": {"cascade": {"images": 9, "stages": [stage]}}}})
    assert find(rows, "cascade: largest logit error, direct kernels").verdict == "pass"
    assert "1 labels differ" in find(rows, "cascade: largest logit error, winograd kernels").verdict


def test_training_targets_are_read_from_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = {"operating_point": "fast", "accuracy": 0.915, "mean_macs": 21e6}
    path = tmp_path / TRAINING.name
    path.write_text(json.dumps({"last_network": 0.95, "operating_points": [point]}))
    monkeypatch.setattr(targets, "TRAINING", path)
    rows = target_rows({"cases": {}, "facts": {}})
    assert find(rows, "last network alone, accuracy").verdict == "pass"
    assert find(rows, 'operating point "fast"').verdict == "-0.50 points, +1.0 M MACs"


def full_results() -> dict[str, Any]:
    refused = {"engine": "OpenVINO", "refused": "package openvino is not installed\nmore"}
    engines = {
        "fastcascade": timing(300),
        "ncnn": timing(100),
        "OpenVINO bf16": timing(450),
        "OpenVINO": refused,
    }
    entry = {
        "engines": {name: row | {"engine": name} for name, row in engines.items()},
        "peaks": {"threads": 2.0, "fp32_avx2_gflops": 100.0},
        "when": "2026-01-01",
    }
    for row in entry["engines"].values():  # type: ignore[attr-defined]
        row.setdefault("gate", {"max_error": 1e-5, "flips": 0.0})
        if row["gate"] is None:
            row["gate"] = {"max_error": 1e-5, "flips": 0.0}
    machine = {
        "cpu": "Some CPU",
        "threads": 2,
        "flags": ["avx2"],
        "platform": "Linux",
        "packages": {"torch": "2"},
    }
    return {"machine": machine, "cases": {"resnet_cifar:20 batch 256 threads 2": entry}, "facts": {}}


def test_every_table_has_its_place_in_a_document() -> None:
    text = "".join(document.read_text() for document in tables.DOCUMENTS)
    assert set(re.findall(r"<!-- table: (\S+) -->", text)) == set(tables.TABLES)


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_hold_the_figures_of_a_stored_run(document: Path) -> None:
    text = document.read_text()
    stored = [json.loads(path.read_text()) for path in (ROOT / "bench" / "results").glob("*.json")]
    assert text in [tables.write_tables(text, run) for run in stored], "make bench-docs writes its tables"


def test_a_document_gets_its_tables_and_nothing_else_changes() -> None:
    text = tables.DOCUMENTS[0].read_text()
    written = tables.write_tables(text, full_results())
    assert "| ResNet-20, batch 256 | fastcascade | 300 |" in written
    assert "refused: package openvino is not installed |" in written
    assert "| ResNet-20, batch 256 | OpenVINO bf16 | 1.50× |" in written
    assert tables.write_tables(written, full_results()) == written
    kept = re.compile(r"(<!-- table: \S+ -->).*?<!-- end -->", re.DOTALL)
    assert kept.sub(r"\1", written) == kept.sub(r"\1", text)


def paced(**medians: float) -> dict[str, Any]:
    """Latencies of engines whose calls after a pause take 1.5 times those of a loop."""

    def latency(p50: float) -> dict[str, float]:
        return {"p50": p50, "p95": 1.2 * p50, "p99": 1.4 * p50}

    engines = {
        name: {p.name: latency(p50 * (1.5 if p.pause_s or p.after_torch else 1)) for p in PATTERNS}
        for name, p50 in medians.items()
    }
    return {"network": "resnet_cifar:20", "calls": 140, "engines": engines}


def test_calls_after_a_pause_are_held_against_the_loop_and_the_best_peer() -> None:
    found = paced(fastcascade=1.0, ncnn=3.0, OpenVINO=2.0)
    found["engines"]["ONNX Runtime"] = {"refused": "no package"}
    rows = target_rows({"cases": {}, "facts": {}, "paced": found})
    verdicts = {row.work: row.verdict for row in rows if "8 images after" in row.work}
    assert verdicts == {
        "ResNet-20, 8 images after 1 ms: median": "1.36 times too long",
        "ResNet-20, 8 images after 30 ms: median": "pass",
        "ResNet-20, 8 images after torch: median": "1.15 times too long",
        "ResNet-20, 8 images after 1 ms: p99": "pass",
        "ResNet-20, 8 images after 30 ms: p99": "pass",
        "ResNet-20, 8 images after torch: p99": "pass",
        "ResNet-20, 8 images after 30 ms: best fp32 peer": "pass",
    }
    assert find(rows, "ResNet-20, 8 images after 30 ms: best fp32 peer").beside == "OpenVINO"
    text = tables.paced_table({"paced": found})
    assert "| after 30 ms | 1.50 / 1.80 / 2.10 | 4.50 / 5.40 / 6.30 | 3.00 / 3.60 / 4.20 |" in text
    assert "Refused: ONNX Runtime." in text


def test_engines_are_paced_in_turns() -> None:
    found = measure_paced(1, rounds=2, engines=[Engine("own", OURS), Engine("eager", "eager")], calls=2)
    assert found["calls"] == 4
    assert set(found["engines"]) == {"own", "eager"}
    for patterns in found["engines"].values():
        assert set(patterns) == {pattern.name for pattern in PATTERNS}
        assert all(0 < latency["p50"] <= latency["p99"] for latency in patterns.values())


def answered(label: int) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(SimpleNamespace(label=np.array([label])))
    return future


def test_requests_with_the_result_of_another_are_counted() -> None:
    images, labels = noise(4), np.array([0, 1, 2, 3])
    order = iter(range(1000))
    trial = serving.offer(lambda x: answered(next(order) % 4), images, labels, 1000.0, 0.04)
    assert trial.wrong == 0
    assert 0 < trial.latency_ms["p50"] <= trial.latency_ms["p99"]
    trial = serving.offer(lambda x: answered(2), images, labels, 1000.0, 0.04)
    assert trial.wrong == 30
    with pytest.raises(RuntimeError, match="wrong results at 50 requests/s"):
        serving.highest_rate(lambda x: answered(2), images, labels, 50.0, 0.1)


@pytest.mark.parametrize("limit", [210.0, 2000.0])
def test_the_highest_rate_within_the_bound_is_found(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def offer(submit: object, images: object, labels: object, rate: float, seconds: float) -> serving.Trial:
        return serving.Trial(rate, rate, {"p50": 1.0, "p99": 5.0 if rate <= limit else 500.0}, 0)

    monkeypatch.setattr(serving, "offer", offer)
    best = serving.highest_rate(lambda x: answered(0), noise(1), np.zeros(1), 50.0, 0.1)
    assert best is not None
    assert limit / 1.3 < best.achieved <= limit


def run_at(speed: float, gain: float = 1.0) -> dict[str, Any]:
    """The cases of a run on a machine of some speed, on which our engine has become faster by ``gain``."""
    engines = {"fastcascade": timing(300 * speed * gain), "ncnn": timing(100 * speed)}
    entry = {"engines": engines, "peaks": {"threads": 2.0, "fp32_avx2_gflops": 50.0 * speed}}
    return {"resnet_cifar:20 batch 8 threads 2": entry}


@pytest.mark.parametrize("baseline", [PEAK, "ncnn"])
def test_a_stored_run_is_compared_through_its_own_baseline(baseline: str) -> None:
    (row,) = beside(run_at(0.5, gain=1.2), run_at(2.0), baseline)
    assert row.baseline == pytest.approx(0.25)
    assert row.ratio == pytest.approx(1.2)
    assert (row.then, row.now) == (pytest.approx(600), pytest.approx(180))


def test_without_a_common_baseline_nothing_is_claimed() -> None:
    rows = beside(run_at(1.0), run_at(2.0), "OpenVINO")
    assert [row.ratio for row in rows] == [None]
    assert beside(run_at(1.0), {}) == []


def test_a_comparison_with_a_stored_run_is_marked_as_indicative() -> None:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    for baseline in (PEAK, "OpenVINO"):
        console.print(beside_table(beside(run_at(1.0), run_at(2.0), baseline), "old.json", baseline))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("INDICATIVE: now over old.json, scaled by the") == 2
    assert "≈ 1.00×" in text
    assert "no baseline" in text


def test_every_peer_is_measured_or_named_as_left_out() -> None:
    for model in ("resnet_cifar:20", "resnet_cifar:110", "cascade:model"):
        for batch in (1, 8, 256):
            case = Case(model, batch, 2)
            measured = {engine.name for engine in engines_for(case, everyone=False)}
            assert {peer.name for peer in PEERS} <= measured | set(left_out(case, everyone=False))


@pytest.mark.parametrize("name", ["eager", "eager channels_last"])
@pytest.mark.parametrize(
    "schedule",
    [Schedule(1, 5), Schedule(2, 2), Schedule(2, 2, "dynamic"), Schedule(2, 4, "ladder"), Schedule(1, 2)],
)
def test_cutting_a_batch_changes_no_answer(name: str, schedule: Schedule) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    peer = make_peer(name)
    peer.build(network, (3, 32, 32), 2)
    x = noise(5)
    whole = peer.run(x, Schedule(1, 5))
    np.testing.assert_allclose(peer.run(x, schedule), whole, atol=1e-5)
    assert whole.shape == (5, 4)


class CountingPeer(Peer):
    """Classifies by nothing; counts its networks, and is slow where a shape is new."""

    fixes_rows = True

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[int | None] = []
        self.last = 0

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        pass

    def load(self, threads: int, rows: int | None) -> Callable[[np.ndarray], np.ndarray]:
        self.loaded.append(rows)

        def forward(x: np.ndarray) -> np.ndarray:
            assert rows in (None, len(x))
            time.sleep(2e-3 if rows is not None else 1e-3 if len(x) == self.last else 2e-2)
            self.last = len(x)
            return np.zeros((len(x), 2), np.float32)

        return forward


def test_streams_share_one_network_for_every_number_of_rows() -> None:
    peer = CountingPeer()
    peer.build(nn.Identity(), (1, 1, 1), 2)
    assert peer.run(np.zeros((11, 1, 1, 1), np.float32), Schedule(2, 4, "ladder")).shape == (11, 2)
    assert sorted(filter(None, peer.loaded)) == [3, 4]  # 4 + 4 + 3
    peer.run(np.zeros((11, 1, 1, 1), np.float32), Schedule(2, 4, "fixed"))
    assert len(peer.loaded) == 2


def test_a_cascade_is_tuned_on_numbers_of_rows_that_change() -> None:
    """A network for any shape is the fastest where the shape stays, and the slowest where it changes."""
    peer = CountingPeer()
    peer.build(nn.Identity(), (1, 1, 1), 2)
    candidates = [Schedule(1, WHOLE, "dynamic"), Schedule(1, WHOLE, "ladder")]
    subject = PeerCascadeSubject.__new__(PeerCascadeSubject)
    survivors = iter([3, 5, 3, 6])
    subject.schedules = None
    subject.stages = 1
    subject.cascade = SimpleNamespace(  # type: ignore[assignment]
        peers=[peer],
        schedules=lambda k, count: candidates,
        run=lambda x, schedules: (None, np.arange(8) - 8 + next(survivors)),
    )
    assert subject.tune([np.zeros((8, 1, 1, 1), np.float32)] * 4, 0.05) == "whole batch, ladder"


@pytest.mark.parametrize("name", ["ONNX Runtime", "OpenVINO"])
def test_runtimes_are_tried_with_known_shapes_and_on_one_stream(name: str) -> None:
    peer = next(p for p in PEERS if p.name == name)()
    peer.threads = 2
    cascade = PeerCascade.__new__(PeerCascade)
    cascade.peers = [peer, peer]
    tried = set(cascade.schedules(1, 100))
    assert {Schedule(1, WHOLE, "ladder"), Schedule(1, WHOLE, "dynamic"), Schedule(1, 16)} <= tried
    assert {Schedule(2, 16, shape) for shape in ("fixed", "ladder", "dynamic")} <= tried
    assert {schedule.shapes for schedule in cascade.schedules(0, 256)} == {"fixed"}


@pytest.mark.parametrize("combine", ["last", "mean", (0.2, 0.5, 1.0)])
def test_the_hand_written_cascade_answers_as_the_cascade(combine: Combine) -> None:
    torch.manual_seed(0)
    networks = [
        nn.Sequential(
            nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
        )
        for width in (2, 4, 8)
    ]
    cascade = fc.Cascade(networks, fc.MLPSelector(), 5, (3, 8, 8), combine=combine).eval()
    cascade.temperatures.copy_(torch.tensor([0.5, 1.0, 2.0]))
    x = torch.randn(60, 3, 8, 8)
    thresholds = balanced_thresholds(cascade, x)
    expected = cascade(x, thresholds)
    assert len(expected.exit_stage.unique()) == 3
    by_hand = PeerCascade("eager", cascade, thresholds.numpy(), 2)
    schedules = (Schedule(1, WHOLE, "dynamic"), Schedule(2, 4), Schedule(2, 32, "ladder"))
    log_probs, exits = by_hand.run(x.numpy(), schedules)
    np.testing.assert_array_equal(exits, expected.exit_stage.numpy())
    np.testing.assert_allclose(log_probs, expected.probs.log().numpy(), atol=1e-4)


@pytest.mark.slow
def test_an_engine_that_fails_is_refused_and_the_others_are_timed() -> None:
    case = Case("resnet_cifar:8", 4, 1)
    engines = [Engine(OURS, OURS), Engine("broken", OURS), Engine("inexact", OURS, tolerance=0.0)]
    workers = [Worker(engine, 1) for engine in engines]
    try:
        for worker in workers:
            worker.load(case.model)
        workers[1].process.kill()
        timed, *refused = measure(case, workers, noise(4), rounds=2, seconds=0.001, tuning=0)
    finally:
        for worker in workers:
            worker.__exit__(None, None, None)
    assert (timed.engine, len(timed.seconds)) == (OURS, 2)
    reasons = {timing.engine: timing.refused or "" for timing in refused}
    assert "its process ended" in reasons["broken"]
    assert "allowed: 0" in reasons["inexact"]
