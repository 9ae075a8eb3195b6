"""What a backend and its programs look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastcascade.lowering.plan import Plan

__all__ = [
    "Backend",
    "ExitResults",
    "KernelChoice",
    "Precision",
    "Program",
    "StageReport",
    "StepTime",
    "TimesSteps",
]

Precision = Literal["fp32", "fp16"]


class ExitResults(NamedTuple):
    """What a program writes, one row per instance in input order, on the program's device.

    Attributes:
        log_probs: (N, C) float32, combined log-probabilities at the exit; NaN rows where invalid there.
        label: (N,) int64, −1 where invalid.
        exit_stage: (N,) int64.
    """

    log_probs: Tensor
    label: Tensor
    exit_stage: Tensor


class KernelChoice(NamedTuple):
    """One line of a program's description: an operation and the kernel that runs it.

    Example:
        >>> KernelChoice("conv 3×3 16→16 on 32×32 + relu", "conv3x3_winograd_f32")._fields
        ('operation', 'kernel')
    """

    operation: str
    kernel: str


@dataclass(frozen=True)
class StageReport:
    """How a program runs one stage.

    Attributes:
        opaque_reason: why the stage runs through torch; None where it runs as operations.
        kernels: one line per operation, the exit head included.
        isa: instruction set or device architecture, "torch" where torch does the work.
        weight_bytes: constant data of the stage as the program holds it.
        arena_bytes: scratch memory for activations, per thread; 0 where the allocator is torch's.
    """

    name: str
    opaque_reason: str | None
    kernels: tuple[KernelChoice, ...]
    isa: str
    weight_bytes: int
    arena_bytes: int


class Program(Protocol):
    """A lowered plan. Safe to call from several threads at once."""

    @property
    def device(self) -> torch.device:
        """Where ``run`` expects images and leaves results."""

    def run(self, x: Tensor, thresholds: Tensor) -> ExitResults:
        """Classify a batch.

        Args:
            x: (N, C, H, W) uint8 or float32 of the plan's input shape, N ≥ 1, any strides, on ``device``,
                not requiring grad: the caller has checked all that.
            thresholds: (K−1,) float32, contiguous, on the CPU, ±inf allowed, no NaN.
        """

    def describe(self) -> list[StageReport]:
        """One report per stage, in order."""


class StepTime(NamedTuple):
    """What one step of a stage does for one image.

    Attributes:
        operation, kernel: as in :class:`KernelChoice`.
        macs: multiplies of the plain definition, whatever algorithm computes it; 0 where it only moves or
            compares.
        bytes_moved: read and written as stored: inputs and output once, weights divided by the images that
            share one reading of them.
        seconds: with all threads at work; the median over passes.
    """

    operation: str
    kernel: str
    macs: int
    bytes_moved: float
    seconds: float


@runtime_checkable
class TimesSteps(Protocol):
    """A program that can also time its steps one by one, through an entry that ``run`` does not use."""

    def time_steps(self, k: int, x: Tensor, seconds: float) -> list[StepTime]:
        """Run stage k on images ``x`` for about this long, at least once; one entry per step, in order."""


class Backend(Protocol):
    """A way to run plans."""

    @property
    def name(self) -> str:
        """The backend's entry in :data:`NAMES`."""

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run here at all (no device, no compiled kernels); None if it can."""

    def unsupported_reason(self, plan: Plan, *, precision: Precision, device: torch.device) -> str | None:
        """Why this backend, though available, cannot run this plan so; None if it can."""

    def lower(
        self, plan: Plan, *, precision: Precision, device: torch.device, threads: int | None
    ) -> Program:
        """Lower a plan for which both reasons are None; ``threads`` None means torch's own number."""
