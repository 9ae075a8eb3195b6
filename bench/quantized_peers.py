"""Other runtimes in int8, each quantised by its own tool from the same images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from bench.cases import model_file
from bench.peers import OnnxRuntime, OpenVino, Peer, export_onnx

__all__ = ["INT8_PEERS", "INT8_TOLERANCE", "QuantizedPeer"]

INT8_TOLERANCE = 8.0
"""Rounding moves the log-probabilities of random networks, which nobody trained to be far from ties, by more
than bf16 does. This tells a quantised network from a wrong one, no more."""


class QuantizedPeer(Peer):
    """A peer that quantises the network when it is built.

    Attributes:
        calibration: (n, C, H, W) float32, set before :meth:`build`.
    """

    tolerance = INT8_TOLERANCE
    counts_as_fp32 = False
    calibration: np.ndarray


class OnnxRuntimeInt8(QuantizedPeer, OnnxRuntime):
    """ONNX Runtime on a QDQ model of ``quantize_static``: s8 weights per channel, u8 activations."""

    name = "ONNX Runtime int8"

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.path = model_file(model, ".int8.onnx")
        if self.path.exists():
            return
        prepared = self.path.with_suffix(".prepared")
        quant_pre_process(export_onnx(model, input_shape), prepared, skip_symbolic_shape=True)
        partial = self.path.with_suffix(".partial")
        quantize_static(
            prepared,
            partial,
            _Images(self.calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Without it, sums of two products saturate in 16 bits on CPUs that have no VNNI.
            reduce_range=not _has_vnni(),
            calibrate_method=CalibrationMethod.MinMax,
        )
        prepared.unlink()
        partial.rename(self.path)


class _Images:
    """Calibration images as ONNX Runtime asks for them: one at a time, then None."""

    def __init__(self, images: np.ndarray) -> None:
        self.left: Iterator[np.ndarray] = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.left, None)
        return None if image is None else {"images": image[None]}


def _has_vnni() -> bool:
    with open("/proc/cpuinfo") as lines:
        flags = next((line for line in lines if line.startswith("flags")), "")
    return "avx512_vnni" in flags or "avx_vnni" in flags


class OpenVinoInt8(QuantizedPeer, OpenVino):
    """OpenVINO on a network that NNCF quantised, with its default settings for post-training quantisation."""

    name = "OpenVINO int8"
    requires: ClassVar[tuple[str, ...]] = (*OpenVino.requires, "nncf")

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        super().convert(model, input_shape)
        quantised = model_file(model, ".int8.xml")
        if not quantised.exists():
            self._quantise(quantised)
        self.path = quantised

    def _quantise(self, target: Path) -> None:
        import nncf
        import openvino

        dataset = nncf.Dataset(self.calibration, lambda image: image[None])
        model = self.core.read_model(self.path)
        quantised = nncf.quantize(model, dataset, subset_size=len(self.calibration))
        openvino.save_model(quantised, target, compress_to_fp16=False)


INT8_PEERS: tuple[type[QuantizedPeer], ...] = (OnnxRuntimeInt8, OpenVinoInt8)
