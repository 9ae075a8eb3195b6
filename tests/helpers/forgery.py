"""Bundles edited as a forger would: with fresh, correct hashes, so that only the checks of values remain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor


def reseal(
    path: Path, change: Callable[[dict[str, Any]], object], tensors: dict[str, Tensor] | None = None
) -> None:
    """Edit a bundle's JSON file, and replace its tensors if given."""
    document = json.loads(path.read_text())
    change(document)
    if tensors is not None:
        data = safetensors.torch.save(tensors)
        sha256 = hashlib.sha256(data).hexdigest()
        document["tensors"]["sha256"] = sha256
        (path.parent / f"{path.stem}-{sha256}.safetensors").write_bytes(data)
    document.pop("sha256", None)
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**document, "sha256": hashlib.sha256(canonical).hexdigest()}))


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of the bundle with this JSON file."""
    (tensor_path,) = path.parent.glob(f"{path.stem}-*.safetensors")
    return safetensors.torch.load(tensor_path.read_bytes())
