"""Networks from ONNX files compute what ONNX Runtime computes, and lower like torch modules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.errors import FileFormatError, InvalidArgument, LoweringError
from fastcascade.interchange.onnx_model import export_onnx
from fastcascade.lowering.interpreter import run_stage
from fastcascade.lowering.operations import Activation, Conv2d
from fastcascade.model.resnet import resnet_cifar
from fastcascade.testing.networks import randomise_statistics

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

SHAPE = (4, 9, 8)


def write(
    path: Path,
    nodes: Sequence[Any],
    opset: int = 17,
    constants: dict[str, Any] | None = None,
    shape: Sequence[Any] = ("N", *SHAPE),
    outputs: Sequence[str] = ("y",),
    kind: int = 1,
) -> Path:
    """A model that reads ``x`` and returns ``y``, of any shape."""
    helper, arrays = onnx.helper, onnx.numpy_helper
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, 1, ("N", "M")) for name in outputs],
        [arrays.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("custom", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def flat(*nodes: Any) -> list[Any]:
    """Nodes that end in ``y``, and its rows as vectors."""
    last = nodes[-1]
    last.output[0] = "map"
    return [*nodes, onnx.helper.make_node("Flatten", ["map"], ["y"], axis=1)]


def runtime(path: Path, x: Tensor) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def assert_equal_to_runtime(path: Path, x: Tensor, tolerance: float = 1e-5) -> fc.Stage:
    stage = fc.Stage.from_onnx(path)
    want = runtime(path, x)
    with torch.no_grad():
        got = stage.module.eval()(x).numpy()
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())
    return stage


def node(kind: str, *inputs: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, ["x", *inputs], ["y"], **attributes)


RANDOM = np.random.default_rng(3)
WEIGHT = RANDOM.normal(size=(6, 4, 3, 3)).astype(np.float32)
VECTOR = RANDOM.normal(size=4).astype(np.float32)
POSITIVE = np.abs(VECTOR) + 0.5
WIDE = RANDOM.normal(size=(288, 5)).astype(np.float32)


def ints(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.int64)


def floats(*numbers: float) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.float32)


CONV = {"w": WEIGHT}
NORM = {"s": POSITIVE, "b": VECTOR, "m": VECTOR[::-1].copy(), "v": POSITIVE}

OPERATORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "conv, uneven pads": (node("Conv", "w", pads=[0, 1, 2, 3], strides=[2, 1]), CONV),
    "conv, same upper": (node("Conv", "w", auto_pad="SAME_UPPER", strides=[2, 2]), CONV),
    "conv, same lower": (node("Conv", "w", auto_pad="SAME_LOWER", strides=[2, 2]), CONV),
    "conv, valid": (node("Conv", "w", auto_pad="VALID", dilations=[2, 1]), CONV),
    "conv, groups": (
        node("Conv", "g", "b", group=4, pads=[1] * 4),
        {"g": WEIGHT[:4, :1].copy(), "b": VECTOR},
    ),
    "max pool, ceil": (node("MaxPool", kernel_shape=[2, 3], strides=[2, 3], ceil_mode=1), {}),
    "max pool, ceil and pads": (
        node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, ceil_mode=1),
        {},
    ),
    "max pool, uneven pads": (node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]), {}),
    "max pool, same": (node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER"), {}),
    "max pool, dilated": (node("MaxPool", kernel_shape=[2, 2], strides=[1, 1], dilations=[2, 3]), {}),
    "average pool, ceil": (node("AveragePool", kernel_shape=[2, 3], strides=[2, 3], ceil_mode=1), {}),
    "average pool, uneven": (node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 0]), {}),
    "average pool, padding counts": (
        node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 0], count_include_pad=1),
        {},
    ),
    "average pool, same": (
        node("AveragePool", kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
        {},
    ),
    "global average": (node("GlobalAveragePool"), {}),
    "global maximum": (node("GlobalMaxPool"), {}),
    "batch norm": (node("BatchNormalization", "s", "b", "m", "v", epsilon=1e-3), NORM),
    "instance norm": (node("InstanceNormalization", "s", "b"), NORM),
    "clip from below": (node("Clip", "low"), {"low": np.float32(-0.5)}),
    "clip from above": (node("Clip", "", "high"), {"high": np.float32(0.5)}),
    "clip": (node("Clip", "low", "high"), {"low": np.float32(0), "high": np.float32(6)}),
    "leaky relu": (node("LeakyRelu", alpha=0.2), {}),
    "prelu": (node("PRelu", "slope"), {"slope": VECTOR.reshape(4, 1, 1)}),
    "elu": (node("Elu", alpha=0.7), {}),
    "selu": (node("Selu"), {}),
    "celu": (node("Celu", alpha=0.6), {}),
    "hard sigmoid": (node("HardSigmoid", alpha=0.3), {}),
    "hard swish": (node("HardSwish"), {}),
    "softmax": (node("Softmax", axis=1), {}),
    "number minus value": (onnx.helper.make_node("Sub", ["c", "x"], ["y"]), {"c": np.float32(2)}),
    "number over value": (
        onnx.helper.make_node("Div", ["c", "x"], ["y"]),
        {"c": RANDOM.uniform(1, 2, (4, 1, 1)).astype(np.float32)},
    ),
    "square": (node("Pow", "two"), {"two": np.float32(2)}),
    "maximum with a number": (node("Max", "c"), {"c": np.float32(0.3)}),
    "sum of three": (onnx.helper.make_node("Sum", ["x", "x", "x"], ["y"]), {}),
    "mean over pixels": (node("ReduceMean", axes=[2, 3], keepdims=0), {}),
    "maximum over channels": (node("ReduceMax", axes=[1], keepdims=1), {}),
    "norm": (node("ReduceL2", axes=[2, 3]), {}),
    "transpose": (node("Transpose", perm=[0, 2, 3, 1]), {}),
    "crop": (
        node("Slice", "a", "z", "ax", "st"),
        {"a": ints(1, -6), "z": ints(9, 2**31), "ax": ints(2, 3), "st": ints(2, 1)},
    ),
    "mirror": (
        node("Slice", "a", "z", "ax", "st"),
        {"a": ints(-1), "z": ints(-(2**31)), "ax": ints(3), "st": ints(-1)},
    ),
    "one channel": (node("Gather", "i", axis=1), {"i": np.int64(-2)}),
    "channels in another order": (node("Gather", "i", axis=1), {"i": ints(3, 0, 2, -1)}),
    "pad": (node("Pad", "p", "v"), {"p": ints(0, 0, 1, 0, 0, 0, 2, 1), "v": np.float32(0.5)}),
    "pad, reflect": (node("Pad", "p", mode="reflect"), {"p": ints(0, 0, 1, 0, 0, 0, 2, 1)}),
    "pad, edge": (node("Pad", "p", mode="edge"), {"p": ints(0, 0, 1, 0, 0, 0, 2, 1)}),
    "nearest, twice": (node("Resize", "", "f"), {"f": floats(1, 1, 2, 2)}),
    "nearest, floor": (
        node("Resize", "", "f", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        {"f": floats(1, 1, 1.5, 2.5)},
    ),
    "bilinear": (node("Resize", "", "f", mode="linear"), {"f": floats(1, 1, 2, 3)}),
    "bilinear, aligned": (
        node("Resize", "", "f", mode="linear", coordinate_transformation_mode="align_corners"),
        {"f": floats(1, 1, 2, 3)},
    ),
    "expand": (node("Expand", "s"), {"s": ints(1, 4, 9, 8)}),
}


@pytest.mark.parametrize("case", OPERATORS)
def test_operators_equal_those_of_onnx_runtime(case: str, tmp_path: Path) -> None:
    made, constants = OPERATORS[case]
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    path = write(
        tmp_path / "model.onnx",
        flat(onnx.NodeProto.FromString(made.SerializeToString())),
        constants=constants,
    )
    assert_equal_to_runtime(path, x.clamp(min=0.1) if "over value" in case else x)


@pytest.mark.parametrize("opset", [11, 12, 13, 17])
def test_axes_and_parts_of_every_opset(opset: int, tmp_path: Path) -> None:
    """Squeeze, Unsqueeze, Split, ReduceSum and Softmax changed between opsets."""
    make = onnx.helper.make_node
    inputs = {"axes": ints(2, 3), "at": ints(1), "parts": ints(1, 3)}
    if opset < 13:
        nodes = [
            make("Split", ["x"], ["a", "b"], axis=1, split=[1, 3]),
            make("ReduceSum", ["b"], ["sum"], axes=[2, 3], keepdims=1),
            make("Squeeze", ["sum"], ["row"], axes=[2, 3]),
            make("Unsqueeze", ["row"], ["two"], axes=[1]),
        ]
        inputs = {}
    else:
        nodes = [
            make("Split", ["x", "parts"], ["a", "b"], axis=1),
            make("ReduceSum", ["b", "axes"], ["sum"], keepdims=1),
            make("Squeeze", ["sum", "axes"], ["row"]),
            make("Unsqueeze", ["row", "at"], ["two"]),
        ]
    nodes += [
        make("Softmax", ["two"], ["soft"], axis=1),
        make("Mul", ["soft", "two"], ["z"]),
        make("Flatten", ["z"], ["y"]),
    ]
    path = write(tmp_path / "model.onnx", nodes, opset, inputs)
    assert_equal_to_runtime(path, torch.randn(3, *SHAPE))


def test_gemm_with_factors(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    nodes = [make("Flatten", ["x"], ["f"]), make("Gemm", ["f", "w", "c"], ["y"], alpha=0.5, beta=2.0)]
    bias = RANDOM.normal(size=(1, 5)).astype(np.float32)
    path = write(tmp_path / "model.onnx", nodes, constants={"w": WIDE, "c": bias})
    assert_equal_to_runtime(path, torch.randn(3, *SHAPE))


def test_group_norm(tmp_path: Path) -> None:
    group_norm = node("GroupNormalization", "s", "b", num_groups=2)
    path = write(tmp_path / "model.onnx", flat(group_norm), 21, {"s": POSITIVE, "b": VECTOR})
    assert_equal_to_runtime(path, torch.randn(3, *SHAPE))


# ---- networks ----


def conv(
    a: int, b: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU
) -> nn.Sequential:
    layers = [
        nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(b),
        act(),
    ]
    return nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, inner: Any, gate: Any) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), inner(), nn.Conv2d(4, channels, 1), gate()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Inverted(nn.Module):
    """MobileNet's block: widen, filter each channel, perhaps gate, narrow, add."""

    def __init__(self, channels: int, act: Any, gate: nn.Module) -> None:
        super().__init__()
        wide = 3 * channels
        self.body = nn.Sequential(
            conv(channels, wide, 1, act=act),
            conv(wide, wide, 3, groups=wide, act=act),
            gate,
            conv(wide, channels, 1, act=nn.Identity),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 6, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Shuffle(nn.Module):
    """ShuffleNetV2's block: half of the channels pass, then halves are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = conv(channels // 2, channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        n, c, h, w = x.shape
        joined = torch.cat([left, self.body(right)], 1)
        return joined.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class LayerScale(nn.Module):
    """ConvNeXt's block: layer norm over channels, and GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(channels), nn.Linear(channels, 2 * channels)
        self.outer, self.scale = nn.Linear(2 * channels, channels), nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(nn.functional.gelu(self.inner(self.norm(x.permute(0, 2, 3, 1)))))
        return x + (self.scale * y).permute(0, 3, 1, 2)


def network(*blocks: nn.Module, channels: int, act: Any = nn.ReLU) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(channels, 5)]
    torch.manual_seed(0)
    stem = conv(3, 8, 3, 2, act=act)
    return randomise_statistics(nn.Sequential(stem, *blocks, *head)).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: randomise_statistics(resnet_cifar(8, 5, shortcut="B")).eval(),
    "MobileNetV2": lambda: network(Inverted(8, nn.ReLU6, nn.Identity()), channels=8, act=nn.ReLU6),
    "MobileNetV3": lambda: network(
        Inverted(8, nn.Hardswish, SqueezeExcitation(24, nn.ReLU, nn.Hardsigmoid)),
        channels=8,
        act=nn.Hardswish,
    ),
    "EfficientNet": lambda: network(
        Inverted(8, nn.SiLU, SqueezeExcitation(24, nn.SiLU, nn.Sigmoid)), channels=8, act=nn.SiLU
    ),
    "DenseNet": lambda: network(
        Dense(8), Dense(14), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), channels=20
    ),
    "ShuffleNet": lambda: network(Shuffle(8), Shuffle(8), channels=8),
    "ConvNeXt": lambda: network(LayerScale(8), channels=8, act=nn.GELU),
    "mish": lambda: network(channels=8, act=nn.Mish),
}


def export(module: nn.Module, path: Path, opset: int = 17, fixed: bool = False, folded: bool = True) -> Path:
    """By torch's exporter that traces."""
    mode = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.randn(1, 3, 20, 18),),
            path,
            dynamo=False,
            opset_version=opset,
            training=mode,
            do_constant_folding=folded,
            input_names=["image"],
            dynamic_axes=None if fixed else {"image": {0: "n"}},
        )
    return path


def test_an_operator_without_an_operation_is_named_with_its_node(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    nodes = flat(make("Relu", ["x"], ["r"], "first"), make("Softmax", ["r"], [""], "head/over.rows", axis=2))
    stage = fc.Stage.from_onnx(write(tmp_path / "model.onnx", nodes))
    reason = fc.plan(fc.Cascade([stage], None, math.prod(SHAPE), SHAPE)).stages[0].opaque_reason
    assert reason is not None
    assert "ONNX Softmax head/over_rows" in reason


def assert_lowers_as(module: nn.Module, stage: fc.Stage) -> None:
    """The stage has the operations of the module that was exported."""
    plans = [fc.plan(fc.Cascade([s], None, 5, (3, 20, 18))) for s in (module, fc.Stage(stage.module))]
    mine, theirs = (plan.stages[0] for plan in plans)
    assert theirs.opaque_reason is None
    assert sorted(map(str, theirs.ops)) == sorted(map(str, mine.ops))
    assert plans[0].dense_macs == plans[1].dense_macs


@pytest.mark.parametrize("name", NETWORKS)
def test_traced_networks(name: str, tmp_path: Path) -> None:
    module = NETWORKS[name]()
    path = export(module, tmp_path / "model.onnx")
    stage = assert_equal_to_runtime(path, torch.randn(4, 3, 20, 18))
    assert_lowers_as(module, stage)


@pytest.mark.parametrize("name", ["ResNet", "EfficientNet", "ShuffleNet"])
@pytest.mark.parametrize("opset", [11, 13, 20])
def test_unfolded_networks_of_several_opsets(name: str, opset: int, tmp_path: Path) -> None:
    module = NETWORKS[name]()
    path = export(module, tmp_path / "model.onnx", opset, folded=False)
    kinds = [made.op_type for made in onnx.load(path).graph.node]
    assert "BatchNormalization" in kinds
    assert_lowers_as(module, assert_equal_to_runtime(path, torch.randn(4, 3, 20, 18)))


@pytest.mark.parametrize("name", ["ResNet", "ShuffleNet", "EfficientNet"])
def test_a_model_for_one_image_runs_on_batches(name: str, tmp_path: Path) -> None:
    module = NETWORKS[name]()
    stage = fc.Stage.from_onnx(export(module, tmp_path / "model.onnx", fixed=True))
    x = torch.randn(4, 3, 20, 18)
    torch.testing.assert_close(stage.module(x), module(x), rtol=1e-4, atol=1e-5)
    assert_lowers_as(module, stage)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_exporter_with_torch_export(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch's second exporter needs onnxscript")
    module, path = NETWORKS[name](), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.randn(2, 3, 20, 18),),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
    assert_lowers_as(module, assert_equal_to_runtime(path, torch.randn(4, 3, 20, 18)))


def test_stages_that_this_library_exported(tmp_path: Path) -> None:
    normalize = fc.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    first = fc.Stage(
        nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d((2, 2))), nn.Sequential(nn.Flatten(), nn.Linear(32, 5))
    )
    second = fc.Stage(conv(8, 8), nn.Sequential(nn.Flatten(), nn.Linear(32, 5)), input="previous")
    cascade = fc.Cascade([first, second], fc.MLPSelector(), 5, (3, 20, 18), preprocess=normalize)
    plan = fc.plan(cascade)
    export_onnx(plan, tmp_path)
    x = torch.randint(0, 256, (3, 3, 20, 18), dtype=torch.uint8)
    features, logits = run_stage(plan.stages[0], cascade.images(x))
    alone = fc.Cascade([fc.Stage.from_onnx(tmp_path / "stage-0.onnx")], None, 5, (3, 20, 18))
    assert alone.input.preprocess == fc.Normalize(
        (0, 0, 0), (1 / 255,) * 3
    )  # the model normalises bytes itself
    torch.testing.assert_close(alone.all_logits(x)[0], logits, rtol=1e-4, atol=1e-5)
    later = fc.Stage.from_onnx(tmp_path / "stage-1.onnx").module
    torch.testing.assert_close(later(features), run_stage(plan.stages[1], features)[1], rtol=1e-4, atol=1e-5)


def test_an_imported_network_trains_saves_and_loads(tmp_path: Path) -> None:
    path = export(NETWORKS["MobileNetV2"](), tmp_path / "model.onnx", folded=False)
    stage = fc.Stage.from_onnx(path)
    cascade = fc.Cascade([stage], None, 5, (3, 20, 18))
    cascade.all_logits(torch.randn(4, 3, 20, 18)).square().sum().backward()
    assert all(p.grad is not None for p in stage.parameters())
    with torch.no_grad():
        for p in stage.parameters():
            p.add_(0.01)
    cascade.save(tmp_path / "saved")
    again = fc.load(tmp_path / "saved", modules={"model": fc.Stage.from_onnx(path).module})
    x = torch.randn(3, 3, 20, 18)
    assert torch.equal(again(x).probs, cascade(x).probs)
    assert fc.compile(tmp_path / "saved")(x).label.tolist() == cascade(x).label.tolist()


def test_activations_of_several_nodes_become_one(tmp_path: Path) -> None:
    plan = fc.plan(
        fc.Cascade(
            [fc.Stage.from_onnx(export(NETWORKS["ConvNeXt"](), tmp_path / "m.onnx"))], None, 5, (3, 20, 18)
        )
    )
    kinds = [getattr(op, "activation", None) or getattr(op, "kind", None) for op in plan.stages[0].ops]
    assert kinds.count("gelu") == 2
    assert all(
        isinstance(op, Conv2d) for op in plan.stages[0].ops if getattr(op, "activation", None) == "gelu"
    )
    assert not any(isinstance(op, Activation) for op in plan.stages[0].ops)


@pytest.mark.parametrize("form", ["Mul", "Div"])
@pytest.mark.parametrize("half_first", [False, True])
def test_gelu_in_every_order_of_its_factors(form: str, half_first: bool, tmp_path: Path) -> None:
    make = onnx.helper.make_node
    nodes = [
        make(form, ["x", "root"], ["scaled"]),
        make("Erf", ["scaled"], ["erf"]),
        make("Add", ["one", "erf"], ["gate"]),
        make("Mul", ["x", "half"], ["product"]) if half_first else make("Mul", ["gate", "x"], ["product"]),
        make("Mul", ["product", "gate"] if half_first else ["half", "product"], ["z"]),
        make("Flatten", ["z"], ["y"]),
    ]
    root = math.sqrt(0.5) if form == "Mul" else math.sqrt(2)
    constants = {"root": np.float32(root), "one": np.float32(1), "half": np.float32(0.5)}
    path = write(tmp_path / "model.onnx", nodes, constants=constants)
    stage = assert_equal_to_runtime(path, torch.randn(3, *SHAPE))
    assert [made.kind for made in stage.module.nodes] == ["Gelu", "Flatten"]
    wrong = write(tmp_path / "wrong.onnx", nodes, constants=constants | {"half": np.float32(0.6)})
    assert "Erf" in [
        made.kind for made in assert_equal_to_runtime(wrong, torch.randn(3, *SHAPE)).module.nodes
    ]


def test_a_reshape_for_one_image_keeps_the_batch(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])]
    path = write(tmp_path / "model.onnx", nodes, constants={"shape": ints(1, -1)}, shape=(1, *SHAPE))
    x = torch.randn(3, *SHAPE)
    assert torch.equal(fc.Stage.from_onnx(path).module(x), x.flatten(1))


def test_a_product_with_a_gate_of_something_else_stays(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    nodes = [
        make("Neg", ["x"], ["n"]),
        make("Sigmoid", ["n"], ["s"]),
        make("Mul", ["x", "s"], ["z"]),
        make("Flatten", ["z"], ["y"]),
    ]
    assert_equal_to_runtime(write(tmp_path / "model.onnx", nodes), torch.randn(3, *SHAPE))


def test_a_softmax_at_the_end_is_left_out(tmp_path: Path) -> None:
    module = NETWORKS["ResNet"]()
    path = export(nn.Sequential(module, nn.Softmax(1)).eval(), tmp_path / "model.onnx")
    x = torch.randn(3, 3, 20, 18)
    torch.testing.assert_close(fc.Stage.from_onnx(path).module(x), module(x), rtol=1e-4, atol=1e-5)


def test_images_of_bytes_and_channels_last(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    nodes = [
        make("Cast", ["x"], ["f"], to=1),
        make("Div", ["f", "c"], ["d"]),
        make("Transpose", ["d"], ["t"], perm=[0, 3, 1, 2]),
        make("GlobalAveragePool", ["t"], ["g"]),
        make("Flatten", ["g"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, constants={"c": np.float32(255)}, shape=("N", 9, 8, 3), kind=2)
    stage = fc.Stage.from_onnx(path)
    assert stage.transform == fc.ImageTransform((9, 8), normalize=fc.Normalize((0,) * 3, (1 / 255,) * 3))
    cascade = fc.Cascade([stage], None, 3, (3, 9, 8), preprocess=fc.Normalize((0.5,) * 3, (0.2,) * 3))
    x = torch.randint(0, 256, (2, 9, 8, 3), dtype=torch.uint8)
    torch.testing.assert_close(cascade.all_logits(x)[0].numpy(), runtime(path, x), rtol=1e-5, atol=1e-5)


# ---- refusals ----


def _nodes(*kinds: str) -> list[Any]:
    names = ["x", *(f"v{i}" for i in range(len(kinds) - 1)), "y"]
    return [
        onnx.helper.make_node(kind, [a], [b], name=f"my {kind}")
        for kind, a, b in zip(kinds, names, names[1:], strict=False)
    ]


REFUSED: dict[str, tuple[Any, str]] = {
    "an unknown operator": (_nodes("Sin", "Flatten"), r"Sin \(node 'my Sin'\)"),
    "an operator of a library": (
        [onnx.helper.make_node("Fancy", ["x"], ["y"], name="n7", domain="custom")],
        r"custom.Fancy \(node 'n7'\)",
    ),
    "a selection of images": (
        [
            onnx.helper.make_node("Gather", ["x", "i"], ["z"], name="first", axis=0),
            onnx.helper.make_node("Flatten", ["z"], ["y"]),
        ],
        "first",
    ),
    "a reduction over the batch": (_nodes("ReduceMean", "Flatten"), r"ReduceMean \(node 'my ReduceMean'\)"),
    "a cast to integers": (
        [
            onnx.helper.make_node("Cast", ["x"], ["z"], name="round", to=7),
            onnx.helper.make_node("Flatten", ["z"], ["y"]),
        ],
        r"Cast \(node 'round'\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_named(case: str, tmp_path: Path) -> None:
    nodes, message = REFUSED[case]
    path = write(tmp_path / "model.onnx", nodes, constants={"i": ints(0)})
    with pytest.raises(LoweringError, match=message):
        fc.Stage.from_onnx(path)


def test_no_classifier_of_single_images(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    two = [*_nodes("Relu"), onnx.helper.make_node("Exp", ["x"], ["z"])]
    write(path, two, outputs=("y", "z"))
    with pytest.raises(InvalidArgument, match=r"outputs \['y', 'z'\]; name the one"):
        fc.Stage.from_onnx(path)
    with pytest.raises(InvalidArgument, match="no value 'logits'"):
        fc.Stage.from_onnx(path, output="logits")
    write(path, _nodes("Relu"))
    with pytest.raises(InvalidArgument, match=r"returns shape \(2, 4, 9, 8\) for two images"):
        fc.Stage.from_onnx(path)
    write(path, _nodes("Relu"), shape=("N", 7))
    with pytest.raises(InvalidArgument, match="2 axes; expected images"):
        fc.Stage.from_onnx(path)
    write(path, _nodes("Relu"), kind=7)
    with pytest.raises((InvalidArgument, FileFormatError)):
        fc.Stage.from_onnx(path)
    batch = [*flat(node("Relu"))]
    batch[-1].output[0] = "f"
    batch.append(onnx.helper.make_node("ReduceMean", ["f"], ["m"], axes=[0]))
    batch.append(onnx.helper.make_node("Sub", ["f", "m"], ["y"]))
    write(path, batch)
    with pytest.raises(InvalidArgument, match="other logits beside another one"):
        fc.Stage.from_onnx(path)


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"\x08\x08" * 40])
def test_no_onnx_model(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"model.onnx is not a valid ONNX model"):
        fc.Stage.from_onnx(path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(InvalidArgument, match=r"pip install 'fastcascade\[onnx\]'"):
        fc.Stage.from_onnx("model.onnx")


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", _nodes("Flatten"), opset=6)
    with pytest.raises(LoweringError, match="opset 6; expected at least 7"):
        fc.Stage.from_onnx(path)


def test_infinite_padding_survives_the_runtime_without_torch(tmp_path: Path) -> None:
    """Uneven max pooling pads with −∞, which JSON holds as text."""
    pool = node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])
    path = write(tmp_path / "model.onnx", flat(pool))
    cascade = fc.Cascade([fc.Stage.from_onnx(path)], None, 64, SHAPE)
    fast = fc.compile(cascade, backend="cpu")
    fast.plan.save(tmp_path)
    x = torch.randn(3, *SHAPE)
    from fastcascade import runtime as plain

    assert np.array_equal(plain.load(tmp_path)(x.numpy()).probs, fast(x).probs.numpy())
    assert math.isinf(min(getattr(op, "value", 0) for op in fast.plan.stages[0].ops))
