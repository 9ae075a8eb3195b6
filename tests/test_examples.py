"""The example's training script runs, resumes to the same bits, and goes on; other configs run, too."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastcascade as fc
from fastcascade import cli
from fastcascade.evaluation.evaluation import Trace

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar10"
N = 60
STAND_IN = {
    r"train = \[.*\]": "train = [0, 32]",
    r"validation = \[.*\]": "validation = [32, 48]",
    r"calibration = \[.*\]": "calibration = [48, 64]",
    "pretrain_epochs = .*": "pretrain_epochs = 1",
    "joint_epochs = .*": "joint_epochs = 1",
    "batch_size = .*": "batch_size = 16",
}
"""Settings that make a config run on 64 images."""


def random_images() -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) uint8 and labels (N,)."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=draw), torch.arange(N) % 10


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


def test_training_resumes_to_the_same_bits(script: ModuleType, tmp_path: Path) -> None:
    images, labels = random_images()
    run = script.Run("pooled_net:2", 2, batch_size=20, padding=3, cutout=8)
    targets = script.targets_of(run, labels, images, None)
    assert torch.allclose(targets.sum(1), torch.ones(N))
    script.train(run, None, images, targets, (images, labels), tmp_path / "whole")

    class Killed(Exception):
        pass

    saved = script.save_checkpoint

    def save_and_die(*arguments: object) -> None:
        saved(*arguments)
        raise Killed

    script.save_checkpoint = save_and_die
    with pytest.raises(Killed):
        script.train(run, None, images, targets, (images, labels), tmp_path / "resumed")
    script.save_checkpoint = saved
    script.train(run, None, images, targets, (images, labels), tmp_path / "resumed")
    whole, resumed = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_second_phase_goes_on_with_the_first_ones_networks(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = random_images()
    data = tmp_path / "images.npz"
    np.savez(data, x_train=images.movedim(1, -1).numpy(), y_train=labels.numpy())
    first = script.Run("pooled_net:2", 1, batch_size=20)
    second = replace(first, rate=0.0, whitening_epochs=0, teacher=first.network)
    monkeypatch.setattr(script, "FIRST_PHASE", (first,))
    monkeypatch.setattr(script, "SECOND_PHASE", (second,))
    run = ["train_stages.py", str(data), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*run, "--phase", "1"])
    script.main()
    assert not (tmp_path / "second").exists()
    monkeypatch.setattr("sys.argv", run)
    script.main()
    old, new = (script.trained_network(tmp_path / phase / "pooled_net-2") for phase in ("first", "second"))
    assert torch.allclose(old.head.weight, new.head.weight, rtol=1e-3), "rate 0 keeps the first's weights"
    old_mean, new_mean = (network.blocks[0].norms[0].running_mean for network in (old, new))
    assert not torch.allclose(old_mean, new_mean, rtol=1e-3), "yet it saw images"


def test_the_teacher_is_of_the_last_phase_that_has_it(script: ModuleType, tmp_path: Path) -> None:
    images, labels = (part[:20] for part in random_images())
    for seed, phase in enumerate(("first", "second")):
        run = script.Run("pooled_net:2", 1, batch_size=20, seed=seed)
        targets = script.targets_of(run, labels, images, None)
        script.train(run, None, images, targets, (images, labels), tmp_path / phase / "pooled_net-2")
        newest = script.newest(tmp_path, "pooled_net:2").head.weight
        assert torch.equal(newest, script.trained_network(tmp_path / phase / "pooled_net-2").head.weight)


def test_a_teacher_changes_the_targets(script: ModuleType) -> None:
    images, labels = random_images()
    run = script.Run("pooled_net:2", 1, distillation=1.0)
    taught = script.targets_of(run, labels, images, script.build_network("pooled_net:2", 10))
    assert torch.allclose(taught.sum(1), torch.ones(N), atol=1e-5)
    assert not torch.allclose(taught, script.targets_of(run, labels, images, None))


def test_augmented_images_are_shifted_mirrored_and_cut_out(script: ModuleType) -> None:
    images, _ = random_images()
    plain = script.Images(images, script.Run("", 1, padding=0)).batch(np.arange(N), 0)
    again = script.Images(images, script.Run("", 1, padding=0)).batch(np.arange(N), 1)
    assert torch.equal(plain, again.flip(3)), "every other epoch is mirrored"
    straight = script.normalised(images)
    first = (plain == straight).all(3).all(2).all(1)
    assert first.any()
    assert not first.all()
    assert torch.equal(torch.where(first[:, None, None, None], plain, again), straight)

    cut = script.Images(images, script.Run("", 1, padding=0, cutout=8)).batch(np.arange(N), 0)
    gone = (cut == 0).all(1)
    assert (gone.sum((1, 2)) == 64).all()
    assert ((cut == plain) | gone[:, None]).all()
    assert (gone.any(2).sum(1) == 8).all()
    assert len(gone.flatten(1).int().argmax(1).unique()) > N / 2, "squares lie at many places"


def test_orthogonalised_matrices_have_singular_values_near_one(script: ModuleType) -> None:
    values = torch.linalg.svdvals(script.orthogonalised(torch.randn(16, 40), steps=5))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_row_may_end_with_large_networks_of_both_phases(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    build = importlib.import_module("build_cascade")
    for phase, width in (("first", 16), ("first", 32), ("first", 64), ("second", 32), ("second", 64)):
        folder = tmp_path / phase / f"pooled_net-{width}"
        folder.mkdir(parents=True)
        save_file(script.build_network(f"pooled_net:{width}", 10).state_dict(), folder / script.WEIGHTS)
    stages = build.trained_stages(tmp_path)
    assert len(stages) == 10
    assert len({stage.name for stage in stages.values()}) == 10
    rows = build.rows_of(stages)
    assert len(set(rows)) == 2 * 2 * 4
    for row in rows:
        assert [name.removeprefix("mirrored_") for _, name in row[:3]] == [
            "pooled_net:16",
            "pooled_net:32",
            "pooled_net:64",
        ]
        assert [phase for phase, _ in row[:3]] == ["first", "second", "second"]
        assert len(set(row[3:])) == len(row[3:]) in (1, 2)


def test_calibrated_costs_leave_room_for_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    build = importlib.import_module("build_cascade")
    stages = [fc.Stage(build.build_network("pooled_net:2", 10), macs=macs) for macs in (1_000, 9_000)]
    cascade = build.cascade_of(stages, fc.ThresholdSelector("margin"), "last", None)
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (400,), generator=draw)
    logits = 2 * torch.randn(2, 400, 10, generator=draw)
    for sharpness, stage in zip((1, 5), logits, strict=True):
        stage[torch.arange(400), labels] += sharpness
    seen = Trace.from_logits(cascade, logits, labels)
    build.calibrate_within(cascade, seen, "default", 5_000)
    point = cascade.operating_points["default"]
    costs = seen.exit_macs[seen.exits(point)]
    room = 1.645 * costs.std() * (1 / 400 + 1 / 10_000) ** 0.5
    assert 5_000 - 2 * room < point.mean_macs <= 5_000 - room


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # 16 images are too few for temperatures and comparisons
@pytest.mark.parametrize("name", ["cifar100", "imagenet64"])
def test_configs_for_the_papers_other_images_run_on_stand_in_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (EXAMPLE.parent / name / "config.toml").read_text()
    given = tomllib.loads(text)["cascade"]
    for pattern, setting in STAND_IN.items():
        text, count = re.subn(f"(?m)^{pattern}", setting, text)
        assert count == 1, pattern
    (tmp_path / "config.toml").write_text(text)
    draw = np.random.default_rng(0)
    side, classes = given["input_shape"][1], given["num_classes"]
    images = draw.integers(0, 256, (64, side, side, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x_train=images, y_train=draw.integers(0, classes, 64))
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # main replaces it
    arguments = ["train", "config.toml", "images.npz", "--out", "run"]
    monkeypatch.setattr(sys, "argv", ["fastcascade", *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    trained = fc.load("run/model")
    assert trained.num_classes == classes
    assert "default" in trained.operating_points
