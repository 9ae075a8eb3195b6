"""Check the machine code of the engine: no spilled accumulators, and no VEX code outside the target regions.

Exits with status 1 if a product kernel of AVX-512 or AMX moves vectors to or from the stack, if one for bf16
does not multiply by vdpbf16ps or one for AMX not in tiles, if a function outside the regions of the AVX
instruction sets uses VEX or EVEX instructions, or if one outside the AMX kernels uses tiles. Prints the
functions at fault.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from driver import compile_engine

NO_SPILLS = re.compile(r"fastcascade::(avx512(bf16)?::(winograd_product|direct_tiles)|amx::sum_block)<")
# Winograd: 8 rows, 1 or 2 vectors; direct: 14, 14, 7 rows of 1, 2, 3, twice; AMX: 4, 2 tiles of 1, 2, thrice.
PRODUCT_KERNELS = 16 + 2 * 70 + 3 * 6
MULTIPLIES_BY = {
    re.compile(r"fastcascade::avx512bf16::direct_tiles<"): ("vdpbf16ps",),
    re.compile(r"fastcascade::amx::sum_block<"): ("tileloadd", "tdpbusd"),
}
IN_REGION = re.compile(r"fastcascade::(amx|avx(2|512|vnni|512vnni|512bf16))::")
IN_AMX = re.compile(r"fastcascade::amx::")
FRAME = re.compile(r"mov\s+%rsp,%rbp")
STACK, STACK_OR_FRAME = re.compile(r"\(%rsp"), re.compile(r"\(%r[sb]p")
VECTOR = re.compile(r"^(?!.*vbroadcast).*%zmm")  # a scalar of the epilogue may wait on the stack
VEX = re.compile(r"^\s*v[a-z0-9]+\s|%[yz]mm")
TILES = re.compile(r"^\s*(tile|ldtilecfg|sttilecfg)|%tmm")


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
    for kernels, needed in MULTIPLIES_BY.items():
        found += [
            f"{name}: does not multiply by {instruction}"
            for instruction in needed
            if kernels.search(name) and not any(instruction in line for line in instructions)
        ]
    code = [line.split("\t")[-1] for line in instructions]
    if not IN_REGION.search(name) and any(VEX.search(line) for line in code):
        found.append(f"{name}: VEX code outside a target region")
    if not IN_AMX.search(name) and any(TILES.search(line) for line in code):
        found.append(f"{name}: tiles outside the AMX kernels")
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
