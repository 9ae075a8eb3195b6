"""Steps of the resident kernel: a stage's layers, merged into what the kernel runs at once.

A step is one entry of the kernel's table. A pooling, a sum or an activation becomes part of the convolution
before it, if its epilogue can compute it; a global pooling and the linear layer become the head of the stage.
A layer that the kernel cannot run raises :class:`DoesNotFit`, whose message names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from fastcascade.kernels.layers import Conv, Elementwise, Layer, Pooling

__all__ = ["ACTIVATIONS", "LARGEST_HALF", "DoesNotFit", "Map", "StageLayers", "Step", "stage_steps"]

SUMS, GROUP_SUMS = 8, 16
"""Tiles of 16 pixels × 16 channels whose sums a warp keeps, in 8 registers per thread each: of one image, and
of a group, which has 256 threads on a multiprocessor and so 255 registers per thread."""

LARGEST_HALF = 65504.0

ACTIVATIONS = {"none": "kNone", "relu": "kRelu", "gelu": "kGelu", "gelu_tanh": "kGeluTanh"}
"""Activations that the kernel has, and their names in ``resident_conv.cuh``."""


class DoesNotFit(ValueError):
    """Why a stage cannot run in the resident kernel."""


class Map(NamedTuple):
    """An activation in shared memory; see ``resident_maps.cuh``. Channels are a multiple of 8."""

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
        activation: after the pooling, if there is one.
        window: of a pooling or a head.
        residual_map: the map that a strided residual reads.
        mirror: of an image: its columns are read from right to left.
        images: that it runs on at once.
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
    activation: str = "none"
    pooled: bool = False
    residual: Residual | None = None
    residual_map: Map | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    window: Pooling | None = None
    mirror: bool = False
    images: int = 1

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
        tiles = -(-wanted // -(-wanted // SUMS))
        return tiles + tiles % 2 if self.pooled else tiles

    def groups(self, warps: int) -> int:
        """Groups of 16 output channels in a unit, which share A fragments: as many as leave no warp idle."""
        groups = 1
        if self.kind != "conv":
            return groups
        most = SUMS if self.images == 1 else GROUP_SUMS
        while (
            groups * 2 * self.tiles <= SUMS
            and groups * 2 * self.tiles * self.images <= most
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

    def type_name(self, warps: int, images: int = 1) -> str:
        """The template of ``resident_conv.cuh`` or ``resident_layers.cuh`` that runs the step.

        Args:
            images: 1, or all of a group's. Both templates read the same packed weights.
        """
        if self.kind == "image":
            return f"Image<{self.into.channels}, {self.out}>"
        if self.kind == "pool":
            into, out = (m._replace(channels=m.channels * images) for m in (self.into, self.out))
            return f"Pool<{into}, {out}>"
        if self.kind == "head":
            assert self.window is not None
            return f"Head<{self.into}, {_boolean(self.window.kind == 'max')}>"
        numbers = [*self.size, self.kernel, self.stride, *self.corner, self.tiles]
        flags = f"{ACTIVATIONS[self.activation]}, {_boolean(self.pooled)}"
        if self.kind == "stem":
            return f"Stem<{self.into}, {self.out}, {', '.join(map(str, numbers))}, {flags}>"
        numbers += [self.groups(warps), images]
        view = "Straight"
        if self.residual is not None and self.residual.view is not None:
            view = f"Strided<{self.residual_map}, {', '.join(map(str, self.residual.view))}>"
        return f"Conv<{self.into}, {self.out}, {', '.join(map(str, numbers))}, {flags}, {view}>"


def _boolean(value: bool) -> str:
    return "true" if value else "false"


@dataclass(frozen=True)
class StageLayers:
    """The planner's input for one stage.

    Attributes:
        layers: with float32 weights on the CPU.
        kept: the value that the next stage reads; None if it reads the image.
        previous: whether the stage reads the one before it.
        mirror: whether it reads the mirror image.
    """

    name: str
    layers: Sequence[Layer]
    kept: int | None
    previous: bool
    mirror: bool = False


# ---- steps ----


def stage_steps(stage: StageLayers, image: tuple[int, int, int]) -> list[Step]:
    """The steps of a stage; ``image`` is (channels, height, width).

    Raises:
        DoesNotFit: the kernel cannot run a layer; names it.
    """
    return _Fusion(stage, image).steps


class _Fusion:
    """Walks through the layers of a stage and merges those that one step can run."""

    def __init__(self, stage: StageLayers, image: tuple[int, int, int]) -> None:
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
            self.steps.append(Step("image", "image", -1, -1, Map(*image), out, mirror=stage.mirror))
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
        elif layer.work.other:
            self._sum(layer, layer.work)
        else:
            self._activation(layer, layer.work)

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
        _require(work.activation in ACTIVATIONS, f"activation {work.activation}")
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
                activation=work.activation,
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
            and last.activation in ("none", "relu")  # which commute with the maximum
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
        _require(_plain(work), "the kernel has only sums of whole maps")
        assert layer.other is not None
        for own, other in ((layer.source, layer.other), (layer.other, layer.source)):
            last = self._fusible(own)
            known = [step.output for step in self.steps]
            if last is None or last.kind != "conv" or last.residual is not None or last.pooled:
                continue
            if other != 0 and other not in known[: known.index(own)]:
                continue  # not there yet when the convolution ends
            first = last.activation == "none"
            if not first and work.activation != "none":
                continue
            _require(work.activation in ACTIVATIONS, f"activation {work.activation}")
            self.maps[layer.output] = last.out
            self.steps[self.steps.index(last)] = replace(
                last,
                output=layer.output,
                residual=Residual(other, last=not first),
                activation=work.activation if first else last.activation,
                label=f"{last.label}, {layer.label}",
            )
            return
        raise DoesNotFit("neither operand is a convolution that could add the other")

    def _activation(self, layer: Layer, work: Elementwise) -> None:
        """An activation behind the convolution that wrote the value, or behind its pooling."""
        _require(_plain(work) and work.activation in ACTIVATIONS, "the kernel has no such step")
        last = self._fusible(layer.source)
        last_adds = last is not None and last.residual is not None and last.residual.last
        if last is None or last.activation != "none" or last_adds:
            raise DoesNotFit("no convolution could apply it")
        self.maps[layer.output] = last.out
        self.steps[self.steps.index(last)] = replace(
            last, output=layer.output, activation=work.activation, label=f"{last.label}, {layer.label}"
        )

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


def _plain(work: Elementwise) -> bool:
    """Whether a layer keeps every value in its place, and neither scales nor shifts it."""
    aligned = work.start == (0, 0, 0) and work.step == (1, 1, 1) and work.source == work.out
    return aligned and not work.affine


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DoesNotFit(otherwise)


def _half(weight: Tensor) -> Tensor:
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if not largest <= LARGEST_HALF:
        raise DoesNotFit(f"a weight of {largest:g} overflows fp16")
    return weight
