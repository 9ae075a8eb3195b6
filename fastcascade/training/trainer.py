"""Training a cascade: pretrain the stages, train them jointly with the selector, refit the selector.

The joint phase runs on augmented training images, as in the paper (Guan et al. 2018). Networks are nearly
perfect on their own training images, so a selector sees almost no mistakes there; afterwards it is
therefore refitted on held-out images, with the stages frozen.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from fastcascade.data.batches import Data, arrays, image_hashes
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.model.cascade import Cascade
from fastcascade.training.augmentation import crop_and_flip, epoch_order, uniforms
from fastcascade.training.checkpoint import (
    OptimizerState,
    Position,
    load_checkpoint,
    restore_optimizers,
    save_checkpoint,
)
from fastcascade.training.distributed import (
    RunningStatistics,
    average,
    local_share,
    process_group,
    rank,
    world_size,
)
from fastcascade.training.objective import (
    Baseline,
    Objective,
    auxiliary_loss,
    distillation_loss,
    greedy_exit,
    objective_loss,
    rewards,
)
from fastcascade.training.progress import EpochProgress, announce, write_metrics
from fastcascade.training.refit import collect_logits, fit_selector, standardise_features

__all__ = ["Recipe", "fit"]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train. Epochs count passes over ``train``; every rate is per step.

    Attributes:
        pretrain_epochs: classification alone, before the joint phase.
        joint_epochs: stages and selector together.
        batch_size: instances per optimiser step, over all processes.
        accumulate: micro-batches per process and step; each goes through batch norm on its own.
        learning_rate: peak of pretraining; rises for a fifth of the time, then falls to zero linearly.
        joint_learning_rate: of the stages in the joint phase; falls to zero linearly.
        selector_learning_rate: of Adam, which trains the selector.
        momentum, weight_decay: of Nesterov SGD, which trains the stages.
        label_smoothing: in pretraining.
        distillation: weight of the last stage's answers against the labels' when the earlier stages are
            pretrained; 0 trains all stages on labels alone, at the same time.
        distillation_epochs: of the earlier stages under distillation; ``pretrain_epochs`` if None.
        auxiliary: weight of every stage's own cross-entropy in the joint phase.
        crop_padding: random shifts by up to so many pixels, with random mirroring; 0 turns both off.
        baseline: of REINFORCE.
        detach_probs: keep the policy's gradient out of the stages.
        selector_steps: full-batch Adam steps of the refit, at most.
        autocast: bfloat16 arithmetic; None means where the device is faster with it.
        seed: of every random choice.

    Raises:
        InvalidArgument: a field of the wrong type or out of range.
    """

    pretrain_epochs: Annotated[int, Ge(0)] = 20
    joint_epochs: Annotated[int, Ge(0)] = 4
    batch_size: Annotated[int, Ge(1)] = 512
    accumulate: Annotated[int, Ge(1)] = 1
    learning_rate: Annotated[float, Gt(0)] = 0.4
    joint_learning_rate: Annotated[float, Ge(0)] = 0.02
    selector_learning_rate: Annotated[float, Gt(0)] = 0.01
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    distillation: Annotated[float, Ge(0), Le(1)] = 0.0
    distillation_epochs: Annotated[int, Ge(0)] | None = None
    auxiliary: Annotated[float, Ge(0)] = 1.0
    crop_padding: Annotated[int, Ge(0)] = 4
    baseline: Baseline = "moving_average"
    detach_probs: bool = False
    selector_steps: Annotated[int, Ge(0)] = 200
    autocast: bool | None = None
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        from fastcascade.training.validation import check_fields

        check_fields(self)


@dataclass(frozen=True)
class _Phase:
    """A run of epochs with one loss. ``teacher`` is a frozen stage whose outputs the others imitate."""

    name: str
    epochs: int
    stages: tuple[int, ...]
    joint: bool = False
    teacher: int | None = None


def _phases(cascade: Cascade, recipe: Recipe) -> list[_Phase]:
    every = tuple(range(len(cascade.stages)))
    last = every[-1]
    independent = all(cascade.stage(k).input == "image" for k in every)
    joint = _Phase("joint", recipe.joint_epochs, every, joint=True)
    if recipe.distillation > 0 and independent and last > 0:
        epochs = recipe.pretrain_epochs if recipe.distillation_epochs is None else recipe.distillation_epochs
        return [
            _Phase("pretrain last stage", recipe.pretrain_epochs, (last,)),
            _Phase("pretrain earlier stages", epochs, every[:-1], teacher=last),
            joint,
        ]
    return [_Phase("pretrain", recipe.pretrain_epochs, every), joint]


class _Trainer:
    """The loop around the losses; one per call of :func:`fit`."""

    def __init__(
        self,
        cascade: Cascade,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor],
        objective: Objective,
        alpha: float,
        recipe: Recipe,
        cost_shares: Tensor,
    ) -> None:
        self.cascade = cascade
        self.images, self.labels = train
        self.val = val
        self.objective: Objective = objective
        self.alpha = alpha
        self.recipe = recipe
        self.device = cascade.device
        self.cost_shares = cost_shares
        self.bf16 = _bf16_pays(self.device) if recipe.autocast is None else recipe.autocast
        self.steps = max(1, len(self.images) // recipe.batch_size)
        self.average_reward = 0.0
        self.greedy_rewards: list[Tensor] = []
        pieces = world_size() * recipe.accumulate
        if min(recipe.batch_size, len(self.images)) % pieces:
            raise InvalidArgument(
                f"a step of {min(recipe.batch_size, len(self.images))} instances cannot be split evenly over "
                f"{world_size()} process(es) with {recipe.accumulate} micro-batch(es); change batch_size"
            )

    def run(
        self, checkpoint_dir: Path | None, settings: Mapping[str, Any], progress: bool
    ) -> list[dict[str, Any]]:
        """Run all phases from where the checkpoint stands; returns the metrics of every epoch."""
        phases = _phases(self.cascade, self.recipe)
        self.cascade.temperatures.fill_(1.0)  # they are fitted on held-out images, at the end
        position, stored = Position(), list[OptimizerState]()
        if checkpoint_dir is not None:
            position, stored = load_checkpoint(checkpoint_dir, settings, self.cascade)
        self.average_reward = position.average_reward
        history = list(position.history)
        if checkpoint_dir is not None and history and rank() == 0:
            write_metrics(checkpoint_dir / "metrics.jsonl", history)  # the run may have ended before it did
        for number in range(position.phase, len(phases)):
            phase = phases[number]
            optimizers = self._optimizers(phase)
            first = position.epoch if number == position.phase else 0
            if first:
                restore_optimizers(optimizers, stored)
            elif phase.joint and phase.epochs:
                standardise_features(self.cascade, collect_logits(self.cascade, self.val[0]))
            if first < phase.epochs:
                announce(self._describe(phase, first), progress)
            before = sum(p.epochs for p in phases[:number])
            for epoch in range(first, phase.epochs):
                with EpochProgress(f"{phase.name} {epoch + 1}/{phase.epochs}", progress) as bar:
                    loss = self._epoch(phase, optimizers, epoch, before + epoch, bar)
                record = {"phase": phase.name, "epoch": epoch + 1, "loss": loss, **self._validate(phase)}
                history.append(record)
                if checkpoint_dir is not None and rank() == 0:
                    done = Position(number, epoch + 1, self.average_reward, tuple(history))
                    save_checkpoint(checkpoint_dir, done, settings, self.cascade, optimizers)
                    write_metrics(checkpoint_dir / "metrics.jsonl", history)
        return history

    def _describe(self, phase: _Phase, first: int) -> str:
        """What a phase does from epoch ``first`` on."""
        parts = [f"stage{'s' * (len(phase.stages) > 1)} {', '.join(map(str, phase.stages))}"]
        if phase.joint and self.cascade.selector is not None:
            parts[0] += " and selector"
        parts.append(f"{len(self.images):,} images")
        parts.append(f"epochs {first + 1} to {phase.epochs}, {self.steps:,} steps each")
        return f"{phase.name}: {', '.join(parts)}"

    def _optimizers(self, phase: _Phase) -> list[torch.optim.Optimizer]:
        """Nesterov SGD for the stages and, in the joint phase, Adam for the selector."""
        recipe = self.recipe
        rate = recipe.joint_learning_rate if phase.joint else recipe.learning_rate
        stages = [p for k in phase.stages for p in self.cascade.stage(k).parameters()]
        result: list[torch.optim.Optimizer] = [
            torch.optim.SGD(
                stages,
                rate,
                recipe.momentum,
                weight_decay=recipe.weight_decay,
                nesterov=recipe.momentum > 0,
            )
        ]
        selector = [] if self.cascade.selector is None else list(self.cascade.selector.parameters())
        if phase.joint and selector:
            result.append(torch.optim.Adam(selector, recipe.selector_learning_rate))
        return result

    def _epoch(
        self,
        phase: _Phase,
        optimizers: list[torch.optim.Optimizer],
        epoch: int,
        global_epoch: int,
        bar: EpochProgress,
    ) -> float:
        """One pass; ``epoch`` counts within the phase (for the rate), ``global_epoch`` over all."""
        order = epoch_order(self.recipe.seed, global_epoch, len(self.images))
        modules = [self.cascade.stage(k) for k in phase.stages]
        self.cascade.eval()
        for module in modules:
            module.train()
        total = 0.0
        for step in bar.steps(range(self.steps)):
            fraction = (epoch + step / self.steps) / phase.epochs
            optimizers[0].param_groups[0]["lr"] = _rate(phase, self.recipe, fraction)
            loss = self._step(phase, modules, optimizers, order, step, global_epoch)
            total += loss
            bar.note(loss=loss)
        self.cascade.eval()
        return total / self.steps

    def _step(
        self,
        phase: _Phase,
        modules: Sequence[nn.Module],
        optimizers: list[torch.optim.Optimizer],
        order: np.ndarray[Any, Any],
        step: int,
        epoch: int,
    ) -> float:
        size = self.recipe.batch_size
        pieces = local_share(
            np.array_split(order[step * size : (step + 1) * size], world_size() * self.recipe.accumulate)
        )
        statistics = RunningStatistics(modules, len(pieces))
        total = torch.zeros((), device=self.device)
        for index in pieces:
            images, labels = self._batch(index, epoch)
            loss = (
                self._joint_loss(index, epoch, images, labels)
                if phase.joint
                else self._pretrain_loss(phase, images, labels)
            ) / len(pieces)
            loss.backward()
            total += loss.detach()
            statistics.end_micro_batch()
        statistics.end_step()
        self._update_baseline()
        value = float(average(total))
        if not np.isfinite(value):
            raise DataError(
                f"the loss became {value} in {phase.name}, step {step + 1}; look for non-finite pixels in "
                "the training images, or lower the learning rate"
            )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        average(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
        return value

    def _batch(self, index: np.ndarray[Any, Any], epoch: int) -> tuple[Tensor, Tensor]:
        """Augmented images, normalised and channels-last, and labels, on the cascade's device."""
        rows = torch.from_numpy(index)
        images = self.images[rows]
        if self.recipe.crop_padding:
            draws = uniforms(self.recipe.seed, epoch, index, 3)
            images = crop_and_flip(images, draws, self.recipe.crop_padding)
        images = self.cascade.images(images.to(self.device))
        return images.contiguous(memory_format=torch.channels_last), self.labels[rows].to(self.device)

    def _pretrain_loss(self, phase: _Phase, images: Tensor, labels: Tensor) -> Tensor:
        with self._arithmetic():
            if any(self.cascade.stage(k).input == "previous" for k in phase.stages):
                logits = self.cascade.all_logits(images)
            else:
                logits = torch.stack([self._stage_logits(k, images) for k in phase.stages])
            teacher = self._teacher_logits(phase, images, logits)
        loss = auxiliary_loss(logits, labels, self.recipe.label_smoothing)
        if teacher is None:
            return loss
        weight = self.recipe.distillation
        return (1 - weight) * loss + weight * distillation_loss(logits, teacher)

    def _teacher_logits(self, phase: _Phase, images: Tensor, logits: Tensor) -> Tensor | None:
        """A frozen last stage, or the last exit of the same backbone; None without distillation."""
        if phase.teacher is None:
            shared = self.recipe.distillation > 0 and self.cascade.stage(phase.stages[-1]).input == "previous"
            return logits[-1] if shared else None
        with torch.no_grad():
            return self._stage_logits(phase.teacher, images)

    def _stage_logits(self, k: int, images: Tensor) -> Tensor:
        """Logits (N, C) of a stage that reads images."""
        return cast(Tensor, self.cascade.stage(k)(self.cascade.stage_images(k, images))[1])

    def _joint_loss(self, index: np.ndarray[Any, Any], epoch: int, images: Tensor, labels: Tensor) -> Tensor:
        recipe = self.recipe
        with self._arithmetic():
            logits = self.cascade.all_logits(images)
        auxiliary = recipe.auxiliary * auxiliary_loss(logits, labels)
        if self.cascade.selector is None:
            return auxiliary
        judged = self.cascade.judge(logits)
        scores = self.cascade.judge(logits.detach()).scores if recipe.detach_probs else judged.scores
        reward = rewards(judged.log_probs, labels, self.cost_shares.to(logits.device), self.alpha)
        draws = torch.from_numpy(uniforms(recipe.seed + 1, epoch, index, 1)[:, 0])
        baseline = self._baseline(scores.detach(), reward.detach())
        return objective_loss(self.objective, scores, reward, draws, baseline) + auxiliary

    def _baseline(self, scores: Tensor, reward: Tensor) -> Tensor | float:
        if self.objective != "reinforce" or self.recipe.baseline == "none":
            return 0.0
        greedy = reward.gather(0, greedy_exit(scores)[None]).squeeze(0)
        if self.recipe.baseline == "greedy":
            return greedy
        self.greedy_rewards.append(greedy.mean())
        return self.average_reward

    def _update_baseline(self) -> None:
        """Once a step, from all micro-batches of all processes."""
        if self.greedy_rewards:
            earned = float(average(torch.stack(self.greedy_rewards).mean()))
            self.average_reward = 0.95 * self.average_reward + 0.05 * earned
            self.greedy_rewards = []

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _validate(self, phase: _Phase) -> dict[str, Any]:
        """Held-out accuracy of each trained stage; in the joint phase also of the cascade at u ≥ 0."""
        images, labels = self.val
        logits = collect_logits(self.cascade, images)
        single = (logits.argmax(2) == labels).float().mean(1)
        record: dict[str, Any] = {"stage_accuracy": [round(float(single[k]), 4) for k in phase.stages]}
        if phase.joint and self.cascade.selector is not None:
            judged = self.cascade.judge(logits)
            exits = greedy_exit(judged.scores)
            answers = judged.log_probs.argmax(2).gather(0, exits[None]).squeeze(0)
            record["accuracy"] = round(float((answers == labels).float().mean()), 4)
            record["mean_macs"] = round(float(self.cascade.exit_macs[exits].double().mean()))
            record["exit_shares"] = [
                round(float((exits == k).float().mean()), 4) for k in range(len(self.cascade.stages))
            ]
        return record


def _rate(phase: _Phase, recipe: Recipe, fraction: float) -> float:
    """Learning rate of the stages after a ``fraction`` of the phase."""
    if phase.joint:
        return recipe.joint_learning_rate * (1 - fraction)
    rising = 0.2
    return recipe.learning_rate * (fraction / rising if fraction < rising else (1 - fraction) / (1 - rising))


def _bf16_pays(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 have instructions of their own on this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def fit(
    cascade: Cascade,
    train: Data | None,
    val: Data,
    objective: Objective = "exact",
    alpha: float = 0.05,
    freeze_stages: bool = False,
    refit_selector: bool = True,
    checkpoint_dir: str | Path | None = None,
    recipe: Recipe | None = None,
    progress: bool = True,
    cost_shares: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Train a cascade in place.

    Pretrains the stages, trains stages and selector jointly for ``objective``, then fits temperatures and
    selector on ``val`` (see :func:`fastcascade.training.refit.fit_selector`), where it also compares the
    selector with threshold rules: ``cascade.comparison``. Operating points stored before are dropped.

    Bits are a function of the arguments and the number of threads: a run that was killed and started again
    with the same ``checkpoint_dir`` ends where the uninterrupted one does. Under torchrun, every process
    calls this with the same arguments.

    Args:
        train: images and labels; None only with ``freeze_stages``.
        val: held out from the stages: the selector is fitted on it, and it is what the metrics are of.
        objective: "exact" (closed-form expectation), "reinforce" (the paper) or "imitation".
        alpha: price of one dense cost in nats. Thresholds choose the trade-off afterwards, so a small one
            serves all budgets (docs/selection.md).
        freeze_stages: fit temperatures and selector only, on ``val``, or on ``train`` if given.
        refit_selector: fit temperatures and selector on ``val`` at the end; otherwise the temperatures are 1.
        checkpoint_dir: where to resume from and to write ``checkpoint.json`` and ``metrics.jsonl``.
        recipe: see :class:`Recipe`.
        progress: on standard error, print a line before each phase and draw a bar.
        cost_shares: (K,) what stopping at each exit costs over the dense cost, earlier stages included, for
            example in measured time; MACs if None.

    Returns:
        one record per epoch: phase, epoch, loss, stage_accuracy and, in the joint phase, accuracy,
        mean_macs and exit_shares on ``val``.

    Raises:
        InvalidArgument: no training data, unlabelled data, or a checkpoint made with other settings.
        DataError: the loss became non-finite, or no held-out image has finite logits.

    Warns:
        UserWarning: as :func:`fastcascade.training.refit.fit_selector`; or frozen stages that seem to have
            been trained on the images given.

    Example:
        >>> import fastcascade as fc
        >>> seed = torch.manual_seed(0)
        >>> nets = [nn.Sequential(nn.Flatten(), nn.Linear(4, 2)) for _ in range(2)]
        >>> cascade = fc.Cascade(nets, fc.MLPSelector(), num_classes=2, input_shape=(1, 2, 2))
        >>> x = torch.randn(64, 1, 2, 2)
        >>> data = (x, (x.sum((1, 2, 3)) + torch.randn(64) > 0).long())
        >>> recipe = fc.Recipe(pretrain_epochs=1, joint_epochs=1, batch_size=32, crop_padding=0)
        >>> len(fc.fit(cascade, data, data, recipe=recipe, progress=False))
        2
    """
    recipe = Recipe() if recipe is None else recipe
    shares = _cost_shares(cascade, cost_shares)
    if train is None and not freeze_stages:
        raise InvalidArgument(
            "train is None; pass training data, or freeze_stages=True to fit the selector only"
        )
    held_out = _labelled(cascade, val, "val")
    seen = [image_hashes(held_out[0])]
    trained_on = cascade.seen_images
    if cascade.out_of_fold is not None:
        trained_on = np.setdiff1d(trained_on, cascade.out_of_fold.images)
    history: list[dict[str, Any]] = []
    if freeze_stages:
        fitted_on = held_out
        if train is not None:
            fitted_on = _labelled(cascade, train, "train")
            _warn_if_already_learned(cascade, fitted_on)
            seen.append(image_hashes(fitted_on[0]))
        _fit_selector(cascade, fitted_on, objective, alpha, recipe, shares, progress)
    else:
        training = _labelled(cascade, train, "train")
        seen.append(image_hashes(training[0]))
        trained_on = np.concatenate([trained_on, seen[-1]])
        with process_group():
            trainer = _Trainer(cascade, training, held_out, objective, alpha, recipe, shares)
            settings = {
                "objective": objective,
                "alpha": alpha,
                "images": len(training[0]),
                "cost_shares": shares.tolist(),
                **asdict(recipe),
            }
            directory = None if checkpoint_dir is None else Path(checkpoint_dir)
            history = trainer.run(directory, settings, progress)
        if refit_selector:
            _fit_selector(cascade, held_out, objective, alpha, recipe, shares, progress)
    if cascade.out_of_fold is not None:
        cascade.out_of_fold = cascade.out_of_fold.without(trained_on)
    cascade.seen_images = np.unique(np.concatenate([cascade.seen_images, *seen]))
    return history


def _cost_shares(cascade: Cascade, given: Sequence[float] | None) -> Tensor:
    """(K,) float64 cost of stopping at each exit over the dense cost."""
    if given is None:
        return cascade.exit_macs.double() / cascade.dense_macs
    shares = torch.tensor(list(given), dtype=torch.float64)
    if shares.shape != (len(cascade.stages),) or not bool((shares.isfinite() & (shares >= 0)).all()):
        raise InvalidArgument(
            f"cost_shares is {list(given)}; expected {len(cascade.stages)} numbers from 0, one per exit"
        )
    return shares


def _fit_selector(
    cascade: Cascade,
    data: tuple[Tensor, Tensor],
    objective: Objective,
    alpha: float,
    recipe: Recipe,
    cost_shares: Tensor,
    progress: bool,
) -> None:
    fitted = "temperatures" if cascade.selector is None else "temperatures and selector"
    announce(f"{fitted}: {len(data[0]):,} images, at most {recipe.selector_steps:,} steps", progress)
    fit_selector(
        cascade,
        collect_logits(cascade, data[0], compiled=None, progress=progress and rank() == 0),
        data[1],
        objective,
        alpha,
        steps=recipe.selector_steps,
        learning_rate=recipe.selector_learning_rate,
        baseline=recipe.baseline,
        seed=recipe.seed,
        cost_shares=cost_shares,
        hashes=image_hashes(data[0]),
    )


def _labelled(cascade: Cascade, data: Data | None, name: str) -> tuple[Tensor, Tensor]:
    """Images as the cascade takes them, (N, C, H, W), and int64 labels in range."""
    if data is None:
        raise InvalidArgument(f"{name} is None; expected images and labels")
    images, labels = arrays(data)
    images = cascade.input.nchw(images)
    if labels is None:
        raise InvalidArgument(f"{name} has no labels; expected a pair (images, labels)")
    if len(images) == 0:
        raise InvalidArgument(f"{name} is empty; expected at least one image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= cascade.num_classes:
        raise InvalidArgument(
            f"{name} has labels from {low} to {high}; expected 0 … {cascade.num_classes - 1}"
        )
    return images, labels.long()


def _warn_if_already_learned(cascade: Cascade, data: tuple[Tensor, Tensor]) -> None:
    """A selector fitted where the stages make no mistakes learns to stop at once, everywhere."""
    images, labels = (t[:1000] for t in data)
    overlap = np.isin(image_hashes(images), cascade.seen_images).mean()
    accuracy = float(
        (collect_logits(cascade, images)[-1].argmax(1) == labels.to(cascade.device)).float().mean()
    )
    if overlap > 0.01 or accuracy > 0.99:
        warnings.warn(
            f"the stages seem to have been trained on these images (last stage {accuracy:.1%} correct, "
            f"{overlap:.0%} of the images seen before). Networks hardly err on their own training images, so "
            "a selector fitted there learns nothing about errors; pass held-out images as val and train=None",
            stacklevel=3,
        )
