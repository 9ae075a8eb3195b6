"""Every shipped Triton configuration compiles without a GPU and passes the gates of ``offline.py``.

``make test`` compiles one configuration per kernel for sm_90; ``make test-all`` all of them for sm_80, sm_90
and gfx942.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compile_offline(*options: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = str(Path(__file__).with_name("offline.py"))
    run = subprocess.run([sys.executable, program, *options], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_one_configuration_per_kernel() -> None:
    compile_offline("--targets", "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_configuration(target: str) -> None:
    compile_offline("--all", "--targets", target)


def test_gates_fail_on_what_they_guard_against() -> None:
    """A report with spills, narrow loads and no tensor-core instruction fails all three."""
    spec = importlib.util.spec_from_file_location("offline", Path(__file__).with_name("offline.py"))
    assert spec is not None
    assert spec.loader is not None
    offline = importlib.util.module_from_spec(spec)
    sys.modules["offline"] = offline  # dataclasses look up their module
    try:
        spec.loader.exec_module(offline)
        wanted = offline.Configuration("k", None, {}, {}, wide_loads=True, tensor_cores=True)
        bad = offline.Report("k", "sm_90", 255, spills=9, wide_loads=0, tensor_ops=0, shared_bytes=0)
        good = offline.Report("k", "sm_90", 64, spills=0, wide_loads=4, tensor_ops=4, shared_bytes=0)
        assert len(offline.failures(wanted, bad)) == 3
        assert offline.failures(wanted, good) == []
    finally:
        del sys.modules["offline"]
