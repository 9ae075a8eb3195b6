"""The page of the networks of torchvision and timm: what counts as lowered, wrong and failed."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # at the end: fastcascade itself stays the installed one

from bench import coverage_page
from bench.architectures import ARCHITECTURES, ATTENTION, build, sample_images
from bench.coverage import RESULTS
from bench.tables import write_tables

NAMES = [name for family in ARCHITECTURES.values() for name in family]


def entry(**changes: Any) -> dict[str, Any]:
    """A network on the engine, with changes."""
    usual = {
        "macs": 10**9,
        "plan_s": 1.0,
        "compile_s": 0.5,
        "operations": {"Conv2d": 3},
        "opaque_reason": None,
        "isa": "avx2",
        "error": 3e-5,
        "torch_error": 2e-5,
        "plan_error": 1e-6,
        "when": "2026-01-01T00:00:00",
    }
    return usual | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "operations on the engine, avx2"),
        ({"isa": "torch"}, "operations in torch"),
        ({"opaque_reason": "operator sin", "plan_error": None}, "opaque: operator sin"),
        ({"error": 3e-4}, "wrong: error 3.0e-04, torch's 2.0e-05"),
        ({"plan_error": 3e-4}, "wrong: error 3.0e-05, torch's 2.0e-05"),
        ({"error": float("nan")}, "wrong: error nan, torch's 2.0e-05"),
        ({"failed": "it ran out of memory"}, "failed: it ran out of memory"),
    ],
)
def test_verdicts(changes: dict[str, Any], words: str) -> None:
    assert coverage_page.verdict(entry(**changes)) == words


def test_the_summary_counts_every_network_once() -> None:
    entries = [
        entry(),
        entry(isa="torch"),
        entry(opaque_reason="operator sin", isa="torch"),
        entry(error=1.0),
        {"failed": "crashed"},
    ]
    machine = {"cpu": "Some CPU", "threads": 2}
    results = {"machine": machine, "networks": dict(zip(NAMES, entries, strict=False))}
    table = coverage_page.summary_table(results)
    rows = dict(re.findall(r"^\| ([a-zA-Z ,]+) \| (.+) \|$", table, re.MULTILINE))
    assert rows["convolutional networks"] == "5"
    assert rows["lowered to operations"] == "2 (40%)"
    assert [rows[name] for name in ("opaque", "wrong", "failed")] == ["1", "1", "1"]
    assert [rows[name] for name in ("of these, on the CPU engine", "of these, in torch")] == ["1", "1"]
    assert "operator sin | 1" in coverage_page.reasons_table(results)


def test_speeds_stand_beside_the_fastest_peer_that_ran() -> None:
    speeds = {"fastcascade": 300.0, "OpenVINO": 200.0, "ONNX Runtime": "crashed"}
    results = {"networks": {NAMES[0]: entry(speed={"16": speeds}), NAMES[1]: entry()}}
    table = coverage_page.speed_table(results)
    assert "| 16 | 300 | 200 (OpenVINO) | 1.50 |" in table
    assert "Not measured: 1 of 2 networks." in table


def test_every_table_has_its_place_and_the_page_holds_the_stored_figures() -> None:
    text = coverage_page.PAGE.read_text()
    assert set(re.findall(r"<!-- table: (\S+) -->", text)) == set(coverage_page.TABLES)
    stored = json.loads(RESULTS.read_text())
    assert text == write_tables(text, stored, coverage_page.TABLES), "make coverage writes its tables"


def test_networks_are_listed_once() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 60
    assert not set(NAMES) & set(ATTENTION)


@pytest.mark.slow
def test_networks_have_outputs_that_depend_on_the_image() -> None:
    if importlib.util.find_spec("timm") is None:  # build() imports it after preparing for torchvision
        pytest.skip("timm is not installed")
    network, shape = build("timm:lcnet_100")
    logits = network(sample_images(4, shape, seed=1))
    assert 1 < float(logits.std(0).mean()) < 10
    again = build("timm:lcnet_100")[0].state_dict()
    assert all(torch.equal(values, again[name]) for name, values in network.state_dict().items())
