"""The cuda backend with the resident kernel: which stages it runs, and the reasons against others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from host_threads import HostLaunch
from resident_cases import CASES, Case, conv, images, independent, resnets, segments, selectors
from resident_emulator import EmulatedResident, build, missing_emulator
from torch import nn

import fastcascade as fc
from fastcascade.backends.gpu.cuda import Resident, lower_with, without_slower
from fastcascade.backends.gpu.estimates import launch_rates
from fastcascade.backends.gpu.layer_lowering import stage_layers
from fastcascade.backends.gpu.resident_stage import choose_resident, overflow_reasons
from fastcascade.backends.gpu.stage_ways import WAYS
from fastcascade.backends.registry import NAMES, load_backend
from fastcascade.errors import BackendUnavailable, InvalidArgument
from fastcascade.kernels.cuda.machine import A100, H100
from fastcascade.kernels.cuda.resident_estimate import estimate_stage
from fastcascade.kernels.cuda.resident_table import resident_table
from fastcascade.lowering.plan import Plan
from fastcascade.model.pooled_net import mirrored_pooled_net, pooled_net
from fastcascade.model.resnet import Head, resnet9, resnet_cifar
from fastcascade.types import forced_exit

CPU = torch.device("cpu")


class Opaque(nn.Module):
    """A stage that becomes no operations."""

    def __init__(self) -> None:
        super().__init__()
        self.network = resnet_cifar(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x + 0 * torch.fft.rfft(x.float()).real.mean().to(x.dtype))


MIXED = Case(
    independent(lambda: [resnet_cifar(8), Opaque(), resnet_cifar(8)], selectors("stats"), combine="mean")
)


def reasons(*networks: nn.Module, shape: tuple[int, int, int] = (3, 16, 16)) -> tuple[str | None, ...]:
    """Why each of some independent networks is not in the launch."""
    selector = fc.MLPSelector() if len(networks) > 1 else None
    plan = fc.plan(fc.Cascade(list(networks), selector, 10, shape))
    return choose_resident(plan, H100).reasons


@pytest.mark.filterwarnings("ignore:Opaque uses")
def test_what_fits_runs_in_one_launch_and_the_rest_after_it(library: Path, tmp_path: Path) -> None:
    """A stage in torch between two that fit: only the first is in the launch."""
    missing = missing_emulator()
    if missing is not None:
        pytest.skip(missing)
    plan = fc.plan(MIXED.cascade())
    choice = choose_resident(plan, H100)
    assert choice.stages == 1
    assert choice.plan is not None
    kernel = EmulatedResident(build(tmp_path, resident_table(choice.plan)))
    program = lower_with(HostLaunch(library), plan, "fp16", Resident(kernel, H100))
    exact = load_backend("reference").lower(plan, precision="fp32", device=CPU, threads=None)
    x = images(70, plan.input.shape)  # two blocks of row counts
    for thresholds in (*(forced_exit(k, 3) for k in range(3)), torch.tensor([0.3, -0.2])):
        got, want = program.run(x, thresholds), exact.run(x, thresholds)
        same = got.exit_stage == want.exit_stage
        assert same.float().mean() > 0.9
        error = (got.log_probs - want.log_probs)[same].abs().max() / want.log_probs.abs().max()
        assert float(error) < 1e-2
        assert kernel.counts["races"] == 0

    first, second, third = program.describe()
    assert first.kernels[0].kernel.startswith(
        "resident: 1 stage with exits in one launch; an image has 4 warps"
    )
    assert "estimated:" in first.kernels[1].kernel
    assert "below 396 images" in first.kernels[1].kernel
    assert second.opaque_reason is not None
    assert ("resident kernel", "not this stage: a stage before it does not fit") in third.kernels


def test_reasons_name_the_layer() -> None:
    wide = nn.Sequential(conv(3, 16), nn.Conv2d(16, 16, 3, padding=2, dilation=2), nn.ReLU(), Head(16, 10))
    six = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU6(), Head(16, 10))
    five = nn.Sequential(conv(3, 16), conv(16, 16, 5), Head(16, 10))
    flat = nn.Sequential(conv(3, 16), nn.Flatten(), nn.Linear(16 * 256, 10))
    huge = nn.Sequential(conv(3, 128), conv(128, 16), Head(16, 10))
    assert "dilation" in str(reasons(wide)[0])
    assert "conv 3×3 3→16, relu6" in str(reasons(six)[0])
    assert "conv 5×5 16→16, relu" in str(reasons(five)[0])
    assert "the limit here is 3×3" in str(reasons(five)[0])
    assert "linear 4096→10" in str(reasons(flat)[0])
    assert "KiB of shared memory" in str(reasons(huge, shape=(3, 32, 32))[0])


def test_weights_and_activations_that_overflow_fp16_are_found() -> None:
    """By the layer's name; the stage after it can then not be in the launch either."""
    network = nn.Sequential(conv(3, 16), conv(16, 16), Head(16, 10)).eval()
    second = network[1][0]
    assert isinstance(second, nn.Conv2d)
    second.weight.data *= 3e5
    after = str(reasons(network, resnet_cifar(8)))
    assert "conv 3×3 16→16, relu: values of up to" in after
    assert "a stage before it does not fit" in after
    second.weight.data *= 1e3
    first = network[0][0]
    assert isinstance(first, nn.Conv2d)
    first.weight.data *= 1e-4
    assert "a weight of" in str(reasons(network)[0])


def test_a_calibration_batch_decides_by_what_it_shows() -> None:
    network = nn.Sequential(conv(3, 16), Head(16, 10)).eval()
    plan = fc.plan(fc.Cascade([network], None, 10, (3, 8, 8)))
    assert overflow_reasons(plan, torch.ones(2, 3, 8, 8)) == [None]
    assert "on the calibration images" in str(overflow_reasons(plan, torch.full((2, 3, 8, 8), 1e6))[0])


def test_a_segment_whose_features_would_leave_stays_out() -> None:
    """The second segment does not fit, so the first, whose features it reads, runs elsewhere, too."""
    first = fc.Stage(conv(3, 16), Head(16, 10))
    second = fc.Stage(nn.Sequential(conv(16, 16), nn.ReLU6()), Head(16, 10), input="previous")
    third = fc.Stage(nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU6()), Head(16, 10), input="previous")
    plan = fc.plan(fc.Cascade([first, second, third], fc.ThresholdSelector("margin"), 10, (3, 8, 8)))
    choice = choose_resident(plan, H100)
    assert choice.plan is None
    assert "the next stage, which does not fit, reads its features" in str(choice.reasons[0])


@pytest.mark.parametrize(("machine", "blocks"), [(H100, 3), (A100, 2)])
def test_a_resnet_20_takes_74_kib(machine: object, blocks: int) -> None:
    plan = fc.plan(fc.Cascade([resnet_cifar(20)], None, 10, (3, 32, 32)))
    found = choose_resident(plan, machine).plan  # type: ignore[arg-type]
    assert found is not None
    assert (found.shared_bytes, found.warps, found.blocks) == (75_296, 4, blocks)


def test_the_shipped_networks_run_in_groups_and_the_mirrored_one_fits() -> None:
    """Weights for few pixels: the last layers run on several images at once, estimated a third faster."""
    networks = [pooled_net(16), pooled_net(32), pooled_net(64), mirrored_pooled_net(64)]
    plan = fc.plan(fc.Cascade(networks, fc.MLPSelector(), 10, (3, 32, 32), "mean"))
    choice = choose_resident(plan, H100)
    assert choice.reasons == (None,) * 4
    found = choice.plan
    assert found is not None
    assert (found.warps, found.blocks) == (8, 1)
    assert [group.images for group in found.groups] == [4, 4, 3, 3]
    assert [found.stage(k)[0].step.mirror for k in range(4)] == [False, False, False, True]
    steps = [replace(entry.step, images=1) for entry in found.stage(2)]
    alone = estimate_stage(steps, found.warps, found.blocks, H100)
    assert found.estimate(2).rate > 4 / 3 * alone.rate


def test_three_resnet_9_fit() -> None:
    networks = [resnet9(8, stem=16), resnet9(16), resnet9(32)]
    plan = fc.plan(fc.Cascade(networks, fc.MLPSelector(), 10, (3, 32, 32), "mean"))
    found = choose_resident(plan, H100)
    assert found.reasons == (None, None, None)
    assert found.plan is not None
    assert (found.plan.shared_bytes, found.plan.blocks) == (111_296, 2)
    rates = [found.plan.estimate(k).rate for k in range(3)]
    assert rates == sorted(rates, reverse=True)
    others = launch_rates(stage_layers(plan.stages[0], torch.float16, CPU), H100)
    assert rates[0] > max(others.values()), "a small network is estimated fastest in one launch"
    assert without_slower(plan, found, H100).stages == 3


# ---- who decides ----


@pytest.fixture
def plan() -> Plan:
    return fc.plan(CASES["ResNet-8"].cascade())


def test_it_is_what_auto_tries_first() -> None:
    assert NAMES[0] == "cuda"


def test_a_forced_way_that_cannot_be_obeyed_is_an_error(
    plan: Plan, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, resident = HostLaunch(library), Resident(EmulatedResident(None), H100)  # type: ignore[arg-type]

    def lower(way: str, precision: str = "fp16", kernel: Resident | None = resident) -> list[str]:
        monkeypatch.setenv("FASTCASCADE_STAGES", way)
        program = lower_with(launch, plan, precision, kernel)  # type: ignore[arg-type]
        return [report.kernels[0].kernel for report in program.describe()]

    assert lower("resident")[0].startswith("resident: 1 stage")
    assert lower("torch") == ["one, none at the first stage"]
    with pytest.raises(
        BackendUnavailable, match=r"STAGES=resident is impossible for stage 'stage0'.*fp16, not fp32"
    ):
        lower("resident", "fp32")
    with pytest.raises(BackendUnavailable, match="no resident kernel"):
        lower("resident", kernel=None)
    with pytest.raises(BackendUnavailable, match="sm_75"):
        lower("resident", kernel=Resident(None, H100, "this GPU is sm_75"))
    for way in ("persistent", "layers"):
        with pytest.raises(BackendUnavailable, match="triton is not installed"):
            lower(way)
    with pytest.raises(InvalidArgument, match=f"'fast'; expected one of {', '.join(WAYS)}"):
        lower("fast")


def test_torch_stages_wait_once_by_default(plan: Plan, library: Path) -> None:
    """One readback of the count; weights in the layout of the features."""
    program = lower_with(HostLaunch(library), plan, "fp32")
    (report,) = program.describe()
    assert report.kernels[0] == ("readback of row count", "one, none at the first stage")
    weights = [
        op.weight for op in program.runners[0].stage.ops if hasattr(op, "weight") and op.weight.ndim == 4
    ]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_torch_fuses_bias_residual_and_relu_where_cudnn_can(
    plan: Plan, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With functions in place of cuDNN's, whose arguments are checked so."""
    from fastcascade.backends.gpu import torch_stage

    calls: list[str] = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        calls.append("relu")
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        calls.append("add_relu")
        return (torch.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    x, none = images(3, plan.input.shape), torch.empty(0)
    program = lower_with(HostLaunch(library), plan, "fp32")
    want = program.run(x, none).log_probs
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(torch_stage, "has_fused_conv", lambda device, dtype: True)
    torch.testing.assert_close(program.run(x, none).log_probs, want)
    assert calls.count("add_relu") == 3
    assert calls.count("relu") == 4


def test_cudnn_is_not_asked_without_a_gpu() -> None:
    from fastcascade.backends.gpu.torch_stage import has_fused_conv

    assert not has_fused_conv(CPU, torch.float32)


def test_features_that_need_no_padding_are_not_copied() -> None:
    from fastcascade.backends.gpu.feature_layout import padded_rows

    plan = fc.plan(segments(14, [2], selectors("margin"))())
    rows = torch.zeros(5, 16, 16, 16)
    assert padded_rows(rows, plan.stages[1], torch.float32).data_ptr() == rows.data_ptr()
    assert padded_rows(rows[..., :9], plan.stages[1], torch.float32).shape == rows.shape


def test_resnets_of_twice_the_width_fit() -> None:
    plan = fc.plan(independent(resnets(20, width=32), shape=(3, 32, 32))())
    for machine in (H100, A100):
        found = choose_resident(plan, machine).plan
        assert found is not None
        assert (found.warps, found.blocks) == (8, 1)
