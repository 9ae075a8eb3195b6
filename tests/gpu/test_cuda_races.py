"""The CUDA C++ kernels have no data race under ThreadSanitizer, and every barrier is necessary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from host_threads import COMPILER, build, missing_compiler


def sanitizer_runtime() -> str:
    """Path of the compiler's ThreadSanitizer library."""
    name = "libtsan.so"
    command = [COMPILER, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{COMPILER} has no ThreadSanitizer library ({name})")
    return path


def launches(tmp_path: Path, left_out: int) -> list[tuple[str, int, bool]]:
    """(kernel, barrier left out or −1, whether it raced), for up to ``left_out`` barriers of each kernel."""
    reason = missing_compiler()
    if reason is not None:
        pytest.skip(reason)
    runtime = sanitizer_runtime()
    library = build(tmp_path / "kernels.so", "-fsanitize=thread")
    log = tmp_path / "races"
    # Report a race at every launch, not only once per process.
    options = f"log_path={log}:exitcode=0:suppress_equal_stacks=0:suppress_equal_addresses=0"
    program = Path(__file__).with_name("race_check.py")
    done = subprocess.run(
        [sys.executable, str(program), str(library), str(log), str(left_out)],
        env={**os.environ, "LD_PRELOAD": runtime, "TSAN_OPTIONS": options, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    reports = "".join(path.read_text() for path in tmp_path.glob("races.*"))
    assert done.returncode == 0, done.stderr[-4000:] + reports[-4000:]
    print(reports[:4000])  # pytest shows it where a test fails
    return [tuple(launch) for launch in json.loads(done.stdout)]


def test_no_race_and_a_missing_barrier_is_caught(tmp_path: Path) -> None:
    found = launches(tmp_path, left_out=1)
    assert [launch for launch in found if launch[2] != (launch[1] >= 0)] == []
    assert len(found) == 5 + 3


@pytest.mark.slow
def test_every_barrier_is_needed(tmp_path: Path) -> None:
    """Without any one barrier of any kernel, its launch has a data race."""
    found = launches(tmp_path, left_out=100)
    assert [launch for launch in found if launch[2] != (launch[1] >= 0)] == []
    assert len(found) == 5 + 2 + 5 + 9
