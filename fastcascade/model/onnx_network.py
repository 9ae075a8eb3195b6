"""Networks from ONNX files, as torch modules: ``Stage.from_onnx``.

The graph is run node by node in torch, so that such a network trains, saves and lowers like any other. The
package ``onnx`` reads the file; it is optional and imported at first use.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcascade.errors import FileFormatError, InvalidArgument, LoweringError
from fastcascade.model.image_transform import ImageTransform
from fastcascade.model.onnx_operators import ARRAY_INPUTS, KNOWN, Node, Value, run_node
from fastcascade.model.onnx_patterns import merge_patterns
from fastcascade.types import Normalize

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxNetwork", "onnx_network"]

_OLDEST_OPSET = 7
_FLOATS = (1, 10, 11, 16)  # onnx.TensorProto: float, half, double, bfloat16
_UINT8 = 2


class OnnxNetwork(nn.Module):
    """The part of an ONNX graph that computes one output from one input.

    Weights are parameters in float32, named as in the file with "_" for other signs. The statistics of batch
    norms are buffers, and stay as they are in training.

    Attributes:
        input_shape: (C, H, W) of an image as the file declares it; None where a size is open.
    """

    def __init__(
        self, nodes: Sequence[Node], constants: Mapping[str, NDArray[Any]], input: str, output: str
    ) -> None:
        super().__init__()
        calls = map(_Call, _with_last_reads(nodes, output))
        self.calls = nn.ModuleDict({f"{i} {_title(call.node)}": call for i, call in enumerate(calls)})
        self.input, self.output = input, output
        self.input_shape: tuple[int, int, int] | None = None
        self.arrays: dict[str, NDArray[Any]] = {}
        self.tensors: dict[str, str] = {}
        arrays, statistics = _array_names(nodes), _statistics(nodes)
        for name, constant in constants.items():
            if constant.dtype.kind != "f" or constant.ndim == 0 or name in arrays:
                self.arrays[name] = constant
                continue
            attribute = self.tensors[name] = self._free_name(name)
            value = torch.from_numpy(constant.astype(np.float32))
            if name in statistics:
                self.register_buffer(attribute, value)
            else:
                self.register_parameter(attribute, nn.Parameter(value))

    def _free_name(self, name: str) -> str:
        wanted = "".join(c if c.isalnum() else "_" for c in name) or "constant"
        return wanted if not hasattr(self, wanted) else f"{wanted}_{len(self.tensors)}"

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) → (n, classes)."""
        values: dict[str, Value] = {self.input: x, **self.arrays}
        values |= {name: getattr(self, attribute) for name, attribute in self.tensors.items()}
        for call in self._calls():
            node = call.node
            inputs = [values[name] if name else None for name in node.inputs]
            values |= dict(zip(node.outputs, call(*inputs), strict=False))
            for name in node.dead:
                del values[name]
        result = values[self.output]
        assert isinstance(result, Tensor)
        return result

    @property
    def nodes(self) -> list[Node]:
        """The calls of operators, in order."""
        return [call.node for call in self._calls()]

    def _calls(self) -> Iterable[_Call]:
        return cast(Iterable[_Call], self.calls.values())

    def __repr__(self) -> str:
        """One line; there may be hundreds of calls."""
        kinds = Counter(node.kind for node in self.nodes)
        return f"OnnxNetwork({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})"


class _Call(nn.Module):
    """A node as a module, because error messages and plans name the module in which an operator is."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, *inputs: Value) -> list[Value]:
        return run_node(self.node, inputs)


def _title(node: Node) -> str:
    """The operator and the node's name, without the dots that separate modules."""
    return f"ONNX {node.kind} {node.name}".replace(".", "_").strip()


def _with_last_reads(nodes: Sequence[Node], output: str) -> list[Node]:
    """The nodes with the values that each is the last to read."""
    last = {name: i for i, node in enumerate(nodes) for name in (*node.outputs, *node.inputs) if name}
    made = {name for node in nodes for name in node.outputs} - {output}
    return [
        replace(
            node,
            dead=tuple(
                n for n in dict.fromkeys((*node.inputs, *node.outputs)) if last.get(n) == i and n in made
            ),
        )
        for i, node in enumerate(nodes)
    ]


def _array_names(nodes: Iterable[Node]) -> set[str]:
    """Constants that are read as numbers."""
    return {node.inputs[i] for node in nodes for i in ARRAY_INPUTS.get(node.kind, ()) if i < len(node.inputs)}


def _statistics(nodes: Iterable[Node]) -> set[str]:
    """Means and variances of batch norms."""
    return {name for node in nodes if node.kind == "BatchNormalization" for name in node.inputs[3:5]}


def onnx_network(
    path: str | Path, output: str | None, transform: ImageTransform | None
) -> tuple[nn.Module, ImageTransform | None]:
    """A network and the transform of its images; see :meth:`fastcascade.Stage.from_onnx`."""
    model = _load(path)
    constants = _constants(model)
    nodes, output = _wanted(path, model, _output(path, model, output), constants)
    read = {name for node in nodes for name in node.inputs}
    inputs = [value for value in model.graph.input if value.name in read and value.name not in constants]
    if len(inputs) != 1:
        raise InvalidArgument(
            f"{path}: output {output!r} depends on inputs {_names(inputs)}; expected one, the images"
        )
    shape, kind = _declared(path, inputs[0])
    network = OnnxNetwork(
        [replace(node, fixed_batch=shape[0]) for node in nodes],
        {name: value for name, value in constants.items() if name in read},
        inputs[0].name,
        output,
    )
    module: nn.Module = network
    if _is_channels_last(shape):
        module, shape = ChannelsLastImages(network), [shape[0], shape[3], shape[1], shape[2]]
    if all(isinstance(n, int) for n in shape[1:]):
        network.input_shape = (shape[1], shape[2], shape[3])
        transform = transform or ImageTransform((shape[2], shape[3]), normalize=_raw_bytes(kind, shape[1]))
        _check_rows(path, module, network.input_shape)
    return module, transform


class ChannelsLastImages(nn.Module):
    """A network that reads (N, H, W, C), for images (N, C, H, W)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.permute(0, 2, 3, 1))  # type: ignore[no-any-return]


def _load(path: str | Path) -> onnx.ModelProto:
    """The model in a file, with its functions written out.

    Raises:
        InvalidArgument: onnx is missing.
        FileFormatError: the file is missing, damaged, or no ONNX model.
    """
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise InvalidArgument(
            f"reading {path} needs onnx ({error}): pip install 'fastcascade[onnx]'"
        ) from error
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, the checker and the operating system raise many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FileFormatError(f"{path} is not a valid ONNX model: {lines[0]}") from error
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Initializers and Constant nodes, by name."""
    import onnx.numpy_helper

    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute:
            value = onnx.helper.get_attribute_value(node.attribute[0])
            is_tensor = isinstance(value, onnx.TensorProto)
            constants[node.output[0]] = onnx.numpy_helper.to_array(value) if is_tensor else np.asarray(value)
    return constants


def _node(proto: onnx.NodeProto, opset: int) -> Node:
    import onnx.helper
    import onnx.numpy_helper

    attributes = {}
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, onnx.TensorProto):
            value = onnx.numpy_helper.to_array(value).reshape(-1)[0].item()
        elif not isinstance(value, str | int | float):
            value = list(value) if isinstance(value, Iterable) else value
        attributes[attribute.name] = value
    kind = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
    name = proto.name or (proto.output[0] if proto.output else "")
    used = [*proto.output]
    while len(used) > 1 and not used[-1]:
        used.pop()
    return Node(kind, name, tuple(proto.input), tuple(used), attributes, opset)


def _output(path: str | Path, model: onnx.ModelProto, wanted: str | None) -> str:
    """The name of the value with the logits."""
    made = {name for node in model.graph.node for name in node.output}
    if wanted is not None:
        if wanted not in made:
            raise InvalidArgument(
                f"{path} has no value {wanted!r}; its outputs are {_names(model.graph.output)}"
            )
        return wanted
    own = {entry.key: entry.value for entry in model.metadata_props}.get("fastcascade.logits")
    if own is not None and own in made:
        return str(own)
    outputs = _names(model.graph.output)
    if len(outputs) != 1:
        raise InvalidArgument(f"{path} has the outputs {outputs}; name the one with the logits: output=…")
    return outputs[0]


def _names(values: Iterable[Any]) -> list[str]:
    return [value.name for value in values]


def _wanted(
    path: str | Path, model: onnx.ModelProto, output: str, constants: Mapping[str, NDArray[Any]]
) -> tuple[list[Node], str]:
    """The nodes of which the logits are made, and the name of the logits.

    Raises:
        LoweringError: an old opset, or an operator that is not known.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _OLDEST_OPSET:
        raise LoweringError(f"{path} has opset {opset}; expected at least {_OLDEST_OPSET}. Export it again")
    nodes = [_node(node, opset) for node in model.graph.node if node.op_type != "Constant"]
    nodes = merge_patterns(_ancestors(nodes, output), constants)
    logits = _before_softmax(nodes, output)
    nodes = _ancestors(nodes, logits)
    for node in nodes:
        if node.kind not in KNOWN:
            node.refuse("there is no such operator here; replace it in the model, or pass its torch module")
    return nodes, logits


def _ancestors(nodes: Sequence[Node], output: str) -> list[Node]:
    """The nodes on which a value depends, in order."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _before_softmax(nodes: Sequence[Node], output: str) -> str:
    """The input of a softmax at the end: a stage returns logits."""
    made = {name: node for node in nodes for name in node.outputs}
    node = made.get(output)
    while node is not None and node.kind in ("Softmax", "LogSoftmax", "Identity"):
        output = node.inputs[0]
        node = made.get(output)
    return output


def _declared(path: str | Path, value: Any) -> tuple[list[Any], int]:
    """The declared shape of an input, with None for sizes that are open, and its element type."""
    kind = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim]
    if len(shape) != 4:
        raise InvalidArgument(
            f"{path}: input {value.name!r} has {len(shape)} axes; expected images (N, C, H, W)"
        )
    if kind.elem_type not in (*_FLOATS, _UINT8):
        raise InvalidArgument(
            f"{path}: input {value.name!r} has ONNX type {kind.elem_type}; expected a floating type or uint8"
        )
    return shape, kind.elem_type


def _is_channels_last(shape: Sequence[Any]) -> bool:
    return shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4)


def _raw_bytes(kind: int, channels: int) -> Normalize | None:
    """The normalisation after which pixels are bytes again, for a model that normalises them itself."""
    return Normalize((0.0,) * channels, (1 / 255,) * channels) if kind == _UINT8 else None


@torch.no_grad()
def _check_rows(path: str | Path, module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Run two images together and alone: each must give its own row of logits.

    Raises:
        InvalidArgument: the model mixes images, or does not return one vector per image.
    """
    module = copy.deepcopy(module).eval()
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        both, alone = module(x), torch.cat([module(x[:1]), module(x[1:])])
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{path} fails on two images of shape {shape}: {error}") from error
    if both.ndim != 2 or len(both) != 2:
        raise InvalidArgument(
            f"{path} returns shape {tuple(both.shape)} for two images; expected (2, classes)"
        )
    if not torch.allclose(both, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
        raise InvalidArgument(
            f"{path} gives an image other logits beside another one; expected rows of their own"
        )
