"""Tests of an exit head against its twin, for every kernel that has one.

A test file imports all of it and has a fixture ``kernel`` of type :class:`ExitHead`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytest
import torch
from exit_rows import (
    CLASS_COUNTS,
    INVALID,
    first_exit_score,
    outliers,
    places,
    rotations,
    summing_weights,
)
from torch import Tensor

from fastcascade.kernels import reference
from fastcascade.kernels.argument_checks import Keep
from fastcascade.kernels.reference import ExitTables, MLPWeights

SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 130)
SELECTORS = ("stats", "topk", "probs", "max_prob", "margin", "entropy")
TOLERANCE = 3e-5  # float32 through two implementations of exp and log
GAP = 1e-3  # between a threshold and the nearest score, so that rounding flips no decision


class ExitHead(NamedTuple):
    """A kernel's launcher, without the argument that says where it launches."""

    device: torch.device
    exit_head: Callable[..., None]
    new_keep: Callable[[int, int, torch.device], Keep]


def int32(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def weights_for(selector: str | None, num_classes: int, hidden: int = 16) -> MLPWeights | None:
    if selector not in ("stats", "topk", "probs"):
        return None
    f = num_classes if selector == "probs" else 4
    return MLPWeights(
        mean=torch.randn(f) * 0.1,
        std=torch.rand(f) + 0.5,
        w1=torch.randn(hidden, f) * (1 if selector == "probs" else 0.5),
        b1=torch.randn(hidden) * 0.1,
        w2=torch.randn(hidden) * hidden**-0.5,
        b2=torch.randn(()) * 0.1,
    )


def visited_tables(n: int, num_classes: int) -> ExitTables:
    """Tables after one stage at which no row stopped and one row was invalid."""
    tables = reference.exit_tables(n, num_classes)
    logits = torch.randn(n, num_classes) * 2
    logits[n // 2, 0] = math.nan
    go_on = {"stage_weight": 1.0, "selector": "margin", "threshold": math.inf}
    reference.exit_head(tables, logits, torch.arange(n), 0, **go_on)
    return tables


def stop_scores(
    tables: ExitTables,
    logits: Tensor,
    index: Tensor,
    stage_weight: float | None,
    selector: str,
    weights: MLPWeights | None,
) -> Tensor:
    """The twin's stop scores of the valid rows, ascending."""
    seen = []

    def score(log_probs: Tensor, previous: Tensor, own: Tensor) -> Tensor:
        agreement = (own == previous).float()
        if weights is None:
            seen.append(reference.threshold_score(selector, log_probs))
        else:
            seen.append(reference.mlp_score(reference.features(selector, log_probs, agreement), weights))
        return seen[0]

    copies = ExitTables(*(table.clone() for table in tables))
    reference.exit_step(copies, logits, index, 3, stage_weight=stage_weight, score=score, threshold=math.inf)
    return seen[0][logits.isfinite().all(1)].sort().values


def middle_of_widest_gap(scores: Tensor) -> float:
    """A threshold in the middle half of the scores, with none near it."""
    quarter = len(scores) // 4
    middle = scores[quarter : len(scores) - quarter]
    if len(middle) < 2:
        return 0.5 + float(scores[0]) if len(scores) else 0.0
    at = int(middle.diff().argmax())
    assert float(middle[at + 1] - middle[at]) > GAP
    return float(middle[at] + middle[at + 1]) / 2


def check_exit_head(
    kernel: ExitHead,
    n: int,
    *,
    num_classes: int = 10,
    selector: str | None = "stats",
    stage_weight: float | None = None,
    dtype: torch.dtype = torch.float32,
    threshold: float | None = None,
    invalid: int = 0,
    scale: float = 3.0,
    hidden: int = 16,
) -> tuple[ExitTables, Keep]:
    """Run the kernel and its twin on n active rows of a larger batch, and compare everything they write.

    The threshold lies between two of the twin's own scores unless it is given.
    """
    torch.manual_seed(n * 31 + num_classes)
    capacity, batch = n + 5, n + 9
    logits = (torch.randn(capacity, num_classes) * scale).to(dtype)
    logits[n:] = math.nan  # must not be read
    rows = torch.randperm(n)[:invalid]
    logits[rows[::2], 0] = math.inf
    logits[rows[1::2], num_classes - 1] = math.nan
    index = torch.randperm(batch)[:capacity].int()
    before = visited_tables(batch, num_classes)
    weights = weights_for(selector, num_classes, hidden)
    if selector is not None and threshold is None:
        scores = stop_scores(before, logits[:n], index[:n], stage_weight, selector, weights)
        threshold = middle_of_widest_gap(scores)

    want = ExitTables(*(table.clone() for table in before))
    arguments = {"stage_weight": stage_weight, "selector": selector}
    limit = {"threshold": threshold} if threshold is not None else {}
    want_keep = reference.exit_head(want, logits[:n], index[:n], 3, weights=weights, **limit, **arguments)

    device = kernel.device
    got = ExitTables(*(table.clone().to(device) for table in before))
    keep = kernel.new_keep(capacity, num_classes, device)
    keep.flags.fill_(77)
    keep.counts.fill_(-77)
    kernel.exit_head(
        got,
        logits.to(device),
        index.to(device),
        int32(device, n),
        3,
        keep,
        weights=None if weights is None else MLPWeights(*(w.to(device) for w in weights)),
        threshold=None if threshold is None else torch.tensor([threshold], device=device),
        **arguments,
    )

    assert torch.equal(keep.flags[:n].cpu(), want_keep.to(torch.int8))
    assert (keep.flags[n:] == 77).all(), "flags beyond the active rows are not written"
    padded = torch.nn.functional.pad(want_keep.int(), (0, len(keep.counts) * keep.rows - n))
    assert keep.counts.tolist() == padded.view(-1, keep.rows).sum(1).tolist()
    for name in ("label", "exit_stage", "log_probs", "previous_label"):
        close(getattr(got, name), getattr(want, name), name)
    if stage_weight is not None:
        close(got.weight_sum, want.weight_sum, "weight_sum")
        close(got.log_sum, want.log_sum, "log_sum")
    return got, keep


def close(got: Tensor, want: Tensor, name: str) -> None:
    torch.testing.assert_close(
        got.cpu(),
        want,
        atol=TOLERANCE,
        rtol=TOLERANCE,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("stage_weight", [None, 0.7])
def test_every_size(kernel: ExitHead, n: int, stage_weight: float | None) -> None:
    check_exit_head(kernel, n, stage_weight=stage_weight, invalid=n // 6)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("stage_weight", [None, 0.7])
def test_every_selector(kernel: ExitHead, selector: str, stage_weight: float | None) -> None:
    _, keep = check_exit_head(kernel, 40, selector=selector, stage_weight=stage_weight, invalid=6)
    assert 5 < int(keep.counts.sum()) < 35, "both decisions are really taken"


@pytest.mark.parametrize(("threshold", "stay"), [(math.inf, 33), (-math.inf, 0)])
@pytest.mark.parametrize("selector", ["stats", "entropy"])
def test_none_stop_and_all_stop(kernel: ExitHead, selector: str, threshold: float, stay: int) -> None:
    _, keep = check_exit_head(kernel, 33, selector=selector, threshold=threshold)
    assert int(keep.counts.sum()) == stay


@pytest.mark.parametrize("stage_weight", [None, 0.7])
def test_last_exit_retires_everything_and_marks_invalid_rows(
    kernel: ExitHead, stage_weight: float | None
) -> None:
    got, keep = check_exit_head(kernel, 33, selector=None, stage_weight=stage_weight, invalid=5)
    assert int(keep.counts.sum()) == 0
    assert int(((got.exit_stage == 3) & (got.label == -1)).sum()) == 5


def run_rows(
    kernel: ExitHead,
    logits: Tensor,
    selector: str | None,
    threshold: float = 0.0,
    weights: MLPWeights | None = None,
) -> tuple[ExitTables, Tensor]:
    """The kernel's tables and keep flags after one exit over these rows."""
    n, num_classes = logits.shape
    device = kernel.device
    tables = ExitTables(*(t.to(device) for t in reference.exit_tables(n, num_classes)))
    keep = kernel.new_keep(n, num_classes, device)
    kernel.exit_head(
        tables,
        logits.to(device),
        int32(device, *range(n)),
        int32(device, n),
        0,
        keep,
        stage_weight=0.7,
        selector=selector,
        weights=None if weights is None else MLPWeights(*(w.to(device) for w in weights)),
        threshold=None if selector is None else torch.tensor([threshold], device=device),
    )
    return tables, keep.flags.cpu()


@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_maximum_and_mass_in_every_place(kernel: ExitHead, num_classes: int) -> None:
    logits = torch.cat([outliers(num_classes, value) for value in (1.0, 4.0, 12.0)])
    tables, _ = run_rows(kernel, logits, None)
    assert tables.label.tolist() == places(num_classes) * 3
    torch.testing.assert_close(tables.log_probs.cpu(), logits.log_softmax(1), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_invalid_logits_in_every_place(kernel: ExitHead, num_classes: int) -> None:
    tables, _ = run_rows(kernel, torch.cat([outliers(num_classes, value) for value in INVALID]), None)
    assert (tables.label == -1).all()
    assert tables.log_probs.isnan().all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("num_classes", [3, 9, 17, 100])
def test_scores_read_every_class(kernel: ExitHead, num_classes: int, selector: str) -> None:
    logits, weights = rotations(num_classes), summing_weights(selector, num_classes)
    score = first_exit_score(logits, selector)
    for step, stays in ((-3e-5, 0), (3e-5, 1)):
        threshold = score + step * max(abs(score), 1)
        assert (run_rows(kernel, logits, selector, threshold, weights)[1] == stays).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_logit_types(kernel: ExitHead, dtype: torch.dtype, num_classes: int) -> None:
    check_exit_head(kernel, 17, dtype=dtype, num_classes=num_classes, invalid=3)


@pytest.mark.parametrize("num_classes", [2, 3, 16, 17, 31, 33, 256, 257, 1000])
@pytest.mark.parametrize("selector", ["stats", "probs"])
def test_class_counts_around_warps_and_tiles(kernel: ExitHead, num_classes: int, selector: str) -> None:
    check_exit_head(kernel, 9, num_classes=num_classes, selector=selector, stage_weight=0.7, invalid=2)


@pytest.mark.parametrize("hidden", [1, 31, 33, 70])
def test_hidden_layers_of_any_width(kernel: ExitHead, hidden: int) -> None:
    for selector in ("stats", "probs"):
        check_exit_head(kernel, 9, selector=selector, hidden=hidden)


@pytest.mark.slow
@pytest.mark.parametrize("selector", SELECTORS)
def test_21k_classes(kernel: ExitHead, selector: str) -> None:
    check_exit_head(kernel, 9, num_classes=21_841, selector=selector, stage_weight=0.7, invalid=1)


@pytest.mark.parametrize("selector", ["stats", "topk", "max_prob"])
def test_confident_rows_keep_exact_log_odds(kernel: ExitHead, selector: str) -> None:
    """Logits so far apart that the top probability rounds to 1 and others underflow to 0."""
    check_exit_head(kernel, 17, num_classes=300, selector=selector, scale=40.0, threshold=7.5)


def test_ties_go_to_the_lowest_class(kernel: ExitHead) -> None:
    """Equal logits within a lane's or a tile's classes, and across them."""
    device = kernel.device
    logits = torch.zeros(4, 600, device=device)
    logits[1, [5, 4, 590]] = 2.0
    logits[2, [300, 332, 599]] = 2.0
    logits[3, 599] = 2.0
    tables = reference.exit_tables(4, 600, device)
    keep = kernel.new_keep(4, 600, device)
    index = int32(device, *range(4))
    kernel.exit_head(tables, logits, index, int32(device, 4), 0, keep, stage_weight=0.7, selector=None)
    assert tables.label.tolist() == [0, 4, 300, 599]


def test_arguments_that_would_be_misread_are_refused(kernel: ExitHead) -> None:
    device, n = kernel.device, 17
    weights = MLPWeights(*(w.to(device) for w in cast(MLPWeights, weights_for("stats", 10))))
    good: dict[str, Any] = {
        "tables": reference.exit_tables(n, 10, device),
        "logits": torch.zeros(n, 10, device=device),
        "index": int32(device, *range(n)),
        "count": int32(device, n),
        "stage": 0,
        "keep": kernel.new_keep(n, 10, device),
        "stage_weight": None,
        "selector": "margin",
        "threshold": torch.zeros(1, device=device),
    }
    run = kernel.exit_head
    run(**good)
    bad = {
        "logits": good["logits"].double(),
        "index": good["index"].long(),
        "selector": "confidence",
        "threshold": None,
        "weights": weights,
        "keep": good["keep"]._replace(rows=good["keep"].rows + 1),
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name.removesuffix("s")):
            run(**{**good, name: value})
    with pytest.raises(ValueError, match="contiguous"):
        run(**{**good, "logits": torch.zeros(10, n, device=device).T})
    run(**{**good, "selector": "stats", "weights": weights})
    for bad_tensor, said in ((lambda t: t.to("meta"), "on meta"), (lambda t: t.to(torch.int16), "int16")):
        for name in ("index", "count", "threshold"):
            with pytest.raises(ValueError, match=f"{name} is .*{said}"):
                run(**{**good, name: bad_tensor(good[name])})
        with_weights = {**good, "selector": "stats", "weights": weights}
        for group, names in (
            ("tables", ExitTables._fields),
            ("weights", weights._fields),
            ("keep", ("flags", "counts")),
        ):
            for name in names:
                tensors = with_weights[group]
                changed = tensors._replace(**{name: bad_tensor(getattr(tensors, name))})
                with pytest.raises(ValueError, match=rf"{group}\.{name} is .*{said}"):
                    run(**{**with_weights, group: changed})
