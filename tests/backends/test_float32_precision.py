"""A program computes in full fp32, and restores torch's settings."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.backends.float32_precision import exact_float32
from fastcascade.testing.networks import random_network

SHAPE = (3, 9, 8)
BACKENDS: Any = torch.backends


def settings() -> dict[str, str]:
    """The precision that torch's settings select."""
    places = {"": BACKENDS, "cudnn": BACKENDS.cudnn, "cudnn.conv": BACKENDS.cudnn.conv}
    places |= {"cudnn.rnn": BACKENDS.cudnn.rnn, "cuda.matmul": BACKENDS.cuda.matmul}
    return {name: place.fp32_precision for name, place in places.items()}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Undo a test's settings; none sets convolutions alone, which torch cannot undo."""
    yield
    BACKENDS.cuda.matmul.fp32_precision = "none"
    BACKENDS.cudnn.fp32_precision = "none"
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def torchs_own() -> None:
    pass


def everything_tf32() -> None:
    BACKENDS.fp32_precision = "tf32"


def cuda_tf32() -> None:
    BACKENDS.cudnn.fp32_precision = "tf32"


def matmul_tf32() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def matmul_high() -> None:
    torch.set_float32_matmul_precision("high")


def everything_exact() -> None:
    BACKENDS.fp32_precision = "ieee"


@pytest.mark.parametrize(
    "choose", [torchs_own, everything_tf32, cuda_tf32, matmul_tf32, matmul_high, everything_exact]
)
def test_exact_inside_and_as_before_afterwards(choose: Callable[[], None]) -> None:
    choose()
    before = settings()
    assert choose is everything_exact or "tf32" in before.values()  # otherwise there is nothing to change
    with exact_float32():
        assert set(settings().values()) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "highest" or choose is matmul_tf32
    assert settings() == before
    with suppress(ZeroDivisionError), exact_float32():
        raise ZeroDivisionError
    assert settings() == before


def test_a_choice_made_for_convolutions_in_the_older_form() -> None:
    """Runs in its own process, because the setting cannot be undone."""
    code = (
        "import torch\n"
        "from fastcascade.backends.float32_precision import exact_float32\n"
        "for allowed in (True, False):\n"
        "    torch.backends.cudnn.allow_tf32 = allowed\n"
        "    with exact_float32():\n"
        "        assert torch.backends.cudnn.conv.fp32_precision == 'ieee'\n"
        "        assert torch.backends.cudnn.rnn.fp32_precision == 'ieee'\n"
        "    assert torch.backends.cudnn.allow_tf32 is allowed\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


def test_the_last_of_several_threads_takes_the_change_back() -> None:
    before, seen = settings(), []
    left, entered = threading.Event(), threading.Event()

    def second() -> None:
        with exact_float32():
            entered.set()
            left.wait(10)
            seen.append(settings())

    thread = threading.Thread(target=second)
    with exact_float32():
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join()
    assert set(seen[0].values()) == {"ieee"}
    assert settings() == before


class Watching(nn.Module):
    """An opaque stage that records torch's settings."""

    def __init__(self) -> None:
        super().__init__()
        self.network = random_network(0, input_shape=SHAPE)
        self.seen: list[dict[str, str]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(settings())
        return self.network(x) if float(x.abs().sum()) >= 0 else self.network(-x)


@pytest.mark.filterwarnings("ignore:Watching uses")
def test_a_stage_through_torch_is_exact() -> None:
    stages = [random_network(1, input_shape=SHAPE), Watching()]
    fast = fc.compile(fc.Cascade(stages, fc.MLPSelector(), 5, SHAPE), backend="reference")
    running = fast.program.plan.stages[1].module  # type: ignore[attr-defined]
    (watching,) = (module for module in running.modules() if isinstance(module, Watching))
    before, _ = settings(), watching.seen.clear()
    fast(torch.randn(4, *SHAPE), torch.tensor([torch.inf]))
    assert len(watching.seen) == 1
    assert set(watching.seen[0].values()) == {"ieee"}
    assert settings() == before
