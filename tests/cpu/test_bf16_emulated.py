"""The bf16 kernels on any x86-64, with AVX-512 and BF16 emulated: what the tests of test_bf16_*.py find.

The engine is rebuilt with emulated instructions and replaces the installed one in a pytest of its own.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import pytest
from emulated import emulated_objects
from native import (
    BF16_LOGITS,
    COMPILER,
    OPEN_PAIR,
    SPLIT_PAIR,
    STALE_ROUNDING,
    SWAPPED_PAIR,
    TRUNCATED_WEIGHTS,
    Fault,
    run_tests,
)

pytestmark = [
    COMPILER,
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are for x86-64"),
]


@pytest.fixture(scope="module")
def emulated(engine_objects: Sequence[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The engine's objects with AVX-512 and BF16 emulated, on a CPU that seems to have them."""
    folder = tmp_path_factory.mktemp("emulated")
    return emulated_objects(["avx512.cpp", "bf16_avx512.cpp"], engine_objects, folder)


@pytest.mark.parametrize(
    ("tests", "name"),
    [
        ("test_bf16_kernels.py", "test"),
        ("test_bf16_cascade.py", "test"),
        ("test_kernels.py", "test_sums_of_integers_are_exact and avx512"),
    ],
)
def test_emulated_kernels_pass(
    tests: str, name: str, emulated: list[Path], module_object: Path, tmp_path: Path
) -> None:
    status, words = run_tests([*emulated, module_object], tmp_path, tests, name)
    assert status == 0, words
    assert "skipped" not in words.splitlines()[-1], words


@pytest.mark.parametrize(
    ("fault", "units", "tests", "name"),
    [
        (TRUNCATED_WEIGHTS, [], "test_bf16_kernels.py", "test_linear"),
        (SWAPPED_PAIR, [], "test_bf16_kernels.py", "test_linear"),
        (OPEN_PAIR, ["bf16_avx512.cpp"], "test_bf16_kernels.py", "test_what_is_not_finite"),
        (SPLIT_PAIR, [], "test_bf16_kernels.py", "test_groups"),
        (STALE_ROUNDING, [], "test_bf16_kernels.py", "test_residual"),
        (BF16_LOGITS, [], "test_bf16_cascade.py", "test_the_layers"),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_a_planted_fault_is_caught(
    fault: Fault,
    units: list[str],
    tests: str,
    name: str,
    emulated: list[Path],
    module_object: Path,
    tmp_path: Path,
) -> None:
    objects = [*emulated_objects(units, emulated, tmp_path, fault), module_object]
    status, words = run_tests(objects, tmp_path, tests, name)
    assert status == 1, words
    assert "1 failed" in words, words
