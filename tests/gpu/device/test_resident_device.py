"""The resident kernel on a GPU: the cascades of the emulator's tests and larger ones, against fp32."""

from __future__ import annotations

import pytest
import torch
from resident_cases import CASES, MORE_CASES, POOLED_CASES, SLOW_CASES, Case, images, in_widest_gaps

import fastcascade as fc
from fastcascade.backends.registry import load_backend
from fastcascade.types import forced_exit

ALL = {**CASES, **POOLED_CASES, **SLOW_CASES, **MORE_CASES}
FP32 = 6e-3
"""Largest error of a log-probability, relative to the largest one."""


def skip_without_a_gpu() -> None:
    reason = load_backend("cuda").unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the resident kernel needs sm_80")


@pytest.mark.parametrize("name", ALL)
def test_cascades_answer_as_the_reference_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_a_gpu()
    monkeypatch.setenv("FASTCASCADE_STAGES", "resident")
    case: Case = ALL[name]
    cascade = case.cascade()
    plan = fc.plan(cascade)
    compiled = fc.compile(plan, backend="cuda", precision="fp16", device="cuda")
    exact = fc.compile(plan, backend="reference", device="cpu").program
    x = images(300, plan.input.shape)
    few, count = x[::30], len(plan.stages)
    for k in range(count):
        thresholds = forced_exit(k, count)
        got, want = compiled.program.run(few.cuda(), thresholds), exact.run(few, thresholds)
        assert got.exit_stage.tolist() == [k] * len(few)
        error = (got.log_probs.cpu() - want.log_probs).abs().max() / want.log_probs.abs().max()
        assert float(error) < FP32
    with torch.no_grad():
        scores = cascade.all_exits(plan.input.to_float(few))[1] if count > 1 else torch.empty(0, 8)
    thresholds = in_widest_gaps(scores) if count > 1 else torch.empty(0)
    first, second = (compiled.program.run(x.cuda(), thresholds) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other), "the same bits in every run"
    assert bool((first.label >= 0).all())


def test_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_a_gpu()
    monkeypatch.setenv("FASTCASCADE_STAGES", "resident")
    plan = fc.plan(CASES["ResNet-8 then 14, mean"].cascade())
    program = fc.compile(plan, backend="cuda", precision="fp16", device="cuda").program
    x, thresholds = images(64, plan.input.shape).cuda(), torch.zeros(1).pin_memory()
    program.run(x, thresholds)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        program.run(x, thresholds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
