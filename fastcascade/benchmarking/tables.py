"""Tables of a benchmark for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastcascade.benchmarking.pacing import loop_of
from fastcascade.benchmarking.results import Benchmark, Spread, StepTiming
from fastcascade.text import plain

__all__ = ["KERNEL_COLUMNS", "PACED_COLUMNS", "bench_tables", "kernel_cells", "paced_cells"]

KERNEL_COLUMNS = (
    "stage",
    "kernel",
    "steps",
    "µs",
    "of stage",
    "GFLOP/s",
    "of peak",
    "GB/s",
    "of copy",
)

PACED_COLUMNS = ("pattern", "calls", "p50 ms", "p95 ms", "p99 ms", "over the loop")


def bench_tables(measured: Benchmark) -> list[Table]:
    """Tables for ``rich``: stages, batch sizes and time; kernels, threads, peers and what-ifs where measured.

    Stage names may come from an untrusted file and are shown as plain text.
    """
    tables = [_stages(measured), _batches(measured), _paced(measured), _time(measured)]
    if any(stage.steps for stage in measured.stages):
        tables.append(_kernels(measured))
    if measured.threads:
        tables.append(_threads(measured))
    if measured.peers:
        tables.append(_peers(measured))
    if measured.what_if:
        tables.append(_what_if(measured))
    return tables


def _new(title: str, columns: Sequence[str], caption: str | None = None, text_columns: int = 1) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,  # ten columns in eighty characters
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < text_columns else "right", overflow="fold")
    return table


def _stages(measured: Benchmark) -> Table:
    peaks = measured.peaks
    columns = "stage|images in|out|ms|exit µs|images/s|GFLOP/s|of peak|KB|of copy"
    table = _new(
        f"Each stage alone, {measured.backend} {measured.precision}, {measured.images:,} images",
        columns.split("|"),
        f"exit µs and KB per image; peaks in this run: {peaks.gflops:,.0f} GFLOP/s (matrix product), "
        f"{peaks.copy_gbs:.0f} GB/s (copy); warm-up: packing {1e3 * measured.compile_s:.0f} ms, first "
        f"call {measured.first_call_ms:.1f} ms; largest error against the reference {measured.max_error:.0e}",
    )
    for stage in measured.stages:
        table.add_row(
            plain(stage.name),
            f"{stage.images_in:,}",
            f"{stage.images_out:,}",
            f"{stage.ms:.1f}",
            f"{1e3 * stage.exit_ms_per_image.median:.2f}",
            f"{stage.images_per_s:,.0f}",
            f"{stage.gflops:,.0f}",
            f"{stage.gflops_share:.0%}",
            f"{stage.bytes_per_image / 1e3:.1f}",
            f"{stage.bandwidth_share:.0%}",
        )
    return table


def _batches(measured: Benchmark) -> Table:
    columns = "batch|images/s|±|p50 ms|p95 ms|p99 ms|schedule efficiency|dense images/s|η"
    table = _new(
        f"The cascade at {measured.mac_share:.0%} of the dense MACs",
        columns.split("|"),
        f"η: time saved over MACs saved; {_energy(measured)}",
    )
    for batch in measured.batches:
        table.add_row(
            str(batch.batch),
            f"{batch.images_per_s.median:,.0f}",
            _half_spread(batch.images_per_s),
            *(f"{batch.latency_ms[name]:.3g}" for name in ("p50", "p95", "p99")),
            f"{batch.schedule_efficiency.median:.3f}",
            f"{batch.dense_images_per_s.median:,.0f}",
            "–" if batch.saving is None else f"{batch.saving:.2f}",
        )
    return table


def _paced(measured: Benchmark) -> Table:
    table = _new(
        "Calls when they come",
        PACED_COLUMNS,
        "8 images a call, or 1 to 8 (mixed); Poisson: 30 calls a second; after torch: straight after an "
        "operation on a million numbers",
    )
    for cells in paced_cells(measured):
        table.add_row(*cells)
    return table


def paced_cells(measured: Benchmark) -> list[tuple[str, ...]]:
    """One row of :data:`PACED_COLUMNS` per pattern."""
    medians = {timing.pattern: timing.latency_ms["p50"] for timing in measured.paced}
    return [
        (
            timing.pattern,
            str(timing.calls),
            *(f"{timing.latency_ms[name]:.2f}" for name in ("p50", "p95", "p99")),
            f"{timing.latency_ms['p50'] / medians[loop_of(timing.pattern)]:.2f}×",
        )
        for timing in measured.paced
    ]


def _energy(measured: Benchmark) -> str:
    if measured.energy_mj_per_image is None:
        return measured.energy_note
    return f"{measured.energy_mj_per_image:.2f} mJ per image ({measured.energy_note})"


def _time(measured: Benchmark) -> Table:
    table = _new(
        "Where the time of an image goes, µs",
        ("batch", "stages", "exit heads", "compaction, call", "idle", "together"),
        f"timed from outside: reading the clocks adds {measured.instrumentation_share:.2%} to the shortest "
        "call; calls that are not timed pay nothing",
    )
    for batch in measured.batches:
        parts = (
            batch.stages_ms_per_image,
            batch.exits_ms_per_image,
            batch.compaction_ms_per_image,
            batch.idle_ms_per_image,
        )
        table.add_row(
            str(batch.batch),
            *(f"{1e3 * part.median:.2f}" for part in parts),
            f"{1e6 / batch.images_per_s.median:.2f}",
        )
    return table


def _kernels(measured: Benchmark) -> Table:
    table = _new(
        "Kernels: the steps of each stage alone, all threads at work",
        KERNEL_COLUMNS,
        "µs per image; bytes read and written, mostly in cache, so a step can exceed the speed of the copy; "
        "a Winograd convolution multiplies less than is counted, so it can exceed the peak",
        text_columns=2,
    )
    for stage, *cells in kernel_cells(measured):
        table.add_row(plain(stage), *map(plain, cells))
    return table


def kernel_cells(measured: Benchmark) -> list[tuple[str, ...]]:
    """One row of :data:`KERNEL_COLUMNS` per stage and kernel, in the order of stages, longest first."""
    rows: list[tuple[str, ...]] = []
    for stage in measured.stages:
        by_kernel: dict[str, list[StepTiming]] = {}
        for step in stage.steps:
            by_kernel.setdefault(step.kernel, []).append(step)
        whole = _ms(stage.steps)
        for kernel, steps in sorted(by_kernel.items(), key=lambda item: -_ms(item[1])):
            ms = _ms(steps)
            gflops = 2e-6 * sum(step.macs for step in steps) / ms
            gbs = 1e-6 * sum(step.bytes_per_image for step in steps) / ms
            rows.append(
                (
                    stage.name,
                    kernel,
                    str(len(steps)),
                    f"{1e3 * ms:.2f}",
                    f"{ms / whole:.0%}",
                    f"{gflops:,.0f}" if gflops else "–",
                    f"{gflops / measured.peaks.gflops:.0%}" if gflops else "–",
                    f"{gbs:.1f}",
                    f"{gbs / measured.peaks.copy_gbs:.0%}",
                )
            )
    return rows


def _ms(steps: Sequence[StepTiming]) -> float:
    return sum(step.ms_per_image.median for step in steps)


def _peers(measured: Benchmark) -> Table:
    sizes = [batch.batch for batch in measured.batches]
    table = _new("Images/s beside plain PyTorch", ("", *(f"batch {size}" for size in sizes)))
    own = {"this engine": {batch.batch: batch.images_per_s for batch in measured.batches}}
    for name, rates in (own | measured.peers).items():
        table.add_row(
            plain(name), *(f"{rates[size].median:,.0f} ±{_half_spread(rates[size])}" for size in sizes)
        )
    return table


def _threads(measured: Benchmark) -> Table:
    table = _new(
        f"Threads, batch {measured.batches[-1].batch}", ("threads", "images/s", "±", "over the first")
    )
    first = next(iter(measured.threads.values())).median
    for count, rate in measured.threads.items():
        table.add_row(str(count), f"{rate.median:,.0f}", _half_spread(rate), f"{rate.median / first:.2f}×")
    return table


def _what_if(measured: Benchmark) -> Table:
    now = measured.batches[-1].images_per_s.median
    table = _new(
        f"What if: predicted from the stages' times, batch {measured.batches[-1].batch}",
        ("change", "images/s", "against now", "MACs/image", "exit shares"),
    )
    for row in measured.what_if:
        table.add_row(
            plain(row.change),
            f"{row.images_per_s:,.0f}",
            f"{row.images_per_s / now:.2f}×",
            f"{row.mean_macs:,.0f}",
            " / ".join(f"{share:.0%}" for share in row.exit_shares),
        )
    return table


def _half_spread(spread: Spread) -> str:
    return f"{(spread.high - spread.low) / 2 / spread.median:.0%}"
