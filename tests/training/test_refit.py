"""The learned selector is never worse than a threshold: on shipped logits and on overconfident ones."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_task import cascade, data

import fastcascade as fc
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.evaluation.calibration import find_thresholds
from fastcascade.evaluation.evaluation import Trace
from fastcascade.evaluation.logits import collect_logits
from fastcascade.evaluation.selector_comparison import rule_scores
from fastcascade.training.refit import fit_selector

LOGITS = Path(__file__).parents[2] / "examples" / "cifar10" / "resnet9" / "logits.safetensors"
MACS = (7_500_000, 24_000_000, 95_000_000)
BUDGETS = (0.3, 0.45, 0.6)

Labelled = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def shipped() -> tuple[Labelled, Labelled]:
    """Logits and labels of the shipped stages, on held-out images and on test images."""
    t = load_file(LOGITS)
    z = torch.cat([t["validation"], t["calibration"]], 1)
    return (z, torch.cat([t["y_validation"], t["y_calibration"]])), (t["test"], t["y_test"])


def overconfident(images: Labelled, seed: int) -> Labelled:
    """Logits three times too large, and one mistake in seven twelve times."""
    z, y = images
    generator = torch.Generator().manual_seed(seed)
    mistake = (z.argmax(2) != y) & (torch.rand(z.shape[:2], generator=generator) < 0.15)
    return z * torch.where(mistake, 12.0, 3.0)[:, :, None], y


def three_stages(selector: nn.Module | str = "mlp", combine: Any = "last") -> fc.Cascade:
    """Stages that lend their cost; logits are given."""
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(4, 10)) for _ in MACS]
    stages = [fc.Stage(net, macs=macs) for net, macs in zip(nets, MACS, strict=True)]
    return fc.Cascade(stages, fc.MLPSelector() if selector == "mlp" else selector, 10, (1, 2, 2), combine)


def shortfall(held_out: Labelled, test: Labelled, combine: Any, seeds: int, **settings: Any) -> float:
    """Points by which the best threshold rule beats the learned selector, at the worst of the budgets."""
    z, y = held_out
    half = len(y) // 2
    found: dict[str | None, list[list[float]]] = {}
    for seed in range(seeds):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
        c = three_stages(combine=combine)
        fit_selector(c, z[:, order[:half]], y[order[:half]], seed=seed, **settings)
        for rule in (None, "max_prob", "margin", "entropy"):
            seen = Trace.from_logits(c, z[:, order[half:]], y[order[half:]], rule)
            judge = Trace.from_logits(c, *test, rule)
            row = [judge.run(find_thresholds(seen, budget_macs=b * c.dense_macs)).accuracy for b in BUDGETS]
            found.setdefault(rule, []).append(row)
    learned, *rules = (100 * np.mean(rows, 0) for rows in found.values())
    return float((np.max(rules, 0) - learned).max())


@pytest.mark.parametrize(
    ("family", "combine"),
    [
        ("overconfident", "last"),
        ("overconfident", "mean"),
        ("overconfident", (0.1, 0.5, 1.0)),
        ("shipped", "last"),
    ],
    ids=str,
)
def test_no_threshold_rule_is_better_by_more_than_noise(
    shipped: tuple[Labelled, Labelled], family: str, combine: Any
) -> None:
    """One split; docs/selection.md has the means of five, which lie within a tenth of a point."""
    held_out, test = shipped
    if family == "overconfident":
        held_out, test = overconfident(held_out, 1), overconfident(test, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shortfall(held_out, test, combine, seeds=1) <= 0.25


FAULTS: dict[str, dict[str, Any]] = {
    "the plain cross-entropy, temperature 1": {"bound": math.inf, "temper": False},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fail_that(shipped: tuple[Labelled, Labelled], fault: str) -> None:
    """What fit did before: random start, all steps, no look at folds left out."""
    held_out, test = overconfident(shipped[0], 1), overconfident(shipped[1], 2)
    assert shortfall(held_out, test, "last", 1, start_at_rule=False, folds=0, **FAULTS[fault]) > 1


@pytest.mark.parametrize("rule", ["max_prob", "margin", "entropy"])
def test_without_a_step_the_selector_is_the_rule(shipped: tuple[Labelled, Labelled], rule: Any) -> None:
    c, z = three_stages(), shipped[0][0]
    selector = c.selector
    assert isinstance(selector, fc.MLPSelector)
    judged = c.judge(z)
    own = z.argmax(2)
    for k in range(2):
        previous = own[k - 1] if k else torch.full_like(own[0], -1)
        selector.standardise(k, selector.stage_features(k, judged.log_probs[k], previous, own[k]))
    selector.start_at(rule, seed=3)
    got, expected = c.judge(z).scores.detach().numpy(), rule_scores(rule, judged.log_probs)
    if rule == "margin":
        assert np.abs(got - expected).max() <= math.log(2) + 1e-4
    else:
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_a_selector_that_cannot_start_at_a_rule_says_so() -> None:
    selector = fc.MLPSelector("probs")
    selector.build(2, 10)
    with pytest.raises(InvalidArgument, match="cannot start at 'margin'"):
        selector.start_at("margin", 0)


def test_the_comparison_is_stored_saved_and_warned_about(
    shipped: tuple[Labelled, Labelled], tmp_path: Path
) -> None:
    z, y = overconfident(shipped[0], 1)
    c = three_stages(fc.MLPSelector("probs"))
    with pytest.warns(UserWarning, match="the threshold rule .* is .* more accurate than the selector"):
        fit_selector(c, z, y, steps=5)
    kept = c.comparison
    assert kept is not None
    assert set(kept.accuracy) == {"learned", "max_prob", "margin", "entropy"}
    assert (kept.n, kept.steps) == (5000, 5)
    assert kept.gain < -2.24 * kept.standard_error
    own = registry(c)
    own.save(tmp_path)
    assert fc.load(tmp_path).comparison == kept
    assert torch.equal(fc.load(tmp_path).temperatures, c.temperatures)


def registry(fitted: fc.Cascade) -> fc.Cascade:
    """A cascade that can be saved without its code, with another's comparison and temperatures."""
    from fastcascade.model.resnet import resnet9

    c = fc.Cascade([resnet9(4), resnet9(4), resnet9(4)], fc.MLPSelector(), 10, (3, 32, 32))
    c.comparison = fitted.comparison
    c.temperatures.copy_(fitted.temperatures)
    return c


def test_auto_takes_the_rule_unless_the_learned_selector_gains(shipped: tuple[Labelled, Labelled]) -> None:
    z, y = shipped[0]
    c = three_stages("auto", "mean")
    assert isinstance(c.selector, fc.MLPSelector)
    fit_selector(c, z[:, :1000], y[:1000])
    kept = c.comparison
    assert kept is not None
    assert isinstance(c.selector, fc.ThresholdSelector if kept.gain <= 0 else fc.MLPSelector)
    if isinstance(c.selector, fc.ThresholdSelector):
        assert c.selector.score == kept.best_rule
        assert c.selector_macs == (0, 0)
    fit_selector(c, z[:, :1000], y[:1000])  # and again, from the start
    assert c.comparison == kept
    with pytest.raises(InvalidArgument, match="expected None, 'auto'"):
        three_stages("best")


def test_operating_points_of_the_old_selector_go() -> None:
    c, val = cascade(), data(128, 2)
    fc.calibrate(c, data(64, 3), budget_macs=1e9)
    fc.fit(c, None, val, freeze_stages=True, progress=False)
    assert not c.operating_points


def test_bad_input_is_named(shipped: tuple[Labelled, Labelled]) -> None:
    z, y = (t[..., :60, :] if t.ndim == 3 else t[:60] for t in shipped[0])
    c = three_stages()
    with pytest.raises(DataError, match="from 0 to 10; expected 0 … 9"):
        fit_selector(c, z, torch.cat([y[:-1].clamp(min=0) * 0, torch.tensor([10])]))
    with pytest.raises(DataError, match="none of the 60 images"):
        fit_selector(c, torch.full_like(z, math.nan), y)
    with pytest.raises(InvalidArgument, match=r"expected \(K, N, C\)"):
        fit_selector(c, z[:2], y)
    some = z.clone()
    some[1, :5] = math.inf
    with pytest.warns(UserWarning, match="5 of 60 images have logits that are not finite"):
        fit_selector(c, some, y, steps=2)
    with pytest.warns(UserWarning, match="got 30 images; .* takes at least 40"):
        fit_selector(c, z[:, :30], y[:30], steps=2)
    assert c.comparison is None


def test_compiled_logits_are_the_eager_ones_up_to_a_constant() -> None:
    c = cascade()
    c.temperatures.copy_(torch.tensor([2.0, 0.5]))
    x, _ = data(70, 1)
    slow, fast = collect_logits(c, x), collect_logits(c, x, batch_size=32, compiled=True)
    torch.testing.assert_close(fast.log_softmax(2), slow.log_softmax(2), atol=1e-4, rtol=1e-4)


def test_compiled_logits_of_segments() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    stages = [
        fc.Stage(body, nn.Sequential(nn.Flatten(), nn.Linear(144, 3))),
        fc.Stage(nn.Conv2d(4, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), input="previous"),
        fc.Stage(nn.Sequential(nn.Flatten(), nn.Linear(64, 3))),
    ]
    c = fc.Cascade(stages, fc.MLPSelector(), 3, (1, 8, 8), "mean")
    x, _ = data(20, 1)
    slow, fast = collect_logits(c, x), collect_logits(c, x, compiled=True)
    torch.testing.assert_close(fast.log_softmax(2), slow.log_softmax(2), atol=1e-4, rtol=1e-4)
