"""Every CUDA C++ kernel compiles without a GPU and passes the gates of ``offline.py``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fastcascade.kernels.cuda.launch import FILES, source


@pytest.fixture
def offline() -> Iterator[ModuleType]:
    """``offline_cuda.py`` as a module."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    if importlib.util.find_spec("nvidia") is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    spec = importlib.util.spec_from_file_location("offline_cuda", Path(__file__).with_name("offline_cuda.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["offline"]


def check(offline: ModuleType, file: str, text: str, target: str) -> list[str]:
    """Compile, and return the failed gates."""
    wanted = offline.configurations()
    reports = {report.name: report for report in offline.compile_cuda(text, target)}
    assert set(reports) == set(FILES[file]), "every kernel of the file is there and named"
    assert all(report.registers > 0 for report in reports.values())
    return [reason for name, report in reports.items() for reason in offline.failures(wanted[name], report)]


@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_90")])
@pytest.mark.parametrize("file", FILES)
def test_every_kernel_passes_the_gates(offline: ModuleType, file: str, target: str) -> None:
    assert check(offline, file, source(file), target) == []


def test_narrow_loads_and_local_memory_fail(offline: ModuleType) -> None:
    """Plant two faults: words aligned to 4 bytes only, and an array indexed at run time."""
    text = source("compact.cu")
    narrow = text.replace("struct alignas(16) Quad", "struct Quad")
    assert narrow != text
    assert sorted(check(offline, "compact.cu", narrow, "sm_90")) == [
        "gather_rows_quad on sm_90: no 16-byte loads",
        "move_rows_quad on sm_90: no 16-byte loads",
    ]
    fill = "for (int i = 0; i < 64; i++) wild[i] = flags[i] * i;"
    array = f"int wild[64]; {fill} int rank = wild[stays + flags[3]];"
    indexed = text.replace("int rank = 0;", array)
    assert indexed != text
    reasons = check(offline, "compact.cu", indexed, "sm_90")
    assert len(reasons) == 2
    assert all("spills, 0 allowed" in reason for reason in reasons)


def test_a_source_that_does_not_compile_is_quoted(offline: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="nonsense"):
        offline.compile_cuda("nonsense", "sm_90")
