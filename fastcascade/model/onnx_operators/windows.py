"""Windows over maps: convolution and pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcascade.model.onnx_operators.node import Node
from fastcascade.model.onnx_operators.registry import operator


def _sides(node: Node, sizes: Sequence[int], reach: Sequence[int], stride: Sequence[int]) -> list[list[int]]:
    """(before, after) padding per axis, for windows that span ``reach`` cells."""
    how = node.get("auto_pad", "NOTSET")
    if how == "VALID":
        return [[0, 0] for _ in sizes]
    if how in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((math.ceil(n / s) - 1) * s + r - n, 0) for n, r, s in zip(sizes, reach, stride, strict=True)
        ]
        small = [[t // 2, t - t // 2] for t in totals]
        return small if how == "SAME_UPPER" else [pair[::-1] for pair in small]
    pads = node.get("pads") or [0] * 2 * len(sizes)
    return [[pads[i], pads[i + len(sizes)]] for i in range(len(sizes))]


def _padded(x: Tensor, sides: Sequence[Sequence[int]], value: float = 0.0) -> Tensor:
    flat = [n for pair in reversed(sides) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


@operator("Conv")
def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution in one or two dimensions; uneven padding is a Pad before it."""
    rank = weight.ndim - 2
    if rank not in (1, 2):
        node.refuse(f"it has {rank} spatial axes; expected 1 or 2")
    stride, dilation = (node.get(name) or [1] * rank for name in ("strides", "dilations"))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    sides = _sides(node, x.shape[2:], reach, stride)
    even = all(before == after for before, after in sides)
    padding = [before for before, _ in sides] if even else [0] * rank
    function = F.conv2d if rank == 2 else F.conv1d
    data = x if even else _padded(x, sides)
    return function(data, weight, bias, stride, padding, dilation, node.get("group", 1))


class _Windows:
    """The windows of a pooling node: their sizes, the padding, and how far the last ones overhang."""

    def __init__(self, node: Node, x: Tensor) -> None:
        self.kernel = list(node.get("kernel_shape"))
        if len(self.kernel) != 2:
            node.refuse(f"it has {len(self.kernel)} spatial axes; expected 2")
        self.stride = node.get("strides") or [1, 1]
        self.dilation = node.get("dilations") or [1, 1]
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        self.sides = _sides(node, x.shape[2:], reach, self.stride)
        self.ceil = bool(node.get("ceil_mode", 0))
        overhangs = []
        for n, r, s, (before, after) in zip(x.shape[2:], reach, self.stride, self.sides, strict=True):
            room = n + before + after - r
            count = (math.ceil(room / s) if self.ceil else room // s) + 1
            count -= (count - 1) * s >= n + before  # a window must start inside the image
            overhangs.append([0, max((count - 1) * s + r - n - before - after, 0)])
        self.overhangs = overhangs
        even = all(before == after for before, after in self.sides)
        self.padding = [before for before, _ in self.sides]
        self.plain = even and all(2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True))


@operator("MaxPool")
def max_pool(node: Node, x: Tensor) -> Tensor:
    """Maximum over windows."""
    if len(node.outputs) > 1:
        node.refuse("its second output, the indices, is not supported")
    w = _Windows(node, x)
    if w.plain:
        return F.max_pool2d(x, w.kernel, w.stride, w.padding, w.dilation, w.ceil)
    sides = [[before, after + over] for (before, after), (_, over) in zip(w.sides, w.overhangs, strict=True)]
    return F.max_pool2d(_padded(x, sides, -math.inf), w.kernel, w.stride, 0, w.dilation)


@operator("AveragePool")
def average_pool(node: Node, x: Tensor) -> Tensor:
    """Average over windows."""
    w, counts_padding = _Windows(node, x), bool(node.get("count_include_pad", 0))
    if w.dilation != [1, 1]:
        node.refuse(f"dilations {w.dilation}")
    if w.plain:
        return F.avg_pool2d(x, w.kernel, w.stride, w.padding, w.ceil, counts_padding)
    cells = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    cells = _padded(_padded(cells, w.sides, float(counts_padding)), w.overhangs)
    sums, counts = (
        F.avg_pool2d(values, w.kernel, w.stride)
        for values in (_padded(_padded(x, w.sides), w.overhangs), cells)
    )
    return sums * counts.reciprocal()


@operator("GlobalAveragePool")
def global_average_pool(node: Node, x: Tensor) -> Tensor:
    """The mean of every channel."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(node: Node, x: Tensor) -> Tensor:
    """The maximum of every channel."""
    return x.amax(list(range(2, x.ndim)), keepdim=True)
