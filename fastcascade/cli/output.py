"""What commands print: messages on standard error, and tables of a cascade's figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastcascade.text import plain, printable

if TYPE_CHECKING:
    from fastcascade.types import OperatingPoint, SelectorComparison

__all__ = ["comparison_table", "operating_points_table", "say"]


def say(kind: str, message: str) -> None:
    """Print a message to standard error."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble((kind, "bold"), " ", printable(message)))


def operating_points_table(points: Mapping[str, OperatingPoint], dense_macs: int) -> Table:
    """Operating points with the figures measured on their calibration data."""
    table = Table("operating point", "thresholds", "accuracy", "risk", "mean MACs", "of dense", "images")
    for name, point in points.items():
        table.add_row(
            plain(name),
            " ".join(f"{threshold:.3f}" for threshold in point.thresholds),
            "" if point.accuracy is None else f"{point.accuracy:.2%}",
            "" if point.risk is None else f"{point.risk:.2%}",
            f"{point.mean_macs:,.0f}",
            f"{point.mean_macs / dense_macs:.1%}",
            f"{point.n:,}",
        )
    return table


def comparison_table(comparison: SelectorComparison) -> Table:
    """Held-out accuracy of the learned selector and of threshold rules at the same cost."""
    title = (
        f"stop scores at matched cost, {comparison.n:,} images; learned − {comparison.best_rule}: "
        f"{100 * comparison.gain:+.2f} ± {100 * comparison.standard_error:.2f} points"
    )
    table = Table("score", *(f"{share:.0%} of dense" for share in comparison.budgets), title=title)
    for name, row in comparison.accuracy.items():
        table.add_row(printable(name), *(f"{accuracy:.2%}" for accuracy in row))
    return table
