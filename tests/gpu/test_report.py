"""bench/gpu.py without a GPU: it reports that, runs under the interpreter, and rejects wrong results."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PROGRAM = Path(__file__).parents[2] / "bench" / "gpu.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(PROGRAM), "--output", str(folder / "report.json"), *options],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "no GPU" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_part_runs_and_agrees_and_a_dry_run_has_no_figures(tmp_path: Path) -> None:
    done = run(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr[-4000:]
    text = (tmp_path / "report.json").read_text()
    report = json.loads(text)
    (small,) = report["models"].values()
    forms = small["batches"]["2"]
    assert len(forms) == 3
    assert all("max_error" in entry for entry in [*report["kernels"].values(), *forms.values()])
    assert len(small["stages"]) == 2
    assert all("one launch" in stage["schedule"] for stage in small["stages"])
    assert "seconds" not in text


def test_what_disagrees_gets_no_figure(gpu: ModuleType) -> None:
    called = []
    timed = gpu.Run(torch.device("cpu"))
    wrong = gpu.gated(
        timed, lambda: gpu.closeness(torch.ones(3), torch.tensor([1.0, 1.0, 2.0])), lambda: called.append(1)
    )
    assert "refused" in wrong
    assert "seconds" not in wrong
    assert not called
    rated = gpu.rates({"seconds": 0.5}, moved=1e9, flops=3e12)
    assert (rated["gb_per_s"], rated["tflop_per_s"]) == (2.0, 6.0)
    found = {"kernels": {"k": wrong}, "models": {}}
    assert len(gpu.refusals(found)) == 1


def test_labels_that_differ_are_refused_unless_two_classes_tie(gpu: ModuleType) -> None:
    want = torch.tensor([[0.9, 0.1], [0.500001, 0.499999]]).log()
    gpu.labels_agree(torch.tensor([0, 1]), want, torch.tensor([0, 0]))
    with pytest.raises(AssertionError, match="1 of 2 labels differ"):
        gpu.labels_agree(torch.tensor([1, 0]), want, torch.tensor([0, 0]))
