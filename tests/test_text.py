"""Names from outside reach terminals and pictures as text, whatever they contain."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

import fastcascade as fc
from fastcascade.benchmarking.report import write_report
from fastcascade.benchmarking.tables import bench_tables
from fastcascade.evaluation.curve import cost_accuracy_curves, plot_curves
from fastcascade.text import plain, plot_label, printable

NAMES = [
    r"$\frac$",
    "[/x]",
    "[red]fast",
    "$",
    "_hidden",
    "a\x1b[2Jb",
    "two\nlines",
    "back\\",
    "\udcff",
    "a\u202eb",
]


def rendered(*things: object) -> str:
    file = io.StringIO()
    Console(file=file, width=400, color_system=None).print(*things)
    return file.getvalue()


@given(st.text())
def test_plain_text_survives_rich_and_sends_no_control_character(name: str) -> None:
    table = Table("name")
    table.add_row(plain(name))
    text = rendered(table, plain(name))
    assert not any(ord(c) < 32 and c != "\n" for c in text)
    text.encode()


@pytest.mark.parametrize("name", ["[/x]", "[red]fast", "back\\", "$", ":smile:"])
def test_what_looks_like_markup_is_shown_as_it_is(name: str) -> None:
    assert name in rendered(plain(name))


@pytest.mark.parametrize("name", NAMES)
def test_messages_keep_lines_but_no_control_characters(name: str) -> None:
    assert all(c == "\n" or ord(c) >= 32 for c in printable(name))
    printable(name).encode()


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_drawn_as_they_are(name: str) -> None:
    figure = Figure()
    (line,) = figure.subplots().plot([0, 1], label=plot_label(name))
    legend = figure.axes[0].legend()
    figure.savefig(io.BytesIO(), format="png")
    assert line.get_label() == plot_label(name)
    (text,) = legend.get_texts()
    shown, is_math = text._preprocess_math(text.get_text())  # type: ignore[attr-defined]
    assert not is_math
    assert shown.lstrip() == printable(name).replace("\n", "�")


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", [r"$\frac$", "[/x]", "_\x1b[2J"])
def test_tables_pictures_and_reports_take_any_name(name: str, tmp_path: Path) -> None:
    stages = [fc.Stage(network(4), name=name), fc.Stage(network(8), name=f"{name} 2")]
    cascade = fc.Cascade(stages, fc.MLPSelector(), 3, (3, 4, 4), classes=[name, "b", "c"])
    cascade.operating_points[name] = fc.OperatingPoint(name, (0.0,), {}, 0.5, 1e3, (0.5, 0.5), 7)
    images, labels = torch.randn(40, 3, 4, 4), torch.arange(40) % 3
    curves = cost_accuracy_curves(cascade, (images, labels))
    for ending in ("png", "svg"):
        plot_curves(curves, tmp_path / f"curve.{ending}", title=name)
    measured = fc.benchmark(cascade, (images, labels), batches=[8], rounds=1, seconds=0.01)
    assert printable(name) in rendered(*bench_tables(measured))
    page = write_report(tmp_path / "report", measured, None, curves, title=name)
    assert "\x1b" not in fc.compile(cascade).describe() + page.read_text()
