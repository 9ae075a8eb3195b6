"""What a stage report says about a GPU stage: kernel names, weight bytes, device architecture."""

from __future__ import annotations

import torch

from fastcascade.kernels.layers import Conv, Elementwise, Layer, Pooling

__all__ = ["architecture", "kernel_name", "weight_bytes"]


def kernel_name(layer: Layer) -> str:
    """The name of the kernel that runs a layer."""
    names: dict[type, str] = {Conv: "conv", Pooling: "pool", Elementwise: "elementwise"}
    return names[type(layer.work)]


def weight_bytes(layers: list[Layer]) -> int:
    """Bytes of weights, biases and scales of a stage's layers."""
    tensors = [t for layer in layers for t in (layer.weight, layer.vectors) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def architecture(device: torch.device) -> str:
    """The compiler's name for the device's architecture, "sm_90" or "gfx942" for example."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}")
