"""Compaction of the active set, with row counts that stay on the device.

The exit head writes a flag per row and a count per block of rows. Each program sums the counts of the blocks
before its own to find the positions of its survivors. This needs neither atomics nor look-back, and it is
deterministic: survivors stay in order.

There are three kinds of compaction. ``compact_index`` compacts an index list, for stages that read the image:
pixels never move. ``fill_holes`` compacts rows in place, for the features of a multi-exit backbone.
``gather_rows`` gathers rows into a bucket, for stages that run in torch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcascade.kernels.argument_checks import Keep, check_bucket, check_in_place, check_index
from fastcascade.kernels.triton.launch import launch

__all__ = ["compact_index", "fill_holes", "gather_rows"]

SUM_BLOCK = tl.constexpr(1024)
MOVE_PROGRAMS = 1024


@triton.jit
def _survivors(block_counts, begin, end):
    """Sum of block_counts[begin:end]."""
    lane = tl.arange(0, SUM_BLOCK)
    total = tl.zeros([SUM_BLOCK], tl.int32)
    for start in tl.range(begin, end, SUM_BLOCK):
        total += tl.load(block_counts + start + lane, mask=start + lane < end, other=0)
    return tl.sum(total, 0)


@triton.jit
def compact_index_kernel(index, count, flags, block_counts, out_index, out_count, BLOCK_ROWS: tl.constexpr):
    block = tl.program_id(0)
    n = tl.load(count)
    if block == 0:
        tl.store(out_count, _survivors(block_counts, 0, tl.cdiv(n, BLOCK_ROWS)))
    if block * BLOCK_ROWS >= n:
        return
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    stays = tl.load(flags + row, mask=row < n, other=0).to(tl.int32)
    position = _survivors(block_counts, 0, block) + tl.cumsum(stays, 0) - stays
    origin = tl.load(index + row, mask=row < n, other=0)
    tl.store(out_index + position, origin, mask=stays != 0)


@triton.jit
def plan_holes_kernel(count, flags, block_counts, holes, tail, moves, out_count, BLOCK_ROWS: tl.constexpr):
    """List the stopped rows below m (holes) and the survivors from m on (tail), both in order; m survive."""
    block = tl.program_id(0)
    n = tl.load(count)
    if block * BLOCK_ROWS >= n:
        if block == 0:
            tl.store(out_count, 0)
            tl.store(moves, 0)
        return
    m = _survivors(block_counts, 0, tl.cdiv(n, BLOCK_ROWS))
    lane = tl.arange(0, BLOCK_ROWS)
    cut = m // BLOCK_ROWS  # the block of row m
    cut_row = cut * BLOCK_ROWS + lane
    in_cut = tl.load(flags + cut_row, mask=cut_row < m, other=0).to(tl.int32)
    below = _survivors(block_counts, 0, cut) + tl.sum(in_cut, 0)  # survivors that stay in place

    row = block * BLOCK_ROWS + lane
    stays = tl.load(flags + row, mask=row < n, other=0).to(tl.int32)
    rank = _survivors(block_counts, 0, block) + tl.cumsum(stays, 0) - stays
    tl.store(holes + row - rank, row, mask=(row < m) & (stays == 0))
    tl.store(tail + rank - below, row, mask=(row >= m) & (stays != 0))
    if block == 0:
        tl.store(out_count, m)
        tl.store(moves, m - below)


@triton.jit
def move_rows_kernel(rows, index, holes, tail, moves, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """rows[holes[i]] = rows[tail[i]], in any order: sources and destinations are disjoint."""
    total = tl.load(moves)
    lane = tl.arange(0, BLOCK)
    for i in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        hole = tl.load(holes + i).to(tl.int64)
        source = tl.load(tail + i).to(tl.int64)
        for start in tl.range(0, ROW, BLOCK):
            mask = start + lane < ROW
            values = tl.load(rows + source * ROW + start + lane, mask=mask)
            tl.store(rows + hole * ROW + start + lane, values, mask=mask)
        tl.store(index + hole, tl.load(index + source))


@triton.jit
def gather_rows_kernel(
    source, index, count, chunk, bucket, bucket_index, bucket_count,
    BUCKET: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bucket[i] = source[index[chunk·BUCKET + i]]; zeros beyond the active rows."""
    i = tl.program_id(0)
    start = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(chunk) * BUCKET
    total = tl.load(count)
    n = tl.minimum(tl.maximum(total - first, 0), BUCKET)
    # Rows beyond the active ones read a valid index entry, but no data.
    origin = tl.load(index + tl.maximum(tl.minimum(first + i, total - 1), 0))
    words = tl.where(i < n, ROW, 0)
    values = tl.load(source + origin.to(tl.int64) * ROW + start, mask=start < words, other=0)
    tl.store(bucket + i.to(tl.int64) * ROW + start, values, mask=start < ROW)
    if tl.program_id(1) == 0:
        tl.store(bucket_index + i, tl.where(i < n, origin, 0))
        if i == 0:
            tl.store(bucket_count, n)


def compact_index(index: Tensor, count: Tensor, keep: Keep, out_index: Tensor, out_count: Tensor) -> None:
    """out_index[:m] = the survivors of index[:count], in order; out_count = m.

    Args:
        index: (capacity,) int32; count: (1,) int32; keep: from the exit head on these rows.
        out_index, out_count: like the inputs, in other memory.

    Raises:
        ValueError: input and output share memory, or a tensor has the wrong dtype or device.

    Example:
        compact_index(active, count, keep, next_active, next_count)
    """
    check_index(index, count, keep, out_index, out_count)
    grid = (max(len(keep.counts), 1),)
    launch(
        compact_index_kernel, grid, index, count, keep.flags, keep.counts, out_index, out_count,
        BLOCK_ROWS=keep.rows, num_warps=4,
    )  # fmt: skip


def fill_holes(rows: Tensor, index: Tensor, count: Tensor, keep: Keep, out_count: Tensor) -> None:
    """Compact feature rows in place: the last survivors move into the holes, with their index entries.

    Moves at most min(m, n − m) rows. Afterwards rows[:m] and index[:m] are the survivors, out_count = m.

    Args:
        rows: (capacity, …) contiguous; index: (capacity,) int32; both are changed.
        count: (1,) int32; keep: from the exit head; out_count: (1,) int32, in other memory than count.

    Raises:
        ValueError: rows are not contiguous, the counts share memory, or a tensor has the wrong dtype or
            device.

    Example:
        fill_holes(features, active, count, keep, next_count)
    """
    check_in_place(rows, index, count, keep, out_count)
    words = _as_words(_word_type(rows), rows)
    holes, tail = torch.empty_like(index), torch.empty_like(index)
    moves = torch.empty_like(count)
    launch(
        plan_holes_kernel, (max(len(keep.counts), 1),), count, keep.flags, keep.counts, holes, tail, moves,
        out_count, BLOCK_ROWS=keep.rows, num_warps=4,
    )  # fmt: skip
    if words.shape[1] == 0 or len(rows) == 0:
        return
    programs = min(len(rows), MOVE_PROGRAMS)
    block = min(triton.next_power_of_2(words.shape[1]), 1024)
    launch(
        move_rows_kernel, (programs,), words, index, holes, tail, moves,
        ROW=words.shape[1], BLOCK=block, num_warps=4,
    )  # fmt: skip


def gather_rows(
    source: Tensor,
    index: Tensor,
    count: Tensor,
    chunk: Tensor,
    bucket: Tensor,
    bucket_index: Tensor,
    bucket_count: Tensor,
) -> None:
    """Fill a bucket with the active rows of one chunk; the rest is zeros.

    Args:
        source: (N, …) contiguous; index: (capacity,) int32 rows of it, ``count`` (1,) of them active.
        chunk: (1,) int32, the number of the chunk of B rows of ``index`` to take.
        bucket: (B, …) contiguous, of source's dtype; bucket_index: (B,) int32, the gathered entries of
            ``index``, then zeros; bucket_count: (1,) int32, the number of gathered rows.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not match.

    Example:
        gather_rows(images, active, count, chunk, bucket, bucket_index, bucket_count)
    """
    check_bucket(source, index, count, chunk, bucket, bucket_index, bucket_count)
    word = _word_type(source, bucket)
    words = _as_words(word, source)
    row = words.shape[1]
    block = min(triton.next_power_of_2(max(row, 1)), 1024)
    launch(
        gather_rows_kernel, (len(bucket), max(triton.cdiv(row, block), 1)),
        words, index, count, chunk, _as_words(word, bucket), bucket_index, bucket_count,
        BUCKET=len(bucket), ROW=row, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _word_type(*tensors: Tensor) -> torch.dtype:
    """The widest integer type whose size divides the row sizes and addresses of all tensors."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(
            math.prod(t.shape[1:]) * t.element_size() % dtype.itemsize == 0
            and t.data_ptr() % dtype.itemsize == 0
            for t in tensors
        ):
            return dtype
    return torch.uint8


def _as_words(word: torch.dtype, rows: Tensor) -> Tensor:
    """A view of contiguous rows (n, …) as (n, words)."""
    return rows.view(len(rows), math.prod(rows.shape[1:])).view(word)
