"""The planner of the resident kernel: offsets in shared memory, warps, blocks, and groups of images.

A stage that reads its weights for few pixels runs its last steps on a group of images at once
(:class:`Group`). Candidates are compared by :mod:`fastcascade.kernels.cuda.resident_estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastcascade.kernels.cuda.machine import BLOCK_RESERVE, Machine
from fastcascade.kernels.cuda.resident_estimate import StageEstimate, estimate_stage
from fastcascade.kernels.cuda.resident_steps import GROUP_SUMS, DoesNotFit, Map, Step

__all__ = [
    "MOST_IMAGES",
    "MOST_WARPS",
    "SINGLE",
    "Entry",
    "Group",
    "ResidentPlan",
    "plan_resident",
]

MOST_WARPS, MOST_IMAGES = 8, 4
"""kMostWarps and kMostImages in ``resident_table.cuh``."""

CONTROL_BYTES, LIST_BYTES = 32, 32
"""Bytes at the start of shared memory: the control words, and the list of waiting images of each stage."""

MOST_TYPES = 64
"""Most layer types in one kernel. Compiling each takes about half a second."""

SHAPES = ((4, 3), (4, 2), (8, 1))
"""Warps of a block and blocks of a multiprocessor, as far as shared memory permits. Three blocks leave a
thread 168 registers, 256 threads leave it 255."""

CLEAR_BORDER, RESIDUAL_FIRST, RESIDUAL_LAST, AVERAGE, COUNT_PADDING, MIRROR = 1, 2, 4, 8, 16, 32
"""LayerFlags in ``resident_table.cuh``."""


class Group(NamedTuple):
    """How a stage runs on several images: steps from ``deep`` on run on ``images`` of them at once."""

    images: int = 1
    deep: int = 0


SINGLE = Group()


@dataclass
class Buffer:
    """Memory of one value, or of several in turn, in use from step ``begin`` to step ``end``."""

    size: int
    begin: int
    end: int
    place: int = 0
    map: Map | None = None
    images: int = 1


@dataclass(frozen=True)
class Entry:
    """A step with its byte offsets in shared memory and its flags.

    ``source_step``, ``output_step`` and ``residual_step`` are the bytes from the map of one image of a group
    to that of the next; 0 if the images take turns in one map.
    """

    step: Step
    stage: int
    source: int
    output: int
    residual: int
    source_step: int
    output_step: int
    residual_step: int
    flags: int


@dataclass(frozen=True)
class ResidentPlan:
    """Stages laid out for the resident kernel.

    Attributes:
        entries: in order; the last entry of each stage is its head.
        groups: of each stage.
        warps: per block.
        blocks: per multiprocessor.
        shared_bytes: per block.
    """

    entries: tuple[Entry, ...]
    groups: tuple[Group, ...]
    warps: int
    blocks: int
    shared_bytes: int
    classes: int
    machine: Machine
    names: tuple[str, ...] = ()

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.warps * 32

    def stage(self, k: int) -> list[Entry]:
        """The entries of one stage."""
        return [entry for entry in self.entries if entry.stage == k]

    def estimate(self, k: int) -> StageEstimate:
        """The estimate of one stage, alone."""
        return estimate_stage([e.step for e in self.stage(k)], self.warps, self.blocks, self.machine)

    def seconds(self) -> float:
        """Estimated seconds of the GPU for an image that goes through all stages."""
        return sum(1 / self.estimate(k).rate for k in range(len(self.groups)))

    def type_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The types of layers and of heads, in the order of their first use."""
        layers: dict[str, None] = {}
        heads: dict[str, None] = {}
        for step in (entry.step for entry in self.entries):
            if step.kind == "head":
                heads[step.type_name(self.warps)] = None
            else:
                layers |= dict.fromkeys(step.type_name(self.warps, n) for n in (1, step.images))
        return tuple(layers), tuple(heads)


def plan_resident(
    stages: Sequence[Sequence[Step]],
    kept: Sequence[int | None],
    previous: Sequence[bool],
    classes: int,
    machine: Machine,
    names: Sequence[str] = (),
) -> ResidentPlan:
    """Assign shared memory, and choose the numbers of warps and blocks, and the groups of images.

    Args:
        stages: the steps of each, from :func:`~fastcascade.kernels.cuda.resident_steps.stage_steps`.
        kept, previous: as in :class:`~fastcascade.kernels.cuda.resident_steps.StageLayers`.

    Raises:
        DoesNotFit: there is too little shared memory, or there are too many types of layers.
    """
    if machine.capability < (8, 0):
        raise DoesNotFit("ldmatrix and mma of this shape need sm_80")
    shapes = _Shapes(stages, kept, previous, classes, machine)
    best, seconds = None, math.inf
    for warps, blocks in SHAPES:
        if shapes.least_seconds(warps, blocks) >= seconds:
            continue
        plan = shapes.plan(warps, blocks)
        if plan is not None and plan.seconds() < seconds:
            best, seconds = plan, plan.seconds()
    if best is None:
        size = _Layout(stages, kept, previous, (SINGLE,) * len(stages), classes, MOST_WARPS).size
        raise DoesNotFit(
            f"an image's activations take {size >> 10} KiB of shared memory; "
            f"a block of this GPU has at most {machine.shared_block >> 10}"
        )
    types = sum(map(len, best.type_names()))
    if types > MOST_TYPES:
        raise DoesNotFit(f"it has {types} different layers; the limit is {MOST_TYPES}")
    return replace(best, names=tuple(names))


class _Shapes:
    """The plans for some stages with a given number of warps and blocks."""

    def __init__(
        self,
        stages: Sequence[Sequence[Step]],
        kept: Sequence[int | None],
        previous: Sequence[bool],
        classes: int,
        machine: Machine,
    ) -> None:
        self.stages, self.kept, self.previous = stages, kept, previous
        self.classes, self.machine = classes, machine

    def plan(self, warps: int, blocks: int) -> ResidentPlan | None:
        """The best groups; None if the activations of one image do not fit."""
        machine = self.machine
        limit = min(machine.shared_block, machine.shared_multiprocessor // blocks - BLOCK_RESERVE)
        groups = [SINGLE] * len(self.stages)
        if self._layout(groups, warps).size > limit:
            return None
        if warps * blocks <= MOST_WARPS:
            groups = [self._group(k, warps, blocks, limit) for k in range(len(self.stages))]
        layout = self._layout(groups, warps)
        return ResidentPlan(
            tuple(layout.entries), tuple(groups), warps, blocks, layout.size, self.classes, machine
        )

    def least_seconds(self, warps: int, blocks: int) -> float:
        """A bound on :meth:`ResidentPlan.seconds`, as if shared memory had no end."""
        images = MOST_IMAGES if warps * blocks <= MOST_WARPS else 1
        every = [grouped(steps, Group(images, 1)) for steps in self.stages]
        return sum(1 / estimate_stage(steps, warps, blocks, self.machine).rate for steps in every)

    def _layout(self, groups: Sequence[Group], warps: int) -> _Layout:
        return _Layout(self.stages, self.kept, self.previous, groups, self.classes, warps)

    def _group(self, k: int, warps: int, blocks: int, limit: int) -> Group:
        """The group of stage k that is estimated fastest; one image if it shares features with another."""
        if self.previous[k] or self.kept[k] is not None:
            return SINGLE

        def rate(group: Group) -> float:
            return estimate_stage(grouped(self.stages[k], group), warps, blocks, self.machine).rate

        def fits(group: Group) -> bool:
            groups = [SINGLE] * len(self.stages)
            groups[k] = group
            return self._layout(groups, warps).size <= limit

        found = [SINGLE]
        for images in range(2, MOST_IMAGES + 1):
            for group in _splits(self.stages[k], images):
                if rate(group) <= max(map(rate, found)):
                    break  # later splits share even fewer weights
                if fits(group):
                    found.append(group)
                    break
        return max(found, key=rate)


def _splits(steps: Sequence[Step], images: int) -> list[Group]:
    """Groups of a size, those that share the most weights first."""
    found = []
    for deep in range(1, len(steps) - 1):
        rest = steps[deep:-1]
        convs = [step for step in rest if step.kind == "conv"]
        shared = all(step.kind in ("conv", "pool") for step in rest)
        if shared and convs and max(step.tiles for step in convs) * images <= GROUP_SUMS:
            found.append(Group(images, deep))
    return found


def grouped(steps: Sequence[Step], group: Group) -> list[Step]:
    """The steps of a stage, with those that run on a group marked."""
    last = len(steps) - 1
    return [
        replace(step, images=group.images) if group.images > 1 and group.deep <= i < last else step
        for i, step in enumerate(steps)
    ]


# ---- shared memory ----

Value = tuple[int, int]
"""A value of a stage: the stage, and the number of the value in it."""


class _Layout:
    """Places of all values in shared memory.

    Attributes:
        entries: one for each step.
        size: bytes of shared memory.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Step]],
        kept: Sequence[int | None],
        previous: Sequence[bool],
        groups: Sequence[Group],
        classes: int,
        warps: int,
    ) -> None:
        self.kept, self.previous, self.groups = kept, previous, groups
        self.control = CONTROL_BYTES + LIST_BYTES * len(stages)
        self.flat = [
            (k, step)
            for k, (steps, group) in enumerate(zip(stages, groups, strict=True))
            for step in grouped(steps, group)
        ]
        self.begins = [[k for k, _ in self.flat].index(stage) for stage in range(len(stages))]
        self.owner: dict[Value, Buffer] = {}
        self.scratch: dict[int, Buffer] = {}  # of heads, by step
        self._read()
        self._own(classes, warps)
        buffers = [*self.owner.values(), *self.scratch.values()]
        _place(list({id(buffer): buffer for buffer in buffers}.values()), self.control)
        self.size = max(buffer.place + buffer.size for buffer in buffers)
        self.entries = self._entries()

    def _key(self, stage: int, value: int) -> Value:
        """A value of a stage. Value 0 of a stage that reads the previous one is what that one kept."""
        while value == 0 and self.previous[stage]:
            stage, value = stage - 1, self.kept[stage - 1] or 0
        return stage, value

    def _read(self) -> None:
        """Find each value's last reader, the bytes that its readers need, and who has a map per image."""
        self.last_read: dict[Value, int] = {}
        self.needed: dict[Value, int] = {}
        self.per_image: set[Value] = set()
        for i, (k, step) in enumerate(self.flat):
            if step.kind == "image":
                continue
            source = self._key(k, step.source)
            self.needed[source] = max(self.needed.get(source, 0), step.source_bytes())
            for value in step.reads:
                self.last_read[self._key(k, value)] = i
            if self.groups[k].images > 1 and (step.images > 1 or step.kind == "head"):
                self.per_image |= {self._key(k, value) for value in (*step.reads, step.output)}

    def _own(self, classes: int, warps: int) -> None:
        """Give every value a buffer. A convolution may take over that of its residual."""
        for i, (k, step) in enumerate(self.flat):
            if step.kind == "head":
                self.scratch[i] = Buffer((step.into.channels + (warps + 1) * classes) * 4, i, i)
                continue
            own = self._key(k, step.output)
            end = self.last_read.get(own, i)
            images = self.groups[k].images if own in self.per_image else 1
            size = (images - 1) * step.out.size + max(step.out.size, self.needed.get(own, 0))
            if step.residual is not None and step.residual.view is None and not step.pooled:
                other = self._key(k, step.residual.value)
                dies = self.last_read[other] == i and other != self._key(k, step.source)
                held = self.owner[other]
                if dies and (held.map, held.images) == (step.out, images):
                    # every thread adds to what it then writes over
                    held.end, held.size = end, max(held.size, size)
                    self.owner[own] = held
                    continue
            # The first steps of a group run once per image, and keep what the deep ones read.
            begin = self.begins[k] if images > 1 and step.images == 1 else i
            self.owner[own] = Buffer(size, begin, end, map=step.out, images=images)

    def _entries(self) -> list[Entry]:
        clean = _CleanBorders()
        any_order = any(group.images > 1 for group in self.groups)
        entries = []
        for i, (k, step) in enumerate(self.flat):
            head = step.kind == "head"
            held = self.scratch[i] if head else self.owner[self._key(k, step.output)]
            if any_order:  # stages run in any order, and the first steps of a group several times
                clean = _CleanBorders()
            flags = CLEAR_BORDER if clean.needs(held) else 0
            residual = None
            if step.residual is not None:
                residual = self.owner[self._key(k, step.residual.value)]
                flags |= RESIDUAL_LAST if step.residual.last else RESIDUAL_FIRST
            if step.kind == "pool":
                assert step.window is not None
                flags |= AVERAGE * (step.window.kind == "average")
                flags |= COUNT_PADDING * step.window.include_padding
            source = None if step.kind == "image" else self.owner[self._key(k, step.source)]
            flags |= MIRROR * step.mirror
            offsets = {
                "source": 0 if source is None else source.place,
                "output": held.place,
                "residual": 0 if residual is None else residual.place,
                "source_step": _image_step(source),
                "output_step": _image_step(held),
                "residual_step": _image_step(residual),
            }
            entries.append(Entry(step, k, **offsets, flags=flags))
        return entries


def _image_step(buffer: Buffer | None) -> int:
    """Bytes from the map of one image to that of the next."""
    return 0 if buffer is None or buffer.map is None or buffer.images == 1 else buffer.map.size


class _CleanBorders:
    """Which maps have a border of zeros, as steps write one after the other."""

    def __init__(self) -> None:
        self.maps: dict[int, tuple[Map, int]] = {}  # place → the map there, and its size

    def needs(self, held: Buffer) -> bool:
        """Whether a map in this buffer needs its border cleared; it is clean afterwards."""
        if held.map is not None and self.maps.get(held.place) == (held.map, held.size):
            return False
        end = held.place + held.size
        self.maps = {
            place: (own, size)
            for place, (own, size) in self.maps.items()
            if place >= end or held.place >= place + size
        }
        if held.map is None:
            return False
        self.maps[held.place] = held.map, held.size
        return True


def _place(buffers: Sequence[Buffer], first: int) -> None:
    """Place the largest first, each at the lowest offset from ``first`` on that is free while it lives."""
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: -b.size):
        buffer.place = first
        beside = (b for b in placed if b.begin <= buffer.end and buffer.begin <= b.end)
        for other in sorted(beside, key=lambda b: b.place):
            if other.place < buffer.place + buffer.size and buffer.place < other.place + other.size:
                buffer.place = -(-(other.place + other.size) // 16) * 16
        placed.append(buffer)
