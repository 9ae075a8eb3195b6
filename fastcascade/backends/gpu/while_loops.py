"""WHILE nodes of CUDA graphs: work that repeats as often as a number in device memory says.

The graph is two kernels of ``kernels/cuda/conditional.cu`` around recorded work:

    begin_chunks ──▶ WHILE node ┌──────────────────────────┐
                                │ recorded work, next_chunk │
                                └──────────────────────────┘

Everything goes through the driver's API in the package cuda-bindings, on torch's primary context. None of it
has run on a GPU yet: names and structures are checked against the installed package, the loop in tests.
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

__all__ = ["Choice", "Loops", "WhileNodes", "choose_loops", "unavailable_reason"]

VARIABLE = "FASTCASCADE_TORCH_STAGES"
FIRST_VERSION = (12, 4)
"""Of CUDA, with WHILE nodes."""


class Loops(Protocol):
    """Repeats work on a device without the host knowing how often."""

    def stream(self) -> int:
        """Which of the device's streams is torch's current one."""

    def record(self, count: Tensor, chunk: Tensor, size: int, work: Callable[[], None]) -> Callable[[], None]:
        """Keep ``work`` for repetition on the current stream.

        Args:
            count: (1,) int32 on the device, rows there are to do whenever the result is called.
            chunk: (1,) int32 on the device, which ``work`` reads: 0, 1, … as long as chunk·size < count.
            size: rows that ``work`` does at a time.
            work: enqueues it; called at least once before this returns.

        Returns:
            what enqueues all the repetitions; it works on the memory that ``work`` worked on.

        Raises:
            RuntimeError: the host waits for the device in ``work``, or the device refused.
        """


class Choice(NamedTuple):
    """How stages that run through torch learn how many rows there are.

    Attributes:
        loops: None for one readback of the count per stage.
        reason: why there are none.
        forced: whether the environment asked for it: what cannot be recorded is then an error.
    """

    loops: Loops | None
    reason: str
    forced: bool = False


def choose_loops(device: torch.device) -> Choice:
    """WHILE nodes where they can run, unless the environment's FASTCASCADE_TORCH_STAGES says otherwise.

    Raises:
        InvalidArgument: it says something else than "while" or "readback".
        BackendUnavailable: it says "while", which cannot run here; the reason is quoted.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "while", "readback"):
        raise InvalidArgument(f"{VARIABLE} is {wanted!r}; expected 'while' or 'readback'")
    if wanted == "readback":
        return Choice(None, f"{VARIABLE}=readback")
    reason = unavailable_reason()
    if reason is None:
        return Choice(WhileNodes(device), "", forced=wanted == "while")
    if wanted == "while":
        raise BackendUnavailable(f"{VARIABLE}=while cannot be obeyed: {reason}")
    return Choice(None, reason)


def unavailable_reason() -> str | None:
    """All that is missing here for WHILE nodes; None if nothing is."""
    missing, needed = [], "{}.{}".format(*FIRST_VERSION)
    bindings = importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")
    if not bindings:
        missing.append("the package cuda-bindings is not installed")
    if torch.version.cuda is None:
        missing.append("this torch is built without CUDA")
    elif tuple(map(int, torch.version.cuda.split(".")[:2])) < FIRST_VERSION:
        missing.append(
            f"this torch is built for CUDA {torch.version.cuda}, and WHILE nodes came with {needed}"
        )
    elif not torch.cuda.is_available():
        missing.append("torch sees no NVIDIA GPU")
    elif bindings and (driver := _driver_version()) < FIRST_VERSION:
        missing.append("the driver knows CUDA {}.{}, and WHILE nodes came with {}".format(*driver, needed))
    return " and ".join(missing) or None


def _driver_version() -> tuple[int, int]:
    from cuda.bindings import driver

    number = _call(driver.cuDriverGetVersion)
    return number // 1000, number % 1000 // 10


class WhileNodes:
    """Loops of one NVIDIA GPU."""

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
                work()  # compiles kernels and picks algorithms, which a recording may not
                loop = _Graph(count, chunk, size, work)
            current.wait_stream(aside)
        return loop


class _Graph:
    """The executable graph of one loop, recorded on torch's current stream, which is not the default one."""

    def __init__(self, count: Tensor, chunk: Tensor, size: int, work: Callable[[], None]) -> None:
        from cuda.bindings import driver

        self.device = count.device
        self.memory = torch.cuda.MemPool()  # what the work allocates stays where it was recorded
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

        with torch.cuda.device(self.device):  # the default stream is that of the current device
            _call(driver.cuGraphLaunch, self.executable, torch.cuda.current_stream().cuda_stream)


def _add_while_node(graph: Any, context: Any, handle: Any) -> Any:
    """A WHILE node after the graph's only node; returns the graph that is its body."""
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
    """What this thread enqueues on the stream becomes nodes of a graph, whose addition ends in any case."""
    from cuda.bindings import driver

    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    _call(driver.cuStreamBeginCaptureToGraph, stream, graph, None, None, 0, mode)
    try:
        yield
    except BaseException:
        driver.cuStreamEndCapture(stream)  # its own error says less than the one on its way
        raise
    _call(driver.cuStreamEndCapture, stream)


def _start(function: Any, stream: int, *values: Any) -> None:
    """Start one thread of a kernel with ctypes values as arguments."""
    from cuda.bindings import driver

    plain, types = tuple(value.value for value in values), tuple(type(value) for value in values)
    _call(driver.cuLaunchKernel, function, 1, 1, 1, 1, 1, 1, 0, stream, (plain, types), 0)


@cache
def _setters(device: torch.device) -> dict[str, Any]:
    """Kernel name → driver function, of ``conditional.cu``."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    module = _call(driver.cuModuleLoadData, compile_setters(f"sm_{major}{minor}"))
    return {
        name: _call(driver.cuModuleGetFunction, module, name.encode())
        for name in ("begin_chunks", "next_chunk")
    }


def compile_setters(architecture: str) -> bytes:
    """The machine code of ``conditional.cu``; no device is needed.

    Raises:
        RuntimeError: the compiler refused.
    """
    from cuda.bindings import nvrtc

    program = _call(nvrtc.nvrtcCreateProgram, source("conditional.cu").encode(), b"conditional.cu", 0, [], [])
    options = [option.encode() for option in (*COMPILE_OPTIONS, f"--gpu-architecture={architecture}")]
    _call(nvrtc.nvrtcCompileProgram, program, len(options), options)
    code: bytes = b" " * _call(nvrtc.nvrtcGetCUBINSize, program)
    _call(nvrtc.nvrtcGetCUBIN, program, code)
    return code


def _call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """What a function of cuda-bindings returns beside its error code, which becomes an exception."""
    error, *values = function(*arguments)
    if error != 0:
        raise RuntimeError(f"{function.__name__} failed: {error.name}")
    return values[0] if len(values) == 1 else values
