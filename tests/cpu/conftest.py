"""Every test of the engine runs on every instruction set of this machine."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import driver
import numpy as np
import pytest
import torch
from torch import Tensor

from fastcascade import _C
from fastcascade.backends.cpu import stage_spec
from fastcascade.lowering.interpreter import move_stage, run_stage
from fastcascade.lowering.operations import Flatten, Op
from fastcascade.lowering.plan import StagePlan

RunOps = Callable[..., tuple[Tensor, Tensor]]


def _reason(name: str) -> str | None:
    return dict(_C.instruction_sets())[name]


@pytest.fixture(params=[name for name, _ in _C.instruction_sets()])
def isa(request: pytest.FixtureRequest) -> str:
    """The name of an instruction set; skips those that this machine lacks."""
    reason = _reason(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


def _build(
    x: Tensor, ops: Sequence[Op], isa: str, kernel: str = "", threads: int = 1, precision: str = "fp32"
) -> tuple[StagePlan, _C.Cascade]:
    """A stage of these operations, whose logits are the last value, flattened."""
    shapes = [tuple(x.shape[1:])]
    ops = [*ops, Flatten(output=len(ops) + 1, input=len(ops))]
    for op in ops:
        shapes.append(op.output_shape(*(shapes[value] for value in op.reads)))
    stage = StagePlan("s", "image", 0, 0, None, tuple(shapes), tuple(ops), 0, len(ops))
    spec = stage_spec(stage, False) | {"input": "features"}  # which have no limit on pixels
    options = {"threads": threads, "isa": isa, "kernel": kernel, "precision": precision}
    return stage, _C.Cascade([spec], [None], prod(shapes[-1]), **options)  # type: ignore[arg-type]


@pytest.fixture
def run_ops() -> RunOps:
    """Run operations on a batch: (x, ops, isa, kernel, threads, precision) → the last value twice, flattened:
    the engine's float32 and the reference's float64. Threads run different instances."""

    def run(x: Tensor, ops: Sequence[Op], *options: str | int, **named: str | int) -> tuple[Tensor, Tensor]:
        stage, engine = _build(x, ops, *options, **named)
        got = torch.from_numpy(engine.run_stage(0, x.numpy())[0])
        return got, run_stage(move_stage(stage, x.device, torch.float64), x.double())[1]

    return run


@pytest.fixture
def share_ops() -> Callable[..., Tensor]:
    """Run operations on one instance, which threads share: (x, ops, isa, kernel, threads, precision) → the
    log-probabilities of the last value."""

    def run(x: Tensor, ops: Sequence[Op], *options: str | int, **named: str | int) -> Tensor:
        _, engine = _build(x, ops, *options, **named)
        return torch.from_numpy(engine.run(x.numpy(), None, np.empty(0, np.float32))[0])

    return run


@pytest.fixture(scope="session")
def engine_objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The engine compiled as the package compiles it, but for its Python module."""
    return driver.compile_engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="session")
def module_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine's Python module, compiled fast: it does no work of its own."""
    pybind11 = pytest.importorskip("pybind11")
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    if not (Path(includes[1]) / "Python.h").exists():
        pytest.skip("Python's headers are not installed")
    flags = [*driver.PACKAGE_FLAGS, "-O0", "-fvisibility=hidden", *(f"-I{path}" for path in includes)]
    return driver.compile_file(driver.SOURCE / "module.cpp", tmp_path_factory.mktemp("module"), flags)
