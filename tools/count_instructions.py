"""Count the instructions of a fixed workload of the engine under callgrind, and record them for the tests.

With one compiler, counts are reproducible to the instruction; another libc changes them by less than 1 %.
Valgrind has no AVX-512; tools/check_disassembly.py checks those kernels instead. Run this after a change that
is meant to add or remove instructions:

python tools/count_instructions.py
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

from driver import SOURCE, compile_engine, link_driver

RECORD = SOURCE.parent / "tests" / "cpu" / "instruction_counts.json"
ISAS = ("avx2", "portable")


def compiler() -> str:
    """The compiler's name and version."""
    text = subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout
    return text.splitlines()[0]


def count(workload: Path, isa: str) -> dict[str, int]:
    """Instructions of one warm call on one thread, for every case of the workload."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "--tool=callgrind",
            "--collect-atstart=no",
            "--toggle-collect=measured_run",
            "--dump-after=measured_run",
            f"--callgrind-out-file={folder}/out",
        ]
        run = subprocess.run(
            ["valgrind", "-q", *options, workload, isa, "1"], check=True, capture_output=True, text=True
        )
        names = [line.split()[0] for line in run.stdout.splitlines()]
        totals = [_total(Path(folder) / f"out.{i + 1}") for i in range(len(names))]
    return dict(zip(names, totals, strict=True))


def _total(dump: Path) -> int:
    found = re.search(r"^totals: (\d+)$", dump.read_text(), re.MULTILINE)
    assert found, f"{dump} contains no total"
    return int(found[1])


def main() -> None:
    """Build, count on every instruction set, and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        workload = link_driver("workload", compile_engine(Path(folder)))
        counts = {isa: count(workload, isa) for isa in ISAS}
    RECORD.write_text(json.dumps({"compiler": compiler(), "counts": counts}, indent=2) + "\n")
    print(RECORD.read_text(), end="")


if __name__ == "__main__":
    main()
