"""Check the machine code of the engine: no spilled accumulators, and no VEX code outside the target regions.

Exits with status 1 if an AVX-512 product kernel moves vectors to or from the stack, if one for bf16 does not
multiply by vdpbf16ps, or if a function outside the regions of the AVX instruction sets uses VEX or EVEX
instructions. Prints the functions at fault.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from driver import compile_engine

NO_SPILLS = re.compile(r"fastcascade::avx512(bf16)?::(winograd_product|direct_tiles)<")
PRODUCT_KERNELS = 16 + 2 * 70  # Winograd: 8 rows, 1 or 2 vectors; direct: 14, 14, 7 rows of 1, 2, 3, twice
IN_BF16 = re.compile(r"fastcascade::avx512bf16::direct_tiles<")
IN_REGION = re.compile(r"fastcascade::avx(2|512|vnni|512vnni|512bf16)::")
FRAME = re.compile(r"mov\s+%rsp,%rbp")
STACK, STACK_OR_FRAME = re.compile(r"\(%rsp"), re.compile(r"\(%r[sb]p")
VECTOR = re.compile(r"^(?!.*vbroadcast).*%zmm")  # a scalar of the epilogue may wait on the stack
VEX = re.compile(r"^\s*v[a-z0-9]+\s|%[yz]mm")


def functions(target: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, instructions) of every function in an object file."""
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
    """The faults of one function."""
    found = []
    # rbp is a frame pointer only in functions that set it up; elsewhere it is a general register.
    stack = STACK_OR_FRAME if any(FRAME.search(line) for line in instructions) else STACK
    if NO_SPILLS.search(name) and any(stack.search(line) and VECTOR.search(line) for line in instructions):
        found.append(f"{name}: spills vectors to the stack")
    if IN_BF16.search(name) and not any("vdpbf16ps" in line for line in instructions):
        found.append(f"{name}: does not multiply by vdpbf16ps")
    if not IN_REGION.search(name) and any(VEX.search(line.split("\t")[-1]) for line in instructions):
        found.append(f"{name}: VEX code outside a target region")
    return found


def all_faults(objects: Sequence[Path]) -> list[str]:
    """The faults of all object files."""
    found, kernels = [], 0
    for target in objects:
        for name, instructions in functions(target):
            kernels += bool(NO_SPILLS.search(name))
            found += faults(name, instructions)
    if kernels < PRODUCT_KERNELS:
        found.append(f"found {kernels} product kernels, expected {PRODUCT_KERNELS}; does NO_SPILLS match?")
    return found


def main() -> int:
    """Check every source file of the engine but the Python module."""
    with tempfile.TemporaryDirectory() as folder:
        found = all_faults(compile_engine(Path(folder)))
    print(
        "\n".join(found) or "product kernels keep their accumulators in registers; baseline code has no VEX"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
