"""Batcher: every request gets its own rows, whatever happens to the others."""

from __future__ import annotations

import asyncio
import gc
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from forked import exit_code_of
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.engine import CompiledCascade
from fastcascade.errors import FastCascadeError, InvalidArgument, Overloaded, RequestTimeout
from fastcascade.model.resnet import resnet_cifar
from fastcascade.types import CascadeOutput, OperatingPoint

SHAPE = (3, 8, 8)
EARLY, LATE = [float("-inf")], [float("inf")]


@pytest.fixture(scope="module")
def model() -> CompiledCascade:
    torch.manual_seed(1)
    stages = [resnet_cifar(8, num_classes=3), resnet_cifar(8, num_classes=3)]
    normalize = fc.Normalize((0.5,) * 3, (0.2,) * 3)
    cascade = fc.Cascade(stages, fc.ThresholdSelector("margin"), 3, SHAPE, preprocess=normalize)
    with torch.no_grad():
        scores = cascade.eval().all_exits(torch.randn(64, *SHAPE))[1][0]
    point = OperatingPoint("default", (float(scores.median()),), {}, None, 0.0, (0.5, 0.5), 64)
    cascade.operating_points["default"] = point
    return fc.compile(cascade, threads=1)


@pytest.fixture
def gate(model: CompiledCascade, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The model's program behind a gate, which the test opens."""
    gate = Gate(model.program.run)
    monkeypatch.setattr(model.program, "run", gate.run)
    yield gate
    gate.open.set()


class Gate:
    """A call that waits until it may go on, and notes the sizes of its batches."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.open, self.entered = call, threading.Event(), threading.Event()
        self.sizes: list[int] = []

    def run(self, x: Tensor, thresholds: Tensor) -> Any:
        self.sizes.append(len(x))
        self.entered.set()
        assert self.open.wait(30)
        return self.call(x, thresholds)

    def occupy(self, batcher: fc.Batcher) -> Any:
        """Start a call that waits at the gate, so that later requests queue up."""
        first = batcher.submit(torch.zeros(1, *SHAPE))
        assert self.entered.wait(30)
        return first


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def assert_same(rows: Any, expected: Any) -> None:
    assert isinstance(rows, CascadeOutput)
    for own, theirs in zip(rows, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=0, equal_nan=True)


# ---- results ----


def test_requests_of_all_sizes_get_their_own_rows(model: CompiledCascade, gate: Gate) -> None:
    requests = [images(n, seed) for seed, n in enumerate([1, 3, 0, 16, 7, 1])]
    with fc.Batcher(model, max_batch=32) as batcher:
        gate.occupy(batcher)
        futures = [batcher.submit(x) for x in requests]
        gate.open.set()
        for x, future in zip(requests, futures, strict=True):
            assert_same(future.result(30), model(x))
        assert gate.sizes[:2] == [1, 28]
        stats = batcher.stats
    assert (stats.requests, stats.images, stats.batches) == (7, 29, 2)
    assert stats.mean_batch == 14.5
    assert 0 <= stats.wait_ms["p50"] <= stats.wait_ms["p99"]


def test_one_image_needs_no_batch_dimension(model: CompiledCascade) -> None:
    x = images(1)
    with fc.Batcher(model) as batcher:
        assert_same(batcher.submit(x[0]).result(30), model(x))


def test_every_request_has_its_own_operating_point_and_dtype(model: CompiledCascade, gate: Gate) -> None:
    bytes_ = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    asked = [
        (images(4), None),
        (images(3), EARLY),
        (bytes_, LATE),
        (images(5), LATE),
        (images(2), "default"),
        (images(2).double(), LATE),
    ]
    with fc.Batcher(model) as batcher:
        gate.occupy(batcher)
        futures = [batcher.submit(x, point) for x, point in asked]
        gate.open.set()
        results = [future.result(30) for future in futures]
    assert sorted(gate.sizes) == [1, 2, 3, 6, 7]  # None is "default"; float64 joins float32
    for (x, point), result in zip(asked, results, strict=True):
        assert_same(result, model(x, point))


def test_log_probs(model: CompiledCascade) -> None:
    compiled = fc.compile(model.plan, threads=1, output="log_probs")
    with fc.Batcher(compiled) as batcher:
        futures = [batcher.submit(images(n, n)) for n in (1, 2)]
        for n, future in zip((1, 2), futures, strict=True):
            torch.testing.assert_close(future.result(30), compiled(images(n, n)), rtol=0, atol=0)


def test_rows_do_not_hold_the_rows_of_others(model: CompiledCascade, gate: Gate) -> None:
    with fc.Batcher(model) as batcher:
        gate.occupy(batcher)
        futures = [batcher.submit(images(1, i)) for i in range(64)]
        gate.open.set()
        out = futures[5].result(30)
    assert isinstance(out, CascadeOutput)
    assert out.probs.untyped_storage().nbytes() == out.probs.nbytes
    assert len(pickle.dumps(tuple(out))) < 4000


def test_many_threads_lose_double_and_mix_up_nothing(model: CompiledCascade) -> None:
    x = images(400)
    expected = model(x)
    sizes = [1 + i % 3 for i in range(400)]
    begins = [int(b) for b in np.random.default_rng(0).integers(0, 397, 400)]

    with fc.Batcher(model, max_batch=16, max_waiting=64, max_delay_ms=0.5) as batcher:

        def ask(i: int) -> Any:
            return batcher.submit(x[begins[i] : begins[i] + sizes[i]], block=True).result(60)

        with ThreadPoolExecutor(16) as pool:
            for i, rows in enumerate(pool.map(ask, range(400))):
                assert_same(rows, [column[begins[i] : begins[i] + sizes[i]] for column in expected])
        assert batcher.stats.requests == 400
        assert batcher.stats.images == sum(sizes)


# ---- asyncio ----


def test_asyncio_tasks_await_their_rows(model: CompiledCascade) -> None:
    x = images(200)
    expected = model(x)

    async def ask(batcher: fc.Batcher, i: int) -> Any:
        return await batcher.submit(x[i])

    async def ask_all() -> list[Any]:
        with fc.Batcher(model) as batcher:
            return await asyncio.gather(*(ask(batcher, i) for i in range(200)))

    for i, rows in enumerate(asyncio.run(ask_all())):
        assert_same(rows, [column[i : i + 1] for column in expected])


def test_a_cancelled_task_costs_nothing(model: CompiledCascade, gate: Gate) -> None:
    async def ask(batcher: fc.Batcher) -> None:
        waiting = batcher.submit(images(5))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(waiting, 0.05)
        assert waiting.cancelled()
        assert batcher.stats.waiting == 0

    with fc.Batcher(model) as batcher:
        gate.occupy(batcher)
        asyncio.run(ask(batcher))
        gate.open.set()
        batcher.submit(images(2)).result(30)
        assert batcher.stats.dropped == 1
    assert gate.sizes == [1, 2]


# ---- requests that are not run ----


def test_cancelled_requests_leave_the_queue_at_once(model: CompiledCascade, gate: Gate) -> None:
    with fc.Batcher(model, max_batch=4, max_waiting=4) as batcher:
        running = gate.occupy(batcher)
        waiting = [batcher.submit(images(1, i)) for i in range(4)]
        with pytest.raises(Overloaded):
            batcher.submit(images(1))
        assert waiting[1].cancel()
        assert waiting[1].cancel()  # again changes nothing
        assert not running.cancel()
        waiting.append(batcher.submit(images(1, 4)))
        gate.open.set()
        for i in (0, 2, 3, 4):
            assert_same(waiting[i].result(30), model(images(1, i)))
        with pytest.raises(CancelledError):
            waiting[1].result(30)
        stats = batcher.stats
    assert (stats.requests, stats.dropped, stats.rejected, stats.waiting) == (5, 1, 1, 0)


def test_timed_out_requests_are_not_run(model: CompiledCascade, gate: Gate) -> None:
    with fc.Batcher(model) as batcher:
        gate.occupy(batcher)
        late = batcher.submit(images(3), timeout_s=0.01)
        patient = batcher.submit(images(2), timeout_s=60)
        time.sleep(0.02)
        gate.open.set()
        with pytest.raises(RequestTimeout, match="waited longer"):
            late.result(30)
        assert_same(patient.result(30), model(images(2)))
        assert gate.sizes[:2] == [1, 2]
        assert batcher.stats.dropped == 1


def test_a_full_queue_rejects_or_blocks(model: CompiledCascade, gate: Gate) -> None:
    with fc.Batcher(model, max_batch=4, max_waiting=4) as batcher, ThreadPoolExecutor(1) as pool:
        gate.occupy(batcher)
        batcher.submit(images(3))
        with pytest.raises(Overloaded, match=r"3 images are waiting.*no room for 2 more"):
            batcher.submit(images(2))
        with pytest.raises(RequestTimeout, match="no room"):
            batcher.submit(images(2), timeout_s=0.01, block=True)
        blocked = pool.submit(lambda: batcher.submit(images(2), block=True).result(30))
        time.sleep(0.02)
        assert not blocked.done()
        gate.open.set()
        assert_same(blocked.result(30), model(images(2)))
        assert batcher.stats.rejected == 2


# ---- requests that are wrong ----


@pytest.mark.parametrize(
    ("wrong", "point", "message"),
    [
        (torch.zeros(2, 3, 9, 8), None, r"\(2, 3, 9, 8\)"),
        (torch.zeros(8, 8), None, r"\(8, 8\)"),
        ([1, 2], None, "list"),
        (torch.zeros(1, *SHAPE, dtype=torch.int32), None, "int32"),
        (torch.zeros(9, *SHAPE), None, "at most max_batch=8"),
        (torch.zeros(1, *SHAPE), "unknown", "unknown operating point"),
        (torch.zeros(1, *SHAPE), [float("nan")], "NaN"),
    ],
)
def test_wrong_requests_raise_at_once(model: CompiledCascade, wrong: Any, point: Any, message: str) -> None:
    with fc.Batcher(model, max_batch=8) as batcher:
        good = batcher.submit(images(2))
        with pytest.raises(InvalidArgument, match=message):
            batcher.submit(wrong, point)
        assert_same(good.result(30), model(images(2)))


def test_not_a_number_harms_only_its_own_row(model: CompiledCascade, gate: Gate) -> None:
    broken = images(2)
    broken[1, 0, 3, 3] = float("nan")
    with fc.Batcher(model) as batcher:
        gate.occupy(batcher)
        futures = [batcher.submit(x) for x in (images(3, 1), broken, images(3, 2))]
        gate.open.set()
        for x, future in zip((images(3, 1), broken, images(3, 2)), futures, strict=True):
            assert_same(future.result(30), model(x))
    assert futures[1].result().label[1] == -1


class Refusing(nn.Module):
    """A network of the user's that raises for a certain image."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x[:, 0, 0, 0] == 7).any()):
            raise RuntimeError("seven")
        return x.mean((2, 3))


@pytest.mark.filterwarnings("ignore")
def test_an_error_of_the_model_reaches_only_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = fc.Stage(Refusing(), macs=1)
    model = fc.compile(fc.Cascade([stage], None, 3, SHAPE), backend="reference")
    gate = Gate(model.program.run)
    monkeypatch.setattr(model.program, "run", gate.run)
    bad = images(1)
    bad[0, 0, 0, 0] = 7
    with fc.Batcher(model) as batcher:
        gate.occupy(batcher)
        futures = [batcher.submit(x) for x in (images(2, 1), bad, images(2, 2))]
        gate.open.set()
        with pytest.raises(RuntimeError, match="seven"):
            futures[1].result(30)
        for seed, future in ((1, futures[0]), (2, futures[2])):
            assert_same(future.result(30), model(images(2, seed)))
        assert (batcher.stats.failed, batcher.stats.requests) == (1, 3)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_batch": 0},
        {"max_batch": 8, "max_waiting": 7},
        {"max_delay_ms": -1},
        {"max_delay_ms": float("nan")},
    ],
)
def test_limits_out_of_range(model: CompiledCascade, limits: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="1 ≤ max_batch ≤ max_waiting"):
        fc.Batcher(model, **limits)


def test_only_compiled_cascades() -> None:
    with pytest.raises(InvalidArgument, match="expected a compiled cascade"):
        fc.Batcher(nn.Identity())  # type: ignore[arg-type]


# ---- the end ----


def test_close_finishes_what_waits(model: CompiledCascade, gate: Gate) -> None:
    batcher = fc.Batcher(model, max_delay_ms=60_000)
    gate.open.set()
    futures = [batcher.submit(images(1, i)) for i in range(5)]
    batcher.close()
    for i, future in enumerate(futures):
        assert_same(future.result(0), model(images(1, i)))
    with pytest.raises(FastCascadeError, match="closed"):
        batcher.submit(images(1))
    batcher.close()


def test_close_can_discard_what_waits_and_wakes_who_blocks(model: CompiledCascade, gate: Gate) -> None:
    batcher = fc.Batcher(model, max_batch=2, max_waiting=2)
    with ThreadPoolExecutor(2) as pool:
        running = gate.occupy(batcher)
        waiting = batcher.submit(images(2))
        blocked = pool.submit(lambda: batcher.submit(images(1), block=True))
        time.sleep(0.02)
        closing = pool.submit(batcher.close, discard=True)
        with pytest.raises(CancelledError):
            waiting.result(30)
        with pytest.raises(FastCascadeError, match="closed"):
            blocked.result(30)
        gate.open.set()
        closing.result(30)
    assert_same(running.result(0), model(torch.zeros(1, *SHAPE)))


def test_a_callback_may_submit_and_close(model: CompiledCascade) -> None:
    batcher = fc.Batcher(model)
    second: list[Any] = []

    def go_on(_: object) -> None:
        second.append(batcher.submit(images(2)))
        batcher.close()

    batcher.submit(images(1)).add_done_callback(go_on)
    batcher._thread.join(30)
    assert_same(second[0].result(30), model(images(2)))


def test_a_forgotten_batcher_ends_its_thread_and_its_requests(model: CompiledCascade) -> None:
    batcher = fc.Batcher(model, max_delay_ms=60_000)
    thread, future = batcher._thread, batcher.submit(images(1))
    del batcher
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    assert_same(future.result(0), model(images(1)))


def test_garbage_collection_on_the_batchers_own_thread_closes_it(
    model: CompiledCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: while that thread holds the queue's lock."""
    batcher = fc.Batcher(model)
    thread, queue = batcher._thread, batcher._queue
    batcher.submit(images(1)).result(30)
    cycle: list[Any] = [batcher]
    cycle.append(cycle)
    cut = queue._cut_batch

    def collect(*arguments: Any) -> Any:
        gc.collect()
        return cut(*arguments)

    monkeypatch.setattr(queue, "_cut_batch", collect)
    gc.disable()
    try:
        future = batcher.submit(images(2))
        del batcher, cycle
        assert_same(future.result(30), model(images(2)))
    finally:
        gc.enable()
    thread.join(30)
    assert not thread.is_alive()


def test_waits_of_any_length(model: CompiledCascade) -> None:
    with fc.Batcher(model, max_batch=2, max_delay_ms=1e300) as batcher:
        futures = [batcher.submit(images(1), timeout_s=float("inf"), block=True) for _ in range(2)]
        assert all(len(future.result(30).probs) == 1 for future in futures)


def test_a_process_ends_with_an_open_batcher() -> None:
    code = (
        "import fastcascade as fc, torch\n"
        "from fastcascade.model.resnet import resnet_cifar\n"
        "fast = fc.compile(fc.Cascade([resnet_cifar(8)], None, 10, (3, 32, 32)))\n"
        "batcher = fc.Batcher(fast, max_delay_ms=50)\n"
        "future = batcher.submit(torch.zeros(3, 32, 32))\n"
        "future.add_done_callback(lambda f: print('done', len(f.result().label), flush=True))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done 1\n"), done.stderr


def test_a_forked_child_is_told_and_may_have_its_own(model: CompiledCascade) -> None:
    with fc.Batcher(model) as batcher:
        batcher.submit(images(1)).result(30)

        def work() -> None:
            with pytest.raises(FastCascadeError, match="do not survive a fork"):
                batcher.submit(images(1))
            batcher.close()  # does nothing, and does not wait
            with fc.Batcher(model) as own:
                assert_same(own.submit(images(2)).result(30), model(images(2)))

        assert exit_code_of(work) == 0
