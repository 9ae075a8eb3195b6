"""What the GPU kernels of both languages are called with, and the checks that keep it from being misread."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcascade.kernels.reference import ExitTables, MLPWeights

__all__ = [
    "MLP_FEATURES",
    "SCORES",
    "Keep",
    "check_bucket",
    "check_exit_head",
    "check_in_place",
    "check_index",
]

MLP_FEATURES = ("stats", "topk", "probs")
SCORES = ("max_prob", "margin", "entropy")


class Keep(NamedTuple):
    """What the exit head says about the active rows; the input of the compaction kernels.

    ``flags`` (capacity,) int8, 1 where the row stays active; ``counts`` (blocks,) int32, how many do so in
    each block of ``rows`` rows. Flags beyond the active rows are not written; all counts are.
    """

    flags: Tensor
    counts: Tensor
    rows: int


def check_exit_head(
    tables: ExitTables,
    logits: Tensor,
    index: Tensor,
    count: Tensor,
    keep: Keep,
    block_rows: int,
    selector: str | None,
    weights: MLPWeights | None,
    threshold: Tensor | None,
) -> None:
    """Refuse what an exit-head kernel would misread.

    Args:
        block_rows: rows of a block of the kernel; the rest is as the kernels' wrappers take it.

    Raises:
        ValueError: says what came and what was expected.
    """
    capacity, num_classes = logits.shape
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not logits.is_contiguous():
        raise ValueError(
            f"logits are {logits.dtype} with strides {logits.stride()}; "
            "expected contiguous fp16, bf16 or fp32"
        )
    if tables.log_probs.shape[1:] != (num_classes,) or tables.log_probs.dtype != torch.float32:
        raise ValueError(
            f"tables hold {tuple(tables.log_probs.shape)} {tables.log_probs.dtype}; "
            f"expected float32 with {num_classes} classes"
        )
    if index.dtype != torch.int32 or count.dtype != torch.int32 or len(index) < capacity:
        raise ValueError(
            f"index is {tuple(index.shape)} {index.dtype} and count {count.dtype}; "
            f"expected int32 and at least {capacity} entries"
        )
    if keep.rows != block_rows or len(keep.flags) < capacity:
        raise ValueError(f"keep is not from new_keep({capacity}, {num_classes}, …)")
    if selector is not None and selector not in MLP_FEATURES + SCORES:
        raise ValueError(f"unknown selector {selector!r}; expected one of {MLP_FEATURES + SCORES} or None")
    if (selector in MLP_FEATURES) != (weights is not None):
        raise ValueError(f"selector {selector!r} and weights={weights is not None} do not go together")
    if (selector is None) != (threshold is None):
        raise ValueError("a threshold is needed at every exit but the last, and only there")


def check_index(index: Tensor, count: Tensor, out_index: Tensor, out_count: Tensor) -> None:
    """Refuse what the compaction of an index list would misread, with a ValueError."""
    if out_index.data_ptr() == index.data_ptr() or out_count.data_ptr() == count.data_ptr():
        raise ValueError("compact_index cannot work in place; pass another index and count for the output")
    _check_int32(index=index, count=count, out_index=out_index, out_count=out_count)


def check_in_place(rows: Tensor, index: Tensor, count: Tensor, out_count: Tensor) -> None:
    """Refuse what the compaction of feature rows in place would misread, with a ValueError."""
    if not rows.is_contiguous():
        raise ValueError(f"feature rows have strides {rows.stride()}; expected contiguous rows")
    if out_count.data_ptr() == count.data_ptr():
        raise ValueError("fill_holes reads count while it writes out_count; pass another tensor")
    _check_int32(index=index, count=count, out_count=out_count)


def check_bucket(
    source: Tensor,
    index: Tensor,
    count: Tensor,
    chunk: Tensor,
    bucket: Tensor,
    bucket_index: Tensor,
    bucket_count: Tensor,
) -> None:
    """Refuse what the gather into a bucket would misread, with a ValueError."""
    if source.shape[1:] != bucket.shape[1:] or source.dtype != bucket.dtype:
        raise ValueError(
            f"bucket rows are {tuple(bucket.shape[1:])} {bucket.dtype}; "
            f"expected {tuple(source.shape[1:])} {source.dtype}"
        )
    if not (source.is_contiguous() and bucket.is_contiguous()):
        raise ValueError(f"strides are {source.stride()} and {bucket.stride()}; expected contiguous rows")
    _check_int32(index=index, count=count, chunk=chunk, bucket_index=bucket_index, bucket_count=bucket_count)
    if len(bucket) == 0 or len(index) == 0:
        raise ValueError(
            f"got a bucket of {len(bucket)} rows and an index of {len(index)}; expected at least one"
        )


def _check_int32(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}; expected int32")
