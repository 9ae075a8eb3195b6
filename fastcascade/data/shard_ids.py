"""Ids of images in several files: name of the file, and index within it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import overload

__all__ = ["ShardIds"]


class ShardIds(Sequence[str]):
    """The ids "a/0", "a/1", …, "b/0", … of images without names in files with names.

    Example:
        >>> ids = ShardIds(["a", "b"], [2, 3])
        >>> len(ids), ids[1], ids[2:4]
        (5, 'a/1', ['b/0', 'b/1'])
    """

    def __init__(self, names: Sequence[str], counts: Sequence[int]) -> None:
        self.names = names
        self.starts = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        chosen = range(len(self))[index]
        return self._id(chosen) if isinstance(chosen, int) else [self._id(i) for i in chosen]

    def _id(self, position: int) -> str:
        file = bisect_right(self.starts, position) - 1
        return f"{self.names[file]}/{position - self.starts[file]}"
