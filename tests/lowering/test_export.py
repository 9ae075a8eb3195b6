"""Export: operations match the module, opaque stages give a reason, and the cascade never changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fastcascade as fc
from fastcascade.lowering.operations import (
    Activation,
    Add,
    Concat,
    Conv2d,
    Flatten,
    Linear,
    Op,
    Pad,
    Pool,
    ScaleShift,
    Slice,
)
from fastcascade.lowering.plan import Plan, StagePlan
from fastcascade.model.resnet import cut_into_segments, resnet9, resnet_cifar, resnet_imagenet
from fastcascade.testing.networks import random_network, randomise_statistics
from fastcascade.testing.oracle import reference_logits

SHAPE = (3, 9, 8)


class Call(nn.Module):
    """A network whose forward pass is a given function, with layers to call and a head for ``channels``."""

    def __init__(
        self, forward: Callable[[Call, Tensor], Tensor], channels: int | None = 4, **layers: nn.Module
    ) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.Identity()
        if channels is not None:
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, x))  # type: ignore[no-any-return]


def lower(network: nn.Module, shape: tuple[int, int, int] = SHAPE, classes: int = 5) -> Plan:
    """The plan of a one-stage cascade."""
    return fc.plan(fc.Cascade([randomise_statistics(network)], None, classes, shape))


def check(network: nn.Module, shape: tuple[int, int, int] = SHAPE, classes: int = 5) -> StagePlan:
    """Lower, require operations throughout, and compare with eager mode in float64; returns the stage."""
    plan = lower(network, shape, classes)
    assert plan.stages[0].opaque_reason is None
    compare(plan, network, shape)
    return plan.stages[0]


def compare(plan: Plan, network: nn.Module, shape: tuple[int, int, int]) -> None:
    x = torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        want = network.double().eval()(x.clone())
    got = reference_logits(plan, x)[0]
    network.float()
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def kinds(stage: StagePlan) -> list[type[Op]]:
    return [type(op) for op in stage.ops]


@settings(max_examples=12)
@given(st.integers(0, 10**6))
@example(0)
def test_random_networks(seed: int) -> None:
    check(random_network(seed, input_shape=SHAPE))


@pytest.mark.parametrize(
    ("network", "shape", "classes"),
    [
        (lambda: resnet_cifar(8, shortcut="A"), (3, 16, 16), 10),
        (lambda: resnet_cifar(8, shortcut="B"), (3, 16, 16), 10),
        (lambda: resnet9(4), (3, 32, 32), 10),
        (lambda: resnet_imagenet(18, num_classes=5), (3, 64, 64), 5),
        (lambda: resnet_imagenet(50, num_classes=5), (3, 33, 40), 5),
    ],
    ids=["A", "B", "resnet9", "basic", "bottleneck"],
)
def test_residual_networks(
    network: Callable[[], nn.Module], shape: tuple[int, int, int], classes: int
) -> None:
    module = network()
    for parameter in module.parameters():  # the head of ResNet-9 starts as zeros
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter)
    stage = check(module, shape, classes)
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert kinds(stage).count(Conv2d) == len(convolutions)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_residual_block_is_two_fused_convolutions_and_its_shortcut(shortcut: str) -> None:
    stage = lower(resnet_cifar(8, shortcut=shortcut), (3, 16, 16), 10).stages[0]
    extra = [Slice, Pad] if shortcut == "A" else [Conv2d]
    tail = [Pool, Flatten, Linear]
    assert kinds(stage) == [*[Conv2d] * 3, *([Conv2d, *extra, Conv2d] * 2), *tail]
    fused = [op for op in stage.ops if isinstance(op, Conv2d) and op.residual is not None]
    assert len(fused) == 3
    assert all(op.activation == "relu" for op in fused)


def test_segments_read_each_other() -> None:
    pairs = cut_into_segments(randomise_statistics(resnet_cifar(20)), after=[3, 6])
    stages = [fc.Stage(m, e, input="image" if k == 0 else "previous") for k, (m, e) in enumerate(pairs)]
    cascade = fc.Cascade(stages, fc.MLPSelector(), 10, (3, 32, 32))
    plan = fc.plan(cascade)
    assert [stage.shapes[0] for stage in plan.stages] == [(3, 32, 32), (16, 32, 32), (32, 16, 16)]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    want = cascade.double().eval().all_logits(x)
    torch.testing.assert_close(reference_logits(plan, x), want, rtol=1e-5, atol=1e-5)


def half(self: Call, x: Tensor) -> Tensor:
    y = x[:, :, ::2, ::2]
    return F.pad(y, (0, 0, 0, 0, 2, 3)) + self.conv(x)


def in_place(self: Call, x: Tensor) -> Tensor:
    y = self.conv(x)
    y.add_(0.5).relu_()
    same = y.view(y.size(0), y.shape[1], -1).view_as(y)
    same *= 2  # changes y through the view
    return y


def dense(self: Call, x: Tensor) -> Tensor:
    a = F.relu(self.conv(x))
    first, second = a.chunk(2, 1)
    return torch.cat([first, F.max_pool2d(second, 3, 1, 1), a.narrow(1, 1, 2)], dim=1)


def normalised(self: Call, x: Tensor) -> Tensor:
    mean = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1).to(x.dtype)
    return self.conv(1 - (x - mean) / 0.25)


def by_matrix(self: Call, x: Tensor) -> Tensor:
    y = self.conv(x).clamp(0, 6).amax((2, 3)).contiguous()
    return y @ torch.linspace(-1, 1, 20, dtype=x.dtype).reshape(4, 5) + 1


@pytest.mark.parametrize(
    ("function", "channels", "expected"),
    [
        (half, 8, {Slice, Pad, Conv2d, Pool, Flatten, Linear}),
        (in_place, 4, {Conv2d, ScaleShift, Pool, Flatten, Linear}),
        (dense, 6, {Conv2d, Slice, Pool, Concat, Flatten, Linear}),
        (normalised, 4, {ScaleShift, Conv2d, Pool, Flatten, Linear}),
        (by_matrix, None, {Conv2d, Pool, Flatten, Linear}),
    ],
    ids=["option-a by hand", "in place", "dense", "normalised", "by matrix"],
)
def test_hand_written_forwards(
    function: Callable[[Call, Tensor], Tensor],
    channels: int | None,
    expected: set[type[Op]],
) -> None:
    stride = 2 if function is half else 1
    convolution = nn.Conv2d(3, 8 if function is half else 4, 3, stride, padding=1)
    assert set(kinds(check(Call(function, channels, conv=convolution)))) == expected


@settings(max_examples=15)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["same", "valid", 0, 2]),
    groups=st.sampled_from([1, 3]),
    sides=st.tuples(*[st.integers(0, 2)] * 4),
)
def test_convolutions_of_every_kind_take_bias_norm_and_padding_in(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: int | str,
    groups: int,
    sides: tuple[int, int, int, int],
) -> None:
    stride = (1, 1) if padding == "same" else stride
    convolution = nn.Conv2d(3, 6, kernel, stride, padding, dilation, groups, bias=False)
    layers = [nn.ZeroPad2d(sides), convolution, nn.BatchNorm2d(6), nn.ReLU6()]
    stage = check(nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 5)), (3, 9, 10))
    assert kinds(stage) == [Conv2d, Pool, Flatten, Linear]


def test_a_value_with_two_readers_is_not_fused_away() -> None:
    def shared(self: Call, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(y) + self.norm(y)

    network = Call(shared, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    assert kinds(check(network))[:4] == [Conv2d, Activation, ScaleShift, Add]


def test_shared_modules_and_dead_values() -> None:
    def twice(self: Call, x: Tensor) -> Tensor:
        self.conv(x).sigmoid()  # nothing reads this
        return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))

    network = Call(twice, 3, conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3))
    assert kinds(check(network)) == [Conv2d, Conv2d, Pool, Flatten, Linear]


def test_a_stage_that_is_read_before_its_last_activation_keeps_its_features() -> None:
    """The exit's in-place ReLU changes the features of the next stage, as in eager mode."""
    first = fc.Stage(
        nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(168, 5))
    )
    second = fc.Stage(nn.Sequential(nn.Flatten(), nn.Linear(168, 5)), input="previous")
    cascade = fc.Cascade([first, second], fc.MLPSelector(), 5, SHAPE)
    x = torch.randn(4, *SHAPE)
    want = cascade.all_logits(x)
    torch.testing.assert_close(reference_logits(fc.plan(cascade), x, torch.float32), want)


def batch_branch(self: Call, x: Tensor) -> Tensor:
    return self.conv(x) if x.sum() > 0 else self.conv(-x)


class Counting(nn.Module):
    """A network that counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, x: self.conv(x).sin(), "aten.sin"),
        (lambda self, x: self.conv(x).softmax(-1), "aten.softmax.int: over pixels"),
        (lambda self, x: self.conv(x.flip(0)), "aten.flip"),
        (lambda self, x: self.conv(x) - self.conv(x).mean(0, keepdim=True), "aten.mean.dim"),
        (lambda self, x: F.pad(self.conv(x), (1, 1, 1, 1), mode="circular"), "circular"),
        (lambda self, x: self.conv(x).transpose(2, 3), "transposed view"),
        (lambda self, x: F.batch_norm(self.conv(x), None, None, training=True), "batch statistics"),
        (lambda self, x: F.dropout(self.conv(x), 0.5, training=True), "not disabled in eval mode"),
        (batch_branch, "torch.export: "),
    ],
)
def test_what_stays_opaque_says_why_and_still_runs(
    function: Callable[[Call, Tensor], Tensor], reason: str
) -> None:
    network = Call(function, conv=nn.Conv2d(3, 4, 3))
    plan = lower(network)
    stage = plan.stages[0]
    assert stage.opaque_reason is not None
    assert reason in stage.opaque_reason
    assert "\n" not in stage.opaque_reason
    assert stage.shapes == (SHAPE, (5,))
    if "dropout" not in stage.opaque_reason:
        compare(plan, network, SHAPE)


def test_reasons_name_operator_node_and_module() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Softsign()))
    network = nn.Sequential(body, nn.Flatten(), nn.Linear(168, 5))
    reason = lower(network).stages[0].opaque_reason
    assert reason is not None
    assert reason.startswith("operator aten.abs.default (node abs")
    assert reason.endswith(", module '0.1.1')")


def test_a_stage_of_features_is_traced_without_running_the_stage_before() -> None:
    """Shapes come from the plan, for lowered and for opaque stages alike."""
    bodies = [nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 6, 2), nn.Softsign()), nn.Conv2d(6, 2, 1)]

    def head(channels: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))

    stages = [
        fc.Stage(body, head(c), input="previous" if k else "image")
        for k, (body, c) in enumerate(zip(bodies, (4, 6, 2), strict=True))
    ]
    cascade = fc.Cascade(stages, fc.MLPSelector(), 5, SHAPE)
    plan = fc.plan(cascade)
    assert [stage.shapes[0] for stage in plan.stages] == [SHAPE, (4, 7, 6), (6, 6, 5)]
    x = torch.randn(3, *SHAPE)
    torch.testing.assert_close(reference_logits(plan, x, torch.float32), cascade.all_logits(x))


def test_weights_of_a_plan_share_no_memory() -> None:
    """A layer that is used twice becomes two operations; saving refuses tensors that share memory."""
    shared = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(216, 5))
    stage = check(network)
    pointers = [w.data_ptr() for op in stage.ops for w in op.tensors.values()]
    assert len(set(pointers)) == len(pointers)
    assert not {p.data_ptr() for p in network.parameters()} & set(pointers)


def test_a_stage_that_changes_its_buffers_stays_opaque() -> None:
    network = Counting()
    stage = lower(network).stages[0]
    assert stage.opaque_reason is not None
    assert "buffer 'module.calls'" in stage.opaque_reason


def digest(module: nn.Module) -> str:
    """Hash of weights, modes and gradient flags."""
    parts = [f"{name} {m.training}" for name, m in module.named_modules()]
    parts += [f"{name} {p.requires_grad}" for name, p in module.named_parameters()]
    parts += [f"{name} {t.numpy().tobytes().hex()}" for name, t in module.state_dict().items()]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def test_the_cascade_is_never_changed() -> None:
    opaque = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softsign(), nn.Flatten(), nn.Linear(168, 5))
    networks = [random_network(3, input_shape=SHAPE), opaque, Counting()]
    cascade = fc.Cascade(networks, fc.MLPSelector(), 5, SHAPE)
    cascade.train()
    networks[0].eval()
    before = digest(cascade)
    plan = fc.plan(cascade)
    with torch.no_grad():
        for parameter in cascade.parameters():
            parameter.zero_()
    assert any(w.abs().max() > 0 for op in plan.stages[0].ops for w in op.tensors.values())
    assert digest(cascade) != before
    cascade = fc.Cascade(networks, fc.MLPSelector(), 5, SHAPE)
    before = digest(cascade)
    fc.plan(cascade)
    assert digest(cascade) == before


def test_plans_carry_costs_selectors_and_points() -> None:
    networks = [random_network(seed, input_shape=SHAPE) for seed in (0, 1, 2)]
    cascade = fc.Cascade(networks, fc.ThresholdSelector("margin"), 5, SHAPE, classes=list("abcde"))
    cascade.operating_points["fast"] = fc.OperatingPoint("fast", (0.5, 1.0), {}, None, 1.0, (1, 0, 0), 1)
    plan = fc.plan(cascade)
    assert plan.exit_macs.tolist() == cascade.exit_macs.tolist()
    assert plan.dense_macs == cascade.dense_macs
    assert [stage.selector.kind if stage.selector else None for stage in plan.stages] == [
        "margin",
        "margin",
        None,
    ]
    assert plan.default_thresholds is None
    assert plan.thresholds("fast").tolist() == [0.5, 1.0]
    assert plan.classes == tuple("abcde")


def test_a_subclass_of_a_built_in_selector_is_code_of_its_own() -> None:
    class Never(fc.MLPSelector):
        def forward(self, k: int, *arguments: Tensor) -> Tensor:
            return torch.full_like(arguments[0][:, 0], -1.0)

    networks = [random_network(seed, input_shape=SHAPE) for seed in (0, 1)]
    plan = fc.plan(fc.Cascade(networks, Never(), 5, SHAPE))
    assert plan.stages[0].selector is not None
    assert plan.stages[0].selector.kind == "opaque"


def test_float64_cascades_lower_too() -> None:
    network = random_network(5, input_shape=SHAPE).double()
    check(network)


@pytest.mark.parametrize("sign", [1, -1])
def test_batch_norm_and_relu_after_a_max_pool_join_the_convolution_if_scales_are_positive(sign: int) -> None:
    norm = nn.BatchNorm2d(4)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), norm, nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )
    randomise_statistics(network)
    with torch.no_grad():
        norm.weight[1].mul_(sign)
    plan = fc.plan(fc.Cascade([network], None, 5, SHAPE))
    compare(plan, network, SHAPE)
    expected = (
        [Conv2d, Pool, Flatten, Linear]
        if sign > 0
        else [Conv2d, Pool, ScaleShift, Activation, Flatten, Linear]
    )
    assert kinds(plan.stages[0]) == expected
