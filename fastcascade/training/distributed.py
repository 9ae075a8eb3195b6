"""Data-parallel training under torchrun: equal shares of every step, averaged gradients and statistics.

A step of W processes with A micro-batches each is the same arithmetic as one process with W·A
micro-batches: each micro-batch goes through batch norm on its own, starting from the same running
statistics; gradients and statistics are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["RunningStatistics", "average", "local_share", "process_group", "rank", "world_size"]

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; nothing happens in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_share(pieces: Sequence[T]) -> list[T]:
    """The contiguous part of ``pieces`` that is this process's."""
    share = len(pieces) // world_size()
    return list(pieces[rank() * share : (rank() + 1) * share])


def average(tensor: Tensor) -> Tensor:
    """Mean over processes, in place; ``tensor`` itself when alone."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


class RunningStatistics:
    """Batch-norm statistics of one step: every micro-batch starts from the same, the results are averaged.

    Args:
        modules: searched for batch norms; only those in training mode update.
        pieces: micro-batches in this process.
    """

    def __init__(self, modules: Iterable[nn.Module], pieces: int) -> None:
        norms = [
            m
            for module in modules
            for m in module.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats
        ]
        self.pieces = pieces
        self.shared = pieces * world_size() > 1
        self.counts = [n.num_batches_tracked for n in norms if n.num_batches_tracked is not None]
        self.buffers = [b for n in norms for b in (n.running_mean, n.running_var) if b is not None]
        self.start = [b.clone() for b in self.buffers] if self.shared else []
        self.total = [torch.zeros_like(b) for b in self.buffers] if self.shared else []

    def end_micro_batch(self) -> None:
        """Add up what this micro-batch made of the statistics, and go back to the start."""
        if self.shared:
            for buffer, start, total in zip(self.buffers, self.start, self.total, strict=True):
                total += buffer
                buffer.copy_(start)

    def end_step(self) -> None:
        """Set the statistics to the mean over all micro-batches of all processes."""
        if not self.shared:
            return
        for count in self.counts:
            count -= self.pieces - 1  # one step, however many micro-batches
        for buffer, total in zip(self.buffers, self.total, strict=True):
            buffer.copy_(average(total / self.pieces))
