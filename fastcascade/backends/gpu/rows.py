"""Feature rows on the GPU: layouts, padding, and what reports say of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcascade.kernels.layers import Conv, Elementwise, Layer, Pooling, padded
from fastcascade.lowering.plan import StagePlan

__all__ = ["architecture", "channels_first", "channels_last", "kernel_name", "stored_rows", "weight_bytes"]


def channels_last(x: Tensor) -> Tensor:
    """(n, C, H, W) → contiguous (n, H, W, C), copied only if need be; (n, F) contiguous."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).contiguous()


def channels_first(rows: Tensor) -> Tensor:
    """The inverse view: (n, H, W, C) → (n, C, H, W)."""
    return rows.permute(0, 3, 1, 2) if rows.ndim == 4 else rows


def stored_rows(features: Tensor, stage: StagePlan, dtype: torch.dtype) -> Tensor:
    """Features as own kernels store them; copied only where a stage through torch left them unpadded."""
    missing = padded(stage.shapes[0][0]) - features.shape[-1]
    rows = F.pad(features, (0, missing)) if missing else features  # padding by nothing would copy
    return rows.to(dtype).contiguous()


def kernel_name(layer: Layer) -> str:
    """The kernel that runs a layer."""
    names: dict[type, str] = {Conv: "conv", Pooling: "pool", Elementwise: "elementwise"}
    return names[type(layer.work)]


def weight_bytes(layers: list[Layer]) -> int:
    """Constant data of the layers."""
    tensors = [t for layer in layers for t in (layer.weight, layer.vectors) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def architecture(device: torch.device) -> str:
    """The device's architecture in the compiler's terms."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}")
