"""fp32 that stays fp32 on the GPU, where torch by default rounds a convolution's operands to TF32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

__all__ = ["exact_float32"]

_lock = threading.Lock()
_inside = 0
_undo: list[Callable[[], None]] = []


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, torch computes fp32 convolutions and matrix products in fp32; afterwards all is set as before.

    Torch has these settings for the whole process only. Threads that are inside at once share one change,
    which the last to leave takes back; what other threads compute meanwhile is exact, too. Inside, torch
    refuses to answer ``torch.backends.cudnn.allow_tf32``, the form of the question before its version 2.9.

    Example:
        >>> with exact_float32():
        ...     torch.backends.cudnn.conv.fp32_precision
        'ieee'
    """
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _set_all()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            while _inside == 0 and _undo:
                _undo.pop()()


def _set_all() -> None:
    # Compilers and profilers ask for this one; torch refuses to answer if the others contradict it.
    with suppress(RuntimeError):
        before = torch.get_float32_matmul_precision()
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
            _undo.append(partial(torch.set_float32_matmul_precision, before))
    # From wide to narrow: a setting that was never made follows those before it, and since torch cannot
    # take one back to "never made", only those that do not follow are changed.
    torch_backends: Any = torch.backends
    cudnn, cublas = torch_backends.cudnn, torch_backends.cuda.matmul
    for setting in (torch_backends, cudnn, cudnn.conv, cudnn.rnn, cublas):
        if setting.fp32_precision != "ieee":
            _undo.append(partial(setattr, setting, "fp32_precision", setting.fp32_precision))
            setting.fp32_precision = "ieee"
