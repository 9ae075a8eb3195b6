"""Measure direct convolution against Winograd and write the table that decides, csrc/kernel_choice.inl.

    python tools/choose_kernels.py        with fastcascade installed, on a quiet machine; takes minutes

A 3×3 convolution with stride 1 can run as either. Which is faster depends on the instruction set, on how
many channels go in and out, and on how many of its 4×4 output tiles hang over the edge of the map. The
choice is frozen in a file, so that a result's bits never depend on the clock; instruction sets that this
machine lacks keep their rows.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from fastcascade import _C
from fastcascade.backends.cpu import CpuProgram
from fastcascade.lowering.operations import Conv2d, Flatten, Linear, Pool
from fastcascade.lowering.plan import Plan, StagePlan
from fastcascade.types import InputSpec

TARGET = Path(__file__).resolve().parent.parent / "csrc" / "kernel_choice.inl"
CHANNELS = (8, 16, 32, 64, 128, 256)
SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 16, 28, 32)
KERNELS = ("conv_direct_f32", "conv3x3_winograd_f32")
BATCH, BATCH_MACS = 8, 5e7  # as many images as make so much work, at most 8
SECONDS = 0.02

HEAD = """\
// Written by tools/choose_kernels.py from measurements; run it again instead of editing.
//
// One row per instruction set and input channels, one group of letters per output channels, one letter per
// side of the output map: D where the direct kernel was faster, W where Winograd was.
"""


def one_convolution(channels_in: int, channels_out: int, side: int) -> Plan:
    """A network of one 3×3 convolution with ReLU, a global pooling and a classifier of two classes."""
    weight, zeros = torch.randn(channels_out, channels_in, 3, 3), torch.zeros(channels_out)
    ops = (
        Conv2d(output=1, input=0, weight=weight, bias=zeros, padding=(1, 1, 1, 1), activation="relu"),
        Pool(output=2, input=1, kind="average", kernel=(side, side), stride=(1, 1)),
        Flatten(output=3, input=2),
        Linear(output=4, input=3, weight=torch.randn(2, channels_out), bias=torch.zeros(2)),
    )
    image, maps = (channels_in, side, side), (channels_out, side, side)
    shapes = (image, maps, (channels_out, 1, 1), (channels_out,), (2,))
    stage = StagePlan("one", "image", 1, 0, None, shapes, ops, features=0, logits=4)
    return Plan((stage,), InputSpec(image), 2, "last", 1, None)


def seconds(program: CpuProgram, images: Tensor) -> float:
    """The fastest of many runs, one thread."""
    thresholds = torch.empty(0)
    program.run(images, thresholds)
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        program.run(images, thresholds)
        best = min(best, time.perf_counter() - start)
    return best


def letter(isa: str, channels_in: int, channels_out: int, side: int) -> str:
    """W where Winograd is the faster one, D where it is not."""
    plan = one_convolution(channels_in, channels_out, side)
    batch = round(min(BATCH, max(1, BATCH_MACS / (9 * channels_in * channels_out * side**2))))
    images = torch.randn(batch, channels_in, side, side)
    direct, winograd = (seconds(CpuProgram(plan, 1, isa, kernel), images) for kernel in KERNELS)
    return "W" if winograd < direct else "D"


def measured_rows() -> Iterator[tuple[str, str]]:
    """("isa in_channels", its letters) for every instruction set that runs here."""
    here = [name for name, missing in _C.instruction_sets() if missing is None]
    pairs = [(isa, channels) for isa in here for channels in CHANNELS]
    for isa, channels_in in track(pairs, "measuring"):
        groups = ["".join(letter(isa, channels_in, out, side) for side in SIDES) for out in CHANNELS]
        yield f'"{isa}", {channels_in}', " ".join(groups)


def rows_of(text: str) -> dict[str, str]:
    """The rows that a written table holds."""
    return dict(re.findall(r'\{("\w+", \d+), "([DW ]+)"\}', text))


def table(rows: dict[str, str]) -> str:
    """The whole file."""
    lists = {"kChannels": CHANNELS, "kSides": SIDES}
    constants = [f"constexpr int {name}[] = {{{', '.join(map(str, v))}}};" for name, v in lists.items()]
    body = [f'    {{{key}, "{letters}"}},' for key, letters in rows.items()]
    struct = ["", "struct Row {", "  const char* isa;", "  int in_channels;", "  const char* faster;", "};"]
    return HEAD + "\n".join([*constants, *struct, "constexpr Row kRows[] = {", *body, "};"]) + "\n"


def main() -> None:
    """Measure and write."""
    torch.set_grad_enabled(False)
    rows = rows_of(TARGET.read_text())
    rows.update(measured_rows())
    TARGET.write_text(table(rows))
    print(f"wrote {TARGET.name}")


if __name__ == "__main__":
    main()
