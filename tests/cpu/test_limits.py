"""What the machine does not have: helper threads, memory; and pixels that only some algorithms can take.

Limits hold for a process for good, so each case runs in one of its own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch

import fastcascade as fc
from fastcascade import _C
from fastcascade.backends.cpu import CpuProgram
from fastcascade.lowering.plan import Plan
from fastcascade.model.resnet import resnet_cifar
from fastcascade.testing import randomise_statistics

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's limits")
HELPERS = """
import os, resource, sys
import numpy as np
import torch
import fastcascade as fc
from fastcascade import _C
from fastcascade.backends.cpu import CpuProgram
from fastcascade.errors import BackendUnavailable, FastCascadeError
from fastcascade.lowering.operations import Conv2d, Flatten, Pool
from fastcascade.lowering.plan import Plan, StagePlan
from fastcascade.types import InputSpec

def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def limit_memory(beyond):
    total = address_space() + beyond
    resource.setrlimit(resource.RLIMIT_AS, (total, total))

def limit_threads():
    if os.getuid() == 0:
        os.setuid(65534)  # root has no such limit
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

def small_plan(side=8, classes=10):
    torch.manual_seed(0)
    weight = torch.randn(classes, 3, 3, 3)
    ops = (
        Conv2d(output=1, input=0, weight=weight, bias=torch.zeros(classes), padding=(1, 1, 1, 1)),
        Pool(output=2, input=1, kind="average", kernel=(side, side), stride=(1, 1)),
        Flatten(output=3, input=2),
    )
    shapes = ((3, side, side), (classes, side, side), (classes, 1, 1), (classes,))
    stage = StagePlan("s", "image", 1, 0, None, shapes, ops, features=0, logits=3)
    return Plan((stage,), InputSpec(shapes[0]), classes, "last", 1, torch.empty(0))
"""


def run_limited(code: str) -> str:
    """What a process prints that runs this code after HELPERS."""
    done = subprocess.run(
        [sys.executable, "-c", HELPERS + textwrap.dedent(code)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


# ---- threads ----


@LINUX
@pytest.mark.parametrize(("limit", "threads"), [("limit_memory(200 << 20)", 256), ("limit_threads()", 64)])
def test_helpers_that_cannot_start_are_done_without(limit: str, threads: int) -> None:
    """Small batches and large ones, again and again: the same bits on the threads there are."""
    run_limited(f"""
        plan, none = small_plan(), torch.empty(0)
        batches = [torch.randn(n, 3, 8, 8) for n in (1, 7, 100, 6000)]
        expected = [CpuProgram(plan, 1).run(x, none) for x in batches]
        program = CpuProgram(plan, {threads})
        {limit}
        for _ in range(3):
            for x, want in zip(batches, expected):
                got = program.run(x, none)
                assert torch.equal(got.log_probs, want.log_probs) and torch.equal(got.label, want.label)
    """)


# ---- memory ----


def padded_stage(side: int) -> dict[str, object]:
    """A stage of a few hundred bytes that pads one pixel to side × side and takes the average."""
    pad = {
        "op": "Pad",
        "output": 1,
        "inputs": [0],
        "before": [0] * 3,
        "after": [0, side - 1, side - 1],
        "value": 0.0,
        "mode": "constant",
    }
    pool = {
        "op": "Pool",
        "output": 2,
        "inputs": [1],
        "kind": "average",
        "kernel": [side, side],
        "stride": [1, 1],
        "padding": [0] * 4,
        "ceil_mode": False,
        "include_padding": True,
    }
    return {
        "name": "s",
        "input": "image",
        "keeps_features": False,
        "shape": [1, 1, 1],
        "ops": [pad, pool],
        "features": 0,
        "logits": 2,
    }


def test_more_memory_than_the_machine_has_is_refused_before_it_is_taken() -> None:
    """11,000² pixels of 16 channels at 4 bytes are 7.2 GiB for every thread."""
    with pytest.raises(MemoryError, match=r"need .* GiB for 512 threads, but .* are left"):
        _C.Cascade([padded_stage(11_000)], [None], 1, threads=512)


@LINUX
def test_what_to_try_where_memory_ends() -> None:
    """Too many threads when compiling, and too many rows when running."""
    run_limited("""
        def refused(kind, call, *words):
            try:
                call()
            except kind as error:
                assert all(word in str(error) for word in words), error
            else:
                raise AssertionError("found memory")

        wide, small = small_plan(side=200, classes=16), small_plan()
        fast = fc.compile(small, backend="cpu", threads=1)
        image = torch.zeros(1, 3, 8, 8)
        fast(image)
        limit_memory(300 << 20)
        compile = lambda: fc.compile(wide, backend="cpu", threads=512)
        refused(BackendUnavailable, compile, "512 threads", "try threads=")
        fc.compile(wide, backend="cpu", threads=1)(torch.zeros(2, 3, 200, 200))
        for rows in (20_000_000, 4_000_000):
            batch = image.expand(rows, 3, 8, 8)
            refused(FastCascadeError, lambda: fast(batch), f"{rows} images", f"batches of {rows // 2}")
        fast(image)
    """)


# ---- large pixels ----


@cache
def plan_of_a_network() -> Plan:
    torch.manual_seed(1)
    network = randomise_statistics(resnet_cifar(8)).eval()
    return fc.plan(fc.Cascade([network], None, 10, (3, 16, 16)))


@pytest.mark.parametrize("value", [1e21, 1e30, 1e38, 3e38, -1e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kernel", ["conv_direct_f32", "conv3x3_winograd_f32"])
def test_pixels_beyond_the_limit_make_a_row_invalid(value: float, kernel: str) -> None:
    """Whatever the algorithm: a transform may overflow where a plain sum does not."""
    x = torch.randn(5, 3, 16, 16)
    x[3, 1, 5, 6] = value
    out = CpuProgram(plan_of_a_network(), 1, kernel=kernel).run(x, torch.empty(0))
    assert (out.label == -1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("kernel", ["conv_direct_f32", "conv3x3_winograd_f32"])
def test_pixels_within_the_limit_stay_valid(kernel: str) -> None:
    x = torch.randn(4, 3, 16, 16) * 1e19
    x[2, 0, 0, 0] = 1e20
    out = CpuProgram(plan_of_a_network(), 1, kernel=kernel).run(x, torch.empty(0))
    assert (out.label >= 0).all()
