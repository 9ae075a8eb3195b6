"""The cost–accuracy curve: a cascade, its single stages and the confidence-threshold cascades on one picture.

All curves get the same joint threshold search on the selection data, so the baseline is as strong as it can
be, and all are reported on other data. Costs are accumulated: an answer at exit k has paid for every stage
and selector before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from fastcascade.data.batches import Data
from fastcascade.errors import InvalidArgument
from fastcascade.evaluation.calibration import find_thresholds
from fastcascade.evaluation.evaluation import Trace, traces
from fastcascade.model.cascade import Cascade
from fastcascade.model.selector import ScoreKind
from fastcascade.storage.files import write_atomically
from fastcascade.text import plot_label
from fastcascade.types import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Curves",
    "PairedInterval",
    "check_picture",
    "cost_accuracy_curve",
    "cost_accuracy_curves",
    "paired_interval",
    "plot_curves",
]

# Okabe and Ito's colours, which stay apart under the common kinds of colour blindness; lines and markers
# differ in shape as well.
_STYLES = (("#0072B2", "-"), ("#E69F00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))
_INK = "#333333"


@dataclass(frozen=True)
class Curves:
    """What :func:`plot_curves` draws.

    Attributes:
        cascades: name → evaluations in order of cost.
        single_stages: (MACs, accuracy) of every stage used alone.
        points: operating point name → its evaluation.
        references: name → (MACs, accuracy) of something published; without an accuracy, a budget.
    """

    cascades: dict[str, list[Evaluation]]
    single_stages: list[tuple[int, float]]
    points: dict[str, Evaluation]
    references: dict[str, tuple[float, float | None]] = field(default_factory=dict)


def cost_accuracy_curve(selection: Trace, report: Trace | None = None, steps: int = 24) -> list[Evaluation]:
    """The most accurate thresholds for a row of budgets.

    Args:
        selection: labelled; thresholds are found here.
        report: labelled; thresholds are evaluated here. None evaluates where they were found, which flatters.
        steps: number of budgets, evenly spaced in log MACs from stopping at once to never stopping.

    Returns:
        evaluations in order of cost, at most ``steps``; budgets that lead to the same thresholds give one.

    Raises:
        DataError: a trace without labels.

    Example:
        >>> labels = np.array([[0, 1, 1, 0], [0, 0, 0, 0]])
        >>> scores = np.array([[4.0, 1.0, 2.0, 3.0]], np.float32)
        >>> costs = np.array([10, 30])
        >>> seen = Trace(labels, labels, scores, costs, costs, np.zeros(4, np.int64))
        >>> [(e.mean_macs, e.accuracy) for e in cost_accuracy_curve(seen, steps=3)]
        [(10.0, 0.5), (15.0, 0.75), (20.0, 1.0)]
    """
    cheapest = selection.run([-math.inf] * (selection.num_exits - 1)).mean_macs
    budgets = np.geomspace(cheapest, max(cheapest, float(selection.exit_macs[-1])), steps)
    # Rounding must not push the first budget below the cheapest answer.
    found = dict.fromkeys(find_thresholds(selection, budget_macs=float(b) * (1 + 1e-9)) for b in budgets)
    evaluations = [(report or selection).run(thresholds) for thresholds in found]
    return sorted(evaluations, key=lambda e: e.mean_macs)


def cost_accuracy_curves(
    cascade: Cascade, report: Data, selection: Data | None = None, steps: int = 24
) -> Curves:
    """The cascade's curve, its stored operating points, its single stages, and three confidence cascades.

    The confidence cascades answer with the same stages, combined in the same way, and stop where maximum
    probability, margin or entropy is confident enough; their selector costs nothing.

    Args:
        report: labelled data that all figures are for.
        selection: labelled data on which thresholds are found; None finds them on ``report``, which flatters
            all curves alike.
        steps: points per curve.

    Raises:
        DataError: data without labels, or empty.
    """
    ways: dict[str, ScoreKind | None] = {"cascade": None}
    if cascade.selector is not None:
        ways |= {f"confidence: {kind.replace('_', ' ')}": kind for kind in get_args(ScoreKind)}
    reported = traces(cascade, report, list(ways.values()))
    selected = reported if selection is None else traces(cascade, selection, list(ways.values()))
    curves = zip(ways, selected, reported, strict=True)
    return Curves(
        cascades={name: cost_accuracy_curve(s, r, steps) for name, s, r in curves},
        single_stages=reported[0].single_stages(),
        points={name: reported[0].run(point) for name, point in cascade.operating_points.items()},
    )


class PairedInterval(NamedTuple):
    """A difference of two accuracies on the same instances, with its 95 % confidence interval."""

    difference: float
    low: float
    high: float


def paired_interval(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> PairedInterval:
    """Accuracy of a minus accuracy of b on the same instances, with a 95 % interval.

    Only the instances on which exactly one of the two is right carry information. The interval is Wald's
    with one instance added to either kind (Bonett and Price, 2012), which keeps its coverage where the two
    answers differ on few instances or none.

    Args:
        correct_a, correct_b: (N,) bool.

    Raises:
        InvalidArgument: different shapes, or no instances.

    Example:
        >>> a, b = np.arange(1000) < 940, np.arange(1000) < 930
        >>> "{:.3f} ({:.3f} to {:.3f})".format(*paired_interval(a, b))
        '0.010 (0.003 to 0.017)'
    """
    a, b = np.asarray(correct_a, np.bool_), np.asarray(correct_b, np.bool_)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InvalidArgument(f"got answers of shapes {a.shape} and {b.shape}; expected (N,) twice, N > 0")
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    share_a, share_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    centre = share_a - share_b
    half = 1.959964 * math.sqrt((share_a + share_b - centre**2) / (n + 2))
    return PairedInterval((only_a - only_b) / n, centre - half, centre + half)


def check_picture(path: str | Path) -> None:
    """Refuse a file that :func:`plot_curves` cannot draw to, before any work is done.

    Raises:
        InvalidArgument: matplotlib is missing, or an ending other than .png or .svg.
    """
    if Path(path).suffix not in (".png", ".svg"):
        raise InvalidArgument(f"cannot draw to {path}; expected a name that ends in .png or .svg")
    if find_spec("matplotlib") is None:
        raise InvalidArgument("drawing needs matplotlib: pip install 'fastcascade[plot]'")


def plot_curves(curves: Curves, path: str | Path, title: str = "Cost and accuracy") -> None:
    """Draw the curves to a file, PNG or SVG by its ending.

    Args:
        curves: what to draw; cost on a logarithmic axis, in millions of MACs per image.
        path: overwritten if it exists.

    Raises:
        InvalidArgument: matplotlib is missing, or an ending other than .png or .svg.
        SaveError: the operating system refused.
    """
    check_picture(path)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    # A fixed salt and no date: the same curves give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fastcascade", "font.size": 10, "text.color": _INK}):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for (name, evaluations), (colour, line) in zip(curves.cascades.items(), _STYLES, strict=False):
            x, y = [e.mean_macs / 1e6 for e in evaluations], [100 * e.accuracy for e in evaluations]
            top = 2.5 if name == "cascade" else 2
            axes.plot(x, y, line, color=colour, linewidth=2, label=plot_label(name), zorder=top)
        singles = [(macs / 1e6, 100 * accuracy) for macs, accuracy in curves.single_stages]
        axes.plot(*zip(*singles, strict=True), "s", color=_INK, markersize=6, label="single stages")
        for name, (macs, accuracy) in curves.references.items():
            _mark_reference(axes, plot_label(name), macs / 1e6, accuracy)
        by_cost = sorted(curves.points.items(), key=lambda item: item[1].mean_macs)
        # Names of neighbours on opposite sides of the curve do not meet.
        sides = cycle([((-6, 7), "right"), ((6, -14), "left")])
        for (name, point), (offset, side) in zip(by_cost, sides, strict=False):
            at = (point.mean_macs / 1e6, 100 * point.accuracy)
            axes.plot(*at, "o", color=_STYLES[0][0], markeredgecolor="white", markersize=8, zorder=3)
            label = plot_label(name)
            axes.annotate(label, at, xytext=offset, textcoords="offset points", ha=side, weight="bold")
        axes.set(xscale="log", xlabel="million multiplies per image", ylabel="accuracy, %")
        axes.set_title(plot_label(title))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8))
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
        kind = Path(path).suffix[1:]
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        picture = BytesIO()
        figure.savefig(picture, format=kind, dpi=150, facecolor="white", metadata=metadata)
    write_atomically(path, picture.getvalue())


def _mark_reference(axes: Axes, label: str, millions: float, accuracy: float | None) -> None:
    """A diamond at a published accuracy, or a vertical line at a budget."""
    if accuracy is None:
        axes.axvline(millions, color=_INK, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(
            f" {label}",
            (millions, 0.02),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            rotation=90,
            va="bottom",
        )
        return
    axes.plot(
        millions, 100 * accuracy, "D", color=_STYLES[1][0], markeredgecolor=_INK, markersize=7, zorder=3
    )
    axes.annotate(label, (millions, 100 * accuracy), xytext=(0, -14), textcoords="offset points", ha="center")
