"""The example's training script runs, resumes to the same bits, and takes a teacher."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar10"
N = 60


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``train_stages.py`` as a module, with few training images."""
    spec = importlib.util.spec_from_file_location("train_stages", EXAMPLE / "train_stages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "train_stages", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TRAIN_IMAGES", 40)
    return module


def test_training_resumes_to_the_same_bits_and_takes_a_teacher(script: ModuleType, tmp_path: Path) -> None:
    images, labels = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8), torch.arange(N) % 10
    run = script.Run("pooled_net:2", 2, batch_size=20)
    targets = script.targets_of(run, labels[:40], images[:40], None)
    assert torch.allclose(targets.sum(1), torch.ones(40))
    teacher = script.train(run, images, targets, labels, tmp_path / "whole")

    class Killed(Exception):
        pass

    saved = script.save_checkpoint

    def save_and_die(*arguments: object) -> None:
        saved(*arguments)
        raise Killed

    script.save_checkpoint = save_and_die
    with pytest.raises(Killed):
        script.train(run, images, targets, labels, tmp_path / "resumed")
    script.save_checkpoint = saved
    script.train(run, images, targets, labels, tmp_path / "resumed")
    whole, resumed = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    student = replace(run, teacher=run.network, distillation=1.0)
    taught = script.targets_of(student, labels[:40], images[:40], teacher)
    assert torch.allclose(taught.sum(1), torch.ones(40), atol=1e-5)
    assert not torch.allclose(taught, targets)


def test_orthogonalised_matrices_have_singular_values_near_one(script: ModuleType) -> None:
    values = torch.linalg.svdvals(script.orthogonalised(torch.randn(16, 40), steps=5))
    assert values.min() > 0.6
    assert values.max() < 1.3
