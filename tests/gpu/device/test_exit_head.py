"""The Triton exit head agrees with its twin."""

import math

import pytest
import torch
from exit_rows import CLASS_COUNTS, INVALID, outliers, places, rotations
from torch import Tensor

from fastcascade.kernels import reference
from fastcascade.kernels.reference import ExitTables, MLPWeights

exit_head = pytest.importorskip("fastcascade.kernels.triton.exit_head", reason="triton is not installed")

SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 300)
SELECTORS = ("stats", "topk", "probs", "max_prob", "margin", "entropy")
# Log-probabilities and scores are float32 through two implementations of exp and log.
TOLERANCE = 3e-5
BAND = 1e-3


def weights_for(selector: str, num_classes: int, hidden: int = 16) -> MLPWeights | None:
    if selector not in ("stats", "topk", "probs"):
        return None
    f = num_classes if selector == "probs" else 4
    return MLPWeights(
        mean=torch.randn(f) * 0.1,
        std=torch.rand(f) + 0.5,
        w1=torch.randn(hidden, f) * f**-0.5,
        b1=torch.randn(hidden) * 0.1,
        w2=torch.randn(hidden) * hidden**-0.5,
        b2=torch.randn(()) * 0.1,
    )


def batch_tables(n: int, num_classes: int, visited: bool) -> ExitTables:
    """Tables before the first stage, or after one stage at which no row stopped."""
    tables = reference.exit_tables(n, num_classes)
    if visited and n:
        everyone = torch.arange(n)
        logits = torch.randn(n, num_classes) * 2
        logits[n // 2, 0] = math.nan
        reference.exit_head(
            tables, logits, everyone, 0, stage_weight=1.0, selector="margin", threshold=math.inf
        )
    return tables


class Case:
    """One call of the kernel on n active rows of a larger batch, and the twin's result."""

    def __init__(
        self,
        device: torch.device,
        n: int,
        num_classes: int = 10,
        selector: str | None = "stats",
        stage_weight: float | None = None,
        dtype: torch.dtype = torch.float32,
        quantile: float = 0.5,
        invalid: int = 0,
        scale: float = 3.0,
    ) -> None:
        torch.manual_seed(n * 31 + num_classes)
        self.n, self.selector = n, selector
        capacity, batch = n + 5, n + 9  # rows beyond n hold garbage that must not be read
        self.logits = (torch.randn(capacity, num_classes) * scale).to(dtype)
        self.logits[n:] = math.nan
        rows = torch.randperm(n)[:invalid]
        self.logits[rows[::2], 0] = math.inf
        self.logits[rows[1::2], num_classes - 1] = math.nan
        self.index = torch.randperm(batch)[:capacity].int()
        weights = weights_for(selector, num_classes) if selector else None
        before = batch_tables(
            batch, num_classes, visited=stage_weight is not None or selector in ("stats", "topk")
        )
        arguments = {"stage_weight": stage_weight, "selector": selector, "weights": weights}

        # A threshold between two of the twin's scores; ±inf at the ends.
        self.scores = self._scores(before, arguments)
        threshold = {0.0: math.inf, 1.0: -math.inf}.get(quantile)
        if threshold is None:
            finite = self.scores[self.scores.isfinite()].sort().values
            middle = max(int(len(finite) * (1 - quantile)), 1)
            threshold = finite[middle - 1 : middle + 1].mean().item() if len(finite) > 1 else 0.0
        self.threshold = threshold

        self.want = ExitTables(*(t.clone() for t in before))
        self.want_keep = reference.exit_head(
            self.want, self.logits[:n], self.index[:n], 3, threshold=threshold, **arguments
        )
        self.got = ExitTables(*(t.clone().to(device) for t in before))
        self.keep = exit_head.new_keep(capacity, num_classes, device)
        self.keep.flags.fill_(77)
        self.keep.counts.fill_(-77)
        exit_head.exit_head(
            self.got,
            self.logits.to(device),
            self.index.to(device),
            torch.tensor([n], dtype=torch.int32, device=device),
            3,
            self.keep,
            stage_weight=stage_weight,
            selector=selector,
            weights=None if weights is None else MLPWeights(*(w.to(device) for w in weights)),
            threshold=None if selector is None else torch.tensor([threshold], device=device),
        )
        self.stage_weight = stage_weight

    def _scores(self, before: ExitTables, arguments: dict[str, object]) -> Tensor:
        """The twin's stop scores, captured from its decision; NaN on invalid rows."""
        seen = {}
        if self.selector is None:
            return torch.empty(0)
        original = reference.exit_step

        def spy(*a, score, **k):
            def recording(*s):
                seen["scores"] = score(*s)
                return seen["scores"]

            return original(*a, score=recording, **k)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "exit_step", spy)
            reference.exit_head(
                ExitTables(*(t.clone() for t in before)),
                self.logits[: self.n],
                self.index[: self.n],
                3,
                threshold=math.inf,
                **arguments,
            )
        valid = self.logits[: self.n].isfinite().all(1)
        return seen["scores"].masked_fill(~valid, math.nan)

    def check(self) -> None:
        n = self.n
        got_keep = self.keep.flags[:n].cpu()
        assert set(got_keep.tolist()) <= {0, 1}
        assert (self.keep.flags[n:] == 77).all(), "flags beyond the active rows are not written"
        blocks = torch.nn.functional.pad(got_keep.long(), (0, -len(self.logits) % self.keep.rows + 5))
        sums = torch.stack([c.sum() for c in blocks.split(self.keep.rows)])[: len(self.keep.counts)]
        assert self.keep.counts.cpu().tolist() == sums.tolist()

        # Decisions agree outside a band around the threshold, and few rows are inside it.
        same = got_keep.bool() == self.want_keep
        if not same.all():
            assert ((self.scores - self.threshold).abs() < BAND)[~same].all()
            assert (~same).float().mean() <= 0.05
        rows = torch.ones(len(self.want.label), dtype=torch.bool)
        rows[self.index[:n][~same].long()] = False

        for name in ("label", "exit_stage", "log_probs", "previous_label"):
            got, want = getattr(self.got, name).cpu()[rows], getattr(self.want, name)[rows]
            torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True, msg=name)
        if self.stage_weight is not None:
            for name in ("weight_sum", "log_sum"):
                got, want = getattr(self.got, name).cpu(), getattr(self.want, name)
                torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE, msg=name)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("stage_weight", [None, 0.7])
def test_every_size(device: torch.device, n: int, stage_weight: float | None) -> None:
    Case(device, n, stage_weight=stage_weight, invalid=n // 6).check()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("stage_weight", [None, 0.7])
def test_every_selector(device: torch.device, selector: str, stage_weight: float | None) -> None:
    Case(device, 65, selector=selector, stage_weight=stage_weight, invalid=6).check()


@pytest.mark.parametrize("quantile", [0.0, 1.0])
@pytest.mark.parametrize("selector", ["stats", "entropy"])
def test_none_stop_and_all_stop(device: torch.device, selector: str, quantile: float) -> None:
    case = Case(device, 65, selector=selector, quantile=quantile)
    case.check()
    assert int(case.keep.counts.sum()) == (65 if quantile == 0.0 else 0)


@pytest.mark.parametrize("stage_weight", [None, 0.7])
def test_last_exit_retires_everything_and_marks_invalid_rows(
    device: torch.device, stage_weight: float | None
) -> None:
    case = Case(device, 65, selector=None, stage_weight=stage_weight, invalid=5)
    case.check()
    labels = case.got.label.cpu()[case.index[:65].long()]
    assert (labels == -1).sum() == 5
    assert int(case.keep.counts.sum()) == 0


@pytest.mark.parametrize("num_classes", [2, 3, 16, 17, 100, 256, 257, 1000])
@pytest.mark.parametrize("selector", ["stats", "probs"])
def test_class_counts_of_one_and_of_several_tiles(
    device: torch.device, num_classes: int, selector: str
) -> None:
    Case(device, 17, num_classes=num_classes, selector=selector, stage_weight=0.7, invalid=2).check()


@pytest.mark.slow
@pytest.mark.parametrize("selector", SELECTORS)
def test_21k_classes(device: torch.device, selector: str) -> None:
    Case(device, 17, num_classes=21_841, selector=selector, stage_weight=0.7, invalid=2).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logit_types(device: torch.device, dtype: torch.dtype) -> None:
    Case(device, 65, dtype=dtype).check()


@pytest.mark.parametrize("selector", ["stats", "topk", "max_prob"])
def test_confident_rows_keep_exact_log_odds(device: torch.device, selector: str) -> None:
    """Logits so far apart that the top probability rounds to 1 and others underflow to 0."""
    Case(device, 65, num_classes=300, selector=selector, scale=40.0).check()


def test_ties_go_to_the_lowest_class(device: torch.device) -> None:
    """Equal logits within a tile and across tiles."""
    logits = torch.zeros(4, 600)
    logits[1, [5, 4, 590]] = 2.0
    logits[2, [300, 599]] = 2.0
    logits[3, 599] = 2.0
    tables = ExitTables(*(t.to(device) for t in reference.exit_tables(4, 600)))
    keep = exit_head.new_keep(4, 600, device)
    exit_head.exit_head(
        tables,
        logits.to(device),
        torch.arange(4, dtype=torch.int32, device=device),
        torch.tensor([4], dtype=torch.int32, device=device),
        0,
        keep,
        stage_weight=0.7,
        selector=None,
    )
    assert tables.label.tolist() == [0, 4, 300, 599]


def run_rows(
    device: torch.device,
    logits: Tensor,
    selector: str | None,
    threshold: float = 0.0,
    weights: MLPWeights | None = None,
) -> tuple[ExitTables, Tensor]:
    """The kernel's tables and keep flags after one exit over these rows."""
    n, num_classes = logits.shape
    tables = ExitTables(*(t.to(device) for t in reference.exit_tables(n, num_classes)))
    keep = exit_head.new_keep(n, num_classes, device)
    exit_head.exit_head(
        tables,
        logits.to(device),
        torch.arange(n, dtype=torch.int32, device=device),
        torch.tensor([n], dtype=torch.int32, device=device),
        0,
        keep,
        stage_weight=0.7,
        selector=selector,
        weights=None if weights is None else MLPWeights(*(w.to(device) for w in weights)),
        threshold=None if selector is None else torch.tensor([threshold], device=device),
    )
    return tables, keep.flags.cpu()


@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_maximum_and_mass_in_every_place(device: torch.device, num_classes: int) -> None:
    logits = torch.cat([outliers(num_classes, value) for value in (1.0, 4.0, 12.0)])
    tables, _ = run_rows(device, logits, None)
    assert tables.label.tolist() == places(num_classes) * 3
    torch.testing.assert_close(tables.log_probs.cpu(), logits.log_softmax(1), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_invalid_logits_in_every_place(device: torch.device, num_classes: int) -> None:
    tables, _ = run_rows(device, torch.cat([outliers(num_classes, value) for value in INVALID]), None)
    assert (tables.label == -1).all()
    assert tables.log_probs.isnan().all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("num_classes", [3, 9, 17, 100])
def test_scores_read_every_class(device: torch.device, num_classes: int, selector: str) -> None:
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
        assert (run_rows(device, logits, selector, threshold, weights)[1] == stays).all()


def test_arguments_that_would_be_misread_are_refused(device: torch.device) -> None:
    case = Case(device, 17)
    good = {
        "tables": case.got,
        "logits": case.logits.to(device),
        "index": case.index.to(device),
        "count": torch.tensor([17], dtype=torch.int32, device=device),
        "stage": 0,
        "keep": case.keep,
        "stage_weight": None,
        "selector": "margin",
        "threshold": torch.zeros(1, device=device),
    }
    bad = {
        "logits": case.logits.double().to(device),
        "index": case.index.long().to(device),
        "selector": "confidence",
        "threshold": None,
        "weights": weights_for("stats", 10),
        "keep": exit_head.new_keep(17, 1000, device),
    }
    exit_head.exit_head(**good)
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name.removesuffix("s")):
            exit_head.exit_head(**{**good, name: value})
    with pytest.raises(ValueError, match="contiguous"):
        exit_head.exit_head(**{**good, "logits": case.logits.to(device).T.contiguous().T})


def test_every_tensor_must_have_its_dtype_and_be_on_one_device(device: torch.device) -> None:
    case = Case(device, 17)
    weights = MLPWeights(*(w.to(device) for w in weights_for("stats", 10)))
    index, count = case.index.to(device), torch.tensor([17], dtype=torch.int32, device=device)
    threshold = torch.zeros(1, device=device)

    def run(
        tables: ExitTables = case.got,
        keep: exit_head.Keep = case.keep,
        weights: MLPWeights = weights,
        **changes: torch.Tensor,
    ) -> None:
        lists = {"index": index, "count": count, "threshold": threshold, **changes}
        logits, options = case.logits.to(device), {"stage_weight": None, "selector": "stats"}
        exit_head.exit_head(tables, logits, stage=0, keep=keep, weights=weights, **lists, **options)

    run()
    for bad, said in ((lambda t: t.to("meta"), "on meta"), (lambda t: t.to(torch.int16), "int16")):
        for name, tensor in (("index", index), ("count", count), ("threshold", threshold)):
            with pytest.raises(ValueError, match=f"{name} is .*{said}"):
                run(**{name: bad(tensor)})
        for group, good in (("tables", case.got), ("weights", weights)):
            for name, tensor in good._asdict().items():
                with pytest.raises(ValueError, match=rf"{group}\.{name} is .*{said}"):
                    run(**{group: good._replace(**{name: bad(tensor)})})
        for name in ("flags", "counts"):
            with pytest.raises(ValueError, match=rf"keep\.{name} is .*{said}"):
                run(keep=case.keep._replace(**{name: bad(getattr(case.keep, name))}))
