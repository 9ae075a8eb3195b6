"""Launcher of the CUDA C++ exit head; the kernel is in ``exit_head.cuh``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastcascade.kernels.argument_checks import Keep, check_exit_head
from fastcascade.kernels.cuda.launch import Launch
from fastcascade.kernels.reference import ExitTables, MLPWeights

__all__ = ["BLOCK_ROWS", "exit_head", "new_keep"]

BLOCK_ROWS = 64
"""Rows per block: kRows in ``context.cuh``."""

THREADS = 256

SELECTORS = (None, "max_prob", "margin", "entropy", "stats", "topk", "probs")
"""In the order of the enum Selector in ``exit_head.cuh``."""

KERNELS = {
    torch.float32: "exit_head_f32",
    torch.float16: "exit_head_f16",
    torch.bfloat16: "exit_head_bf16",
}

POINTERS = (
    "index", "count", "log_sum", "weight_sum", "previous_label", "log_probs", "label", "exit_stage",
    "threshold", *MLPWeights._fields, "keep", "block_counts",
)  # fmt: skip


class ExitArguments(ctypes.Structure):
    """The struct of the same name in ``exit_head.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in ("stage", "selector", "classes", "hidden")),
        ("stage_weight", ctypes.c_float),
    )


def new_keep(capacity: int, num_classes: int, device: torch.device | str) -> Keep:
    """An uninitialised :class:`Keep` for up to ``capacity`` active rows."""
    return Keep(
        torch.empty(capacity, dtype=torch.int8, device=device),
        torch.empty(-(-capacity // BLOCK_ROWS), dtype=torch.int32, device=device),
        BLOCK_ROWS,
    )


def exit_head(
    launch: Launch,
    tables: ExitTables,
    logits: Tensor,
    index: Tensor,
    count: Tensor,
    stage: int,
    keep: Keep,
    *,
    stage_weight: float | None,
    selector: str | None,
    weights: MLPWeights | None = None,
    threshold: Tensor | None = None,
) -> None:
    """The exit head on the first ``count`` active rows, without synchronising with the host.

    Args:
        launch: launches on the device of all the tensors.
        tables: as in the twin, float32; without a ``stage_weight``, ``log_sum`` and ``weight_sum`` are
            unused.
        logits: (capacity, C) contiguous, fp16, bf16 or fp32; rows from ``count`` on are not read.
        index: (capacity,) int32 positions in the batch; count: (1,) int32.
        keep: written; see :class:`~fastcascade.kernels.argument_checks.Keep`.
        stage_weight, selector, weights: as in the twin; the weights are contiguous float32.
        threshold: (1,) float32; None at the last exit.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, strides or device.
        RuntimeError: the launch failed.

    Example:
        keep = new_keep(len(logits), 10, logits.device)
        exit_head(launch, tables, logits, index, count, 0, keep, stage_weight=None, selector=None)
    """
    check_exit_head(tables, logits, index, count, keep, BLOCK_ROWS, selector, weights, threshold)
    capacity, num_classes = logits.shape
    if capacity == 0:
        return
    present = {
        "index": index,
        "count": count,
        **tables._asdict(),
        **({} if threshold is None else {"threshold": threshold}),
        **({} if weights is None else weights._asdict()),
        "keep": keep.flags,
        "block_counts": keep.counts,
    }
    arguments = ExitArguments(
        **{name: launch.address(tensor) for name, tensor in present.items()},
        stage=stage,
        selector=SELECTORS.index(selector),
        classes=num_classes,
        hidden=0 if weights is None else len(weights.b1),
        stage_weight=0.0 if stage_weight is None else stage_weight,
    )
    launch(KERNELS[logits.dtype], -(-capacity // BLOCK_ROWS), THREADS, arguments, logits)
