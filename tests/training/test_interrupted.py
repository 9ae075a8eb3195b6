"""Training that is stopped at the worst moment: the same command completes it, with every epoch once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import exit_code_of
from training_task import cascade, data, recipe

import fastcascade as fc
from fastcascade.errors import InvalidArgument, SaveError
from fastcascade.model.store import load_cascade
from fastcascade.training import trainer
from fastcascade.training.config import train_from_config

CONFIG = """
[cascade]
stages = ["resnet_cifar:8"]
num_classes = 2
input_shape = [3, 8, 8]
mean = [0.5, 0.5, 0.5]
std = [0.2, 0.2, 0.2]
[splits]
train = [0, 32]
validation = [32, 48]
calibration = [48, 64]
[recipe]
pretrain_epochs = 1
joint_epochs = 0
batch_size = 32
crop_padding = 0
"""


@pytest.fixture
def train(tmp_path: Path) -> Callable[[], fc.Cascade]:
    labels = np.arange(64) % 2
    images = (labels * 200)[:, None, None, None] + np.zeros((64, 8, 8, 3))
    np.savez(tmp_path / "data.npz", x_train=images.astype(np.uint8), y_train=labels)
    (tmp_path / "config.toml").write_text(CONFIG)
    arguments = (tmp_path / "config.toml", f"npz:{tmp_path / 'data.npz'}", tmp_path / "run")
    return lambda: train_from_config(*arguments, progress=False)


def failing(function: Callable[..., Any], suffix: str, action: Callable[[], object]) -> Callable[..., Any]:
    """A rename or link that fails for the file with this suffix."""

    def call(source: Any, target: Any, **kwargs: Any) -> Any:
        if str(target).endswith(suffix):
            action()
        return function(source, target, **kwargs)

    return call


def disk_full() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.filterwarnings("ignore:.*images")  # too few for temperatures and comparisons
def test_train_goes_on_when_its_model_was_cut_off_between_the_two_files(
    train: Callable[[], fc.Cascade], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_and_die() -> None:
        for name in ("replace", "link"):
            setattr(os, name, failing(getattr(os, name), "cascade.json", lambda: os._exit(9)))
        train()

    assert exit_code_of(train_and_die) == 9
    assert list((tmp_path / "run" / "model").glob("cascade-*.safetensors"))
    assert not (tmp_path / "run" / "model" / "cascade.json").exists()
    train()
    load_cascade(tmp_path / "run" / "model")
    with pytest.raises(InvalidArgument, match="exists; choose another directory"):
        train()


@pytest.mark.filterwarnings("ignore:.*images")  # too few for temperatures and comparisons
def test_train_goes_on_when_the_disk_was_full_at_the_end(
    train: Callable[[], fc.Cascade], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("replace", "link"):
            monkeypatch.setattr(os, name, failing(getattr(os, name), "cascade.json", disk_full))
        with pytest.raises(SaveError, match="No space left"):
            train()
    train()
    load_cascade(tmp_path / "run" / "model")


def epochs(path: Path) -> list[tuple[str, int]]:
    return [(record["phase"], record["epoch"]) for record in map(json.loads, path.read_text().splitlines())]


EVERY_EPOCH = [("pretrain", 1), ("pretrain", 2), ("pretrain", 3), ("joint", 1), ("joint", 2), ("joint", 3)]


@pytest.mark.parametrize("stopped_after", [1, 3, 6])
def test_metrics_hold_every_epoch_once_after_a_stop_behind_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    """The run ends when the checkpoint is written and the metrics are not."""
    saved = 0
    save_checkpoint = trainer.save_checkpoint

    def interrupted(*arguments: Any) -> None:
        nonlocal saved
        save_checkpoint(*arguments)
        saved += 1
        if saved == stopped_after:
            raise KeyboardInterrupt

    task = (data(128, 1), data(64, 2))
    monkeypatch.setattr(trainer, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fc.fit(cascade(), *task, recipe=recipe(), checkpoint_dir=tmp_path, progress=False)
    history = fc.fit(cascade(), *task, recipe=recipe(), checkpoint_dir=tmp_path, progress=False)
    assert epochs(tmp_path / "metrics.jsonl") == EVERY_EPOCH
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history


def test_a_torn_last_line_of_the_metrics_is_repaired(tmp_path: Path) -> None:
    for _ in range(2):
        fc.fit(
            cascade(),
            data(128, 1),
            data(64, 2),
            recipe=recipe(),
            checkpoint_dir=tmp_path,
            progress=False,
        )
        assert epochs(tmp_path / "metrics.jsonl") == EVERY_EPOCH
        with open(tmp_path / "metrics.jsonl", "r+b") as file:
            file.truncate(file.seek(0, 2) - 20)


@pytest.mark.slow
def test_metrics_hold_every_epoch_once_after_random_kills(tmp_path: Path) -> None:
    script = """
import sys
import fastcascade as fc
import torch
from training_task import cascade, data, recipe
torch.set_num_threads(1)
print("ready", flush=True)
fc.fit(cascade(), data(128, 1), data(64, 2), recipe=recipe(), checkpoint_dir=sys.argv[1], progress=False)
"""
    choose = random.Random(2)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    for number in range(6):
        command = [sys.executable, "-c", script, str(tmp_path / str(number))]
        for _ in range(2):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(choose.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        assert epochs(tmp_path / str(number) / "metrics.jsonl") == EVERY_EPOCH
