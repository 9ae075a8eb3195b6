"""The engine: compiles a cascade to a program with the same call signature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastcascade.backends.interface import ExitResults, Precision, StageReport
from fastcascade.backends.registry import choose_backend
from fastcascade.backends.torch_module import compiled_modules
from fastcascade.data.batches import Data, batches
from fastcascade.errors import FastCascadeError, FileFormatError, InvalidArgument
from fastcascade.lowering import export as lower
from fastcascade.lowering.plan import Plan
from fastcascade.lowering.plan_file import load_plan, plan_exists, plan_sha256
from fastcascade.lowering.quantization import MOST_IMAGES, quantize_plan
from fastcascade.model.cascade import Cascade
from fastcascade.model.store import cascade_exists, load_cascade, plan_note
from fastcascade.pixel_scale import ScaleCheck
from fastcascade.text import plain, printable
from fastcascade.types import CascadeOutput, OperatingPoint, OperatingPointLike

if TYPE_CHECKING:
    import fastcascade

__all__ = ["CompiledCascade", "compile", "load_model", "quantize"]

Output = Literal["cascade", "log_probs"]


class Settings(NamedTuple):
    """Arguments of :func:`compile`."""

    backend: str
    precision: Precision
    device: torch.device
    threads: int | None
    output: Output
    torch_compile: bool = False


def compile(
    cascade: Cascade | Plan | str | Path,
    backend: str = "auto",
    precision: Precision | Sequence[Precision] | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    output: Output = "cascade",
    torch_compile: bool = False,
    calibration_data: Data | Tensor | np.ndarray[Any, Any] | None = None,
) -> CompiledCascade:
    """Compile a cascade, or a plan, for fast inference: a drop-in replacement for its forward pass.

    Args:
        cascade: a :class:`fastcascade.Cascade`, left unchanged; a plan from :func:`fastcascade.load_plan`; or
            the folder of a saved cascade or plan.
        backend: "auto" for the fastest one that can run the cascade, or a name, without fallback.
            FASTCASCADE_BACKEND in the environment overrides "auto".
        precision: of the stages; exit decisions are always fp32. "fp16" is for GPUs. "bf16" is for CPUs with
            AVX512-BF16, which others refuse. "int8" is for the CPU and needs ``calibration_data``, see
            :func:`quantize`. One per stage, as in ["int8", "fp32"], mixes fp32 and int8. None means what a
            plan is quantised to, else "fp32".
        device: of the images and the output; by default the cascade's device, the CPU for a plan.
        threads: CPU threads; by default torch's number.
        output: "cascade" returns a :class:`fastcascade.CascadeOutput`, "log_probs" one (N, C) tensor.
        torch_compile: run opaque stages through ``torch.compile``. Each is compiled when it first sees 1, 2,
            4, … or 64 rows, which takes seconds to minutes; other numbers of rows are padded to the next one.
        calibration_data: for int8: images like those to come, without labels or with; 512 are used, 16 is the
            least.

    Raises:
        InvalidArgument: an unknown backend, precision, device or output, or threads below 1; int8 without
            enough calibration data, or another precision than a quantised plan has.
        LoweringError: int8 for an opaque stage.
        BackendUnavailable: the backend cannot run on this machine, or not this plan at this precision.
        FileFormatError: the folder holds neither, or a cascade of custom modules without its plan.

    Example:
        >>> import fastcascade as fc
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> cascade = fc.Cascade([resnet_cifar(8), resnet_cifar(14)], fc.MLPSelector(), 10, (3, 32, 32))
        >>> fast = compile(cascade, backend="reference")
        >>> fast(torch.randn(4, 3, 32, 32)).probs.shape
        torch.Size([4, 10])
    """
    if isinstance(cascade, str | Path):
        cascade = load_model(cascade)
    if not isinstance(cascade, Cascade | Plan):
        raise InvalidArgument(f"got {type(cascade).__name__}; expected a Cascade, a Plan or a folder")
    if output not in get_args(Output):
        raise InvalidArgument(f"unknown output {output!r}; expected one of {get_args(Output)}")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InvalidArgument(f"threads is {threads!r}; expected a number from 1, or None for torch's")
    if device is None:
        device = cascade.device if isinstance(cascade, Cascade) else "cpu"
    build = partial(_planned, cascade, precision, _calibration_images(precision, calibration_data))
    asked = _precision_of_backend(cascade, precision)
    settings = Settings(backend, asked, _full_device(device), threads, output, torch_compile)
    if isinstance(cascade, Plan):
        return CompiledCascade(build(), settings)
    # Lowering takes seconds, which a refusal should not.
    choose_backend(backend, None, precision=asked, device=settings.device)
    return CompiledCascade(build(), settings, cascade, build)


def quantize(
    cascade: Cascade | Plan,
    calibration_data: Data | Tensor | np.ndarray[Any, Any],
    precision: Precision | Sequence[Precision] = "int8",
) -> Plan:
    """A plan with stages in int8, for :func:`compile` or to be saved.

    The layers that make the logits, selectors and exits stay in float32, and so do layers that would make a
    stage's probabilities differ too much from those in float32. int8 shifts stop scores, so operating points
    that were measured in float32 are refused: calibrate what was compiled.

    Args:
        cascade: a cascade, left unchanged, or a plan in float32.
        calibration_data: a Dataset, a DataLoader, (images, labels) or images alone: a sample of those to
            come. 512 are used; 16 is the least.
        precision: "int8", or "int8" or "fp32" for each stage.

    Raises:
        InvalidArgument: too few images or of another shape; another precision, or one for each of another
            number of stages.
        LoweringError: int8 for an opaque stage, or for one that is quantised already.

    Example:
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> from fastcascade.model.selector import MLPSelector
        >>> cascade = Cascade([resnet_cifar(8), resnet_cifar(14)], MLPSelector(), 10, (3, 32, 32))
        >>> quantize(cascade, torch.rand(16, 3, 32, 32), ["int8", "fp32"]).precision
        ('int8', 'fp32')
    """
    plan = cascade if isinstance(cascade, Plan) else lower.plan(cascade)
    if plan.is_quantized:
        raise InvalidArgument(f"the plan is quantised already, to {plan.precision}; pass the float32 plan")
    wanted = _per_stage(precision, len(plan.stages))
    if not set(wanted) <= {"fp32", "int8"}:
        raise InvalidArgument(f"precision is {precision!r}; expected 'int8', or 'int8' or 'fp32' per stage")
    return quantize_plan(plan, _first_images(calibration_data), [p == "int8" for p in wanted])


def _planned(
    cascade: Cascade | Plan, precision: Precision | Sequence[Precision] | None, images: Tensor | None
) -> Plan:
    """The plan at a precision; ``images`` calibrate int8."""
    plan = cascade if isinstance(cascade, Plan) else lower.plan(cascade)
    if precision is None:
        return plan
    wanted = _per_stage(precision, len(plan.stages))
    if plan.is_quantized:
        if wanted != plan.precision and precision != "int8":
            raise InvalidArgument(
                f"the plan is quantised to {' '.join(plan.precision)}, which cannot become {precision!r}; "
                "leave precision out, or compile the cascade or its float32 plan"
            )
        return plan
    if "int8" not in wanted:
        return plan
    if images is None:
        raise InvalidArgument(
            "precision 'int8' needs calibration_data: some hundred images like those to come, without labels"
        )
    return quantize(plan, images, precision)


def _per_stage(precision: Precision | Sequence[Precision], stages: int) -> tuple[Precision, ...]:
    if isinstance(precision, str):
        return (precision,) * stages
    wanted = tuple(precision)
    if len(wanted) != stages or not set(wanted) <= set(get_args(Precision)):
        raise InvalidArgument(
            f"precision is {list(wanted)}; expected one of {get_args(Precision)}, or one for each of the "
            f"{stages} stages"
        )
    return wanted


def _precision_of_backend(
    cascade: Cascade | Plan, precision: Precision | Sequence[Precision] | None
) -> Precision:
    """What the backend is asked for: the one precision of all stages, or int8 where some are quantised."""
    if precision is None:
        return "int8" if isinstance(cascade, Plan) and cascade.is_quantized else "fp32"
    wanted = _per_stage(precision, len(cascade.stages))
    if "int8" in wanted:
        return "int8"
    if len(set(wanted)) > 1:
        raise InvalidArgument(f"precision is {list(precision)}; only 'int8' and 'fp32' can be mixed")
    return wanted[0]


def _calibration_images(
    precision: Precision | Sequence[Precision] | None, data: Data | Tensor | np.ndarray[Any, Any] | None
) -> Tensor | None:
    """The images that calibrate int8; None where nothing is to be quantised, or is already."""
    quantizes = precision is not None and "int8" in ([precision] if isinstance(precision, str) else precision)
    if data is None:
        return None
    if not quantizes:
        raise InvalidArgument(f"calibration_data is for precision 'int8', but precision is {precision!r}")
    return _first_images(data)


def _first_images(data: Data | Tensor | np.ndarray[Any, Any]) -> Tensor:
    """The first images of the data, as many as calibration uses."""
    pair: Any = (data, None) if isinstance(data, Tensor | np.ndarray) else data
    parts: list[Tensor] = []
    for images, _ in batches(pair, MOST_IMAGES):
        parts.append(images)
        if sum(map(len, parts)) >= MOST_IMAGES:
            break
    if not parts:
        raise InvalidArgument("got no calibration images")
    return torch.cat(parts)[:MOST_IMAGES].cpu()


def load_model(directory: str | Path) -> Cascade | Plan:
    """The plan in a directory, or the cascade if there is no plan of it.

    Raises:
        FileFormatError: the directory holds neither, or a cascade of custom modules without its plan.
    """
    directory = Path(directory)
    if not cascade_exists(directory):
        if directory.is_dir() and plan_exists(directory):
            return load_plan(directory)
        raise FileFormatError(
            f"{directory} holds no saved cascade or plan; expected cascade.json or plan.json in it, as "
            "cascade.save writes them"
        )
    note = plan_note(directory)
    if note.sha256 is not None and note.sha256 == plan_sha256(directory):
        return load_plan(directory)
    if not note.custom_modules:
        return load_cascade(directory)
    reason = note.missing_reason or "it was saved without its plan, or the plan beside it is of another save"
    raise FileFormatError(
        f"{directory} holds a cascade of custom modules ({', '.join(note.custom_modules)}) and no plan of "
        f"it: {reason}. Where its code is at hand, load it with fc.load(directory, modules=…); then "
        "cascade.save(directory, plan=True, overwrite=True) stores the plan, which runs without the code"
    )


def _full_device(device: torch.device | str) -> torch.device:
    """A device with its index, as tensors report it: "cuda" → cuda:0."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise InvalidArgument(f"unknown device {device!r}: {str(error).splitlines()[0]}") from error
    try:
        return torch.empty(0, device=wanted).device
    except (AssertionError, RuntimeError):
        return wanted  # unusable here; the backend raises with the reason


class CompiledCascade(nn.Module):
    """A compiled program with the cascade's call signature and outputs, without parameters or gradients.

    Weights and operating points are those at compile time; :meth:`recompile` updates them. Device and
    precision are fixed: ``to``, ``half`` and the like raise. Called on a module that contains this one, they
    raise after converting the submodules that come before this one.

    Attributes:
        plan: the compiled plan.
        backend: name of the backend.
        program: the backend's program.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        source: Cascade | None = None,
        build: Callable[[], Plan] | None = None,
    ) -> None:
        super().__init__()
        # In a tuple: as an attribute, the cascade would be a submodule with its parameters and its mode.
        self._source = (source,)
        self._lower_again = build
        self._settings = settings
        self._scale_check = ScaleCheck(plan.input)
        self.training = False
        self._build(plan)

    def _build(self, plan: Plan) -> None:
        wanted = self._settings
        backend = choose_backend(wanted.backend, plan, precision=wanted.precision, device=wanted.device)
        self.program = backend.lower(
            compiled_modules(plan) if wanted.torch_compile else plan,
            precision=wanted.precision,
            device=wanted.device,
            threads=wanted.threads,
        )
        self._exit_macs = plan.exit_macs.to(wanted.device)
        self._named_thresholds: dict[str | None, Tensor] = {}
        self.plan = plan
        self.backend = backend.name

    @property
    def device(self) -> torch.device:
        """Device of the images and the output."""
        return self.program.device

    def forward(
        self, x: Tensor | np.ndarray[Any, Any], operating_point: OperatingPointLike = None
    ) -> CascadeOutput | Tensor:
        """Classify a batch.

        Args:
            x: (N, C, H, W) float, or uint8 images in NCHW or NHWC; any strides; N may be 0. Floats other
                than float32 are converted.
            operating_point: the name of a stored one, an :class:`fastcascade.OperatingPoint`, or K−1
                thresholds; None means the one named "default" if stored, else the selector's default.

        Returns:
            a :class:`fastcascade.CascadeOutput` in input order, or log-probabilities (N, C) float32 for
            ``output="log_probs"``.

        Raises:
            InvalidArgument: wrong shape, dtype, device or operating point, or an input that requires grad.
        """
        thresholds = self.thresholds(operating_point)
        images = self.images(x)
        if self._scale_check.open:
            self._scale_check(images, stacklevel=5)
        results = self.program.run(images, thresholds) if len(images) else self._no_results()
        if self._settings.output == "log_probs":
            return results.log_probs
        cost = self._exit_macs.take(results.exit_stage)
        return CascadeOutput(_exp(results.log_probs), results.label, results.exit_stage, cost)

    @property
    def precision(self) -> Precision:
        """Precision of the stages; "int8" where at least one is. ``plan.precision`` has that of each."""
        return self._settings.precision

    def predict(
        self, inputs: Any, operating_point: OperatingPointLike = None, top_k: int = 5, resize: bool = True
    ) -> fastcascade.Predictions:
        """Classify files, images, arrays or data sets; see :func:`fastcascade.predict`."""
        import fastcascade

        return fastcascade.predict(self, inputs, operating_point, top_k, resize)

    def thresholds(self, operating_point: OperatingPointLike = None) -> Tensor:
        """The K−1 stop thresholds of an operating point, float32 on the CPU.

        Raises:
            InvalidArgument: an unknown name, the wrong number of thresholds, NaN, or no default.
        """
        # Names are cached, which is measurable at batch size 1.
        if operating_point is not None and not isinstance(operating_point, str):
            return self.plan.thresholds(operating_point, self.recorded_precision)
        if operating_point not in self._named_thresholds:
            found = self.plan.thresholds(operating_point, self.recorded_precision)
            self._named_thresholds[operating_point] = found
        return self._named_thresholds[operating_point]

    @property
    def usable_points(self) -> dict[str, OperatingPoint]:
        """The plan's operating points that were measured at the precision that runs."""
        return self.plan.usable_points(self.recorded_precision)

    @property
    def recorded_precision(self) -> tuple[str, ...]:
        """(K,) of the stages as operating points record it; () for fp32, and for fp16 on GPUs."""
        return ("bf16",) * len(self.plan.stages) if self.precision == "bf16" else self.plan.recorded_precision

    @property
    def source(self) -> Cascade | None:
        """The cascade that was compiled; None if it was a plan."""
        return self._source[0]

    def store_operating_point(self, point: OperatingPoint) -> None:
        """Add an operating point to the plan, in place of one of the same name."""
        points = {**self.plan.operating_points, point.name: point}
        self.plan = replace(self.plan, operating_points=points)
        self._named_thresholds.clear()

    def images(self, x: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Check images as a call does; returns them as (N, C, H, W) uint8 or float32, a view where possible.

        Raises:
            InvalidArgument: wrong shape, dtype or device, or an input that requires grad.
        """
        images = self.plan.input.nchw(x)
        if images.requires_grad and torch.is_grad_enabled():
            raise InvalidArgument(
                "the images require grad, but a compiled cascade has no gradients; "
                "differentiate the cascade itself (cascade.all_exits), or call this under torch.no_grad()"
            )
        if images.device != self.device:
            raise InvalidArgument(
                f"images are on {images.device}, the compiled cascade runs on {self.device}; "
                "move the images, or compile with device=…"
            )
        if images.layout != torch.strided:
            raise InvalidArgument(f"images have layout {images.layout}; expected a dense tensor")
        return images.detach() if images.dtype == torch.uint8 else images.detach().float()

    def _no_results(self) -> ExitResults:
        return ExitResults(
            torch.empty(0, self.plan.num_classes, device=self.device),
            torch.empty(0, dtype=torch.int64, device=self.device),
            torch.empty(0, dtype=torch.int64, device=self.device),
        )

    def recompile(self) -> None:
        """Lower the cascade again, after its weights or operating points changed.

        Raises:
            InvalidArgument: this was compiled from a plan.
        """
        if self._lower_again is None:
            raise InvalidArgument(
                "compiled from a plan, which cannot change; call fc.compile on the new plan"
            )
        self._build(self._lower_again())

    def train(self, mode: bool = True) -> CompiledCascade:
        """Stay in eval mode, so that a module that contains this one can be trained."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledCascade:
        """Called by ``to``, ``cuda``, ``half`` and the like, of this module or of one that contains it.

        Raises:
            InvalidArgument: the conversion would change the device or dtype.
        """
        before = torch.empty(0, device=self.device)
        try:
            after = fn(before)
        except (AssertionError, RuntimeError) as error:
            raise InvalidArgument(_conversion_error(str(error).splitlines()[0])) from error
        if (after.device, after.dtype) != (before.device, before.dtype):
            raise InvalidArgument(
                _conversion_error(
                    f"it runs {self._settings.precision} on {before.device} and returns {before.dtype}, "
                    f"not {after.dtype} on {after.device}"
                )
            )
        return self

    def describe(self) -> str:
        """How each stage runs: operations or why it is opaque, kernels, ISA, weight and scratch memory."""
        settings = self._settings
        threads = settings.threads or torch.get_num_threads()
        head = f"backend {self.backend}, {settings.precision} on {settings.device}, threads {threads}"
        return "\n".join([head, *(_stage_text(report) for report in self.program.describe())])

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledCascade:
        """A new program for the same plan."""
        clone = CompiledCascade(self.plan, self._settings, self.source, self._lower_again)
        memo[id(self)] = clone
        return clone

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise FastCascadeError(
            "a compiled cascade cannot be pickled; save its plan (compiled.plan.save(directory)) and run "
            "fc.compile(fc.load_plan(directory)) where it is needed"
        )

    def extra_repr(self) -> str:
        stages = ", ".join(repr(stage.name) for stage in self.plan.stages)
        return f"backend={self.backend!r}, precision={self._settings.precision!r}, stages=[{stages}]"


def _conversion_error(reason: str) -> str:
    return (
        f"a compiled cascade cannot be moved or converted: {reason}. Compile it again with "
        'fc.compile(cascade, device="cuda", precision="fp16"); convert a module around it without it'
    )


def _exp(log_probs: Tensor) -> Tensor:
    """exp. On the CPU by NumPy: torch's threads would keep spinning and slow down the next call."""
    return torch.from_numpy(np.exp(log_probs.numpy())) if log_probs.device.type == "cpu" else log_probs.exp()


def _stage_text(report: StageReport) -> str:
    """A heading and a table with one row per distinct operation and its count."""
    form = (
        f"opaque: {printable(report.opaque_reason)}"
        if report.opaque_reason
        else f"{len(report.kernels)} operations"
    )
    table = Table("×", "operation", "kernel", box=None, pad_edge=False)
    for choice, count in Counter(report.kernels).items():
        table.add_row(str(count), plain(choice.operation), plain(choice.kernel))
    text = StringIO()
    console = Console(file=text, width=110, color_system=None)
    console.print(table)
    sizes = f"weights {report.weight_bytes / 1024:,.1f} KiB, scratch {report.arena_bytes / 1024:,.1f} KiB"
    heading = f"\nstage {report.name!r}: {form}; {report.isa}; {sizes}"
    return "\n".join([heading, *(line.rstrip() for line in text.getvalue().splitlines())])
