"""The compiled cascade: the cascade's call, clear refusals, and no surprises as a module."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastcascade as fc
from fastcascade.engine import CompiledCascade
from fastcascade.errors import FastCascadeError, InvalidArgument

SHAPE = (3, 6, 6)


def network(width: int) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), *head)


@pytest.fixture
def cascade() -> fc.Cascade:
    cascade = fc.Cascade([network(4), network(6)], fc.MLPSelector(), 4, SHAPE)
    cascade.operating_points["first"] = fc.OperatingPoint("first", (-torch.inf,), {}, None, 1.0, (1, 0), 1)
    return cascade


@pytest.fixture
def fast(cascade: fc.Cascade) -> CompiledCascade:
    return fc.compile(cascade, backend="reference")


def test_every_way_to_name_thresholds(cascade: fc.Cascade, fast: CompiledCascade) -> None:
    x = torch.randn(50, *SHAPE)
    always = cascade.operating_points["first"]
    for point in ("first", always, [-torch.inf], torch.tensor([-torch.inf])):
        assert fast(x, point).exit_stage.eq(0).all()
        assert fast(x, operating_point=point).cost_macs.eq(cascade.exit_macs[0]).all()
    assert fast(x, [torch.inf]).exit_stage.eq(1).all()
    assert torch.equal(fast(x).exit_stage, fast(x, [0.0]).exit_stage)
    for wrong in ("second", [0.0, 0.0], [torch.nan]):
        with pytest.raises(InvalidArgument):
            fast(x, wrong)


def test_a_confidence_threshold_has_no_default() -> None:
    cascade = fc.Cascade([network(4), network(6)], fc.ThresholdSelector("margin"), 4, SHAPE)
    with pytest.raises(InvalidArgument, match=r"fc\.calibrate"):
        fc.compile(cascade, backend="reference")(torch.zeros(1, *SHAPE))


def test_one_tensor_for_pipelines_that_expect_one(cascade: fc.Cascade) -> None:
    x = torch.randn(5, *SHAPE)
    log_probs = fc.compile(cascade, backend="reference", output="log_probs")(x)
    torch.testing.assert_close(log_probs, cascade(x).probs.log())


def test_an_empty_batch_answers_empty(cascade: fc.Cascade, fast: CompiledCascade) -> None:
    got, want = fast(torch.empty(0, *SHAPE)), cascade(torch.empty(0, *SHAPE))
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 6, 7), "expected (N, 3, 6, 6)"),
        (torch.zeros(3, 6, 6), "expected (N, 3, 6, 6)"),
        (torch.zeros(2, *SHAPE, dtype=torch.int64), "int64"),
        (torch.zeros(2, *SHAPE, dtype=torch.uint8), "no preprocess"),
        (torch.zeros(2, *SHAPE, device="meta"), "runs on cpu"),
        (torch.zeros(2, *SHAPE).to_sparse(), "layout"),
        (torch.zeros(2, *SHAPE, requires_grad=True), "differentiate the cascade itself"),
        ([[0.0]], "list"),
    ],
)
def test_bad_input_is_told_what_came_and_what_was_expected(
    fast: CompiledCascade, x: Any, message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        fast(x)
    assert message in str(caught.value)


def test_other_floats_and_arrays_are_taken(fast: CompiledCascade) -> None:
    x = torch.randn(4, *SHAPE)
    want = fast(x).probs
    assert torch.equal(fast(x.double()).probs, want)
    assert torch.equal(fast(x.numpy().astype(np.float64)).probs, want)
    assert fast(x.half()).probs.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(fast(x.requires_grad_()).probs, want)


@pytest.mark.filterwarnings("error")
def test_read_only_and_mirrored_arrays_are_taken(fast: CompiledCascade) -> None:
    array = torch.randn(4, *SHAPE).numpy()
    mirrored = array[..., ::-1]
    want = fast(torch.from_numpy(mirrored.copy())).probs
    assert torch.equal(fast(mirrored).probs, want)
    frozen = mirrored.copy()
    frozen.flags.writeable = False
    assert torch.equal(fast(frozen).probs, want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "probs"}, "unknown output 'probs'"),
        ({"threads": 0}, "threads is 0"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"backend": "tpu"}, "unknown backend 'tpu'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
    ],
)
def test_bad_settings_are_refused(cascade: fc.Cascade, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        fc.compile(cascade, **arguments)
    with pytest.raises(InvalidArgument, match="expected a Cascade, a Plan or a folder"):
        fc.compile(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_it_is_a_module_without_state_or_modes(cascade: fc.Cascade, fast: CompiledCascade) -> None:
    x = torch.randn(4, *SHAPE)
    want = fast(x).probs
    assert not fast.state_dict()
    assert not list(fast.parameters())
    assert not fast.training
    fast.eval()
    cascade.train()
    nn.Sequential(fast, nn.Dropout()).train()
    assert not fast.training
    assert torch.equal(fast(x).probs, want)
    assert all(module.training for module in cascade.modules())
    assert torch.equal(nn.Sequential(fast)(x).probs, want)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to("meta"),
        lambda m: m.to("cuda:7"),
        lambda m: m.cuda(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
    ],
)
def test_conversions_that_would_do_nothing_are_refused(
    cascade: fc.Cascade, fast: CompiledCascade, convert: Any
) -> None:
    x = torch.randn(4, *SHAPE)
    want = fast(x).probs
    for module in (fast, nn.Sequential(fast, nn.Linear(4, 4))):
        with pytest.raises(InvalidArgument, match=r"fc\.compile\(") as caught:
            convert(module)
        assert "cascade" in str(caught.value)
        assert all((p.device.type, p.dtype) == ("cpu", torch.float32) for p in module.parameters())
    assert not fast.training
    assert torch.equal(fast(x).probs, want)


def test_conversions_that_change_nothing_are_fine(fast: CompiledCascade) -> None:
    x = torch.randn(4, *SHAPE)
    want = fast(x).probs
    for module in (fast, nn.Sequential(fast)):
        for same in (module.to("cpu"), module.cpu(), module.float(), module.eval(), module.train(False)):
            assert same is module
        assert torch.equal(module.to("cpu", torch.float32)(x).probs, want)
        module.to(memory_format=torch.channels_last)


def test_new_weights_and_points_arrive_with_recompile(cascade: fc.Cascade, fast: CompiledCascade) -> None:
    x = torch.randn(4, *SHAPE)
    before = fast(x, "first").probs
    with torch.no_grad():
        cascade.stage(0).module[0].weight.mul_(3)  # type: ignore[index]
    cascade.operating_points["new"] = cascade.operating_points["first"]
    assert torch.equal(fast(x, "first").probs, before)
    fast.recompile()
    torch.testing.assert_close(fast(x, "new").probs, cascade(x, "new").probs)
    assert not torch.equal(fast(x, "first").probs, before)


def test_plans_compile_too_but_have_nothing_to_recompile(
    cascade: fc.Cascade, fast: CompiledCascade, tmp_path: Path
) -> None:
    x = torch.randn(4, *SHAPE)
    fast.plan.save(tmp_path)
    from_file = fc.compile(fc.load_plan(tmp_path), backend="reference")
    assert torch.equal(from_file(x).probs, fast(x).probs)
    with pytest.raises(InvalidArgument, match="compiled from a plan"):
        from_file.recompile()


def test_a_copy_has_a_program_of_its_own_and_pickling_is_refused(fast: CompiledCascade) -> None:
    x = torch.randn(4, *SHAPE)
    clone = copy.deepcopy(fast)
    assert clone.program is not fast.program
    assert torch.equal(clone(x).probs, fast(x).probs)
    clone.recompile()
    with pytest.raises(FastCascadeError, match=r"plan\.save"):
        pickle.dumps(fast)


def test_describe_shows_stages_kernels_and_reasons(cascade: fc.Cascade) -> None:
    own = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.Softsign())
    text = fc.compile(
        fc.Cascade([network(4), own], fc.MLPSelector(), 4, SHAPE), backend="reference"
    ).describe()
    assert "backend reference, fp32 on cpu" in text
    assert "conv 3×3 3→4, relu" in text
    assert "stage 'stage1': opaque: operator aten.abs.default" in text


def test_answers_do_not_depend_on_order_or_splitting(cascade: fc.Cascade, fast: CompiledCascade) -> None:
    x = torch.randn(33, *SHAPE)
    thresholds = fast(x).probs.new_tensor([0.0])
    whole = fast(x, thresholds)
    order = torch.randperm(33)
    shuffled = fast(x[order], thresholds)
    parts = [fast(part, thresholds) for part in x.split([1, 15, 17])]
    for field, (want, got) in enumerate(zip(whole, shuffled, strict=True)):
        torch.testing.assert_close(got, want[order])
        torch.testing.assert_close(torch.cat([part[field] for part in parts]), want)
