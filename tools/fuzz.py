"""Build the engine's torch-free driver, plain or with a sanitizer, and fuzz for some seconds.

python tools/fuzz.py --sanitize none|address|thread --seconds 300 --seed 1
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "none": ["-O3"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


def build(sanitizer: str, target: Path) -> None:
    """Compile the driver."""
    sources = [str(path) for path in (ROOT / "csrc").glob("**/*.cpp") if path.name != "module.cpp"]
    command = ["g++", "-std=c++17", *FLAGS[sanitizer], *sources, "-pthread", "-o", str(target)]
    subprocess.run(command, check=True)


def main() -> int:
    """Build, run, and return the driver's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", choices=FLAGS, default="none")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder) / "fuzz"
        build(options.sanitize, driver)
        return subprocess.run([driver, str(options.seconds), str(options.seed)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
