"""Text from outside, such as class, stage and file names, made safe for a terminal and for a picture."""

from __future__ import annotations

import re

from rich.text import Text

__all__ = ["plain", "plot_label", "printable"]

_UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but the line feed, changes of writing direction, and bytes that are not UTF-8."""


def printable(text: str) -> str:
    """Text of several lines without terminal escapes and other control characters.

    Example:
        >>> printable("cat\\x1b[2J.png")
        'cat�[2J.png'
    """
    return _UNSAFE.sub("�", text)


def plain(name: str) -> Text:
    """A name in one line for rich's consoles and tables, which do not parse it as markup.

    Example:
        >>> str(plain("[red]fast\\n"))
        '[red]fast�'
    """
    return Text(_one_line(name))


def plot_label(name: str) -> str:
    """A name in one line for matplotlib, which reads it neither as a formula nor as a hidden label.

    Example:
        >>> print(plot_label("$1"))
        \\$1
    """
    label = _one_line(name).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _one_line(name: str) -> str:
    return printable(name).replace("\n", "�")
