"""What the other tests are worth: with a fault planted in the engine, they fail.

The engine is rebuilt with one mistake and replaces the installed one in a pytest of its own. Faults that are
compiled and found in seconds run every time; test_native.py plants two more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from native import (
    BF16_LAYER,
    BYTE_WIDE_TILE,
    COMPILER,
    EARLY_GATE,
    EQUAL_PIXELS,
    LEFT_WAITING,
    LOST_CLASS,
    LOUD_NAN,
    MISSING_PIXELS,
    MISSING_TILE,
    ONE_MULTIPLIER,
    PADDED_SOFTMAX,
    SATURATED_PAIRS,
    SHORT_SQUEEZE,
    SILENT_NAN,
    UNCHECKED_CLASS,
    UNFINISHED_BLOCK,
    UNLIMITED_PIXELS,
    WIDE_EDGE,
    ZERO_BORDER,
    ZERO_ROWS,
    ZERO_SIDES,
    Fault,
    run_tests,
)

from fastcascade import _C

pytestmark = COMPILER
NO_AMX = dict(_C.int8_kernels())["int8_amx"]


@pytest.mark.slow
def test_the_engine_built_again_passes(
    module_object: Path, engine_objects: Sequence[Path], tmp_path: Path
) -> None:
    status, words = run_tests([*engine_objects, module_object], tmp_path, "test_program.py", "test_accuracy")
    assert status == 0, words


@pytest.mark.parametrize(
    ("fault", "tests", "name"),
    [
        (UNCHECKED_CLASS, "test_exit_head.py", "test_invalid_logits"),
        (LOST_CLASS, "test_exit_head.py", "test_maximum_and_mass"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (LOST_CLASS, "test_exit_head.py", "test_scores_read_every_class"),
                (UNLIMITED_PIXELS, "test_limits.py", "test_pixels_beyond"),
                (BF16_LAYER, "test_program.py", "test_accuracy"),
                (BF16_LAYER, "test_kernels.py", "test_batches_around_a_tile"),
                (MISSING_TILE, "test_kernels.py", "test_conv3x3_at_odd_sizes"),
                (MISSING_PIXELS, "test_kernels.py", "test_threads_give_the_same_bits"),
                (WIDE_EDGE, "test_kernels.py", "test_sums_of_integers and avx2"),
                (SHORT_SQUEEZE, "test_kernels.py", "test_global_pools and avx2"),
                (EARLY_GATE, "test_kernels.py", "squeeze and avx2"),
                (PADDED_SOFTMAX, "test_kernels.py", "test_other_layers and softmax and avx2"),
                (ZERO_BORDER, "test_int8_kernels.py", "test_convolution and avx2 and 128"),
                (ZERO_ROWS, "test_int8_kernels.py", "test_convolution and avx2 and 128"),
                (ZERO_SIDES, "test_int8_kernels.py", "test_convolution and avx2 and 128"),
                (BYTE_WIDE_TILE, "test_int8_kernels.py", "test_convolution and avx2"),
                (SATURATED_PAIRS, "test_int8_kernels.py", "test_the_largest_sums and avx2"),
                (ONE_MULTIPLIER, "test_int8_kernels.py", "test_convolution and avx2"),
                (SILENT_NAN, "test_int8_kernels.py", "not_finite and avx2"),
                (LOUD_NAN, "test_int8_kernels.py", "images_of_few_channels and avx2"),
                (LEFT_WAITING, "test_program.py", "test_large_batches"),
            ]
        ),
        *(
            pytest.param(
                fault,
                "test_int8_kernels.py",
                "joined_pixels and amx",
                marks=pytest.mark.skipif(NO_AMX is not None, reason=f"int8_amx: {NO_AMX}"),
            )
            for fault in (EQUAL_PIXELS, UNFINISHED_BLOCK)
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else str(value),
)
def test_a_planted_fault_is_caught(
    fault: Fault, tests: str, name: str, module_object: Path, engine_objects: Sequence[Path], tmp_path: Path
) -> None:
    objects = [*fault.plant(engine_objects, tmp_path), module_object]
    status, words = run_tests(objects, tmp_path, tests, name)
    assert status == 1, words
    assert "1 failed" in words, words
