"""The interface of backends, and of the programs to which they lower plans."""

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

Precision = Literal["fp32", "fp16", "bf16", "int8"]
"""Of the stages. "int8" stands for a quantised plan, of which some stages may be in fp32. "bf16" leaves some
layers in fp32 (docs/bf16.md)."""


class ExitResults(NamedTuple):
    """The results of a batch, one row per instance in input order, on the program's device.

    Attributes:
        log_probs: (N, C) float32, combined log-probabilities at the exit; NaN if the row is invalid there.
        label: (N,) int64, −1 if invalid.
        exit_stage: (N,) int64.
    """

    log_probs: Tensor
    label: Tensor
    exit_stage: Tensor


class KernelChoice(NamedTuple):
    """An operation and the kernel that runs it: one line of a program's description.

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
        opaque_reason: why the stage runs in torch; None if it runs as operations.
        kernels: one line per operation, exit head included.
        isa: instruction set or device architecture; "torch" if torch runs the stage.
        weight_bytes: size of the stage's weights as the program stores them.
        arena_bytes: scratch memory for activations, per thread; 0 if torch allocates.
    """

    name: str
    opaque_reason: str | None
    kernels: tuple[KernelChoice, ...]
    isa: str
    weight_bytes: int
    arena_bytes: int


class Program(Protocol):
    """A lowered plan, safe to call from several threads at once."""

    @property
    def device(self) -> torch.device:
        """The device of the images that ``run`` takes and of the results that it returns."""

    def run(self, x: Tensor, thresholds: Tensor) -> ExitResults:
        """Classify a batch.

        Args:
            x: (N, C, H, W) uint8 or float32 of the plan's input shape, N ≥ 1, any strides, on ``device``, not
                requiring grad. The caller has checked all of this.
            thresholds: (K−1,) float32, contiguous, on the CPU; ±inf allowed, no NaN.
        """

    def describe(self) -> list[StageReport]:
        """One report per stage, in order."""


class StepTime(NamedTuple):
    """The work and time of one step of a stage, per image.

    Attributes:
        operation, kernel: as in :class:`KernelChoice`.
        macs: multiplies of the direct algorithm, whichever algorithm runs; 0 for data movement and
            comparisons.
        bytes_moved: bytes read and written: inputs and output once, weights divided by the images that share
            one read.
        seconds: median over passes, with all threads busy.
    """

    operation: str
    kernel: str
    macs: int
    bytes_moved: float
    seconds: float


@runtime_checkable
class TimesSteps(Protocol):
    """A program that can also time its steps one by one."""

    def time_steps(self, k: int, x: Tensor, seconds: float) -> list[StepTime]:
        """Run stage k on images ``x`` at least once and for about this long; one entry per step, in order."""


class Backend(Protocol):
    """One implementation of everything that a plan can express, or of a part of it."""

    @property
    def name(self) -> str:
        """The backend's entry in :data:`fastcascade.backends.registry.NAMES`."""

    def unavailable_reason(self) -> str | None:
        """Why the backend cannot run on this machine (no device, no compiled kernels); None if it can."""

    def unsupported_reason(
        self, plan: Plan | None, *, precision: Precision, device: torch.device
    ) -> str | None:
        """Why the backend cannot run this plan at this precision on this device; None if it can.

        Args:
            plan: None before there is one: then whether it could run any.
        """

    def lower(
        self, plan: Plan, *, precision: Precision, device: torch.device, threads: int | None
    ) -> Program:
        """Lower a plan for which both reasons are None; ``threads=None`` means torch's number of threads."""
