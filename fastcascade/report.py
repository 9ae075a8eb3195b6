"""One self-contained HTML page, and its pictures as PNGs, about how a cascade does and where its time goes.

The page holds no script and asks for nothing: a content-security policy forbids both. Pictures are SVG in
``data:`` addresses, where they can neither run nor fetch anything. Whatever comes from outside (class and
stage names, file names) is escaped.
"""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from fastcascade.bench_results import Benchmark, StageTiming
from fastcascade.curve import Curves, plot_curves
from fastcascade.errors import InvalidArgument
from fastcascade.files import write_atomically
from fastcascade.types import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_report"]

# Okabe and Ito's colours, which stay apart under the common kinds of colour blindness.
_BLUE, _GREEN, _RED, _GREY = "#0072B2", "#009E73", "#D55E00", "#999999"
_COLOURS = (_BLUE, "#E69F00", _GREEN, "#CC79A7", _RED, "#56B4E9", "#000000", _GREY)
_MARKERS = "os^Dv<>P"

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
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; background: #fff; border-radius: 8px; }
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
        measured: what :func:`fastcascade.bench.benchmark` returned.
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
    folder = Path(directory)
    page = folder / "report.html"
    if page.exists() and not overwrite:
        raise InvalidArgument(f"{page} exists; pass overwrite=True (--overwrite) to replace it")
    pictures = _pictures(measured, evaluation, curves, peers or {})
    for picture in pictures:
        write_atomically(folder / f"{picture.name}.png", picture.render("png"))
    write_atomically(page, _page(title, measured, evaluation, pictures).encode())
    return page


##### The page


def _page(
    title: str, measured: Benchmark, evaluation: Evaluation | None, pictures: Sequence[_Picture]
) -> str:
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(", ".join(f"{k} {v}" for k, v in measured.machine.items()))}</p>',
        _summary(measured, evaluation),
        *map(_figure, pictures),
        "<h2>Stages</h2>",
        _stage_table(measured),
        "<h2>Batch sizes</h2>",
        _batch_table(measured),
        *(["<h2>What if</h2>", _what_if_table(measured)] if measured.what_if else []),
        f'<p class="soft">{escape(measured.energy_note)}</p>',
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
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


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [row(head, "th"), *(row(cells, "td") for cells in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _stage_table(measured: Benchmark) -> str:
    head = "stage|images in|out|ms|images/s|GFLOP/s|of ceiling|of bandwidth|exit µs/image"
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
            _renderer(lambda axes: _draw_flow(axes, measured, evaluation)),
        ),
        _Picture(
            "time",
            "Where the time of an image goes at the largest batch, averaged over all images.",
            _renderer(lambda axes: _draw_time(axes, measured)),
        ),
        _Picture(
            "roofline",
            "Each stage alone under the ceilings measured in the same run. Winograd convolutions may exceed "
            "the arithmetic one: they do fewer multiplies than they are credited with.",
            _renderer(lambda axes: _draw_roofline(axes, measured)),
        ),
        _Picture(
            "throughput",
            "Throughput by batch size.",
            _renderer(lambda axes: _draw_throughput(axes, measured, peers)),
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


def _renderer(draw: Callable[[Axes], None]) -> Callable[[str], bytes]:
    """A function that draws to PNG or SVG bytes; the same numbers give the same bytes."""

    def render(kind: str) -> bytes:
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InvalidArgument("drawing needs matplotlib: pip install 'fastcascade[plot]'") from error
        # Names come from outside, and a dollar sign must not start a formula.
        with matplotlib.rc_context({"svg.hashsalt": "fastcascade", "text.parse_math": False}):
            figure = Figure(figsize=(7.2, 4.2), layout="constrained")
            axes = figure.subplots()
            draw(axes)
            axes.spines[["top", "right"]].set_visible(False)
            buffer = BytesIO()
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(buffer, format=kind, dpi=150, facecolor="white", metadata=metadata)
        return buffer.getvalue()

    return render


def _draw_flow(axes: Axes, measured: Benchmark, evaluation: Evaluation | None) -> None:
    names = [stage.name for stage in measured.stages]
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
    parts = [(f"{stage.name}: stage", _stage_us(stage, measured)) for stage in measured.stages]
    parts += [(f"{stage.name}: exit", _exit_us(stage, measured)) for stage in measured.stages[:-1]]
    parts.append(("compaction, call", 1e3 * batch.compaction_ms_per_image.median))
    parts.append(("idle", 1e3 * batch.idle_ms_per_image.median))
    names, microseconds = zip(*reversed(parts), strict=True)
    bars = axes.barh(names, microseconds, color=_BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xlabel=f"µs per image at batch {batch.batch}")


def _stage_us(stage: StageTiming, measured: Benchmark) -> float:
    return 1e3 * stage.ms_per_image.median * stage.images_in / measured.images


def _exit_us(stage: StageTiming, measured: Benchmark) -> float:
    return 1e3 * stage.exit_ms_per_image.median * stage.images_in / measured.images


def _draw_roofline(axes: Axes, measured: Benchmark) -> None:
    from matplotlib.ticker import LogLocator

    intensities = [2 * stage.macs / stage.bytes_per_image for stage in measured.stages]
    ridge = measured.ceilings.gflops / measured.ceilings.copy_gbs
    left, right = min(*intensities, ridge) / 4, max(*intensities, ridge) * 4
    axes.plot(
        [left, ridge, right],
        [left * measured.ceilings.copy_gbs, measured.ceilings.gflops, measured.ceilings.gflops],
        color=_GREY,
        label="ceilings",
    )
    for stage, intensity, colour, marker in zip(
        measured.stages, intensities, cycle(_COLOURS), cycle(_MARKERS), strict=False
    ):
        axes.plot(intensity, stage.gflops, marker, color=colour, label=stage.name)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if axis is axes.yaxis else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.legend(frameon=False, loc="lower right")


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
        axes.plot(sizes, [rates[size] for size in sizes], f"{marker}-", color=colour, label=name)
    axes.set(xscale="log", xlabel="batch size", ylabel="images/s")
    axes.set_ylim(bottom=0)
    sizes = [b.batch for b in measured.batches]
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left")
