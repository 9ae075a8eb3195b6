"""The targets this project holds itself to, read off a results file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.engines import AVX2_OURS, AVX2_PEER, FP32_PEERS, LAST, ONE_THREAD, OURS
from bench.ratios import Ratio, ratio

__all__ = ["TARGETS", "Target", "target_table"]

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A speed that one engine must have beside others in the same run.

    Attributes:
        work: what it is about.
        case: beginning of the case's key, see ``Case.key``.
        ours: the engine that is held to it.
        others: the fastest of these is the measure.
        wanted: the least ratio of speeds.
    """

    work: str
    case: str
    others: tuple[str, ...]
    wanted: float
    ours: str = OURS

    def measured(self, results: Mapping[str, Any]) -> tuple[str, Ratio] | None:
        """The fastest of the others and the ratio over it; None where one side was not measured."""
        entries = [entry for key, entry in results["cases"].items() if key.startswith(self.case)]
        if not entries:
            return None
        timed = {name: row for name, row in entries[0]["engines"].items() if "refused" not in row}
        others = [name for name in self.others if name in timed]
        if self.ours not in timed or not others:
            return None
        best = max(others, key=lambda name: float(timed[name]["images_per_s"]))
        return best, ratio(timed[self.ours]["seconds_per_image"], timed[best]["seconds_per_image"])


def _dense(depth: int, batch: int, wanted: float) -> Target:
    return Target(
        f"ResNet-{depth}, batch {batch}: best fp32 peer",
        f"resnet_cifar:{depth} batch {batch} ",
        FP32_PEERS,
        wanted,
    )


TARGETS: tuple[Target, ...] = (
    *(_dense(depth, 256, 2.5) for depth in (20, 56, 110)),
    *(_dense(depth, 8, wanted) for depth, wanted in ((20, 2.8), (56, 2.8), (110, 2.4))),
    *(_dense(depth, 1, 2.5) for depth in (20, 56, 110)),
    *(
        Target(
            f"ResNet-{depth}, batch 256: the peers' bf16",
            f"resnet_cifar:{depth} batch 256 ",
            ("OpenVINO bf16",),
            1.0,
        )
        for depth in (20, 56, 110)
    ),
    *(
        Target(
            f"ResNet-{depth}, batch 1: latency mode over one thread",
            f"resnet_cifar:{depth} batch 1 ",
            (ONE_THREAD,),
            1.4,
        )
        for depth in (20, 56, 110)
    ),
    *(
        Target(
            f"ResNet-{depth}, batch 256: two threads over one",
            f"resnet_cifar:{depth} batch 256 ",
            (ONE_THREAD,),
            1.9,
        )
        for depth in (20, 56, 110)
    ),
    *(
        Target(
            f"ResNet-{depth}, batch 256, AVX2: OpenVINO on AVX2",
            f"resnet_cifar:{depth} batch 256 ",
            (AVX2_PEER,),
            2.0,
            AVX2_OURS,
        )
        for depth in (20, 56)
    ),
)


def cascade_targets(results: Mapping[str, Any]) -> list[Target]:
    """The targets of the cascade that was measured, whatever its folder is called."""
    targets = []
    for key in results["cases"]:
        name, found, rest = key.partition(" batch ")
        batch = rest.split()[0]
        if not found or not name.startswith("cascade:") or batch not in ("8", "256"):
            continue
        case = f"{name} batch {batch} "
        targets.append(Target(f"cascade, batch {batch}: best hand-written one", case, FP32_PEERS, 2.5))
        targets.append(
            Target(f"cascade, batch {batch}: plain eager, last network on everything", case, (LAST,), 20.0)
        )
    return targets


def target_table(results: Mapping[str, Any]) -> Table:
    """Every target with what was measured, and whether it passes or how far it is."""
    table = Table(title="Targets: how many times faster, in the same run", title_justify="left")
    for column in ("work", "beside", "target", "measured", ""):
        table.add_column(column, justify="right" if column in ("target", "measured") else "left")
    for target in (*TARGETS, *cascade_targets(results)):
        found = target.measured(results)
        if found is None:
            table.add_row(target.work, "", f"≥ {target.wanted:g}×", "", "not measured")
            continue
        beside, value = found
        verdict = (
            "pass" if value.value >= target.wanted else f"{value.value / target.wanted:.0%} of the target"
        )
        table.add_row(target.work, beside, f"≥ {target.wanted:g}×", str(value), verdict)
    return table
