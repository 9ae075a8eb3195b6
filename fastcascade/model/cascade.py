"""The cascade: a row of classifiers and a selector that decides, per instance, when to stop.

This file is the readable definition of inference. The engine (:func:`fastcascade.compile`) gives the same
answers faster.
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
from fastcascade.model.cost import count_macs, eval_mode
from fastcascade.model.selector import MLPSelector, Selector
from fastcascade.types import (
    CascadeOutput,
    Combine,
    InputSpec,
    Normalize,
    OperatingPoint,
    OperatingPointLike,
    SelectorComparison,
    checked_combine,
    resolve_thresholds,
    stage_weights,
)

__all__ = ["Cascade", "ExitJudgement", "Stage"]


class ExitJudgement(NamedTuple):
    """What every exit would say about every instance.

    Attributes:
        log_probs: (K, N, C) combined log-probabilities log q_k; NaN where stage k's logits are not finite.
        scores: (K−1, N) stop scores; meaningless where invalid.
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
        name: shown in reports and used as the key of saved weights; ``stage<k>`` if not given.
        macs: multiplies per instance, exit included; counted if not given.

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
    ) -> None:
        super().__init__()
        if input not in ("image", "previous"):
            raise InvalidArgument(f"Stage input is {input!r}; expected 'image' or 'previous'")
        self.module = module
        self.exit = exit
        self.input = input
        self.name = name
        self.macs = macs

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, …) → features (n, …) and logits (n, C); the same tensor if the stage has no exit."""
        features = self.module(x)
        return features, features if self.exit is None else self.exit(features)


class Cascade(nn.Module):
    """Stages of growing size with a selector after all but the last.

    Calling the cascade always takes the evaluation path with early exit, whatever its training mode; train
    through :meth:`all_exits`.

    Args:
        stages: modules (each reads the image) or :class:`Stage`.
        selector: None iff there is one stage. "auto" is an :class:`fastcascade.MLPSelector` that
            :func:`fastcascade.fit` replaces by a threshold rule where that does at least as well on held-out
            images.
        num_classes: at least 2; every stage must answer this many logits.
        input_shape: (C, H, W) of one image.
        combine: "last" answers with the stopping stage's probabilities, "mean" with the mean over the
            stages visited, K numbers with the mean that weighs the stages so.
        preprocess: applied to uint8 images only.
        classes: names, in label order.

    Attributes:
        stage_macs, selector_macs: per stage, multiplies per instance.
        single_macs: per stage, the cheapest way to give every instance that stage's own answer: its own
            cost, with the segments that it reads through but without their exits and selectors.
        dense_macs: ``single_macs`` of the last stage.
        temperatures: (K,) buffer of the stages' temperatures T_k: p_k = softmax(z_k / T_k). 1 until
            :func:`fastcascade.fit` finds them on held-out images (Guo et al. 2017, arXiv 1706.04599).
        operating_points: named thresholds stored by :func:`fastcascade.calibrate`.
        auto_selector: whether the selector was given as "auto".
        comparison: held-out accuracy of the learned selector and of threshold rules; None before
            :func:`fastcascade.fit`.
        seen_images: sorted uint64 hashes of the images that :func:`fastcascade.fit` has seen.

    Raises:
        InvalidArgument: a missing or superfluous selector, differing class counts, or a first stage that
            reads "previous".

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
        self.stages = nn.ModuleList(s if isinstance(s, Stage) else Stage(s) for s in stages)
        self.auto_selector = isinstance(selector, str) and selector == "auto"
        if self.auto_selector:
            selector = MLPSelector() if len(self.stages) > 1 else None
        elif isinstance(selector, str):
            raise InvalidArgument(f"selector is {selector!r}; expected 'auto', a module or None")
        self.selector = selector
        self.num_classes = num_classes
        self.input = InputSpec(cast(tuple[int, int, int], tuple(input_shape)), preprocess)
        self.combine = checked_combine(combine, len(self.stages))
        self.classes = None if classes is None else tuple(classes)
        self.operating_points: dict[str, OperatingPoint] = {}
        self.comparison: SelectorComparison | None = None
        self.seen_images = np.empty(0, np.uint64)
        self.register_buffer("temperatures", torch.ones(len(self.stages)))
        self._check_arguments()
        if isinstance(self.selector, Selector):
            self.selector.build(len(self.stages), num_classes)
        self._count_costs()

    def _check_arguments(self) -> None:
        if not self.stages:
            raise InvalidArgument("a cascade needs at least one stage")
        if (self.selector is None) != (len(self.stages) == 1):
            expected = "no selector" if len(self.stages) == 1 else "a selector, for example fc.MLPSelector()"
            raise InvalidArgument(f"{len(self.stages)} stage(s) need {expected}, got {self.selector!r}")
        if self.num_classes < 2:
            raise InvalidArgument(f"num_classes is {self.num_classes}; expected at least 2")
        if self.stage(0).input != "image":
            raise InvalidArgument("the first stage has input='previous', but nothing comes before it")
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise InvalidArgument(f"{len(self.classes)} class names for num_classes={self.num_classes}")

    def _count_costs(self) -> None:
        """Run one blank image through every stage to count multiplies and check the logits' shape."""
        x = torch.zeros(1, *self.input.shape, device=self.device, dtype=self.dtype)
        counted, chains, backbone, features = [], [], 0, x
        for k in range(len(self.stages)):
            stage = self.stage(k)
            source = x if stage.input == "image" else features
            features, macs = count_macs(stage.module, source)
            # A stage alone is its exit and the chain of segments that it reads through.
            backbone = macs + (backbone if stage.input == "previous" else 0)
            logits, exit_macs = (features, 0) if stage.exit is None else count_macs(stage.exit, features)
            if logits.shape != (1, self.num_classes):
                raise InvalidArgument(
                    f"stage {k} answers shape {tuple(logits.shape)} for one {self.input.shape} image; "
                    f"expected (1, {self.num_classes}) logits"
                )
            counted.append(macs + exit_macs)
            chains.append(backbone + exit_macs)
        overrides = [self.stage(k).macs for k in range(len(self.stages))]
        self.stage_macs = tuple(c if o is None else o for c, o in zip(counted, overrides, strict=True))
        self._count_selector()
        # An override replaces the stage's own part of its chain.
        costs = zip(chains, counted, self.stage_macs, strict=True)
        self.single_macs = tuple(chain - own + macs for chain, own, macs in costs)
        self.dense_macs = self.single_macs[-1]

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
        self._count_selector()

    def stage(self, k: int) -> Stage:
        """Stage k, typed."""
        return cast(Stage, self.stages[k])

    @property
    def stage_weights(self) -> tuple[float | None, ...]:
        """(K,) weights of the stages in the combined probabilities; None where a stage answers alone."""
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
        """Log-probabilities and stop scores are float32, or float64 for a float64 cascade."""
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
        """Every stage on every instance, differentiable: for training and for loops of your own.

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
            features, z = stage(image if stage.input == "image" else features)
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
        """What every exit would say, from the logits (K, N, C) of every stage; differentiable."""
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
                features, logits = stage(images[active] if stage.input == "image" else features)
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

    def images(self, x: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """What the stages see: (N, C, H, W) of the cascade's dtype. uint8 images are normalised."""
        x = self.input.nchw(x)
        if x.device != self.device:
            raise InvalidArgument(f"images are on {x.device}, the cascade on {self.device}; move one of them")
        return self.input.to_float(x).to(self.dtype)

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Save as JSON and safetensors; see :func:`fastcascade.load`."""
        from fastcascade.model.store import save_cascade

        save_cascade(self, directory, overwrite=overwrite)
