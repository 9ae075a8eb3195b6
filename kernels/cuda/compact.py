"""Launchers of the CUDA C++ compaction of the active set; the kernels are in ``compact.cuh``.

``compact_index`` compacts an index list, for stages that read the image: pixels never move. ``fill_holes``
compacts rows in place, for the features of a multi-exit backbone. ``gather_rows`` gathers rows into a bucket,
for stages that run in torch. Row counts stay on the device.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from fastcascade.kernels.argument_checks import Keep, check_bucket, check_in_place, check_index
from fastcascade.kernels.cuda.exit_head import BLOCK_ROWS
from fastcascade.kernels.cuda.launch import Launch

__all__ = ["compact_index", "fill_holes", "gather_rows"]

QUAD_BYTES = 16
MOVE_THREADS = 256
MOVE_BLOCKS = 1024
"""Most blocks per launch: eight for each of about 128 multiprocessors. More rows are looped over."""


def compact_index(
    launch: Launch, index: Tensor, count: Tensor, keep: Keep, out_index: Tensor, out_count: Tensor
) -> None:
    """out_index[:m] = the survivors of index[:count], in order; out_count = m.

    Args:
        launch: launches on the device of all the tensors.
        index: (capacity,) int32; count: (1,) int32; keep: from the exit head on these rows.
        out_index, out_count: like the inputs, in other memory.

    Raises:
        ValueError: input and output share memory, or a tensor has the wrong dtype or device.

    Example:
        compact_index(launch, active, count, keep, next_active, next_count)
    """
    check_index(index, count, keep, out_index, out_count)
    blocks = max(len(keep.counts), 1)
    launch(
        "compact_index_kernel",
        blocks,
        BLOCK_ROWS,
        index,
        count,
        keep.flags,
        keep.counts,
        out_index,
        out_count,
    )


def fill_holes(
    launch: Launch, rows: Tensor, index: Tensor, count: Tensor, keep: Keep, out_count: Tensor
) -> None:
    """Compact feature rows in place: the last survivors move into the holes, with their index entries.

    Moves at most min(m, n − m) rows. Afterwards rows[:m] and index[:m] are the survivors, out_count = m.

    Args:
        launch: launches on the device of all the tensors.
        rows: (capacity, …) contiguous; index: (capacity,) int32; both are changed.
        count: (1,) int32; keep: from the exit head; out_count: (1,) int32, in other memory than count.

    Raises:
        ValueError: rows are not contiguous, the counts share memory, or a tensor has the wrong dtype or
            device.

    Example:
        fill_holes(launch, features, active, count, keep, next_count)
    """
    check_in_place(rows, index, count, keep, out_count)
    holes, tail = torch.empty_like(index), torch.empty_like(index)
    moves = torch.empty_like(count)
    blocks = max(len(keep.counts), 1)
    launch(
        "plan_holes_kernel",
        blocks,
        BLOCK_ROWS,
        count,
        keep.flags,
        keep.counts,
        holes,
        tail,
        moves,
        out_count,
    )
    if len(rows) == 0:
        return
    suffix, words = _words(rows)
    blocks = min(len(rows), MOVE_BLOCKS)
    launch(f"move_rows_{suffix}", blocks, MOVE_THREADS, rows, index, holes, tail, moves, words)


def gather_rows(
    launch: Launch,
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
        launch: launches on the device of all the tensors.
        source: (N, …) contiguous; index: (capacity,) int32 rows of it, ``count`` (1,) of them active.
        chunk: (1,) int32, the number of the chunk of B rows of ``index`` to take.
        bucket: (B, …) contiguous, of source's dtype; bucket_index: (B,) int32, the gathered entries of
            ``index``, then zeros; bucket_count: (1,) int32, the number of gathered rows.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not match.

    Example:
        gather_rows(launch, images, active, count, chunk, bucket, bucket_index, bucket_count)
    """
    check_bucket(source, index, count, chunk, bucket, bucket_index, bucket_count)
    suffix, words = _words(source, bucket)
    launch(
        f"gather_rows_{suffix}",
        min(len(bucket), MOVE_BLOCKS),
        MOVE_THREADS,
        source,
        index,
        count,
        chunk,
        bucket,
        bucket_index,
        bucket_count,
        ctypes.c_int(len(bucket)),
        words,
    )


def _words(*tensors: Tensor) -> tuple[str, ctypes.c_longlong]:
    """The suffix of the entry point for rows of these tensors, and the row length in its words."""
    row_bytes = math.prod(tensors[0].shape[1:]) * tensors[0].element_size()
    if row_bytes % QUAD_BYTES == 0 and all(t.data_ptr() % QUAD_BYTES == 0 for t in tensors):
        return "quad", ctypes.c_longlong(row_bytes // QUAD_BYTES)
    return "byte", ctypes.c_longlong(row_bytes)
