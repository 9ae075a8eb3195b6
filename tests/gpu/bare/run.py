"""Device tests of every kernel and ``bench/gpu.py --quick``, in ten minutes without an installation.

The sources run from a module path of their own. They need torch with CUDA, triton, cupy and pytest;
pytest-xdist is used if it is present. Other packages that are missing have stand-ins.

    python tests/gpu/bare/run.py                at most 4 minutes of tests and 5 of measurements
    python tests/gpu/bare/run.py --dry-run      the same without a GPU, as far as possible

The most important questions come first: is the resident kernel right? Is it faster than torch.compile? Then
the tests of the other kernels, and every way to run a stage at every batch size. ``gpu-report.json`` is
rewritten after every file of tests and every measurement, so an interrupted run still reports.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from stand_ins import write_stand_ins

ROOT = Path(__file__).resolve().parents[3]
RESIDENT_TESTS = ("tests/gpu/device/test_resident_device.py",)
OTHER_TESTS = (
    "tests/gpu/test_cuda_kernels.py",
    "tests/gpu/test_cuda_backend.py",
    "tests/gpu/device/test_exit_head.py",
    "tests/gpu/device/test_compact.py",
    "tests/gpu/device/test_persistent.py",
    "tests/gpu/device/test_layer_stages.py",
    "tests/gpu/device/test_triton_backend.py",
)
DRY_TESTS = ("tests/gpu/device/test_compact.py",)
"""Of the other tests, for a dry run: the interpreter needs minutes for all of them."""


class Part(NamedTuple):
    """Files of tests, or options of ``bench/gpu.py --quick``, and a limit in seconds."""

    name: str
    seconds: float
    tests: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


PARTS = (
    Part("tests of the resident kernel", 110, tests=RESIDENT_TESTS),
    Part("the resident kernel beside torch", 120, options=("--part", "core")),
    Part("tests of the other kernels", 130, tests=OTHER_TESTS),
    Part("every way to run a stage", 180, options=("--part", "rest")),
)
"""In the order of what they tell."""

WORKERS = 8


def module_path(folder: Path) -> Path:
    """A folder for PYTHONPATH in which ``fastcascade.kernels`` is the top-level ``kernels``."""
    package = folder / "fastcascade"
    package.mkdir(parents=True, exist_ok=True)
    for entry in (ROOT / "fastcascade").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    return folder


def environment(path: Path, dry_run: bool) -> dict[str, str]:
    """The environment of the tests and the benchmark."""
    own = {
        **os.environ,
        "PYTHONPATH": str(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    return own | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry_run else {})


def merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add the entries of one report to another's, level by level."""
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict):
            merge(whole[key], value)
        else:
            whole[key] = value


def limited(
    command: list[str], seconds: float, env: dict[str, str], watch: Callable[[], None] = lambda: None
) -> tuple[int | None, str]:
    """Run a command; returns its exit status, None after a timeout, and the end of its output.

    It runs outside the checkout, whose ``fastcascade`` would be imported first and has no kernels.

    Args:
        watch: called every second.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=env["PYTHONPATH"], env=env, stdout=output, stderr=subprocess.STDOUT
        )
        end, code = time.monotonic() + seconds, None
        while code is None and time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(1)
            watch()
        if code is None:
            process.send_signal(signal.SIGINT)  # on which pytest still writes its report
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        output.seek(0)
        return code, output.read()[-6000:]


class BareRun:
    """One run; its report is written whenever it grows.

    Args:
        path: the module path; output: the report's file.
    """

    def __init__(self, path: Path, output: Path, dry_run: bool) -> None:
        self.path, self.output, self.dry_run = path, output, dry_run
        self.environment = environment(path, dry_run)
        self.report: dict[str, Any] = {
            "dry_run": dry_run,
            "tests": {"passed": 0, "failed": [], "skipped": 0, "unfinished": []},
            "bench": {},
            "seconds": {},
        }
        self.failed = False

    def run(self, part: Part) -> None:
        """Run one part within its time."""
        begin = time.monotonic()
        print(f"==> {part.name}, at most {part.seconds:.0f} s", flush=True)
        for file in self._files(part):
            left = part.seconds - (time.monotonic() - begin)
            self._test(file, left)
        if not part.tests:
            self._measure(part)
        self.report["seconds"][part.name] = round(time.monotonic() - begin, 1)
        self._write()

    def _files(self, part: Part) -> tuple[str, ...]:
        if part.tests == OTHER_TESTS and self.dry_run:
            return DRY_TESTS
        return part.tests

    def _write(self) -> None:
        text = json.dumps(self.report, indent=1) + "\n"
        fresh = self.output.with_name(self.output.name + ".new")
        fresh.write_text(text)
        fresh.replace(self.output)

    def _test(self, file: str, seconds: float) -> None:
        """Run one file of tests; its counts, failures and skips go into the report."""
        found = self.report["tests"]
        if seconds < 5:
            found["unfinished"].append(file)
            return
        junit = self.path / "junit.xml"
        junit.unlink(missing_ok=True)
        options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        if importlib.util.find_spec("xdist") is not None:
            options += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
        if self.dry_run:
            options += ["-m", "not slow"]
        command = [sys.executable, "-m", "pytest", str(ROOT / file), *options, f"--junit-xml={junit}"]
        code, text = limited(command, seconds, self.environment)
        if junit.exists():
            self._count(file, junit)
        if code is None or not junit.exists():
            found["unfinished"].append(file)
            found.setdefault("output", {})[file] = text[-2000:]
        counts = ", ".join(f"{found[kind]} {kind}" for kind in ("passed", "skipped"))
        print(f"{file}: exit status {code}; so far {counts}, {len(found['failed'])} failed", flush=True)
        self._write()

    def _count(self, file: str, junit: Path) -> None:
        found = self.report["tests"]
        for case in ElementTree.parse(junit).iter("testcase"):
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                message = next(child for child in case if child.tag in ("failure", "error")).get("message")
                found["failed"].append([f"{file}::{case.get('name')}", (message or "")[:500]])
                print(f"FAILED {file}::{case.get('name')}: {(message or '')[:500]}", flush=True)
                self.failed = True
            else:
                found["skipped" if "skipped" in kinds else "passed"] += 1

    def _measure(self, part: Part) -> None:
        """Run the short benchmark; the report grows with every entry."""
        measured = self.path / "bench.json"
        measured.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--quick", "--output", str(measured)]
        command += [
            *part.options,
            *(["--dry-run"] if self.dry_run else ["--seconds", str(part.seconds - 20)]),
        ]

        def collect() -> None:
            with suppress(OSError, json.JSONDecodeError):  # not there yet, or half written
                merge(self.report["bench"], json.loads(measured.read_text()))
                self._write()

        code, text = limited(command, part.seconds, self.environment, collect)
        print(text, flush=True)
        self.report["bench"].setdefault("exit_status", {})[part.name] = code
        if code != 0:
            self.report["bench"].setdefault("output", {})[part.name] = text[-2000:]
            self.failed = True


def main() -> int:
    """Run all parts; 1 if a test failed, none passed, or results disagreed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-report.json")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, as far as it goes")
    parser.add_argument("--only", choices=("tests", "bench"))
    parser.add_argument("--stand-ins", nargs="*", help="write these although they are installed, for a test")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fastcascade-bare-"))
    try:
        path = module_path(folder)
        named = None if arguments.stand_ins is None else tuple(arguments.stand_ins)
        print("stand-ins:", ", ".join(write_stand_ins(path, named)) or "none", flush=True)
        run = BareRun(path, arguments.output, arguments.dry_run)
        for part in PARTS:
            if arguments.only is None or (arguments.only == "tests") == bool(part.tests):
                run.run(part)
        return int(run.failed or (arguments.only != "bench" and run.report["tests"]["passed"] == 0))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
