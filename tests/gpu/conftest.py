"""Launchers for the tests of the CUDA C++ kernels: CPU threads, and a GPU if there is one."""

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
    """The kernels, compiled for CPU threads."""
    reason = missing_compiler()
    if reason is not None:
        pytest.skip(reason)
    return build(tmp_path_factory.mktemp("host") / "kernels.so")


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few blocks and threads, because every thread of every block is an OS thread."""
    monkeypatch.setattr(compact, "MOVE_BLOCKS", 3)
    monkeypatch.setattr(compact, "MOVE_THREADS", 32)


@pytest.fixture(params=["host threads", "device"])
def launch(request: pytest.FixtureRequest) -> Launch:
    """Every launcher; the device skips with the backend's reason."""
    if request.param == "host threads":
        request.getfixturevalue("few_threads")
        return HostLaunch(request.getfixturevalue("library"))
    reason = load_backend("cuda").unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return DeviceLaunch(torch.device("cuda"))
