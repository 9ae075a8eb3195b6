"""The state in which every test starts: fixed seeds, one thread, poisoned uninitialised memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:  # on a bare GPU machine, whose tests need none
    hypothesis = None  # type: ignore[assignment]

# Otherwise torch warns at every matrix product on a GPU while determinism is on, and warnings are errors.
# It is read when the first GPU is used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytest.register_assert_rewrite("exit_head_tests")

if hypothesis is not None:
    hypothesis.settings.register_profile("fastcascade", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("fastcascade")


@pytest.fixture(autouse=True)
def _clean_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fix seed and threads, unset forced choices, fill ``torch.empty`` with NaN or huge integers."""
    monkeypatch.delenv("FASTCASCADE_BACKEND", raising=False)
    monkeypatch.delenv("FASTCASCADE_ISA", raising=False)
    monkeypatch.delenv("FASTCASCADE_STAGES", raising=False)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Deterministic mode fills empty tensors. warn_only: some operations have no deterministic kernel.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
