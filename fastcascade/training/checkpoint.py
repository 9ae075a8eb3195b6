"""Checkpoints of a training run: JSON and safetensors, replaced atomically, never pickled."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastcascade.errors import FileFormatError, InvalidArgument
from fastcascade.storage.bundle import BundleFormat, load_bundle, save_bundle
from fastcascade.storage.codec import Reader, encode

__all__ = ["OptimizerState", "Position", "load_checkpoint", "restore_optimizers", "save_checkpoint"]

OptimizerState = dict[int, dict[str, Tensor]]
"""An optimizer's tensors, by parameter number and name."""

_FORMAT = BundleFormat("checkpoint", 1)
# optimizer.<its number>.<parameter number>.<name>
_OPTIMIZER_TENSOR = re.compile(r"optimizer\.([0-9])\.([0-9]{1,9})\.(\w+)")


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        phase: index of the phase.
        epoch: next epoch within the phase; its length if the phase is complete.
        average_reward: REINFORCE's moving-average baseline.
        history: metrics, one record per completed epoch of all phases.
    """

    phase: int = 0
    epoch: int = 0
    average_reward: float = 0.0
    history: tuple[dict[str, Any], ...] = ()


def save_checkpoint(
    directory: Path,
    position: Position,
    settings: Mapping[str, Any],
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Replace the checkpoint in ``directory``.

    Args:
        settings: JSON values that a resumed run must share.
        optimizers: their state is stored; hyper-parameters are not.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for p, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if value is not None:
                    tensors[f"optimizer.{o}.{p}.{key}"] = torch.as_tensor(value)
    content = {"position": encode(position, {}), "settings": dict(settings)}
    save_bundle(directory, _FORMAT, content, tensors, overwrite=True)


def load_checkpoint(
    directory: Path, settings: Mapping[str, Any], model: nn.Module
) -> tuple[Position, list[OptimizerState]]:
    """Restore the model's weights, and read the run's position.

    Returns:
        the position, and the state of each optimizer for :func:`restore_optimizers`. Without a checkpoint,
        the start of a run.

    Raises:
        InvalidArgument: the checkpoint belongs to a run with other settings.
        FileFormatError: it is damaged or does not fit the model.
    """
    if not _FORMAT.document_path(directory).exists():
        return Position(), []
    content, tensors = load_bundle(directory, _FORMAT)
    stored = content.get("settings")
    if stored != dict(settings):
        changed = [k for k in settings if not isinstance(stored, dict) or stored.get(k) != settings[k]]
        raise InvalidArgument(
            f"the checkpoint in {directory} was made with other settings ({', '.join(changed)} differ); "
            "resume with the same settings, or start a new run in another checkpoint_dir"
        )
    try:
        position = _decode_position(content.get("position"))
        model.load_state_dict(
            {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        )
        return position, _optimizer_states(tensors)
    except (RuntimeError, FileFormatError) as error:
        raise FileFormatError(f"the checkpoint in {directory} does not fit this cascade: {error}") from error


def _decode_position(value: Any) -> Position:
    position = cast(Position, Reader({}).decode(Position, value, "position"))
    return dataclasses.replace(position, history=tuple(value["history"]))  # lists stay lists in the metrics


def _optimizer_states(tensors: Mapping[str, Tensor]) -> list[OptimizerState]:
    """The states of up to ten optimizers, in order."""
    states: dict[int, OptimizerState] = {}
    for name, tensor in tensors.items():
        if name.startswith("model."):
            continue
        match = _OPTIMIZER_TENSOR.fullmatch(name)
        if match is None:
            raise FileFormatError(f"unknown tensor {name!r}")
        states.setdefault(int(match[1]), {}).setdefault(int(match[2]), {})[match[3]] = tensor
    return [states.get(o, {}) for o in range(max(states, default=-1) + 1)]


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], states: Sequence[OptimizerState]) -> None:
    """Load stored states; hyper-parameters are left as they are. An optimizer without tensors has no state.

    Raises:
        FileFormatError: the states do not fit the optimizers' parameters.
    """
    if len(states) > len(optimizers):
        raise FileFormatError(f"the checkpoint holds {len(states)} optimizers; expected {len(optimizers)}")
    for optimizer, state in zip(optimizers, states, strict=False):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, values in state.items():
            for name, value in values.items():
                if number >= len(parameters) or (value.ndim and value.shape != parameters[number].shape):
                    raise FileFormatError(
                        f"the checkpoint holds {name} of shape {tuple(value.shape)} for parameter {number} "
                        "of an optimizer, which does not fit this cascade"
                    )
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
