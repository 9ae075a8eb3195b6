"""The CPU backend: a plan on the compiled engine, depth-first, in fp32, bf16 or int8.

If the engine knows all stages and selectors of a plan, a batch is one call of it. If a stage is opaque, or a
selector is the user's module, the program goes stage by stage over the active rows: known stages on the
engine, the others in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcascade.backends.interface import ExitResults, KernelChoice, Precision, StageReport, StepTime
from fastcascade.backends.reference import ReferenceProgram
from fastcascade.backends.torch_module import in_best_layout
from fastcascade.errors import BackendUnavailable, FastCascadeError
from fastcascade.lowering.operations import Activation, Conv2d, Flip, Op, Shape, Slice
from fastcascade.lowering.plan import Plan, SelectorPlan, StagePlan
from fastcascade.lowering.quantized_operations import QuantizedConv2d

if TYPE_CHECKING:
    from fastcascade import _C

__all__ = ["BACKEND", "CpuProgram", "stage_spec"]


def _engine() -> type[_C.Cascade]:
    """The compiled engine, imported on first use: ``unavailable_reason`` says why that fails."""
    from fastcascade import _C

    return _C.Cascade


def _op(op: Op) -> dict[str, Any]:
    """One operation as the engine reads it: its class, its fields, its weights as arrays."""
    fields: dict[str, Any] = {n: v for n, v in vars(op).items() if n not in op.operands or n == "residual"}
    fields |= {name: value.numpy() for name, value in op.tensors.items()}
    fields["inputs"] = op.reads[:1] if isinstance(op, Conv2d | QuantizedConv2d) else op.reads
    fields["op"] = type(op).__name__
    if isinstance(op, Activation):
        fields["activation"] = fields.pop("kind")
    return fields


def stage_spec(stage: StagePlan, keeps_features: bool) -> dict[str, Any]:
    """A stage as the engine reads it; ``keeps_features`` where the next stage reads its features."""
    return {
        "name": stage.name,
        "input": stage.input,
        "keeps_features": keeps_features,
        "shape": _map_shape(stage.shapes[0]),
        "ops": [_op(_mirrored(op, stage.shapes) if isinstance(op, Flip) else op) for op in stage.ops],
        "features": stage.features,
        "logits": stage.logits,
    }


def _mirrored(op: Flip, shapes: Sequence[Shape]) -> Slice:
    """A mirror image as the engine reads it: columns from the last to the first."""
    channels, height, width = _map_shape(shapes[op.input])
    return Slice(op.output, op.input, (0, 0, width - 1), (channels, height, -1), (1, 1, -1))


def _feeds_next(plan: Plan, k: int) -> bool:
    return k + 1 < len(plan.stages) and plan.stages[k + 1].input == "previous"


def _map_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """A shape as the engine counts it: a vector is a map of one pixel."""
    channels, height, width = (*shape, 1, 1)[:3]
    return channels, height, width


def _selector(selector: SelectorPlan | None) -> dict[str, Any] | None:
    if selector is None:
        return None
    if selector.weights is None:
        return {"score": selector.kind}
    arrays = {name: value.numpy() for name, value in selector.weights._asdict().items()}
    return {**arrays, "score": selector.features, "b2": float(selector.weights.b2)}


class CpuProgram:
    """A plan on the engine, every stage of it."""

    device = torch.device("cpu")

    def __init__(
        self, plan: Plan, threads: int, isa: str = "", kernel: str = "", *, precision: Precision = "fp32"
    ) -> None:
        """Lower a plan.

        Args:
            isa: force an instruction set; "" for FASTCASCADE_ISA or the best one.
            kernel: force "conv_direct_f32" or "conv3x3_winograd_f32" where either can run, or the int8
                kernels of an instruction set, such as "int8_avx2"; "" for the measured choice.
            precision: "bf16", or another for what the plan's operations say.
        """
        self.plan = plan
        self._cascade = _engine()(
            [stage_spec(stage, _feeds_next(plan, k)) for k, stage in enumerate(plan.stages)],
            [_selector(stage.selector) for stage in plan.stages],
            plan.num_classes,
            stage_weights=[w for w in plan.stage_weights if w is not None],
            threads=threads,
            isa=isa,
            kernel=kernel,
            precision=_of_products(precision),
        )
        self._table = _table(plan)

    def run(self, x: Tensor, thresholds: Tensor) -> ExitResults:
        """Classify a batch; see :meth:`fastcascade.backends.interface.Program.run`.

        Raises:
            FastCascadeError: the batch does not fit into memory; says what to try.
        """
        try:
            results = self._cascade.run(x.numpy(), self._table, thresholds.numpy())
        except MemoryError as error:
            raise FastCascadeError(str(error)) from error
        return ExitResults(*map(torch.from_numpy, results))

    def describe(self) -> list[StageReport]:
        """One report per stage."""
        reports = self._cascade.describe()
        return [_report(stage, report) for stage, report in zip(self.plan.stages, reports, strict=True)]

    def time_steps(self, k: int, x: Tensor, seconds: float) -> list[StepTime]:
        """How long every step of stage k takes; see :class:`fastcascade.backends.interface.TimesSteps`.

        Args:
            x: (N, C, H, W) of the stage's input shape, N ≥ 1; at most a tile of them is used.

        Raises:
            FastCascadeError: the buffers of all threads do not fit into memory.
        """
        try:
            steps = self._cascade.time_steps(k, x.numpy(), self._table, seconds)
        except MemoryError as error:
            raise FastCascadeError(str(error)) from error
        return [StepTime(*step) for step in steps]

    @property
    def memory_bytes(self) -> int:
        """Buffers of one call beyond weights, all threads together."""
        return self._cascade.memory_bytes()


def _of_products(precision: Precision) -> str:
    """The precision in which the engine multiplies floats."""
    return "bf16" if precision == "bf16" else "fp32"


def _table(plan: Plan) -> NDArray[np.float32] | None:
    return None if plan.input.preprocess is None else plan.input.preprocess.table().numpy()


def _report(stage: StagePlan, report: dict[str, Any]) -> StageReport:
    head = KernelChoice(f"exit head, {stage.selector or 'last'}", "exit_row_f32")
    return StageReport(
        name=stage.name,
        opaque_reason=None,
        kernels=(*(KernelChoice(*pair) for pair in report["kernels"]), head),
        isa=report["isa"],
        weight_bytes=report["weight_bytes"],
        arena_bytes=report["arena_bytes"],
    )


class _EngineStage(nn.Module):
    """One stage on the engine with an opaque stage's call: a batch → (features, logits)."""

    def __init__(self, plan: Plan, k: int, threads: int, precision: Precision) -> None:
        super().__init__()
        self.stage = plan.stages[k]
        spec = stage_spec(self.stage, _feeds_next(plan, k))
        if self.stage.input == "previous":
            spec["input"] = "features"
        self.engine = _engine()(
            [spec], [None], plan.num_classes, threads=threads, precision=_of_products(precision)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _EngineStage:
        return self  # constant data, safe to share

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(len(x), *_map_shape(self.stage.shapes[0]))
        try:
            logits, features = self.engine.run_stage(0, rows.numpy())
        except MemoryError as error:
            raise FastCascadeError(str(error)) from error
        if features is None:
            return x, torch.from_numpy(logits)
        shape = self.stage.shapes[self.stage.features]
        return torch.from_numpy(features).reshape(len(x), *shape), torch.from_numpy(logits)


class MixedProgram(ReferenceProgram):
    """A plan with stages or selectors that only torch can run: the reference's loop over the active rows."""

    def __init__(self, plan: Plan, threads: int, precision: Precision) -> None:
        modules = [
            _EngineStage(plan, k, threads, precision)
            if stage.module is None
            else in_best_layout(stage.module, stage.shapes[0])
            for k, stage in enumerate(plan.stages)
        ]
        stages = tuple(
            replace(stage, ops=(), module=module) for stage, module in zip(plan.stages, modules, strict=True)
        )
        super().__init__(replace(plan, stages=stages), torch.device("cpu"))
        self._engines = [module if isinstance(module, _EngineStage) else None for module in modules]

    def describe(self) -> list[StageReport]:
        """One report per stage."""
        return [
            report if engine is None else _report(engine.stage, engine.engine.describe()[0])
            for report, engine in zip(super().describe(), self._engines, strict=True)
        ]


class CpuBackend:
    """Runs plans on the compiled engine."""

    name = "cpu"

    def unavailable_reason(self) -> str | None:
        """Why the engine cannot run here; None if it can."""
        try:
            from fastcascade import _C
        except ImportError as error:
            return (
                f"the compiled engine cannot be loaded ({error}); reinstall fastcascade with a C++17 compiler"
            )
        try:
            _C.chosen_isa()
        except ValueError as error:
            return f"FASTCASCADE_ISA cannot be obeyed: {error}"
        return None

    def unsupported_reason(
        self, plan: Plan | None, *, precision: Precision, device: torch.device
    ) -> str | None:
        """Why the engine cannot run this plan so; None if it can."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if precision == "bf16":
            from fastcascade import _C

            return _C.bf16_refusal()
        if precision not in ("fp32", "int8"):
            return f"it computes in fp32, bf16 and int8, not in {precision}"
        return None

    def lower(
        self, plan: Plan, *, precision: Precision, device: torch.device, threads: int | None
    ) -> CpuProgram | MixedProgram:
        """Prepare a plan for which both reasons are None."""
        threads = torch.get_num_threads() if threads is None else threads
        opaque = any(s.module or (s.selector and s.selector.module) for s in plan.stages)
        try:
            if opaque:
                return MixedProgram(plan, threads, precision)
            return CpuProgram(plan, threads, precision=precision)
        except (ValueError, MemoryError) as error:
            raise BackendUnavailable(f"backend 'cpu' refuses the plan: {error}") from error


BACKEND = CpuBackend()
