from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def instruction_sets() -> list[tuple[str, str | None]]: ...
def int8_kernels() -> list[tuple[str, str | None]]: ...
def bf16_refusal(isa: str = "") -> str | None: ...
def chosen_isa(name: str = "") -> str: ...

class Cascade:
    def __init__(
        self,
        stages: list[dict[str, Any]],
        selectors: list[dict[str, Any] | None],
        classes: int,
        *,
        stage_weights: Sequence[float] = [],
        threads: int = 1,
        isa: str = "",
        kernel: str = "",
        precision: str = "fp32",
    ) -> None: ...
    def run(
        self,
        images: NDArray[Any],
        table: NDArray[np.float32] | None,
        thresholds: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]: ...
    def run_stage(
        self, stage: int, rows: NDArray[Any], table: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]: ...
    def time_steps(
        self, stage: int, rows: NDArray[Any], table: NDArray[np.float32] | None, seconds: float
    ) -> list[tuple[str, str, int, float, float]]: ...
    def describe(self) -> list[dict[str, Any]]: ...
    def memory_bytes(self) -> int: ...
