"""A forged checkpoint is refused with its reason; it neither exhausts memory nor ends in a traceback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from training_task import cascade, data, recipe

import fastcascade as fc
from fastcascade.errors import FileFormatError


def train(directory: Path, **changes: object) -> list[dict[str, Any]]:
    task = (data(128, 1), data(64, 2))
    return fc.fit(cascade(), *task, recipe=recipe(**changes), checkpoint_dir=directory, progress=False)


def forge(
    directory: Path, change: Callable[[Any], object], change_tensors: Callable[[dict[str, Tensor]], object]
) -> None:
    """Edit a checkpoint and give it fresh, correct hashes."""
    path = directory / "checkpoint.json"
    document = json.loads(path.read_text())
    change(document["content"])
    (tensor_path,) = directory.glob("checkpoint-*.safetensors")
    tensors = safetensors.torch.load(tensor_path.read_bytes())
    change_tensors(tensors)
    content = safetensors.torch.save(tensors)
    document["tensors"]["sha256"] = hashlib.sha256(content).hexdigest()
    (directory / f"checkpoint-{document['tensors']['sha256']}.safetensors").write_bytes(content)
    document.pop("sha256")
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**document, "sha256": hashlib.sha256(canonical).hexdigest()}))


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["position"].update(phase="one"), "position.phase is 'one'; expected int"),
        (lambda c: c["position"].update(epoch=-1), "position.epoch is -1"),
        (lambda c: c["position"].update(history=[1]), "expected an object"),
        (lambda c: c["position"].update(more=1), "expected the fields"),
        (lambda c: c.pop("position"), "expected an object"),
        (lambda c: c["position"].update(history=[{"x": nested(400)}]), "nests deeper than 64 levels"),
    ],
)
def test_a_forged_position_is_refused(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    train(tmp_path, pretrain_epochs=1, joint_epochs=0)
    forge(tmp_path, change, lambda tensors: None)
    with pytest.raises(FileFormatError, match=message):
        train(tmp_path, pretrain_epochs=1, joint_epochs=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.12.0.momentum_buffer", "unknown tensor"),
        ("optimizer.99999999999.0.momentum_buffer", "unknown tensor"),
        ("optimizer.0.99999.momentum_buffer", "does not fit this cascade"),
        ("optimizer.0.0.momentum_buffer", r"shape \(7,\) for parameter 0"),
        ("optimizer.9.0.momentum_buffer", "holds 10 optimizers; expected 2"),
        ("model.more", "does not fit this cascade"),
        ("elsewhere", "unknown tensor"),
    ],
)
def test_a_forged_tensor_is_refused(tmp_path: Path, name: str, message: str) -> None:
    train(tmp_path)
    forge(
        tmp_path,
        lambda content: content["position"].update(epoch=1),
        lambda tensors: tensors.update({name: torch.zeros(7)}),
    )
    with pytest.raises(FileFormatError, match=message):
        train(tmp_path)


def test_an_optimizer_without_momentum_is_resumed(tmp_path: Path) -> None:
    train(tmp_path, momentum=0.0)
    forge(tmp_path, lambda content: content["position"].update(epoch=1), lambda tensors: None)
    assert len(train(tmp_path, momentum=0.0)) == 8
