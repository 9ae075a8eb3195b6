"""One self-contained HTML page: what a cascade gets right, what it costs, and where its time goes.

The page holds no script and loads nothing: a content-security policy forbids both. Charts are inline SVG and
HTML in colours that follow the reader's light or dark scheme. Untrusted text (class and stage names, file
names) is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from fastcascade.benchmarking.charts import (
    Axis,
    Plot,
    Segment,
    bars,
    legend,
    stacked_bar,
    table,
    text,
    thumbnail,
)
from fastcascade.benchmarking.results import Benchmark, StepTiming
from fastcascade.benchmarking.tables import KERNEL_COLUMNS, PACED_COLUMNS, kernel_cells, paced_cells
from fastcascade.benchmarking.torch_peaks import Peaks
from fastcascade.errors import InvalidArgument
from fastcascade.evaluation.curve import Curves
from fastcascade.evaluation.diagnosis import Diagnosis, Disagreement, Reliability
from fastcascade.storage.files import write_atomically
from fastcascade.types import Evaluation

__all__ = ["check_report", "write_report"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

_COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
_RIGHT, _WRONG, _ON = "c2", "c4", "none"
_NAMED_STEPS = 3
_MATRIX_CLASSES = 24
"""Classes up to which the whole matrix of confusions is readable."""
_CONFUSED_PAIRS = 12
_BUDGETS = 9


def write_report(
    directory: str | Path,
    measured: Benchmark,
    evaluation: Evaluation | None = None,
    curves: Curves | None = None,
    diagnosis: Diagnosis | None = None,
    peers: Mapping[str, Mapping[int, float]] | None = None,
    title: str = "Cascade",
    overwrite: bool = False,
) -> Path:
    """Write ``report.html``.

    Args:
        directory: made if missing.
        measured: what :func:`fastcascade.benchmarking.runner.benchmark` returned.
        evaluation: accuracy at the same operating point.
        curves: accuracy against cost.
        diagnosis: what the cascade gets wrong, at the same operating point.
        peers: images/s of other runtimes by name and batch size, shown beside those that were measured.
        title: of the page.

    What is not given is left out.

    Returns:
        the page's path.

    Raises:
        InvalidArgument: the page is there already and ``overwrite`` is False.
        SaveError: the operating system refused.
    """
    check_report(directory, overwrite)
    page = Path(directory, "report.html")
    sections = _sections(measured, evaluation, curves, diagnosis, peers or {})
    write_atomically(page, _page(title, measured, evaluation, sections).encode())
    return page


def check_report(directory: str | Path, overwrite: bool) -> None:
    """Refuse what :func:`write_report` would, before anything is measured.

    Raises:
        InvalidArgument: the page is there already and ``overwrite`` is False.
    """
    page = Path(directory, "report.html")
    if page.exists() and not overwrite:
        raise InvalidArgument(f"{page} exists; pass overwrite=True (--overwrite) to replace it")


##### The page


def _page(title: str, measured: Benchmark, evaluation: Evaluation | None, sections: Iterable[str]) -> str:
    style = files("fastcascade.benchmarking").joinpath("report.css").read_text()
    machine = ", ".join(f"{k} {v}" for k, v in measured.machine.items())
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title><style>{style}</style></head><body><main>",
        f"<header><h1>{text(title)}</h1>",
        f'<p class="soft">{text(f"{measured.backend} {measured.precision}; {machine}")}</p></header>',
        *([f'<p class="note">{text(measured.busy_note)}</p>'] if measured.busy_note else []),
        _tiles(measured, evaluation),
        *sections,
        f'<p class="soft" style="margin-top:1.5rem">{text(measured.energy_note)}</p>',
        "</main></body></html>\n",
    ]
    return "\n".join(lines)


def _sections(
    measured: Benchmark,
    evaluation: Evaluation | None,
    curves: Curves | None,
    diagnosis: Diagnosis | None,
    peers: Mapping[str, Mapping[int, float]],
) -> Iterator[str]:
    yield _flow(measured, evaluation)
    if curves is not None:
        yield _curve(curves)
        yield _other_budgets(measured, curves)
    if diagnosis is not None:
        yield _confusion(diagnosis)
        yield _reliability(measured, diagnosis)
        if len(measured.stages) > 1:
            yield _disagreements(measured, diagnosis)
    yield _time(measured)
    yield _throughput(measured, peers)
    yield _roofline(measured)
    yield _paced(measured)
    if measured.what_if:
        yield _what_if(measured)


def _section(title: str, lead: str, *content: str) -> str:
    return f'<section><h2>{text(title)}</h2><p class="lead">{text(lead)}</p>{"".join(content)}</section>'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def _tiles(measured: Benchmark, evaluation: Evaluation | None) -> str:
    best = measured.batches[-1]
    speed_up = best.images_per_s.median / best.dense_images_per_s.median
    tiles = [
        (f"{best.images_per_s.median:,.0f}", f"images per second at batch {best.batch}"),
        (f"{speed_up:.1f}×", "as fast as the last exit on every image, on the same engine"),
        (f"{measured.mac_share:.0%}", "of the multiplications of the last exit on every image"),
        (f"{best.schedule_efficiency.median:.0%}", "schedule efficiency, explained under throughput"),
    ]
    if evaluation is not None:
        tiles.insert(0, (f"{evaluation.accuracy:.2%}", f"accuracy on {evaluation.n:,} images"))
    cells = (
        f'<div class="tile"><b>{text(figure)}</b><span>{text(words)}</span></div>' for figure, words in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


##### Accuracy and cost


def _flow(measured: Benchmark, evaluation: Evaluation | None) -> str:
    if evaluation is None:  # the images that were timed
        everything = measured.stages[0].images_in
        stops = [stage.images_in - stage.images_out for stage in measured.stages]
    else:
        everything = evaluation.n
        stops = [round(share * everything) for share in evaluation.exit_shares]
    going_on = everything
    rows = []
    for k, (stage, stopped) in enumerate(zip(measured.stages, stops, strict=True)):
        going_on -= stopped
        right_share = None if evaluation is None else evaluation.exit_accuracy[k]
        if right_share is None or math.isnan(right_share):
            parts = [(stopped, "c0", f"{stopped:,} stop here")]
            note = f"{stopped / everything:.1%} stop here"
        else:
            right = round(stopped * right_share)
            parts = [(right, _RIGHT, f"{right:,} stop here, right")]
            parts.append((stopped - right, _WRONG, f"{stopped - right:,} stop here, wrong"))
            note = f"{stopped / everything:.1%} stop here, {right_share:.1%} right"
        parts.append((going_on, _ON, f"{going_on:,} go on"))
        segments = [Segment(n / everything, style, title) for n, style, title in parts]
        rows.append((f"{stage.name}, {stage.macs / 1e6:,.1f} M MACs", segments, note))
    colours = [(_RIGHT, "stop, right"), (_WRONG, "stop, wrong")] if evaluation else [("c0", "stop")]
    return _section(
        "Where images stop",
        "Each bar is a stage; its length is the share of images that reach it.",
        legend([*colours, (_ON, "go on to the next stage")]),
        bars(rows),
    )


def _curve(curves: Curves) -> str:
    everything = [(e.mean_macs / 1e6, e.accuracy) for found in curves.cascades.values() for e in found]
    everything += [(macs / 1e6, accuracy) for macs, accuracy in curves.single_stages]
    everything += [(e.mean_macs / 1e6, e.accuracy) for e in curves.points.values()]
    costs, accuracies = zip(*everything, strict=True)
    low, high = 100 * min(accuracies), 100 * max(accuracies)
    room = max(0.5, 0.08 * (high - low))
    plot = Plot(
        Axis("million multiplications per image", 0.9 * min(costs), 1.1 * max(costs), log=True),
        Axis("accuracy", max(0.0, low - room), min(100.0, high + room), unit=" %"),
        "accuracy against cost",
        360,
    )
    entries: list[tuple[str, str]] = []
    # The cascade's own curve comes first, and is drawn last, above the others.
    for style, (name, found) in reversed(list(zip(_COLOURS, curves.cascades.items(), strict=False))):
        thin = "" if style == "c0" else " thin"
        plot.line([(e.mean_macs / 1e6, 100 * e.accuracy) for e in found], style + thin)
        entries.insert(0, (style + thin, name))
    for number, (macs, accuracy) in enumerate(curves.single_stages):
        title = f"stage {number} alone: {accuracy:.2%}, {macs / 1e6:,.2f} M MACs"
        plot.dot(macs / 1e6, 100 * accuracy, "ring c5", title)
    for name, point in curves.points.items():
        title = f"{name}: {point.accuracy:.2%}, {point.mean_macs / 1e6:,.2f} M MACs"
        plot.dot(point.mean_macs / 1e6, 100 * point.accuracy, "c0", title, 6)
    plot.labels((e.mean_macs / 1e6, 100 * e.accuracy, 6, name) for name, e in curves.points.items())
    entries.append(("ring c5", "a single stage on every image"))
    return _section(
        "Accuracy against cost",
        "Filled dots are the operating points that the cascade stores. The lines are other thresholds, found "
        "on these same images, which flatters all lines alike.",
        legend(entries),
        plot.svg(),
    )


def _other_budgets(measured: Benchmark, curves: Curves) -> str:
    """Rows of the cascade's own curve, with the speed that the measured times predict."""
    found = next(iter(curves.cascades.values()))
    chosen = [found[i] for i in sorted({round(i) for i in np.linspace(0, len(found) - 1, _BUDGETS)})]
    efficiency = measured.batches[-1].schedule_efficiency.median
    names = [stage.name for stage in measured.stages]
    lines = ['<tr><th>M MACs</th><th>accuracy</th><th>images/s</th><th class="text">stop at</th></tr>']
    for e in chosen:
        ms = sum(share * ms for share, ms in zip(e.exit_shares, measured.exit_ms, strict=True))
        segments = [
            Segment(share, style, f"{name}: {share:.0%}")
            for share, style, name in zip(e.exit_shares, _styles(names), names, strict=True)
        ]
        numbers = (f"{e.mean_macs / 1e6:,.2f}", f"{e.accuracy:.2%}", f"{1e3 * efficiency / ms:,.0f}")
        cells = [f"<td>{text(number)}</td>" for number in numbers]
        lines.append(f"<tr>{''.join(cells)}<td>{stacked_bar(segments)}</td></tr>")
    return _section(
        "What another budget would give",
        "Thresholds for other mean costs, found on these images. The speed is predicted from the stages' "
        "times at the schedule efficiency of the largest batch. fc.calibrate on held-out images turns such a "
        "budget into an operating point.",
        legend(zip(_styles(names), names, strict=True)),
        f'<div class="wide"><table>{"".join(lines)}</table></div>',
    )


def _styles(names: Sequence[str]) -> list[str]:
    """A colour for each; they repeat after six."""
    return [_COLOURS[i % len(_COLOURS)] for i in range(len(names))]


##### What it gets wrong


def _confusion(diagnosis: Diagnosis) -> str:
    counts, classes = diagnosis.confusion, len(diagnosis.confusion)
    names = diagnosis.classes or tuple(map(str, range(classes)))
    off = counts.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:_CONFUSED_PAIRS]
    pairs = [(int(i) // classes, int(i) % classes) for i in order if off.flat[i]]
    rows = [
        (names[true], names[said], f"{off[true, said]:,}", f"{off[true, said] / counts[true].sum():.1%}")
        for true, said in pairs
    ]
    most = table(("true class", "answer", "images", "of the class"), rows, text_columns=2)
    if classes > _MATRIX_CLASSES:
        return _section(
            "Most confused classes", f"The most frequent confusions of {classes:,} classes.", most
        )
    return _section(
        "Confusion matrix",
        "Rows are true classes, columns are answers, in percent of the row. Hover for the number of images.",
        _matrix(diagnosis, names),
        _details("The most frequent confusions", most) if rows else "",
    )


def _matrix(diagnosis: Diagnosis, names: Sequence[str]) -> str:
    head = "".join(f"<th><span>{text(name)}</span></th>" for name in names)
    lines = [f"<thead><tr><th></th>{head}</tr></thead>"]
    for true, counts in enumerate(diagnosis.confusion):
        whole = max(1, int(counts.sum()))
        cells = []
        for said, count in enumerate(counts.tolist()):
            share = count / whole
            # Errors are few, so their colour is stretched: a tenth of a class is full red.
            colour, depth = ("c0", share) if true == said else ("c4", min(1.0, 10 * share))
            strong = " strong" if depth > 0.55 else ""
            title = text(f"{count:,} of {whole:,} {names[true]} called {names[said]}")
            shown = f"{100 * share:.0f}" if 100 * share >= 0.5 else ""
            style = f'class="{colour}{strong}" style="--share:{depth:.3f}"'
            cells.append(f'<td {style} title="{title}">{shown}</td>')
        lines.append(f'<tr><th class="text">{text(names[true])}</th>{"".join(cells)}</tr>')
    return f'<div class="wide"><table class="matrix">{"".join(lines)}</table></div>'


def _reliability(measured: Benchmark, diagnosis: Diagnosis) -> str:
    squares = []
    for k, after in enumerate(diagnosis.after):
        before = diagnosis.before[k] if diagnosis.before else None
        axes = (Axis("confidence", 0, 1, ticks=(0, 0.5, 1)), Axis("accuracy", 0, 1, ticks=(0, 0.5, 1)))
        plot = Plot(*axes, f"accuracy by confidence at exit {k}", None)
        plot.line([(0, 0), (1, 1)], "ideal")
        if before is not None:
            _bins(plot, before, "ring c1", "before")
        _bins(plot, after, "c0", "after" if diagnosis.before else "bin")
        error = (
            f"{after.error:.1%}" if before is None else f"{before.error:.1%} before, {after.error:.1%} after"
        )
        squares.append(
            f"<div><h3>{text(measured.stages[k].name)}</h3>"
            f'<p class="soft">{text(f"calibration error {error}")}</p>{plot.svg()}</div>'
        )
    compared = "before and after its temperature, which fc.fit finds on held-out images"
    return _section(
        "How far confidence can be trusted",
        f"Each exit on all images{', ' + compared if diagnosis.before else ''}. A dot is a bin of images "
        "with similar confidence; on the diagonal, of the images with 80 % confidence 80 % are right. Larger "
        "dots hold more images. The calibration error is the mean distance from the diagonal.",
        legend([("ring c1", "before temperature"), ("c0", "after")]) if diagnosis.before else "",
        f'<div class="squares">{"".join(squares)}</div>',
    )


def _bins(plot: Plot, found: Reliability, style: str, when: str) -> None:
    for sure, right, share in zip(found.confidence, found.accuracy, found.share, strict=True):
        if share:
            title = f"{when}: confidence {sure:.1%}, accuracy {right:.1%}, {share:.1%} of the images"
            plot.dot(sure, right, style, title, 3 + 7 * math.sqrt(share))


def _disagreements(measured: Benchmark, diagnosis: Diagnosis) -> str:
    names = [stage.name for stage in measured.stages]
    parts = []
    for helped, head in ((True, "Stopping early was right, the last exit wrong"), (False, "And the reverse")):
        chosen = [seen for seen in diagnosis.examples if seen.helped == helped]
        if chosen:
            pictures = "".join(_thumb(seen, names, diagnosis.classes) for seen in chosen)
            parts.append(f'<h3>{head}</h3><div class="thumbs">{pictures}</div>')
    return _section(
        "Images on which exits disagree",
        f"{diagnosis.helped:,} images stop early with the right label where the last exit is wrong; "
        f"{diagnosis.hurt:,} stop early with a wrong one where it is right. Hover for what every exit says.",
        *parts,
    )


def _thumb(seen: Disagreement, stages: Sequence[str], classes: Sequence[str] | None) -> str:
    def name(label: int) -> str:
        return "invalid" if label < 0 else classes[label] if classes else f"class {label}"

    everything = "; ".join(
        f"{stage}: {name(label)}" for stage, label in zip(stages, seen.labels, strict=True)
    )
    early, last = name(seen.labels[seen.exit_stage]), name(seen.labels[-1])
    first, second = ("right", "wrong") if seen.helped else ("wrong", "right")
    title = text(f"{seen.id}; true class {name(seen.truth)}; {everything}")
    return (
        f'<div class="thumb" title="{title}">{thumbnail(seen.image, name(seen.truth))}'
        f'<span class="{first}">exit {seen.exit_stage}: {text(early)}</span><br>'
        f'<span class="{second}">last: {text(last)}</span></div>'
    )


##### Time


def _time(measured: Benchmark) -> str:
    batch = measured.batches[-1]
    parts = []
    for k, stage in enumerate(measured.stages):
        share = stage.images_in / measured.images
        parts.append((stage.name, "c0", 1e3 * stage.ms_per_image.median * share))
        if k < len(measured.stages) - 1:
            parts.append((f"exit of {stage.name}", "c1", 1e3 * stage.exit_ms_per_image.median * share))
    parts.append(("compaction, call", "c3", 1e3 * batch.compaction_ms_per_image.median))
    parts.append(("idle", "c5", 1e3 * batch.idle_ms_per_image.median))
    longest = max(us for _, _, us in parts)
    rows = [
        (name, [Segment(us / longest, style, f"{us:.3f} µs")], f"{us:.2f} µs") for name, style, us in parts
    ]
    head = "stage|images in|out|ms|images/s|GFLOP/s|of peak|of bandwidth|exit µs/image"
    stages = (
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
    )
    return _section(
        "Where the time of an image goes",
        f"Microseconds per image at batch {batch.batch}, averaged over all images: a deep stage counts "
        "little if few images reach it. A negative rest means that stages run faster inside the cascade than "
        "alone.",
        legend([("c0", "stages"), ("c1", "exits"), ("c3", "rest of the call"), ("c5", "idle threads")]),
        bars(rows),
        _details("Each stage alone", table(head.split("|"), stages)),
    )


def _throughput(measured: Benchmark, peers: Mapping[str, Mapping[int, float]]) -> str:
    lines = {
        "fastcascade": {b.batch: b.images_per_s.median for b in measured.batches},
        "last exit on every image": {b.batch: b.dense_images_per_s.median for b in measured.batches},
        **{name: {size: r.median for size, r in rates.items()} for name, rates in measured.peers.items()},
        **peers,
    }
    sizes = sorted({size for rates in lines.values() for size in rates})
    highest = max(rate for rates in lines.values() for rate in rates.values())
    low, high = (sizes[0], sizes[-1]) if len(sizes) > 1 else (sizes[0] / 2, sizes[0] * 2)
    plot = Plot(
        Axis("images in a call", low, high, log=True, ticks=tuple(map(float, sizes))),
        Axis("images per second", 0, 1.06 * highest),
        "images per second by batch size",
    )
    entries = list(zip(_styles(list(lines)), lines.items(), strict=True))
    for style, (name, rates) in reversed(entries):
        points = [(size, rates[size]) for size in sorted(rates)]
        plot.line(points, style)
        for size, rate in points:
            plot.dot(size, rate, style, f"{name}, batch {size}: {rate:,.0f} images/s")
    head = "batch|images/s|p50 ms|p95 ms|p99 ms|schedule efficiency|realised saving|dense images/s"
    rows = (
        (
            str(batch.batch),
            f"{batch.images_per_s.median:,.0f}",
            *(f"{batch.latency_ms[p]:.3g}" for p in ("p50", "p95", "p99")),
            f"{batch.schedule_efficiency.median:.3f}",
            "–" if batch.saving is None else f"{batch.saving:.2f}",
            f"{batch.dense_images_per_s.median:,.0f}",
        )
        for batch in measured.batches
    )
    return _section(
        "Throughput by batch size",
        "Images per second of calls one after another. Schedule efficiency is the part of a call's time that "
        "its stages would take if each ran alone on the images that reach it; the rest goes to exits, moving "
        "images and waiting. Realised saving is the share of time saved over that of multiplications saved.",
        legend((style, name) for style, (name, _) in entries),
        plot.svg(),
        _details("Latency and efficiency by batch size", table(head.split("|"), rows)),
    )


def _roofline(measured: Benchmark) -> str:
    peaks, names = measured.peaks, [stage.name for stage in measured.stages]
    steps = [
        (k, step, step.ms_per_image.median * stage.images_in)
        for k, stage in enumerate(measured.stages)
        for step in stage.steps
    ]
    whole = sum(ms for _, _, ms in steps)
    multiplying = [(k, step, ms / whole) for k, step, ms in steps if step.macs]
    stages = [(2 * stage.macs / stage.bytes_per_image, stage.gflops) for stage in measured.stages]
    dots = [(2 * step.macs / step.bytes_per_image, step.gflops) for _, step, _ in multiplying] or stages
    plot = _roof(peaks, dots)
    if multiplying:
        for k, step, share in sorted(multiplying, key=lambda point: -point[2]):
            title = (
                f"{names[k]}: {step.operation}; {step.kernel}; {share:.1%} of the time, "
                f"{step.gflops:,.0f} GFLOP/s, {step.gbs:,.1f} GB/s"
            )
            at = (2 * step.macs / step.bytes_per_image, step.gflops)
            plot.dot(*at, f"pale {_styles(names)[k]}", title, _radius(share))
        plot.labels(_longest_kinds([(step, share) for _, step, share in multiplying]))
    else:
        for style, name, (x, y) in zip(_styles(names), names, stages, strict=True):
            plot.dot(x, y, style, f"{name}: {y:,.0f} GFLOP/s", 7)
    still = sum(ms for _, step, ms in steps if not step.macs) / whole if steps else 0.0
    kernels = kernel_cells(measured)
    return _section(
        "Roofline",
        "Each dot is a step of a stage under the peaks measured in the same run: the slope is the speed of "
        f"copying ({peaks.copy_gbs:.0f} GB/s), the flat part the fastest matrix product. Area is the share "
        "of the cascade's time; hover for the step. Winograd convolutions can exceed the peak, because they "
        "multiply less than the plain definition, and steps whose data are in cache can exceed the slope."
        + (f" Steps without multiplications, {still:.0%} of the time, are not shown." if still else ""),
        legend(zip(_styles(names), names, strict=True)),
        plot.svg(),
        _details("Kernels of every stage", table(KERNEL_COLUMNS, kernels, text_columns=2)) if kernels else "",
    )


def _roof(peaks: Peaks, dots: Sequence[tuple[float, float]]) -> Plot:
    """Axes with room for the dots (operations per byte, GFLOP/s), and the machine's peaks."""
    ridge = peaks.gflops / peaks.copy_gbs
    left, right = 0.5 * min(ridge, *(x for x, _ in dots)), 2 * max(ridge, *(x for x, _ in dots))
    bottom = 0.5 * min(*(y for _, y in dots), peaks.gflops)
    top = 1.6 * max(*(y for _, y in dots), peaks.gflops)
    plot = Plot(
        Axis("operations per byte", left, right, log=True),
        Axis("GFLOP/s", bottom, top, log=True),
        "roofline",
        380,
    )
    start = max(left, bottom / peaks.copy_gbs)
    plot.line([(start, start * peaks.copy_gbs), (ridge, peaks.gflops), (right, peaks.gflops)], "roof")
    plot.label(right, peaks.gflops, f"{peaks.gflops:,.0f} GFLOP/s, matrix product", left=True, row=-1)
    return plot


def _radius(share: float) -> float:
    """Pixels, so that the area of a dot is the share of the time."""
    return 3 + 28 * math.sqrt(share)


def _longest_kinds(steps: Sequence[tuple[StepTiming, float]]) -> list[tuple[float, float, float, str]]:
    """The kinds of steps that take the most time, each at its longest step."""
    kinds: dict[str, list[tuple[StepTiming, float]]] = {}
    for step, share in steps:
        kinds.setdefault(step.operation.partition(" + ")[0].partition(" -> ")[0], []).append((step, share))
    longest = sorted(kinds, key=lambda name: -sum(share for _, share in kinds[name]))[:_NAMED_STEPS]
    found = []
    for name in longest:
        step, own = max(kinds[name], key=lambda pair: pair[1])
        words = f"{name}, {sum(share for _, share in kinds[name]):.0%}"
        found.append((2 * step.macs / step.bytes_per_image, step.gflops, _radius(own), words))
    return found


def _paced(measured: Benchmark) -> str:
    return _section(
        "Calls when they come",
        "A server's calls come after pauses, when caches are cold and threads asleep. The last column is the "
        "median over that of calls in a loop.",
        table(PACED_COLUMNS, paced_cells(measured)),
    )


def _what_if(measured: Benchmark) -> str:
    rows = (
        (
            row.change,
            f"{row.images_per_s:,.0f}",
            f"{row.mean_macs:,.0f}",
            " / ".join(f"{share:.0%}" for share in row.exit_shares),
        )
        for row in measured.what_if
    )
    return _section(
        "What if",
        "Other operating points, stages left out and other precisions, predicted from the stages' times.",
        table(("change", "images/s", "MACs per image", "exit shares"), rows),
    )
