"""How the kernels of this folder get onto a device.

A :class:`Launch` takes a kernel's name and arguments. :class:`DeviceLaunch` compiles with NVRTC through CuPy,
at the first launch, and needs neither nvcc nor the CUDA toolkit's headers. Tests have another that runs the
same entry points on host threads.
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
"""Every file that is compiled, with its kernels."""

COMPILE_OPTIONS = ("-std=c++17",)
"""Of NVRTC. No fast mathematics: log-probabilities are compared with torch's to 3e-5."""


def source(file: str) -> str:
    """The text of one of :data:`FILES` with the headers beside it pasted in.

    One text without includes, so that caches of compiled kernels, which know the text alone, see a change in
    any of them.

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
    """Starts kernels on one device.

    Attributes:
        device: where every tensor that is passed to a kernel must be.
    """

    device: torch.device

    def address(self, tensor: Tensor) -> int:
        """The address of a tensor's first element.

        Raises:
            ValueError: a tensor elsewhere, which the kernel would misread.
        """
        if tensor.device != self.device:
            raise ValueError(f"got a tensor on {tensor.device}; expected all of them on {self.device}")
        return tensor.data_ptr()

    def __call__(self, kernel: str, blocks: int, threads: int, *arguments: Any) -> None:
        """Start a kernel.

        Args:
            kernel: a name in :data:`FILES`.
            blocks: of the grid, from 1; threads: of each block, a multiple of 32.
            arguments: in the kernel's order; a ctypes value each; a tensor stands for the address of
                its first element.

        Raises:
            RuntimeError: the device refused; the message names the kernel.
        """
        values = [ctypes.c_void_p(self.address(a)) if isinstance(a, Tensor) else a for a in arguments]
        self.start(kernel, blocks, threads, values)

    @abstractmethod
    def start(self, kernel: str, blocks: int, threads: int, values: list[Any]) -> None:
        """Start a kernel with ctypes values as arguments."""


class _CurrentStream:
    """Torch's current stream as CuPy takes it from other libraries."""

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class DeviceLaunch(Launch):
    """Launches on torch's current stream of an NVIDIA GPU; nothing synchronises."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device  # with its index, as tensors have it

    @cached_property
    def _functions(self) -> dict[str, Any]:
        """Kernel name → CuPy function; CuPy keeps the compiled code in its cache on disk."""
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
    """Ctypes values as CuPy takes a kernel's arguments: pointers, numbers and structs alike.

    CuPy passes an array of one element by value.
    """
    import numpy as np

    return tuple(np.ndarray((1,), f"V{ctypes.sizeof(value)}", value) for value in values)


@contextmanager
def on_current_stream(device: torch.device, kernel: str) -> Iterator[None]:
    """CuPy on torch's current stream of a device; errors name the kernel."""
    import cupy

    stream = cupy.cuda.Stream.from_external(_CurrentStream(device))
    try:
        with cupy.cuda.Device(device.index), stream:
            yield
    except RuntimeError as error:
        raise RuntimeError(
            f"the CUDA kernel {kernel}, or one that was started before it, failed: {error}"
        ) from error
