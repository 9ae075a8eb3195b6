"""The runtimes that the engine is measured against, each given its best settings.

A peer holds one network and answers logits for a batch under a :class:`Schedule`. Which schedule is best
depends on runtime, network and batch, so it is found by measurement (``bench.measure``), never assumed.
Each peer lives in a process of its own; nothing here is imported by the library.
"""

from __future__ import annotations

import importlib.util
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.cases import model_file
from fastcascade.model.resnet import PadShortcut

__all__ = ["PEERS", "Peer", "Schedule", "make_peer"]

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
LARGE_BATCH = 64
"""From here on micro-batches below 4 are not tried: they lost everywhere, and trying costs minutes."""
BF16_TOLERANCE = 4.0
"""8 bits of mantissa moved ResNet-20's log-probabilities by 0.7, and deeper networks add to that."""
Forward = Callable[[np.ndarray], np.ndarray]
"""(n, C, H, W) float32 → logits (n, classes) float32."""


class Schedule(NamedTuple):
    """How a batch is cut.

    Attributes:
        streams: micro-batches in flight at once, each on one thread; 1 gives each all threads in turn.
        micro_batch: rows handed to the runtime at once.
        padded: the last micro-batch is filled up to the full size (so shapes never change) instead of
            being shorter.
    """

    streams: int
    micro_batch: int
    padded: bool = True


class Peer(ABC):
    """One runtime with one network loaded.

    Subclasses say how to load it for a number of threads; cutting and streams are done here: one Python
    thread per stream, each with a single-threaded network of its own, taking the next micro-batch when free.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[float] = 2e-3
    """Largest difference of log-probabilities from torch's fp32 that still counts as the same network."""
    counts_as_fp32: ClassVar[bool] = True
    fixes_rows: ClassVar[bool] = False
    """Whether a network loaded for an exact number of rows differs from one for any number."""

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
        """Take an eval-mode network; whatever depends on a schedule is loaded when first needed."""
        self.threads = threads
        self._forwards = {}
        self._pool = ThreadPoolExecutor(threads, initializer=self.start_thread)
        self.convert(model, input_shape)

    @abstractmethod
    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        """Bring the network into the runtime's own form."""

    @abstractmethod
    def load(self, threads: int, rows: int | None) -> Forward:
        """A forward pass on ``threads`` threads, for exactly ``rows`` rows or (None) for any number."""

    def start_thread(self) -> None:  # noqa: B027 (most runtimes need nothing here)
        """Run at the start of every stream's thread."""

    def schedules(self, batch: int) -> list[Schedule]:
        """Every way of cutting this batch that is worth trying: whole, and streams of micro-batches."""
        least, most = 4 if batch >= LARGE_BATCH else 1, max(1, batch // self.threads)
        streams = [Schedule(self.threads, m) for m in MICRO_BATCHES if least <= m <= most]
        return [Schedule(1, batch), *streams]

    def run(self, x: np.ndarray, schedule: Schedule) -> np.ndarray:
        """Logits (n, classes) of x (n, C, H, W) float32, rows in order."""
        starts = range(0, len(x), schedule.micro_batch)
        answers: list[np.ndarray | None] = [None] * len(starts)
        forwards = self._loaded(schedule)

        def stream(forward: Forward, tickets: Any) -> None:
            for ticket in tickets:  # one shared iterator: `next` on it is atomic
                if ticket >= len(starts):
                    return
                answers[ticket] = forward(_micro_batch(x, starts[ticket], schedule))

        tickets = itertools.count()
        if schedule.streams == 1:
            stream(forwards[0], tickets)
        else:
            assert self._pool is not None
            for future in [self._pool.submit(stream, forward, tickets) for forward in forwards]:
                future.result()
        return np.concatenate([answer for answer in answers if answer is not None])[: len(x)]

    def _loaded(self, schedule: Schedule) -> list[Forward]:
        rows = schedule.micro_batch if schedule.padded and self.fixes_rows else None
        key = (schedule.streams, rows)
        if key not in self._forwards:
            threads = self.threads if schedule.streams == 1 else 1
            self._forwards[key] = [self.load(threads, rows) for _ in range(schedule.streams)]
        return self._forwards[key]


def _micro_batch(x: np.ndarray, start: int, schedule: Schedule) -> np.ndarray:
    rows = x[start : start + schedule.micro_batch]
    missing = schedule.micro_batch - len(rows)
    if missing == 0 or not schedule.padded:
        return rows
    return np.concatenate([rows, np.zeros((missing, *x.shape[1:]), x.dtype)])


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
                answer: np.ndarray = self.model(self.images(x)).float().numpy()
            return answer

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
    """torch.compile with frozen weights, channels_last, a compilation per batch size.

    Compiled under ``no_grad``: ``inference_mode`` would switch freezing off. Only whole batches: a compiled
    module fixes its number of threads.
    """

    name = "torch.compile"

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        import torch._inductor.config as inductor

        inductor.freezing = True
        torch.set_num_threads(self.threads)
        torch.compiler.reset()
        self.model = torch.compile(model.to(memory_format=torch.channels_last), dynamic=False)  # type: ignore[call-overload]

    def schedules(self, batch: int) -> list[Schedule]:
        return [Schedule(1, batch)]

    def load(self, threads: int, rows: int | None) -> Forward:
        def forward(x: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                images = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
                answer: np.ndarray = self.model(images).numpy()
            return answer

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
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        partial.rename(path)
    return path


class OnnxRuntime(Peer):
    """ONNX Runtime, all graph optimisations, one session per stream."""

    name = "ONNX Runtime"
    requires = ("onnx", "onnxscript", "onnxruntime")

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        self.path = export_onnx(model, input_shape)

    def load(self, threads: int, rows: int | None) -> Forward:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"images": x})[0]


class OpenVino(Peer):
    """OpenVINO: latency hint on whole batches, AsyncInferQueue for streams of micro-batches."""

    name = "OpenVINO"
    requires = ("onnx", "onnxscript", "openvino")
    precision: ClassVar[str] = "f32"
    fixes_rows = True

    def convert(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        import openvino

        self.core = openvino.Core()
        self.path = export_onnx(model, input_shape)
        self.input_shape = input_shape
        self._queues: dict[Schedule, Any] = {}

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
        # share_inputs: no copy of the images; the answer is copied because the request's buffer is reused.
        return lambda x: request.infer([x], share_inputs=True)[0].copy()

    def run(self, x: np.ndarray, schedule: Schedule) -> np.ndarray:
        if schedule.streams == 1:
            return super().run(x, schedule)
        queue = self._queue(schedule)
        starts = range(0, len(x), schedule.micro_batch)
        answers: list[Any] = [None] * len(starts)
        alive = []  # shared inputs must outlive their requests

        def keep(request: Any, ticket: int) -> None:
            answers[ticket] = request.get_output_tensor(0).data.copy()

        queue.set_callback(keep)
        for ticket, start in enumerate(starts):
            rows = _micro_batch(x, start, schedule)
            alive.append(rows)
            queue.start_async([rows], ticket, share_inputs=True)
        queue.wait_all()
        answer: np.ndarray = np.concatenate(answers)[: len(x)]
        return answer

    def _queue(self, schedule: Schedule) -> Any:
        import openvino

        if schedule not in self._queues:
            rows = schedule.micro_batch if schedule.padded else None
            compiled = self._compile({"NUM_STREAMS": str(schedule.streams)}, rows)
            self._queues[schedule] = openvino.AsyncInferQueue(compiled, schedule.streams)
        return self._queues[schedule]


class OpenVinoBf16(OpenVino):
    """OpenVINO computing in bf16: shown beside the fp32 peers, never counted among them."""

    name = "OpenVINO bf16"
    precision = "bf16"
    tolerance = BF16_TOLERANCE
    counts_as_fp32 = False


class Ncnn(Peer):
    """ncnn in fp32, converted by pnnx, image by image; streams give each thread a net of its own."""

    name = "ncnn"
    requires = ("ncnn", "pnnx")
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
        self._local = threading.local()

    def schedules(self, batch: int) -> list[Schedule]:
        # It takes single images, so micro-batches only say how many a thread takes at a time.
        return [Schedule(1, batch), Schedule(self.threads, 1)]

    def load(self, threads: int, rows: int | None) -> Forward:
        import ncnn

        net = ncnn.Net()
        net.opt.num_threads = threads
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_storage = net.opt.use_bf16_packed = False
        net.load_param(str(self.folder / "net.ncnn.param"))
        net.load_model(str(self.folder / "net.ncnn.bin"))

        def forward(x: np.ndarray) -> np.ndarray:
            answers = []
            for image in x:
                with net.create_extractor() as extractor:
                    extractor.input("in0", ncnn.Mat(image))
                    answers.append(np.array(extractor.extract("out0")[1]))
            return np.stack(answers)

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
    peer = next(peer for peer in PEERS if peer.name == name)
    reason = peer.unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"{reason}; `make bench` installs it where there is a build for this Python")
    return peer()
