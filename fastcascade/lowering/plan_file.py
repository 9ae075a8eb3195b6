"""Plans as files. The fields of the plan's dataclasses and their types define the format.

Loading checks every value against the type of its field. The plan then checks itself: values are defined
before use, shapes are recomputed, weights have the right size.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fastcascade.errors import FileFormatError, InvalidArgument, LoweringError
from fastcascade.lowering.plan import Plan
from fastcascade.storage.bundle import PLAN_FORMAT, bundle_exists, bundle_sha256, load_bundle, save_bundle
from fastcascade.storage.codec import Reader, encode

__all__ = [
    "load_plan",
    "plan_exists",
    "plan_fingerprint",
    "plan_sha256",
    "require_savable",
    "save_plan",
]


def save_plan(plan: Plan, directory: str | Path, overwrite: bool = False) -> str:
    """Save a plan; see :meth:`fastcascade.lowering.plan.Plan.save`."""
    require_savable(plan)
    tensors: dict[str, Tensor] = {}
    return save_bundle(directory, PLAN_FORMAT, encode(plan, tensors), tensors, overwrite=overwrite)


def plan_exists(directory: str | Path) -> bool:
    """Whether a directory holds a completely saved plan."""
    return bundle_exists(directory, PLAN_FORMAT)


def plan_sha256(directory: str | Path) -> str | None:
    """The hash of the plan in a directory; None if there is no readable one."""
    return bundle_sha256(directory, PLAN_FORMAT)


def plan_fingerprint(plan: Plan) -> str:
    """sha256 of all that decides a plan's results but the operating points: structure, weights, modules."""
    tensors: dict[str, Tensor] = {}
    content = encode(replace(plan, operating_points={}), tensors)
    for k, stage in enumerate(plan.stages):
        selector = None if stage.selector is None else stage.selector.module
        for name, module in (("stage", stage.module), ("selector", selector)):
            if module is not None:
                content[f"{name} {k}"] = repr(module)
                tensors |= {f"{name} {k} {key}": value for key, value in module.state_dict().items()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_savable(plan: Plan) -> None:
    """Raise a LoweringError if a stage or selector of the plan is a module."""
    for stage in plan.stages:
        if stage.module is not None:
            raise LoweringError(
                f"stage {stage.name!r} cannot be saved: it is opaque ({stage.opaque_reason}); "
                "save the cascade itself with cascade.save"
            )
        if stage.selector is not None and stage.selector.module is not None:
            raise LoweringError(
                f"the selector of stage {stage.name!r} cannot be saved: it is a custom module; "
                "save the cascade itself with cascade.save"
            )


def load_plan(directory: str | Path) -> Plan:
    """Load a saved plan. The model's code is not needed, and nothing in the file is executed.

    Raises:
        FileFormatError: missing, damaged, not a valid plan, or written by a newer version.

    Example:
        >>> import tempfile
        >>> import fastcascade as fc
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> plan = fc.plan(fc.Cascade([resnet_cifar(8)], None, num_classes=10, input_shape=(3, 32, 32)))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = plan.save(directory)
        ...     len(load_plan(directory).stages[0].ops)
        14
    """
    content, tensors = load_bundle(directory, PLAN_FORMAT)
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
