"""A launcher that runs the CUDA kernels on CPU threads, compiled from ``gpu/host_threads.cpp``."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastcascade.kernels.cuda import launch

SOURCE = Path(__file__).parents[1] / "gpu" / "host_threads.cpp"
COMPILER = os.environ.get("CXX", "g++")


def missing_compiler() -> str | None:
    """Why the library cannot be built here; None if it can."""
    if shutil.which(COMPILER) is None:
        return f"there is no C++ compiler ({COMPILER})"
    return None


def build(library: Path, *flags: str) -> Path:
    """Compile the library from the kernels of the installed package."""
    kernels = Path(launch.__file__).parent
    options = "-std=c++20 -O1 -g -shared -fPIC -pthread -Wall -Wextra -Werror".split()
    command = [COMPILER, *options, *flags, f"-I{kernels}", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


class HostLaunch(launch.Launch):
    """Runs kernels on CPU threads, one per CUDA thread of a block, and one block after another.

    Args:
        library: from :func:`build`.
        descending: the last block first; no kernel may count on either order.
        left_out: a barrier that all threads run through, counted from 0 in each block: a planted fault.
    """

    def __init__(self, library: Path, descending: bool = False, left_out: int = -1) -> None:
        self.device = torch.device("cpu")
        self.library = ctypes.CDLL(str(library))
        self.descending = descending
        self.left_out = left_out

    def start(self, kernel: str, blocks: int, threads: int, values: list[Any]) -> None:
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        order = int(self.descending)
        unknown = self.library.launch(kernel.encode(), pointers, blocks, threads, order, self.left_out)
        assert not unknown, f"host_threads.cpp has no kernel {kernel}"
