"""One self-contained HTML page, and its pictures as PNGs: a cascade's accuracy and where its time goes.

The page holds no script and loads nothing: a content-security policy forbids both. Pictures are SVG in
``data:`` URLs, where they can neither run scripts nor fetch anything. Untrusted text (class and stage names,
file names) is escaped.
"""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastcascade.benchmarking.results import Benchmark, StageTiming, StepTiming
from fastcascade.benchmarking.tables import KERNEL_COLUMNS, PACED_COLUMNS, kernel_cells, paced_cells
from fastcascade.errors import InvalidArgument
from fastcascade.evaluation.curve import Curves, plot_curves
from fastcascade.storage.files import write_atomically
from fastcascade.text import plot_label, printable
from fastcascade.types import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["check_report", "write_report"]

# Okabe and Ito's colours, distinguishable with the common kinds of colour blindness.
_BLUE, _GREEN, _RED, _GREY = "#0072B2", "#009E73", "#D55E00", "#999999"
_COLOURS = (_BLUE, "#E69F00", _GREEN, "#CC79A7", _RED, "#56B4E9", "#000000", _GREY)
_SOFT = "#57606a"
_MARKERS = "os^Dv<>P"
_NAMED = 5
"""Kinds of steps."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --rule: #d8dee4; --soft: #57606a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --rule: #30363d; --soft: #9198a1; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--rule); text-align: right; }
.text { text-align: left; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; background: #fff; border-radius: 8px; }
@media (prefers-color-scheme: dark) { figure img { filter: invert(.92) hue-rotate(180deg) brightness(1.2); } }
figcaption, .soft { color: var(--soft); } .wide { overflow-x: auto; }
"""


@dataclass(frozen=True)
class _Picture:
    """A picture of the page; ``render("png" | "svg")`` draws it."""

    name: str
    caption: str
    render: Callable[[str], bytes]


def write_report(
    directory: str | Path,
    measured: Benchmark,
    evaluation: Evaluation | None = None,
    curves: Curves | None = None,
    peers: Mapping[str, Mapping[int, float]] | None = None,
    title: str = "Cascade",
    overwrite: bool = False,
) -> Path:
    """Write ``report.html`` and one PNG per picture.

    Args:
        directory: made if missing.
        measured: what :func:`fastcascade.benchmarking.runner.benchmark` returned.
        evaluation: accuracy at the same operating point; without it the flow of instances has no colours.
        curves: the cost–accuracy curve; left out without it.
        peers: images/s of other runtimes by name and batch size, shown beside those that were measured.
        title: of the page.

    Returns:
        the page's path.

    Raises:
        InvalidArgument: matplotlib is missing, or the page is there already and ``overwrite`` is False.
        SaveError: the operating system refused.
    """
    check_report(directory, overwrite)
    folder = Path(directory)
    page = folder / "report.html"
    pictures = _pictures(measured, evaluation, curves, peers or {})
    for picture in pictures:
        write_atomically(folder / f"{picture.name}.png", picture.render("png"))
    write_atomically(page, _page(title, measured, evaluation, pictures).encode())
    return page


def check_report(directory: str | Path, overwrite: bool) -> None:
    """Refuse what :func:`write_report` would, before anything is measured.

    Raises:
        InvalidArgument: matplotlib is missing, or the page is there already and ``overwrite`` is False.
    """
    page = Path(directory, "report.html")
    if page.exists() and not overwrite:
        raise InvalidArgument(f"{page} exists; pass overwrite=True (--overwrite) to replace it")
    if find_spec("matplotlib") is None:
        raise InvalidArgument("drawing needs matplotlib: pip install 'fastcascade[plot]'")


##### The page


def _page(
    title: str, measured: Benchmark, evaluation: Evaluation | None, pictures: Sequence[_Picture]
) -> str:
    kernels = kernel_cells(measured)
    body = [
        f"<h1>{escape(printable(title))}</h1>",
        f'<p class="soft">{escape(", ".join(f"{k} {v}" for k, v in measured.machine.items()))}</p>',
        _summary(measured, evaluation),
        *map(_figure, pictures),
        "<h2>Stages</h2>",
        _stage_table(measured),
        *(["<h2>Kernels</h2>", _table(KERNEL_COLUMNS, kernels, text_columns=2)] if kernels else []),
        "<h2>Batch sizes</h2>",
        _batch_table(measured),
        "<h2>Calls when they come</h2>",
        _table(PACED_COLUMNS, paced_cells(measured)),
        *(["<h2>What if</h2>", _what_if_table(measured)] if measured.what_if else []),
        f'<p class="soft">{escape(measured.energy_note)}</p>',
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(printable(title))}</title><style>{_STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )


def _figure(picture: _Picture) -> str:
    data = base64.b64encode(picture.render("svg")).decode()
    caption = escape(picture.caption)
    source = f"data:image/svg+xml;base64,{data}"
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _summary(measured: Benchmark, evaluation: Evaluation | None) -> str:
    best = measured.batches[-1]
    facts = [
        f"{best.images_per_s.median:,.0f} images/s at batch {best.batch}",
        f"{best.images_per_s.median / best.dense_images_per_s.median:.1f} times the last exit on everything",
        f"{measured.mac_share:.0%} of its MACs",
        f"schedule efficiency {best.schedule_efficiency.median:.2f}",
    ]
    if evaluation is not None:
        facts.insert(0, f"accuracy {evaluation.accuracy:.2%} on {evaluation.n:,} images")
    return f"<p>{escape('; '.join(facts))}.</p>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        opening = [f'<{tag} class="text">' if i < text_columns else f"<{tag}>" for i in range(len(cells))]
        parts = (
            f"{start}{escape(printable(cell))}</{tag}>" for start, cell in zip(opening, cells, strict=True)
        )
        return f"<tr>{''.join(parts)}</tr>"

    lines = [row(head, "th"), *(row(cells, "td") for cells in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _stage_table(measured: Benchmark) -> str:
    head = "stage|images in|out|ms|images/s|GFLOP/s|of peak|of bandwidth|exit µs/image"
    return _table(
        head.split("|"),
        (
            (
                stage.name,
                f"{stage.images_in:,}",
                f"{stage.images_out:,}",
                f"{stage.ms:.1f}",
                f"{stage.images_per_s:,.0f}",
                f"{stage.gflops:,.0f}",
                f"{stage.gflops_share:.0%}",
                f"{stage.bandwidth_share:.0%}",
                f"{1e3 * stage.exit_ms_per_image.median:.2f}",
            )
            for stage in measured.stages
        ),
    )


def _batch_table(measured: Benchmark) -> str:
    head = "batch|images/s|p50 ms|p95 ms|p99 ms|schedule efficiency|realised saving|dense images/s"
    return _table(
        head.split("|"),
        (
            (
                str(batch.batch),
                f"{batch.images_per_s.median:,.0f}",
                *(f"{batch.latency_ms[p]:.3g}" for p in ("p50", "p95", "p99")),
                f"{batch.schedule_efficiency.median:.3f}",
                "–" if batch.saving is None else f"{batch.saving:.2f}",
                f"{batch.dense_images_per_s.median:,.0f}",
            )
            for batch in measured.batches
        ),
    )


def _what_if_table(measured: Benchmark) -> str:
    return _table(
        ("change", "predicted images/s", "MACs per image", "exit shares"),
        (
            (
                row.change,
                f"{row.images_per_s:,.0f}",
                f"{row.mean_macs:,.0f}",
                " / ".join(f"{share:.0%}" for share in row.exit_shares),
            )
            for row in measured.what_if
        ),
    )


##### The pictures


def _pictures(
    measured: Benchmark,
    evaluation: Evaluation | None,
    curves: Curves | None,
    peers: Mapping[str, Mapping[int, float]],
) -> list[_Picture]:
    drawn = [
        _Picture(
            "flow",
            "How many images stop after each stage, and how many of those are right.",
            _renderer(lambda figure: _draw_flow(figure.subplots(), measured, evaluation)),
        ),
        _Picture(
            "time",
            "Where the time of an image goes at the largest batch, averaged over all images.",
            _renderer(lambda figure: _draw_time(figure.subplots(), measured)),
        ),
        _Picture(
            "roofline",
            "Each stage, and each of its steps where the engine times them, under the peaks measured in the "
            "same run. Area is the share of the cascade's time; the slowest kinds of steps are named. "
            "Winograd convolutions can exceed the arithmetic peak, because they multiply less than the plain "
            "definition; steps whose data is in cache can exceed the bandwidth.",
            _renderer(lambda figure: _draw_roofline(figure, measured)),
        ),
        _Picture(
            "throughput",
            "Throughput by batch size.",
            _renderer(lambda figure: _draw_throughput(figure.subplots(), measured, peers)),
        ),
    ]
    if curves is None:
        return drawn
    caption = "Accuracy against cost; dots are operating points."
    return [_Picture("curve", caption, lambda kind: _render_curves(curves, kind)), *drawn]


def _render_curves(curves: Curves, kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"curve.{kind}")
        plot_curves(curves, path)
        return path.read_bytes()


def _renderer(draw: Callable[[Figure], None]) -> Callable[[str], bytes]:
    """A function that draws to PNG or SVG bytes; the same numbers give the same bytes."""

    def render(kind: str) -> bytes:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"svg.hashsalt": "fastcascade"}):
            figure = Figure(figsize=(7.2, 4.2), layout="constrained")
            draw(figure)
            for axes in figure.axes:
                axes.spines[["top", "right"]].set_visible(False)
            buffer = BytesIO()
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(buffer, format=kind, dpi=150, facecolor="white", metadata=metadata)
        return buffer.getvalue()

    return render


def _draw_flow(axes: Axes, measured: Benchmark, evaluation: Evaluation | None) -> None:
    names = [plot_label(stage.name) for stage in measured.stages]
    stopped = [stage.images_in - stage.images_out for stage in measured.stages]
    going_on = [stage.images_out for stage in measured.stages]
    right = [0.0] * len(names)
    if evaluation is not None:
        right = [
            n * (0.0 if math.isnan(share) else share)
            for n, share in zip(stopped, evaluation.exit_accuracy, strict=True)
        ]
    wrong = [n - r for n, r in zip(stopped, right, strict=True)]
    axes.bar(names, right, color=_GREEN, label="stop here, right")
    label = "stop here" if evaluation is None else "stop here, wrong"
    axes.bar(names, wrong, bottom=right, color=_RED if evaluation is not None else _BLUE, label=label)
    axes.bar(names, going_on, bottom=stopped, color=_GREY, label="go on")
    axes.set(ylabel="images")
    axes.legend(frameon=False, loc="upper right")  # "best" warns on a slow machine


def _draw_time(axes: Axes, measured: Benchmark) -> None:
    batch = measured.batches[-1]
    parts = [(plot_label(f"{stage.name}: stage"), _stage_us(stage, measured)) for stage in measured.stages]
    parts += [
        (plot_label(f"{stage.name}: exit"), _exit_us(stage, measured)) for stage in measured.stages[:-1]
    ]
    parts.append(("compaction, call", 1e3 * batch.compaction_ms_per_image.median))
    parts.append(("idle", 1e3 * batch.idle_ms_per_image.median))
    names, microseconds = zip(*reversed(parts), strict=True)
    axes.barh(names, microseconds, color=_BLUE)
    for name, value in zip(names, microseconds, strict=True):
        # To the right of negative bars too, where no name of a part is in the way.
        end = (max(value, 0), name)
        axes.annotate(f"{value:.2f}", end, xytext=(4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.12)
    axes.set(xlabel=f"µs per image at batch {batch.batch}")


def _stage_us(stage: StageTiming, measured: Benchmark) -> float:
    return 1e3 * stage.ms_per_image.median * stage.images_in / measured.images


def _exit_us(stage: StageTiming, measured: Benchmark) -> float:
    return 1e3 * stage.exit_ms_per_image.median * stage.images_in / measured.images


class _Point(NamedTuple):
    """A step on the roofline; ``share`` is of the time that all steps take for the images that reach them."""

    stage: int
    step: StepTiming
    share: float


def _points(measured: Benchmark) -> list[_Point]:
    steps = [
        (k, step, step.ms_per_image.median * stage.images_in)
        for k, stage in enumerate(measured.stages)
        for step in stage.steps
    ]
    whole = sum(ms for _, _, ms in steps)
    return [_Point(k, step, ms / whole) for k, step, ms in steps]


def _draw_roofline(figure: Figure, measured: Benchmark) -> None:
    """Steps that multiply under both roofs; those that do not, in a strip of their own by bandwidth alone."""
    from matplotlib.patches import Patch

    points = _points(measured)
    multiplying = [point for point in points if point.step.macs]
    moving = [point for point in points if not point.step.macs]
    kernels = dict.fromkeys(point.step.kernel for point in (*multiplying, *moving))
    colours = dict(zip(kernels, cycle(_COLOURS), strict=False))
    if moving:
        roof, strip = figure.subplots(1, 2, width_ratios=(5, 1))
        _draw_strip(strip, measured, moving, colours)
    else:
        roof = figure.subplots()
    _draw_roofs(roof, measured, [2 * p.step.macs / p.step.bytes_per_image for p in multiplying])
    for point in multiplying:
        step = point.step
        intensity = 2 * step.macs / step.bytes_per_image
        _draw_point(roof, intensity, step.gflops, point, colours[step.kernel])
    _name_longest(roof, multiplying)
    for k, stage in enumerate(measured.stages):
        style = {"color": "black", "fillstyle": "none", "linestyle": "none"}
        intensity = 2 * stage.macs / stage.bytes_per_image
        roof.plot(intensity, stage.gflops, _marker(k), label=plot_label(f"{stage.name}, whole"), **style)
    roof.legend(frameon=False, loc="lower right", fontsize="small")
    patches = [Patch(color=colour, label=plot_label(kernel)) for kernel, colour in colours.items()]
    if patches:
        figure.legend(handles=patches, frameon=False, loc="outside lower center", ncols=4, fontsize="small")


def _marker(stage: int) -> str:
    return _MARKERS[stage % len(_MARKERS)]


def _draw_roofs(axes: Axes, measured: Benchmark, intensities: Sequence[float]) -> None:
    peaks = measured.peaks
    ridge = peaks.gflops / peaks.copy_gbs
    stages = (2 * stage.macs / stage.bytes_per_image for stage in measured.stages)
    everything = (ridge, *intensities, *stages)
    left, right = min(everything) / 3, max(everything) * 3
    axes.plot([left, ridge], [left * peaks.copy_gbs, peaks.gflops], color=_GREY)
    axes.plot([ridge, right], [peaks.gflops] * 2, color=_GREY)
    axes.annotate(
        f"copy, {peaks.copy_gbs:.0f} GB/s",
        (math.sqrt(left * ridge), math.sqrt(left * ridge) * peaks.copy_gbs),
        xytext=(8, 0),
        textcoords="offset points",
        va="top",
        color=_SOFT,
        fontsize="small",
    )
    axes.annotate(
        f"matrix product, {peaks.gflops:,.0f} GFLOP/s",
        (right, peaks.gflops),
        xytext=(0, -12),
        textcoords="offset points",
        ha="right",
        color=_SOFT,
        fontsize="small",
    )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    axes.margins(y=0.15)
    _plain_decades(axes.xaxis)
    _plain_decades(axes.yaxis)


def _plain_decades(axis: Axis) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _draw_strip(
    axes: Axes, measured: Benchmark, moving: Sequence[_Point], colours: Mapping[str, str]
) -> None:
    kernels = list(dict.fromkeys(point.step.kernel for point in moving))
    axes.axhline(measured.peaks.copy_gbs, color=_GREY)
    for point in moving:
        _draw_point(axes, kernels.index(point.step.kernel), point.step.gbs, point, colours[point.step.kernel])
    axes.set(yscale="log", xlabel="no multiplies", ylabel="GB/s", xlim=(-0.7, len(kernels) - 0.3))
    axes.set_xticks([])
    _plain_decades(axes.yaxis)


def _draw_point(axes: Axes, x: float, y: float, point: _Point, colour: str) -> None:
    size = 12 + 600 * point.share
    axes.scatter(x, y, size, colour, marker=_marker(point.stage), alpha=0.7, linewidths=0)


def _name_longest(axes: Axes, points: Sequence[_Point]) -> None:
    """Names of the kinds of steps that take the most time, in the corner that the roofs leave empty."""
    kinds: dict[str, list[_Point]] = {}
    for point in points:
        name = point.step.operation.partition(" + ")[0].partition(" -> ")[0]
        kinds.setdefault(name, []).append(point)
    longest = sorted(kinds, key=lambda name: -sum(point.share for point in kinds[name]))[:_NAMED]
    slowest_last = sorted(longest, key=lambda name: -max(point.step.gflops for point in kinds[name]))
    for line, name in enumerate(slowest_last):
        top = max((point.step for point in kinds[name]), key=lambda step: step.gflops)
        axes.annotate(
            plot_label(f"{name}, {sum(point.share for point in kinds[name]):.0%}"),
            (2 * top.macs / top.bytes_per_image, top.gflops),
            xytext=(0.02, 0.98 - 0.07 * line),
            textcoords="axes fraction",
            va="top",
            fontsize="small",
            arrowprops={"arrowstyle": "-", "color": _SOFT, "linewidth": 0.5, "relpos": (1, 0.5)},
        )


def _draw_throughput(axes: Axes, measured: Benchmark, peers: Mapping[str, Mapping[int, float]]) -> None:
    lines = {
        "fastcascade": {b.batch: b.images_per_s.median for b in measured.batches},
        "fastcascade, last exit on everything": {
            b.batch: b.dense_images_per_s.median for b in measured.batches
        },
        **{name: {size: r.median for size, r in rates.items()} for name, rates in measured.peers.items()},
        **peers,
    }
    for (name, rates), colour, marker in zip(lines.items(), cycle(_COLOURS), cycle(_MARKERS), strict=False):
        sizes = sorted(rates)
        axes.plot(sizes, [rates[size] for size in sizes], f"{marker}-", color=colour, label=plot_label(name))
    axes.set(xscale="log", xlabel="batch size", ylabel="images/s")
    axes.set_ylim(bottom=0)
    sizes = [b.batch for b in measured.batches]
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left")
