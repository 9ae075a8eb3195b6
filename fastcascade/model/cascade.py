"""The cascade: a sequence of classifiers and a selector that decides, per instance, when to stop.

This file is the reference implementation of inference; :func:`fastcascade.compile` returns the same outputs
faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastcascade.errors import InvalidArgument
from fastcascade.kernels.reference import compact_index, exit_step, exit_tables
from fastcascade.model.cost import count_macs, eval_mode, place_of_failure
from fastcascade.model.image_transform import ImageTransform, transform_images
from fastcascade.model.onnx_network import onnx_network
from fastcascade.model.pretrained import huggingface_network, timm_network
from fastcascade.model.selector import MLPSelector, Selector
from fastcascade.pixel_scale import ScaleCheck
from fastcascade.types import (
    CascadeOutput,
    Combine,
    InputSpec,
    Normalize,
    OperatingPoint,
    OperatingPointLike,
    OutOfFoldScores,
    SelectorComparison,
    checked_combine,
    resolve_thresholds,
    stage_weights,
)

__all__ = ["Cascade", "ExitJudgement", "Stage"]


class ExitJudgement(NamedTuple):
    """Log-probabilities and stop scores of every exit for every instance.

    Attributes:
        log_probs: (K, N, C) combined log-probabilities log q_k; NaN where stage k's logits are not finite.
        scores: (K−1, N) stop scores; undefined where invalid.
        valid: (K, N) bool; an instance cannot stop at k where False.
    """

    log_probs: Tensor
    scores: Tensor
    valid: Tensor


class Stage(nn.Module):
    """One classifier of a cascade: a whole network, or a segment of a backbone with its exit head.

    Args:
        module: image (or the previous stage's features) → logits, or → features if ``exit`` is given.
        exit: features → logits (N, num_classes).
        input: "image", or "previous" to read the features of the stage before.
        name: appears in reports and in the keys of saved weights; ``stage<k>`` by default.
        macs: multiplies per instance, including the exit; counted by default.
        transform: resizing, crop and normalisation of the images for a network that was trained on others
            than the cascade's; None sees them as they are.

    Raises:
        InvalidArgument: ``module`` or ``exit`` is not an nn.Module, or another argument is invalid.

    Example:
        >>> from fastcascade.model.resnet import cut_into_segments, resnet_cifar
        >>> (first, head), (rest, last_head) = cut_into_segments(resnet_cifar(8), after=[2])
        >>> stages = [Stage(first, head), Stage(rest, last_head, input="previous")]
    """

    def __init__(
        self,
        module: nn.Module,
        exit: nn.Module | None = None,
        input: Literal["image", "previous"] = "image",
        name: str | None = None,
        macs: int | None = None,
        transform: ImageTransform | None = None,
    ) -> None:
        super().__init__()
        _require_module(module, "Stage module")
        if exit is not None:
            _require_module(exit, "Stage exit")
        if input not in ("image", "previous"):
            raise InvalidArgument(f"Stage input is {input!r}; expected 'image' or 'previous'")
        if name is not None and not isinstance(name, str):
            raise InvalidArgument(f"Stage name is {name!r}; expected a string")
        if macs is not None and (not isinstance(macs, int) or macs < 0):
            raise InvalidArgument(f"Stage macs is {macs!r}; expected an integer of at least 0")
        if transform is not None and not isinstance(transform, ImageTransform):
            raise InvalidArgument(
                f"Stage transform is {transform!r}; expected None or fc.ImageTransform(size)"
            )
        if transform is not None and input == "previous":
            raise InvalidArgument(
                "a stage with input='previous' reads features; a transform is of images only"
            )
        self.module = module
        self.exit = exit
        self.input = input
        self.name = name
        self.macs = macs
        self.transform = transform

    @classmethod
    def from_timm(
        cls,
        model: str,
        num_classes: int | None = None,
        pretrained: bool = True,
        name: str | None = None,
        transform: ImageTransform | None = None,
        **options: Any,
    ) -> Stage:
        """A network of timm, with the size, crop, interpolation and normalisation that timm has for it.

        Needs ``pip install 'fastcascade[timm]'``.

        Args:
            model: timm's name, such as "efficientnet_b0" or "resnet18.a1_in1k".
            num_classes: of a new, untrained last layer; None keeps the classes of the weights.
            pretrained: download trained weights; False needs no network.
            name: of the stage; ``model`` by default.
            transform: instead of timm's.
            options: passed to ``timm.create_model``, such as ``checkpoint_path`` or ``in_chans``.

        Raises:
            InvalidArgument: timm is missing, does not know the model, or cannot download its weights.

        Example:
            >>> Stage.from_timm("efficientnet_b0").transform.resized  # doctest: +SKIP
            (256, 256)
        """
        network = timm_network(model, num_classes, pretrained, transform, options)
        return cls(network.module, name=name or model, transform=network.transform)

    @classmethod
    def from_huggingface(
        cls, path: str | Path, name: str | None = None, transform: ImageTransform | None = None
    ) -> Stage:
        """An image classifier of Hugging Face, with the size and normalisation of its image processor.

        Needs ``pip install 'fastcascade[transformers]'``.

        Args:
            path: a folder with ``config.json``, weights and ``preprocessor_config.json``, or the name of a
                checkpoint to download.
            name: of the stage; the folder's name by default.
            transform: instead of the image processor's; then ``preprocessor_config.json`` may be missing.

        Raises:
            InvalidArgument: transformers is missing or cannot load the classifier, or its image processor
                does what an :class:`ImageTransform` cannot.

        Example:
            >>> Stage.from_huggingface("microsoft/resnet-18").name  # doctest: +SKIP
            'resnet-18'
        """
        network = huggingface_network(path, transform)
        return cls(network.module, name=name or Path(path).name, transform=network.transform)

    @classmethod
    def from_onnx(
        cls,
        path: str | Path,
        output: str | None = None,
        name: str | None = None,
        transform: ImageTransform | None = None,
    ) -> Stage:
        """A network from an ONNX file of opset 7 or later, which trains and lowers like any other.

        Needs ``pip install 'fastcascade[onnx]'``. A softmax at the end is left out: stages return logits. A
        model that this library exported for a stage gives the logits of that stage, without its exit.

        Args:
            output: name of the value with the logits; needed only if the model has several outputs.
            name: of the stage; the file's name by default.
            transform: by default a resize to the size that the file declares, in the normalisation of the
                cascade; bytes for a model of uint8 images. Pass the one that the network was trained with.

        Raises:
            FileFormatError: missing, damaged, or no ONNX model.
            LoweringError: an operator, or a form of it, that is not supported; names operator and node.
            InvalidArgument: the package onnx is missing, or the model is not a classifier of single images.

        Example:
            >>> import tempfile
            >>> import fastcascade as fc
            >>> from fastcascade.interchange.onnx_model import export_onnx
            >>> from fastcascade.model.resnet import resnet_cifar
            >>> plan = fc.plan(fc.Cascade([resnet_cifar(8)], None, num_classes=10, input_shape=(3, 32, 32)))
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     first, *_ = export_onnx(plan, directory)
            ...     stage = Stage.from_onnx(first)
            >>> stage.module(torch.zeros(2, 3, 32, 32)).shape, stage.transform.size
            (torch.Size([2, 10]), (32, 32))
        """
        module, own = onnx_network(path, output, transform)
        return cls(module, name=name or Path(path).stem, transform=own)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the stage sees → features (n, …) and logits (n, C); the same tensor without an exit."""
        features = self.module(x)
        return features, features if self.exit is None else self.exit(features)


def _require_module(value: object, what: str) -> None:
    """Refuse a class, a registry name, a function: anything that is no module with weights."""
    if isinstance(value, nn.Module):
        return
    fix = "wrap a function in an nn.Module with a forward method" if callable(value) else "pass the network"
    if isinstance(value, str):
        fix = f"build the network first: fastcascade.model.registry.build_network({value!r}, num_classes)"
    if isinstance(value, type) and issubclass(value, nn.Module):
        fix = f"create an instance: {value.__name__}(…)"
    raise InvalidArgument(f"{what} is {value!r}; expected an nn.Module: {fix}")


class Cascade(nn.Module):
    """Stages of growing size with a selector after each but the last.

    Calling the cascade always runs inference with early exit, even in training mode; train through
    :meth:`all_exits`.

    Args:
        stages: modules (each reads the image) or :class:`Stage`.
        selector: None if and only if there is one stage. "auto" is an :class:`fastcascade.MLPSelector` that
            :func:`fastcascade.fit` replaces by a threshold rule if that is clearly better on held-out images.
        num_classes: at least 2; every stage must return this many logits.
        input_shape: (C, H, W) of one image.
        combine: "last" returns the probabilities of the stage where an instance stops, "mean" their mean
            over the stages visited, K numbers their mean with one weight per stage.
        preprocess: normalisation of uint8 images; float images count as normalised. By default that of the
            first stage whose transform has one.
        classes: names, in label order.

    Attributes:
        stage_macs, selector_macs: per stage, multiplies per instance.
        single_macs: per stage, the cost of that stage's output alone: the stage and the segments that it
            reads from, without their exits and selectors.
        dense_macs: ``single_macs`` of the last stage.
        temperatures: (K,) buffer of the stages' temperatures T_k: p_k = softmax(z_k / T_k). 1 until
            :func:`fastcascade.fit` finds them on held-out images (Guo et al. 2017, arXiv 1706.04599).
        operating_points: named thresholds stored by :func:`fastcascade.calibrate`.
        auto_selector: whether the selector was given as "auto".
        comparison: held-out accuracy of the learned selector and of threshold rules; None before
            :func:`fastcascade.fit`.
        seen_images: sorted uint64 hashes of the images that :func:`fastcascade.fit` has used.
        out_of_fold: stop scores with which images that fitted the selector, but no stage, may also be used by
            :func:`fastcascade.calibrate`; None if there are none.
        scale_check: warns once if float images are not normalised; see
            :class:`fastcascade.pixel_scale.ScaleCheck`.

    Raises:
        InvalidArgument: an argument of the wrong type, a missing or superfluous selector, or a stage that
            fails on one blank image or returns the wrong shape.

    Warns:
        ScaleWarning: ``preprocess`` is given and float images look unnormalised, in 0–1 or 0–255.

    Example:
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> from fastcascade.model.selector import MLPSelector
        >>> cascade = Cascade([resnet_cifar(8), resnet_cifar(14)], MLPSelector(), 10, (3, 32, 32))
        >>> cascade(torch.randn(4, 3, 32, 32)).probs.shape
        torch.Size([4, 10])
    """

    temperatures: Tensor

    def __init__(
        self,
        stages: Sequence[nn.Module],
        selector: nn.Module | Literal["auto"] | None,
        num_classes: int,
        input_shape: tuple[int, int, int],
        combine: Combine | Sequence[float] = "last",
        preprocess: Normalize | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(_checked_stages(stages))
        self.auto_selector = isinstance(selector, str) and selector == "auto"
        if self.auto_selector:
            selector = MLPSelector() if len(self.stages) > 1 else None
        self.selector = _checked_selector(selector)
        self.num_classes = num_classes
        shape = tuple(input_shape) if isinstance(input_shape, Sequence) else input_shape
        self.input = InputSpec(cast(tuple[int, int, int], shape), preprocess or self._first_normalization())
        self.transforms = nn.ModuleList(self._transform(k) for k in range(len(self.stages)))
        self.combine = checked_combine(combine, len(self.stages))
        self.classes = _checked_classes(classes)
        self.scale_check = ScaleCheck(self.input)
        self.operating_points: dict[str, OperatingPoint] = {}
        self.comparison: SelectorComparison | None = None
        self.out_of_fold: OutOfFoldScores | None = None
        self.seen_images = np.empty(0, np.uint64)
        self.register_buffer("temperatures", torch.ones(len(self.stages)))
        self._check_arguments()
        if isinstance(self.selector, Selector):
            self.selector.build(len(self.stages), num_classes)
        self._count_costs()

    def _first_normalization(self) -> Normalize | None:
        transforms = [self.stage(k).transform for k in range(len(self.stages))]
        return next((t.normalize for t in transforms if t is not None and t.normalize is not None), None)

    def _transform(self, k: int) -> nn.Module:
        try:
            return transform_images(self.stage(k).transform, self.input)
        except InvalidArgument as error:
            raise InvalidArgument(f"stage {k} cannot see the cascade's images: {error}") from error

    def _check_arguments(self) -> None:
        if not self.stages:
            raise InvalidArgument("a cascade needs at least one stage")
        if (self.selector is None) != (len(self.stages) == 1):
            expected = "no selector" if len(self.stages) == 1 else "a selector, for example fc.MLPSelector()"
            raise InvalidArgument(f"{len(self.stages)} stage(s) need {expected}, got {self.selector!r}")
        if not isinstance(self.num_classes, int) or self.num_classes < 2:
            raise InvalidArgument(f"num_classes is {self.num_classes!r}; expected an integer of at least 2")
        if self.stage(0).input != "image":
            raise InvalidArgument(
                "the first stage has input='previous'; expected 'image': nothing comes before it"
            )
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise InvalidArgument(f"{len(self.classes)} class names for num_classes={self.num_classes}")

    def _count_costs(self) -> None:
        """Run one blank image through every stage to count multiplies and check the logits' shape."""
        x = torch.zeros(1, *self.input.shape, device=self.device, dtype=self.dtype)
        counted, chains, backbone, features = [], [], 0, x
        for k in range(len(self.stages)):
            stage = self.stage(k)
            source, origin = (
                (self.stage_images(k, x), "an image")
                if stage.input == "image"
                else (features, f"the features of stage {k - 1}")
            )
            features, macs = self._probe(k, stage.module, source, origin)
            # The cost of a stage alone: its exit and the chain of segments that it reads from.
            backbone = macs + (backbone if stage.input == "previous" else 0)
            logits, exit_macs = features, 0
            if stage.exit is not None:
                logits, exit_macs = self._probe(k, stage.exit, features, "its features")
            if logits.shape != (1, self.num_classes):
                raise InvalidArgument(
                    f"stage {k} returns shape {tuple(logits.shape)} for one {self.input.shape} image; "
                    f"expected (1, {self.num_classes}) logits. Change num_classes or the stage's last layer"
                )
            counted.append(macs + exit_macs)
            chains.append(backbone + exit_macs)
        overrides = [self.stage(k).macs for k in range(len(self.stages))]
        self.stage_macs = tuple(c if o is None else o for c, o in zip(counted, overrides, strict=True))
        self._count_selector()
        # Stage(macs=…) replaces the counted cost of the stage itself, not of the segments before it.
        costs = zip(chains, counted, self.stage_macs, strict=True)
        self.single_macs = tuple(chain - own + macs for chain, own, macs in costs)
        self.dense_macs = self.single_macs[-1]

    def _probe(self, k: int, module: nn.Module, x: Tensor, origin: str) -> tuple[Tensor, int]:
        """Output and multiplies of a part of stage k for one instance."""
        try:
            out, macs = count_macs(module, x)
        except Exception as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0].removesuffix(".")
            place = place_of_failure(module, error)
            hint = self.input.channels_first_hint()
            raise InvalidArgument(
                f"stage {k} ({type(module).__name__}) fails on {origin} of shape {tuple(x.shape)}: "
                f"{type(error).__name__}: {reason}{place and f' ({place})'}"
                f"{hint or f'. input_shape is {self.input.shape} (C, H, W)'}"
            ) from error
        if not isinstance(out, Tensor):
            raise InvalidArgument(
                f"stage {k} ({type(module).__name__}) returns {type(out).__name__}; expected a tensor. "
                "Wrap it in a module that returns the logits alone"
            )
        return out, macs

    def _count_selector(self) -> None:
        self.selector_macs = tuple(
            0 if self.selector is None else cast(Selector, self.selector).macs(k, self.num_classes)
            for k in range(len(self.stages) - 1)
        )

    def replace_selector(self, selector: nn.Module) -> None:
        """Take another selector. Operating points and the comparison go, for they are the old one's.

        Args:
            selector: as in the constructor, but not "auto"; moved to the cascade's device.

        Raises:
            InvalidArgument: the cascade has one stage.

        Example:
            >>> from fastcascade.model.resnet import resnet_cifar
            >>> from fastcascade.model.selector import MLPSelector, ThresholdSelector
            >>> cascade = Cascade([resnet_cifar(8), resnet_cifar(14)], MLPSelector(), 10, (3, 32, 32))
            >>> cascade.replace_selector(ThresholdSelector("margin"))
            >>> cascade.selector_macs
            (0,)
        """
        if self.selector is None:
            raise InvalidArgument("a cascade of one stage has no selector to replace")
        self.selector = selector
        if isinstance(selector, Selector):
            selector.build(len(self.stages), self.num_classes)
        selector.to(self.device)
        self.operating_points.clear()
        self.comparison = None
        self.out_of_fold = None
        self._count_selector()

    def stage(self, k: int) -> Stage:
        """Stage k, typed."""
        return cast(Stage, self.stages[k])

    @property
    def stage_weights(self) -> tuple[float | None, ...]:
        """(K,) weights of the stages in the combined probabilities; None for combine="last"."""
        return stage_weights(self.combine, len(self.stages))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Weights saved before there were temperatures have none: 1."""
        state_dict.setdefault(f"{prefix}temperatures", torch.ones_like(self.temperatures))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter; CPU for a cascade without parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the first stage's parameters; float32 without any."""
        return next((p.dtype for p in self.stage(0).parameters() if p.is_floating_point()), torch.float32)

    @property
    def score_dtype(self) -> torch.dtype:
        """Dtype of log-probabilities and stop scores: float32, or float64 for a float64 cascade."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def exit_macs(self) -> Tensor:
        """(K,) int64: accumulated cost of stopping at each exit: stages 0…k and selectors 0…min(k, K−2)."""
        return (torch.tensor(self.stage_macs) + torch.tensor([*self.selector_macs, 0])).cumsum(0)

    def thresholds(self, operating_point: OperatingPointLike = None) -> Tensor:
        """(K−1,) float32 stop thresholds.

        Args:
            operating_point: the name of a stored one, an :class:`OperatingPoint`, or K−1 numbers. None means
                the one named "default" if stored, else the selector's default.

        Raises:
            InvalidArgument: an unknown name, the wrong count, NaN, or no default.
        """
        default = getattr(self.selector, "default_threshold", 0.0)
        defaults = None if default is None else torch.full((len(self.stages) - 1,), default)
        return resolve_thresholds(operating_point, self.operating_points, defaults, len(self.stages))

    def score(self, k: int, log_probs: Tensor, previous_label: Tensor, label: Tensor) -> Tensor:
        """(n,) stop scores after stage k; ``label`` is argmax p_k (custom selectors do not receive it)."""
        selector = cast(nn.Module, self.selector)
        arguments = (label,) if isinstance(selector, Selector) else ()
        return cast(Tensor, selector(k, log_probs, previous_label, *arguments))

    def all_exits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run every stage on every instance, differentiably: for training and custom loops.

        Args:
            x: (N, C, H, W) float, or uint8 images.

        Returns:
            logits (K, N, C) and stop scores (K−1, N), before any threshold.
        """
        logits = self.all_logits(x)
        return logits, self.judge(logits).scores

    def all_logits(self, x: Tensor) -> Tensor:
        """Logits (K, N, C) of every stage on every instance, differentiable."""
        image = features = self.images(x)
        logits = []
        for k in range(len(self.stages)):
            stage = self.stage(k)
            features, z = stage(self.stage_images(k, image) if stage.input == "image" else features)
            logits.append(z)
        return torch.stack(logits)

    def tempered(self, logits: Tensor, k: int | None = None) -> Tensor:
        """z/T in float32, or float64 as the logits are: what every softmax is taken of.

        Args:
            logits: (K, N, C) of all stages, or (N, C) of stage ``k``.
        """
        wide = logits if logits.dtype == torch.float64 else logits.float()
        temperatures = self.temperatures.to(wide)
        return wide / (temperatures[:, None, None] if k is None else temperatures[k])

    def judge(self, logits: Tensor) -> ExitJudgement:
        """Log-probabilities and stop scores of every exit from the logits (K, N, C); differentiable."""
        tempered = self.tempered(logits)
        valid = tempered.isfinite().all(2)
        own = tempered.log_softmax(2)
        labels = own.argmax(2)
        log_probs = own
        if self.combine != "last":
            weights = own.new_tensor(self.stage_weights)[:, None]  # (K, 1)
            weighted = own + weights[:, :, None].log()
            total = weighted.masked_fill(~valid[:, :, None], -math.inf).logcumsumexp(0)
            log_probs = total - (weights * valid).cumsum(0)[:, :, None].log()
        log_probs = torch.where(valid[:, :, None], log_probs, math.nan)
        safe = torch.where(valid[:, :, None], log_probs, -math.log(self.num_classes))
        previous = labels.masked_fill(~valid, -1).roll(1, 0)
        scores = [
            self.score(k, safe[k], previous[k] if k else torch.full_like(labels[0], -1), labels[k])
            for k in range(len(logits) - 1)
        ]
        return ExitJudgement(
            log_probs, torch.stack(scores) if scores else own.new_empty(0, own.shape[1]), valid
        )

    @torch.no_grad()
    def forward(
        self, x: Tensor | np.ndarray[Any, Any], operating_point: OperatingPointLike = None
    ) -> CascadeOutput:
        """Classify a batch; each stage runs only on the instances that are still active.

        Args:
            x: (N, C, H, W) float, or uint8 images in NCHW or NHWC; N may be 0.
            operating_point: see :meth:`thresholds`.

        Returns:
            a :class:`CascadeOutput` in input order, on the cascade's device.

        Raises:
            InvalidArgument: wrong shape, dtype, device or operating point.
        """
        thresholds = [*self.thresholds(operating_point).tolist(), -math.inf]
        images = self.images(x)
        tables = exit_tables(len(images), self.num_classes, images.device, self.score_dtype)
        active = torch.arange(len(images), device=images.device)
        features = images
        with eval_mode(self):
            for k in range(len(self.stages)):
                if len(active) == 0:
                    break
                stage = self.stage(k)
                if stage.input == "image":
                    features = self.stage_images(k, images[active])
                features, logits = stage(features)
                last = k == len(self.stages) - 1
                score = None if last else partial(self.score, k)
                keep = exit_step(
                    tables,
                    self.tempered(logits, k),
                    active,
                    k,
                    stage_weight=self.stage_weights[k],
                    score=score,
                    threshold=thresholds[k],
                )
                active, features = compact_index(active, keep), features[keep]
        cost = self.exit_macs.to(images.device)[tables.exit_stage]
        return CascadeOutput(tables.log_probs.exp().float(), tables.label, tables.exit_stage, cost)

    def stage_images(self, k: int, images: Tensor) -> Tensor:
        """What stage k sees of images (n, C, H, W): resized, cropped and normalised as its transform says."""
        return cast(Tensor, self.transforms[k](images))

    def images(self, x: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """The input of the stages: (N, C, H, W) of the cascade's dtype; uint8 images are normalised."""
        x = self.input.nchw(x)
        if x.device != self.device:
            raise InvalidArgument(f"images are on {x.device}, the cascade on {self.device}; move one of them")
        if self.scale_check.open and not torch.compiler.is_compiling():
            self.scale_check(x)
        return self.input.to_float(x).to(self.dtype)

    def save(
        self,
        directory: str | Path,
        overwrite: bool = False,
        half: bool = False,
        plan: bool | None = None,
    ) -> None:
        """Save as JSON and safetensors, for :func:`fastcascade.load` and :func:`fastcascade.compile`.

        Args:
            overwrite: replace a cascade that is there.
            half: store the stages' weights as float16, which halves the file. They load as float32.
            plan: also save the plan, from which ``fastcascade predict`` and ``fc.compile(directory)`` run
                without the code of the stages. None saves it if the cascade has modules that are not built in
                and its plan has no opaque stage.

        Raises:
            LoweringError: with ``plan=True``, a stage or selector is opaque.
        """
        import fastcascade
        from fastcascade.model.store import save_cascade

        def save_plan(cascade: Cascade) -> str:
            return fastcascade.plan(cascade).save(directory, overwrite=overwrite)

        save_cascade(self, directory, overwrite, half, plan, save_plan)


def _checked_stages(stages: object) -> list[Stage]:
    if isinstance(stages, nn.Module) and not isinstance(stages, nn.ModuleList):
        raise InvalidArgument(
            f"stages is a {type(stages).__name__}; expected a list of modules, as in [module]"
        )
    if isinstance(stages, str) or not isinstance(stages, Sequence | nn.ModuleList):
        raise InvalidArgument(f"stages is {stages!r}; expected a list of modules")
    checked = []
    for k, stage in enumerate(stages):
        _require_module(stage, f"stages[{k}]")
        checked.append(stage if isinstance(stage, Stage) else Stage(stage))
    return checked


def _checked_selector(selector: nn.Module | str | None) -> nn.Module | None:
    if selector is None or (isinstance(selector, nn.Module) and hasattr(selector, "macs")):
        return selector
    raise InvalidArgument(
        f"selector is {selector!r}; expected None, 'auto', fc.MLPSelector(), fc.ThresholdSelector(score), "
        "or a module with forward(k, log_probs, previous_label) and macs(k, num_classes)"
    )


def _checked_classes(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise InvalidArgument(f"classes is {classes!r}; expected a list of names")
    return tuple(classes)
