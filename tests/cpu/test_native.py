"""The engine without Python: sanitizers, fuzzing, machine code, allocations, instruction counts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import check_disassembly
import count_instructions
import driver
import fuzz
import pytest
from native import (
    COMPILER,
    EXTRA_PASS,
    MISSING_PIXELS,
    MISSING_TILE,
    NARROWED_AFFINITY,
    PART_TWICE,
    PATIENT_TEAM,
    WASTED_FIFTH,
    Fault,
    run,
)

from fastcascade import _C

pytestmark = COMPILER
INTEL = pytest.mark.skipif(
    dict(_C.instruction_sets())["avx2"] is not None,
    reason=f"avx2: {dict(_C.instruction_sets())['avx2']}",
)


# ---- fuzzing ----


@pytest.fixture(scope="module", params=["address", "thread"])
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fuzzer under a sanitizer."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = fuzz.FLAGS[request.param]
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}")
    status, words = run(["g++", *flags, empty, "-o", folder / "empty"])
    if status != 0:
        pytest.skip(f"this compiler has no {request.param} sanitizer: {words.strip()}")
    return driver.link_driver("fuzz", driver.compile_engine(folder, flags), flags)


def assert_agrees(fuzzer: Path, seconds: float, seed: int) -> None:
    status, words = run([fuzzer, str(seconds), str(seed)])
    assert status == 0, words
    assert "agree" in words


def test_sanitizers_find_nothing(sanitized: Path) -> None:
    assert_agrees(sanitized, 4, 1)


@pytest.mark.slow
def test_sanitizers_find_nothing_in_two_minutes(sanitized: Path) -> None:
    assert_agrees(sanitized, 120, 1000)


@pytest.mark.slow
def test_instruction_sets_agree_for_five_minutes(engine_objects: Sequence[Path]) -> None:
    assert_agrees(driver.link_driver("fuzz", engine_objects), 300, 1_000_000)


@pytest.mark.parametrize("fault", [MISSING_TILE, MISSING_PIXELS], ids=lambda fault: fault.name)
def test_fuzzer_finds_what_is_missing(fault: Fault, engine_objects: Sequence[Path], tmp_path: Path) -> None:
    fuzzer = driver.link_driver("fuzz", fault.plant(engine_objects, tmp_path))
    status, words = run([fuzzer, "10", "1"])
    assert status == 1, words
    assert "reproduce with" in words


# ---- machine code ----


@INTEL
def test_no_spills_and_no_vex_code_where_any_processor_must_run(engine_objects: Sequence[Path]) -> None:
    _needs("objdump")
    assert check_disassembly.all_faults(engine_objects) == []


@INTEL
def test_vex_code_is_found(tmp_path: Path) -> None:
    _needs("objdump")
    target = driver.compile_file(driver.SOURCE / "exit_head.cpp", tmp_path, [*driver.PACKAGE_FLAGS, "-mavx2"])
    assert any("VEX code outside" in fault for fault in check_disassembly.all_faults([target]))


@INTEL
def test_spills_are_found(tmp_path: Path) -> None:
    _needs("objdump")
    fault = Fault("too many rows", "isa/avx512_operations.inl", "kMr = 8", "kMr = 17", "avx512.cpp")
    objects = fault.plant([], tmp_path)
    assert any("spills vectors" in found for found in check_disassembly.all_faults(objects))


@INTEL
@pytest.mark.parametrize(
    ("file", "unit", "product", "other", "instruction"),
    [
        (
            "isa/bf16_avx512.cpp",
            "",
            "_mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x)",
            "_mm512_fmadd_ps(x, w, sum)",
            "vdpbf16ps",
        ),
        ("isa/int8_amx_tiles.inl", "int8_amx.cpp", 'asm volatile("tdpbusd ', 'asm volatile("# ', "tdpbusd"),
    ],
    ids=["bf16", "AMX"],
)
def test_kernels_that_multiply_otherwise_are_found(
    file: str, unit: str, product: str, other: str, instruction: str, tmp_path: Path
) -> None:
    _needs("objdump")
    objects = Fault("other products", file, product, other, unit).plant([], tmp_path)
    faults = check_disassembly.all_faults(objects)
    assert any(f"does not multiply by {instruction}" in found for found in faults)


@INTEL
def test_tiles_outside_their_kernels_are_found(tmp_path: Path) -> None:
    """Only the AMX kernels run after the check that the system lends the registers."""
    _needs("objdump")
    include = '#include "../generic/int8_all.inl"'
    tile = 'void stray_tile() { asm volatile("tilezero %tmm0"); }'
    fault = Fault("a tile", "isa/int8_avx512vnni.cpp", include, f"{include}\n{tile}")
    objects = fault.plant([], tmp_path)
    assert any("tiles outside" in found for found in check_disassembly.all_faults(objects))


# ---- helper threads ----

AFFINITY = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or not {0, 1} <= os.sched_getaffinity(0),
    reason="needs Linux and the processors 0 and 1",
)


@pytest.fixture(scope="module")
def affinity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("affinity")
    threads = driver.compile_file(driver.SOURCE / "threads.cpp", folder, driver.PACKAGE_FLAGS)
    return driver.link_driver("affinity", [threads])


@AFFINITY
@pytest.mark.parametrize(("answer", "changes"), [("granted", 2), ("refused", 1), ("shrunk", 3)])
def test_helpers_keep_their_processors(answer: str, changes: int, affinity: Path) -> None:
    status, words = run([affinity, answer])
    asked, helped, narrowed = (int(word) for word in re.findall(r"\d+", words))
    assert (status, narrowed) == (0, 0), words
    assert helped >= 20
    assert asked == changes * helped


@AFFINITY
def test_a_helper_that_keeps_its_narrowed_affinity_is_caught(tmp_path: Path) -> None:
    (threads,) = NARROWED_AFFINITY.plant([], tmp_path)
    status, words = run([driver.link_driver("affinity", [threads]), "granted"])
    assert status == 1, words


@pytest.fixture(scope="module")
def threads_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driver.compile_file(
        driver.SOURCE / "threads.cpp", tmp_path_factory.mktemp("threads"), driver.PACKAGE_FLAGS
    )


def test_a_team_runs_every_part_once(threads_object: Path, tmp_path: Path) -> None:
    """Whoever comes late or loses its processor; nobody waits for long."""
    team = driver.compile_file(driver.SOURCE / "team.cpp", tmp_path, driver.PACKAGE_FLAGS)
    program = driver.link_driver("phases", [team, threads_object])
    for threads in (1, 2, 3):
        status, words = run([program, str(threads)])
        assert status == 0, words


@pytest.mark.parametrize(
    ("fault", "symptom"),
    [(PART_TWICE, "runs twice"), (PATIENT_TEAM, "the others wait")],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_faults_of_a_team_are_caught(
    fault: Fault, symptom: str, threads_object: Path, tmp_path: Path
) -> None:
    (team,) = fault.plant([], tmp_path)
    status, words = run([driver.link_driver("phases", [team, threads_object]), "2"])
    assert status == 1, words
    assert symptom in words


# ---- counts ----


TOLERANCE = 0.02  # another libc's memcpy and exp make up to 0.8 %


@pytest.fixture(scope="module")
def workload(engine_objects: Sequence[Path]) -> Path:
    return driver.link_driver("workload", engine_objects)


def test_warm_calls_allocate_nothing(workload: Path, isa: str) -> None:
    for threads in (1, 2, 3):
        status, words = run([workload, isa, str(threads)])
        assert status == 0, words
        cases = [line.split()[:2] for line in words.splitlines()]
        assert len(cases) == 7
        assert [name for name, allocations in cases if allocations != "0"] == []


def _excess(workload: Path, isa: str) -> dict[str, float]:
    """By case, the instructions beyond the record's, as a share of it."""
    _needs("valgrind")
    record = json.loads(count_instructions.RECORD.read_text())
    if record["compiler"] != count_instructions.compiler():
        pytest.skip(f"counted with {record['compiler']}, here is {count_instructions.compiler()}")
    counts = count_instructions.count(workload, isa)
    assert counts.keys() == record["counts"][isa].keys()
    return {name: counts[name] / expected - 1 for name, expected in record["counts"][isa].items()}


@INTEL
@pytest.mark.parametrize("isa", count_instructions.ISAS)
def test_instruction_counts(workload: Path, isa: str) -> None:
    for case, excess in _excess(workload, isa).items():
        assert abs(excess) <= TOLERANCE, (
            f"{case} takes {excess:+.1%}; if meant, run tools/count_instructions.py"
        )


@INTEL
@pytest.mark.parametrize(("fault", "case"), [(WASTED_FIFTH, "cascade"), (EXTRA_PASS, "layout")])
def test_instruction_counts_find_waste(
    fault: Fault, case: str, engine_objects: Sequence[Path], tmp_path: Path
) -> None:
    spoilt = driver.link_driver("workload", fault.plant(engine_objects, tmp_path))
    assert _excess(spoilt, "avx2")[case] > TOLERANCE


@INTEL
def test_a_processor_without_the_instructions_is_told_so(workload: Path) -> None:
    """Valgrind's processor has no AVX-512."""
    _needs("valgrind")
    status, words = run(["valgrind", "-q", workload, "avx512", "1"])
    assert status == 2
    assert "it needs AVX-512 F, which this processor or its operating system lacks" in words


def _needs(tool: str) -> None:
    reason = driver.missing_tools(tool)
    if reason is not None:
        pytest.skip(reason)
