"""The reference forward against a per-instance loop written from the formulas, and its properties."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.errors import InvalidArgument
from fastcascade.model.resnet import cut_into_segments, resnet_cifar
from fastcascade.model.selector import FeatureKind, ScoreKind

INPUT = (3, 4, 4)
CLASSES = 5


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.Tanh(), nn.Linear(width, CLASSES))


def independent(selector: nn.Module, combine: str = "last", scale: float = 3.0) -> fc.Cascade:
    torch.manual_seed(0)
    cascade = fc.Cascade([network(w) for w in (4, 8, 16)], selector, CLASSES, INPUT, combine=combine)
    with torch.no_grad():
        for k in range(3):
            cascade.stages[k].module[-1].weight *= scale
    if isinstance(selector, fc.MLPSelector):
        nn.init.normal_(selector.b1)
        nn.init.normal_(selector.mean)
    return cascade.double()


def segmented() -> fc.Cascade:
    torch.manual_seed(0)
    bodies = [nn.Sequential(nn.Flatten(), nn.Linear(48, 12)), nn.Linear(12, 9), nn.Linear(9, 7)]
    heads = [nn.Linear(12, CLASSES), nn.Linear(9, CLASSES), nn.Linear(7, CLASSES)]
    stages = [
        fc.Stage(body, head, input="previous" if k else "image")
        for k, (body, head) in enumerate(zip(bodies, heads, strict=True))
    ]
    return fc.Cascade(stages, fc.ThresholdSelector("margin"), CLASSES, INPUT).double()


def log_odds(q: np.ndarray, c: int) -> float:
    others = sum(q[j] for j in range(len(q)) if j != c)
    return float(np.clip(math.log(q[c]) - math.log(others), -30, 30))


def score(cascade: fc.Cascade, k: int, q: np.ndarray, agreement: float) -> float:
    """Stop score from DESIGN's table, in plain numpy."""
    order = np.argsort(-q, kind="stable")
    entropy = -sum(p * math.log(p) for p in q if p > 0)
    selector = cascade.selector
    if isinstance(selector, fc.ThresholdSelector):
        return {
            "max_prob": log_odds(q, order[0]),
            "margin": math.log(q[order[0]]) - math.log(q[order[1]]),
            "entropy": -entropy,
        }[selector.score]
    x = {
        "stats": [log_odds(q, order[0]), log_odds(q, order[1]), entropy, agreement],
        "topk": [*(log_odds(q, c) for c in order[:3]), agreement],
        "probs": list(q),
    }[selector.features]
    w = [t.detach().numpy() for t in selector.weights(k)]
    hidden = np.maximum(w[2] @ ((np.array(x) - w[0]) / w[1]) + w[3], 0)
    return float(hidden @ w[4] + w[5])


def one_by_one(cascade: fc.Cascade, x: Tensor, thresholds: list[float]) -> list[tuple]:
    """(probs, label, exit, cost) of each image by a plain loop over images and stages."""
    answers = []
    for image in x:
        features, visited, weights, previous, cost = image[None], [], [], -1, 0
        for k, stage in enumerate(cascade.stages):
            source = image[None] if stage.input == "image" else features
            features, z = stage(source)
            z = z[0].detach().numpy()
            cost += cascade.stage_macs[k] + (
                cascade.selector_macs[k] if k < len(cascade.selector_macs) else 0
            )
            last = k == len(cascade.stages) - 1
            valid = np.isfinite(z).all()
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum() if valid else None
            if valid:
                visited.append(p)
                weights.append(1.0 if isinstance(cascade.combine, str) else cascade.combine[k])
                q = p if cascade.combine == "last" else np.average(visited, 0, weights)
                agreement = float(p.argmax() == previous)
            if last or (valid and score(cascade, k, q, agreement) >= thresholds[k]):
                probs = q if valid else np.full(CLASSES, np.nan)
                answers.append((probs, q.argmax() if valid else -1, k, cost))
                break
            previous = p.argmax() if valid else -1
    return answers


COMBINES = ["last", "mean", (0.3, 1.0, 2.0)]

SELECTORS = [
    *(lambda f=f: fc.MLPSelector(f) for f in FeatureKind.__args__),
    *(lambda s=s: fc.ThresholdSelector(s) for s in ScoreKind.__args__),
]


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("make", SELECTORS)
def test_equals_a_loop_over_instances(make, combine):
    cascade = independent(make(), combine)
    x = torch.randn(60, *INPUT, dtype=torch.float64)
    x[7] = math.nan
    scores = cascade.judge(cascade.all_logits(x)).scores
    thresholds = scores.nanquantile(0.6, dim=1).tolist()
    out = cascade(x, operating_point=thresholds)
    expected = one_by_one(cascade, x, thresholds)
    assert set(out.exit_stage.tolist()) == {0, 1, 2}
    for i, (probs, label, stage, cost) in enumerate(expected):
        assert (int(out.label[i]), int(out.exit_stage[i]), int(out.cost_macs[i])) == (label, stage, cost)
        np.testing.assert_allclose(out.probs[i].numpy(), probs, rtol=1e-5, atol=1e-12)


def test_segments_read_the_features_before_them():
    cascade = segmented()
    x = torch.randn(50, *INPUT, dtype=torch.float64)
    thresholds = [0.4, 0.3]
    out = cascade(x, operating_point=thresholds)
    expected = one_by_one(cascade, x, thresholds)
    assert out.exit_stage.tolist() == [e[2] for e in expected]
    assert len(set(out.exit_stage.tolist())) == 3
    assert out.label.tolist() == [e[1] for e in expected]


class OneInvalidStage(nn.Module):
    """Non-finite logits for images whose first pixel is negative."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 0, 0, :1] < 0, math.inf, self.inner(x))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_invalid_stage_cannot_stop_and_is_left_out(stage, combine):
    torch.manual_seed(1)
    nets = [OneInvalidStage(network(w)) if k == stage else network(w) for k, w in enumerate((4, 8, 16))]
    cascade = fc.Cascade(nets, fc.MLPSelector(), CLASSES, INPUT, combine=combine).double()
    x = torch.randn(40, *INPUT, dtype=torch.float64)
    for thresholds in ([-math.inf] * 2, [0.05, 0.05], [math.inf] * 2):
        out = cascade(x, operating_point=thresholds)
        for i, (probs, label, exit_stage, cost) in enumerate(one_by_one(cascade, x, thresholds)):
            got = (int(out.label[i]), int(out.exit_stage[i]), int(out.cost_macs[i]))
            assert got == (label, exit_stage, cost)
            np.testing.assert_allclose(out.probs[i].numpy(), probs, rtol=1e-5, atol=1e-12)


def test_judge_agrees_with_the_forward_also_where_stages_are_invalid():
    torch.manual_seed(1)
    nets = [network(4), OneInvalidStage(network(8)), network(16)]
    for combine in COMBINES:
        cascade = fc.Cascade(nets, fc.MLPSelector(), CLASSES, INPUT, combine=combine).double()
        x = torch.randn(64, *INPUT, dtype=torch.float64)
        judged = cascade.judge(cascade.all_logits(x))
        thresholds = judged.scores.median(1).values.float().tolist()
        out = cascade(x, operating_point=thresholds)
        stop = judged.valid[:-1] & (judged.scores >= torch.tensor(thresholds)[:, None])
        exits = torch.cat([stop, torch.ones_like(stop[:1])]).int().argmax(0)
        assert torch.equal(exits, out.exit_stage)
        log_probs = judged.log_probs.gather(0, exits[None, :, None].expand(1, -1, CLASSES))[0]
        torch.testing.assert_close(log_probs.exp().float(), out.probs, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_order_and_splitting_of_the_batch_do_not_matter(data):
    cascade = independent(fc.MLPSelector(), data.draw(st.sampled_from(["last", "mean"])))
    x = torch.randn(24, *INPUT, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = cascade(x)
    order = torch.tensor(data.draw(st.permutations(range(24))))
    cut = data.draw(st.integers(0, 24))
    parts = [cascade(x[order[:cut]]), cascade(x[order[cut:]])]
    for field, a, b in zip(whole._fields, whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(a[order], torch.cat(b), msg=field)


@settings(max_examples=40, deadline=None)
@given(
    low=st.lists(st.floats(-5, 5), min_size=2, max_size=2),
    rise=st.lists(st.floats(0, 5), min_size=2, max_size=2),
)
def test_raising_a_threshold_never_lowers_an_exit_and_cost_is_what_ran(low, rise):
    cascade = independent(fc.ThresholdSelector("max_prob"))
    x = torch.randn(30, *INPUT, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    before = cascade(x, operating_point=low)
    after = cascade(x, operating_point=[a + b for a, b in zip(low, rise, strict=True)])
    assert (after.exit_stage >= before.exit_stage).all()
    assert torch.equal(before.cost_macs, cascade.exit_macs[before.exit_stage])


def test_each_stage_runs_on_the_active_instances_only():
    cascade = independent(fc.ThresholdSelector("margin"))
    rows = []
    for stage in cascade.stages:
        stage.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    out = cascade(torch.randn(40, *INPUT, dtype=torch.float64), operating_point=[1.0, 2.0])
    assert rows == [int((out.exit_stage >= k).sum()) for k in range(3)]
    assert rows[0] > rows[1] > rows[2] > 0


def test_forced_exits_and_an_empty_batch():
    cascade = independent(fc.MLPSelector())
    x = torch.randn(9, *INPUT, dtype=torch.float64)
    for k, thresholds in enumerate(([-math.inf] * 2, [math.inf, -math.inf], [math.inf] * 2)):
        assert (cascade(x, operating_point=thresholds).exit_stage == k).all()
    empty = cascade(x[:0])
    assert [tuple(t.shape) for t in empty] == [(0, CLASSES), (0,), (0,), (0,)]
    assert [t.dtype for t in empty] == [torch.float32, torch.int64, torch.int64, torch.int64]


def test_the_forward_ignores_and_restores_training_mode():
    cascade = fc.Cascade([resnet_cifar(8)], None, 10, (3, 32, 32)).train()
    x = torch.randn(2, 3, 32, 32)
    before = cascade.stages[0].module.stem[1].running_mean.clone()
    out = cascade(x)
    assert torch.equal(before, cascade.stages[0].module.stem[1].running_mean)
    assert cascade.training
    torch.testing.assert_close(out.probs, cascade.eval()(x).probs)


def test_dense_cost_of_segments_leaves_out_early_heads_and_selectors():
    network = resnet_cifar(20)
    whole = fc.Cascade([network], None, 10, (3, 32, 32))
    segments = cut_into_segments(network, [3, 6])
    stages = [fc.Stage(a, b, input="previous" if k else "image") for k, (a, b) in enumerate(segments)]
    cascade = fc.Cascade(stages, fc.MLPSelector(), 10, (3, 32, 32))
    assert cascade.dense_macs == whole.dense_macs == whole.stage_macs[0]
    assert int(cascade.exit_macs[-1]) == whole.dense_macs + (16 + 32) * 10 + 2 * (4 * 16 + 16)


def test_uint8_images_in_either_layout_are_normalised_and_padding_stays_zero():
    normalize = fc.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    cascade = fc.Cascade([network(4)], None, CLASSES, INPUT, preprocess=normalize)
    images = torch.randint(0, 256, (5, *INPUT), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (normalize.mean, normalize.std))
    expected = cascade((images.float() / 255 - mean) / std).probs
    for x in (images, images.permute(0, 2, 3, 1), images.permute(0, 2, 3, 1).contiguous(), images.numpy()):
        assert torch.equal(cascade(x).probs, expected)


def test_a_module_of_your_own_may_select():
    class EveryOther(nn.Module):
        def forward(self, k: int, log_probs: Tensor, previous_label: Tensor) -> Tensor:
            return torch.where(log_probs[:, 0] > log_probs[:, 1], 1.0, -1.0)

        def macs(self, k: int, num_classes: int) -> int:
            return 7

    cascade = fc.Cascade([network(4), network(8)], EveryOther(), CLASSES, INPUT)
    x = torch.randn(20, *INPUT)
    first = cascade.all_logits(x)[0]
    assert torch.equal(cascade(x).exit_stage, (first[:, 0] <= first[:, 1]).long())
    assert cascade.selector_macs == (7,)


class ReturnsPair(nn.Module):
    """Logits and something else, as some libraries' classifiers return them."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x.flatten(1)[:, :CLASSES], None


def test_the_error_of_a_stage_itself_is_kept() -> None:
    with pytest.raises(InvalidArgument) as caught:
        fc.Cascade([resnet_cifar(8)], None, 10, (1, 32, 32))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fc.Cascade([], None, 2, INPUT), "at least one stage"),
        (lambda: fc.Cascade([network(4)], fc.MLPSelector(), CLASSES, INPUT), "no selector"),
        (lambda: fc.Cascade([network(4), network(4)], None, CLASSES, INPUT), "need a selector"),
        (lambda: fc.Cascade([network(4)], None, 7, INPUT), r"expected \(1, 7\) logits"),
        (lambda: fc.Cascade([network(4)], None, 1, INPUT), "at least 2"),
        (lambda: fc.Cascade([network(4)], None, "5", INPUT), "num_classes is '5'; expected an integer"),
        (lambda: fc.Cascade(network(4), None, CLASSES, INPUT), r"stages is a Sequential; .* \[module\]"),
        (lambda: fc.Cascade("resnet9:8", None, CLASSES, INPUT), "stages is 'resnet9:8'; expected a list"),
        (
            lambda: fc.Cascade([network(4), "resnet9:8"], fc.MLPSelector(), CLASSES, INPUT),
            r"stages\[1\] is 'resnet9:8'; expected an nn.Module: build the network first",
        ),
        (
            lambda: fc.Cascade([lambda x: x], None, CLASSES, INPUT),
            r"stages\[0\] is <function .*; expected an nn.Module: wrap",
        ),
        (
            lambda: fc.Cascade([nn.Flatten], None, CLASSES, INPUT),
            r"stages\[0\] is <class .*create an instance: Flatten\(",
        ),
        (lambda: fc.Stage(network(4), exit="head:4"), "Stage exit is 'head:4'; expected an nn.Module"),
        (lambda: fc.Stage(network(4), name=3), "Stage name is 3; expected a string"),
        (lambda: fc.Stage(network(4), macs=-1), "Stage macs is -1; expected"),
        (
            lambda: fc.Cascade([network(4), network(4)], "mlp", CLASSES, INPUT),
            r"selector is 'mlp'; expected None, 'auto', fc.MLPSelector\(\)",
        ),
        (lambda: fc.Cascade([network(4)], None, CLASSES, 32), r"input_shape is 32; .*\(C, H, W\)"),
        (
            lambda: fc.Cascade([network(4)], None, CLASSES, INPUT, preprocess=(0.5, 0.5)),
            r"preprocess is \(0.5, 0.5\); expected None or fc.Normalize",
        ),
        (lambda: fc.Cascade([network(4)], None, CLASSES, INPUT, classes="abcde"), "expected a list of names"),
        (
            lambda: fc.Cascade([network(4)], None, CLASSES, INPUT, classes=range(5)),
            "expected a list of names",
        ),
        (
            lambda: fc.Cascade([resnet_cifar(8)], None, 10, (32, 32, 3)),
            r"input_shape is \(32, 32, 3\); expected \(C, H, W\); did you mean \(3, 32, 32\)\?",
        ),
        (
            lambda: fc.Cascade(
                [resnet_cifar(8)], None, 10, (32, 32, 3), preprocess=fc.Normalize((0.5,) * 3, (0.5,) * 3)
            ),
            r"preprocess has 3 channels.*did you mean \(3, 32, 32\)\?",
        ),
        (
            lambda: fc.Cascade([resnet_cifar(8)], None, 10, (1, 32, 32)),
            r"stage 0 \(ResNet\) fails on an image of shape \(1, 1, 32, 32\): RuntimeError: .*channels",
        ),
        (
            lambda: fc.Cascade([nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(40))], None, 10, (3, 32, 32)),
            r"too small \(in module '1' \(MaxPool2d\), operator aten.max_pool2d_with_indices\)",
        ),
        (
            lambda: fc.Cascade(
                [nn.Sequential(nn.Sequential(nn.Conv2d(3, 7, 3), nn.ChannelShuffle(2)))], None, 10, INPUT
            ),
            r"divisible by groups.*\(in module '0.1' \(ChannelShuffle\), operator aten.channel_shuffle\)",
        ),
        (
            lambda: fc.Cascade(
                [
                    fc.Stage(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Flatten(), nn.Linear(32, CLASSES))),
                    fc.Stage(nn.Conv2d(4, 8, 1), nn.Flatten(), input="previous"),
                ],
                fc.MLPSelector(),
                CLASSES,
                INPUT,
            ),
            r"stage 1 \(Conv2d\) fails on the features of stage 0 of shape \(1, 8, 2, 2\)",
        ),
        (
            lambda: fc.Cascade([ReturnsPair()], None, CLASSES, INPUT),
            r"stage 0 \(ReturnsPair\) returns tuple; expected a tensor",
        ),
        (
            lambda: fc.Cascade([network(4)], None, CLASSES, INPUT, combine="max"),
            "'last', 'mean' or 1 weights",
        ),
        *(
            (lambda c=c: fc.Cascade([network(4)], None, CLASSES, INPUT, combine=c), "weights, one per stage")
            for c in ([1.0, 2.0], [0.0], [-1.0], [math.nan], [math.inf], ["1"], None, 1.0)
        ),
        (lambda: fc.Cascade([network(4)], None, CLASSES, INPUT, classes=["a"]), "1 class names"),
        (
            lambda: fc.Cascade([fc.Stage(network(4), input="previous")], None, CLASSES, INPUT),
            "nothing comes before",
        ),
        (lambda: fc.Cascade([network(4)], None, CLASSES, (3, 4)), r"\(C, H, W\)"),
        (lambda: fc.Stage(network(4), input="picture"), "'image' or 'previous'"),
        (lambda: fc.MLPSelector("logits"), "expected one of"),
        (lambda: fc.ThresholdSelector("odds"), "expected one of"),
        (
            lambda: independent(fc.MLPSelector())(torch.zeros(2, 3, 5, 5)),
            r"got images of shape \(2, 3, 5, 5\)",
        ),
        (
            lambda: independent(fc.MLPSelector())(torch.zeros(2, *INPUT, dtype=torch.int64)),
            "uint8 or a floating",
        ),
        (lambda: independent(fc.MLPSelector())(torch.zeros(2, *INPUT, dtype=torch.uint8)), "preprocess"),
        (lambda: independent(fc.MLPSelector())([1, 2]), "expected a tensor or array"),
        (
            lambda: independent(fc.MLPSelector())(torch.zeros(1, *INPUT), "quick"),
            "unknown operating point 'quick'",
        ),
        (lambda: independent(fc.MLPSelector())(torch.zeros(1, *INPUT), [0.0]), "expected 2 numbers"),
        (lambda: independent(fc.MLPSelector())(torch.zeros(1, *INPUT), [0.0, math.nan]), "NaN not"),
        (lambda: independent(fc.ThresholdSelector("margin"))(torch.zeros(1, *INPUT)), "fc.calibrate"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(InvalidArgument, match=words):
        call()
