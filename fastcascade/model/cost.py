"""Cost in MACs: the multiplies of convolutions, linear layers and matrix products per instance."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["count_macs", "eval_mode", "place_of_failure"]

# Operators that multiply nothing, or too little to matter beside the matrix products (normalisation,
# interpolation, pooling). Pointwise operators and views are recognised by their tags and schemas instead.
_FREE = frozenset(
    """
    _adaptive_avg_pool2d _local_scalar_dense _log_softmax _native_batch_norm_legit_no_training
    _prelu_kernel _softmax _to_copy _unsafe_view adaptive_max_pool2d all amax amin any arange argmax
    avg_pool2d bernoulli cat channel_shuffle clone constant_pad_nd copy_ cudnn_batch_norm cumsum
    detach embedding empty empty_like eye fill_ flip full full_like gather hardswish index index_put
    index_select lift_fresh linalg_vector_norm linspace logsumexp max max_pool2d_with_indices mean
    min native_batch_norm native_channel_shuffle native_dropout native_group_norm native_layer_norm
    new_empty new_zeros ones ones_like rand randn reflection_pad2d repeat replication_pad2d roll
    scalar_tensor scatter slice_scatter sort stack sum topk tril triu upsample_bilinear2d
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa upsample_nearest2d zeros zeros_like
    """.split()
)


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Set modules to eval mode for a block of code, then restore the mode of every submodule."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


class _MacCounter(TorchDispatchMode):
    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports triton if it is installed

        super().__init__()  # type: ignore[no-untyped-call]
        self.registry = flop_registry
        self.macs = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in self.registry:
            self.macs += self.registry[packet](*args, **(kwargs or {}), out_val=out) // 2
        elif not self._is_free(func):
            self.uncounted.add(str(packet))
        return out

    @staticmethod
    def _is_free(func: Any) -> bool:
        name = func.overloadpacket.__name__
        return func.namespace == "aten" and (
            torch.Tag.pointwise in func.tags or func.is_view or name in _FREE or name.rstrip("_") in _FREE
        )


def count_macs(module: nn.Module, x: Tensor) -> tuple[Any, int]:
    """Run a module once in eval mode and count its multiplies per instance.

    Args:
        x: one instance, (1, …).

    Returns:
        (the module's output, the count). An operator that cannot be counted adds nothing and triggers a
        warning; pass ``Stage(macs=…)`` in that case.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 4, 4))[1]
        3456
    """
    with eval_mode(module), torch.no_grad(), _MacCounter() as counter:
        out = module(x)
    if counter.uncounted:
        warnings.warn(
            f"{type(module).__name__} uses {', '.join(sorted(counter.uncounted))}, whose multiplies are not "
            "counted; pass Stage(macs=...) if they matter",
            stacklevel=2,
        )
    return out, counter.macs


def place_of_failure(module: nn.Module, error: Exception) -> str:
    """Where in ``count_macs(module, …)`` an error was raised: the innermost submodule, and the operator.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(9))
        >>> try:
        ...     count_macs(network, torch.zeros(1, 3, 8, 8))
        ... except RuntimeError as error:
        ...     place_of_failure(network, error)
        "in module '1' (MaxPool2d), operator aten.max_pool2d_with_indices"
    """
    paths = {id(part): name for name, part in module.named_modules()}
    place, operator = "", ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if paths.get(id(owner)):
            place = f"in module {paths[id(owner)]!r} ({type(owner).__name__})"
        elif isinstance(owner, _MacCounter):
            operator = f"operator {frame.f_locals['func'].overloadpacket}"
    return ", ".join(filter(None, (place, operator)))
