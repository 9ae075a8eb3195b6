"""The HTML report: complete, closed to the outside, safe with hostile names, and it opens in a browser."""

from __future__ import annotations

import base64
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastcascade.benchmarking.pacing import PATTERNS
from fastcascade.benchmarking.report import write_report
from fastcascade.benchmarking.results import (
    BatchTiming,
    Benchmark,
    PacedTiming,
    Spread,
    StageTiming,
    StepTiming,
    WhatIf,
)
from fastcascade.benchmarking.torch_peaks import Peaks
from fastcascade.errors import InvalidArgument
from fastcascade.evaluation.curve import Curves
from fastcascade.types import Evaluation

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

HOSTILE = "</script><script>alert(1)</script>\"'&$x_1$"
SVG = "{http://www.w3.org/2000/svg}"


def spread(value: float) -> Spread:
    return Spread(value, 0.9 * value, 1.1 * value)


def step(operation: str, kernel: str, macs: int) -> StepTiming:
    return StepTiming(operation, kernel, macs, 1e5, spread(1e-2), 2e-4 * macs, 10.0)


STEPS = (
    step("read image -> (3, 32, 32)", "load_f32", 0),
    step("conv 3x3 (3, 32, 32) + relu -> (16, 32, 32)", "conv_direct_f32", 442_368),
    step("conv 3x3 (16, 32, 32) + relu -> (16, 32, 32)", "conv3x3_winograd_f32", 2_359_296),
    step("conv 3x3 (16, 32, 32) + relu -> (16, 32, 32)", "conv3x3_winograd_f32", 2_359_296),
    step("average pool 32x32 (16, 32, 32) -> (16, 1, 1)", "pool_average_f32", 0),
)


def stage(name: str, images_in: int, images_out: int, macs: int) -> StageTiming:
    return StageTiming(
        name=name,
        macs=macs,
        images_in=images_in,
        images_out=images_out,
        batch=64,
        ms_per_image=spread(macs / 2e8),
        exit_ms_per_image=spread(1e-4 if images_out else 0.0),
        ms=images_in * macs / 2e8,
        images_per_s=2e11 / macs,
        gflops=400.0,
        gflops_share=1.7,
        bytes_per_image=2e4,
        bandwidth_share=0.02,
        steps=STEPS,
    )


def batch(size: int) -> BatchTiming:
    return BatchTiming(
        batch=size,
        batches=10,
        images_per_s=spread(1e4 + size),
        latency_ms={"p50": 1.0, "p90": 1.2, "p95": 1.3, "p99": 2.0},
        calls=100,
        schedule_efficiency=spread(0.97),
        stages_ms_per_image=spread(5e-2),
        exits_ms_per_image=spread(1e-4),
        compaction_ms_per_image=spread(1e-3),
        idle_ms_per_image=spread(2e-3),
        dense_images_per_s=spread(5e3),
        saving=0.93,
    )


@pytest.fixture
def measured() -> Benchmark:
    return Benchmark(
        machine={"cpu": "Some CPU", "isa": "avx512"},
        backend="cpu",
        precision="fp32",
        images=100,
        compile_s=0.01,
        first_call_ms=3.0,
        max_error=1e-6,
        instrumentation_share=0.001,
        peaks=Peaks(230.0, 30.0),
        stages=(stage("small", 100, 30, 10_000_000), stage(HOSTILE, 30, 0, 80_000_000)),
        batches=(batch(1), batch(8), batch(64)),
        paced=tuple(
            PacedTiming(pattern.name, 20, {"p50": 1.0 + i, "p95": 2.0 + i, "p99": 3.0 + i})
            for i, pattern in enumerate(PATTERNS)
        ),
        threads={},
        mac_share=0.4,
        what_if=(WhatIf("operating point fast", (0.9, 0.1), 2e7, 1.5e4),),
        peers={"PyTorch, the cascade": {1: spread(100.0), 8: spread(700.0), 64: spread(2000.0)}},
        energy_mj_per_image=None,
        energy_note="energy was not measured: no counter",
    )


EVALUATION = Evaluation(0.93, 3.4e7, (0.7, 0.3), (0.97, 0.84), 100, 0)
CURVES = Curves(
    {"cascade": [replace(EVALUATION, mean_macs=1e7), EVALUATION]}, [(10_000_000, 0.9)], {"p": EVALUATION}
)


class Page(HTMLParser):
    """What is in a page: tags, addresses, visible text, policy."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.policy = ""
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.addresses += [facts[key] for key in ("src", "href", "srcset", "action") if key in facts]
        if facts.get("http-equiv") == "Content-Security-Policy":
            self.policy = facts["content"]

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def sources(self) -> list[str]:
        """The pictures as SVG."""
        prefix = "data:image/svg+xml;base64,"
        assert all(address.startswith(prefix) for address in self.addresses)
        return [base64.b64decode(address.removeprefix(prefix)).decode() for address in self.addresses]

    @property
    def pictures(self) -> list[ElementTree.Element]:
        """The pictures, parsed."""
        return [ElementTree.fromstring(source) for source in self.sources]


@pytest.fixture
def page(tmp_path: Path, measured: Benchmark) -> Page:
    peers = {"OpenVINO": {1: 900.0, 64: 4000.0}, HOSTILE: {64: 3000.0}}
    path = write_report(tmp_path, measured, EVALUATION, CURVES, peers, title=HOSTILE)
    return Page(path.read_text())


def test_page_asks_for_nothing_and_runs_nothing(page: Page) -> None:
    assert "default-src 'none'" in page.policy
    assert "script" not in page.tags
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import", page.text)


def test_names_from_outside_are_text(page: Page) -> None:
    assert page.text.count(HOSTILE) >= 3  # title, heading, table of stages
    assert not any(element.tag == f"{SVG}script" for svg in page.pictures for element in svg.iter())


def test_page_shows_the_figures(page: Page) -> None:
    for shown in (
        "accuracy 93.00% on 100 images",
        "10,064 images/s at batch 64",
        "2.0 times",
        "40% of its MACs",
    ):
        assert shown in page.text
    assert "operating point fast" in page.text
    assert "energy was not measured: no counter" in page.text
    assert len(page.pictures) == 5


ROOFLINE = -2
"""Place among the pictures."""


def points(page: Page) -> int:
    groups = page.pictures[ROOFLINE].iter(f"{SVG}g")
    return sum(element.get("id", "").startswith("PathCollection") for element in groups)


def test_every_step_has_a_point_on_the_roofline_and_its_kernel_a_row_and_a_colour(page: Page) -> None:
    assert points(page) == 2 * len(STEPS)
    for kernel in {step.kernel for step in STEPS}:
        assert page.text.count(kernel) == 2  # once a stage
        assert f"<!-- {kernel} -->" in page.sources[ROOFLINE]


def test_without_steps_the_roofline_holds_the_stages(tmp_path: Path, measured: Benchmark) -> None:
    stages = tuple(replace(stage, steps=()) for stage in measured.stages)
    page = Page(write_report(tmp_path, replace(measured, stages=stages)).read_text())
    assert points(page) == 0
    assert "Kernels" not in page.text


def test_writes_a_png_for_every_picture(tmp_path: Path, measured: Benchmark) -> None:
    write_report(tmp_path, measured, EVALUATION, CURVES)
    names = ["curve", "flow", "report", "roofline", "throughput", "time"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == names
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_same_figures_give_the_same_files(tmp_path: Path, measured: Benchmark) -> None:
    first = write_report(tmp_path / "a", measured, EVALUATION, CURVES).read_bytes()
    assert first == write_report(tmp_path / "b", measured, EVALUATION, CURVES).read_bytes()


def test_without_labels_and_with_an_empty_last_stage(tmp_path: Path, measured: Benchmark) -> None:
    nobody = replace(measured.stages[1], images_in=0, images_out=0)
    page = Page(
        write_report(tmp_path / "a", replace(measured, stages=(measured.stages[0], nobody))).read_text()
    )
    assert len(page.pictures) == 4
    assert "accuracy" not in page.text
    unreached = replace(EVALUATION, exit_accuracy=(0.93, math.nan))
    write_report(tmp_path / "b", measured, unreached)


def test_an_existing_report_is_kept_unless_asked(tmp_path: Path, measured: Benchmark) -> None:
    path = write_report(tmp_path, measured)
    before = path.read_bytes()
    with pytest.raises(InvalidArgument, match="exists"):
        write_report(tmp_path, measured, EVALUATION)
    assert path.read_bytes() == before
    write_report(tmp_path, measured, EVALUATION, overwrite=True)
    assert path.read_bytes() != before


def test_opens_in_a_browser(tmp_path: Path, measured: Benchmark) -> None:
    browsers = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
    browser = next((found for name in browsers if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(browsers)} is installed")
    path = write_report(tmp_path / "report", measured, EVALUATION, CURVES, title=HOSTILE)
    screenshot = tmp_path / "page.png"
    # Every address outside the machine leads nowhere, so a request would be logged as failed.
    options = ["--headless", "--disable-gpu", "--no-sandbox", "--enable-logging=stderr", "--v=0"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    run = subprocess.run(
        [browser, *options, f"--screenshot={screenshot}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert screenshot.stat().st_size > 10_000
    assert "CONSOLE" not in run.stderr
