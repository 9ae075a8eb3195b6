"""Operators on the pixels of maps: padding, resizing, cells of pixels as channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastcascade.model.onnx_operators.node import Node, numbers
from fastcascade.model.onnx_operators.registry import operator


@operator("Pad")
def pad(node: Node, x: Tensor, given: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    """Padding by a constant, by mirrored or by repeated pixels; negative numbers crop."""
    pads = numbers(given if given is not None else node.get("pads"))
    named = [axis % x.ndim for axis in numbers(axes)] or list(range(x.ndim))
    half = len(pads) // 2
    sides = {axis: (pads[i], pads[i + half]) for i, axis in enumerate(named)}
    if any(sides.get(0, (0, 0))):
        node.refuse("it pads the batch")
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}
    mode = node.get("mode", "constant")
    if mode not in modes:
        node.refuse(f"mode {mode!r}; expected one of {sorted(modes)}")
    last = max((axis for axis, (before, after) in sides.items() if before or after), default=0)
    if last == 0:
        return x
    first = 1 if mode == "constant" else 2
    if any(any(sides.get(axis, (0, 0))) for axis in range(1, first)):
        node.refuse(f"{mode} padding of channels")
    flat = [n for axis in range(x.ndim - 1, first - 1, -1) for n in sides.get(axis, (0, 0))]
    constants = numbers(value) or numbers(node.get("value")) or [0.0]
    if mode == "constant":
        return F.pad(x, flat, value=float(constants[0]))
    return F.pad(x, flat, mode=modes[mode])


@operator("Resize", "Upsample")
def resize(node: Node, x: Tensor, *given: Any) -> Tensor:
    """Resampling as torch has it: nearest, or linear or cubic with half-pixel centres or aligned corners."""
    size = _resized(node, x, given)
    centres = node.get(
        "coordinate_transformation_mode", "half_pixel" if node.kind == "Resize" else "asymmetric"
    )
    if node.get("mode", "nearest") == "nearest":
        return _nearest(node, x, size, centres)
    return _interpolated(node, x, size, centres)


def _resized(node: Node, x: Tensor, given: Sequence[Any]) -> list[int]:
    """Height and width of the result, from its sizes or from scales."""
    inputs = [numbers(value) for value in given]  # roi, scales, sizes; scales alone before opset 11
    scales = inputs[min(1, len(inputs) - 1)] if inputs else numbers(node.get("scales"))
    sizes = inputs[2] if len(inputs) > 2 else []
    axes = [axis % x.ndim for axis in numbers(node.get("axes"))] or list(range(x.ndim))
    target = list(x.shape)
    for i, axis in enumerate(axes):
        if sizes:
            target[axis] = sizes[i]
        elif scales[i] != 1:
            target[axis] = math.floor(x.shape[axis] * scales[i])
    if x.ndim != 4 or (isinstance(target[1], int) and target[1] != x.shape[1]):
        node.refuse(
            f"it changes shape {tuple(x.shape)} to {tuple(target)}; expected maps, and their size only"
        )
    return [int(n) for n in target[2:]]


def _nearest(node: Node, x: Tensor, size: list[int], centres: str) -> Tensor:
    rounding = node.get("nearest_mode", "round_prefer_floor" if node.kind == "Resize" else "floor")
    # A whole multiple repeats every pixel equally often, wherever the centres are.
    whole = all(m % n == 0 for m, n in zip(size, x.shape[2:], strict=True))
    repeats = centres in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round_prefer")
    if (centres, rounding) != ("asymmetric", "floor") and not (whole and repeats):
        node.refuse(f"nearest with {centres!r} and {rounding!r}; expected 'asymmetric' and 'floor'")
    return F.interpolate(x, size, mode="nearest")


def _interpolated(node: Node, x: Tensor, size: list[int], centres: str) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(node.get("mode"))
    antialias = bool(node.get("antialias", 0))
    exact = mode == "bilinear" or (
        node.get("cubic_coeff_a", -0.75) == (-0.5 if antialias else -0.75)
        and bool(node.get("exclude_outside", 0)) == antialias
    )
    pixels = centres == "half_pixel" or (centres == "pytorch_half_pixel" and min(size) > 1)
    if mode is None or not exact or not (pixels or centres == "align_corners"):
        node.refuse(f"mode {node.get('mode')!r} with {centres!r} centres, which torch does not have")
    return F.interpolate(x, size, mode=mode, align_corners=centres == "align_corners", antialias=antialias)


@operator("DepthToSpace")
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Channels as cells of pixels."""
    if node.get("mode", "DCR") != "CRD":
        node.refuse("mode 'DCR'; expected 'CRD', torch's pixel_shuffle")
    return F.pixel_shuffle(x, node.get("blocksize"))


@operator("SpaceToDepth")
def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Cells of pixels as channels, the place in a cell first."""
    n, c, h, w = x.shape
    b = node.get("blocksize")
    cells = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return cells.reshape(n, c * b * b, h // b, w // b)
