"""The bare GPU run: what it imports, what it writes, and when."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from files_as_modules import load

FOLDER = Path(__file__).with_name("bare")

ONLY_STAND_INS = """
import sys
from importlib.machinery import PathFinder

class OnlyStandIns:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            spec = PathFinder.find_spec(name, path or [{folder!r}])
            if spec is None:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
            return spec

sys.meta_path.insert(0, OnlyStandIns())
sys.path[:0] = {paths!r}
import gpu
import resident_cases
from fastcascade.backends.gpu.resident_stage import choose_resident
"""
"""Imports what the run imports; of the dependencies other than torch and numpy only stand-ins are found."""


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``bare/run.py`` as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return load(FOLDER / "run.py")


def test_torch_and_numpy_and_stand_ins_are_enough(bare: ModuleType, tmp_path: Path) -> None:
    required = importlib.metadata.requires("fastcascade") or []
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in required if "extra" not in line}
    blocked = names - {"torch", "numpy"}
    assert len(blocked) >= 5
    path = bare.module_path(tmp_path)
    bare.write_stand_ins(path, tuple(load(FOLDER / "stand_ins.py").PACKAGES))
    root = FOLDER.parents[2]
    code = ONLY_STAND_INS.format(
        blocked=blocked,
        folder=str(path),
        paths=[str(path), str(root / "tests" / "helpers"), str(root / "bench")],
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_resident_kernel_comes_first_and_all_parts_fit_ten_minutes(bare: ModuleType) -> None:
    assert bare.PARTS[0].tests == bare.RESIDENT_TESTS
    assert bare.PARTS[1].options == ("--part", "core")
    assert sum(part.seconds for part in bare.PARTS) <= 560
    files = [file for part in bare.PARTS for file in part.tests]
    assert all((FOLDER.parents[2] / file).exists() for file in files)
    device = {f"tests/gpu/device/{path.name}" for path in FOLDER.with_name("device").glob("test_*.py")}
    assert device <= set(files), "every file of device tests belongs to a part"


def test_what_was_measured_before_an_interruption_is_in_the_report(
    bare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark that hangs after its first entry."""
    program = tmp_path / "bench" / "gpu.py"
    program.parent.mkdir()
    program.write_text(
        "import json, pathlib, sys, time\n"
        "output = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])\n"
        "output.write_text(json.dumps({'models': {'net': {'4096': {sys.argv[4]: 1}}}}))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(bare, "ROOT", tmp_path)
    report = tmp_path / "gpu-report.json"
    run = bare.BareRun(tmp_path, report, dry_run=True)
    for name in ("one", "two"):
        run.run(bare.Part(name, 3, options=(name,)))
    found = json.loads(report.read_text())
    assert found["bench"]["exit_status"] == {"one": None, "two": None}
    assert found["bench"]["models"]["net"]["4096"] == {"one": 1, "two": 1}
    assert run.failed
