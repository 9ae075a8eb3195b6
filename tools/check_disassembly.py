"""Read what the compiler made of the kernels: no spilled accumulators, no VEX code where any CPU must run.

Exits 1 and names the functions where the AVX-512 product kernels move vectors to or from the stack, or where
code outside the AVX2 and AVX-512 regions uses VEX or EVEX instructions.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_SPILLS = re.compile(r"fastcascade::avx512::(winograd_product|direct_tile)<")
IN_REGION = re.compile(r"fastcascade::avx(2|512)::")
SPILL = re.compile(r"%zmm.*\(%rsp|\(%rsp.*%zmm")
VEX = re.compile(r"^\s*v[a-z0-9]+\s|%[yz]mm")


def functions(source: Path, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Compile a file as the package does; yield (name, instructions) of every function."""
    target = folder / (source.stem + ".o")
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fPIC"]
    subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True)
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", "--no-addresses", str(target)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for block in re.split(r"\n\n+", listing):
        head, _, body = block.partition(":\n")
        if head.startswith("<"):
            yield head.strip("<>"), body.splitlines()


def faults(name: str, instructions: list[str]) -> list[str]:
    """What is wrong with one function."""
    found = []
    if NO_SPILLS.search(name) and any(SPILL.search(line) for line in instructions):
        found.append(f"{name}: spills vectors to the stack")
    if not IN_REGION.search(name) and any(VEX.search(line.split("\t")[-1]) for line in instructions):
        found.append(f"{name}: VEX code outside a target region")
    return found


def main() -> int:
    """Check every source file of the engine but the Python module."""
    found, kernels = [], 0
    sources = [p for p in sorted((ROOT / "csrc").glob("**/*.cpp")) if p.parent.name != "driver"]
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            if source.name == "module.cpp":
                continue
            for name, instructions in functions(source, Path(folder)):
                kernels += bool(NO_SPILLS.search(name))
                found += faults(name, instructions)
    if kernels < 16:
        found.append(f"found only {kernels} product kernels; their names must have changed")
    print("\n".join(found) or f"{kernels} product kernels keep their accumulators in registers")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
