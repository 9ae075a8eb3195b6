"""Writes the tables of docs/coverage.md from bench/results/coverage/networks.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from bench.architectures import ARCHITECTURES, ATTENTION
from bench.machine import ROOT
from bench.tables import markdown_table, write_tables

__all__ = ["verdict", "write_page"]

PAGE = ROOT / "docs" / "coverage.md"
ALLOWED_ERROR = 10
"""Times torch's own error in fp32. Winograd convolutions may reach 6."""

Results = Mapping[str, Any]
Entry = Mapping[str, Any]


def verdict(entry: Entry) -> str:
    """How a network runs, in words."""
    if "failed" in entry:
        return f"failed: {entry['failed']}"
    if is_wrong(entry):
        return f"wrong: error {entry['error']:.1e}, torch's {entry['torch_error']:.1e}"
    if entry["opaque_reason"] is not None:
        return f"opaque: {entry['opaque_reason']}"
    return "operations in torch" if entry["isa"] == "torch" else f"operations on the engine, {entry['isa']}"


def is_wrong(entry: Entry) -> bool:
    """Whether the results are further from float64's than torch's in fp32 could be."""
    errors = [entry["error"], entry["plan_error"] or 0.0]
    return not all(error <= ALLOWED_ERROR * entry["torch_error"] for error in errors)


def _convolutional(results: Results) -> dict[str, Entry]:
    """The entries of the convolutional networks that were examined, in the page's order."""
    names = [name for family in ARCHITECTURES.values() for name in family]
    return {name: results["networks"][name] for name in names if name in results["networks"]}


def summary_table(results: Results) -> str:
    """How many networks run how."""
    entries = _convolutional(results).values()
    good = [entry for entry in entries if "failed" not in entry and not is_wrong(entry)]
    lowered = [entry for entry in good if entry["opaque_reason"] is None]
    engine = [entry for entry in lowered if entry["isa"] != "torch"]
    rows = [
        ("convolutional networks", str(len(entries))),
        ("lowered to operations", f"{len(lowered)} ({len(lowered) / max(len(entries), 1):.0%})"),
        ("of these, on the CPU engine", str(len(engine))),
        ("of these, in torch", str(len(lowered) - len(engine))),
        ("opaque", str(len(good) - len(lowered))),
        ("wrong", str(sum("failed" not in entry and is_wrong(entry) for entry in entries))),
        ("failed", str(sum("failed" in entry for entry in entries))),
        ("measured", _period(results)),
        ("processor", f"{results['machine']['cpu']}, {results['machine']['threads']} threads"),
    ]
    return markdown_table(("", ""), rows)


def _period(results: Results) -> str:
    when = sorted(entry["when"] for entry in results["networks"].values() if "when" in entry)
    return f"{when[0][:10]} … {when[-1][:10]}" if when else "not yet"


def networks_table(results: Results) -> str:
    """Every convolutional network, by family."""
    rows = []
    for family, names in ARCHITECTURES.items():
        present = [name for name in names if name in results["networks"]]
        rows += [
            (family if name == present[0] else "", *_row(name, results["networks"][name])) for name in present
        ]
    head = ("family", "network", "M MACs", "runs", "error", "torch's", "plan s", "compile s")
    return markdown_table(head, rows)


def attention_table(results: Results) -> str:
    """The networks with attention."""
    present = [name for name in ATTENTION if name in results["networks"]]
    rows = [_row(name, results["networks"][name]) for name in present]
    head = ("network", "M MACs", "runs", "error", "torch's", "plan s", "compile s")
    return markdown_table(head, rows)


def _row(name: str, entry: Entry) -> tuple[str, ...]:
    if "failed" in entry:
        return (_title(name), "", verdict(entry), *[""] * 4)
    seconds = (f"{entry[key]:.1f}" for key in ("plan_s", "compile_s"))
    errors = (f"{entry[key]:.0e}" for key in ("error", "torch_error"))
    return (_title(name), f"{entry['macs'] / 1e6:,.0f}", verdict(entry), *errors, *seconds)


def reasons_table(results: Results) -> str:
    """Why networks were not lowered, with the number of networks."""
    reasons = Counter(entry.get("opaque_reason") for entry in _convolutional(results).values())
    rows = [(reason, str(count)) for reason, count in reasons.most_common() if reason]
    return markdown_table(("reason", "networks"), rows) if rows else "All of them were lowered."


def operations_table(results: Results) -> str:
    """In how many networks every operation occurs."""
    used = Counter(
        operation for entry in _convolutional(results).values() for operation in entry.get("operations", ())
    )
    return markdown_table(("operation", "networks"), ((name, str(n)) for name, n in used.most_common()))


def speed_table(results: Results) -> str:
    """Images/s beside the peers, where they were timed."""
    rows = []
    for name, entry in results["networks"].items():
        for batch, speeds in entry.get("speed", {}).items():
            rates = {engine: rate for engine, rate in speeds.items() if isinstance(rate, float)}
            ours = rates.pop("fastcascade", None)
            best = max(rates, key=rates.__getitem__, default="")
            ratio = f"{ours / rates[best]:.2f}" if ours and best else "–"
            peer = f"{rates[best]:,.0f} ({best})" if best else "–"
            rows.append((_title(name), batch, f"{ours:,.0f}" if ours else "–", peer, ratio))
    missing = sum("speed" not in entry for entry in results["networks"].values())
    table = markdown_table(("network", "batch", "fastcascade", "best peer", "ratio"), rows)
    note = f"Not measured: {missing} of {len(results['networks'])} networks."
    return f"{table}\n\n{note}" if rows else note


def _title(name: str) -> str:
    library, _, model = name.partition(":")
    return f"{library} `{model}`"


TABLES: dict[str, Callable[[Results], str]] = {
    "summary": summary_table,
    "networks": networks_table,
    "attention": attention_table,
    "reasons": reasons_table,
    "operations": operations_table,
    "speed": speed_table,
}


def write_page(results: Results) -> None:
    """Rewrite the tables of docs/coverage.md."""
    PAGE.write_text(write_tables(PAGE.read_text(), results, TABLES))
