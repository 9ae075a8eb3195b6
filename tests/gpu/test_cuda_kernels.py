"""The CUDA C++ kernels agree with their twins, on CPU threads and on a GPU if there is one."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from exit_rows import CLASS_COUNTS, INVALID, outliers, places, rotations
from host_threads import HostLaunch
from torch import Tensor

from fastcascade.kernels import reference
from fastcascade.kernels.argument_checks import Keep
from fastcascade.kernels.cuda import compact, exit_head
from fastcascade.kernels.cuda.launch import Launch
from fastcascade.kernels.reference import ExitTables, MLPWeights

SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 300)
SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
SELECTORS = ("stats", "topk", "probs", "max_prob", "margin", "entropy")
TOLERANCE = 3e-5  # float32 through two implementations of exp and log
GAP = 1e-3  # between a threshold and the nearest score, so that rounding flips no decision


def int32(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# ---- the exit head ----


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
    launch: Launch,
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

    device = launch.device
    got = ExitTables(*(table.clone().to(device) for table in before))
    keep = exit_head.new_keep(capacity, num_classes, device)
    keep.flags.fill_(77)
    keep.counts.fill_(-77)
    exit_head.exit_head(
        launch,
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
def test_every_size(launch: Launch, n: int, stage_weight: float | None) -> None:
    check_exit_head(launch, n, stage_weight=stage_weight, invalid=n // 6)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("stage_weight", [None, 0.7])
def test_every_selector(launch: Launch, selector: str, stage_weight: float | None) -> None:
    _, keep = check_exit_head(launch, 40, selector=selector, stage_weight=stage_weight, invalid=6)
    assert 5 < int(keep.counts.sum()) < 35, "both decisions are really taken"


@pytest.mark.parametrize(("threshold", "stay"), [(math.inf, 33), (-math.inf, 0)])
@pytest.mark.parametrize("selector", ["stats", "entropy"])
def test_none_stop_and_all_stop(launch: Launch, selector: str, threshold: float, stay: int) -> None:
    _, keep = check_exit_head(launch, 33, selector=selector, threshold=threshold)
    assert int(keep.counts.sum()) == stay


@pytest.mark.parametrize("stage_weight", [None, 0.7])
def test_last_exit_retires_everything_and_marks_invalid_rows(
    launch: Launch, stage_weight: float | None
) -> None:
    got, keep = check_exit_head(launch, 33, selector=None, stage_weight=stage_weight, invalid=5)
    assert int(keep.counts.sum()) == 0
    assert int(((got.exit_stage == 3) & (got.label == -1)).sum()) == 5


def run_rows(
    launch: Launch,
    logits: Tensor,
    selector: str | None,
    threshold: float = 0.0,
    weights: MLPWeights | None = None,
) -> tuple[ExitTables, Tensor]:
    """The kernel's tables and keep flags after one exit over these rows."""
    n, num_classes = logits.shape
    device = launch.device
    tables = ExitTables(*(t.to(device) for t in reference.exit_tables(n, num_classes)))
    keep = exit_head.new_keep(n, num_classes, device)
    exit_head.exit_head(
        launch,
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
def test_maximum_and_mass_in_every_place(launch: Launch, num_classes: int) -> None:
    logits = torch.cat([outliers(num_classes, value) for value in (1.0, 4.0, 12.0)])
    tables, _ = run_rows(launch, logits, None)
    assert tables.label.tolist() == places(num_classes) * 3
    torch.testing.assert_close(tables.log_probs.cpu(), logits.log_softmax(1), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_invalid_logits_in_every_place(launch: Launch, num_classes: int) -> None:
    tables, _ = run_rows(launch, torch.cat([outliers(num_classes, value) for value in INVALID]), None)
    assert (tables.label == -1).all()
    assert tables.log_probs.isnan().all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("num_classes", [3, 9, 17, 100])
def test_scores_read_every_class(launch: Launch, num_classes: int, selector: str) -> None:
    logits = rotations(num_classes)
    log_probs, weights = logits.double().log_softmax(1), None
    if selector in ("stats", "topk", "probs"):  # the score is the sum of the features
        ones, one = torch.ones(num_classes if selector == "probs" else 4), torch.ones(1)
        weights = MLPWeights(0 * ones, ones, ones[None], 10 * one, one, 0 * one[0])
        seen = reference.features(selector, log_probs, torch.zeros(len(logits), dtype=torch.float64))
        score = float(reference.mlp_score(seen, weights)[0])
    else:
        score = float(reference.threshold_score(selector, log_probs)[0])
    for step, stays in ((-3e-5, 0), (3e-5, 1)):
        threshold = score + step * max(abs(score), 1)
        assert (run_rows(launch, logits, selector, threshold, weights)[1] == stays).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_logit_types(launch: Launch, dtype: torch.dtype, num_classes: int) -> None:
    check_exit_head(launch, 17, dtype=dtype, num_classes=num_classes, invalid=3)


def test_subnormal_and_extreme_half_logits(launch: Launch) -> None:
    """The CPU decodes half precision in C++, the device with an instruction."""
    check_exit_head(launch, 17, dtype=torch.float16, scale=1e-6, selector="max_prob", threshold=-2.19)
    check_exit_head(launch, 17, dtype=torch.float16, scale=2e4, selector=None, invalid=4)


@pytest.mark.parametrize("num_classes", [2, 3, 31, 32, 33, 257, 1000])
@pytest.mark.parametrize("selector", ["stats", "probs"])
def test_class_counts_below_and_beyond_a_warp(launch: Launch, num_classes: int, selector: str) -> None:
    check_exit_head(launch, 9, num_classes=num_classes, selector=selector, stage_weight=0.7, invalid=2)


@pytest.mark.parametrize("hidden", [1, 31, 33, 70])
def test_hidden_layers_below_and_beyond_a_warp(launch: Launch, hidden: int) -> None:
    for selector in ("stats", "probs"):
        check_exit_head(launch, 9, selector=selector, hidden=hidden)


@pytest.mark.slow
@pytest.mark.parametrize("selector", SELECTORS)
def test_21k_classes(launch: Launch, selector: str) -> None:
    check_exit_head(launch, 9, num_classes=21_841, selector=selector, stage_weight=0.7, invalid=1)


@pytest.mark.parametrize("selector", ["stats", "topk", "max_prob"])
def test_confident_rows_keep_exact_log_odds(launch: Launch, selector: str) -> None:
    """Logits so far apart that the top probability rounds to 1 and others underflow to 0."""
    check_exit_head(launch, 17, num_classes=300, selector=selector, scale=40.0, threshold=7.5)


def test_ties_go_to_the_lowest_class(launch: Launch) -> None:
    """Equal logits within a lane's classes and across lanes."""
    device = launch.device
    logits = torch.zeros(4, 600, device=device)
    logits[1, [5, 4, 590]] = 2.0
    logits[2, [300, 332, 599]] = 2.0
    logits[3, 599] = 2.0
    tables = reference.exit_tables(4, 600, device)
    keep = exit_head.new_keep(4, 600, device)
    index = int32(device, *range(4))
    exit_head.exit_head(
        launch, tables, logits, index, int32(device, 4), 0, keep, stage_weight=0.7, selector=None
    )
    assert tables.label.tolist() == [0, 4, 300, 599]


def test_exit_arguments_that_would_be_misread_are_refused(launch: Launch) -> None:
    device = launch.device
    n = 17
    good = {
        "tables": reference.exit_tables(n, 10, device),
        "logits": torch.zeros(n, 10, device=device),
        "index": int32(device, *range(n)),
        "count": int32(device, n),
        "stage": 0,
        "keep": exit_head.new_keep(n, 10, device),
        "stage_weight": None,
        "selector": "margin",
        "threshold": torch.zeros(1, device=device),
    }
    run = partial(exit_head.exit_head, launch)
    run(**good)
    bad = {
        "logits": good["logits"].double(),
        "index": good["index"].long(),
        "selector": "confidence",
        "threshold": None,
        "weights": weights_for("stats", 10),
        "keep": good["keep"]._replace(rows=16),
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name.removesuffix("s")):
            run(**{**good, name: value})
    with pytest.raises(ValueError, match="contiguous"):
        run(**{**good, "logits": torch.zeros(10, n, device=device).T})
    for name in ("index", "count", "threshold"):
        with pytest.raises(ValueError, match=f"{name} is on meta, logits on {device}; expected one device"):
            run(**{**good, name: good[name].to("meta")})
        with pytest.raises(ValueError, match=f"{name} is torch.int16; expected"):
            run(**{**good, name: good[name].to(torch.int16)})
    for name, table in good["tables"]._asdict().items():
        with pytest.raises(ValueError, match=rf"tables\.{name} is on meta"):
            run(**{**good, "tables": good["tables"]._replace(**{name: table.to("meta")})})
        with pytest.raises(ValueError, match=rf"tables\.{name} is torch.int16"):
            run(**{**good, "tables": good["tables"]._replace(**{name: table.to(torch.int16)})})


# ---- compaction ----


def keep_of(flags: Tensor, capacity: int, device: torch.device) -> Keep:
    """The exit head's output for these flags, with garbage beyond them."""
    keep = exit_head.new_keep(capacity, 10, device)
    keep.flags.fill_(77)
    keep.flags[: len(flags)] = flags.to(torch.int8)
    keep.counts.zero_()
    for block, part in enumerate(flags.split(keep.rows)):
        keep.counts[block] = part.sum()
    return keep


@pytest.mark.parametrize("share", SHARES)
def test_index_compaction_keeps_the_order(launch: Launch, share: float) -> None:
    device = launch.device
    for n in SIZES:
        torch.manual_seed(n)
        index, flags = torch.randperm(n + 7).int(), torch.rand(n) < share
        out, count = torch.full_like(index, -5).to(device), int32(device, -1)
        keep = keep_of(flags, n + 7, device)
        compact.compact_index(launch, index.to(device), int32(device, n), keep, out, count)
        want = reference.compact_index(index[:n], flags)
        m = int(count)
        assert m == len(want)
        assert torch.equal(out[:m].cpu(), want)
        assert (out[m:] == -5).all(), "nothing is written beyond the survivors"


@pytest.mark.parametrize("shape", [(4, 8), (3, 7)], ids=["16-byte rows", "odd rows"])
@pytest.mark.parametrize("share", SHARES)
def test_hole_filling_matches_the_twin(launch: Launch, share: float, shape: tuple[int, ...]) -> None:
    device = launch.device
    for n, dtype in zip(SIZES, itertools.cycle([torch.float16, torch.float32, torch.uint8])):
        torch.manual_seed(n)
        rows = torch.randint(0, 200, (n + 7, *shape)).to(dtype)
        index, flags = torch.randperm(n + 7).int(), torch.rand(n) < share
        got_rows, got_index, count = (
            rows.to(device, copy=True),
            index.to(device, copy=True),
            int32(device, -1),
        )
        keep = keep_of(flags, n + 7, device)
        compact.fill_holes(launch, got_rows, got_index, int32(device, n), keep, count)
        m = reference.fill_holes(rows[:n], index[:n], flags)
        assert int(count) == m
        assert torch.equal(got_rows.cpu(), rows)
        assert torch.equal(got_index.cpu(), index)


@pytest.mark.slow
def test_more_counts_than_threads(launch: Launch) -> None:
    """A block sums more counts than it has threads."""
    n, device = 64 * 64 + 33, launch.device
    index, flags = torch.arange(n, dtype=torch.int32), torch.rand(n) < 0.4
    out, count = torch.full_like(index, -5).to(device), int32(device, -1)
    keep = keep_of(flags, n, device)
    compact.compact_index(launch, index.to(device), int32(device, n), keep, out, count)
    assert int(count) == int(flags.sum())
    assert torch.equal(out[: int(count)].cpu(), index[flags])


@pytest.mark.parametrize(("shape", "offset"), [((3, 4, 4), 0), ((5,), 0), ((2, 20, 20), 1)])
def test_gather_fills_chunks_and_zeros_the_rest(launch: Launch, shape: tuple[int, ...], offset: int) -> None:
    """Rows of 16-byte words, rows of odd size, and rows at an offset that is not 16-byte aligned."""
    device = launch.device
    source = torch.randn(30 * math.prod(shape) + offset)[offset:].view(30, *shape)
    index, n, size = torch.randperm(30).int(), 21, 8
    moved = torch.empty(source.numel() + offset, device=device)[offset:].view(source.shape).copy_(source)
    for chunk in range(4):
        bucket = torch.full((size, *shape), torch.nan, device=device)
        bucket_index = torch.full((size,), -3, dtype=torch.int32, device=device)
        count = int32(device, -1)
        arguments = (index.to(device), int32(device, n), int32(device, chunk))
        compact.gather_rows(launch, moved, *arguments, bucket, bucket_index, count)
        rows = index[:n][chunk * size : (chunk + 1) * size]
        assert int(count) == len(rows)
        assert torch.equal(bucket[: len(rows)].cpu(), source[rows.long()])
        assert torch.equal(bucket_index[: len(rows)].cpu(), rows)
        assert not bucket[len(rows) :].any()
        assert not bucket_index[len(rows) :].any()


def test_compaction_arguments_that_would_be_misread_are_refused(launch: Launch) -> None:
    device = launch.device
    n = 16
    index, count = int32(device, *range(n)), int32(device, n)
    keep = keep_of(torch.ones(n, dtype=torch.bool), n, device)
    features = torch.zeros(n, 4, device=device)
    with pytest.raises(ValueError, match="in place"):
        compact.compact_index(launch, index, count, keep, index, int32(device, 0))
    with pytest.raises(ValueError, match="int32"):
        compact.compact_index(launch, index.long(), count, keep, index.clone(), int32(device, 0))
    with pytest.raises(ValueError, match="contiguous"):
        compact.fill_holes(launch, features.T, index, count, keep, int32(device, 0))
    with pytest.raises(ValueError, match="out_count"):
        compact.fill_holes(launch, features, index, count, keep, count)
    bucket = torch.zeros(2, 5, device=device)
    with pytest.raises(ValueError, match="bucket"):
        compact.gather_rows(launch, features, index, count, count, bucket, index, count)
    with pytest.raises(ValueError, match=f"index is on {device}, rows on meta"):
        compact.fill_holes(launch, features.to("meta"), index, count, keep, int32(device, 0))
    elsewhere, wide = keep._replace(flags=keep.flags.to("meta")), keep._replace(counts=keep.counts.long())
    for strange, said in ((elsewhere, r"keep\.flags is on meta"), (wide, r"keep\.counts is torch.int64")):
        with pytest.raises(ValueError, match=said):
            compact.compact_index(launch, index, count, strange, index.clone(), int32(device, 0))
    with pytest.raises(ValueError, match=f"chunk is on meta, source on {device}"):
        compact.gather_rows(launch, features, index, count, count.to("meta"), features.clone(), index, count)


@pytest.mark.usefixtures("few_threads")
def test_blocks_may_run_in_any_order(library: Path) -> None:
    """Blocks in descending order give the same bits as in ascending order."""
    n, device = 150, torch.device("cpu")
    flags = torch.rand(n) < 0.5
    answers = []
    for descending in (False, True):
        launch = HostLaunch(library, descending=descending)
        tables, _ = check_exit_head(launch, 65, stage_weight=0.7, invalid=9)
        index, rows = torch.arange(n, dtype=torch.int32), torch.arange(n * 4.0).view(n, 4)
        out, counts, keep = torch.zeros_like(index), int32(device, 0, 0), keep_of(flags, n, device)
        compact.compact_index(launch, index, int32(device, n), keep, out, counts[:1])
        compact.fill_holes(launch, rows, index, int32(device, n), keep, counts[1:])
        answers.append((*tables, out, counts, rows, index))
    for first, second in zip(*answers, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
