"""Fusion: merging an operation into the one before it, if nothing else reads the value in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastcascade.lowering.operations import (
    PARAMETRIC,
    Activation,
    Add,
    Conv2d,
    Linear,
    Op,
    Pad,
    Pool,
    ScaleShift,
    Shape,
    Slice,
)

__all__ = ["fuse"]

INCREASING = ("relu", "relu6", "sigmoid", "hard_sigmoid", "tanh")


def fuse(
    ops: Sequence[Op], shapes: Mapping[int, Shape], outputs: tuple[int, int]
) -> tuple[tuple[Op, ...], tuple[Shape, ...], tuple[int, int]]:
    """Fuse operations, drop those that nothing reads, and renumber the values 0, 1, 2, … in order.

    Args:
        ops: in order of execution, weights in any floating dtype.
        shapes: shape per instance of every value.
        outputs: numbers of the features and the logits.

    Returns:
        operations with contiguous float32 weights, the shapes of their values, and the new numbers of the
        outputs.
    """
    fused = _Fuser(ops, shapes, outputs).run()
    alive = set(outputs)
    kept: list[Op] = []
    for op in reversed(fused):
        if op.output in alive:
            alive.update(op.reads)
            kept.append(op)
    kept.reverse()
    number = {0: 0} | {op.output: new for new, op in enumerate(kept, 1)}
    final = tuple(_finished(op, number) for op in kept)
    new_shapes = (shapes[0], *(shapes[op.output] for op in kept))
    return final, new_shapes, (number[outputs[0]], number[outputs[1]])


def _finished(op: Op, number: Mapping[int, int]) -> Op:
    # Copies: the plan's weights share no memory with the module's, nor with each other.
    weights: dict[str, Any] = {
        name: w.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, w in op.tensors.items()
    }
    return replace(op.renumbered(number), **weights)


class _Fuser:
    """One pass in order of execution; ``done`` holds the operations so far, by the value that they write.

    A fused operation takes the position and the output of the later of its two parts. Everything that it
    reads is defined there.
    """

    def __init__(self, ops: Sequence[Op], shapes: Mapping[int, Shape], outputs: Sequence[int]) -> None:
        self.ops, self.shapes = ops, shapes
        self.readers = Counter([*outputs, *(value for op in ops for value in op.reads)])
        self.done: dict[int, Op] = {}

    def run(self) -> list[Op]:
        for op in self.ops:
            if isinstance(op, Conv2d):
                op = self.absorb_padding(op)
            elif isinstance(op, ScaleShift):
                op = self.fold_scale(op)
            elif isinstance(op, Add):
                op = self.add_to_convolution(op)
            elif isinstance(op, Activation):
                op = self.activate_producer(op)
            elif isinstance(op, Slice):
                op = self.merge_slices(op)
            self.done[op.output] = op
        return list(self.done.values())

    def only_reader_of(self, value: int) -> Op | None:
        """The operation that writes a value, if the value is read only once; else None."""
        return self.done.get(value) if self.readers[value] == 1 else None

    def absorb_padding(self, op: Conv2d) -> Conv2d:
        """Turn a zero Pad into the convolution's own padding, even if others read the padded value."""
        pad = self.done.get(op.input)
        if not (
            isinstance(pad, Pad)
            and pad.mode == "constant"
            and pad.value == 0
            and pad.before[0] == pad.after[0] == 0
        ):
            return op
        sides = (pad.before[1], pad.after[1], pad.before[2], pad.after[2])
        padding = tuple(a + b for a, b in zip(op.padding, sides, strict=True))
        if self.readers[pad.output] == 1:
            del self.done[pad.output]
        else:
            self.readers[pad.output] -= 1
            self.readers[pad.input] += 1
        return replace(op, input=pad.input, padding=padding)  # type: ignore[arg-type]

    def fold_scale(self, op: ScaleShift) -> Op:
        """scale·(w·x + b) + shift = (scale·w)·x + (scale·b + shift)."""
        before = self.only_reader_of(op.input)
        if op.scale.ndim > 1:
            return op
        if isinstance(before, Conv2d | Linear) and _is_bare(before):
            del self.done[before.output]
            return _scaled(before, op, op.output)
        if isinstance(before, ScaleShift) and before.scale.ndim == 1:
            del self.done[before.output]
            shift = op.scale * before.shift + op.shift
            return replace(op, input=before.input, scale=op.scale * before.scale, shift=shift)
        conv = self.pooled_convolution(before)
        if isinstance(before, Pool) and conv is not None and _is_bare(conv) and bool((op.scale > 0).all()):
            del self.done[before.output]
            self.done[conv.output] = _scaled(conv, op, conv.output)
            return replace(before, output=op.output)
        return op

    def pooled_convolution(self, pool: Op | None) -> Conv2d | None:
        """The convolution that only a max pool reads. Increasing functions commute with the maximum."""
        if not (isinstance(pool, Pool) and pool.kind == "max"):
            return None
        conv = self.only_reader_of(pool.input)
        return conv if isinstance(conv, Conv2d) else None

    def add_to_convolution(self, op: Add) -> Op:
        """Make one operand the residual of the convolution that computes the other."""
        if self.shapes[op.input] != self.shapes[op.other]:
            return op
        for value in sorted(op.reads):
            before = self.only_reader_of(value)
            if isinstance(before, Conv2d) and _is_bare(before):
                del self.done[value]
                residual = op.other if value == op.input else op.input
                return replace(before, output=op.output, residual=residual)
        return op

    def activate_producer(self, op: Activation) -> Op:
        """Join the operation before, or the convolution before a max pool if the function is increasing."""
        before = None if op.kind in PARAMETRIC else self.only_reader_of(op.input)
        if isinstance(before, Conv2d | Linear | Add) and before.activation == "none":
            del self.done[before.output]
            return replace(before, output=op.output, activation=op.kind)
        conv = self.pooled_convolution(before)
        if (
            isinstance(before, Pool)
            and conv is not None
            and conv.activation == "none"
            and op.kind in INCREASING
        ):
            del self.done[before.output]
            self.done[conv.output] = replace(conv, activation=op.kind)
            return replace(before, output=op.output)
        return op

    def merge_slices(self, op: Slice) -> Slice:
        """x[a:b:s][c:d:t] = x[a + c·s : a + (d − 1)·s + 1 : s·t] along each axis."""
        before = self.only_reader_of(op.input)
        if not isinstance(before, Slice):
            return op
        del self.done[before.output]
        axes = list(zip(before.start, before.step, op.start, op.stop, op.step, strict=True))
        return Slice(
            op.output,
            before.input,
            start=tuple(a + c * s for a, s, c, _, _ in axes),  # type: ignore[arg-type]
            stop=tuple(a + (d - 1) * s + 1 for a, s, _, d, _ in axes),  # type: ignore[arg-type]
            step=tuple(s * t for _, s, _, _, t in axes),  # type: ignore[arg-type]
        )


def _is_bare(op: Conv2d | Linear) -> bool:
    """Whether the operation has neither an activation nor a residual yet."""
    return op.activation == "none" and getattr(op, "residual", None) is None


def _scaled(op: Conv2d | Linear, by: ScaleShift, output: int) -> Conv2d | Linear:
    """``op`` with a scale and a shift per channel folded into its weight and bias."""
    scale = by.scale.view(-1, *(1,) * (op.weight.ndim - 1))
    return replace(op, output=output, weight=scale * op.weight, bias=by.scale * op.bias + by.shift)
