"""Checks of the tensors that are passed to a GPU kernel, shared by the Triton and CUDA C++ launchers."""

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
TABLES = (torch.float32, torch.float32, torch.int32, torch.float32, torch.int64, torch.int64)
"""Dtypes of the fields of :class:`ExitTables`."""


class Keep(NamedTuple):
    """Which active rows stay active: the output of the exit head and the input of compaction.

    Attributes:
        flags: (capacity,) int8, 1 for a row that stays active; not written beyond the active rows.
        counts: (blocks,) int32, the number of such rows per block; all are written.
        rows: rows per block.
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
    """Check the arguments of an exit-head kernel.

    Args:
        block_rows: rows per block of the kernel. The other arguments are those of the launcher.

    Raises:
        ValueError: a tensor has the wrong dtype, shape, strides or device, or the arguments contradict each
            other. The message gives the actual and the expected value.
    """
    capacity, num_classes = logits.shape
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"logits are {logits.dtype}; expected fp16, bf16 or fp32")
    _check(logits=(logits, logits.dtype), **_int32(index=index, count=count), **_flags(keep))
    _check(logits=(logits, logits.dtype), **_named("tables", tables, TABLES))
    if tables.log_probs.shape[1:] != (num_classes,):
        raise ValueError(f"tables hold {tuple(tables.log_probs.shape)}; expected {num_classes} classes")
    if len(index) < capacity:
        raise ValueError(
            f"index has {len(index)} entries; expected at least {capacity}, one per row of logits"
        )
    if keep.rows != block_rows or len(keep.flags) < capacity:
        raise ValueError(f"keep was not made by new_keep({capacity}, {num_classes}, …)")
    if selector is not None and selector not in MLP_FEATURES + SCORES:
        raise ValueError(f"unknown selector {selector!r}; expected one of {MLP_FEATURES + SCORES} or None")
    if (selector in MLP_FEATURES) != (weights is not None):
        raise ValueError(f"selector {selector!r} {'needs' if weights is None else 'takes no'} weights")
    if (selector is None) != (threshold is None):
        raise ValueError("every exit but the last needs a threshold; the last takes none")
    if weights is not None:
        float32 = (torch.float32,) * len(weights)
        _check(logits=(logits, logits.dtype), **_named("weights", weights, float32))
    if threshold is not None:
        _check(logits=(logits, logits.dtype), threshold=(threshold, torch.float32))


def check_index(index: Tensor, count: Tensor, keep: Keep, out_index: Tensor, out_count: Tensor) -> None:
    """Check the arguments of a kernel that compacts an index list; raises ValueError."""
    if out_index.data_ptr() == index.data_ptr() or out_count.data_ptr() == count.data_ptr():
        raise ValueError("compact_index cannot work in place; pass other tensors for the output")
    lists = _int32(index=index, count=count, out_index=out_index, out_count=out_count)
    _check(**lists, **_flags(keep))


def check_in_place(rows: Tensor, index: Tensor, count: Tensor, keep: Keep, out_count: Tensor) -> None:
    """Check the arguments of a kernel that compacts feature rows in place; raises ValueError."""
    if out_count.data_ptr() == count.data_ptr():
        raise ValueError("fill_holes reads count while it writes out_count; pass two tensors")
    lists = _int32(index=index, count=count, out_count=out_count)
    _check(rows=(rows, rows.dtype), **lists, **_flags(keep))


def check_bucket(
    source: Tensor,
    index: Tensor,
    count: Tensor,
    chunk: Tensor,
    bucket: Tensor,
    bucket_index: Tensor,
    bucket_count: Tensor,
) -> None:
    """Check the arguments of a kernel that gathers rows into a bucket; raises ValueError."""
    if source.shape[1:] != bucket.shape[1:]:
        raise ValueError(
            f"bucket rows are {tuple(bucket.shape[1:])}; expected {tuple(source.shape[1:])}, as in the source"
        )
    lists = _int32(
        index=index, count=count, chunk=chunk, bucket_index=bucket_index, bucket_count=bucket_count
    )
    _check(source=(source, source.dtype), bucket=(bucket, source.dtype), **lists)
    if len(bucket) == 0 or len(index) == 0:
        raise ValueError(
            f"got a bucket of {len(bucket)} rows and an index of {len(index)}; expected at least one"
        )


Typed = tuple[Tensor, torch.dtype]
"""A tensor and its required dtype."""


def _named(name: str, tensors: ExitTables | MLPWeights, dtypes: tuple[torch.dtype, ...]) -> dict[str, Typed]:
    fields = zip(tensors._fields, tensors, dtypes, strict=True)
    return {f"{name}.{field}": (tensor, dtype) for field, tensor, dtype in fields}


def _int32(**tensors: Tensor) -> dict[str, Typed]:
    return {name: (tensor, torch.int32) for name, tensor in tensors.items()}


def _flags(keep: Keep) -> dict[str, Typed]:
    return {"keep.flags": (keep.flags, torch.int8), "keep.counts": (keep.counts, torch.int32)}


def _check(**wanted: Typed) -> None:
    """Require every tensor to have its dtype, be contiguous and be on the device of the first."""
    first, device = next((name, tensor.device) for name, (tensor, _) in wanted.items())
    for name, (tensor, dtype) in wanted.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}; expected {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {device}; expected one device")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor")
