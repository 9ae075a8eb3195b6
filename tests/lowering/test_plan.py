"""Plans check themselves, print readably, and survive a round trip through files or fail to load."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastcascade as fc
from fastcascade.errors import BackendUnavailable, FileFormatError, InvalidArgument, LoweringError
from fastcascade.lowering.operations import Add, Concat, Conv2d, Flatten, Linear, Op, Pad, Pool, Slice
from fastcascade.lowering.plan import Plan
from fastcascade.storage.bundle import PLAN_FORMAT, BundleFormat, load_bundle, save_bundle
from fastcascade.testing.networks import random_network
from fastcascade.types import forced_exit

SHAPE = (3, 9, 8)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan of two stages with most kinds of operation and every optional field."""
    torch.manual_seed(0)
    mixed = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.MaxPool2d(2),
        nn.ConstantPad2d(1, 0.5),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 5),
    )
    cascade = fc.Cascade(
        [random_network(4, input_shape=SHAPE), mixed],
        fc.MLPSelector("topk"),
        5,
        SHAPE,
        combine=(0.5, 1.0),
        preprocess=fc.Normalize((0.5,) * 3, (0.25,) * 3),
        classes=["ant", "bee", "cow", "dog", "eel"],
    )
    cascade.operating_points["never"] = fc.OperatingPoint(
        "never", (float("inf"),), {"max_risk": (0.1, 0.05)}, None, 12.5, (0.0, 1.0), 7, 0.0
    )
    return fc.plan(cascade)


def conv(**changes: Any) -> Conv2d:
    return Conv2d(1, 0, **{"weight": torch.zeros(4, 3, 3, 3), "bias": torch.zeros(4), **changes})


@pytest.mark.parametrize(
    ("op", "inputs", "expected"),
    [
        (conv(), [SHAPE], (4, 7, 6)),
        (conv(padding=(1, 0, 2, 0), stride=(2, 3)), [SHAPE], (4, 4, 3)),
        (conv(dilation=(4, 2)), [SHAPE], (4, 1, 4)),
        (conv(residual=0), [SHAPE, (4, 7, 6)], (4, 7, 6)),
        (Pool(1, 0, "max", (2, 2), (2, 2)), [SHAPE], (3, 4, 4)),
        (Pool(1, 0, "max", (2, 2), (2, 2), ceil_mode=True), [SHAPE], (3, 5, 4)),
        (Pool(1, 0, "max", (2, 2), (3, 3), (1, 1, 1, 1), ceil_mode=True), [(1, 5, 5)], (1, 2, 2)),
        (Slice(1, 0, (0, 1, 0), (2, 9, 8), (1, 3, 7)), [SHAPE], (2, 3, 2)),
        (Pad(1, 0, (1, 0, 2), (0, 3, 0)), [SHAPE], (4, 12, 10)),
        (Concat(1, (0, 0)), [SHAPE, SHAPE], (6, 9, 8)),
        (Flatten(1, 0), [SHAPE], (216,)),
    ],
)
def test_shapes_follow_from_operations(
    op: Op, inputs: list[tuple[int, ...]], expected: tuple[int, ...]
) -> None:
    assert op.output_shape(*inputs) == expected


@pytest.mark.parametrize(
    ("op", "inputs", "message"),
    [
        (conv(), [(4, 9, 8)], "reads 4"),
        (conv(), [(3,)], "expected (C, H, W)"),
        (conv(groups=0), [SHAPE], "groups"),
        (conv(stride=(0, 1)), [SHAPE], "below 1"),
        (conv(padding=(-1, 0, 0, 0)), [SHAPE], "negative padding"),
        (conv(bias=torch.zeros(5)), [SHAPE], "conv2d bias"),
        (conv(weight=torch.zeros(4, 3, 3, 3, dtype=torch.float64)), [SHAPE], "float64"),
        (conv(weight=torch.zeros(3, 4, 3, 3).transpose(0, 1)), [SHAPE], "contiguous"),
        (conv(residual=0), [SHAPE, SHAPE], "residual"),
        (Pool(1, 0, "max", (2, 2), (2, 2), (2, 0, 0, 0)), [SHAPE], "half the kernel"),
        (Slice(1, 0, (0, 0, 0), (4, 9, 8), (1, 1, 1)), [SHAPE], "out of range"),
        (Slice(1, 0, (0, 0, 0), (3, 9, 8), (1, 0, 1)), [SHAPE], "out of range"),
        (Linear(1, 0, torch.zeros(2, 3), torch.zeros(2)), [SHAPE], "expected (3,)"),
        (Add(1, 0, 0), [SHAPE, (3, 9, 9)], "expected equal"),
        (Concat(1, (0, 0)), [SHAPE, (3, 9, 9)], "differ only in channels"),
        (Pad(1, 0, (0, 0, -1), (0, 0, 0)), [SHAPE], "negative padding"),
    ],
)
def test_operations_reject_inconsistent_inputs(op: Op, inputs: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        op.output_shape(*inputs)
    assert message in str(caught.value)


def first(plan: Plan, **changes: Any) -> dict[str, Any]:
    return {"stages": (replace(plan.stages[0], **changes), *plan.stages[1:])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: first(p, ops=p.stages[0].ops[::-1]), "not defined before"),
        (lambda p: first(p, ops=p.stages[0].ops[:-1]), "one shape per value"),
        (lambda p: first(p, shapes=((4, 9, 8), *p.stages[0].shapes[1:])), "its input has shape"),
        (lambda p: first(p, shapes=(*p.stages[0].shapes[:-1], (6,))), "shape (6,), not (5,)"),
        (lambda p: first(p, logits=0), "returns logits (3, 9, 8)"),
        (lambda p: first(p, features=99), "undefined"),
        (lambda p: first(p, input="previous"), "must read the image"),
        (lambda p: first(p, selector=None), "lacks a selector"),
        (lambda p: first(p, macs=-1), "negative cost"),
        (lambda p: first(p, selector=replace(p.stages[0].selector, b1=torch.zeros(3))), "selector b1"),
        (lambda p: first(p, selector=replace(p.stages[0].selector, kind="opaque")), "lacks a module"),
        (lambda p: {"num_classes": 6, "classes": None}, "expected (6,)"),
        (lambda p: {"classes": ("a",)}, "1 class names"),
        (lambda p: {"default_thresholds": torch.zeros(3)}, "default_thresholds"),
        (lambda p: {"stages": ()}, "at least one stage"),
    ],
)
def test_an_inconsistent_plan_is_rejected(
    plan: Plan, change: Callable[[Plan], dict[str, Any]], message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        replace(plan, **change(plan))
    assert message in str(caught.value)


def test_sizes_that_could_overflow_are_rejected() -> None:
    plan = fc.plan(fc.Cascade([nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten())], None, 5, (3, 1, 1)))
    stage = plan.stages[0]
    ops = (replace(stage.ops[0], dilation=(2**40, 1)), *stage.ops[1:])
    with pytest.raises(InvalidArgument, match="above 1048576"):
        replace(plan, stages=(replace(stage, ops=ops),))


def test_values_die_after_their_last_reader(plan: Plan) -> None:
    for stage in plan.stages:
        dead: set[int] = set()
        for op, dying in zip(stage.ops, stage.last_reads(), strict=True):
            assert not dead & {*op.reads, op.output}
            assert not dead & set(dying)
            dead.update(dying)
        assert dead == set(range(len(stage.shapes))) - {stage.features, stage.logits}


def test_plans_print_every_operation(plan: Plan) -> None:
    text = str(plan)
    assert "2 stages" in text
    assert "conv 3×3 3→4(v2) → 4×9×8" in text
    assert "operating points: never" in text
    assert len(text.splitlines()) == 1 + sum(2 + len(stage.ops) for stage in plan.stages) + 1
    assert "tensor" not in text


def outputs(plan: Plan) -> list[torch.Tensor]:
    x = torch.randint(0, 256, (20, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return list(fc.compile(plan, backend="reference")(x, [0.3]))


def test_saved_plans_come_back_whole(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path)
    loaded = fc.load_plan(tmp_path)
    assert str(loaded) == str(plan)
    assert loaded.operating_points == plan.operating_points
    assert (loaded.input, loaded.classes, loaded.combine) == (plan.input, plan.classes, plan.combine)
    for got, want in zip(outputs(loaded), outputs(plan), strict=True):
        assert torch.equal(got, want)


def test_saving_over_a_plan_needs_permission(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path)
    with pytest.raises(InvalidArgument, match="overwrite=True"):
        plan.save(tmp_path)
    plan.save(tmp_path, overwrite=True)


def test_opaque_stages_and_selectors_cannot_be_saved(tmp_path: Path) -> None:
    softsign = nn.Sequential(nn.Flatten(), nn.Linear(216, 5), nn.Softsign())
    with pytest.raises(LoweringError, match=r"'stage0'.*aten\.abs"):
        fc.plan(fc.Cascade([softsign], None, 5, SHAPE)).save(tmp_path)

    class Own(fc.MLPSelector):
        pass

    networks = [random_network(seed, input_shape=SHAPE) for seed in (0, 1)]
    with pytest.raises(LoweringError, match="selector of stage 'stage0'"):
        fc.plan(fc.Cascade(networks, Own(), 5, SHAPE)).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_version_is_refused(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path)
    content, tensors = load_bundle(tmp_path, PLAN_FORMAT)
    save_bundle(tmp_path, BundleFormat("plan", PLAN_FORMAT.version + 1), content, tensors, overwrite=True)
    with pytest.raises(FileFormatError, match="upgrade"):
        fc.load_plan(tmp_path)


def test_a_missing_or_truncated_plan_is_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError):
        fc.load_plan(tmp_path / "nowhere")
    plan.save(tmp_path)
    (tensors,) = tmp_path.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match="damaged"):
        fc.load_plan(tmp_path)


Edit = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["stages"][1]["ops"][0].update(op="Exec"), "expected one of ['Activation'"),
        (lambda c: c["stages"][1]["ops"][0].update(op=["Conv2d"]), "expected one of ['Activation'"),
        (lambda c: c["stages"][1]["ops"][0].update(extra=1), "the fields"),
        (lambda c: c["stages"][1]["ops"][0].update(input=7), "not defined before"),
        (lambda c: c["stages"][1]["ops"][0].update(input=-1), "0 …"),
        (lambda c: c["stages"][1]["ops"][0].update(input=True), "expected int"),
        (lambda c: c["stages"][1]["ops"][0].update(output=2**40), "bad output"),
        (lambda c: c["stages"][1]["ops"][1].update(output=1), "bad output"),
        (lambda c: c["stages"][1]["ops"][2].update(stride=[2**40, 1]), "shape"),
        (lambda c: c["stages"][1]["ops"][2].update(padding=[2**21, 0, 0, 0]), "shape"),
        (lambda c: c["stages"][1]["ops"][2].update(stride=[1]), "2 entries"),
        (lambda c: c["stages"][1]["ops"][2].update(weight="elsewhere"), "a saved tensor"),
        (lambda c: c["stages"][1]["ops"][2].update(weight=c["stages"][1]["ops"][2]["bias"]), "4 axes"),
        (lambda c: c["stages"][1]["ops"][2].update(activation="softsign"), "one of"),
        (lambda c: c["stages"][1]["shapes"].__setitem__(1, [3, 2**40, 8]), "shape"),
        (lambda c: c["stages"][1].pop("ops"), "the fields"),
        (lambda c: c["stages"][0].update(macs=2**63), "0 …"),
        (lambda c: c["stages"][0]["selector"].update(kind="opaque"), "module"),
        (lambda c: c["stages"][0]["selector"].update(w1=None), "w1"),
        (lambda c: c.update(num_classes=2**62), "num_classes"),
        (lambda c: c.update(stages=[]), "at least one stage"),
        (lambda c: c.update(stages={}), "a list"),
        (lambda c: c["input"].update(shape=[3, 9, 0]), "positive integers"),
        (lambda c: c["input"]["preprocess"].update(std=[0.0, 1, 1]), "positive std"),
        (lambda c: c["operating_points"]["never"].update(thresholds=["infinity"]), "a number"),
        (lambda c: c.update(classes=None, default_thresholds=None), "tensors that the plan does not use"),
    ],
)
def test_hostile_plans_are_refused(plan: Plan, tmp_path: Path, edit: Edit, message: str) -> None:
    plan.save(tmp_path)
    content, tensors = load_bundle(tmp_path, PLAN_FORMAT)
    edit(content)
    save_bundle(tmp_path, PLAN_FORMAT, content, tensors, overwrite=True)  # with correct hashes
    with pytest.raises(FileFormatError) as caught:
        fc.load_plan(tmp_path)
    assert message in str(caught.value)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every number, text and list in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for key, item in items for leaf in leaves(item, (*path, key)))]


def assert_runs(plan: Plan) -> None:
    """A plan classifies images on the reference backend, and on the engine too or is refused there."""
    x = torch.rand(3, *plan.input.shape, generator=torch.Generator().manual_seed(0))
    thresholds = torch.zeros(len(plan.stages) - 1)
    expected = fc.compile(plan, backend="reference")(x, thresholds)
    assert expected.probs.shape == (3, plan.num_classes)
    assert torch.equal(expected.cost_macs, plan.exit_macs[expected.exit_stage])
    try:
        out = fc.compile(plan, backend="cpu", threads=1)(x, forced_exit(1, 2))
    except BackendUnavailable:
        return
    assert out.probs.shape == (3, plan.num_classes)


def test_random_damage_is_refused_or_harmless(plan: Plan, tmp_path: Path) -> None:
    """After a change of any field, loading raises the library's error or returns a plan that runs."""
    plan.save(tmp_path)
    content, tensors = load_bundle(tmp_path, PLAN_FORMAT)
    choose = random.Random(0)
    paths = leaves(content)[1:]
    refused = 0
    for _ in range(200):
        damaged = copy.deepcopy(content)
        path = choose.choice(paths)
        target = damaged
        for key in path[:-1]:
            target = target[key]
        old = target[path[-1]]
        values = [None, -1, 0, 1, 2, 2**31, 2**62, 1.5, "inf", "relu", "", [], [1], {}, True]
        target[path[-1]] = choose.choice([*values, *([old + 1] if isinstance(old, int) else [])])
        save_bundle(tmp_path, PLAN_FORMAT, damaged, tensors, overwrite=True)
        try:
            loaded = fc.load_plan(tmp_path)
        except FileFormatError:
            refused += 1
        else:
            assert_runs(loaded)
    assert 100 < refused < 200


def test_flipped_bits_are_refused_or_harmless(plan: Plan, tmp_path: Path) -> None:
    """A flipped bit in the tensors is always detected; one in the text may only change a name."""
    plan.save(tmp_path)
    choose = random.Random(0)
    for path in list(tmp_path.iterdir()):
        good, refused = path.read_bytes(), 0
        for _ in range(40):
            damaged = bytearray(good)
            damaged[choose.randrange(len(good))] ^= 1 << choose.randrange(8)
            path.write_bytes(damaged)
            try:
                assert str(fc.load_plan(tmp_path))
            except FileFormatError:
                refused += 1
        path.write_bytes(good)
        assert refused == 40 if path.suffix == ".safetensors" else refused > 10
