"""Checkpoints of a training run: JSON and safetensors, replaced atomically, never pickled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcascade.errors import FileFormatError, InvalidArgument
from fastcascade.storage.files import BundleFormat, load_bundle, save_bundle

__all__ = ["OptimizerState", "Position", "load_checkpoint", "restore_optimizer", "save_checkpoint"]

OptimizerState = dict[int, dict[str, Tensor]]
"""An optimizer's tensors, by parameter number and name."""

_FORMAT = BundleFormat("checkpoint", 1)


@dataclass(frozen=True)
class Position:
    """Where a run stands: the next epoch to do, and the metrics of those done.

    Attributes:
        phase: index of the phase.
        epoch: next epoch within it; equal to its length when it is complete.
        average_reward: REINFORCE's moving-average baseline.
        history: one record per epoch done, over all phases.
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
        optimizers: their tensor and number states are stored; hyper-parameters are not.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for p, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if value is not None:
                    tensors[f"optimizer.{o}.{p}.{key}"] = torch.as_tensor(value)
    content = {"position": dataclasses.asdict(position), "settings": dict(settings)}
    save_bundle(directory, _FORMAT, content, tensors, overwrite=True)


def load_checkpoint(
    directory: Path, settings: Mapping[str, Any], model: nn.Module
) -> tuple[Position, list[OptimizerState]]:
    """Restore the model and say where the run stood.

    Returns:
        the position, and per optimizer its state by parameter number (see :func:`restore_optimizer`). A
        fresh start if there is no checkpoint.

    Raises:
        InvalidArgument: the checkpoint belongs to a run with other settings.
        FileFormatError: it is damaged or does not fit the model.
    """
    if not (directory / "checkpoint.json").exists():
        return Position(), []
    content, tensors = load_bundle(directory, _FORMAT)
    stored = content.get("settings")
    if stored != dict(settings):
        changed = [k for k in settings if not isinstance(stored, dict) or stored.get(k) != settings[k]]
        raise InvalidArgument(
            f"the checkpoint in {directory} was made with other settings ({', '.join(changed)} differ); "
            "use the same ones to resume, or another checkpoint_dir to start anew"
        )
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    optimizers: list[OptimizerState] = []
    try:
        model.load_state_dict(weights)
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                o, p, key = name.split(".")[1:]
                while len(optimizers) <= int(o):
                    optimizers.append({})
                optimizers[int(o)].setdefault(int(p), {})[key] = tensor
        fields = content["position"]
        position = Position(**{**fields, "history": tuple(fields["history"])})
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the checkpoint in {directory} does not fit this cascade: {error}") from error
    return position, optimizers


def restore_optimizer(optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Put a stored state back; hyper-parameters stay the optimizer's own."""
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
