"""Charts as HTML and inline SVG that fit any width: positions are percentages, text keeps its size.

Colours are classes ``c0`` to ``c5`` of the page's style sheet. Every function escapes the text that it is
given and returns markup. What a chart does not label is in the title of its mark, which browsers show on
hover.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastcascade.text import printable

__all__ = ["Axis", "Plot", "Segment", "bars", "legend", "stacked_bar", "table", "text", "thumbnail"]

_WIDTHS_PX = (940, 300)
"""Width of a plot on a page of 1,280 pixels, for which labels are placed; and on a phone."""

_LABEL_PX, _CHARACTER_PX = 17, 7.5
"""Height of a line of labels, and mean width of a character in it."""

_ROWS = sorted(range(-8, 9), key=abs)
"""Lines above and below a dot where its label may be, nearest first."""

_OF_LINE_PX = 40
"""Distance of the places on a line that labels avoid."""


def text(value: str) -> str:
    """Text from outside as markup, in one line.

    Example:
        >>> text("<b>\\n")
        '&lt;b&gt;�'
    """
    return escape(printable(value).replace("\n", "�"))


##### Plots over two axes


@dataclass(frozen=True)
class Axis:
    """A range of values, linear or logarithmic.

    Attributes:
        low, high: the ends; of a logarithmic axis, positive.
        unit: appended to the numbers at the ticks.
        ticks: where numbers are; chosen if empty.
    """

    name: str
    low: float
    high: float
    log: bool = False
    unit: str = ""
    ticks: tuple[float, ...] = ()

    def percent(self, value: float) -> float:
        """Position of a value, from 0 at the low end to 100."""
        if self.log:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    def marks(self) -> list[float]:
        """Values of the ticks.

        Example:
            >>> Axis("x", 0, 9).marks(), Axis("x", 3, 600, log=True).marks()
            ([0.0, 2.0, 4.0, 6.0, 8.0], [5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0])
        """
        if self.ticks:
            return list(self.ticks)
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            steps = (1, 2, 5) if self.high / self.low < 1e3 else (1,)
            everything = [float(f"{step}e{decade}") for decade in decades for step in steps]
            return [value for value in everything if self.low <= value <= self.high]
        step = _round_step((self.high - self.low) / 6)
        first = math.ceil(self.low / step - 1e-9)
        return [float(f"{i * step:.10g}") for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, … times a power of ten that is at least this."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


class _Box(NamedTuple):
    """A rectangle in pixels from the upper left corner of a plot."""

    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        across = self.left <= other.right and other.left <= self.right
        return across and self.top <= other.bottom and other.top <= self.bottom


class _Label(NamedTuple):
    """Words beside a point, which is ``across`` percent from the left and ``down`` pixels from the top."""

    across: float
    down: float
    words: str
    left: bool
    row: int
    gap: int

    def box(self, width: int) -> _Box:
        """The place of the words in a plot of this width."""
        near = self.across / 100 * width + (-self.gap if self.left else self.gap)
        far = near + (-1 if self.left else 1) * _CHARACTER_PX * len(self.words)
        middle = self.down + self.row * _LABEL_PX
        return _Box(min(near, far), max(near, far), middle - _LABEL_PX / 2, middle + _LABEL_PX / 2)


@dataclass
class Plot:
    """Lines and dots over two axes, as one SVG element that fills its container.

    Attributes:
        height: in pixels; None for a square.
    """

    x: Axis
    y: Axis
    name: str
    height: int | None = 320
    _marks: list[str] = field(default_factory=list)
    _covered: list[_Box] = field(default_factory=list)
    _labels: list[_Label] = field(default_factory=list)

    def line(self, points: Iterable[tuple[float, float]], style: str) -> None:
        """A line through points, in the order given; ``style`` is a list of classes."""
        places = [(self.x.percent(x), 100 - self.y.percent(y)) for x, y in points]
        for (x1, y1), (x2, y2) in pairwise(places):
            ends = f'x1="{x1:.2f}%" y1="{y1:.2f}%" x2="{x2:.2f}%" y2="{y2:.2f}%"'
            self._marks.append(f'<line class="{style}" {ends}/>')
            start, end = self._pixels(x1, y1), self._pixels(x2, y2)
            along = np.linspace(start, end, 2 + int(math.dist(start, end) / _OF_LINE_PX))
            self._covered += [_Box(x, x, y, y) for x, y in along.tolist()]

    def dot(self, x: float, y: float, style: str, title: str, radius: float = 5) -> None:
        """A dot; its title appears on hover."""
        across, down = self.x.percent(x), 100 - self.y.percent(y)
        place = f'cx="{across:.2f}%" cy="{down:.2f}%" r="{radius:.1f}"'
        self._marks.append(f'<circle class="{style}" {place}><title>{text(title)}</title></circle>')
        cx, cy = self._pixels(across, down)
        self._covered.append(_Box(cx - radius, cx + radius, cy - radius, cy + radius))

    def label(self, x: float, y: float, words: str, left: bool = False, row: int = 0, gap: int = 9) -> None:
        """Words to the right of a point, or to its left, so many pixels away and lines lower.

        A thin line leads to words that are not beside their point.
        """
        side, anchor = (-1, "end") if left else (1, "start")
        across, down = self.x.percent(x), 100 - self.y.percent(y)
        at = f'x="{across:.2f}%" y="{down:.2f}%"'
        if abs(row) > 1:
            line = f'<line class="lead" x2="{side * (gap - 3)}" y2="{row * _LABEL_PX}"/>'
            self._marks.append(f"<svg {at}>{line}</svg>")
        place = f'text-anchor="{anchor}" {at} dx="{side * gap}" dy="{row * _LABEL_PX + 4}"'
        self._marks.append(f'<text class="label" {place}>{text(words)}</text>')
        self._labels.append(_Label(across, self._pixels(across, down)[1], words, left, row, gap))

    def labels(self, points: Iterable[tuple[float, float, float, str]]) -> None:
        """Words for dots (x, y, radius, words), where they cover no other words and as few marks as can be.

        Call it when all lines and dots are drawn.
        """
        for x, y, radius, words in sorted(points, key=lambda point: -point[1]):
            across, down = self.x.percent(x), 100 - self.y.percent(y)
            top = self._pixels(across, down)[1]
            places = (
                _Label(across, top, words, left, row, 9 if row else round(radius) + 5)
                for row in _ROWS
                for left in (False, True)
            )
            best = min(places, key=self._harm)
            self.label(x, y, words, best.left, best.row, best.gap)

    @property
    def _height_px(self) -> int:
        return _WIDTHS_PX[0] if self.height is None else self.height

    def _pixels(self, across: float, down: float) -> tuple[float, float]:
        """A place in percent from the upper left corner, in pixels on a wide page."""
        return across / 100 * _WIDTHS_PX[0], down / 100 * self._height_px

    def _harm(self, label: _Label) -> float:
        """How bad a place is: over other words, outside, over marks, far from its dot."""
        box = label.box(_WIDTHS_PX[0])
        words = sum(
            any(label.box(width).meets(other.box(width)) for width in _WIDTHS_PX) for other in self._labels
        )
        outside = box.left < 0 or box.right > _WIDTHS_PX[0] or box.top < 0 or box.bottom > self._height_px
        marks = sum(box.meets(mark) for mark in self._covered)
        return 1000 * (words + outside) + 2 * marks + abs(label.row) / 2

    def svg(self) -> str:
        """The plot with its axes."""
        parts = [self._horizontal(value) for value in self.y.marks()]
        parts += [self._vertical(value) for value in self.x.marks()]
        shape = "square" if self.height is None else "plot"
        height = "" if self.height is None else f' style="height:{self.height}px"'
        return (
            f'<div class="{shape}"><div class="axis y">{text(self.y.name)}</div>'
            f'<svg role="img" aria-label="{text(self.name)}"{height}>{"".join(parts + self._marks)}</svg>'
            f'<div class="axis x">{text(self.x.name)}</div></div>'
        )

    def _horizontal(self, value: float) -> str:
        y = f"{100 - self.y.percent(value):.2f}%"
        words = text(f"{value:,g}{self.y.unit}")
        return (
            f'<line class="grid" x1="0%" x2="100%" y1="{y}" y2="{y}"/>'
            f'<text class="tick" text-anchor="end" x="0%" dx="-8" y="{y}" dy="4">{words}</text>'
        )

    def _vertical(self, value: float) -> str:
        x = f"{self.x.percent(value):.2f}%"
        words = text(f"{value:,g}{self.x.unit}")
        return f'<text class="tick" text-anchor="middle" x="{x}" y="100%" dy="20">{words}</text>'


##### Bars, legends, tables


class Segment(NamedTuple):
    """A part of a bar: its share of the full width, its colour, and what hovering says."""

    share: float
    style: str
    title: str


def stacked_bar(segments: Iterable[Segment]) -> str:
    """A bar of segments from the left."""
    parts = (
        f'<i class="{style}" style="width:{100 * max(share, 0):.3f}%" title="{text(title)}"></i>'
        for share, style, title in segments
    )
    return f'<div class="bar">{"".join(parts)}</div>'


def bars(rows: Iterable[tuple[str, Sequence[Segment], str]]) -> str:
    """Horizontal bars, each with a name and a value beside it."""
    cells = (
        f'<div class="name">{text(name)}</div>{stacked_bar(segments)}<div class="value">{text(value)}</div>'
        for name, segments, value in rows
    )
    return f'<div class="bars">{"".join(cells)}</div>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Pairs of a class and what it stands for."""
    items = (f'<li><i class="{style}"></i>{text(words)}</li>' for style, words in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
        text_columns: how many columns from the left are words; the others are numbers.
    """

    def row(cells: Sequence[str], tag: str) -> str:
        opening = [f'<{tag} class="text">' if i < text_columns else f"<{tag}>" for i in range(len(cells))]
        parts = (f"{start}{text(cell)}</{tag}>" for start, cell in zip(opening, cells, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    body = (row(cells, "td") for cells in rows)
    lines = f"<thead>{row(head, 'th')}</thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="wide"><table>{lines}</table></div>'


##### Pictures


def thumbnail(image: NDArray[np.uint8], words: str, side: int = 96) -> str:
    """An image as an ``img`` element that holds its pixels, at most so many pixels high and wide.

    Args:
        image: (H, W, 3) uint8.
        words: for those who cannot see it.
    """
    step = max(1, math.ceil(max(image.shape[:2]) / side))
    height, width = (max(1, n // step) for n in image.shape[:2])
    blocks = image[: height * step, : width * step].astype(np.float32)
    if step > 1 and min(image.shape[:2]) >= step:
        blocks = blocks.reshape(height, step, width, step, 3).mean((1, 3))
    pixels = np.round(blocks).astype(np.uint8)
    data = base64.b64encode(_png(pixels)).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{text(words)}">'


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """(H, W, 3) as a PNG file (RFC 2083): 8 bits, RGB, unfiltered lines."""
    height, width, _ = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
