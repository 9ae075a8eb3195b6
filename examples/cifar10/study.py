"""The selection study: which selector decides best, on the same stages and at the same accumulated cost.

Reads the saved logits of families of stages and rewrites tables of docs/selection.md, all or some:

    python examples/cifar10/study.py
    python examples/cifar10/study.py --tables rules

Every row repeats five times: the 5,000 held-out images are split at random into one half that fits the
selector and one that finds the thresholds for each budget; accuracy is then measured on the test images. Of
stages that have seen all training images, 5,000 random test images are held out and the other 5,000 judge.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.errors import CalibrationError
from fastcascade.evaluation.calibration import find_thresholds
from fastcascade.evaluation.evaluation import Trace
from fastcascade.evaluation.temperature import fit_temperatures
from fastcascade.model.store import load_cascade
from fastcascade.training.augmentation import uniforms
from fastcascade.training.objective import greedy_exit, objective_loss, rewards
from fastcascade.training.refit import fit_selector, standardise_features
from fastcascade.types import Combine

HERE = Path(__file__).parent
DOCUMENT = HERE.parent.parent / "docs" / "selection.md"
BUDGETS = (0.2, 0.4, 0.6)
SEEDS = range(5)
ALPHA = 0.05
"""Price of one dense cost in nats, low enough to leave the trade-off to the thresholds."""

PRICES = (0.02, 0.05, 0.1, 0.3)
PLAIN: dict[str, Any] = {
    "temper": False,
    "bound": math.inf,
    "start_at_rule": False,
    "folds": 0,
    "steps": 500,
}
"""The objectives by themselves, on the paper's reward, from random weights; else all would start alike."""

RULE_BUDGETS = (0.3, 0.45, 0.6)
COMBINES: dict[str, Combine] = {"last": "last", "mean": "mean", "0.1, 0.5, 1": (0.1, 0.5, 1.0)}


@dataclass(frozen=True)
class Method:
    """One way to choose exits: a trained selector, or a confidence score."""

    name: str
    objective: str | None = None
    baseline: str = "none"
    features: str = "stats"
    score: str | None = None

    def selector(self) -> nn.Module:
        return fc.ThresholdSelector(self.score) if self.score else fc.MLPSelector(self.features)


OBJECTIVES = [
    Method("REINFORCE, no baseline", "reinforce", "none"),
    Method("REINFORCE, moving average", "reinforce", "moving_average"),
    Method("REINFORCE, greedy rollout", "reinforce", "greedy"),
    Method("exact expectation", "exact"),
    Method("imitation", "imitation"),
    Method("confidence: max_prob", score="max_prob"),
    Method("confidence: margin", score="margin"),
    Method("confidence: entropy", score="entropy"),
]
FEATURES = [
    Method("stats (top two log-odds, entropy, agreement)", "exact", features="stats"),
    Method("topk (top three log-odds, agreement)", "exact", features="topk"),
    Method("probs (the paper's)", "exact", features="probs"),
]


Labelled = tuple[Tensor, Tensor]
"""Logits (K, N, 10) and labels (N,)."""


@dataclass(frozen=True)
class Logits:
    """What the stages say about held-out and about test images; ``unseen`` if both come from one set."""

    held_out: Labelled
    test: Labelled
    unseen: Labelled | None = None

    @classmethod
    def load(cls, path: Path) -> Logits:
        t = load_file(path)
        if "unseen" in t:
            z, y = t["unseen"].float(), t["y_unseen"].long()
            half = len(y) // 2
            return cls((z[:, :half], y[:half]), (z[:, half:], y[half:]), (z, y))
        if "held_out" in t:
            return cls(
                (t["held_out"].float(), t["y_held_out"].long()), (t["test"].float(), t["y_test"].long())
            )
        return cls(
            (
                torch.cat([t["validation"], t["calibration"]], 1),
                torch.cat([t["y_validation"], t["y_calibration"]]),
            ),
            (t["test"], t["y_test"]),
        )

    def split(self, seed: int) -> tuple[Labelled, Labelled, Labelled]:
        """Random halves of the held-out images, and the images that judge."""
        held_out, test = self.held_out, self.test
        rng = np.random.default_rng(seed)
        if self.unseen is not None:
            z, y = self.unseen
            drawn = torch.from_numpy(rng.permutation(len(y)))
            held_out, test = ((z[:, rows], y[rows]) for rows in (drawn[: len(y) // 2], drawn[len(y) // 2 :]))
        z, y = held_out
        order = torch.from_numpy(rng.permutation(len(y)))
        first, second = order[: len(y) // 2], order[len(y) // 2 :]
        return (z[:, first], y[first]), (z[:, second], y[second]), test


def overconfident(images: Labelled, seed: int) -> Labelled:
    """Logits three times too large, and one mistake in seven twelve times: stages sure of their mistakes."""
    z, y = images
    generator = torch.Generator().manual_seed(seed)
    mistake = (z.argmax(2) != y) & (torch.rand(z.shape[:2], generator=generator) < 0.15)
    return z * torch.where(mistake, 12.0, 3.0)[:, :, None], y


@dataclass(frozen=True)
class Family:
    """Trained stages of which only the cost and the logits are needed."""

    name: str
    macs: tuple[int, ...]
    logits: Logits

    def cascade(self, selector: nn.Module, combine: Combine) -> fc.Cascade:
        """Stages that lend their cost."""
        nets = [nn.Sequential(nn.Flatten(), nn.Linear(4, 10)) for _ in self.macs]
        stages = [fc.Stage(net, macs=macs) for net, macs in zip(nets, self.macs, strict=True)]
        return fc.Cascade(stages, selector, 10, (1, 2, 2), combine)


def with_selector(trained: fc.Cascade, selector: nn.Module, combine: Combine) -> fc.Cascade:
    """The trained stages under another selector."""
    cascade = fc.Cascade(
        list(trained.stages),
        selector,
        trained.num_classes,
        trained.input.shape,
        combine,
        trained.input.preprocess,
        trained.classes,
    )
    cascade.seen_images = trained.seen_images
    return cascade


def accuracies(
    trained: fc.Cascade, method: Method, combine: Combine, logits: Logits, seed: int, alpha: float = ALPHA
) -> list[float]:
    """Test accuracy at each budget, NaN where it cannot be met."""
    torch.manual_seed(seed)
    cascade = with_selector(trained, method.selector(), combine)
    fitted_on, found_on, judge = logits.split(seed)
    if method.objective:
        fit_selector(
            cascade,
            *fitted_on,
            method.objective,
            alpha,
            baseline=method.baseline,
            seed=seed,
            **PLAIN,
        )
    calibration = Trace.from_logits(cascade, *found_on)
    return budget_accuracies(calibration, Trace.from_logits(cascade, *judge), trained.dense_macs)


def budget_accuracies(
    calibration: Trace, test: Trace, dense_macs: int, budgets: Sequence[float] = BUDGETS
) -> list[float]:
    """Test accuracy at each budget with the thresholds that calibration finds, NaN where it cannot be met."""
    row = []
    for share in budgets:
        try:
            thresholds = find_thresholds(calibration, budget_macs=share * dense_macs)
            row.append(test.run(thresholds).accuracy)
        except CalibrationError:
            row.append(float("nan"))
    return row


def budget_heads(budgets: Sequence[float] = BUDGETS) -> list[str]:
    """The table's heads of :func:`budget_accuracies`."""
    return [f"≤ {share:.0%} of dense" for share in budgets]


def mean_and_spread(rows: list[list[float]]) -> list[str]:
    """One cell per budget: mean ± standard deviation over the repetitions, in per cent; – if never met."""
    values = 100 * np.array(rows)
    cells = zip(values.mean(0), values.std(0, ddof=1), strict=True)
    return ["–" if math.isnan(m) else f"{m:.2f} ± {s:.2f}" for m, s in cells]


def against_rules(family: Family, combine: Combine, seed: int) -> dict[str, list[float]]:
    """Test accuracy at each budget of the learned selector, by default and on the plain loss, and of rules.

    One half of the held-out images fits temperatures and selector, the other finds thresholds for all.
    """
    fitted_on, found_on, judge = family.logits.split(seed)
    rows = {}
    ways = {"learned": {}, "learned, plain cross-entropy, T = 1": PLAIN}
    for name, settings in list(ways.items())[: 2 if combine == "last" else 1]:
        cascade = family.cascade(fc.MLPSelector(), combine)
        fit_selector(cascade, *fitted_on, alpha=ALPHA, seed=seed, **settings)
        rules: tuple[Any, ...] = (None,) if settings else (None, "max_prob", "margin", "entropy")
        for rule in rules:
            calibration, test = (Trace.from_logits(cascade, *part, rule) for part in (found_on, judge))
            row = budget_accuracies(calibration, test, cascade.dense_macs, RULE_BUDGETS)
            rows[f"threshold: {rule}" if rule else name] = row
    return rows


def rules_table(families: Sequence[Family]) -> str:
    """The learned selector against threshold rules; last, its distance to the best of them."""
    lines = []
    for family in families:
        for name, combine in COMBINES.items():
            found = [against_rules(family, combine, seed) for seed in track(SEEDS, f"{family.name}, {name}")]
            means = {way: 100 * np.mean([rows[way] for rows in found], 0) for way in found[0]}
            lines += [
                [family.name, name, way, *mean_and_spread([rows[way] for rows in found])] for way in means
            ]
            best = np.max([row for way, row in means.items() if way.startswith("threshold")], 0)
            gaps = ["–" if math.isnan(g) else f"**{g:+.2f}**" for g in means["learned"] - best]
            lines.append([family.name, name, "**learned − best threshold**", *gaps])
            print(*lines[-1], file=sys.stderr)
    return table(["stages", "combine", "selector", *budget_heads(RULE_BUDGETS)], lines)


def family_table(families: Sequence[Family]) -> str:
    """How good and how sure the stages are, on test images."""
    lines = []
    for family in families:
        z, y = family.logits.test
        temperatures = fit_temperatures(*family.logits.held_out)
        for k in range(len(z)):
            sure = z[k].softmax(1).max(1).values.mean()
            right = (z[k].argmax(1) == y).double().mean()
            lines.append(
                [
                    family.name,
                    f"{k}",
                    f"{family.macs[k] / 1e6:.1f} M",
                    f"{right:.2%}",
                    f"{sure:.1%}",
                    f"{temperatures[k]:.2f}",
                ]
            )
    head = ["stages", "stage", "MACs", "accuracy", "mean top probability", "temperature"]
    return table(head, lines)


def gradient_spread(
    trained: fc.Cascade, method: Method, logits: Logits, batches: int = 300
) -> tuple[float, float]:
    """Norm of the mean and total standard deviation of the selector's gradient over batches of 64."""
    torch.manual_seed(0)
    cascade = with_selector(trained, fc.MLPSelector(), "mean")
    z, y = logits.held_out
    standardise_features(cascade, z)
    fit_selector(cascade, z, y, "exact", ALPHA, **{**PLAIN, "steps": 20})
    shares = cascade.exit_macs.double() / cascade.dense_macs
    parameters = list(cascade.selector.parameters())
    rng = np.random.default_rng(0)
    average = float(
        reward_of(cascade, z, y, shares).gather(0, greedy_exit(cascade.judge(z).scores)[None]).mean()
    )
    gradients = []
    for batch in range(batches):
        index = rng.integers(0, len(y), 64)
        rows = torch.from_numpy(index)
        scores = cascade.judge(z[:, rows]).scores
        reward = reward_of(cascade, z[:, rows], y[rows], shares)
        greedy = reward.gather(0, greedy_exit(scores.detach())[None]).squeeze(0)
        baseline = {"none": 0.0, "moving_average": average, "greedy": greedy}[method.baseline]
        draws = torch.from_numpy(uniforms(1, batch, index, 1)[:, 0])
        loss = objective_loss(method.objective, scores, reward, draws, baseline)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    stacked = torch.stack(gradients)
    return float(stacked.mean(0).norm()), float(stacked.var(0).sum().sqrt())


def reward_of(cascade: fc.Cascade, z: Tensor, y: Tensor, shares: Tensor) -> Tensor:
    return rewards(cascade.judge(z).log_probs, y, shares, ALPHA, math.inf).detach()


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(list(header)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_table(trained: fc.Cascade, methods: list[Method], logits: Logits) -> str:
    rows = []
    for name, combine in COMBINES.items():
        for method in track(methods, name):
            repeated = [accuracies(trained, method, combine, logits, seed) for seed in SEEDS]
            rows.append([method.name, name, *mean_and_spread(repeated)])
    return table(["selector", "combine", *budget_heads()], rows)


def price_table(trained: fc.Cascade, logits: Logits) -> str:
    rows = []
    for method in track([m for m in OBJECTIVES if m.objective], "prices"):
        for alpha in PRICES:
            repeated = [accuracies(trained, method, "last", logits, seed, alpha) for seed in SEEDS]
            rows.append([method.name, f"{alpha:g}", *mean_and_spread(repeated)])
    return table(["selector", "α", *budget_heads()], rows)


def gradient_table(trained: fc.Cascade, logits: Logits) -> str:
    rows = []
    for method in OBJECTIVES:
        if method.objective:
            mean, spread = gradient_spread(trained, method, logits)
            rows.append([method.name, f"{mean:.4f}", f"{spread:.4f}", f"{spread / mean:.1f}"])
    return table(["estimator", "norm of the mean", "standard deviation", "ratio"], rows)


def stage_table(trained: fc.Cascade, logits: Logits) -> str:
    z, y = logits.test
    rows = [
        [f"{k}", f"{trained.stage_macs[k] / 1e6:.1f} M", f"{(z[k].argmax(1) == y).double().mean():.2%}"]
        for k in range(len(z))
    ]
    for name, combine in COMBINES.items():
        together = with_selector(trained, fc.ThresholdSelector("margin"), combine)
        accuracy = Trace.from_logits(together, z, y).correct[-1].mean()
        rows.append([f"all, {name}", f"{sum(trained.stage_macs) / 1e6:.1f} M", f"{accuracy:.2%}"])
    return table(["stage", "MACs", "test accuracy"], rows)


def rewrite_document(blocks: dict[str, str]) -> None:
    """Put tables between their markers in docs/selection.md."""
    text = DOCUMENT.read_text()
    for name, content in blocks.items():
        text = replace_block(text, name, content)
    DOCUMENT.write_text(text)


def replace_block(text: str, name: str, content: str) -> str:
    """Put content between the markers <!-- name --> and <!-- /name -->."""
    pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
    text, count = re.subn(pattern, lambda m: m[1] + content + m[2], text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{DOCUMENT} has {count} blocks named {name}; expected one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE / "resnet9" / "model")
    parser.add_argument("--logits", type=Path, default=HERE / "resnet9" / "logits.safetensors")
    parser.add_argument(
        "--families",
        type=Path,
        nargs="*",
        default=sorted(HERE.glob("family-*.safetensors")),
        help="more stages",
    )
    parser.add_argument("--tables", nargs="*", help="of these names only; all if left out")
    arguments = parser.parse_args()
    trained, logits = load_cascade(arguments.model), Logits.load(arguments.logits)
    families = [
        Family("shipped", trained.stage_macs, logits),
        Family(
            "made overconfident",
            trained.stage_macs,
            Logits(overconfident(logits.held_out, 1), overconfident(logits.test, 2)),
        ),
    ]
    for path in arguments.families:
        macs = tuple(load_file(path)["macs"].tolist())
        families.append(Family(path.stem.removeprefix("family-"), macs, Logits.load(path)))
    tables: dict[str, Callable[[], str]] = {
        "families": lambda: family_table(families),
        "rules": lambda: rules_table(families),
        "stages": lambda: stage_table(trained, logits),
        "objectives": lambda: accuracy_table(trained, OBJECTIVES, logits),
        "features": lambda: accuracy_table(trained, FEATURES, logits),
        "prices": lambda: price_table(trained, logits),
        "gradients": lambda: gradient_table(trained, logits),
    }
    if unknown := set(arguments.tables or ()) - set(tables):
        raise SystemExit(f"unknown tables {sorted(unknown)}; expected some of {', '.join(tables)}")
    for name in arguments.tables or tables:
        rewrite_document({name: tables[name]()})


if __name__ == "__main__":
    main()
