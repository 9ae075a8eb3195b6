"""The peers on ResNet-20, each in a process of its own; times include waking it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.cases import noise, reference_exits
from bench.machine import THREADS
from bench.measure import Engine, Worker, check
from bench.peers import PEERS, make_peer

NETWORK = "resnet_cifar:20"
BATCH = 64


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peer(peer: Any, benchmark: Any, tmp_path: Path) -> None:
    benchmark.group = f"peers, {NETWORK}, batch {BATCH}"
    try:
        make_peer(peer.name)
    except RuntimeError as error:
        pytest.skip(str(error))
    images = noise(BATCH)
    np.save(tmp_path / "images.npy", images)
    with Worker(Engine(peer.name, peer.name, peer.tolerance), THREADS) as worker:
        worker.ask("load", model=NETWORK)
        worker.ask("images", path=str(tmp_path / "images.npy"), batch=BATCH)
        benchmark.extra_info["schedule"] = worker.ask("tune", seconds=0.5)["schedule"]
        worker.ask("results", path=str(tmp_path / "results.npz"))
        with np.load(tmp_path / "results.npz") as results:
            check(results, reference_exits(NETWORK, images), peer.tolerance)
        benchmark.pedantic(lambda: worker.ask("again"), rounds=10, warmup_rounds=1)
