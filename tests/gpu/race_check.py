"""Run the CUDA kernels on CPU threads under ThreadSanitizer, and report the launches with data races.

Started by ``test_cuda_races.py`` in a process of its own, because the sanitizer's run-time library must be
loaded before Python. Prints one line of JSON: for each launch the kernel, the barrier that was left out (−1
for none) and whether a data race was reported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from host_threads import HostLaunch

from fastcascade.kernels import reference
from fastcascade.kernels.argument_checks import Keep
from fastcascade.kernels.cuda import compact, exit_head
from fastcascade.kernels.cuda.launch import Launch

N = 70  # one full block of rows and a partial one
MARGIN = 1 << 14


def roomy(values: torch.Tensor) -> torch.Tensor:
    """A copy amid padding, because a kernel without a barrier computes wrong addresses."""
    room = torch.zeros(len(values) + 2 * MARGIN, dtype=values.dtype)
    room[MARGIN:-MARGIN] = values
    return room[MARGIN:-MARGIN]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def active() -> torch.Tensor:
    return roomy(torch.arange(N, dtype=torch.int32))


def keep() -> Keep:
    flags = (torch.arange(N) % 3 > 0).to(torch.int8)
    counts = int32(int(flags[:64].sum()), int(flags[64:].sum()))
    return Keep(roomy(flags), roomy(counts), exit_head.BLOCK_ROWS)


def run_exit_head(launch: Launch) -> None:
    n = 9  # shuffles under the sanitizer are slow
    tables, new = reference.exit_tables(n, 10), exit_head.new_keep(n, 10, "cpu")
    arguments = (tables, torch.randn(n, 10), active(), int32(n), 0, new)
    exit_head.exit_head(launch, *arguments, stage_weight=0.7, selector="margin", threshold=torch.zeros(1))


def run_compact_index(launch: Launch) -> None:
    compact.compact_index(launch, active(), int32(N), keep(), active(), int32(0))


def run_plan_holes(launch: Launch) -> None:
    flags, counts, _ = keep()
    launch("plan_holes_kernel", 2, 64, int32(N), flags, counts, active(), active(), int32(0), int32(0))


def run_fill_holes(launch: Launch) -> None:
    compact.fill_holes(launch, torch.zeros(N, 4), active(), int32(N), keep(), int32(0))


def run_gather_rows(launch: Launch) -> None:
    bucket, bucket_index = torch.zeros(5, 4), int32(*[0] * 5)
    rows = torch.randn(N, 4)
    compact.gather_rows(launch, rows, active(), int32(N), int32(1), bucket, bucket_index, int32(0))


RUNS: dict[str, tuple[Callable[[Launch], None], int]] = {
    "exit_head": (run_exit_head, 2),
    "compact_index": (run_compact_index, 5),
    "plan_holes": (run_plan_holes, 9),
    "fill_holes": (run_fill_holes, 0),
    "gather_rows": (run_gather_rows, 0),
}
"""By kernel, a launch and the number of barriers in its first block, each of which is left out in turn."""


def main(library: Path, log: Path, most: int) -> None:
    """Leave out up to ``most`` barriers of each kernel, one at a time.

    ``log`` is TSAN_OPTIONS' log_path, to which the sanitizer appends the process's number.
    """
    compact.MOVE_BLOCKS, compact.MOVE_THREADS = 3, 64
    exit_head.THREADS = 64
    log = Path(f"{log}.{os.getpid()}")
    found = []
    for name, (run, barriers) in RUNS.items():
        for left_out in range(-1, min(barriers, most)):
            before = log.stat().st_size if log.exists() else 0
            run(HostLaunch(library, left_out=left_out))
            text = log.read_text()[before:] if log.exists() else ""
            found.append([name, left_out, "data race" in text])
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
