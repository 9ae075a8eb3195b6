"""Full fp32 precision in torch, which by default rounds the operands of GPU convolutions to TF32."""

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
    """Disable TF32 in torch for a block of code, then restore the settings.

    The settings are global to the process. Concurrent blocks share one change, and the last to exit undoes
    it; other threads also compute in full fp32 meanwhile. Inside the block, torch raises an error on reading
    ``torch.backends.cudnn.allow_tf32``, the interface that torch 2.9 replaced.

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
    # Compilers and profilers read this setting, and torch raises if the newer ones contradict it.
    with suppress(RuntimeError):
        before = torch.get_float32_matmul_precision()
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
            _undo.append(partial(torch.set_float32_matmul_precision, before))
    # From the widest setting to the narrowest: one that was never set follows the wider ones. Torch cannot
    # unset one again, so only those that do not follow are changed.
    torch_backends: Any = torch.backends
    cudnn, cublas = torch_backends.cudnn, torch_backends.cuda.matmul
    for setting in (torch_backends, cudnn, cudnn.conv, cudnn.rnn, cublas):
        if setting.fp32_precision != "ieee":
            _undo.append(partial(setattr, setting, "fp32_precision", setting.fp32_precision))
            setting.fp32_precision = "ieee"
