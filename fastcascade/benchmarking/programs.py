"""The programs that a benchmark times: the cascade, each stage alone and with its exit, other precisions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast, get_args

import torch
from torch import Tensor

from fastcascade.backends.interface import Precision, TimesSteps
from fastcascade.benchmarking.parts import stage_alone, stage_with_exit
from fastcascade.benchmarking.turns import StepTurns, Timed, Turns, fastest
from fastcascade.engine import CompiledCascade
from fastcascade.errors import BackendUnavailable
from fastcascade.model.cascade import Cascade
from fastcascade.model.cost import eval_mode
from fastcascade.types import CascadeOutput, InputSpec, OperatingPointLike

__all__ = ["Programs"]


class Programs:
    """A compiled cascade and its parts on the same engine, each with its turns.

    Args:
        program: the whole cascade.
        images: on the program's device.
        sizes: batch sizes, ascending.
        build: compiles a plan as ``program`` was compiled; ``wanted`` is another precision.

    Attributes:
        exits: (N,) where each image stops.
        alone: each stage alone, at its best batch size, on the images that reach it.
        with_exit: each stage but the last with its exit head and selector, at the same batch size.
        steps: stages whose single steps the engine can time, by stage number.
        cascade: the whole cascade, by batch size.
        dense: the last exit's answer for every image, by batch size.
        other_precisions: ``alone`` in every other precision that the backend has.
    """

    def __init__(
        self,
        program: CompiledCascade,
        images: Tensor,
        operating_point: OperatingPointLike,
        sizes: list[int],
        build: Callable[..., CompiledCascade],
    ) -> None:
        self.program, self.images, self.sizes, self.build = program, images, sizes, build
        self.plan = plan = program.plan
        self.thresholds = program.thresholds(operating_point)
        self.exits = self.exits_of(program, self.thresholds)

        stages = range(len(plan.stages))
        rows = [self._rows(k, stage_alone(plan, k).input) for k in stages]
        self.alone = [
            fastest([Turns(part, rows[k], size) for size in sizes]) for k, part in enumerate(self._alone())
        ]
        always = torch.tensor([-math.inf])
        self.with_exit = [
            Turns(build(stage_with_exit(plan, k)), rows[k], self.alone[k].size, always) for k in stages[:-1]
        ]
        self.steps = {k: steps for k, alone in enumerate(self.alone) if (steps := _steps_of(alone))}
        self.cascade = {size: self.turns_of(program, size) for size in sizes}
        self.dense = {size: self._dense(self.alone[-1].call, size) for size in sizes}
        self.other_precisions = {
            other: [Turns(p, rows[k], self.alone[k].size) for k, p in enumerate(self._alone(wanted=other))]
            for other in get_args(Precision)
            # From and to int8 leads quantisation, not another compilation.
            if "int8" not in (other, program.precision)
            and other != program.precision
            and self._can_run(other)
        }

    def turns(self) -> list[Timed]:
        """Everything of this engine that is timed."""
        others = [turns for stages in self.other_precisions.values() for turns in stages]
        whole = [*self.cascade.values(), *self.dense.values(), *self.alone, *self.with_exit, *others]
        return [*whole, *self.steps.values()]

    def turns_of(self, program: CompiledCascade, size: int) -> Turns:
        """A program of the whole cascade on all images."""
        return Turns(program, self.images, size, self.thresholds)

    def plain_torch(self, cascade: Cascade) -> dict[str, dict[int, Turns]]:
        """The cascade's own forward, and its last exit on every image, by batch size."""
        never = torch.full((len(self.plan.stages) - 1,), math.inf)
        number = len(cascade.stages) - 1
        last = cascade.stage(number)

        @torch.inference_mode()
        def dense(x: Tensor) -> object:
            if last.input == "previous":
                return cascade(x, never)
            with eval_mode(last):
                return last(cascade.stage_images(number, cascade.images(x)))[1].softmax(1)

        return {
            "PyTorch, the cascade": {s: Turns(cascade, self.images, s, self.thresholds) for s in self.sizes},
            "PyTorch, last exit on everything": {s: Turns(dense, self.images, s) for s in self.sizes},
        }

    def exits_of(self, program: CompiledCascade, thresholds: Tensor) -> Tensor:
        """(N,) where each image stops in a program."""
        parts = self.images.split(self.sizes[-1])
        return torch.cat([cast(CascadeOutput, program(part, thresholds)).exit_stage.cpu() for part in parts])

    def _alone(self, **other: Precision) -> list[CompiledCascade]:
        return [self.build(stage_alone(self.plan, k), **other) for k in range(len(self.plan.stages))]

    def _can_run(self, precision: Precision) -> bool:
        try:
            self.build(self.plan, wanted=precision)
        except BackendUnavailable:
            return False
        return True

    def _dense(self, last: Callable[..., Any], size: int) -> Turns:
        """The last network alone, or a backbone that never stops early."""
        if self.plan.stages[-1].input == "image":
            return Turns(last, self.images, size)
        never = torch.full((len(self.plan.stages) - 1,), math.inf)
        return Turns(self.program, self.images, size, never)

    def _rows(self, k: int, spec: InputSpec) -> Tensor:
        """Stage k's input: the images that reach it, repeated to fill a batch, or noise for features."""
        reached = (self.exits >= k).nonzero()[:, 0]
        count = max(len(reached), self.sizes[-1])
        if self.plan.stages[k].input == "previous":
            generator = torch.Generator().manual_seed(k)
            return torch.randn(count, *spec.shape, generator=generator).relu().to(self.images.device)
        chosen = reached if len(reached) else torch.arange(len(self.images))
        return self.images[chosen.repeat(math.ceil(count / len(chosen)))[:count].to(self.images.device)]


def _steps_of(alone: Turns) -> StepTurns | None:
    """The steps of a stage alone; None where its program cannot time them."""
    program = cast(CompiledCascade, alone.call).program
    return StepTurns(program, alone.rows[: alone.size]) if isinstance(program, TimesSteps) else None
