"""Models and images that a command line names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastcascade.cli.arguments import Precision, Split, row_range
from fastcascade.errors import InvalidArgument

if TYPE_CHECKING:
    from fastcascade.data.image_data import ImageData
    from fastcascade.engine import CompiledCascade
    from fastcascade.lowering.plan import Plan
    from fastcascade.model.cascade import Cascade

__all__ = ["compile_model", "read_images", "read_model"]


def read_images(
    source: str, described: Cascade | Plan, split: Split = None, rows: str | None = None, resize: bool = False
) -> ImageData:
    """Images of the model's input size, labelled in the order of its classes."""
    from fastcascade.data.sources import load_data

    data = load_data(source, split, shape=described.input.shape, resize=resize, classes=described.classes)
    return data if rows is None else data.take(row_range(rows, len(data)))


def read_model(directory: Path) -> Cascade | Plan:
    """The saved cascade in a directory; its plan if there is no cascade, or one whose modules need code."""
    import fastcascade as fc
    from fastcascade.engine import load_model
    from fastcascade.lowering.plan_file import plan_exists
    from fastcascade.model.store import cascade_exists, plan_note

    if cascade_exists(directory):
        return load_model(directory) if plan_note(directory).custom_modules else fc.load(directory)
    return fc.load_plan(directory) if plan_exists(directory) else fc.load(directory)


def compile_model(
    model: Cascade | Plan | Path, backend: str, precision: Precision, threads: int | None
) -> CompiledCascade:
    """Compile a model, or what a directory holds; int8 only if it is quantised already."""
    import fastcascade as fc
    from fastcascade.engine import load_model
    from fastcascade.lowering.plan import Plan

    model = load_model(model) if isinstance(model, Path) else model
    if precision == "int8" and not (isinstance(model, Plan) and model.is_quantized):
        raise InvalidArgument(
            "--precision int8 needs a quantised model; `fastcascade quantize MODEL DATA --out DIR` makes one"
        )
    return fc.compile(model, backend=backend, precision=precision, threads=threads)
