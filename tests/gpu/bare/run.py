"""Device tests of every kernel, then ``bench/gpu.py --quick``, in ten minutes without an installation.

The sources run from a module path of their own. They need torch with CUDA, triton, cupy and pytest;
pytest-xdist is used if it is present. Other packages that are missing have stand-ins.

    python tests/gpu/bare/run.py                at most 4 minutes of tests and 5 of measurements
    python tests/gpu/bare/run.py --dry-run      the same without a GPU, as far as possible

``gpu-report.json`` is rewritten after every part, so an interrupted run still reports.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from stand_ins import write_stand_ins

ROOT = Path(__file__).resolve().parents[3]
TESTS = (
    "tests/gpu/device/test_resident_device.py",
    "tests/gpu/test_cuda_kernels.py",
    "tests/gpu/test_cuda_backend.py",
    "tests/gpu/device/test_exit_head.py",
    "tests/gpu/device/test_compact.py",
    "tests/gpu/device/test_persistent.py",
    "tests/gpu/device/test_layer_stages.py",
    "tests/gpu/device/test_triton_backend.py",
)
"""The newest kernels first, so that an interrupted run has them."""

DRY_TESTS = ("tests/gpu/device/test_resident_device.py", "tests/gpu/device/test_compact.py")
TEST_SECONDS, BENCH_SECONDS = 240, 300
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


def limited(command: list[str], seconds: float, env: dict[str, str]) -> tuple[int | None, str]:
    """Run a command; returns its exit status, None after a timeout, and the end of its output.

    It runs outside the checkout, whose ``fastcascade`` would be imported first and has no kernels.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=env["PYTHONPATH"], env=env, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            code = None
        output.seek(0)
        return code, output.read()[-6000:]


def run_tests(path: Path, dry_run: bool, seconds: float) -> dict[str, Any]:
    """Run the tests file by file; returns counts, failures, and files that were not finished in time."""
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": 0, "unfinished": []}
    begin = time.monotonic()
    options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    if dry_run:
        options += ["-m", "not slow"]
    for file in DRY_TESTS if dry_run else TESTS:
        left = seconds - (time.monotonic() - begin)
        if left < 5:
            found["unfinished"].append(file)
            continue
        report = path / "junit.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", str(ROOT / file), *options, f"--junit-xml={report}"]
        code, text = limited(command, left, environment(path, dry_run))
        if not report.exists():
            found["unfinished"].append(file)
            found.setdefault("output", {})[file] = text[-2000:]
            continue
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            name = f"{file}::{case.get('name')}"
            if kinds & {"failure", "error"}:
                message = next(child for child in case if child.tag in ("failure", "error"))
                found["failed"].append([name, (message.get("message") or "")[:500]])
            else:
                found["skipped" if "skipped" in kinds else "passed"] += 1
        print(f"{file}: exit status {code}, {found['passed']} passed so far", flush=True)
    found["took_s"] = round(time.monotonic() - begin, 1)
    return found


def main() -> int:
    """Write the report after the tests and after measuring; 1 if a test failed or results disagreed."""
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
        report: dict[str, Any] = {"dry_run": arguments.dry_run}
        failed = False
        if arguments.only != "bench":
            report["tests"] = run_tests(path, arguments.dry_run, TEST_SECONDS)
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
            for name, message in report["tests"]["failed"]:
                print(f"FAILED {name}: {message}")
            failed = bool(report["tests"]["failed"]) or report["tests"]["passed"] == 0
        if arguments.only != "tests":
            measured = path / "bench.json"
            command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--quick", "--output", str(measured)]
            command += ["--dry-run"] if arguments.dry_run else ["--seconds", str(BENCH_SECONDS - 20)]
            code, text = limited(command, BENCH_SECONDS, environment(path, arguments.dry_run))
            print(text)
            report["bench"] = json.loads(measured.read_text()) if measured.exists() else {"output": text}
            report["bench"]["exit_status"] = code
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
            failed |= code != 0
        return 1 if failed else 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
