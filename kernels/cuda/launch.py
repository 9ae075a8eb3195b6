"""Compilation and launch of the CUDA C++ kernels.

A :class:`Launch` takes the name and arguments of a kernel. :class:`DeviceLaunch` compiles with NVRTC through
CuPy at the first launch. It needs neither nvcc nor the headers of the CUDA toolkit. The tests have another
Launch, which runs the same entry points on CPU threads.
"""

from __future__ import annotations

import ctypes
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["COMPILE_OPTIONS", "FILES", "DeviceLaunch", "Launch", "source"]

FILES = {
    "exit_head.cu": ("exit_head_f32", "exit_head_f16", "exit_head_bf16"),
    "compact.cu": (
        "compact_index_kernel",
        "plan_holes_kernel",
        "move_rows_quad",
        "move_rows_byte",
        "gather_rows_quad",
        "gather_rows_byte",
    ),
}
"""The compiled files, each with its kernels."""

COMPILE_OPTIONS = ("-std=c++17",)
"""NVRTC options. No fast math: log-probabilities must agree with torch's to 3e-5."""


def source(file: str) -> str:
    """The text of one of :data:`FILES` with its headers inlined.

    CuPy caches compiled kernels by source text. Inlining makes a change in a header change that text.

    Example:
        >>> '#include "' in source("exit_head.cu")
        False
    """
    pasted: set[str] = set()

    def paste(name: str) -> str:
        if name in pasted:
            return ""
        pasted.add(name)
        text = Path(__file__).with_name(name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'#include "(.*)"\n', lambda include: paste(include[1]), text)

    return paste(file)


class Launch(ABC):
    """Launches kernels on one device.

    Attributes:
        device: the device of every tensor that is passed to a kernel.
    """

    device: torch.device

    def address(self, tensor: Tensor) -> int:
        """The address of a tensor's first element.

        Raises:
            ValueError: the tensor is on another device.
        """
        if tensor.device != self.device:
            raise ValueError(f"got a tensor on {tensor.device}; expected all of them on {self.device}")
        return tensor.data_ptr()

    def __call__(self, kernel: str, blocks: int, threads: int, *arguments: Any) -> None:
        """Launch a kernel.

        Args:
            kernel: a name in :data:`FILES`.
            blocks: blocks of the grid, at least 1; threads: threads per block, a multiple of 32.
            arguments: in the kernel's order, ctypes values, or tensors to pass a pointer to their first
                element.

        Raises:
            RuntimeError: the launch failed; names the kernel.
        """
        values = [ctypes.c_void_p(self.address(a)) if isinstance(a, Tensor) else a for a in arguments]
        self.start(kernel, blocks, threads, values)

    @abstractmethod
    def start(self, kernel: str, blocks: int, threads: int, values: list[Any]) -> None:
        """Launch a kernel with ctypes values as arguments."""


class _CurrentStream:
    """Torch's current stream, in the protocol by which CuPy accepts foreign streams."""

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class DeviceLaunch(Launch):
    """Launches on torch's current stream of an NVIDIA GPU, without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device  # with its index, as on tensors

    @cached_property
    def _functions(self) -> dict[str, Any]:
        """CuPy functions by kernel name; CuPy caches the compiled code on disk."""
        import cupy

        modules = {
            file: cupy.RawModule(code=source(file), options=COMPILE_OPTIONS)
            for file in ("exit_head.cu", "compact.cu")
        }
        return {name: modules[file].get_function(name) for file in modules for name in FILES[file]}

    def start(self, kernel: str, blocks: int, threads: int, values: list[Any]) -> None:
        """See :meth:`Launch.start`."""
        with on_current_stream(self.device, kernel):
            self._functions[kernel]((blocks,), (threads,), by_value(*values))


def by_value(*values: Any) -> tuple[Any, ...]:
    """Ctypes values as CuPy takes the arguments of a kernel.

    CuPy passes one-element arrays by value, which works for pointers, numbers and structs alike.
    """
    import numpy as np

    return tuple(np.ndarray((1,), f"V{ctypes.sizeof(value)}", value) for value in values)


@contextmanager
def on_current_stream(device: torch.device, kernel: str) -> Iterator[None]:
    """Make CuPy launch on torch's current stream of a device; errors name the kernel."""
    import cupy

    stream = cupy.cuda.Stream.from_external(_CurrentStream(device))
    try:
        with cupy.cuda.Device(device.index), stream:
            yield
    except RuntimeError as error:
        raise RuntimeError(f"the CUDA kernel {kernel}, or one launched before it, failed: {error}") from error
