"""The HTML report: complete, closed to the outside, safe with hostile names, and it opens in a browser."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcascade.benchmarking.charts import Axis, Plot, thumbnail
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
from fastcascade.evaluation.diagnosis import Diagnosis, Disagreement, Reliability
from fastcascade.types import Evaluation

HOSTILE = "</script><script>alert(1)</script>\"'&$x_1$"


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


EVALUATION = Evaluation(0.93, 3.4e7, (0.7, 0.3), (0.97, 0.84), 200, 0)
CURVES = Curves(
    {"cascade": [replace(EVALUATION, mean_macs=1e7), EVALUATION]}, [(10_000_000, 0.9)], {"p": EVALUATION}
)


def disagreement(helped: bool) -> Disagreement:
    labels = (0, 1) if helped else (1, 0)
    return Disagreement(f"{HOSTILE}.png", np.full((4, 6, 3), 7, np.uint8), 0, labels, 0)


RELIABILITY = Reliability.of(np.array([0.95, 0.9, 0.6]), np.array([True, True, False]))
DIAGNOSIS = Diagnosis(
    confusion=np.array([[40, 3], [7, 50]]),
    after=(RELIABILITY, RELIABILITY),
    before=(RELIABILITY, RELIABILITY),
    helped=5,
    hurt=2,
    examples=(disagreement(True), disagreement(False)),
    classes=("cat", HOSTILE),
)


class Page(HTMLParser):
    """What is in a page: how often each tag, addresses, titles on hover, visible text, policy."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.styles: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.policy = ""
        self.text = ""
        self.hovers = ""
        self._open: list[str] = []
        self.feed(path.read_text())
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = {key: value or "" for key, value in attrs}
        self.tags[tag] += 1
        self.styles.update(f"{tag}.{style}" for style in facts.get("class", "").split())
        self.addresses += [facts[key] for key in ("src", "href", "srcset", "action") if key in facts]
        self.hovers += facts.get("title", "") + "\n"
        if facts.get("http-equiv") == "Content-Security-Policy":
            self.policy = facts["content"]
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "title" in self._open and "svg" in self._open:
            self.hovers += data + "\n"
        elif "style" not in self._open:
            self.text += data + "\n"


@pytest.fixture
def page(tmp_path: Path, measured: Benchmark) -> Page:
    peers = {"OpenVINO": {1: 900.0, 64: 4000.0}, HOSTILE: {64: 3000.0}}
    return Page(write_report(tmp_path, measured, EVALUATION, CURVES, DIAGNOSIS, peers, title=HOSTILE))


def test_page_asks_for_nothing_and_runs_nothing(page: Page, tmp_path: Path) -> None:
    assert "default-src 'none'" in page.policy
    assert "script" not in page.tags
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?:", (tmp_path / "report.html").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_names_from_outside_are_text(page: Page) -> None:
    assert page.text.count(HOSTILE) >= 6  # title, heading, stage, peer, class, table of stages
    assert page.hovers.count(HOSTILE) >= 4  # step, peer, class, image


def test_page_shows_the_lead_figures(page: Page) -> None:
    for figure, words in (
        ("93.00%", "accuracy on 200 images"),
        ("10,064", "images per second at batch 64"),
        ("2.0×", "as fast as the last exit on every image"),
        ("40%", "of the multiplications"),
        ("97%", "schedule efficiency"),
    ):
        assert re.search(rf"{re.escape(figure)}\n{words}", page.text)
    assert "Schedule efficiency is the part of a call's time" in page.text
    assert "operating point fast" in page.text
    assert "energy was not measured: no counter" in page.text


def test_a_busy_machine_is_mentioned(tmp_path: Path, measured: Benchmark, page: Page) -> None:
    assert "busy" not in page.text
    busy = Page(write_report(tmp_path / "busy", replace(measured, busy_share=0.4)))
    assert "other programs took 40% of the processors" in busy.text
    assert replace(measured, busy_share=0.05).busy_note is None


def test_stops_are_counted_right_and_wrong(page: Page) -> None:
    assert "70.0% stop here, 97.0% right" in page.text
    for hover in ("136 stop here, right", "4 stop here, wrong", "60 go on", "50 stop here, right"):
        assert hover in page.hovers


def test_every_step_that_multiplies_has_a_dot_with_its_name_and_kernels_are_folded(page: Page) -> None:
    multiplying = [step for step in STEPS if step.macs]
    for step in multiplying:
        assert page.hovers.count(f": {step.operation}; {step.kernel}; ") >= 2  # once a stage
    assert page.styles["circle.pale"] == 2 * len(multiplying)
    assert "Steps without multiplications" in page.text
    for kernel in {step.kernel for step in STEPS}:
        assert page.text.count(kernel) == 2
    assert page.tags["details"] == 4  # confusions, stages, batch sizes, kernels


def test_without_steps_the_roofline_holds_the_stages(tmp_path: Path, measured: Benchmark) -> None:
    stages = tuple(replace(stage, steps=()) for stage in measured.stages)
    page = Page(write_report(tmp_path, replace(measured, stages=stages)))
    assert "small: 400 GFLOP/s" in page.hovers
    assert "Kernels" not in page.text


def test_confusions_are_shares_of_the_true_class(page: Page) -> None:
    assert f"3 of 43 cat called {HOSTILE}" in page.hovers
    assert f"7 of 57 {HOSTILE} called cat" in page.hovers
    assert page.tags["td"] >= 4


def test_many_classes_are_a_list_of_pairs(tmp_path: Path, measured: Benchmark) -> None:
    confusion = np.eye(1000, dtype=np.int64) * 9
    confusion[3, 500] = 6
    many = replace(DIAGNOSIS, confusion=confusion, classes=None, examples=())
    page = Page(write_report(tmp_path, measured, EVALUATION, None, many))
    assert "Most confused classes" in page.text
    assert "3\n500\n6\n40.0%" in page.text
    assert "matrix" not in "".join(page.styles)


def test_reliability_is_shown_before_and_after_temperature(page: Page) -> None:
    assert (
        page.text.count(f"calibration error {RELIABILITY.error:.1%} before, {RELIABILITY.error:.1%} after")
        == 2
    )
    assert "before: confidence 95.0%, accuracy 100.0%, 33.3% of the images" in page.hovers
    assert "after: confidence 60.0%, accuracy 0.0%, 33.3% of the images" in page.hovers


def test_without_other_temperatures_reliability_is_shown_once(tmp_path: Path, measured: Benchmark) -> None:
    page = Page(write_report(tmp_path, measured, EVALUATION, None, replace(DIAGNOSIS, before=())))
    assert "before" not in page.text
    assert f"calibration error {RELIABILITY.error:.1%}" in page.text


def test_images_on_which_exits_disagree_are_embedded(page: Page) -> None:
    assert "5 images stop early with the right label" in page.text
    assert len(page.addresses) == 2
    for address in page.addresses:
        with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
            assert (image.size, image.getpixel((5, 3))) == ((6, 4), (7, 7, 7))
    assert f"exit 0: cat\nlast: {HOSTILE}" in page.text


def test_other_budgets_have_accuracy_and_predicted_speed(page: Page, measured: Benchmark) -> None:
    ms = 0.7 * measured.exit_ms[0] + 0.3 * measured.exit_ms[1]
    assert f"34.00\n93.00%\n{1e3 * 0.97 / ms:,.0f}" in page.text
    assert "small: 70%" in page.hovers


def test_without_labels_and_with_an_empty_last_stage(tmp_path: Path, measured: Benchmark) -> None:
    nobody = replace(measured.stages[1], images_in=0, images_out=0)
    path = write_report(tmp_path / "a", replace(measured, stages=(measured.stages[0], nobody)))
    assert "accuracy" not in Page(path).text
    unreached = replace(EVALUATION, exit_accuracy=(0.93, math.nan))
    Page(write_report(tmp_path / "b", measured, unreached))


def test_same_figures_give_the_same_file(tmp_path: Path, measured: Benchmark) -> None:
    first = write_report(tmp_path / "a", measured, EVALUATION, CURVES, DIAGNOSIS).read_bytes()
    assert first == write_report(tmp_path / "b", measured, EVALUATION, CURVES, DIAGNOSIS).read_bytes()


def test_an_existing_report_is_kept_unless_asked(tmp_path: Path, measured: Benchmark) -> None:
    path = write_report(tmp_path, measured)
    before = path.read_bytes()
    with pytest.raises(InvalidArgument, match="exists"):
        write_report(tmp_path, measured, EVALUATION)
    assert path.read_bytes() == before
    write_report(tmp_path, measured, EVALUATION, overwrite=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (97, 96), (200, 300), (1, 500), (224, 224)])
def test_a_thumbnail_is_a_small_png_of_the_image(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    data = base64.b64decode(thumbnail(pixels, "x").partition("base64,")[2].partition('"')[0])
    with Image.open(io.BytesIO(data)) as image:
        found = np.asarray(image)
    if max(shape) <= 96:
        assert (found == pixels).all()
    elif min(shape) > 1:
        assert max(found.shape) <= 96
        step = -(-max(shape) // 96)
        assert np.allclose(found[0, 0], pixels[:step, :step].mean((0, 1)), atol=1)


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (0, 1, False),
        (87.3, 93.4, False),
        (0, 1.3e6, False),
        (0.2, 9000, True),
        (9, 110, True),
        (1e-3, 1e9, True),
    ],
)
def test_ticks_lie_on_the_axis_and_are_few(low: float, high: float, log: bool) -> None:
    axis = Axis("x", low, high, log)
    ticks = axis.marks()
    assert 2 <= len(ticks) <= 13
    assert all(low <= tick <= high and 0 <= axis.percent(tick) <= 100 for tick in ticks)


def test_dots_lie_where_their_values_are() -> None:
    plot = Plot(Axis("x", 1, 100, log=True), Axis("y", 0, 4), "plot")
    plot.dot(10, 1, "c0", "ten & one")
    assert (
        '<circle class="c0" cx="50.00%" cy="75.00%" r="5.0"><title>ten &amp; one</title></circle>'
        in plot.svg()
    )


LABEL = re.compile(
    r'<text class="label" text-anchor="(end|start)" x="(.*?)%" y="(.*?)%" dx="(.*?)" dy="(.*?)">(.*?)</text>'
)


def label_boxes(svg: str, width: int, height: int) -> list[tuple[float, float, float, float]]:
    """(left, right, top, bottom) of each label in pixels, at 7.5 pixels per character."""
    boxes = []
    for anchor, *numbers, words in LABEL.findall(svg):
        x, y, dx, dy = map(float, numbers)
        near, base = x / 100 * width + dx, y / 100 * height + dy
        far = near + 7.5 * len(words) * (1 if anchor == "start" else -1)
        boxes.append((min(near, far), max(near, far), base - 11, base + 3))
    return boxes


def meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


@pytest.mark.parametrize("step", [0.0, 0.3, 1.0, 3.0])
def test_labels_of_close_dots_cover_neither_each_other_nor_a_dot(step: float) -> None:
    plot = Plot(Axis("x", 1, 100, log=True), Axis("y", 1, 100, log=True), "plot", 380)
    plot.label(100, 60, "60 GFLOP/s, matrix product", left=True, row=-1)
    dots = [(20 + step * i, 55 - step * i) for i in range(9)]
    for x, y in dots:
        plot.dot(x, y, "c0", "a step", 9)
    plot.labels((x, y, 9, f"conv 3×3 32→32 on 16×16, {x:.0f}%") for x, y in dots[::4])
    boxes = label_boxes(plot.svg(), 940, 380)
    assert len(boxes) == 4
    assert not any(meet(a, b) for a, b in itertools.combinations(boxes, 2))
    places = [(9.4 * plot.x.percent(x), 3.8 * (100 - plot.y.percent(y))) for x, y in dots]
    assert not any(meet(box, (x - 9, x + 9, y - 9, y + 9)) for box in boxes for x, y in places)
    narrow = label_boxes(plot.svg(), 300, 380)
    assert not any(meet(a, b) for a, b in itertools.combinations(narrow, 2))


def test_opens_in_a_browser(tmp_path: Path, measured: Benchmark) -> None:
    browsers = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
    browser = next((found for name in browsers if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(browsers)} is installed")
    path = write_report(tmp_path / "report", measured, EVALUATION, CURVES, DIAGNOSIS, title=HOSTILE)
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
