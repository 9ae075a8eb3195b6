"""Post-training quantisation: the convolutions and linear layers of a plan in int8.

Each stage goes through five steps, all on the calibration images:

- *Scales.* Weights get a scale per output channel. A value gets one scale, that with the smallest mean
  squared error on a sample of it. The largest 0.01 % of the sample do not count, so that a few outliers do
  not coarsen everything else.
- *Bias correction.* Rounding shifts the mean of a channel. Layer by layer, the bias takes the shift back
  (Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, ICCV 2019,
  arXiv 1906.04721, with measured means in place of estimated ones).
- *Sensitivity.* The layers with the largest errors of their own stay in float32, as many as are needed
  until the stage's probabilities stay close to those of the float32 stage.
- *Temperature.* One factor on the logits makes the stage as confident as it is in float32, so that selectors
  see the probabilities that they were fitted on.
- *Rewriting.* The layers become operations on bytes, with quantise and dequantise operations where values
  pass from or to operations in float32.

The layers that make the logits stay in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcascade.errors import InvalidArgument, LoweringError
from fastcascade.lowering.interpreter import activate, run_op, run_stage
from fastcascade.lowering.operations import (
    Activation,
    ActivationKind,
    Conv2d,
    Linear,
    Op,
    Pool,
    Shape,
)
from fastcascade.lowering.plan import Plan, StagePlan
from fastcascade.lowering.quantized_operations import (
    MAX_SUM,
    Dequantize,
    Quantize,
    QuantizedConv2d,
    QuantizedLinear,
)

__all__ = ["FEWEST_IMAGES", "MOST_IMAGES", "quantize_plan"]

Layer: TypeAlias = Conv2d | Linear

FEWEST_IMAGES, MOST_IMAGES = 16, 512
"""Calibration images: fewer are refused, more are not used."""

MAX_DIVERGENCE = 0.0025
"""Mean KL divergence, in nats, of a stage's probabilities in float32 from those in int8."""

LARGEST_FACTOR = 2.0  # on logits, and its inverse
CORRECTION_IMAGES = 64
BATCH = 32
SAMPLE = 1 << 16  # elements of a value, of all images together
OUTLIERS = 1e-4  # share of a sample
SHRINK = 0.95 ** torch.arange(80)  # clipping points to try, as shares of the extremes: down to 1.7 %
CLAMPS: dict[ActivationKind, tuple[float, float]] = {
    "none": (-math.inf, math.inf),
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
}


class Grid(NamedTuple):
    """The values that bytes stand for: (q − zero_point) · scale."""

    scale: float
    zero_point: int

    def round(self, x: Tensor) -> Tensor:
        """The nearest value of the grid."""
        steps = (x * (1 / self.scale)).clamp(-self.zero_point, 255 - self.zero_point)
        return steps.round() * self.scale


FLOAT = Grid(1.0, 0)
"""Units of an output that stays float32."""


@torch.no_grad()
def quantize_plan(plan: Plan, images: Tensor, stages: Sequence[bool] | None = None) -> Plan:
    """A plan with stages in int8.

    Args:
        plan: in float32; not changed.
        images: (n, C, H, W), uint8 or float, as the plan's input: a sample of what it will classify, without
            labels. The first 512 are used; 16 is the least.
        stages: (K,) which stages to quantise; all by default.

    Raises:
        InvalidArgument: too few images, of another shape, or none of them finite.
        LoweringError: a stage to quantise is opaque, or quantised already.

    Warns:
        UserWarning: images that are not finite are left out.

    Example:
        >>> import fastcascade as fc
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> plan = fc.plan(fc.Cascade([resnet_cifar(8)], None, num_classes=10, input_shape=(3, 32, 32)))
        >>> print(quantize_plan(plan, torch.rand(16, 3, 32, 32)).stages[0].ops[2])
        int8 conv 3×3 16→16, error ...%
    """
    wanted = [True] * len(plan.stages) if stages is None else list(stages)
    if len(wanted) != len(plan.stages):
        raise InvalidArgument(f"got {len(wanted)} entries for {len(plan.stages)} stages")
    image = _finite_images(plan, images)
    features = image
    done: list[StagePlan] = []
    for stage, chosen in zip(plan.stages, wanted, strict=True):
        x = image if stage.input == "image" else features
        feeds = len(done) + 1 < len(plan.stages) and plan.stages[len(done) + 1].input == "previous"
        done.append(_quantize_stage(stage, x, feeds) if chosen else stage)
        if feeds:
            # What the next stage will read, errors of this one included.
            features = torch.cat([run_stage(done[-1], part)[0] for part in x.split(BATCH)])
    return replace(plan, stages=tuple(done), operating_points=dict(plan.operating_points))


def _finite_images(plan: Plan, images: Tensor) -> Tensor:
    if len(images) < FEWEST_IMAGES:
        raise InvalidArgument(
            f"got {len(images)} calibration images; expected at least {FEWEST_IMAGES}. More make the scales "
            f"of int8 values more reliable, up to {MOST_IMAGES}"
        )
    x = plan.input.to_float(plan.input.nchw(images[:MOST_IMAGES])).float()
    finite = x.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        left = int(finite.sum())
        if left < FEWEST_IMAGES:
            raise InvalidArgument(
                f"only {left} of {len(x)} calibration images are finite; expected at least {FEWEST_IMAGES}"
            )
        warnings.warn(f"{len(x) - left} calibration images are not finite and are left out", stacklevel=4)
    return x[finite]


def _quantize_stage(stage: StagePlan, x: Tensor, feeds: bool) -> StagePlan:
    """The stage in int8; ``feeds`` where the next one reads its features."""
    if stage.module is not None:
        raise LoweringError(
            f"stage {stage.name!r} cannot be quantised: it is opaque ({stage.opaque_reason}). Ask for fp32 "
            'there, for example precision=["int8", "fp32"]'
        )
    if stage.is_quantized:
        raise LoweringError(f"stage {stage.name!r} is quantised already; quantise the float32 plan")
    candidates = _inner_layers(stage)
    grids = _grids(stage, x, candidates)
    layers = _insensitive(stage, x, _quantize_layers(stage, x, candidates, grids), grids)
    if not layers:
        return stage
    if not (feeds and stage.features == stage.logits):
        stage = _as_confident(stage, x, layers, grids)
    return _Rewriter(stage, layers, grids).run()


def _inner_layers(stage: StagePlan) -> list[Layer]:
    """The convolutions and linear layers that have others after them in the stage."""
    before: set[int] = set()  # values that a layer works on
    for op in reversed(stage.ops):
        if isinstance(op, Conv2d | Linear) or op.output in before:
            before.update(op.reads)
    return [
        op
        for op in stage.ops
        if isinstance(op, Conv2d | Linear)
        and (op.output in before or op.output == stage.features != stage.logits)
    ]


def _grids(stage: StagePlan, x: Tensor, layers: Iterable[Layer]) -> dict[int, Grid]:
    """The grid of every value that quantised layers would read or write; without those not finite."""
    wanted = {value for op in layers for value in (*op.reads, op.output)}
    samples: dict[int, list[Tensor]] = {value: [] for value in wanted}
    lowest, is_finite = dict.fromkeys(wanted, math.inf), dict.fromkeys(wanted, True)
    batches = x.split(BATCH)

    def sample(value: int, y: Tensor) -> None:
        flat = y.flatten()
        step = max(1, flat.numel() * len(batches) // SAMPLE)
        samples[value].append(flat[::step].clone())
        lowest[value] = min(lowest[value], float(flat.amin()))
        is_finite[value] &= bool(flat.isfinite().all())

    for batch in batches:
        values = {0: batch}
        for op, dead in zip(stage.ops, stage.last_reads(), strict=True):
            values[op.output] = run_op(op, [values[v] for v in op.reads], stage.shapes[op.output])
            for value in dead:
                y = values.pop(value)
                if value in wanted:
                    sample(value, y)
        for value in wanted & values.keys():
            sample(value, values[value])
    grids = {
        value: _best_grid(torch.cat(parts), is_signed=lowest[value] < 0)
        for value, parts in samples.items()
        if is_finite[value]
    }
    for op in stage.ops:
        # A max pool may then work on bytes.
        if isinstance(op, Pool) and op.kind == "max" and {op.input, op.output} <= grids.keys():
            grids[op.output] = grids[op.input]
    return grids


def _best_grid(sample: Tensor, is_signed: bool) -> Grid:
    """The grid with the least mean squared error on a finite sample, a few outliers left out."""
    outliers = int(OUTLIERS * sample.numel())
    sample = sample[sample.abs().argsort()[: sample.numel() - outliers]]
    low, high = (min(0.0, float(sample.min())) if is_signed else 0.0), max(0.0, float(sample.max()))
    step = high / 255 - low / 255  # not (high − low) / 255, which may overflow
    if step < torch.finfo(torch.float32).tiny:
        return Grid(1.0, 128 if is_signed else 0)
    zero_point = round(-low / step)
    scales = (step * SHRINK.double()).float().tolist()
    errors = [float((Grid(scale, zero_point).round(sample) - sample).square().mean()) for scale in scales]
    return Grid(scales[errors.index(min(errors))], zero_point)


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer in int8: ``weight`` int8, ``scales`` (out,) float64, ``bias`` (out,) float64, corrected."""

    op: Layer
    weight: Tensor
    scales: Tensor
    bias: Tensor
    error: float

    @property
    def rounded(self) -> Layer:
        """The layer in float32 with its rounded weights, without residual and activation."""
        axes = (-1, *(1,) * (self.weight.ndim - 1))
        weight = (self.weight.double() * self.scales.reshape(axes)).float()
        return _bare(replace(self.op, weight=weight, bias=self.bias.float()))


def _bare(op: Layer) -> Layer:
    changes: dict[str, Any] = {"residual": None} if isinstance(op, Conv2d) else {}
    return replace(op, activation="none", **changes)


def _round_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (out, …) as int8, and the scale of each output channel, (out,) float64."""
    rows = weight.double().flatten(1)
    largest = rows.abs().amax(1)
    scales = torch.where(largest > 0, largest / 127, 1.0)
    rounded = (rows / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    return rounded.reshape(weight.shape), scales


def _quantize_layers(
    stage: StagePlan, x: Tensor, candidates: Iterable[Layer], grids: Mapping[int, Grid]
) -> dict[int, QuantizedLayer]:
    """The candidates that int8 can hold, by output, with corrected biases and their own errors."""
    layers: dict[int, QuantizedLayer] = {}
    layer_of = {op.output: op for op in candidates if _fits(op, grids)}
    exact = {0: x[:CORRECTION_IMAGES]}
    shifted = dict(exact)  # the values with the errors of all layers so far
    for op, dead in zip(stage.ops, stage.last_reads(), strict=True):
        inputs = [exact[v] for v in op.reads]
        shape = stage.shapes[op.output]
        exact[op.output] = run_op(op, inputs, shape)
        if op.output in layer_of:
            layer = _correct(layer_of[op.output], exact, shifted, grids)
            layers[op.output] = layer
            shifted[op.output] = _int8_output(layer, shifted, grids)
        else:
            shifted[op.output] = run_op(op, [shifted[v] for v in op.reads], shape)
        for value in dead:
            del exact[value], shifted[value]
    return layers


def _fits(op: Layer, grids: Mapping[int, Grid]) -> bool:
    """Whether all its values are finite, and the sums of its products fit in an int32."""
    if not all(value in grids for value in (*op.reads, op.output)) or not bool(op.weight.isfinite().all()):
        return False
    weight, _ = _round_weights(op.weight)
    return 255 * int(weight.flatten(1).long().abs().sum(1).max()) <= MAX_SUM


def _correct(
    op: Layer, exact: Mapping[int, Tensor], shifted: Mapping[int, Tensor], grids: Mapping[int, Grid]
) -> QuantizedLayer:
    """A layer whose outputs have the means that they have in float32, errors of earlier layers included."""
    weight, scales = _round_weights(op.weight)
    layer = QuantizedLayer(op, weight, scales, op.bias.double(), 0.0)
    grid = grids[op.input]
    sums = run_op(_bare(op), [exact[op.input]], ())
    ours = run_op(layer.rounded, [grid.round(shifted[op.input])], ())
    axes = [0, *range(2, sums.ndim)]
    bias = op.bias.double() + (sums.double() - ours.double()).mean(axes)
    error = _int8_output(layer, exact, grids) - exact[op.output]
    size = exact[op.output].double().square().mean().sqrt()
    relative = float(error.double().square().mean().sqrt() / size.clamp(min=1e-30))
    return replace(layer, bias=bias, error=relative)


def _int8_output(layer: QuantizedLayer, values: Mapping[int, Tensor], grids: Mapping[int, Grid]) -> Tensor:
    """What the layer in int8 makes of its inputs, in float32 arithmetic; who reads it as bytes rounds it."""
    op = layer.op
    y = run_op(layer.rounded, [grids[op.input].round(values[op.input])], ())
    residual = getattr(op, "residual", None)
    if residual is not None:
        y = y + grids[residual].round(values[residual])
    return activate(y, op.activation)


def _insensitive(
    stage: StagePlan, x: Tensor, layers: Mapping[int, QuantizedLayer], grids: Mapping[int, Grid]
) -> dict[int, QuantizedLayer]:
    """The layers without the noisiest, as few of these as keep the probabilities close to float32's."""
    noisiest = sorted(layers, key=lambda value: layers[value].error, reverse=True)
    images = x[:CORRECTION_IMAGES]
    expected = _logits(stage, images, {}, grids).log_softmax(1)

    def is_close(kept: Collection[int]) -> bool:
        ours = _logits(stage, images, {v: layers[v] for v in kept}, grids).log_softmax(1)
        divergence = F.kl_div(ours, expected, reduction="batchmean", log_target=True)
        return bool(divergence <= MAX_DIVERGENCE)

    # 0, 1, 2, 4, … in float32 until it is close, then bisection.
    low, high = -1, 0
    while high < len(noisiest) and not is_close(noisiest[high:]):
        low, high = high, min(len(noisiest), max(1, 2 * high))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_close(noisiest[middle:]) else (middle, high)
    return {value: layers[value] for value in noisiest[high:]}


def _logits(
    stage: StagePlan, x: Tensor, layers: Mapping[int, QuantizedLayer], grids: Mapping[int, Grid]
) -> Tensor:
    """(n, C) float64 logits of a stage with some layers in int8, in float32 arithmetic."""
    values = {0: x}
    for op, dead in zip(stage.ops, stage.last_reads(), strict=True):
        if op.output in layers:
            values[op.output] = _int8_output(layers[op.output], values, grids)
        else:
            values[op.output] = run_op(op, [values[v] for v in op.reads], stage.shapes[op.output])
        for value in dead:
            del values[value]
    return values[stage.logits].double()


def _as_confident(
    stage: StagePlan, x: Tensor, layers: Mapping[int, QuantizedLayer], grids: Mapping[int, Grid]
) -> StagePlan:
    """The stage with its logits scaled so that int8 gives the probabilities closest to float32's.

    The cross-entropy between the two is convex in the factor; bisection on its derivative finds it. Logits
    that no linear layer writes stay as they are.
    """
    last = next((op for op in stage.ops if op.output == stage.logits), None)
    if not isinstance(last, Linear) or last.activation != "none":
        return stage
    ours = _logits(stage, x, layers, grids)
    expected = (_logits(stage, x, {}, grids).softmax(1) * ours).sum(1).mean()

    def slope(factor: float) -> float:
        return float(((factor * ours).softmax(1) * ours).sum(1).mean() - expected)

    low, high = 1 / LARGEST_FACTOR, LARGEST_FACTOR
    if not slope(low) < 0 < slope(high):
        return stage
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    factor = math.sqrt(low * high)
    scaled = replace(last, weight=last.weight * factor, bias=last.bias * factor)
    return replace(stage, ops=tuple(scaled if op is last else op for op in stage.ops))


class _Rewriter:
    """Emits the operations of a stage anew.

    A value may exist as float32, as bytes, or as both; the form that its producer does not write is made
    where it is first read.
    """

    def __init__(
        self, stage: StagePlan, layers: Mapping[int, QuantizedLayer], grids: Mapping[int, Grid]
    ) -> None:
        self.stage, self.layers, self.grids = stage, layers, grids
        self.read_as_bytes = {value for layer in layers.values() for value in layer.op.reads}
        self.pools = self._byte_pools()
        self.ops: list[Op] = []
        self.shapes: list[Shape] = [stage.shapes[0]]
        self.as_float = {0: 0}
        self.as_bytes: dict[int, int] = {}

    def run(self) -> StagePlan:
        for op in self.stage.ops:
            if op.output in self.layers:
                self._emit_layer(self.layers[op.output])
            elif op.output in self.pools:
                pooled = replace(op, input=self._bytes(op.reads[0]))  # type: ignore[call-arg]
                self.as_bytes[op.output] = self._emit(pooled, op.output)
            else:
                number = {value: self._float(value) for value in op.reads}
                self.as_float[op.output] = self._emit(op.renumbered({**number, op.output: 0}), op.output)
        features, logits = self._float(self.stage.features), self._float(self.stage.logits)
        return replace(
            self.stage, ops=tuple(self.ops), shapes=tuple(self.shapes), features=features, logits=logits
        )

    def _byte_pools(self) -> set[int]:
        """The max pools between layers: they pool bytes, which share the grid of their input."""
        pools: set[int] = set()
        for op in reversed(self.stage.ops):
            if not (isinstance(op, Pool) and op.kind == "max" and op.output in self.read_as_bytes):
                continue
            source = self.layers.get(op.input)
            if source is not None and source.op.activation in CLAMPS:
                pools.add(op.output)
                self.read_as_bytes.add(op.input)
        return pools

    def _emit(self, op: Op, value: int) -> int:
        """Append an operation that writes a form of ``value`` of the stage; returns its number."""
        number = len(self.shapes)
        self.ops.append(replace(op, output=number))
        self.shapes.append(self.stage.shapes[value])
        return number

    def _float(self, value: int) -> int:
        if value not in self.as_float:
            made = Dequantize(0, self.as_bytes[value], *self.grids[value])
            self.as_float[value] = self._emit(made, value)
        return self.as_float[value]

    def _bytes(self, value: int) -> int:
        if value not in self.as_bytes:
            made = Quantize(0, self.as_float[value], *self.grids[value])
            self.as_bytes[value] = self._emit(made, value)
        return self.as_bytes[value]

    def _emit_layer(self, layer: QuantizedLayer) -> None:
        op = layer.op
        is_clamp = op.activation in CLAMPS
        to_bytes = is_clamp and op.output in self.read_as_bytes
        grid = self.grids[op.output] if to_bytes else FLOAT
        low, high = (limit / grid.scale for limit in CLAMPS.get(op.activation, CLAMPS["none"]))
        if to_bytes:
            low, high = max(low, float(-grid.zero_point)), min(high, float(255 - grid.zero_point))
        common: dict[str, Any] = {
            "output": 0,
            "input": self._bytes(op.input),
            "weight": layer.weight,
            "multiplier": (layer.scales * self.grids[op.input].scale / grid.scale).float(),
            "bias": (layer.bias / grid.scale).float(),
            "zero_point": self.grids[op.input].zero_point,
            "low": _as_float32(low),
            "high": _as_float32(high),
            "output_zero_point": grid.zero_point if to_bytes else None,
            "error": layer.error,
        }
        made: Op
        if isinstance(op, Linear):
            made = QuantizedLinear(**common)
        else:
            if op.residual is not None:
                residual = self.grids[op.residual]
                common["residual"] = self._bytes(op.residual)
                common["residual_scale"] = _as_float32(residual.scale / grid.scale)
                common["residual_zero_point"] = residual.zero_point
            made = QuantizedConv2d(
                **common, stride=op.stride, padding=op.padding, dilation=op.dilation, groups=op.groups
            )
        number = self._emit(made, op.output)
        if not is_clamp:
            number = self._emit(Activation(0, number, op.activation), op.output)
        (self.as_bytes if to_bytes else self.as_float)[op.output] = number


def _as_float32(x: float) -> float:
    """The nearest float32, which is what kernels compute with."""
    return float(torch.tensor(x, dtype=torch.float32))
