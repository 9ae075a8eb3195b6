"""The server of docs/serving.md under a real client: every request gets the answer to its own image."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastcascade as fc
from fastcascade.types import CascadeOutput

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file of docs/serving.md as a module."""
    (code,) = re.findall(
        r"<!-- app -->\n```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL
    )
    module = ModuleType("app")
    monkeypatch.setitem(sys.modules, "app", module)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "app.py", "exec"), module.__dict__)
    return module


@pytest.fixture
def address(app: ModuleType) -> Iterator[str]:
    """The server's address on the loopback interface, while it runs."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = uvicorn.Server(uvicorn.Config(app.app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(60)
    gc.unfreeze()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """(2000, 32, 32, 3) uint8."""
    return np.load(ROOT / "examples/cifar10/test-images.npz")["images"]


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


async def ask(address: str, bodies: list[bytes], points: list[str]) -> list[Any]:
    """The responses to all requests, sent at once."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits, trust_env=False) as client:
        requests = (
            client.post("/classify", content=body, params={"operating_point": point})
            for body, point in zip(bodies, points, strict=True)
        )
        return await asyncio.gather(*requests)


@contextlib.contextmanager
def open_files(count: int) -> Iterator[None]:
    """Allow this many open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"this system allows {hard} open files; {count} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_concurrent_requests_are_neither_lost_nor_doubled_nor_mixed_up(
    count: int, address: str, pictures: np.ndarray
) -> None:
    points = [("fast", "default")[i % 3 // 2] for i in range(count)]
    with open_files(3 * count + 500):
        responses = asyncio.run(ask(address, [png(image) for image in pictures[:count]], points))
    assert [response.status_code for response in responses] == [200] * count
    fast = fc.compile(fc.load(ROOT / "examples/cifar10/model"))
    classes = fast.plan.classes
    assert classes is not None
    expected = {point: fast(pictures[:count], point) for point in ("fast", "default")}
    answers = set()
    for i, response in enumerate(responses):
        out, found = expected[points[i]], response.json()
        assert isinstance(out, CascadeOutput)
        label = int(out.label[i])
        wanted = {
            "class": classes[label],
            "probability": float(out.probs[i, label]),
            "exit": int(out.exit_stage[i]),
        }
        assert found == wanted
        answers.add(found["probability"])
    assert len(answers) > 0.9 * count  # so that an answer to another image would show
    stats = httpx.get(f"{address}/stats", trust_env=False).json()
    assert stats["requests"] == stats["images"] == count
    assert stats["batches"] < count / 2


def test_bad_requests_and_overload(address: str, app: ModuleType, pictures: np.ndarray) -> None:
    good = png(pictures[0])
    bodies = [b"", b"no image", png(np.zeros((31, 32, 3), np.uint8)), good[: len(good) // 2], good]
    responses = asyncio.run(ask(address, [*bodies, good], ["fast"] * 5 + ["unknown"]))
    assert [response.status_code for response in responses] == [422, 422, 422, 422, 200, 422]
    assert "unknown operating point" in responses[-1].text
    roomy = app.app.state.batcher
    with fc.Batcher(roomy.model, max_batch=1, max_waiting=1, max_delay_ms=0) as app.app.state.batcher:
        responses = asyncio.run(ask(address, [good] * 50, ["default"] * 50))
    app.app.state.batcher = roomy
    codes = [response.status_code for response in responses]
    assert set(codes) == {200, 503}
    assert all(
        response.headers["retry-after"] == "1" for response in responses if response.status_code == 503
    )
