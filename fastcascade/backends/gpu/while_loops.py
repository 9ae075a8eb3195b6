"""Loops on the device: WHILE nodes of CUDA graphs, repeated as often as a number in device memory requires.

A graph puts two kernels of ``kernels/cuda/conditional.cu`` around the recorded work:

    begin_chunks ──▶ WHILE node ┌──────────────────────────┐
                                │ recorded work, next_chunk │
                                └──────────────────────────┘

All calls go to the driver API through the package cuda-bindings, in torch's primary context. None of it has
run on a GPU yet. Tests check every name and structure against the installed package, and the loop on a
stand-in.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastcascade.errors import BackendUnavailable, InvalidArgument
from fastcascade.kernels.cuda.launch import COMPILE_OPTIONS, source

__all__ = ["LoopChoice", "Loops", "WhileNodes", "choose_loops", "unavailable_reason"]

VARIABLE = "FASTCASCADE_TORCH_STAGES"
FIRST_VERSION = (12, 4)
"""The first CUDA version with WHILE nodes."""


class Loops(Protocol):
    """Repeats work on a device; the host does not know how often."""

    def stream(self) -> int:
        """The handle of torch's current stream on the device."""

    def record(self, count: Tensor, chunk: Tensor, size: int, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work`` on the current stream, to be repeated on the device.

        Args:
            count: (1,) int32 on the device: rows to process, read at every call of the result.
            chunk: (1,) int32 on the device: the chunk that ``work`` processes, 0, 1, … while chunk·size <
                count.
            size: rows per chunk.
            work: enqueues the kernels for one chunk; called at least once before this returns.

        Returns:
            a function that enqueues all repetitions, on the memory that ``work`` used while it was recorded.

        Raises:
            RuntimeError: ``work`` makes the host wait for the device, or the driver reports an error.
        """


class LoopChoice(NamedTuple):
    """How stages that run in torch learn the number of active rows.

    Attributes:
        loops: None if each stage reads the number back instead.
        reason: why there are no loops.
        forced: FASTCASCADE_TORCH_STAGES demands loops, so a stage that cannot be recorded is an error.
    """

    loops: Loops | None
    reason: str
    forced: bool = False


def choose_loops(device: torch.device) -> LoopChoice:
    """WHILE nodes if they can run here; the environment's FASTCASCADE_TORCH_STAGES overrides the choice.

    Raises:
        InvalidArgument: FASTCASCADE_TORCH_STAGES is neither "while" nor "readback".
        BackendUnavailable: it is "while", but WHILE nodes cannot run here; quotes the reason.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "while", "readback"):
        raise InvalidArgument(f"{VARIABLE} is {wanted!r}; expected 'while' or 'readback'")
    if wanted == "readback":
        return LoopChoice(None, f"{VARIABLE}=readback")
    reason = unavailable_reason()
    if reason is None:
        return LoopChoice(WhileNodes(device), "", forced=wanted == "while")
    if wanted == "while":
        raise BackendUnavailable(f"{VARIABLE}=while is impossible: {reason}")
    return LoopChoice(None, reason)


def unavailable_reason() -> str | None:
    """Everything that WHILE nodes lack here; None if they can run."""
    missing, needed = [], "{}.{}".format(*FIRST_VERSION)
    bindings = importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")
    if not bindings:
        missing.append("the package cuda-bindings is not installed")
    if torch.version.cuda is None:
        missing.append("this torch is built without CUDA")
    elif tuple(map(int, torch.version.cuda.split(".")[:2])) < FIRST_VERSION:
        missing.append(f"this torch is built for CUDA {torch.version.cuda}; WHILE nodes need {needed}")
    elif not torch.cuda.is_available():
        missing.append("torch sees no NVIDIA GPU")
    elif bindings and (driver := _driver_version()) < FIRST_VERSION:
        missing.append("the driver supports CUDA {}.{}; WHILE nodes need {}".format(*driver, needed))
    return " and ".join(missing) or None


def _driver_version() -> tuple[int, int]:
    from cuda.bindings import driver

    number = _call(driver.cuDriverGetVersion)
    return number // 1000, number % 1000 // 10


class WhileNodes:
    """Loops on one NVIDIA GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def stream(self) -> int:
        """See :meth:`Loops.stream`."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def record(self, count: Tensor, chunk: Tensor, size: int, work: Callable[[], None]) -> Callable[[], None]:
        """See :meth:`Loops.record`."""
        with torch.cuda.device(self.device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                work()  # compiles kernels and picks algorithms, which a capture must not do
                loop = _Graph(count, chunk, size, work)
            current.wait_stream(aside)
        return loop


class _Graph:
    """The executable graph of one loop, captured on torch's current stream (not the default stream)."""

    def __init__(self, count: Tensor, chunk: Tensor, size: int, work: Callable[[], None]) -> None:
        from cuda.bindings import driver

        self.device = count.device
        self.memory = torch.cuda.MemPool()  # keeps the allocations of the recorded work at their addresses
        self.used = count, chunk, work
        setters = _setters(self.device)
        stream = torch.cuda.current_stream().cuda_stream
        context = _call(driver.cuCtxGetCurrent)
        graph = _call(driver.cuGraphCreate, 0)
        weakref.finalize(self, driver.cuGraphDestroy, graph).atexit = False
        default = driver.CU_GRAPH_COND_ASSIGN_DEFAULT
        handle = _call(driver.cuGraphConditionalHandleCreate, graph, context, 0, default)
        addresses = ctypes.c_void_p(count.data_ptr()), ctypes.c_void_p(chunk.data_ptr())
        number = ctypes.c_ulonglong(int(handle))

        with _capture(stream, graph):
            _start(setters["begin_chunks"], stream, *addresses, number)
        body = _add_while_node(graph, context, handle)
        with torch.cuda.use_mem_pool(self.memory), _capture(stream, body):
            work()
            _start(setters["next_chunk"], stream, *addresses, ctypes.c_int(size), number)
        self.executable = _call(driver.cuGraphInstantiate, graph, 0)
        weakref.finalize(self, driver.cuGraphExecDestroy, self.executable).atexit = False

    def __call__(self) -> None:
        from cuda.bindings import driver

        with torch.cuda.device(self.device):  # the default stream depends on the current device
            _call(driver.cuGraphLaunch, self.executable, torch.cuda.current_stream().cuda_stream)


def _add_while_node(graph: Any, context: Any, handle: Any) -> Any:
    """Append a WHILE node to the graph's only node; returns the graph of its body."""
    from cuda.bindings import driver

    nodes, _ = _call(driver.cuGraphGetNodes, graph, 1)
    node = driver.CUgraphNodeParams()
    node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    node.conditional.handle = handle
    node.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
    node.conditional.size = 1
    node.conditional.ctx = context
    _call(driver.cuGraphAddNode, graph, nodes, None, len(nodes), node)
    (body,) = node.conditional.phGraph_out
    return body


@contextmanager
def _capture(stream: int, graph: Any) -> Iterator[None]:
    """Capture what this thread enqueues on the stream into a graph; the capture ends even on an exception."""
    from cuda.bindings import driver

    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    _call(driver.cuStreamBeginCaptureToGraph, stream, graph, None, None, 0, mode)
    try:
        yield
    except BaseException:
        driver.cuStreamEndCapture(stream)  # its own error would hide the one being raised
        raise
    _call(driver.cuStreamEndCapture, stream)


def _start(function: Any, stream: int, *values: Any) -> None:
    """Launch a single thread of a kernel with ctypes values as arguments."""
    from cuda.bindings import driver

    plain, types = tuple(value.value for value in values), tuple(type(value) for value in values)
    _call(driver.cuLaunchKernel, function, 1, 1, 1, 1, 1, 1, 0, stream, (plain, types), 0)


@cache
def _setters(device: torch.device) -> dict[str, Any]:
    """The functions of ``conditional.cu`` by kernel name."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    module = _call(driver.cuModuleLoadData, compile_setters(f"sm_{major}{minor}"))
    return {
        name: _call(driver.cuModuleGetFunction, module, name.encode())
        for name in ("begin_chunks", "next_chunk")
    }


def compile_setters(architecture: str) -> bytes:
    """Compile ``conditional.cu`` to a cubin; needs no device.

    Raises:
        RuntimeError: it does not compile.
    """
    from cuda.bindings import nvrtc

    program = _call(nvrtc.nvrtcCreateProgram, source("conditional.cu").encode(), b"conditional.cu", 0, [], [])
    options = [option.encode() for option in (*COMPILE_OPTIONS, f"--gpu-architecture={architecture}")]
    _call(nvrtc.nvrtcCompileProgram, program, len(options), options)
    code: bytes = b" " * _call(nvrtc.nvrtcGetCUBINSize, program)
    _call(nvrtc.nvrtcGetCUBIN, program, code)
    return code


def _call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Call a function of cuda-bindings and raise its error code; returns its other results."""
    error, *values = function(*arguments)
    if error != 0:
        raise RuntimeError(f"{function.__name__} failed: {error.name}")
    return values[0] if len(values) == 1 else values
