"""Saved cascades answer as before; damaged, hostile or incomplete ones are refused with their reason."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forgery import reseal, tensors_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.errors import FastCascadeError, FileFormatError, InvalidArgument
from fastcascade.model.registry import build_network
from fastcascade.model.resnet import cut_into_segments, resnet9, resnet_cifar
from fastcascade.model.store import load_cascade
from fastcascade.types import OutOfFoldScores

SHAPE = (3, 16, 16)


class Tiny(nn.Module):
    """A network that the registry does not know."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(channels * 256, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


class ByClass(nn.Module):
    """A selector of one's own: one learned score per class."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.arange(4.0) - 1.5)

    def forward(self, k: int, log_probs: Tensor, previous_label: Tensor) -> Tensor:
        return self.score[log_probs.argmax(1)]

    def macs(self, k: int, num_classes: int) -> int:
        return 0


def registry_cascade() -> fc.Cascade:
    stages = [resnet_cifar(8, 4, width=8), fc.Stage(resnet9(4, 4, stem=6), name="wide", macs=123_456)]
    cascade = fc.Cascade(
        stages,
        fc.MLPSelector("stats", hidden=8),
        num_classes=4,
        input_shape=SHAPE,
        preprocess=fc.Normalize((0.5,) * 3, (0.25,) * 3),
        classes=["cat", "dog", "owl", "bär"],
    )
    cascade.operating_points["default"] = fc.OperatingPoint(
        "default", (math.inf,), {"max_risk": (0.05, 0.1)}, None, 5e6, (0.0, 1.0), 100, 0.0
    )
    cascade.seen_images = np.array([3, 2**63 + 1, 2**64 - 1], np.uint64)
    cascade.out_of_fold = OutOfFoldScores(cascade.seen_images[1:], np.array([[0.5, -2]], np.float32))
    return cascade


def segment_cascade() -> fc.Cascade:
    parts = cut_into_segments(build_network("resnet_cifar:20,shortcut=B", 4), after=[3, 6])
    stages = [
        fc.Stage(module, exit, input="previous" if k else "image") for k, (module, exit) in enumerate(parts)
    ]
    return fc.Cascade(stages, fc.ThresholdSelector("margin"), 4, SHAPE, combine=(0.25, 0.5, 1.0))


def own_cascade() -> fc.Cascade:
    stages = [fc.Stage(Tiny(), name="tiny"), fc.Stage(nn.Identity(), Tiny()), resnet_cifar(8, 4)]
    return fc.Cascade(stages, ByClass(), 4, SHAPE)


def single_cascade() -> fc.Cascade:
    return fc.Cascade([resnet_cifar(8, 4).double()], None, 4, SHAPE)


CASCADES: dict[str, tuple[Callable[[], fc.Cascade], Callable[[], dict[str, nn.Module]]]] = {
    "registry": (registry_cascade, dict),
    "segments": (segment_cascade, dict),
    "own modules": (
        own_cascade,
        lambda: {"tiny": Tiny(), "stage1": nn.Identity(), "stage1.exit": Tiny(), "selector": ByClass()},
    ),
    "one stage, float64": (single_cascade, dict),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def randomised(cascade: fc.Cascade) -> fc.Cascade:
    """No parameter or statistic at its initial value, so that a lost one shows."""
    for tensor in cascade.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.1 if tensor.is_floating_point() else tensor + 3)
    return cascade


def same(a: fc.Cascade, b: fc.Cascade) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def forge(directory: Path, change: Callable[[Any], object], tensors: dict[str, Tensor] | None = None) -> None:
    reseal(directory / "cascade.json", lambda document: change(document["content"]), tensors)


@pytest.mark.parametrize("name", CASCADES)
def test_a_loaded_cascade_is_the_saved_one(tmp_path: Path, name: str) -> None:
    build, modules = CASCADES[name]
    cascade = randomised(build())
    cascade.save(tmp_path)
    loaded = load_cascade(tmp_path, modules())
    assert same(cascade, loaded)
    assert repr(cascade) == repr(loaded)
    for attribute in ("num_classes", "input", "combine", "classes", "operating_points", "stage_macs",
                      "selector_macs", "dense_macs"):  # fmt: skip
        assert getattr(loaded, attribute) == getattr(cascade, attribute), attribute
    assert [(s.name, s.input, s.macs) for s in loaded.stages] == [
        (s.name, s.input, s.macs) for s in cascade.stages
    ]
    assert loaded.seen_images.dtype == np.uint64
    assert loaded.seen_images.tolist() == cascade.seen_images.tolist()
    assert (loaded.out_of_fold is None) == (cascade.out_of_fold is None)
    if loaded.out_of_fold is not None and cascade.out_of_fold is not None:
        np.testing.assert_array_equal(loaded.out_of_fold.images, cascade.out_of_fold.images)
        np.testing.assert_array_equal(loaded.out_of_fold.scores, cascade.out_of_fold.scores)
    x = torch.randn(5, *SHAPE, dtype=cascade.dtype)
    for expected, got in zip(cascade.all_exits(x), loaded.all_exits(x), strict=True):
        assert torch.equal(expected, got)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_what_was_loaded_gives_the_same_files(tmp_path: Path) -> None:
    randomised(registry_cascade()).save(tmp_path / "a")
    load_cascade(tmp_path / "a").save(tmp_path / "b")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")
    )
    assert first == second


def test_an_existing_cascade_is_kept_unless_overwriting(tmp_path: Path) -> None:
    first, second = randomised(registry_cascade()), randomised(segment_cascade())
    first.save(tmp_path)
    with pytest.raises(InvalidArgument, match="overwrite=True"):
        second.save(tmp_path)
    assert same(load_cascade(tmp_path), first)
    second.save(tmp_path, overwrite=True)
    assert same(load_cascade(tmp_path), second)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_network_changed_after_it_was_built_is_not_taken_for_the_original(tmp_path: Path) -> None:
    network = resnet_cifar(8, 4)
    network.stem = nn.Sequential(network.stem, nn.GELU())
    fc.Cascade([network], None, 4, SHAPE).save(tmp_path)
    with pytest.raises(InvalidArgument, match=r"modules=\{'stage0': a ResNet\}"):
        load_cascade(tmp_path)
    fresh = resnet_cifar(8, 4)
    fresh.stem = nn.Sequential(fresh.stem, nn.GELU())
    assert load_cascade(tmp_path, {"stage0": fresh}).stage(0).module is fresh


def test_modules_of_ones_own_are_asked_for_by_name_and_checked(tmp_path: Path) -> None:
    own_cascade().save(tmp_path)
    _, modules = CASCADES["own modules"]
    with pytest.raises(InvalidArgument, match=r"'tiny': a Tiny, 'stage1': a Identity, 'stage1.exit': a Tiny, "
                                              r"'selector': a ByClass"):  # fmt: skip
        load_cascade(tmp_path)
    with pytest.raises(InvalidArgument, match=r"modules names \['extra'\], which this cascade does not need"):
        load_cascade(tmp_path, {**modules(), "extra": Tiny()})
    with pytest.raises(InvalidArgument, match=r"'tiny'\] does not fit .* net\.1\.weight is \(4, 768\)"):
        load_cascade(tmp_path, {**modules(), "tiny": Tiny(1)})
    with pytest.raises(InvalidArgument, match=r"'tiny'\] does not fit .*float32; expected .*float64"):
        load_cascade(tmp_path, {**modules(), "tiny": Tiny().double()})
    with pytest.raises(InvalidArgument, match=r"'tiny'\] does not fit .* superfluous \['net\.1\.bias'"):
        load_cascade(tmp_path, {**modules(), "tiny": nn.Identity()})


def test_own_modules_need_names_of_their_own(tmp_path: Path) -> None:
    stages = [fc.Stage(Tiny(), name="same"), fc.Stage(Tiny(), name="same")]
    with pytest.raises(InvalidArgument, match="give each Stage its own name"):
        fc.Cascade(stages, fc.ThresholdSelector("entropy"), 4, SHAPE).save(tmp_path)
    assert not list(tmp_path.iterdir())


def edit(*path: str | int, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("stages", value=[]), "it has no stages"),
        (edit("stages", 0, "module", "architecture", value="resnet_cifar:99999998"), "has no size in 1"),
        (edit("stages", 0, "module", "architecture", value="resnet_cifar:9998"), "not 6n.2 in 8"),
        (edit("stages", 0, "module", "architecture", value="resnet_cifar:8,width=9999"), "do not fit"),
        (edit("stages", 0, "module", "architecture", value="resnet_cifar:8,width=x"), "cannot be built"),
        (edit("stages", 0, "module", "architecture", value="resnet_cifar:8[0:9]"), "is out of range"),
        (edit("stages", 0, "module", "architecture", value="os.system:1"), "unknown network"),
        (edit("stages", 0, "module", "architecture", value=7), "architecture is 7; expected str"),
        (edit("stages", 0, "input", value="previous"), "nothing comes before it"),
        (edit("stages", 0, "input", value="elsewhere"), "expected one of"),
        (edit("stages", 0, "more", value=1), "expected the fields"),
        (edit("num_classes", value=2**60), "num_classes"),
        (edit("num_classes", value=10), "do not fit"),
        (edit("num_classes", value=True), "expected int"),
        (edit("input", "shape", value=[3, 10**6, 10**6]), "are too large"),
        (edit("input", "shape", value=[3, 16]), "expected 3 entries"),
        (edit("input", "shape", value=[1, 16, 16]), "does not hold a valid cascade|do not make a cascade"),
        (edit("input", "preprocess", "std", value=[1, 1, 0]), "positive std"),
        (edit("combine", value="max"), "expected one of"),
        (edit("combine", value=[1.0] * 9), "one per stage"),
        (edit("combine", value=["1", "1"]), "expected a number|a number"),
        (edit("classes", value=["one"]), "do not make a cascade"),
        (edit("selector", value=None), "tensors of no module"),
        (edit("selector", "op", value="_Cascade"), "expected one of"),
        (edit("selector", "hidden", value=2**40), "too wide"),
        (edit("selector", "hidden", value=9), "do not fit"),
        (edit("selector", "features", value="pixels"), "expected one of"),
        (edit("operating_points", "default", "thresholds", value=[0.0, 0.0]), "does not fit 2 stages"),
        (edit("operating_points", "default", "thresholds", value=["nan"]), "has a NaN"),
        (edit("operating_points", "default", "name", value="other"), "does not fit"),
        (edit("seen_images", value="stages.0.module.stem.0.weight"), "not a row of uint64"),
        (edit("seen_images", value="nothing"), "the name of a saved tensor"),
    ],
)  # fmt: skip
def test_forged_content_is_refused_with_its_reason(
    tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    registry_cascade().save(tmp_path)
    forge(tmp_path, change)
    with pytest.raises(FileFormatError, match=message):
        load_cascade(tmp_path)


def test_temperatures_come_back_and_are_one_in_files_from_before_them(tmp_path: Path) -> None:
    cascade = registry_cascade()
    cascade.temperatures.copy_(torch.tensor([3.0, 0.5]))
    cascade.save(tmp_path)
    assert load_cascade(tmp_path).temperatures.tolist() == [3.0, 0.5]
    tensors = tensors_of(tmp_path / "cascade.json")
    del tensors["temperatures"]
    reseal(tmp_path / "cascade.json", lambda content: None, tensors)
    assert load_cascade(tmp_path).temperatures.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("stages.0.module.stem.0.weight"), r"'stage0' do not .*missing \['stem.0.weight'\]"),
        (lambda t: t.update({"stages.0.module.more": torch.ones(1)}), r"superfluous \['more'\]"),
        (lambda t: t.update({"elsewhere": torch.ones(1)}), r"tensors of no module: \['elsewhere'\]"),
        (lambda t: t.update({"stages.1.module.head.2.bias": torch.ones(5)}),
         r"'wide' do not fit: head.2.bias is \(5,\) torch.float32; expected \(4,\) torch.float32"),
        (lambda t: t.update({"stages.1.module.head.2.bias": torch.ones(4).int()}), "torch.int32"),
        (lambda t: t.update({"stages.0.module.head.2.bias": torch.ones(4).half()}), "do not make a cascade"),
        (lambda t: t.update({"selector.w1": torch.ones(1, 8, 5)}), r"'selector' .* w1 is \(1, 8, 5\)"),
        (lambda t: t.update(seen_images=torch.ones(2, 2, dtype=torch.uint64)), "not a row of uint64"),
        (lambda t: t.update({"out_of_fold.images": torch.tensor([8, 3], dtype=torch.uint64)}), "increasing"),
        (lambda t: t.update({"out_of_fold.scores": torch.ones(2, 2)}), "are for 3 stages, not 2"),
        (lambda t: t.update(temperatures=torch.ones(3)), "expected 2 finite numbers"),
        (lambda t: t.update(temperatures=torch.tensor([1.0, math.nan])), "expected 2 finite numbers"),
        (lambda t: t.update(temperatures=torch.tensor([1.0, -2.0])), "expected positive"),
    ],
)  # fmt: skip
def test_forged_tensors_are_refused_with_their_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    registry_cascade().save(tmp_path)
    tensors = tensors_of(tmp_path / "cascade.json")
    change(tensors)
    forge(tmp_path, lambda content: None, tensors)
    with pytest.raises(FileFormatError, match=message):
        load_cascade(tmp_path)


def small_cascade() -> fc.Cascade:
    return fc.Cascade([resnet_cifar(8, 4, width=2)] * 2, fc.MLPSelector(hidden=2), 4, (3, 8, 8))


json_values: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.just([])
)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_forged_field_loads_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    small_cascade().save(tmp_path, overwrite=True)

    def change(content: Any) -> None:
        while True:
            keys = list(content) if isinstance(content, dict) else list(range(len(content)))
            key = data.draw(st.sampled_from(keys))
            inner = content[key]
            if not (isinstance(inner, (dict, list)) and inner) or data.draw(st.booleans()):
                break
            content = inner
        content[key] = data.draw(json_values)

    forge(tmp_path, change)
    with contextlib.suppress(FastCascadeError):
        load_cascade(tmp_path)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_flipped_bit_or_a_cut_end_loads_identically_or_is_refused(
    tmp_path: Path, data: st.DataObject
) -> None:
    cascade = small_cascade()
    cascade.save(tmp_path, overwrite=True)
    path = data.draw(st.sampled_from(sorted(tmp_path.iterdir(), key=lambda p: p.suffix)))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    path.write_bytes(content)
    try:
        loaded = load_cascade(tmp_path)
    except FileFormatError:
        return
    assert same(loaded, cascade)


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path: Path) -> None:
    cascade = fc.Cascade([resnet_cifar(8), resnet_cifar(14)], fc.MLPSelector(), 10, (3, 32, 32))
    cascade.save(tmp_path / "full")
    cascade.save(tmp_path / "half", half=True)
    size = {name: sum(f.stat().st_size for f in (tmp_path / name).iterdir()) for name in ("full", "half")}
    assert size["half"] < 0.6 * size["full"]
    loaded = fc.load(tmp_path / "half")
    assert loaded.dtype == torch.float32
    for (name, want), got in zip(cascade.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert got.dtype == want.dtype
        rounded = want.half().float() if name.startswith("stages.") and want.is_floating_point() else want
        assert torch.equal(got, rounded), name


def test_weights_too_large_for_half_precision_are_named(tmp_path: Path) -> None:
    cascade = fc.Cascade([resnet_cifar(8)], None, 10, (3, 32, 32))
    with torch.no_grad():
        cascade.stage(0).module.head[-1].weight[0, 0] = 1e6  # type: ignore[index]
    with pytest.raises(InvalidArgument, match=r"stages\.0\.module\.head.*1e\+06.*without half"):
        cascade.save(tmp_path / "model", half=True)
    assert not (tmp_path / "model").exists()


##### The plan beside the cascade


class Own(nn.Module):
    """A network that only this file knows."""

    def __init__(self, opaque: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)
        self.opaque = opaque

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.linear(x.sort(1).values if self.opaque else x)


def two_own_networks(opaque: bool = False) -> fc.Cascade:
    return fc.Cascade(
        [fc.Stage(Own(), name="a"), fc.Stage(Own(opaque), name="b")], fc.MLPSelector(), 3, (3, 2, 2)
    )


def test_own_networks_run_from_their_folder_without_their_code(tmp_path: Path) -> None:
    cascade, x = two_own_networks(), torch.randn(9, 3, 2, 2)
    for half in (False, True):
        cascade.save(tmp_path, overwrite=True, half=half)
        loaded = load_cascade(tmp_path, {"a": Own(), "b": Own()})
        fast = fc.compile(tmp_path, backend="reference")
        torch.testing.assert_close(fast(x).probs, loaded(x).probs)


def test_a_plan_of_another_save_is_not_used(tmp_path: Path) -> None:
    two_own_networks().save(tmp_path)
    two_own_networks().save(tmp_path, plan=False, overwrite=True)
    with pytest.raises(FileFormatError, match=r"custom modules \(a, b\) and no plan.*plan=True"):
        fc.compile(tmp_path)


def test_why_there_is_no_plan_is_said(tmp_path: Path) -> None:
    two_own_networks(opaque=True).save(tmp_path)
    with pytest.raises(
        FileFormatError, match=r"no plan of it: stage 'b' cannot be saved: it is opaque \(.*sort"
    ):
        fc.compile(tmp_path)
    with pytest.raises(fc.FastCascadeError, match="stage 'b' cannot be saved: it is opaque"):
        two_own_networks(opaque=True).save(tmp_path / "new", plan=True)
    assert not (tmp_path / "new" / "cascade.json").exists()


def test_networks_of_the_registry_need_no_plan(tmp_path: Path) -> None:
    cascade = fc.Cascade([build_network("resnet_cifar:8", 3)], None, 3, (3, 8, 8))
    cascade.save(tmp_path)
    assert not (tmp_path / "plan.json").exists()
    assert fc.compile(tmp_path, backend="reference").plan.num_classes == 3
    cascade.save(tmp_path, plan=True, overwrite=True)
    (tmp_path / "cascade.json").unlink()
    assert fc.compile(str(tmp_path), backend="reference").plan.num_classes == 3


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"expected cascade\.json or plan\.json"):
        fc.compile(tmp_path)
