"""Build the engine's fuzzer, optionally with a sanitizer, and run it for some seconds.

python tools/fuzz.py --sanitize none|address|thread --seconds 300 --seed 1
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from driver import PACKAGE_FLAGS, compile_engine, link_driver

FLAGS = {
    "none": PACKAGE_FLAGS,
    "address": ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}


def main() -> int:
    """Build, run, and return the exit status of the fuzzer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", choices=FLAGS, default="none")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    flags = FLAGS[options.sanitize]
    with tempfile.TemporaryDirectory() as folder:
        driver = link_driver("fuzz", compile_engine(Path(folder), flags), flags)
        return subprocess.run([driver, str(options.seconds), str(options.seed)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
