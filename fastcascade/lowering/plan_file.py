"""Saving and loading of plans. The file format is the fields of the plan's dataclasses and their types.

Loading checks the type of every field. The plan then checks itself: every value is defined before use, shapes
are recomputed, weights have the right size.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor

from fastcascade.errors import FileFormatError, InvalidArgument, LoweringError
from fastcascade.lowering.plan import Plan
from fastcascade.storage.bundle import BundleFormat, load_bundle, save_bundle
from fastcascade.storage.codec import Reader, encode

__all__ = ["FORMAT", "load_plan", "save_plan"]

FORMAT = BundleFormat("plan", 1)


def save_plan(plan: Plan, directory: str | Path, overwrite: bool = False) -> None:
    """Save a plan; see :meth:`fastcascade.lowering.plan.Plan.save`."""
    for stage in plan.stages:
        if stage.module is not None:
            raise LoweringError(
                f"stage {stage.name!r} cannot be saved: it is opaque ({stage.opaque_reason}); "
                "save the cascade itself with cascade.save"
            )
        if stage.selector is not None and stage.selector.module is not None:
            raise LoweringError(
                f"the selector of stage {stage.name!r} cannot be saved: it is your own code; "
                "save the cascade itself with cascade.save"
            )
    tensors: dict[str, Tensor] = {}
    save_bundle(directory, FORMAT, encode(plan, tensors), tensors, overwrite=overwrite)


def load_plan(directory: str | Path) -> Plan:
    """Load a saved plan, without any of the model's code.

    Raises:
        FileFormatError: missing, damaged, not a valid plan, or written by a newer version.

    Example:
        >>> import tempfile
        >>> import fastcascade as fc
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> plan = fc.plan(fc.Cascade([resnet_cifar(8)], None, num_classes=10, input_shape=(3, 32, 32)))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     plan.save(directory)
        ...     len(load_plan(directory).stages[0].ops)
        14
    """
    content, tensors = load_bundle(directory, FORMAT)
    reader = Reader(tensors)
    try:
        plan = cast(Plan, reader.decode(Plan, content, "plan"))
    except InvalidArgument as error:
        raise FileFormatError(f"{directory} does not contain a valid plan: {error}") from error
    if reader.unused:
        raise FileFormatError(
            f"{directory} contains tensors that the plan does not use: {sorted(reader.unused)[:5]}"
        )
    return plan
