"""The properties of a GPU that the planner and the estimates of the resident kernel depend on."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["A100", "BLOCK_RESERVE", "H100", "Machine"]

BLOCK_RESERVE = 1024
"""Bytes of shared memory that CUDA reserves in every block."""


class Machine(NamedTuple):
    """One GPU.

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
