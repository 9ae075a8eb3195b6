"""Writes the tables of docs/performance.md and README.md from a results file.

``make bench-docs`` (``python -m bench.tables bench/results/<machine>.json``) replaces the text between
``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.engines import BEST_LAST, FP32_PEERS, OURS, PYTORCH
from bench.machine import ROOT
from bench.quantized_peers import INT8_PEERS
from bench.ratios import ratio
from bench.targets import target_rows
from bench.worker import OURS_INT8

__all__ = ["TABLES", "main", "markdown_table", "write_tables"]

DOCUMENTS = (ROOT / "docs" / "performance.md", ROOT / "docs" / "int8.md", ROOT / "README.md")
_SECTION = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Results = Mapping[str, Any]


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    columns = list(head)
    return "\n".join([line(columns), line("---" for _ in columns), *map(line, rows)])


def machine_table(results: Results) -> str:
    """The machine, its software, and when it was measured."""
    machine = results["machine"]
    when = sorted(entry["when"] for entry in results["cases"].values())
    rows = [
        ("processor", f"{machine['cpu']}, {machine['threads']} threads"),
        ("instruction sets", ", ".join(machine["flags"])),
        ("system", machine["platform"]),
        ("packages", ", ".join(f"{name} {version}" for name, version in machine["packages"].items())),
        ("measured", f"{when[0]} … {when[-1]}" if when else "not yet"),
    ]
    return markdown_table(("", ""), rows)


def peaks_table(results: Results) -> str:
    """Peaks measured before each case."""
    names = sorted({name for e in results["cases"].values() for name in e["peaks"]} - {"threads"})
    rows = [
        (_title(key), *(f"{entry['peaks'].get(name, 0):,.0f}" for name in names))
        for key, entry in results["cases"].items()
    ]
    return markdown_table(("case", *(name.replace("_", " ") for name in names)), rows)


def targets_table(results: Results) -> str:
    """Every target, with pass or distance."""
    rows = ((r.work, r.wanted, r.measured, r.verdict, r.beside) for r in target_rows(results))
    return markdown_table(("work", "target", "measured", "verdict", "beside"), rows)


def engines_table(results: Results) -> str:
    """Every engine in every case; a refused one with its reason."""
    rows = []
    for key, entry in results["cases"].items():
        peak = max(value for name, value in entry["peaks"].items() if name.startswith("fp32"))
        engines = entry["engines"].values()
        for engine in sorted(engines, key=lambda row: -row.get("images_per_s", 0)):
            if "refused" in engine:
                reason = engine["refused"].splitlines()[0]
                rows.append((_title(key), engine["engine"], "–", "", "", "", "", f"refused: {reason}"))
                continue
            rows.append(
                (
                    _title(key),
                    engine["engine"],
                    f"{engine['images_per_s']:,.0f}",
                    f"{engine['spread'] / 2:.1%}",
                    f"{engine['gflops']:,.0f}",
                    f"{engine['gflops'] / peak:.0%}",
                    f"{engine['gate']['max_error']:.0e}",
                    engine["schedule"],
                )
            )
    return markdown_table(
        ("case", "engine", "images/s", "±", "GFLOP/s", "of peak", "error", "schedule"), rows
    )


def speeds_table(results: Results) -> str:
    """Images/s at batch 256: ours, each fp32 runtime, and the fastest fp32 engine of PyTorch.

    PyTorch runs the last network of a cascade on every image.
    """
    runtimes = [name for name in FP32_PEERS if name not in PYTORCH]
    rows = []
    for key, entry in sorted(results["cases"].items(), key=lambda case: case[0].startswith("cascade:")):
        if " batch 256 " in key:
            rates = {name: e["images_per_s"] for name, e in entry["engines"].items() if "refused" not in e}
            columns = [rates.get(name) for name in (OURS, *runtimes)]
            pytorch = max((rates[name] for name in (*PYTORCH, *BEST_LAST) if name in rates), default=None)
            cells = ["–" if rate is None else f"{rate:,.0f}" for rate in (*columns, pytorch)]
            rows.append((_title(key).removesuffix(", batch 256"), *cells))
    return markdown_table(("network", OURS, *runtimes, "PyTorch"), rows)


def slower_table(results: Results) -> str:
    """Peers that were faster than this engine on the same threads."""
    rows = []
    for key, entry in results["cases"].items():
        timed = {name: e["images_per_s"] for name, e in entry["engines"].items() if "refused" not in e}
        ours = timed.get("fastcascade", 0)
        others = {name: rate for name, rate in timed.items() if not name.startswith("fastcascade")}
        rows += [
            (_title(key), name, f"{rate / ours:.2f}×") for name, rate in others.items() if 0 < ours < rate
        ]
    return markdown_table(("case", "peer", "faster by"), rows) if rows else "In none of the cases above."


def stages_table(results: Results) -> str:
    """The stages of the cascade alone."""
    facts = results["facts"].get("schedule")
    if facts is None or "refused" in facts:
        return "Not measured yet."
    rows = (
        (
            stage["name"],
            f"{stage['images_in']:,}",
            f"{stage['images_out']:,}",
            f"{1e3 * stage['ms_per_image']['median']:.1f}",
            f"{1e3 * stage['exit_ms_per_image']['median']:.2f}",
            f"{stage['gflops']:,.0f}",
            f"{stage['bytes_per_image'] / 1e3:.1f}",
        )
        for stage in facts["stages"]
    )
    return markdown_table(("stage", "images in", "out", "µs/image", "exit µs", "GFLOP/s", "KB/image"), rows)


def time_table(results: Results) -> str:
    """The cascade's time, part by part, by batch size."""
    facts = results["facts"].get("schedule")
    if facts is None or "refused" in facts:
        return "Not measured yet."
    parts = ("stages", "exits", "compaction", "idle")
    rows = (
        (
            str(batch["batch"]),
            *(f"{1e3 * batch[f'{part}_ms_per_image']['median']:.2f}" for part in parts),
            *(f"{batch['latency_ms'][p]:.2f}" for p in ("p50", "p95", "p99")),
            f"{batch['schedule_efficiency']['median']:.3f}",
            "–" if batch["saving"] is None else f"{batch['saving']:.2f}",
        )
        for batch in facts["batches"]
    )
    head = (
        "batch",
        *(f"{part}, µs/image" for part in parts),
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "efficiency",
        "η",
    )
    return markdown_table(head, rows)


def paced_table(results: Results) -> str:
    """Latencies by pattern of calls: p50, p95 and p99 of every engine."""
    facts = results.get("paced")
    if facts is None:
        return "Not measured yet."
    engines = {name: e for name, e in facts["engines"].items() if "refused" not in e}
    patterns = next(iter(engines.values()), {})

    def cell(latency: Mapping[str, float]) -> str:
        return " / ".join(f"{latency[p]:.2f}" for p in ("p50", "p95", "p99"))

    rows = [(pattern, *(cell(e[pattern]) for e in engines.values())) for pattern in patterns]
    refused = facts["engines"].keys() - engines.keys()
    note = f"\n\nRefused: {', '.join(sorted(refused))}." if refused else ""
    return markdown_table((f"ms, {facts['calls']} calls", *engines), rows) + note


def int8_table(results: Results) -> str:
    """Images/s in int8: ours and the other runtimes', and ours in fp32."""
    cases = results.get("int8")
    if not cases:
        return "Not measured yet."
    peers = [peer.name for peer in INT8_PEERS]
    rows = []
    for key, entry in cases.items():
        engines = {name: e for name, e in entry["engines"].items() if "refused" not in e}
        rates = [engines[n]["images_per_s"] if n in engines else None for n in (OURS, OURS_INT8, *peers)]
        others = [name for name in peers if name in engines]
        compared = "–"
        if others and OURS_INT8 in engines:
            best = max(others, key=lambda name: float(engines[name]["images_per_s"]))
            compared = str(ratio(engines[OURS_INT8]["seconds_per_image"], engines[best]["seconds_per_image"]))
        rows.append((_title(key), *("–" if r is None else f"{r:,.0f}" for r in rates), compared))
    return markdown_table(("case", "fastcascade fp32", OURS_INT8, *peers, "over the best"), rows)


def _title(key: str) -> str:
    """A case as readers know it."""
    model, _, rest = key.partition(" batch ")
    name = "cascade" if model.startswith("cascade:") else model.replace("resnet_cifar:", "ResNet-")
    name = name.removeprefix("torchvision:").removesuffix("?calm")
    if name.startswith("last:"):
        name = f"last network of {name.removeprefix('last:').removesuffix('/model')}"
    return f"{name}, batch {rest.split()[0]}"


TABLES: dict[str, Callable[[Results], str]] = {
    "machine": machine_table,
    "peaks": peaks_table,
    "targets": targets_table,
    "engines": engines_table,
    "speeds": speeds_table,
    "slower": slower_table,
    "stages": stages_table,
    "time": time_table,
    "paced": paced_table,
    "int8": int8_table,
}


def write_tables(text: str, results: Results, tables: Mapping[str, Callable[[Results], str]] = TABLES) -> str:
    """The document with its tables replaced.

    Raises:
        KeyError: the document names an unknown table.
    """
    return _SECTION.sub(lambda match: f"{match[1]}{tables[match[2]](results)}\n{match[3]}", text)


def main() -> None:
    """Rewrite the documents."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="for example bench/results/<machine>.json")
    results = json.loads(parser.parse_args().results.read_text())
    for document in DOCUMENTS:
        document.write_text(write_tables(document.read_text(), results))


if __name__ == "__main__":
    main()
