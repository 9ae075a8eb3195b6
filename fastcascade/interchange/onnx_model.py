"""A plan as ONNX models: the cascade as one model for single images, and every stage as one for batches."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcascade.errors import InvalidArgument, LoweringError
from fastcascade.interchange.onnx_exit import ExitState, add_exit, finite_rows, first_state
from fastcascade.interchange.onnx_graph import FLOAT, INT64, OPSET, UINT8, GraphBuilder, add_stage
from fastcascade.lowering.plan import Plan
from fastcascade.storage.files import write_atomically
from fastcascade.types import MAX_PIXEL

if TYPE_CHECKING:
    import onnx

__all__ = ["export_onnx"]

_IR_VERSION = 10  # the newest that runtimes of 2024 read
_PROTOBUF_BYTES = 2**31 - 1
RUNNER = "run_cascade.py"  # as users see it; here it is onnx_runner.py


def export_onnx(plan: Plan, directory: str | Path, overwrite: bool = False) -> list[Path]:
    """Write a plan as ONNX models.

    - ``cascade.onnx``: one image at a time. Each later stage is the branch of an ``If``, and runs only if no
      earlier exit stopped. Inputs ``image`` (1, C, H, W) and ``thresholds`` (K−1,); outputs ``log_probs``
      (1, C), ``label``, ``exit_stage`` and ``cost_macs``, each (1,).
    - ``stage-<k>.onnx`` with ``run_cascade.py``: batches. A model is a stage with its exit; the script, which
      needs numpy and onnxruntime only, gathers the active rows for each.

    Images are uint8 if the plan has a preprocess, else float32. A row whose input is not finite is invalid at
    every exit. Operating points, costs and class names are in the models' metadata, under ``fastcascade``.

    Args:
        directory: created if missing.
        overwrite: replace the models that it holds.

    Returns:
        the files written.

    Raises:
        LoweringError: a stage or selector is opaque, the plan is quantised, or a model would exceed
            protobuf's 2 GiB; before anything is written.
        InvalidArgument: a file exists and ``overwrite`` is False, or the package ``onnx`` is missing.

    Example:
        >>> import tempfile
        >>> import fastcascade as fc
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> plan = fc.plan(fc.Cascade([resnet_cifar(8)], None, num_classes=10, input_shape=(3, 32, 32)))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     [path.name for path in export_onnx(plan, directory)]
        ['stage-0.onnx', 'cascade.onnx', 'run_cascade.py']
    """
    if importlib.util.find_spec("onnx") is None:
        raise InvalidArgument("exporting needs onnx: pip install 'fastcascade[onnx]'")
    if plan.is_quantized:
        raise LoweringError(
            f"the plan is quantised to {' '.join(plan.precision)}, and ONNX models are exported in float32: "
            "export the cascade or its float32 plan, and quantise with the tools of the runtime"
        )
    models = {f"stage-{k}.onnx": _stage_model(plan, k) for k in range(len(plan.stages))}
    models["cascade.onnx"] = _cascade_model(plan)
    for name, model in models.items():
        if model.ByteSize() > _PROTOBUF_BYTES:
            raise LoweringError(f"{name} would have {model.ByteSize():,} bytes; protobuf allows 2 GiB")
    contents = {name: model.SerializeToString() for name, model in models.items()}
    contents[RUNNER] = files("fastcascade.interchange").joinpath("onnx_runner.py").read_bytes()
    paths = [Path(directory) / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_atomically(path, content, overwrite=overwrite)
    return paths


def _stage_model(plan: Plan, k: int) -> onnx.ModelProto:
    """Stage k with its exit: input and state in, result and state out."""
    stage, last = plan.stages[k], k + 1 == len(plan.stages)
    graph = GraphBuilder()
    state = ExitState(*ExitState._fields)
    reads_image = stage.input == "image"
    x, clean = _add_image(graph, plan, "input") if reads_image else ("input", _finite_input(graph))
    features, logits = add_stage(graph, stage, x)
    done = add_exit(graph, logits, clean, state, stage.selector, plan.stage_weights[k], plan.num_classes)
    kind = UINT8 if reads_image and plan.input.preprocess else FLOAT
    inputs = [
        _value("input", kind, ("N", *stage.shapes[0])),
        _value("log_sum", FLOAT, ("N", plan.num_classes)),
        _value("weight_sum", FLOAT, ("N", 1)),
        _value("previous_label", INT64, ("N",)),
    ]
    results = {
        "log_probs": (done.log_probs, FLOAT, ("N", plan.num_classes)),
        "label": (done.label, INT64, ("N",)),
    }
    if not last:
        assert done.score is not None
        results |= {
            "score": (done.score, FLOAT, ("N",)),
            "next_log_sum": (done.state.log_sum, FLOAT, ("N", plan.num_classes)),
            "next_weight_sum": (done.state.weight_sum, FLOAT, ("N", 1)),
            "next_previous_label": (done.state.previous_label, INT64, ("N",)),
        }
        if plan.stages[k + 1].input == "previous":
            shape = stage.shapes[stage.features]
            results["features"] = (features, FLOAT, ("N", *shape))
    outputs = [_named(graph, name, *what) for name, what in results.items()]
    model = _model(plan, graph, f"stage {stage.name}", inputs, outputs)
    model.metadata_props.add(key="fastcascade.logits", value=logits)  # for Stage.from_onnx
    return model


def _cascade_model(plan: Plan) -> onnx.ModelProto:
    """The whole cascade for one image."""
    graph = GraphBuilder()
    image, clean = _add_image(graph, plan, "image")
    exits = graph.constant(range(len(plan.stages)))
    costs = graph.constant(plan.exit_macs)

    def add_from(branch: GraphBuilder, k: int, features: str, state: ExitState | None) -> list[str]:
        """Stage k and all later ones; returns the four results."""
        stage = plan.stages[k]
        source = image if stage.input == "image" else features
        next_features, logits = add_stage(branch, stage, source)
        state = state or first_state(branch, plan.num_classes)
        weight = plan.stage_weights[k]
        done = add_exit(branch, logits, clean, state, stage.selector, weight, plan.num_classes)
        index = branch.constant([k])
        stopped = [
            done.log_probs,
            done.label,
            branch.add("Gather", exits, index),
            branch.add("Gather", costs, index),
        ]
        if done.score is None:
            return stopped
        threshold = branch.add("Gather", "thresholds", index)
        condition = branch.add("GreaterOrEqual", done.score, threshold)
        stop, go_on = branch.subgraph(), branch.subgraph()
        here = [stop.add("Identity", name) for name in stopped]
        later = add_from(go_on, k + 1, next_features, done.state)
        outputs = [branch.new_name() for _ in stopped]
        branch.add(
            "If",
            condition,
            outputs=outputs,
            then_branch=_branch(stop, f"stop at {k}", here, plan),
            else_branch=_branch(go_on, f"stage {k + 1}", later, plan),
        )
        return outputs

    results = add_from(graph, 0, image, None)
    kind = UINT8 if plan.input.preprocess else FLOAT
    inputs = [
        _value("image", kind, (1, *plan.input.shape)),
        _value("thresholds", FLOAT, (len(plan.stages) - 1,)),
    ]
    outputs = [_named(graph, name, *what) for name, what in _result_types(results, plan).items()]
    return _model(plan, graph, "cascade", inputs, outputs)


def _result_types(names: Sequence[str], plan: Plan) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """The results of the cascade model: output → (value, type, shape)."""
    log_probs, *rest = names
    types: dict[str, tuple[str, int, tuple[int, ...]]]
    types = {"log_probs": (log_probs, FLOAT, (1, plan.num_classes))}
    for name, value in zip(("label", "exit_stage", "cost_macs"), rest, strict=True):
        types[name] = (value, INT64, (1,))
    return types


def _add_image(graph: GraphBuilder, plan: Plan, name: str) -> tuple[str, str]:
    """The normalised images (N, C, H, W), and (N, 1) whether every pixel of a row counts."""
    preprocess = plan.input.preprocess
    if preprocess is None:
        return name, finite_rows(graph, graph.add("Flatten", name, axis=1), limit=MAX_PIXEL)
    # The same float32 operations in the same order as Normalize.table(), for the same bits.
    pixels = graph.add("Div", graph.add("Cast", name, to=FLOAT), graph.constant(255.0))
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (preprocess.mean, preprocess.std))
    normalised = graph.add("Div", graph.add("Sub", pixels, graph.constant(mean)), graph.constant(std))
    return normalised, finite_rows(graph, graph.add("Flatten", pixels, axis=1))


def _finite_input(graph: GraphBuilder) -> str:
    """(N, 1) whether the features of the stage before are finite."""
    return finite_rows(graph, graph.add("Flatten", "input", axis=1))


def _named(graph: GraphBuilder, name: str, value: str, kind: int, shape: Sequence[int | str]) -> Any:
    """Give a value the name of an output."""
    graph.add("Identity", value, outputs=[name])
    return _value(name, kind, shape)


def _value(name: str, kind: int, shape: Sequence[int | str]) -> Any:
    import onnx.helper

    return onnx.helper.make_tensor_value_info(name, kind, shape)


def _branch(graph: GraphBuilder, name: str, results: Sequence[str], plan: Plan) -> onnx.GraphProto:
    import onnx.helper

    outputs = [_value(value, kind, shape) for value, kind, shape in _result_types(results, plan).values()]
    return onnx.helper.make_graph(graph.nodes, name, [], outputs, graph.constants)


def _model(
    plan: Plan, graph: GraphBuilder, name: str, inputs: Sequence[Any], outputs: Sequence[Any]
) -> onnx.ModelProto:
    import onnx.helper

    proto = onnx.helper.make_graph(graph.nodes, name, inputs, outputs, graph.constants)
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(proto, opset_imports=[opset], ir_version=_IR_VERSION)
    onnx.helper.set_model_props(model, {"fastcascade": json.dumps(_metadata(plan))})
    onnx.checker.check_model(model)
    return model


def _metadata(plan: Plan) -> Mapping[str, Any]:
    """What a user needs to call the models: thresholds by operating point, costs, class names."""
    points = {name: [str(t) for t in point.thresholds] for name, point in plan.usable_points().items()}
    if plan.default_thresholds is not None:
        points.setdefault("default", [str(t) for t in plan.default_thresholds.tolist()])
    return {"thresholds": points, "exit_macs": plan.exit_macs.tolist(), "classes": plan.classes}
