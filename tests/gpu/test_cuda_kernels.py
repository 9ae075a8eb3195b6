"""The CUDA C++ kernels agree with their twins, on CPU threads and on a GPU if there is one."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from exit_head_tests import *  # noqa: F403  # tests, which pytest collects here
from exit_head_tests import SIZES, ExitHead, check_exit_head, int32
from host_threads import HostLaunch
from torch import Tensor

from fastcascade.kernels import reference
from fastcascade.kernels.argument_checks import Keep
from fastcascade.kernels.cuda import compact, exit_head
from fastcascade.kernels.cuda.launch import Launch

SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)


# ---- the exit head; most of its tests are in tests/helpers/exit_head_tests.py ----


@pytest.fixture
def kernel(launch: Launch) -> ExitHead:
    """The exit head that the imported tests check."""
    return exit_head_of(launch)


def exit_head_of(launch: Launch) -> ExitHead:
    return ExitHead(launch.device, partial(exit_head.exit_head, launch), exit_head.new_keep)


def test_subnormal_and_extreme_half_logits(kernel: ExitHead) -> None:
    """The CPU decodes half precision in C++, the device with an instruction."""
    check_exit_head(kernel, 17, dtype=torch.float16, scale=1e-6, selector="max_prob", threshold=-2.19)
    check_exit_head(kernel, 17, dtype=torch.float16, scale=2e4, selector=None, invalid=4)


# ---- compaction ----


def keep_of(flags: Tensor, capacity: int, device: torch.device) -> Keep:
    """The exit head's output for these flags, with garbage beyond them."""
    keep = exit_head.new_keep(capacity, 10, device)
    keep.flags.fill_(77)
    keep.flags[: len(flags)] = flags.to(torch.int8)
    keep.counts.zero_()
    for block, part in enumerate(flags.split(keep.rows)):
        keep.counts[block] = part.sum()
    return keep


@pytest.mark.parametrize("share", SHARES)
def test_index_compaction_keeps_the_order(launch: Launch, share: float) -> None:
    device = launch.device
    for n in SIZES:
        torch.manual_seed(n)
        index, flags = torch.randperm(n + 7).int(), torch.rand(n) < share
        out, count = torch.full_like(index, -5).to(device), int32(device, -1)
        keep = keep_of(flags, n + 7, device)
        compact.compact_index(launch, index.to(device), int32(device, n), keep, out, count)
        want = reference.compact_index(index[:n], flags)
        m = int(count)
        assert m == len(want)
        assert torch.equal(out[:m].cpu(), want)
        assert (out[m:] == -5).all(), "nothing is written beyond the survivors"


@pytest.mark.parametrize("shape", [(4, 8), (3, 7)], ids=["16-byte rows", "odd rows"])
@pytest.mark.parametrize("share", SHARES)
def test_hole_filling_matches_the_twin(launch: Launch, share: float, shape: tuple[int, ...]) -> None:
    device = launch.device
    for n, dtype in zip(SIZES, itertools.cycle([torch.float16, torch.float32, torch.uint8])):
        torch.manual_seed(n)
        rows = torch.randint(0, 200, (n + 7, *shape)).to(dtype)
        index, flags = torch.randperm(n + 7).int(), torch.rand(n) < share
        got_rows, got_index, count = (
            rows.to(device, copy=True),
            index.to(device, copy=True),
            int32(device, -1),
        )
        keep = keep_of(flags, n + 7, device)
        compact.fill_holes(launch, got_rows, got_index, int32(device, n), keep, count)
        m = reference.fill_holes(rows[:n], index[:n], flags)
        assert int(count) == m
        assert torch.equal(got_rows.cpu(), rows)
        assert torch.equal(got_index.cpu(), index)


@pytest.mark.slow
def test_more_counts_than_threads(launch: Launch) -> None:
    """A block sums more counts than it has threads."""
    n, device = 64 * 64 + 33, launch.device
    index, flags = torch.arange(n, dtype=torch.int32), torch.rand(n) < 0.4
    out, count = torch.full_like(index, -5).to(device), int32(device, -1)
    keep = keep_of(flags, n, device)
    compact.compact_index(launch, index.to(device), int32(device, n), keep, out, count)
    assert int(count) == int(flags.sum())
    assert torch.equal(out[: int(count)].cpu(), index[flags])


@pytest.mark.parametrize(("shape", "offset"), [((3, 4, 4), 0), ((5,), 0), ((2, 20, 20), 1)])
def test_gather_fills_chunks_and_zeros_the_rest(launch: Launch, shape: tuple[int, ...], offset: int) -> None:
    """Rows of 16-byte words, rows of odd size, and rows at an offset that is not 16-byte aligned."""
    device = launch.device
    source = torch.randn(30 * math.prod(shape) + offset)[offset:].view(30, *shape)
    index, n, size = torch.randperm(30).int(), 21, 8
    moved = torch.empty(source.numel() + offset, device=device)[offset:].view(source.shape).copy_(source)
    for chunk in range(4):
        bucket = torch.full((size, *shape), torch.nan, device=device)
        bucket_index = torch.full((size,), -3, dtype=torch.int32, device=device)
        count = int32(device, -1)
        arguments = (index.to(device), int32(device, n), int32(device, chunk))
        compact.gather_rows(launch, moved, *arguments, bucket, bucket_index, count)
        rows = index[:n][chunk * size : (chunk + 1) * size]
        assert int(count) == len(rows)
        assert torch.equal(bucket[: len(rows)].cpu(), source[rows.long()])
        assert torch.equal(bucket_index[: len(rows)].cpu(), rows)
        assert not bucket[len(rows) :].any()
        assert not bucket_index[len(rows) :].any()


def test_compaction_arguments_that_would_be_misread_are_refused(launch: Launch) -> None:
    device = launch.device
    n = 16
    index, count = int32(device, *range(n)), int32(device, n)
    keep = keep_of(torch.ones(n, dtype=torch.bool), n, device)
    features = torch.zeros(n, 4, device=device)
    with pytest.raises(ValueError, match="in place"):
        compact.compact_index(launch, index, count, keep, index, int32(device, 0))
    with pytest.raises(ValueError, match="int32"):
        compact.compact_index(launch, index.long(), count, keep, index.clone(), int32(device, 0))
    with pytest.raises(ValueError, match="contiguous"):
        compact.fill_holes(launch, features.T, index, count, keep, int32(device, 0))
    with pytest.raises(ValueError, match="out_count"):
        compact.fill_holes(launch, features, index, count, keep, count)
    bucket = torch.zeros(2, 5, device=device)
    with pytest.raises(ValueError, match="bucket"):
        compact.gather_rows(launch, features, index, count, count, bucket, index, count)
    with pytest.raises(ValueError, match=f"index is on {device}, rows on meta"):
        compact.fill_holes(launch, features.to("meta"), index, count, keep, int32(device, 0))
    elsewhere, wide = keep._replace(flags=keep.flags.to("meta")), keep._replace(counts=keep.counts.long())
    for strange, said in ((elsewhere, r"keep\.flags is on meta"), (wide, r"keep\.counts is torch.int64")):
        with pytest.raises(ValueError, match=said):
            compact.compact_index(launch, index, count, strange, index.clone(), int32(device, 0))
    with pytest.raises(ValueError, match=f"chunk is on meta, source on {device}"):
        compact.gather_rows(launch, features, index, count, count.to("meta"), features.clone(), index, count)


@pytest.mark.usefixtures("few_threads")
def test_blocks_may_run_in_any_order(library: Path) -> None:
    """Blocks in descending order give the same bits as in ascending order."""
    n, device = 150, torch.device("cpu")
    flags = torch.rand(n) < 0.5
    results = []
    for descending in (False, True):
        launch = HostLaunch(library, descending=descending)
        tables, _ = check_exit_head(exit_head_of(launch), 65, stage_weight=0.7, invalid=9)
        index, rows = torch.arange(n, dtype=torch.int32), torch.arange(n * 4.0).view(n, 4)
        out, counts, keep = torch.zeros_like(index), int32(device, 0, 0), keep_of(flags, n, device)
        compact.compact_index(launch, index, int32(device, n), keep, out, counts[:1])
        compact.fill_holes(launch, rows, index, int32(device, n), keep, counts[1:])
        results.append((*tables, out, counts, rows, index))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
