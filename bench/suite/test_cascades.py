"""The shipped cascade on real images, and a random one with evenly spread exits."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch

import fastcascade as fc
from bench.cases import cascade_images, load_model, reference_exits
from bench.machine import THREADS
from bench.measure import check
from bench.run import CASCADE

IMAGES = 512


@pytest.mark.parametrize("batch", [8, 64, 256])
@pytest.mark.parametrize("model", ["shipped", "random"])
def test_cascade(model: str, batch: int, benchmark: Any, timed: Any) -> None:
    benchmark.group = f"{model} cascade, batch {batch}"
    name = f"cascade:{CASCADE if model == 'shipped' else model}"
    images = cascade_images(name, batch)[:IMAGES]
    compiled = fc.compile(load_model(name), threads=THREADS)
    out, expected = compiled(images), reference_exits(name, images)
    results = {"log_probs": out.probs.log().numpy(), "labels": out.label.numpy()}
    check(results | {"exits": out.exit_stage.numpy()}, expected, 2e-3)
    batches = cycle(torch.from_numpy(images).split(batch))
    timed(lambda: compiled(next(batches)), expected.gflop * batch)
