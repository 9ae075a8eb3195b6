"""The resident kernel compiles without a GPU and passes the gates of ``offline_resident.py``."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fastcascade.kernels.cuda.resident import resident_source
from fastcascade.kernels.cuda.resident_table import resident_table


@pytest.fixture(scope="module")
def offline() -> Iterator[ModuleType]:
    """``offline_resident.py`` as a module."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    if importlib.util.find_spec("nvidia") is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    path = Path(__file__).with_name("offline_resident.py")
    spec = importlib.util.spec_from_file_location("offline_resident", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def check(offline: ModuleType, name: str, target: str) -> None:
    plan = offline.resident_plan(name, offline.MACHINES[target])
    code = offline.compile_text(resident_source(resident_table(plan)), target)
    assert offline.failures(plan, code) == []
    if offline.disassembler() is not None:
        assert code.instructions["HMMA"] > 0


def test_a_small_network_passes_the_gates(offline: ModuleType) -> None:
    check(offline, "ResNet-8", "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "name",
    [
        "ResNet-20, shortcut B",
        "ResNet-20 of twice the width",
        "three ResNet-9",
        "the shipped cascade",
        "GELU",
    ],
)
def test_every_network_passes_the_gates(offline: ModuleType, name: str, target: str) -> None:
    if (name, target) == ("ResNet-20 of twice the width", "sm_80"):
        plan = offline.resident_plan(name, offline.MACHINES[target])
        assert plan.blocks == 1
    check(offline, name, target)


def test_the_gates_fail_on_what_they_guard_against(offline: ModuleType) -> None:
    plan = offline.resident_plan("ResNet-8", offline.MACHINES["sm_90"])
    least = offline.least(plan)
    assert min(least.values()) >= 20
    good = offline.Code(168, 0, least)
    assert offline.failures(plan, good) == []
    spilled = good._replace(local_bytes=8)
    greedy = good._replace(registers=176)
    narrow = good._replace(instructions=least - Counter({"LDG.128": 1}))
    scalar = good._replace(instructions=least - Counter({"HMMA": 2, "LDSM": 1}))
    counts = [len(offline.failures(plan, bad)) for bad in (spilled, greedy, narrow, scalar)]
    assert counts == [1, 1, 1, 2]


def test_a_source_that_does_not_compile_is_quoted(offline: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="nonsense"):
        offline.compile_text("nonsense", "sm_90")
