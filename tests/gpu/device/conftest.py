"""Tests of the GPU kernels and backends: on a GPU, or on the CPU under Triton's interpreter.

The interpreter is chosen when kernels are decorated, so it needs a process of its own:
``tests/gpu/test_interpreter.py`` starts one per file. Collected any other way without a GPU, they skip.
"""

import os

import pytest
import torch

torch.set_num_threads(1)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or INTERPRETED:
        return
    reason = "needs a GPU; without one tests/gpu/test_interpreter.py runs this file under the interpreter"
    for item in items:
        if "gpu/device" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
