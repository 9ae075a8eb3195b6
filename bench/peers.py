"""The runtimes that the engine is measured against, each at its best settings.

A peer holds one network and returns logits for a batch under a :class:`Schedule`. Which schedule is best
depends on runtime, network and batch, so it is measured (``bench.worker``), never assumed. Each peer runs in
a process of its own; the library imports nothing from here.
"""

from __future__ import annotations

import importlib.util
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.cases import model_file
from fastcascade.model.resnet import PadShortcut

__all__ = [
    "PEERS",
    "WHOLE",
    "Forward",
    "OnnxRuntime",
    "OpenVino",
    "Peer",
    "Schedule",
    "export_onnx",
    "make_peer",
]

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
LARGE_BATCH = 64
"""From here on, micro-batches below 4 rows are not tried: they lost everywhere."""
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that a network is prepared for, where the number of survivors varies."""
WHOLE = LADDER[-1]
"""As a micro-batch: all rows at once, at most 256."""
BF16_TOLERANCE = 4.0
"""8 bits of mantissa moved ResNet-20's log-probabilities by 0.7, and deeper networks add to that."""
BATCH_DIMENSION = "n"
Forward = Callable[[np.ndarray], np.ndarray]
"""(n, C, H, W) float32 → logits (n, classes) float32."""


Shapes = Literal["fixed", "ladder", "dynamic"]


class Schedule(NamedTuple):
    """How a batch is cut.

    Attributes:
        streams: micro-batches in flight at once, each on one thread; 1 gives each micro-batch all threads.
        micro_batch: rows handed to the runtime at once.
        shapes: of the last micro-batch. "fixed" pads it to the full size and "ladder" to the next size of
            :data:`LADDER`, so that only networks for known shapes run; "dynamic" leaves it shorter and runs a
            network for any number of rows.
    """

    streams: int
    micro_batch: int
    shapes: Shapes = "fixed"

    def padded(self, count: int) -> int:
        """Rows of a micro-batch that holds ``count`` instances."""
        if self.shapes == "dynamic":
            return count
        if self.shapes == "fixed":
            return self.micro_batch
        return min(self.micro_batch, next(rows for rows in LADDER if rows >= count))


class Peer(ABC):
    """One runtime with one network loaded.

    Subclasses load it for a number of threads. This class cuts batches and runs streams: one Python thread
    per stream, each taking the next micro-batch when it is free.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[float] = 2e-3
    """Largest difference of log-probabilities from torch's fp32 that still counts as the same network."""
    counts_as_fp32: ClassVar[bool] = True
    fixes_rows: ClassVar[bool] = False
    """Whether a network can be loaded for an exact number of rows."""
    shapes: ClassVar[tuple[Shapes, ...]] = ("fixed", "dynamic")
    """Worth trying where the number of rows varies."""
    shares_network: ClassVar[bool] = True
    """Whether streams can run one loaded network at the same time."""

    def __init__(self) -> None:
        self.threads = 1
        self._forwards: dict[tuple[int, int | None], list[Forward]] = {}
        self._pool: ThreadPoolExecutor | None = None

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Why this peer cannot run here, or None."""
        missing = [name for name in cls.requires if importlib.util.find_spec(name) is None]
        return f"package {', '.join(missing)} is not installed" if missing else None

    def build(self, model: nn.Module, input_shape: tuple[int, int, int], threads: int) -> None:
        """Take an eval-mode network; networks for a schedule are loaded when first needed."""
        self.threads = threads
        self._forwards = {}
        self._pool = ThreadPoolExecutor(threads, initializer=self.start_thread)
        self.convert(model, input_shape)

    @abstractmethod
    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        """Convert the network to the runtime's own form."""

    @abstractmethod
    def load(self, threads: int, rows: int | None) -> Forward:
        """A forward pass on ``threads`` threads, for exactly ``rows`` rows or (None) for any number."""

    def start_thread(self) -> None:  # noqa: B027 (most runtimes need nothing here)
        """Called at the start of every stream's thread."""

    def schedules(self, batch: int) -> list[Schedule]:
        """Every way of cutting this batch that is worth trying, the whole batch first."""
        sizes = [m for m in MICRO_BATCHES if m >= (4 if batch >= LARGE_BATCH else 1)]
        single = [Schedule(1, m) for m in sizes if m < batch]
        streams = [Schedule(self.threads, m) for m in sizes if m <= -(-batch // self.threads)]
        return [Schedule(1, batch), *single, *(streams if self.threads > 1 else [])]

    def run(self, x: np.ndarray, schedule: Schedule) -> np.ndarray:
        """Logits (n, classes) of x (n, C, H, W) float32, rows in order."""
        starts = range(0, len(x), schedule.micro_batch)
        logits: list[np.ndarray | None] = [None] * len(starts)

        def stream(number: int, tickets: Any) -> None:
            for ticket in tickets:  # one shared iterator: `next` on it is atomic
                if ticket >= len(starts):
                    return
                rows = micro_batch(x, starts[ticket], schedule)
                logits[ticket] = self._forward(schedule, len(rows), number)(rows)

        tickets = itertools.count()
        if schedule.streams == 1:
            stream(0, tickets)
        else:
            assert self._pool is not None
            for rows in {schedule.padded(min(schedule.micro_batch, len(x) - start)) for start in starts}:
                self._forward(schedule, rows, 0)  # loaded once, here, not by two streams at a time
            for future in [self._pool.submit(stream, i, tickets) for i in range(schedule.streams)]:
                future.result()
        return np.concatenate([part for part in logits if part is not None])[: len(x)]

    def _forward(self, schedule: Schedule, rows: int, stream: int) -> Forward:
        """The network that a stream runs for a micro-batch of this many rows."""
        exact = rows if self.fixes_rows and schedule.shapes != "dynamic" else None
        key = (schedule.streams, exact)
        if key not in self._forwards:
            threads = self.threads if schedule.streams == 1 else 1
            networks = 1 if self.shares_network else schedule.streams
            self._forwards[key] = [self.load(threads, exact) for _ in range(networks)]
        networks_of_key = self._forwards[key]
        return networks_of_key[stream % len(networks_of_key)]


def micro_batch(x: np.ndarray, start: int, schedule: Schedule) -> np.ndarray:
    """The rows of x from ``start``, padded as the schedule says. The last rows of all may be padding."""
    rows = x[start : start + schedule.micro_batch]
    missing = schedule.padded(len(rows)) - len(rows)
    return rows if missing == 0 else np.concatenate([rows, np.zeros((missing, *x.shape[1:]), x.dtype)])


class Eager(Peer):
    """Plain PyTorch."""

    name = "eager"
    plain: ClassVar[bool] = False

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        self.model = model

    def schedules(self, batch: int) -> list[Schedule]:
        return [Schedule(1, batch)] if self.plain else super().schedules(batch)

    def start_thread(self) -> None:
        torch.set_num_threads(1)

    def images(self, x: np.ndarray) -> Tensor:
        """The batch in the layout that the network wants."""
        return torch.from_numpy(x)

    def load(self, threads: int, rows: int | None) -> Forward:
        def forward(x: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                logits: np.ndarray = self.model(self.images(x)).float().numpy()
            return logits

        if threads > 1:
            torch.set_num_threads(threads)
        return forward


class PlainEager(Eager):
    """PyTorch as most people call it: ``network(batch)``, with no streams."""

    name = "plain eager"
    plain = True


class EagerChannelsLast(Eager):
    """PyTorch with weights and images in channels_last layout; the images' conversion is timed."""

    name = "eager channels_last"

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def images(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).contiguous(memory_format=torch.channels_last)


class EagerBf16(EagerChannelsLast):
    """PyTorch in bf16, channels_last: shown beside the fp32 peers, never counted among them."""

    name = "eager bf16"
    tolerance = BF16_TOLERANCE
    counts_as_fp32 = False

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        super().convert(model.bfloat16(), input_shape)

    def images(self, x: np.ndarray) -> Tensor:
        return super().images(x).bfloat16()


class TorchCompile(Peer):
    """torch.compile with frozen weights, channels_last, compiled for each number of rows.

    Compiled under ``no_grad``, because ``inference_mode`` disables freezing. No streams: a compiled module
    fixes its number of threads.
    """

    name = "torch.compile"

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        import torch._inductor.config as inductor

        inductor.freezing = True
        torch.set_num_threads(self.threads)
        torch.compiler.reset()
        self.model = torch.compile(model.to(memory_format=torch.channels_last), dynamic=False)  # type: ignore[call-overload]

    def schedules(self, batch: int) -> list[Schedule]:
        return [Schedule(1, batch), *([Schedule(1, 32)] if batch >= LARGE_BATCH else [])]

    def load(self, threads: int, rows: int | None) -> Forward:
        def forward(x: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                images = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
                logits: np.ndarray = self.model(images).numpy()
            return logits

        return forward


def export_onnx(model: nn.Module, input_shape: tuple[int, int, int]) -> Path:
    """Export with a dynamic batch through torch's own exporter; cached by the bits of the weights."""
    path = model_file(model, ".onnx")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.onnx.export(
            model,
            (torch.zeros(2, *input_shape),),
            partial,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim(BATCH_DIMENSION, min=1, max=4096)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        partial.rename(path)
    return path


class OnnxRuntime(Peer):
    """ONNX Runtime, all graph optimisations; streams share a session."""

    name = "ONNX Runtime"
    requires = ("onnx", "onnxscript", "onnxruntime")
    fixes_rows = True
    shapes = ("fixed", "ladder", "dynamic")

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        self.path = export_onnx(model, input_shape)

    def load(self, threads: int, rows: int | None) -> Forward:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        if rows is not None:
            options.add_free_dimension_override_by_name(BATCH_DIMENSION, rows)
        session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"images": x})[0]


class OpenVino(Peer):
    """OpenVINO: latency hint on whole batches, AsyncInferQueue for streams of micro-batches."""

    name = "OpenVINO"
    requires = ("onnx", "onnxscript", "openvino")
    precision: ClassVar[str] = "f32"
    fixes_rows = True
    shapes = ("fixed", "ladder", "dynamic")

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        import openvino

        self.core = openvino.Core()
        self.path = export_onnx(model, input_shape)
        self.input_shape = input_shape
        self._queues: dict[tuple[int, int | None], Any] = {}

    def _compile(self, hint: dict[str, str], rows: int | None) -> Any:
        model = self.core.read_model(self.path)
        if rows is not None:
            model.reshape([rows, *self.input_shape])
        common = {
            "INFERENCE_NUM_THREADS": str(self.threads),
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        return self.core.compile_model(model, "CPU", common | hint)

    def load(self, threads: int, rows: int | None) -> Forward:
        request = self._compile({"PERFORMANCE_HINT": "LATENCY"}, rows).create_infer_request()
        # share_inputs: no copy of the images. The logits are copied: the next request overwrites them.
        return lambda x: request.infer([x], share_inputs=True)[0].copy()

    def run(self, x: np.ndarray, schedule: Schedule) -> np.ndarray:
        if schedule.streams == 1:
            return super().run(x, schedule)
        starts = range(0, len(x), schedule.micro_batch)
        logits: list[Any] = [None] * len(starts)
        parts = [micro_batch(x, start, schedule) for start in starts]  # shared inputs outlive their requests

        def keep(request: Any, ticket: int) -> None:
            logits[ticket] = request.get_output_tensor(0).data.copy()

        queues = {len(part): self._queue(schedule, len(part)) for part in parts}
        for queue in dict.fromkeys(queues.values()):
            queue.set_callback(keep)
        for ticket, part in enumerate(parts):
            queues[len(part)].start_async([part], ticket, share_inputs=True)
        for queue in dict.fromkeys(queues.values()):
            queue.wait_all()
        joined: np.ndarray = np.concatenate(logits)[: len(x)]
        return joined

    def _queue(self, schedule: Schedule, rows: int) -> Any:
        import openvino

        exact = None if schedule.shapes == "dynamic" else rows
        key = (schedule.streams, exact)
        if key not in self._queues:
            compiled = self._compile({"NUM_STREAMS": str(schedule.streams)}, exact)
            self._queues[key] = openvino.AsyncInferQueue(compiled, schedule.streams)
        return self._queues[key]


class OpenVinoBf16(OpenVino):
    """OpenVINO computing in bf16: shown beside the fp32 peers, never counted among them."""

    name = "OpenVINO bf16"
    precision = "bf16"
    tolerance = BF16_TOLERANCE
    counts_as_fp32 = False


class Ncnn(Peer):
    """ncnn in fp32, converted by pnnx, image by image; streams share a net and have an extractor each."""

    name = "ncnn"
    requires = ("ncnn", "pnnx")
    shapes = ("dynamic",)  # it takes single images: padding only adds some
    tolerance = 1e-2

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        folder = model_file(model, ".ncnn")
        if not (folder / "net.ncnn.bin").exists():
            import pnnx

            folder.mkdir(parents=True, exist_ok=True)
            for module in model.modules():
                if isinstance(getattr(module, "shortcut", None), PadShortcut):
                    module.shortcut = _as_convolution(module)
            pnnx.export(model, str(folder / "net.pt"), torch.zeros(1, *input_shape), fp16=False)
        self.folder = folder

    def schedules(self, batch: int) -> list[Schedule]:
        # It takes single images, so a micro-batch only says how many a stream takes at a time.
        sizes = [m for m in (1, 4, 16) if m * self.threads <= batch]
        return [Schedule(1, batch), *(Schedule(self.threads, m) for m in sizes if self.threads > 1)]

    def load(self, threads: int, rows: int | None) -> Forward:
        import ncnn

        net = ncnn.Net()
        net.opt.num_threads = threads
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_storage = net.opt.use_bf16_packed = False
        net.load_param(str(self.folder / "net.ncnn.param"))
        net.load_model(str(self.folder / "net.ncnn.bin"))

        def forward(x: np.ndarray) -> np.ndarray:
            logits = []
            for image in x:
                with net.create_extractor() as extractor:
                    extractor.input("in0", ncnn.Mat(image))
                    logits.append(np.array(extractor.extract("out0")[1]))
            return np.stack(logits)

        return forward


def _as_convolution(block: nn.Module) -> nn.Conv2d:
    """The 1×1 convolution that computes what a zero-padded shortcut does; pnnx converts no strided slices."""
    shortcut, convolution = block.shortcut, block.conv1
    assert isinstance(shortcut, PadShortcut)
    assert isinstance(convolution, nn.Conv2d)
    channels, before = convolution.in_channels, shortcut.padding[4]
    replacement = nn.Conv2d(channels, convolution.out_channels, 1, shortcut.stride, bias=False)
    with torch.no_grad():
        replacement.weight.zero_()
        replacement.weight[before + torch.arange(channels), torch.arange(channels)] = 1
    return replacement


PEERS: tuple[type[Peer], ...] = (
    PlainEager,
    Eager,
    EagerChannelsLast,
    EagerBf16,
    TorchCompile,
    OnnxRuntime,
    OpenVino,
    OpenVinoBf16,
    Ncnn,
)


def make_peer(name: str) -> Peer:
    """The peer of this name.

    Raises:
        RuntimeError: a package that it needs is missing.
    """
    from bench.quantized_peers import INT8_PEERS  # made from these

    peer = next(peer for peer in (*PEERS, *INT8_PEERS) if peer.name == name)
    reason = peer.unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"{reason}; `make bench` installs it where there is a build for this Python")
    return peer()
