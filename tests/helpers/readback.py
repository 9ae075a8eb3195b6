"""A guard against operations that make the host wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoReadback"]


class NoReadback(TorchDispatchMode):
    """Raises an error on every torch operation that makes the host wait for a result."""

    WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.WAITS, f"the host waits for {func}"
        return func(*args, **(kwargs or {}))
