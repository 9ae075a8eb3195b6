"""Runs the device tests under Triton's interpreter if there is no GPU.

Triton reads TRITON_INTERPRET when a kernel is decorated, so every file runs in its own process. This process
never imports triton.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = sorted(Path(__file__).with_name("device").glob("test_*.py"))

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here; tests/gpu/device runs on it"),
]


def interpret(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run one file of device tests in a process with the interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-p", "no:cacheprovider", *options],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=file.parent,  # Python imports from this folder first, which has no copy of the package
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_quick(file: Path) -> None:
    run = interpret(file, "-m", "not slow")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_thorough(file: Path) -> None:
    run = interpret(file, "-m", "slow")
    nothing_marked = 5  # pytest's exit code for an empty selection
    assert run.returncode in (0, nothing_marked), run.stdout[-4000:] + run.stderr[-2000:]
