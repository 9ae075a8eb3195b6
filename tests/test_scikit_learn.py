"""The cascade as a classifier of scikit-learn."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import fastcascade as fc
from fastcascade.errors import InvalidArgument
from fastcascade.testing.networks import random_network

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import check_estimator

from fastcascade.scikit_learn import CascadeClassifier


def two(**options: Any) -> CascadeClassifier:
    pair = [("tree", DecisionTreeClassifier(max_depth=3, random_state=0)), ("line", LogisticRegression())]
    return CascadeClassifier(pair, **{"random_state": 0, **options})


def task(n: int = 600) -> tuple[Any, Any]:
    return make_classification(n, 8, n_informative=6, n_classes=3, class_sep=1.2, random_state=1)


def test_all_checks_of_scikit_learn_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(two(), on_fail=None)
    failed = {
        r["check_name"]: str(r["exception"])[:200]
        for r in results
        if r["status"] not in ("passed", "skipped")
    }
    assert not failed
    assert sum(r["status"] == "passed" for r in results) > 40


@pytest.mark.parametrize("selector", ["max_prob", "learned"])
def test_easy_samples_stop_early_at_the_last_estimators_accuracy(selector: str) -> None:
    X, y = task(1500)
    forest = RandomForestClassifier(60, random_state=0)
    pair = [("bayes", GaussianNB()), ("forest", forest)]
    classifier = CascadeClassifier(pair, costs=[1, 60], selector=selector, random_state=0).fit(
        X[:1000], y[:1000]
    )
    exits = classifier.exit_stage(X[1000:])
    assert 0.1 < exits.mean() < 0.9
    last = classifier.estimators_[1].score(X[1000:], y[1000:])
    assert classifier.score(X[1000:], y[1000:]) > last - 0.03
    assert 1 < classifier.mean_cost_ < 61
    probabilities = classifier.predict_proba(X[1000:])
    stage = classifier.estimators_[0].predict_proba(X[1000:])
    if selector == "max_prob":  # its temperatures stay 1
        np.testing.assert_allclose(probabilities[exits == 0], stage[exits == 0], atol=1e-6)


def test_a_budget_is_kept_and_an_accuracy_is_reached() -> None:
    X, y = task()
    assert two(costs=[1, 9], budget=4).fit(X, y).mean_cost_ <= 4
    assert two(costs=[1, 9], min_accuracy=0.5).fit(X, y).accuracy_ >= 0.5


def test_labels_of_text_and_one_estimator() -> None:
    X, y = task(200)
    names = np.array(["pear", "apple", "fig"])[y]
    classifier = CascadeClassifier([("line", LogisticRegression())]).fit(X, names)
    assert classifier.classes_.tolist() == ["apple", "fig", "pear"]
    assert classifier.score(X, names) > 0.6


def test_parameters_of_estimators_by_name() -> None:
    classifier = two()
    assert classifier.get_params()["tree__max_depth"] == 3
    classifier.set_params(tree__max_depth=5, line=GaussianNB(), budget=1.5)
    assert classifier.estimators[0][1].max_depth == 5
    assert isinstance(classifier.estimators[1][1], GaussianNB)
    assert clone(classifier).get_params()["budget"] == 1.5


def test_searches_and_cross_validation() -> None:
    X, y = task(300)
    assert cross_val_score(two(), X, y, cv=3).mean() > 0.5
    search = GridSearchCV(two(), {"tree__max_depth": [2, 4], "selector": ["max_prob", "margin"]}, cv=2).fit(
        X, y
    )
    assert search.best_score_ > 0.5


def test_trained_estimators_are_left_alone() -> None:
    X, y = task(400)
    tree = DecisionTreeClassifier(max_depth=3).fit(X[:200], y[:200])
    forest = RandomForestClassifier(20, random_state=0).fit(X[:200], y[:200])
    classifier = CascadeClassifier([("tree", tree), ("forest", forest)], costs=[1, 20], prefit=True)
    classifier.fit(X[200:], y[200:])
    assert classifier.estimators_ == [tree, forest]
    with pytest.raises(InvalidArgument, match="was trained on classes"):
        classifier.fit(X[200:], y[200:] + 1)


@torch.no_grad()
def trained(seed: int, x: torch.Tensor) -> torch.nn.Module:
    """A network whose labels differ between images."""
    network = random_network(seed)
    linear = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1]
    logits = network(x)
    linear.weight.mul_(3 / logits.std(0)[:, None])
    linear.bias.sub_(logits.mean(0)).mul_(3 / logits.std(0))
    return network


def test_trained_modules_classify_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 3, 9, 8), dtype=np.uint8)
    normalize = fc.Normalize((0.5,) * 3, (0.25,) * 3)
    pixels = (torch.from_numpy(images) / 255 - 0.5) / 0.25
    modules = [(f"net{seed}", trained(seed, pixels)) for seed in (3, 4)]
    labels = modules[1][1](pixels).argmax(1).numpy()
    assert len(np.unique(labels)) == 5
    classifier = CascadeClassifier(modules, preprocess=normalize).fit(images, labels)
    assert classifier.score(images, labels) == 1.0
    assert classifier.mean_cost_ <= classifier.cascade_.exit_macs[1]
    again = pickle.loads(pickle.dumps(classifier))
    assert np.array_equal(again.predict(images), classifier.predict(images))


BAD: dict[str, tuple[Any, str]] = {
    "no estimators": (CascadeClassifier([]), "estimators have the names"),
    "equal names": (CascadeClassifier([("a", GaussianNB()), ("a", GaussianNB())]), "different names"),
    "one cost for two": (two(costs=[1]), "expected 2 positive numbers"),
    "a cost of 0": (two(costs=[0, 1]), "expected 2 positive numbers"),
    "two targets": (two(budget=1, min_accuracy=0.9), "at most one target"),
    "a budget below the first cost": (
        two(costs=[2, 9], budget=1),
        "expected at least 2, the cost of the first exit",
    ),
    "another selector": (two(selector="best"), "selector is 'best'"),
    "nothing held out": (two(held_out=0), "held_out is 0"),
    "no probabilities": (CascadeClassifier([("ridge", RidgeClassifier())]), "no predict_proba"),
    "modules beside estimators": (
        CascadeClassifier([("bayes", GaussianNB()), ("net", random_network(1))]),
        "need costs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    classifier, message = BAD[case]
    with pytest.raises(InvalidArgument, match=message):
        classifier.fit(*task(60))


def test_one_sample_of_each_class_is_too_few() -> None:
    with pytest.raises(InvalidArgument, match="one sample of each class"):
        two().fit(np.eye(3), [0, 1, 2])


def test_without_scikit_learn_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from fastcascade import *; print('the others are here')\n"
        "import fastcascade as fc; fc.CascadeClassifier"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "the others are here\n"
    assert "pip install 'fastcascade[sklearn]'" in done.stderr
