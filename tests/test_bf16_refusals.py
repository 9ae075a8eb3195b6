"""bf16 where the CPU has no AVX512-BF16: refused by everything that takes a precision, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastcascade as fc
from fastcascade import _C, cli, runtime
from fastcascade.errors import BackendUnavailable, InvalidArgument
from fastcascade.lowering.plan import Plan
from fastcascade.model.registry import build_network

SHAPE = (3, 8, 8)
IMAGES = torch.randn(20, *SHAPE)


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine: the portable kernels have no bf16 beside them."""
    monkeypatch.setenv("FASTCASCADE_ISA", "portable")


@pytest.fixture
def cascade() -> fc.Cascade:
    return fc.Cascade(
        [build_network("resnet_cifar:8", 5) for _ in range(2)], fc.ThresholdSelector("margin"), 5, SHAPE
    )


def assert_says_why(message: str) -> None:
    """What was asked, what is missing, what works."""
    assert "bf16" in message
    lacks = "AVX-512 F, BW and BF16, which this processor or its operating system lacks"
    other = "needs instruction set 'avx512', but 'portable' was chosen"
    assert lacks in message or other in message
    assert "fp32 and int8 run here" in message


def refuse_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowering a cascade takes seconds; a refusal comes before it."""
    monkeypatch.setattr("fastcascade.lowering.export.plan", lambda *_: pytest.fail("lowered"))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_compile(cascade: fc.Cascade, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fc.plan(cascade)
    refuse_to_lower(monkeypatch)
    for model in (cascade, plan):
        with pytest.raises(BackendUnavailable) as refusal:
            fc.compile(model, backend=backend, precision="bf16")
        assert_says_why(str(refusal.value))


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("reference", "it runs fp32 and int8, not bf16"), ("triton", "bf16"), ("cuda", "bf16")],
)
def test_other_backends_refuse_it(cascade: fc.Cascade, backend: str, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=reason):
        fc.compile(cascade, backend=backend, precision="bf16")


def test_benchmark_and_runtime(cascade: fc.Cascade, tmp_path: Path) -> None:
    fc.plan(cascade).save(tmp_path)
    calls: list[Callable[[], object]] = [
        lambda: fc.benchmark(cascade, batches=[4], precision="bf16"),
        lambda: runtime.load(tmp_path, precision="bf16"),
        lambda: runtime.load(tmp_path / "missing", precision="bf16"),
        lambda: fc.compile(tmp_path, precision="bf16"),
    ]
    for call in calls:
        with pytest.raises(BackendUnavailable) as refusal:
            call()
        assert_says_why(str(refusal.value))
    with pytest.raises(InvalidArgument, match="precision is 'fp8'; expected 'bf16', or None"):
        runtime.load(tmp_path, precision="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["predict", "evaluate", "bench", "report", "calibrate"])
def test_commands_refuse_it_before_they_read_images_or_lower(
    command: str,
    cascade: fc.Cascade,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cascade.save(tmp_path / "model")
    refuse_to_lower(monkeypatch)
    arguments = [
        command,
        str(tmp_path / "model"),
        str(tmp_path / "no-such-images.npz"),
        "--precision",
        "bf16",
    ]
    arguments += {"report": ["--out", str(tmp_path / "page")], "calibrate": ["--budget-macs", "1e5"]}.get(
        command, []
    )
    monkeypatch.setattr("sys.argv", ["fastcascade", *arguments])
    monkeypatch.setattr("warnings.showwarning", None)
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert_says_why(" ".join(capsys.readouterr().err.split()))


def test_what_bf16_cannot_be_combined_with(cascade: fc.Cascade, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="only 'int8' and 'fp32' can be mixed"):
        fc.compile(cascade, precision=["bf16", "fp32"])
    with pytest.raises(InvalidArgument, match="is for precision 'int8', but precision is 'bf16'"):
        fc.compile(cascade, precision="bf16", calibration_data=IMAGES)
    with pytest.raises(InvalidArgument, match="expected 'int8', or 'int8' or 'fp32' per stage"):
        fc.quantize(cascade, IMAGES, "bf16")
    quantised = fc.quantize(cascade, IMAGES)
    with pytest.raises(InvalidArgument, match="which cannot become 'bf16'"):
        fc.compile(quantised, precision="bf16")


def test_the_engine_itself_refuses(cascade: fc.Cascade) -> None:
    from fastcascade.backends.cpu import CpuProgram

    plan: Plan = fc.plan(cascade)
    with pytest.raises(ValueError, match="bf16 needs"):
        CpuProgram(plan, 1, precision="bf16")
    assert _C.bf16_refusal("portable") == _C.bf16_refusal()
    with pytest.raises(ValueError, match="unknown instruction set 'neon'"):
        _C.bf16_refusal("neon")
    with pytest.raises(ValueError, match="precision is 'fp8'; expected fp32 or bf16"):
        _C.Cascade([], [], 5, precision="fp8")
