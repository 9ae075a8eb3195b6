"""A run beside a stored results file: only through something that both measured, and indicative at that.

The machine of a stored file was another one, or the same one in another mood, so its times mean nothing here.
What can be said is how our engine stood to a baseline of its own run, then and now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.table import Table

from bench.worker import OURS

__all__ = ["PEAK", "Beside", "beside", "beside_table"]

PEAK = "fp32 peak"
"""The baseline that every case has; others are names of engines."""


class Beside(NamedTuple):
    """One of our engines in one case, then and now.

    Attributes:
        then, now: its images/s.
        baseline: how many times faster the baseline was now than then; None where not both runs have it.
    """

    case: str
    engine: str
    then: float
    now: float
    baseline: float | None

    @property
    def ratio(self) -> float | None:
        """How many times faster than then, had the baseline stayed the same."""
        return None if self.baseline is None else self.now / self.then / self.baseline


def beside(now: Mapping[str, Any], then: Mapping[str, Any], baseline: str = PEAK) -> list[Beside]:
    """Our engines in the cases that both runs measured.

    Args:
        now, then: the ``cases`` of results files.
        baseline: :data:`PEAK`, or the name of an engine in both.
    """
    rows = []
    for case in now.keys() & then.keys():
        before, after = _speed(then[case], baseline), _speed(now[case], baseline)
        change = after / before if after and before else None
        for engine in now[case]["engines"]:
            old, new = _speed(then[case], engine), _speed(now[case], engine)
            if engine.startswith(OURS) and engine != baseline and old and new:
                rows.append(Beside(case, engine, old, new, change))
    return sorted(rows)


def _speed(entry: Mapping[str, Any], name: str) -> float | None:
    """Of the peak in GFLOP/s, of an engine in images/s; None where it is missing or was refused."""
    if name == PEAK:
        return max(value for key, value in entry["peaks"].items() if key.startswith("fp32"))
    speed: float | None = entry["engines"].get(name, {}).get("images_per_s")
    return speed


def beside_table(rows: list[Beside], file: str, baseline: str = PEAK) -> Table:
    """The comparison, marked for what it is."""
    table = Table(
        title=f"INDICATIVE: now over {file}, scaled by the {baseline}",
        title_justify="left",
        caption="different runs, so no interval can be given; make bench-compare decides",
        caption_justify="left",
    )
    for column in (
        "case",
        "engine",
        "then, images/s",
        "now, images/s",
        "baseline, now/then",
        "scaled, now/then",
    ):
        table.add_column(column, justify="left" if column in ("case", "engine") else "right")
    for row in rows:
        scaled = "no baseline" if row.ratio is None else f"≈ {row.ratio:.2f}×"
        change = "–" if row.baseline is None else f"{row.baseline:.2f}×"
        table.add_row(row.case, row.engine, f"{row.then:,.0f}", f"{row.now:,.0f}", change, scaled)
    return table
