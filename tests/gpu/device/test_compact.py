"""The Triton compaction kernels agree with their twins, bit for bit."""

import pytest
import torch
from torch import Tensor

from fastcascade.kernels import reference
from fastcascade.kernels.argument_checks import Keep

compact = pytest.importorskip("fastcascade.kernels.triton.compact", reason="triton is not installed")

SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 300)
SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)


def keep_of(flags: Tensor, capacity: int, rows: int, device: torch.device) -> Keep:
    """The exit head's output for these flags, with garbage beyond them."""
    padded = torch.full((capacity,), 77, dtype=torch.int8)
    padded[: len(flags)] = flags.to(torch.int8)
    counts = torch.zeros(-(-capacity // rows), dtype=torch.int32)
    for block, part in enumerate(flags.split(rows)):
        counts[block] = part.sum()
    return Keep(padded.to(device), counts.to(device), rows)


def device_count(n: int, device: torch.device) -> Tensor:
    return torch.tensor([n], dtype=torch.int32, device=device)


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("share", SHARES)
def test_index_compaction_keeps_the_order(device: torch.device, share: float, rows: int) -> None:
    for n in SIZES:
        torch.manual_seed(n)
        index, flags = torch.randperm(n + 7).int(), torch.rand(n) < share
        out, count = torch.full_like(index, -5).to(device), device_count(-1, device)
        compact.compact_index(
            index.to(device), device_count(n, device), keep_of(flags, n + 7, rows, device), out, count
        )
        want = reference.compact_index(index[:n], flags)
        m = int(count)
        assert m == len(want)
        assert torch.equal(out[:m].cpu(), want)
        assert (out[m:] == -5).all(), "nothing is written beyond the survivors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8])
@pytest.mark.parametrize("share", SHARES)
def test_hole_filling_matches_the_twin(device: torch.device, share: float, dtype: torch.dtype) -> None:
    for n in SIZES:
        torch.manual_seed(n)
        shape = (n + 7, 3, 7) if n % 2 else (n + 7, 4, 8)
        rows = torch.randint(0, 200, shape).to(dtype)
        index, flags = torch.randperm(n + 7).int(), torch.rand(n) < share
        got_rows, got_index, count = (
            rows.clone().to(device),
            index.clone().to(device),
            device_count(-1, device),
        )
        compact.fill_holes(
            got_rows, got_index, device_count(n, device), keep_of(flags, n + 7, 64, device), count
        )
        m = reference.fill_holes(rows[:n], index[:n], flags)
        assert int(count) == m
        assert torch.equal(got_rows.cpu(), rows)
        assert torch.equal(got_index.cpu(), index)


def test_more_than_1024_blocks(device: torch.device) -> None:
    n = 16 * 1024 + 33
    torch.manual_seed(0)
    index, flags = torch.arange(n, dtype=torch.int32), torch.rand(n) < 0.4
    keep = keep_of(flags, n, 16, device)
    last = keep._replace(counts=keep.counts)
    total = device_count(-1, device)
    # Only one program near the end: the interpreter would take minutes for the whole grid.
    positions = torch.full((n,), -1, dtype=torch.int32, device=device)
    compact.compact_index(index.to(device), device_count(n, device), last, positions, total)
    assert int(total) == int(flags.sum())
    assert torch.equal(positions[: int(total)].cpu(), index[flags])


@pytest.mark.parametrize("shape", [(3, 4, 4), (5,), (2, 40, 40)])
def test_gather_fills_chunks_and_zeros_the_rest(device: torch.device, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    source = torch.randn(30, *shape)
    index, n, size = torch.randperm(30).int(), 21, 8
    for chunk in range(4):
        bucket = torch.full((size, *shape), torch.nan, device=device)
        bucket_index = torch.full((size,), -3, dtype=torch.int32, device=device)
        count = device_count(-1, device)
        compact.gather_rows(
            source.to(device),
            index.to(device),
            device_count(n, device),
            device_count(chunk, device),
            bucket,
            bucket_index,
            count,
        )
        rows = index[:n][chunk * size : (chunk + 1) * size]
        assert int(count) == len(rows)
        assert torch.equal(bucket[: len(rows)].cpu(), source[rows.long()])
        assert torch.equal(bucket_index[: len(rows)].cpu(), rows)
        assert not bucket[len(rows) :].any()
        assert not bucket_index[len(rows) :].any()


def test_arguments_that_would_be_misread_are_refused(device: torch.device) -> None:
    n = 16
    index, count = torch.arange(n, dtype=torch.int32, device=device), device_count(n, device)
    keep = keep_of(torch.ones(n, dtype=torch.bool), n, 64, device)
    with pytest.raises(ValueError, match="in place"):
        compact.compact_index(index, count, keep, index, device_count(0, device))
    with pytest.raises(ValueError, match="int32"):
        compact.compact_index(index.long(), count, keep, index.clone(), device_count(0, device))
    with pytest.raises(ValueError, match="contiguous"):
        compact.fill_holes(torch.zeros(4, n, device=device).T, index, count, keep, device_count(0, device))
    with pytest.raises(ValueError, match="out_count"):
        compact.fill_holes(torch.zeros(n, 4, device=device), index, count, keep, count)
    rows = torch.zeros(n, 4, device=device)
    elsewhere = keep._replace(flags=keep.flags.to("meta"))
    with pytest.raises(ValueError, match=r"keep\.flags is on meta, index on"):
        compact.compact_index(index, count, elsewhere, index.clone(), device_count(0, device))
    with pytest.raises(ValueError, match=r"keep\.counts is torch.int64"):
        compact.fill_holes(rows, index, count, keep._replace(counts=keep.counts.long()), count.clone())
    with pytest.raises(ValueError, match="chunk is on meta, source on"):
        compact.gather_rows(rows, index, count, count.to("meta"), rows.clone(), index, count)
    with pytest.raises(ValueError, match="bucket"):
        compact.gather_rows(
            torch.zeros(n, 4, device=device),
            index,
            count,
            count,
            torch.zeros(2, 5, device=device),
            index,
            count,
        )
