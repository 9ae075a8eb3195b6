"""Compare a run with a stored results file, through a baseline that both measured. Indicative only.

A stored file is from another machine, or from this one under another load, so its times cannot be compared.
The ratio of our engine to a baseline of the same run can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.table import Table

from bench.worker import OURS

__all__ = ["PEAK", "Beside", "beside", "beside_table"]

PEAK = "fp32 peak"
"""The default baseline, which every case has. Others are names of engines."""


class Beside(NamedTuple):
    """One of our engines in one case, then and now.

    Attributes:
        then, now: its images/s.
        baseline: how many times faster the baseline is now; None unless both runs have it.
    """

    case: str
    engine: str
    then: float
    now: float
    baseline: float | None

    @property
    def ratio(self) -> float | None:
        """How many times faster now, at an equal baseline."""
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
    """GFLOP/s of the peak or images/s of an engine; None if missing or refused."""
    if name == PEAK:
        return max(value for key, value in entry["peaks"].items() if key.startswith("fp32"))
    speed: float | None = entry["engines"].get(name, {}).get("images_per_s")
    return speed


def beside_table(rows: list[Beside], file: str, baseline: str = PEAK) -> Table:
    """The comparison, marked as indicative."""
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
