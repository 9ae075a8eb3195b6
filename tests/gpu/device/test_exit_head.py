"""The Triton exit head agrees with its twin. The tests are in ``tests/helpers/exit_head_tests.py``."""

from __future__ import annotations

import pytest
import torch
from exit_head_tests import *  # noqa: F403  # tests, which pytest collects here
from exit_head_tests import ExitHead

exit_head = pytest.importorskip("fastcascade.kernels.triton.exit_head", reason="triton is not installed")


@pytest.fixture
def kernel(device: torch.device) -> ExitHead:
    """The exit head that the imported tests check."""
    return ExitHead(device, exit_head.exit_head, exit_head.new_keep)
