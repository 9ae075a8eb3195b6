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


def ask_triton(code: str) -> str:
    """The output of a process with triton, not interpreting."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_exit_head_is_compiled_once_for_all_stages() -> None:
    """As they would by default, neither stage numbers nor the alignment of thresholds cause another one."""
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from fastcascade.kernels.triton.exit_head import exit_head_kernel, selector_arguments

def compilations(kernel):
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    logits, thresholds = torch.zeros(64, 10), torch.zeros(20)
    arguments = dict.fromkeys((p.name for p in kernel.params if not p.is_constexpr), logits)
    constants = dict.fromkeys((p.name for p in kernel.params if p.is_constexpr), 1)
    keys = set()
    for stage, weight in enumerate((0.0, 0.1, 0.5, 1.0) * 5):
        own = {"threshold": thresholds[stage:], "stage": stage, "stage_weight": weight}
        keys.add(str(bind(**arguments | own, **constants)[1]))
    return len(keys)

print(compilations(exit_head_kernel), compilations(triton.jit(exit_head_kernel.fn)) > 1)
"""
    assert ask_triton(code) == "1 True"


def test_a_missing_barrier_fails() -> None:
    """The persistent kernel without the barrier that ends a layer."""
    program = Path(__file__).with_name("offline.py")
    code = (
        f"import re, sys; sys.path.insert(0, {str(program.parent)!r})\n"
        "import offline\n"
        "wanted = offline.Configuration('k', None, {}, {}, barriers=1)\n"
        "report = offline.Report('k', 'sm_90', 64, 0, 0, 0, 0, barriers=0, machine_barriers=9)\n"
        "print(offline.failures(wanted, report))"
    )
    assert "0 barriers in the source, 1 expected" in ask_triton(code)


def test_cublas_gives_the_same_bits_without_a_warning() -> None:
    """Otherwise matrix products on a GPU warn while tests poison memory, and warnings are errors."""
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
