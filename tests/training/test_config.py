"""The training config: every mistake is found before the first epoch, and said with file, key and value."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train_config_docs

import fastcascade as fc
from fastcascade.errors import FastCascadeError, InvalidArgument
from fastcascade.training.config import TrainingConfig, read_config, train_from_config

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "cifar10" / "config.toml"

VALID: dict[str, Any] = {
    "cascade": {
        "stages": ["resnet_cifar:8", "resnet_cifar:8"],
        "num_classes": 2,
        "input_shape": [3, 8, 8],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
    },
    "splits": {"train": [0, 64], "validation": [64, 80], "calibration": [80, 96]},
    "train": {"alpha": 0.3},
    "recipe": {"pretrain_epochs": 1, "joint_epochs": 1, "batch_size": 32, "crop_padding": 0},
    "operating_points": {"default": {"budget": 1.5}},
}

Train = Callable[[dict[str, Any]], fc.Cascade]


def toml(document: dict[str, Any], prefix: str = "") -> str:
    """Tables of numbers, strings and lists as TOML."""
    lines: list[str] = []
    for name, value in document.items():
        if isinstance(value, dict):
            lines += [f"[{prefix}{name}]", toml(value, f"{prefix}{name}.")]
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join(lines)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The valid document with one entry set; None removes it."""
    document = copy.deepcopy(VALID)
    *tables, key = path.split(".")
    table = document
    for name in tables:
        table = table.setdefault(name, {})
    if value is None:
        del table[key]
    else:
        table[key] = value
    return document


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Run ``train_from_config`` on two classes of bright and dark noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 2
    pixels = (labels * 200)[:, None, None, None] + rng.integers(0, 50, (96, 8, 8, 3))
    np.savez(tmp_path / "d.npz", x_train=pixels.astype(np.uint8), y_train=labels)
    config = tmp_path / "config.toml"

    def call(document: dict[str, Any]) -> fc.Cascade:
        config.write_text(toml(document))
        return train_from_config(config, str(tmp_path / "d.npz"), tmp_path / "run", progress=False)

    return call


@pytest.mark.filterwarnings("ignore:.*images")  # too few for temperatures and comparisons
def test_a_valid_config_trains(train: Train) -> None:
    assert set(train(VALID).operating_points) == {"default"}


def test_the_example_is_valid() -> None:
    config = read_config(EXAMPLE)
    assert config.cascade.combine == (0.1, 0.5, 1.0)
    assert config.recipe == fc.Recipe(
        pretrain_epochs=42,
        joint_epochs=3,
        joint_learning_rate=0.01,
        batch_size=256,
        learning_rate=0.2,
        distillation=0.7,
        distillation_epochs=26,
    )
    assert {name: point.budget for name, point in config.operating_points.items()} == {
        "fast": 0.19,
        "default": 0.38,
        "accurate": 0.76,
    }


MISTAKES: list[tuple[str, Any, str]] = [
    # What is not a table, or one that nothing reads.
    ("cascade", 1, "cascade is 1; expected a table"),
    ("operating_points.default", 0.5, "operating_points.default is 0.5; expected a table"),
    ("recipes", {"seed": 1}, "unknown key recipes; did you mean recipe?"),
    ("splits", None, "splits is missing"),
    # Misspelt and missing keys.
    ("operating_points.default", {"budgett": 0.5}, r"budgett; did you mean budget\?"),
    ("recipe.bach_size", 32, r"unknown key recipe.bach_size; did you mean batch_size\?"),
    ("train.colour", "red", r"unknown key train.colour; expected one of alpha, objective"),
    ("cascade.mean", None, "cascade.mean is missing"),
    ("splits.validation", None, "splits.validation is missing"),
    # Wrong types and ranges.
    ("recipe.batch_size", "100", "recipe.batch_size is '100'; expected a valid integer"),
    ("recipe.batch_size", 0, "recipe.batch_size is 0; expected at least 1"),
    ("recipe.batch_size", -5, "recipe.batch_size is -5; expected at least 1"),
    ("recipe.batch_size", 32.0, "recipe.batch_size is 32.0; expected a valid integer"),
    ("recipe.batch_size", True, "recipe.batch_size is True; expected a valid integer"),
    ("recipe.pretrain_epochs", -1, "recipe.pretrain_epochs is -1; expected at least 0"),
    ("recipe.baseline", "mean", "recipe.baseline is 'mean'; expected 'none', 'moving_average' or 'greedy'"),
    ("recipe.momentum", 1.0, "recipe.momentum is 1.0; expected less than 1"),
    ("train.alpha", -0.1, "train.alpha is -0.1; expected at least 0"),
    ("train.objective", "exakt", "train.objective is 'exakt'; expected 'exact', 'reinforce' or 'imitation'"),
    ("cascade.num_classes", 1, "cascade.num_classes is 1; expected at least 2"),
    ("cascade.input_shape", [3, 8], r"cascade.input_shape\[2\] is missing"),
    ("cascade.input_shape", [3, 8, 0], r"cascade.input_shape\[2\] is 0; expected"),
    ("cascade.combine", "max", "cascade.combine is 'max'; expected 'last' or 'mean' or a valid array"),
    ("cascade.combine", [1.0], r"cascade: combine is \(1.0,\); expected .* 2 weights, one per stage"),
    ("cascade.std", [0.2, 0.2, 0], r"cascade.std\[2\] is 0; expected greater than 0"),
    ("cascade.mean", [0.5], r"cascade: mean has 1 and std 3 entries; expected 3, one per channel"),
    ("cascade.features", "all", "cascade.features is 'all'; expected 'stats', 'topk' or 'probs'"),
    ("cascade.features", "topk", "cascade: features = 'topk' needs at least 3 classes"),
    # Networks.
    ("cascade.stages", [], r"cascade.stages is \[\]"),
    ("cascade.stages", ["resnet_cifar:8", "vgg:16"], r"cascade.stages\[1\].*unknown network 'vgg:16'"),
    ("cascade.stages", ["resnet_cifar:9"], r"cascade.stages\[0\] is 'resnet_cifar:9'"),
    # Splits.
    ("splits.train", [0, 65], r"splits: train \[0, 65\] and validation \[64, 80\] overlap"),
    ("splits.validation", [64, 96], "splits: validation .* and calibration .* overlap"),
    ("splits.validation", [80, 64], r"splits.validation is \[80, 64\]: expected \[first, end\]"),
    ("splits.train", [-1, 64], r"splits.train\[0\] is -1; expected at least 0"),
    ("splits.calibration", [80, 97], r"splits.calibration is \[80, 97\]; .* 96 training images"),
    # Targets.
    ("operating_points.default", {}, "operating_points.default: got no target; expected exactly one of"),
    (
        "operating_points.default",
        {"budget": 0.5, "min_accuracy": 0.9},
        "operating_points.default: got budget and min_accuracy; expected exactly one of",
    ),
    ("operating_points.default.budget", 0, "operating_points.default.budget is 0; expected greater than 0"),
    ("operating_points.default.budget", "0.5", "default.budget is '0.5'; expected a valid number"),
    ("operating_points.default", {"min_accuracy": 90}, "min_accuracy is 90; expected at most 1"),
    ("operating_points.default", {"max_risk": [0.1]}, r"max_risk\[1\] is missing"),
    ("operating_points.default", {"max_risk": [0.1, 1.0]}, r"max_risk\[1\] is 1.0; expected less than 1"),
    # Above zero, but below the cost of the first exit: calibration after training could only fail.
    ("operating_points.default.budget", 0.01, "operating_points.default.budget is 0.01; .*first exit"),
    ("operating_points.default", {"budget_macs": 7.0}, "default.budget_macs is 7.0; .*first exit"),
]


@pytest.mark.parametrize(("path", "value", "message"), MISTAKES, ids=lambda v: str(v)[:60])
def test_a_mistake_is_named_before_the_first_epoch(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, value: Any, message: str
) -> None:
    def no_epoch(*_: object, **__: object) -> None:
        pytest.fail("training started")

    monkeypatch.setattr("fastcascade.training.config.fit", no_epoch)
    with pytest.raises(InvalidArgument) as caught:
        train(changed(path, value))
    assert str(tmp_path / "config.toml") in str(caught.value)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_every_mistake_is_named_at_once(train: Train) -> None:
    document = changed("recipe.batch_size", -5)
    document["train"]["alpha"] = "high"
    with pytest.raises(InvalidArgument) as caught:
        train(document)
    assert "recipe.batch_size is -5" in str(caught.value)
    assert "train.alpha is 'high'" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("recipe.accumulate", 3, "cannot be split evenly"),
        ("cascade.input_shape", [3, 8, 9], r"expected \(N, 3, 8, 9\)"),
        ("cascade.stages", ["resnet_cifar:8", "resnet_cifar:8,shortcut=C"], "shortcut"),
    ],
)
def test_what_only_the_cascade_or_the_data_can_tell_is_found_before_the_first_epoch(
    train: Train, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    with pytest.raises(FastCascadeError, match=message):
        train(changed(path, value))
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*images")  # too few for temperatures and comparisons
def test_data_without_labels_or_with_other_classes_are_refused(train: Train, tmp_path: Path) -> None:
    train(VALID)
    images = np.load(tmp_path / "d.npz")["x_train"]
    for extra, message in (
        ({}, "no labels"),
        ({"y_train": np.zeros(96, int), "classes": ["a"]}, "1 classes"),
    ):
        np.savez(tmp_path / "other.npz", x_train=images, **extra)
        with pytest.raises(FastCascadeError, match=message):
            train_from_config(tmp_path / "config.toml", str(tmp_path / "other.npz"), tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_an_output_folder_that_cannot_be_made_is_found_before_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").write_text("a file")
    monkeypatch.setattr("fastcascade.training.config.fit", lambda *_, **__: pytest.fail("training started"))
    with pytest.raises(FastCascadeError, match="run"):
        train(VALID)


@pytest.mark.parametrize("text", ["cascade = [", "\xff", "a = 1\na = 2"])
def test_what_is_not_toml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidArgument, match=r"cannot read .*config\.toml"):
        read_config(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": -5}, "Recipe: batch_size is -5; expected at least 1"),
        ({"batch_size": "100"}, "Recipe: batch_size is '100'; expected a valid integer"),
        ({"batch_size": 8.0}, "Recipe: batch_size is 8.0; expected a valid integer"),
        ({"learning_rate": float("nan")}, "Recipe: learning_rate is nan; expected a finite number"),
        ({"baseline": "mean"}, "Recipe: baseline is 'mean'; expected 'none', 'moving_average' or 'greedy'"),
        ({"distillation": 1.5}, "Recipe: distillation is 1.5; expected at most 1"),
        ({"autocast": 1}, "Recipe: autocast is 1; expected a valid boolean"),
        ({"seed": -1}, "Recipe: seed is -1; expected at least 0"),
    ],
)
def test_a_recipe_from_python_is_checked_too(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        fc.Recipe(**arguments)
    assert str(caught.value) == message


def test_a_recipe_stays_a_frozen_dataclass_with_numbers_as_given() -> None:
    recipe = fc.Recipe(learning_rate=1, distillation_epochs=None, autocast=False)
    assert recipe == fc.Recipe(learning_rate=1.0, autocast=False)
    with pytest.raises(AttributeError):
        recipe.batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted(train_config_docs.documents()), ids=lambda path: path.name)
def test_schema_and_its_page_are_up_to_date(path: Path) -> None:
    want = train_config_docs.documents()[path]
    assert path.read_text() == want, "run: .venv/bin/python tools/train_config_docs.py"


def test_the_schema_describes_every_key() -> None:
    schema = train_config_docs.schema()
    for name, model in schema["$defs"].items():
        assert model["additionalProperties"] is False, name
        for key, entry in model["properties"].items():
            assert entry.get("description"), f"{name}.{key}"
    assert set(schema["properties"]) == set(TrainingConfig.model_fields)


def test_networks_read_as_many_channels_as_the_images_have(tmp_path: Path) -> None:
    gray = copy.deepcopy(VALID)
    gray["cascade"] |= {"input_shape": [1, 8, 8], "mean": [0.5], "std": [0.2]}
    path = tmp_path / "gray.toml"
    path.write_text(toml(gray))
    cascade = read_config(path).build()
    assert [cascade.stage(k).module.architecture for k in range(2)] == ["resnet_cifar:8,in_channels=1"] * 2
