"""Arguments that several commands share, and the values of those that are written as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastcascade.errors import InvalidArgument

__all__ = [
    "Backend",
    "Model",
    "Overwrite",
    "Peers",
    "Point",
    "Precision",
    "Resize",
    "RowRange",
    "Sizes",
    "Source",
    "Split",
    "ThreadCounts",
    "Threads",
    "numbers",
    "row_range",
]

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="directory of a saved cascade or plan")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="an npz file, a folder of images, or cifar10:DIR, cifar100:DIR, npz:FILE, folder:DIR",
    ),
]
Split = Annotated[Literal["train", "test"] | None, typer.Option(help="which split of the data set")]
RowRange = Annotated[str | None, typer.Option("--rows", metavar="START:STOP", help="use only these images")]
Resize = Annotated[bool, typer.Option("--resize", help="scale images to the size of the model's input")]
Point = Annotated[
    str | None, typer.Option("--operating-point", "-p", help='default: the one named "default"')
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: as PyTorch")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace existing output")]
Backend = Annotated[str, typer.Option(help="auto, or a name from `fastcascade doctor`")]
Precision = Annotated[
    Literal["fp32", "fp16", "bf16", "int8"] | None,
    typer.Option(
        help="precision of the stages; fp16 is for GPUs, bf16 for CPUs with AVX512-BF16, int8 for models "
        "from `fastcascade quantize`"
    ),
]
Sizes = Annotated[str, typer.Option("--batch", metavar="N,N,…", help="batch sizes")]
ThreadCounts = Annotated[
    str, typer.Option("--threads", metavar="N,N,…", help="CPU threads; several numbers are compared")
]
Peers = Annotated[bool, typer.Option("--peers", help="also time plain PyTorch")]


def row_range(text: str, n: int) -> range:
    """``START:STOP`` as a range within n; either may be omitted, as in a slice."""
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if match is None:
        raise InvalidArgument(f"--rows is {text!r}; expected START:STOP, for example 47500:50000")
    chosen = range(int(match[1] or 0), int(match[2] or n))
    if not chosen or chosen.stop > n:
        raise InvalidArgument(f"--rows is {text!r}; expected a range within the {n} images")
    return chosen


def numbers(option: str, text: str) -> tuple[int, ...]:
    """``1,8,64`` as integers; none for an empty string."""
    if not re.fullmatch(r"(|[1-9]\d*(,[1-9]\d*)*)", text):
        raise InvalidArgument(f"{option} is {text!r}; expected numbers from 1, for example 1,8,64")
    return tuple(map(int, text.split(","))) if text else ()
