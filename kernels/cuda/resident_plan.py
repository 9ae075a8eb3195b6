"""Planning for the resident kernel: from a stage's layers to steps, from steps to shared memory and a table.

A step is one entry of the kernel's table. A pooling or a sum becomes part of the convolution before it, if
its epilogue can compute it; a global pooling and the linear layer become the head of the stage. A layer that
the kernel cannot run raises :class:`DoesNotFit`, whose message names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastcascade.kernels.layers import Conv, Elementwise, Layer, Pooling

__all__ = [
    "A100",
    "CONTROL_BYTES",
    "H100",
    "MOST_WARPS",
    "DoesNotFit",
    "Machine",
    "Map",
    "ResidentPlan",
    "ResidentStage",
    "Step",
    "plan_resident",
    "stage_steps",
]

CONTROL_BYTES = 16
"""Bytes at the start of shared memory: the block's image, and whether it stopped."""

BLOCK_RESERVE = 1024
"""Bytes of shared memory that CUDA reserves in every block."""

MOST_WARPS = 8
"""kMostWarps in ``resident.cuh``."""

MOST_TYPES = 40
"""Most layer types in one kernel. Compiling each takes about half a second."""

ACCUMULATOR_TILES = 8
"""Tiles of 16 pixels × 16 channels whose sums a warp keeps, in 64 registers per thread."""

LARGEST_HALF = 65504.0

CLEAR_BORDER, RESIDUAL_FIRST, RESIDUAL_LAST, AVERAGE, COUNT_PADDING = 1, 2, 4, 8, 16
"""LayerFlags in ``resident.cuh``."""


class DoesNotFit(ValueError):
    """Why a stage cannot run in the resident kernel."""


class Machine(NamedTuple):
    """The properties of a GPU that plan and estimates depend on.

    Attributes:
        multiprocessors: their number.
        clock: in Hz.
        shared_block, shared_multiprocessor: bytes of shared memory per block and per multiprocessor.
        mma_cycles: cycles of a quarter of a multiprocessor for one mma.m16n8k16 in fp16.
        l2_bytes, memory_bytes: bytes per second from L2, to all multiprocessors together, and from device
            memory.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    shared_block: int
    shared_multiprocessor: int
    mma_cycles: float
    l2_bytes: float
    memory_bytes: float


# mma.sync reaches about 63 % of wgmma's rate on Hopper (arXiv 2402.13499). L2: published microbenchmarks.
H100 = Machine("H100 SXM", (9, 0), 132, 1.755e9, 232448, 233472, 4 / 0.63, 5.5e12, 3.35e12)
A100 = Machine("A100 SXM", (8, 0), 108, 1.41e9, 166912, 167936, 8.0, 4.0e12, 1.55e12)


class Map(NamedTuple):
    """An activation in shared memory; see ``resident.cuh``. Channels are a multiple of 8."""

    channels: int
    height: int
    width: int

    @property
    def pitch(self) -> int:
        return (self.width + 1) * 16

    @property
    def plane(self) -> int:
        return (self.height + 2) * self.pitch + 16

    @property
    def size(self) -> int:
        """Bytes."""
        return self.plane * (self.channels // 8)

    def reach(self, row: int, column: int) -> int:
        """Bytes from the start of the map to the end of this pixel in the last channels."""
        return self.size - self.plane + (row + 1) * self.pitch + (column + 2) * 16

    def __str__(self) -> str:
        return f"Map<{self.channels}, {self.height}, {self.width}>"


@dataclass(frozen=True)
class Residual:
    """What a convolution adds. ``last``: after the activation. ``view``: (step, before, channels)."""

    value: int
    last: bool = False
    view: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Step:
    """One entry of the kernel's table.

    Attributes:
        kind: "image", "stem", "conv", "pool" or "head".
        source, output: values of the stage. −1 is the map of the image; a head writes none.
        into, out: the maps that it reads and writes. For an image, ``into`` is its shape.
        size: (height, width) of a convolution's result before pooling.
        weight: (kernel, kernel, in, out) float32, or a head's (in, classes); bias (out,).
        window: of a pooling or a head.
    """

    kind: str
    label: str
    source: int
    output: int
    into: Map
    out: Map
    size: tuple[int, int] = (0, 0)
    kernel: int = 0
    stride: int = 1
    corner: tuple[int, int] = (0, 0)
    relu: bool = False
    pooled: bool = False
    residual: Residual | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    window: Pooling | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        """Numbers of the values that the step reads."""
        return (self.source,) if self.residual is None else (self.source, self.residual.value)

    @property
    def columns(self) -> int:
        """Columns of a tile of 16 pixels."""
        return 8 if self.size[1] > 4 else 4

    @property
    def tiles(self) -> int:
        """Tiles of a unit, at most 8: the result's rows are spread evenly over as few passes as possible."""
        wanted = -(-self.size[0] * self.columns // 16)
        tiles = -(-wanted // -(-wanted // ACCUMULATOR_TILES))
        return tiles + tiles % 2 if self.pooled else tiles

    def groups(self, warps: int) -> int:
        """Groups of 16 output channels in a unit, which share A fragments: as many as leave no warp idle."""
        groups = 1
        if self.kind != "conv":
            return groups
        while (
            groups * 2 * self.tiles <= ACCUMULATOR_TILES
            and self.out.channels % (32 * groups) == 0
            and self.units(groups * 2) >= warps
        ):
            groups *= 2
        return groups

    @property
    def column_passes(self) -> int:
        """Units with the same weights: blocks of columns times passes over the rows."""
        rows = 16 // self.columns * self.tiles
        return -(-self.size[1] // self.columns) * -(-self.size[0] // rows)

    def units(self, groups: int) -> int:
        """Units of work, which the warps take in turns."""
        return self.column_passes * (self.out.channels // 16 // groups)

    def source_bytes(self) -> int:
        """Bytes of the source that it may read, the unused pixels of ragged tiles included."""
        if self.kind not in ("stem", "conv"):
            return self.into.size
        rows = 16 // self.columns * self.tiles
        row = (-(-self.size[0] // rows) * rows - 1) * self.stride + self.kernel - 1 - self.corner[0]
        column = -(-self.size[1] // self.columns) * self.columns - 1
        return max(
            self.into.size,
            self.into.reach(row, column * self.stride + self.kernel - 1 - self.corner[1]),
        )

    def type_name(self, warps: int) -> str:
        """The template of ``resident.cuh`` that runs the step."""
        maps = f"{self.into}, {self.out}"
        if self.kind == "image":
            return f"Image<{self.into.channels}, {self.out}>"
        if self.kind == "pool":
            return f"Pool<{maps}>"
        if self.kind == "head":
            assert self.window is not None
            return f"Head<{self.into}, {_boolean(self.window.kind == 'max')}>"
        numbers = [*self.size, self.kernel, self.stride, *self.corner, self.tiles]
        flags = f"{_boolean(self.relu)}, {_boolean(self.pooled)}"
        if self.kind == "stem":
            return f"Stem<{maps}, {', '.join(map(str, numbers))}, {flags}>"
        numbers.append(self.groups(warps))
        view = "Straight"
        if self.residual is not None and self.residual.view is not None:
            view = f"Strided<{self.residual_map}, {', '.join(map(str, self.residual.view))}>"
        return f"Conv<{maps}, {', '.join(map(str, numbers))}, {flags}, {view}>"

    residual_map: Map | None = None
    """The map that a strided residual reads."""


def _boolean(value: bool) -> str:
    return "true" if value else "false"


@dataclass(frozen=True)
class ResidentStage:
    """The planner's input for one stage.

    Attributes:
        layers: with float32 weights on the CPU.
        kept: the value that the next stage reads; None if it reads the image.
        previous: whether the stage reads the one before it.
    """

    name: str
    layers: Sequence[Layer]
    kept: int | None
    previous: bool


# ---- steps ----


def stage_steps(stage: ResidentStage, image: tuple[int, int, int]) -> list[Step]:
    """The steps of a stage; ``image`` is (channels, height, width).

    Raises:
        DoesNotFit: the kernel cannot run a layer; names it.
    """
    return _Fusion(stage, image).steps


class _Fusion:
    """Walks through the layers of a stage and merges those that one step can run."""

    def __init__(self, stage: ResidentStage, image: tuple[int, int, int]) -> None:
        self.stage = stage
        self.readers = {
            layer.output: [other for other in stage.layers if layer.output in other.reads]
            for layer in stage.layers
        }
        self.maps: dict[int, Map] = {}
        self.steps: list[Step] = []
        self.pooled: dict[int, Layer] = {}  # global poolings that become part of the head, by their output
        if stage.previous:
            self.maps[0] = self._features_read(stage.layers)
        else:
            channels, height, width = image
            if channels > 8:
                raise DoesNotFit(f"images have {channels} channels; the limit is 8")
            out = Map(8, height, width)
            self.steps.append(Step("image", "image", -1, -1, Map(*image), out))
            self.maps[-1] = out
        for layer in stage.layers:
            try:
                self._take(layer)
            except DoesNotFit as error:
                raise DoesNotFit(f"{layer.label}: {error}") from None
        if self.steps[-1].kind != "head":
            raise DoesNotFit("its last layer is not the linear one")

    def _features_read(self, layers: Sequence[Layer]) -> Map:
        for layer in layers:
            if layer.source == 0 and isinstance(layer.work, Conv):
                shape = layer.work.shape
                return Map(shape.channels, shape.height, shape.width)
            if layer.source == 0 and not isinstance(layer.work, Conv):
                height, width, channels = layer.work.source
                return Map(channels, height, width)
        raise DoesNotFit("no layer reads the previous stage's features")

    def _take(self, layer: Layer) -> None:
        if isinstance(layer.work, Conv):
            if layer.work.logits:
                self._head(layer, layer.work)
            else:
                self._conv(layer, layer.work)
        elif isinstance(layer.work, Pooling):
            self._pool(layer, layer.work)
        else:
            self._sum(layer, layer.work)

    def _conv(self, layer: Layer, work: Conv) -> None:
        shape = work.shape
        assert layer.weight is not None
        assert layer.vectors is not None
        kernel, stride = shape.kernel[0], shape.stride[0]
        _require(shape.kernel == (kernel, kernel), f"a kernel of {shape.kernel}; square ones fit")
        most = 5 if work.image else 3
        _require(kernel <= most, f"a kernel of {kernel}×{kernel}; the limit here is {most}×{most}")
        _require(shape.stride == (stride, stride) and stride <= 2, f"stride {shape.stride}; 1 and 2 fit")
        _require(shape.dilation == (1, 1), f"dilation {shape.dilation}")
        _require(work.activation in ("none", "relu"), f"activation {work.activation}")
        _require(max(shape.corner) <= 1, f"padding {shape.corner}; at most 1 fits")
        ends = [(n - 1) * stride + kernel - 1 - corner for n, corner in zip(
            (shape.out_height, shape.out_width), shape.corner, strict=True)]  # fmt: skip
        _require(ends[0] <= shape.height and ends[1] <= shape.width, "padding of more than 1")
        stored = -(-shape.out_channels // 16) * 16
        taps = kernel * kernel * shape.channels
        source = -1 if work.image else layer.source
        out = Map(stored, shape.out_height, shape.out_width)
        residual, residual_map = self._residual(layer, work, out)
        self.maps[layer.output] = out
        self.steps.append(
            Step(
                "stem" if work.image else "conv",
                layer.label,
                source,
                layer.output,
                self.maps[source],
                out,
                size=(shape.out_height, shape.out_width),
                kernel=kernel,
                stride=stride,
                corner=shape.corner,
                relu=work.activation == "relu",
                residual=residual,
                residual_map=residual_map,
                weight=_half(layer.weight[:taps].reshape(kernel, kernel, shape.channels, -1)),
                bias=layer.vectors,
            )
        )

    def _residual(self, layer: Layer, work: Conv, out: Map) -> tuple[Residual | None, Map | None]:
        view = work.view
        if view is None or layer.other is None:
            return None, None
        _require(not work.image, "a residual on the image's convolution")
        step, source = view.step[0], self.maps[layer.other]
        straight = source == out and view.channels == work.shape.out_channels
        if view.step == (1, 1) and view.start == (0, 0) and view.before == 0 and straight:
            return Residual(layer.other), None
        _require(view.start == (0, 0) and view.step == (step, step), "a shortcut of another shape")
        _require(
            view.before % 2 == 0 and view.channels % 2 == 0,
            f"a shortcut of {view.channels} channels from {view.before} on; even numbers fit",
        )
        return Residual(layer.other, view=(step, view.before, view.channels)), source

    def _pool(self, layer: Layer, work: Pooling) -> None:
        readers = self.readers[layer.output]
        whole = work.kernel == work.source[:2] and work.out[:2] == (1, 1) and work.padding == (0, 0, 0, 0)
        if (
            layer.output != self.stage.kept
            and whole
            and all(isinstance(r.work, Conv) and r.work.logits for r in readers)
        ):
            self.pooled[layer.output] = layer
            return
        out = Map(work.out[2], *work.out[:2])
        self.maps[layer.output] = out
        last = self._fusible(layer.source)
        height, width, _ = work.source
        halved = work.kernel == work.stride == (2, 2) and work.padding == (0, 0, 0, 0)
        if (
            last is not None
            and work.kind == "max"
            and halved
            and work.out[:2] == (height // 2, width // 2)
            and (last.residual is None or not last.residual.last)
        ):
            self.steps[self.steps.index(last)] = replace(
                last, output=layer.output, out=out, pooled=True, label=f"{last.label}, {layer.label}"
            )
            return
        _require(max(*work.kernel, *work.stride, *work.padding) < 128, "a window of 128 or more")
        self.steps.append(
            Step("pool", layer.label, layer.source, layer.output, self.maps[layer.source], out, window=work)
        )

    def _sum(self, layer: Layer, work: Elementwise) -> None:
        plain = work.start == (0, 0, 0) and work.step == (1, 1, 1) and not work.affine
        _require(work.other and plain and work.source == work.out, "the kernel has only sums of this kind")
        assert layer.other is not None
        for own, other in ((layer.source, layer.other), (layer.other, layer.source)):
            last = self._fusible(own)
            known = [step.output for step in self.steps]
            if last is None or last.kind != "conv" or last.residual is not None or last.pooled:
                continue
            if other != 0 and other not in known[: known.index(own)]:
                continue  # not there yet when the convolution ends
            first = not last.relu
            if not first and work.activation != "none":
                continue
            _require(work.activation in ("none", "relu"), f"activation {work.activation}")
            self.maps[layer.output] = last.out
            self.steps[self.steps.index(last)] = replace(
                last,
                output=layer.output,
                residual=Residual(other, last=not first),
                relu=last.relu or work.activation == "relu",
                label=f"{last.label}, {layer.label}",
            )
            return
        raise DoesNotFit("neither operand is a convolution that could add the other")

    def _fusible(self, value: int) -> Step | None:
        """The convolution that wrote a value, if it has only one reader."""
        if value == self.stage.kept or len(self.readers.get(value, ())) != 1:
            return None
        return next((s for s in self.steps if s.output == value and s.kind in ("conv", "stem")), None)

    def _head(self, layer: Layer, work: Conv) -> None:
        shape = work.shape
        pooling = self.pooled.get(layer.source)
        source = layer.source if pooling is None else pooling.source
        _require(source in self.maps, "it does not read a map")
        into = self.maps[source]
        window = None if pooling is None else pooling.work
        if window is None:
            _require((into.height, into.width) == (1, 1), "a linear layer on more than pooled channels")
            window = Pooling(
                (1, 1, into.channels), (1, 1, into.channels), "average", (1, 1), (1, 1), (0,) * 4, True
            )
        assert isinstance(window, Pooling)
        assert layer.weight is not None
        assert layer.vectors is not None
        _require(work.activation == "none" and work.view is None, "more than a product on the logits")
        weight = layer.weight[: into.channels, : shape.out_channels]
        self.steps.append(
            Step(
                "head",
                f"global {window.kind} pool, {layer.label}",
                source,
                layer.output,
                into,
                into,
                weight=weight,
                bias=layer.vectors[: shape.out_channels],
                window=window,
            )
        )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DoesNotFit(otherwise)


def _half(weight: Tensor) -> Tensor:
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if not largest <= LARGEST_HALF:
        raise DoesNotFit(f"a weight of {largest:g} overflows fp16")
    return weight


# ---- shared memory ----


@dataclass
class Buffer:
    """Memory of one value, or of several in turn, in use from step ``begin`` to step ``end``."""

    size: int
    begin: int
    end: int
    place: int = 0
    map: Map | None = None


@dataclass(frozen=True)
class Entry:
    """A step with its byte offsets in shared memory and its flags."""

    step: Step
    stage: int
    source: int
    output: int
    residual: int
    flags: int


@dataclass(frozen=True)
class ResidentPlan:
    """Stages laid out for the resident kernel.

    Attributes:
        entries: in order; the last entry of each stage is its head.
        warps: per block.
        blocks: per multiprocessor.
        shared_bytes: per block.
    """

    entries: tuple[Entry, ...]
    warps: int
    blocks: int
    shared_bytes: int
    classes: int
    machine: Machine
    names: tuple[str, ...] = field(default=())

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.warps * 32

    def type_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The types of layers and of heads, in the order of their first use."""
        steps = [entry.step for entry in self.entries]
        layers = dict.fromkeys(s.type_name(self.warps) for s in steps if s.kind != "head")
        heads = dict.fromkeys(s.type_name(self.warps) for s in steps if s.kind == "head")
        return tuple(layers), tuple(heads)


def plan_resident(
    stages: Sequence[Sequence[Step]], kept: Sequence[int | None], previous: Sequence[bool], classes: int,
    machine: Machine, names: Sequence[str] = (),
) -> ResidentPlan:  # fmt: skip
    """Assign shared memory, and choose the numbers of warps and blocks.

    Args:
        stages: the steps of each, from :func:`stage_steps`.
        kept, previous: as in :class:`ResidentStage`.

    Raises:
        DoesNotFit: there is too little shared memory, or there are too many types of layers.
    """
    if machine.capability < (8, 0):
        raise DoesNotFit("ldmatrix and mma of this shape need sm_80")
    flat = [(k, step) for k, steps in enumerate(stages) for step in steps]
    for warps, most in (
        (4, 3),
        (MOST_WARPS, 1),
    ):  # three blocks leave a thread 168 registers, else it has 255
        entries, size = _layout(flat, kept, previous, classes, warps)
        if size > machine.shared_block:
            raise DoesNotFit(
                f"an image's activations take {size >> 10} KiB of shared memory; "
                f"a block of this GPU has at most {machine.shared_block >> 10}"
            )
        blocks = min(machine.shared_multiprocessor // (size + BLOCK_RESERVE), most)
        if blocks > 1 or warps == MOST_WARPS:
            break
    plan = ResidentPlan(tuple(entries), warps, blocks, size, classes, machine, tuple(names))
    types = sum(map(len, plan.type_names()))
    if types > MOST_TYPES:
        raise DoesNotFit(f"it has {types} different layers; the limit is {MOST_TYPES}")
    return plan


def _layout(
    flat: Sequence[tuple[int, Step]],
    kept: Sequence[int | None],
    previous: Sequence[bool],
    classes: int,
    warps: int,
) -> tuple[list[Entry], int]:
    """Assign places to all values; returns the entries and the bytes of shared memory."""

    def key(stage: int, value: int) -> tuple[int, int]:
        """A value of a stage. Value 0 of a stage that reads the previous one is what that one kept."""
        while value == 0 and previous[stage]:
            stage, value = stage - 1, kept[stage - 1] or 0
        return stage, value

    last_read: dict[tuple[int, int], int] = {}
    needed: dict[tuple[int, int], int] = {}
    for i, (k, step) in enumerate(flat):
        if step.kind == "image":
            continue
        for value in step.reads:
            last_read[key(k, value)] = i
        source = key(k, step.source)
        needed[source] = max(needed.get(source, 0), step.source_bytes())

    owner: dict[tuple[int, int], Buffer] = {}
    buffers: list[Buffer] = []
    for i, (k, step) in enumerate(flat):
        if step.kind == "head":
            buffers.append(Buffer((step.into.channels + (warps + 1) * classes) * 4, i, i))
            owner[k, step.output] = buffers[-1]
            continue
        own = key(k, step.output)
        end = last_read.get(own, i)
        size = max(step.out.size, needed.get(own, 0))
        if step.residual is not None and step.residual.view is None and not step.pooled:
            other = key(k, step.residual.value)
            dies = last_read[other] == i and other != key(k, step.source)
            if dies and owner[other].map == step.out:  # every thread adds to what it then writes over
                owner[own] = owner[other]
                owner[own].end, owner[own].size = end, max(owner[own].size, size)
                continue
        owner[own] = Buffer(size, i, end, map=step.out)
        buffers.append(owner[own])

    _place(buffers)
    clean: dict[int, tuple[Map, int]] = {}  # place → the map there whose border is zero, and its size
    entries = []
    for k, step in flat:
        held = owner[k, step.output] if step.kind == "head" else owner[key(k, step.output)]
        flags = 0
        if clean.get(held.place) != (held.map, held.size) or held.map is None:
            overlapping = [
                place
                for place, (_, size) in clean.items()
                if place < held.place + held.size and held.place < place + size
            ]
            for place in overlapping:
                del clean[place]
            if held.map is not None:
                clean[held.place] = held.map, held.size
                flags |= CLEAR_BORDER
        residual = 0
        if step.residual is not None:
            residual = owner[key(k, step.residual.value)].place
            flags |= RESIDUAL_LAST if step.residual.last else RESIDUAL_FIRST
        if step.kind == "pool":
            assert step.window is not None
            flags |= AVERAGE * (step.window.kind == "average") | COUNT_PADDING * step.window.include_padding
        source_place = 0 if step.kind == "image" else owner[key(k, step.source)].place
        entries.append(Entry(step, k, source_place, held.place, residual, flags))
    return entries, max(buffer.place + buffer.size for buffer in buffers)


def _place(buffers: Sequence[Buffer]) -> None:
    """Place the largest first, each at the lowest offset that is free during its lifetime."""
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: -b.size):
        buffer.place = CONTROL_BYTES
        beside = (b for b in placed if b.begin <= buffer.end and buffer.begin <= b.end)
        for other in sorted(beside, key=lambda b: b.place):
            if other.place < buffer.place + buffer.size and buffer.place < other.place + other.size:
                buffer.place = -(-(other.place + other.size) // 16) * 16
        placed.append(buffer)


def fragments(blocks: Tensor) -> Tensor:
    """B fragments of mma.m16n8k16: (…, 16 k, 16 n) → (…, 32 lanes, 8) fp16: b0, b1 of n < 8, of n ≥ 8."""
    lane = torch.arange(32)
    n, k = lane // 4, lane % 4 * 2
    parts = [
        blocks[..., k + pair + half * 8, n + side * 8]
        for side in (0, 1)
        for half in (0, 1)
        for pair in (0, 1)
    ]
    return torch.stack(parts, -1).half()


def pack_conv(weight: Tensor, groups: int) -> Tensor:
    """(kernel, kernel, in, out) → (units, fragments, 32, 8), by 16 inputs, kernel column, row, group."""
    kernel, _, inputs, outputs = weight.shape
    blocks = weight.reshape(kernel, kernel, inputs // 16, 16, outputs // (16 * groups), groups, 16)
    # ky, kx, c, k, unit, g, n → unit, c, kx, ky, g, k, n
    return fragments(blocks.permute(4, 2, 1, 0, 5, 3, 6).reshape(outputs // (16 * groups), -1, 16, 16))


def pack_stem(weight: Tensor) -> Tensor:
    """(kernel, kernel, in, out) → (groups, steps, 32, 8): two taps of 8 channels a step."""
    kernel, _, inputs, outputs = weight.shape
    taps = weight.new_zeros(-(-kernel * kernel // 2) * 2, 8, outputs)
    taps[: kernel * kernel, :inputs] = weight.reshape(kernel * kernel, inputs, outputs)
    return fragments(taps.reshape(-1, 16, outputs // 16, 16).permute(2, 0, 1, 3))
