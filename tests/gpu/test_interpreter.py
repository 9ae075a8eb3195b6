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
from ran import NVIDIA, QUICK, SLOW, shortfall

FILES = [
    file for file in sorted(Path(__file__).with_name("device").glob("test_*.py")) if file.stem not in NVIDIA
]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here; tests/gpu/device runs on it"),
]


def interpret(file: Path, report: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run one file of device tests in a process with the interpreter, which writes a JUnit report."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(file),
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *options,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=file.parent,  # Python imports from this folder first, which has no copy of the package
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_quick(file: Path, tmp_path: Path) -> None:
    run = interpret(file, tmp_path / "report.xml", "-m", "not slow")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert file.stem in QUICK, "say in tests/helpers/ran.py how many tests of this file must pass"
    assert shortfall(tmp_path / "report.xml", {file.stem: QUICK[file.stem]}) == []


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_thorough(file: Path, tmp_path: Path) -> None:
    run = interpret(file, tmp_path / "report.xml", "-m", "slow")
    nothing_marked = 5  # pytest's code for an empty selection
    assert run.returncode == (0 if file.stem in SLOW else nothing_marked), (
        run.stdout[-4000:] + run.stderr[-2000:]
    )
    assert shortfall(tmp_path / "report.xml", {file.stem: SLOW.get(file.stem, 0)}) == []


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("assert True", None),
        ("pytest.skip('no reason')", "was skipped: no reason"),
        ("pytest.xfail('no reason')", "was skipped: no reason"),
    ],
)
def test_a_suite_in_which_everything_is_skipped_falls_short(
    tmp_path: Path, body: str, complaint: str | None
) -> None:
    file, report = tmp_path / "test_stub.py", tmp_path / "report.xml"
    file.write_text(f"import pytest\n\ndef test_one():\n    {body}\n")
    run = interpret(file, report, "-c", os.devnull)
    assert run.returncode == 0
    found = shortfall(report, {"test_stub": 1})
    if complaint is None:
        assert found == []
    else:
        assert complaint in found[0]
        assert found[1] == "test_stub: 0 of at least 1 passed"


def test_a_module_that_skips_itself_falls_short(tmp_path: Path) -> None:
    file, report = tmp_path / "test_stub.py", tmp_path / "report.xml"
    file.write_text("import pytest\n\npytest.importorskip('no_such_package')\n")
    interpret(file, report, "-c", os.devnull)
    assert "test_stub: 0 of at least 1 passed" in shortfall(report, {"test_stub": 1})
