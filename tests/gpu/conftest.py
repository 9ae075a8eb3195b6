"""Where the CUDA C++ kernels run in tests: on host threads everywhere, and on a GPU where one is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from host_threads import HostLaunch, build, missing_compiler

from fastcascade.backends.registry import load_backend
from fastcascade.kernels.cuda import compact
from fastcascade.kernels.cuda.launch import DeviceLaunch, Launch


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels compiled for host threads."""
    reason = missing_compiler()
    if reason is not None:
        pytest.skip(reason)
    return build(tmp_path_factory.mktemp("host") / "kernels.so")


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block costs the start of its threads: fewer blocks, which take several rows each."""
    monkeypatch.setattr(compact, "MOVE_BLOCKS", 3)
    monkeypatch.setattr(compact, "MOVE_THREADS", 32)


@pytest.fixture(params=["host threads", "device"])
def launch(request: pytest.FixtureRequest) -> Launch:
    """Both ways to run a kernel; the device skips with the backend's reason."""
    if request.param == "host threads":
        request.getfixturevalue("few_threads")
        return HostLaunch(request.getfixturevalue("library"))
    reason = load_backend("cuda").unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return DeviceLaunch(torch.device("cuda"))
