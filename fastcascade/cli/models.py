"""Commands that make, change or describe a model: ``train``, ``calibrate``, ``inspect``, ``quantize``…"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from fastcascade.cli.arguments import Model, Overwrite, Resize, RowRange, Source, Split
from fastcascade.cli.loading import compile_model, read_images, read_model
from fastcascade.cli.output import comparison_table, operating_points_table, say
from fastcascade.text import plain, printable

if TYPE_CHECKING:
    from fastcascade.engine import CompiledCascade
    from fastcascade.model.cascade import Cascade

__all__ = ["calibrate", "choose", "export", "inspect", "quantize", "train"]


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file; docs/config.md lists its keys")
    ],
    data: Source,
    out: Annotated[
        Path, typer.Option(help="output directory: checkpoint/ during training, model/ at the end")
    ],
    overwrite: Overwrite = False,
) -> None:
    """Train, calibrate and save a cascade. An interrupted run resumes when the command is repeated."""
    from fastcascade.training.config import train_from_config

    cascade = train_from_config(config, data, out, overwrite=overwrite)
    Console().print(operating_points_table(cascade.operating_points, cascade.dense_macs))
    say("saved:", str(out / "model"))


def calibrate(
    model: Model,
    data: Source,
    name: Annotated[str, typer.Option(help="name of the operating point")] = "default",
    budget_macs: Annotated[float | None, typer.Option(help="highest accuracy at this mean cost")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="lowest cost at this accuracy, 0 to 1")] = None,
    max_risk: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="EPS DELTA",
            help="label differs from the last exit's at a rate ≤ EPS, with probability ≥ 1 − DELTA",
        ),
    ] = None,
    split: Split = None,
    rows: RowRange = None,
    resize: Resize = False,
    precision: Annotated[
        Literal["bf16"] | None,
        typer.Option(help="measure in bf16, for which alone the operating point then serves"),
    ] = None,
) -> None:
    """Choose stop thresholds on held-out images, for one target, and store them in the saved model."""
    import fastcascade as fc
    from fastcascade.model.store import cascade_exists

    # A plan beside a cascade must not get points that the cascade lacks.
    loaded = fc.load(model) if cascade_exists(model) else read_model(model)
    measured: Cascade | CompiledCascade
    if isinstance(loaded, fc.Cascade) and precision is None:
        measured = loaded
    else:
        measured = compile_model(loaded, "auto", precision, None)
    images = read_images(data, loaded, split, rows, resize)
    point = fc.calibrate(
        measured, images, name, budget_macs=budget_macs, min_accuracy=min_accuracy, max_risk=max_risk
    )
    if isinstance(loaded, fc.Cascade):
        loaded.operating_points[name] = point
    else:
        loaded = dataclasses.replace(loaded, operating_points={**loaded.operating_points, name: point})
    loaded.save(model, overwrite=True)
    Console().print(operating_points_table({name: point}, loaded.dense_macs))


def inspect(model: Model) -> None:
    """Print a saved cascade or plan: stages with operations and costs, classes, operating points."""
    from fastcascade.lowering.export import plan as lower
    from fastcascade.lowering.plan import Plan

    loaded = read_model(model)
    described = loaded if isinstance(loaded, Plan) else lower(loaded)
    console = Console(soft_wrap=True, highlight=False)
    for line in str(described).splitlines():
        console.print(plain(line))
    if not isinstance(loaded, Plan):
        console.print("temperatures:", " ".join(f"{t:.3f}" for t in loaded.temperatures.tolist()))
        if loaded.comparison is not None:
            console.print(comparison_table(loaded.comparison))
    if described.classes is not None:
        console.print("classes:", plain(", ".join(described.classes)))
    if described.operating_points:
        console.print(operating_points_table(described.operating_points, described.dense_macs))
        others = described.operating_points.keys() - described.usable_points().keys()
        if others:
            console.print(
                "measured at another precision, to be calibrated anew:", plain(", ".join(sorted(others)))
            )


def quantize(
    model: Model,
    data: Source,
    out: Annotated[Path, typer.Option(metavar="DIR", help="where the quantised plan goes")],
    precision: Annotated[
        str, typer.Option(metavar="P,P,…", help="int8, or int8 or fp32 for each stage")
    ] = "int8",
    split: Split = None,
    rows: RowRange = None,
    resize: Resize = False,
    overwrite: Overwrite = False,
) -> None:
    """Quantise a cascade to int8 on images like those to come, and save its plan; labels are not needed."""
    import fastcascade as fc

    loaded = read_model(model)
    names = precision.split(",")
    plan = fc.quantize(
        loaded,
        read_images(data, loaded, split, rows, resize),
        names[0] if len(names) == 1 else names,  # type: ignore[arg-type]
    )
    plan.save(out, overwrite=overwrite)
    table = Table("stage", "precision", "int8 layers", "largest error", "weights, KiB")
    for stage in plan.stages:
        errors = stage.layer_errors
        largest = f"{max(errors):.1%}" if errors else ""
        table.add_row(
            plain(stage.name), stage.precision, str(len(errors)), largest, f"{stage.weight_bytes / 1024:,.0f}"
        )
    Console().print(table)
    say("saved:", str(out))
    if plan.operating_points:
        say("note:", f"its operating points are those of fp32; now run: fastcascade calibrate {out} DATA …")


def export(
    model: Model,
    onnx: Annotated[Path, typer.Option(metavar="DIR", help="where the ONNX models go")],
    overwrite: Overwrite = False,
) -> None:
    """Write a cascade as ONNX models: one for single images, and one per stage with a script for batches."""
    from fastcascade.interchange.onnx_model import export_onnx
    from fastcascade.lowering.export import plan as lower
    from fastcascade.lowering.plan import Plan

    loaded = read_model(model)
    for path in export_onnx(loaded if isinstance(loaded, Plan) else lower(loaded), onnx, overwrite=overwrite):
        say("wrote", str(path))


def choose(
    pool: Annotated[
        Path,
        typer.Argument(
            metavar="POOL",
            help="npz file with logits (K, N, C), labels (N,), macs (K,) and, if you like, names (K,)",
        ),
    ],
    budget: Annotated[
        list[float] | None, typer.Option(help="mean cost per image; again for more; a curve if left out")
    ] = None,
    max_stages: Annotated[int, typer.Option(min=1, max=5, help="longest cascade")] = 3,
    folds: Annotated[int, typer.Option(min=2, help="of the cross-validation")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Which of many trained classifiers make the best cascade, from what they say on held-out images."""
    from fastcascade.evaluation.stage_choice import read_pool, stage_choices

    choices = stage_choices(**read_pool(pool), budgets=budget, max_stages=max_stages, folds=folds)
    if as_json:
        print(json.dumps([dataclasses.asdict(choice) for choice in choices], indent=1))
        return
    table = Table("budget", "stages", "combine", "thresholds", "held-out accuracy", "mean cost", "stop at")
    for c in choices:
        combine = c.combine if isinstance(c.combine, str) else " : ".join(f"{w:.2g}" for w in c.combine)
        table.add_row(
            f"{c.budget_macs:,.0f}",
            printable(" → ".join(c.names)),
            combine,
            " ".join(f"{t:.3f}" for t in c.thresholds),
            f"{c.held_out_accuracy:.2%}",
            f"{c.held_out_macs:,.0f}",
            " ".join(f"{share:.0%}" for share in c.exit_shares),
        )
    Console().print(table)
