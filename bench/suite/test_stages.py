"""The benchmark's networks, each as a cascade of one stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastcascade as fc
from bench.cases import BATCHES, NETWORKS, load_model, noise, reference_exits
from bench.machine import THREADS
from bench.measure import check


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("network", NETWORKS)
def test_stage(network: str, batch: int, benchmark: Any, timed: Any) -> None:
    benchmark.group = f"{network}, batch {batch}"
    images = noise(batch)
    compiled = fc.compile(load_model(network), threads=THREADS)
    out, expected = compiled(images), reference_exits(network, images)
    results = {"log_probs": out.probs.log().numpy(), "labels": out.label.numpy()}
    check(results | {"exits": out.exit_stage.numpy()}, expected, 2e-3)
    x = torch.from_numpy(images)
    timed(lambda: compiled(x), expected.gflop * batch)
