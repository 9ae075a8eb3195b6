"""Stages in torch, in chunks that a WHILE node repeats: the same outputs, without a readback of the count.

Without a GPU, the loop runs on the host around the real control and row kernels. The construction of the
graph is tested on a stand-in for the driver, and every name in use is checked against cuda-bindings.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from host_threads import HostLaunch, HostLoops
from readback import NoReadback
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends.gpu import torch_stage, while_loops
from fastcascade.backends.gpu.cuda import lower_with
from fastcascade.backends.gpu.scheduler import BreadthFirstProgram
from fastcascade.backends.gpu.while_loops import (
    LoopChoice,
    Loops,
    WhileNodes,
    choose_loops,
    unavailable_reason,
)
from fastcascade.backends.registry import load_backend
from fastcascade.errors import BackendUnavailable, FastCascadeError, InvalidArgument
from fastcascade.testing.networks import random_network

SHAPE = (3, 5, 4)
CHUNK = 4
CPU = torch.device("cpu")


def independent() -> fc.Cascade:
    """Three networks that read the image."""
    networks = [random_network(seed, input_shape=SHAPE) for seed in (11, 12, 13)]
    return fc.Cascade(
        networks, fc.ThresholdSelector("margin"), 5, SHAPE, preprocess=fc.Normalize((0.5,) * 3, (0.3,) * 3)
    )


def segments() -> fc.Cascade:
    """One backbone in three segments."""
    stages = []
    for k, (before, after) in enumerate([(3, 4), (4, 7), (7, 8)]):
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(after, 5))
        body = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU())
        stages.append(fc.Stage(body, head, input="previous" if k else "image"))
    return fc.Cascade(stages, fc.ThresholdSelector("margin"), 5, SHAPE)


@pytest.fixture
def loops(library: Path, few_threads: None, monkeypatch: pytest.MonkeyPatch) -> HostLoops:
    monkeypatch.setattr(torch_stage, "CHUNK", CHUNK)
    return HostLoops(library)


class Pair:
    """One cascade, in chunks and on the reference backend."""

    def __init__(self, cascade: fc.Cascade, loops: HostLoops, choice: LoopChoice | None = None) -> None:
        self.cascade, self.loops = cascade.eval(), loops
        plan = fc.plan(cascade)
        self.program: BreadthFirstProgram = lower_with(
            loops.launch, plan, "fp32", LoopChoice(loops, "") if choice is None else choice
        )
        self.reference = load_backend("reference").lower(plan, precision="fp32", device=CPU, threads=None)

    def agree(self, x: Tensor, thresholds: Tensor, guard: Any = None) -> list[int]:
        """Compare both; returns the number of rows that reached each stage after the first."""
        self.loops.repetitions.clear()
        with guard or NoReadback():
            got = self.program.run(x, thresholds)
        want = self.reference.run(x, thresholds)
        assert torch.equal(got.exit_stage, want.exit_stage)
        assert torch.equal(got.label, want.label)
        torch.testing.assert_close(got.log_probs, want.log_probs, atol=2e-4, rtol=2e-4)
        return [int((want.exit_stage >= k).sum()) for k in (1, 2)]


@torch.no_grad()
def leaving(cascade: fc.Cascade, x: Tensor, survivors: int) -> Tensor:
    """Thresholds at which this many rows survive the first exit, and half of those the second."""
    scores = cascade.all_exits(x)[1]
    first = scores[0].sort().values
    edges = torch.cat([first[:1] - 1, first, first[-1:] + 1])
    limit = edges[survivors : survivors + 2].mean()
    second = scores[1][scores[0] < limit]
    return torch.stack([limit, second.median() if len(second) else limit])


@pytest.mark.parametrize("shape", [independent, segments])
def test_any_number_of_rows_runs_without_a_readback(
    loops: HostLoops, shape: Callable[[], fc.Cascade]
) -> None:
    pair = Pair(shape(), loops)
    x = torch.randn(13, *SHAPE)
    for survivors in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 13):  # at 13, no row stops
        rows = pair.agree(x, leaving(pair.cascade, x, survivors))
        assert rows[0] == survivors
        assert loops.repetitions == [-(-n // CHUNK) for n in rows], "no more chunks than there are rows for"
    assert loops.recordings == 2, "once for each stage after the first"
    lines = [report.kernels[0].kernel for report in pair.program.describe()]
    assert all("a WHILE node repeats chunks" in line for line in lines)


@pytest.mark.parametrize("shape", [independent, segments])
def test_a_batch_that_does_not_fit_is_recorded_again(
    loops: HostLoops, shape: Callable[[], fc.Cascade]
) -> None:
    pair = Pair(shape(), loops)
    everyone = torch.full((2,), math.inf)
    recorded = []
    for n in (5, 1, 8, 9, 3):  # 5 is recorded with capacity 8
        pair.agree(torch.randn(n, *SHAPE), everyone)
        recorded.append(loops.recordings)
    assert recorded == [2, 2, 2, 4, 4]
    if shape is independent:
        pair.agree(torch.randint(256, (3, *SHAPE), dtype=torch.uint8), everyone)
        assert loops.recordings == 6
    strided = torch.randn(3, 5, 4, 3).permute(0, 3, 1, 2)
    pair.agree(strided, everyone)


def test_an_invalid_row_leaks_into_no_other_of_its_chunk(loops: HostLoops) -> None:
    pair = Pair(segments(), loops)
    x = torch.randn(6, *SHAPE)
    x[2, 0, 1, 1] = math.nan
    got = pair.program.run(x, torch.full((2,), math.inf))
    assert (got.label == -1).nonzero().flatten().tolist() == [2]


def test_every_thread_has_its_own_memory(loops: HostLoops) -> None:
    pair = Pair(segments(), loops)
    everyone = torch.full((2,), math.inf)
    batches = [torch.randn(6, *SHAPE) for _ in range(2)]
    wanted = [pair.reference.run(x, everyone) for x in batches]
    pair.program.run(batches[0], everyone)
    with ThreadPoolExecutor(1) as other:
        other.submit(pair.program.run, batches[1], everyone).result()
    assert loops.recordings == 4
    assert torch.allclose(pair.program.run(batches[0], everyone).log_probs, wanted[0].log_probs, atol=2e-4)


class Refusing(HostLoops):
    """Loops that refuse to record."""

    def __init__(self, library: Path, error: Exception) -> None:
        super().__init__(library)
        self.error = error

    def record(self, count: Tensor, chunk: Tensor, size: int, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        raise self.error


def test_a_stage_that_cannot_be_recorded_uses_the_readback(loops: HostLoops, library: Path) -> None:
    refusing = Refusing(library, RuntimeError("operation not permitted when stream is capturing"))
    pair = Pair(independent(), refusing)
    for _ in range(2):
        pair.agree(torch.randn(9, *SHAPE), torch.full((2,), math.inf), guard=nullcontext())
    assert refusing.recordings == 2, "once for each stage after the first"
    assert (
        "one readback: it cannot be recorded: operation not" in pair.program.describe()[1].kernels[0].kernel
    )


def test_a_stage_that_cannot_be_recorded_is_an_error_if_forced(loops: HostLoops, library: Path) -> None:
    refusing = Refusing(library, RuntimeError("not permitted"))
    program = Pair(independent(), refusing, LoopChoice(refusing, "", forced=True)).program
    with pytest.raises(
        BackendUnavailable, match=r"TORCH_STAGES=while is impossible for stage .*not permitted"
    ):
        program.run(torch.randn(9, *SHAPE), torch.full((2,), math.inf))


def test_running_out_of_memory_is_not_a_failed_recording(loops: HostLoops, library: Path) -> None:
    refusing = Refusing(library, torch.OutOfMemoryError())
    program = Pair(independent(), refusing).program
    with pytest.raises(FastCascadeError, match="try batches of 4"):
        program.run(torch.randn(9, *SHAPE), torch.full((2,), math.inf))


# ---- requirements ----


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Simulate an installation."""

    def pretend(cuda: str | None = "13.0", gpu: bool = True, bindings: bool = True, driver: int = 13) -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if bindings else None)
        monkeypatch.setattr(while_loops, "_driver_version", lambda: (12, 3) if driver < 12.4 else (driver, 0))

    return pretend


def test_the_reason_names_all_that_is_missing(machine: Callable[..., None]) -> None:
    machine()
    assert unavailable_reason() is None
    for missing, reason in (
        ({"cuda": None}, "this torch is built without CUDA"),
        ({"cuda": "12.1"}, "this torch is built for CUDA 12.1, and WHILE nodes came with 12.4"),
        ({"gpu": False}, "torch sees no NVIDIA GPU"),
        ({"driver": 12}, "the driver knows CUDA 12.3, and WHILE nodes came with 12.4"),
        ({"bindings": False}, "the package cuda-bindings is not installed"),
    ):
        machine(**missing)
        assert unavailable_reason() == reason
    machine(gpu=False, bindings=False)
    assert unavailable_reason() == "the package cuda-bindings is not installed and torch sees no NVIDIA GPU"


def test_a_forced_choice_runs_or_is_an_error(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choice(wanted: str, **here: Any) -> LoopChoice:
        machine(**here)
        monkeypatch.setenv("FASTCASCADE_TORCH_STAGES", wanted)
        return choose_loops(torch.device("cuda", 0))

    assert isinstance(choice("").loops, WhileNodes)
    assert not choice("").forced
    assert choice("", gpu=False) == LoopChoice(None, "torch sees no NVIDIA GPU")
    assert choice("readback") == LoopChoice(None, "FASTCASCADE_TORCH_STAGES=readback")
    assert choice("while").forced
    with pytest.raises(BackendUnavailable, match="=while is impossible: torch sees no NVIDIA GPU"):
        choice("while", gpu=False)
    with pytest.raises(InvalidArgument, match="'loop'; expected 'while' or 'readback'"):
        choice("loop")


# ---- the graph ----


def used_names() -> set[str]:
    """Dotted names of cuda-bindings in the module: ``driver.…``, ``nvrtc.…``, and fields of a node."""
    tree = ast.parse(Path(while_loops.__file__).read_text())
    dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in dotted if name.split(".")[0] in ("driver", "nvrtc", "node")}


def test_cuda_bindings_has_every_name_and_every_parameter() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    roots = {"driver": driver, "nvrtc": nvrtc, "node": driver.CUgraphNodeParams()}
    names = used_names()
    assert len(names) > 25
    for name in names:
        root, *path = name.split(".")
        found: Any = roots[root]
        for part in path:
            assert hasattr(found, part), f"cuda-bindings has no {name}"
            found = getattr(found, part)

    checked = 0
    for call in ast.walk(ast.parse(Path(while_loops.__file__).read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "_call":
            root, function = ast.unparse(call.args[0]).split(".")
            signature = (getattr(roots[root], function).__doc__ or "").splitlines()[0]
            inside = re.sub(r"\[.*?\]", "", signature[signature.index("(") + 1 : -1])
            parameters = len([p for p in inside.split(",") if p.strip()])
            assert len(call.args) - 1 == parameters, f"{ast.unparse(call)}: {signature}"
            checked += 1
    assert checked > 12


class FakeDriver:
    """A stand-in for the driver: work that is enqueued on a captured stream becomes a node."""

    CU_GRAPH_COND_ASSIGN_DEFAULT = 1
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL="conditional")
    CUgraphConditionalNodeType = SimpleNamespace(CU_GRAPH_COND_TYPE_WHILE="while")
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread")
    SIDE = 7
    """The stream to record on."""

    def __init__(self, launch: HostLaunch) -> None:
        self.launch = launch
        self.capturing: list[Callable[[], None]] | None = None
        self.value = ctypes.c_uint(99)
        self.destroyed: list[str] = []

    def enqueue(self, work: Callable[[], None]) -> None:
        """Run now, or record as a node."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def CUgraphNodeParams(self) -> SimpleNamespace:  # noqa: N802, the driver's name
        return SimpleNamespace(conditional=SimpleNamespace())

    def cuCtxGetCurrent(self) -> tuple[int, str]:  # noqa: N802
        return 0, "context"

    def cuGraphCreate(self, flags: int) -> tuple[int, list[Any]]:  # noqa: N802
        return 0, []

    def cuGraphConditionalHandleCreate(self, graph: list[Any], context: str, value: int, flags: int) -> Any:  # noqa: N802
        assert (graph, context, value, flags) == ([], "context", 0, 1)
        return 0, ctypes.addressof(self.value)

    def cuStreamBeginCaptureToGraph(  # noqa: N802
        self, stream: int, graph: list[Any], nodes: None, data: None, n: int, mode: str
    ) -> tuple[int]:
        assert (stream, nodes, data, n, mode) == (self.SIDE, None, None, 0, "thread")
        assert self.capturing is None
        self.capturing = graph
        return (0,)

    def cuStreamEndCapture(self, stream: int) -> tuple[int, list[Any]]:  # noqa: N802
        assert self.capturing is not None
        graph, self.capturing = self.capturing, None
        return 0, graph

    def cuLaunchKernel(self, function: str, *rest: Any) -> tuple[int]:  # noqa: N802
        *sizes, shared, stream, (values, types), extra = rest
        assert (sizes, shared, stream, extra) == ([1] * 6, 0, self.SIDE, 0)
        arguments = [kind(value) for kind, value in zip(types, values, strict=True)]
        self.enqueue(lambda: self.launch.start(function, 1, 1, arguments))
        return (0,)

    def cuGraphGetNodes(self, graph: list[Any], n: int) -> tuple[int, list[Any], int]:  # noqa: N802
        return 0, graph[:n], len(graph)

    def cuGraphAddNode(self, graph: list[Any], before: list[Any], data: None, n: int, node: Any) -> Any:  # noqa: N802
        assert before == graph
        assert n == 1
        wanted = node.conditional
        assert (node.type, wanted.type, wanted.size, wanted.ctx) == ("conditional", "while", 1, "context")
        assert wanted.handle == ctypes.addressof(self.value)
        wanted.phGraph_out = [[]]

        def loop() -> None:
            while self.value.value:
                for work in wanted.phGraph_out[0]:
                    work()

        graph.append(loop)
        return 0, loop

    def cuGraphInstantiate(self, graph: list[Any], flags: int) -> tuple[int, list[Any]]:  # noqa: N802
        assert self.capturing is None
        return 0, list(graph)

    def cuGraphLaunch(self, graph: list[Any], stream: int) -> tuple[int]:  # noqa: N802
        assert stream == 0
        self.value.value = 0
        for work in graph:
            work()
        return (0,)

    def cuGraphDestroy(self, graph: list[Any]) -> tuple[int]:  # noqa: N802
        self.destroyed.append("graph")
        return (0,)

    def cuGraphExecDestroy(self, graph: list[Any]) -> tuple[int]:  # noqa: N802
        self.destroyed.append("executable")
        return (0,)


class Stream:
    """A stand-in for a torch stream."""

    current: ClassVar[list[Stream]] = []

    def __init__(self, number: int = FakeDriver.SIDE) -> None:
        self.cuda_stream = number
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)

    def __enter__(self) -> None:
        self.current.append(self)

    def __exit__(self, *_: object) -> None:
        self.current.pop()


@pytest.fixture
def driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    from cuda import bindings

    fake = FakeDriver(HostLaunch(library))
    monkeypatch.setattr(bindings, "driver", fake)
    monkeypatch.setattr(
        while_loops, "_setters", lambda device: {n: n for n in ("begin_chunks", "next_chunk")}
    )
    monkeypatch.setattr(Stream, "current", [Stream(0)])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream.current[-1])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool: nullcontext())
    return fake


def test_the_graph_repeats_its_body_while_rows_are_left(driver: FakeDriver) -> None:
    count, chunk = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    seen: list[int] = []
    nodes: Loops = WhileNodes(CPU)
    repeat = nodes.record(count, chunk, 4, lambda: driver.enqueue(lambda: seen.append(int(chunk))))
    assert seen == [0], "it ran once before it was recorded, to compile what it needs"
    assert Stream.current[0].waited_for, "what was recorded elsewhere is done before the caller goes on"
    for rows, wanted in ((0, []), (1, [0]), (4, [0]), (5, [0, 1]), (12, [0, 1, 2]), (0, [])):
        seen.clear()
        count.fill_(rows)
        repeat()
        assert seen == wanted
    del repeat
    assert sorted(driver.destroyed) == ["executable", "graph"]


def test_a_failed_recording_ends_the_capture(driver: FakeDriver) -> None:
    count, chunk = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    runs = []

    def work() -> None:
        runs.append(driver.capturing is not None)
        if runs[-1]:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        WhileNodes(CPU).record(count, chunk, 4, work)
    assert runs == [False, True]
    assert driver.capturing is None


def test_an_error_of_the_driver_is_named(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    class Error(int):
        name = "CUDA_ERROR_NOT_SUPPORTED"

    def cuGraphInstantiate(graph: Any, flags: int) -> tuple[Error, None]:  # noqa: N802
        return Error(801), None

    monkeypatch.setattr(driver, "cuGraphInstantiate", cuGraphInstantiate)
    count, chunk = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    with pytest.raises(RuntimeError, match="cuGraphInstantiate failed: CUDA_ERROR_NOT_SUPPORTED"):
        WhileNodes(CPU).record(count, chunk, 4, lambda: None)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_control_kernels_compile_to_machine_code(architecture: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    if importlib.util.find_spec("nvidia") is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    code = while_loops.compile_setters(architecture)
    assert code.startswith(b"\x7fELF")
    assert b"begin_chunks" in code
    assert b"next_chunk" in code
