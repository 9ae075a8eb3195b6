"""Every block of Python or shell in the documents runs as printed, or says beside it why it does not.

The blocks of a page run in order, in one namespace, in a folder with CIFAR binaries of a few images, photos
and a saved cascade, and with the names that the pages take for granted. A comment
``<!-- not run: reason -->`` on the line before a block excuses it.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import shlex
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastcascade as fc
from fastcascade import cli
from fastcascade.model.resnet import resnet_cifar

ROOT = Path(__file__).parents[1]
PAGES = sorted(["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
SLOW = ("docs/tutorial.md", "docs/report.md", "docs/operating-points.md", "docs/multi-exit.md")
COMMANDS = ("fastcascade ", "make ", "pip ", "python ", "torchrun ", "uvicorn ", "curl ", "$ ")


class Block(NamedTuple):
    """A block of code: its first line's number, its language, and why it is not run, if it is not."""

    line: int
    language: str
    code: str
    reason: str | None


def blocks(text: str) -> list[Block]:
    """Fenced blocks of Python and shell, and indented blocks of commands."""
    found = []
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        start, line = i, lines[i]
        language = ""
        if line.startswith("```"):
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith("```"))
            code, language = lines[i + 1 : end], line[3:].strip()
            i = end
        elif line.startswith("    ") and (i == 0 or not lines[i - 1].strip() or _is_comment(lines[i - 1])):
            end = next((j for j in range(i, len(lines)) if not lines[j].startswith("    ")), len(lines))
            code, i = [each[4:] for each in lines[i:end]], end - 1
            if code[0].startswith(COMMANDS):
                language = "console"
            elif code[0].startswith(("with ", "import ", "from ")):
                language = "python"
        i += 1
        if language in ("python", "console", "shell", "bash", "sh"):
            before = lines[start - 1] if start else ""
            reason = before[len("<!-- not run:") : -len("-->")].strip() if _is_comment(before) else None
            found.append(Block(start + 1, language, "\n".join(code), reason))
    return found


def _is_comment(line: str) -> bool:
    return line.startswith("<!-- not run:")


def test_blocks_are_found_with_their_reasons() -> None:
    fenced = "a\n```python\nx = 1\n```\n<!-- not run: slow -->\n```console\nmake all\n```\n"
    text = f"{fenced}\n    fastcascade x\n\n    text\n"
    assert blocks(text) == [
        Block(2, "python", "x = 1", None),
        Block(6, "console", "make all", "slow"),
        Block(10, "console", "fastcascade x", None),
    ]


def test_no_excuse_is_empty() -> None:
    for page in PAGES:
        for block in blocks((ROOT / page).read_text()):
            assert block.reason is None or len(block.reason) > 10, f"{page}:{block.line}"


def small(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())


def write_files(folder: Path) -> None:
    """CIFAR-10 of 60 + 80 images, six photos, an array, a configuration that is not read."""
    rng = np.random.default_rng(0)
    cifar = folder / "data" / "cifar-10-batches-bin"
    cifar.mkdir(parents=True)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (80 if name.startswith("test") else 40, 3073), np.uint8)
        records[:, 0] = np.arange(len(records)) % 10
        (cifar / name).write_bytes(records.tobytes())
    (cifar / "batches.meta.txt").write_text("\n".join(CLASSES))
    (folder / "photos").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "photos" / f"{i}.png")
    np.save(folder / "images.npy", rng.integers(0, 256, (100, 32, 32, 3), np.uint8))


def names() -> dict[str, Any]:
    """What pages take for granted; also saves a cascade in run/model."""
    torch.manual_seed(0)
    cascade = fc.Cascade(
        [fc.Stage(resnet_cifar(8, width=4), name="small"), fc.Stage(resnet_cifar(8), name="large")],
        fc.MLPSelector(),
        num_classes=10,
        input_shape=(3, 32, 32),
        preprocess=fc.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)),
        classes=CLASSES,
    )
    for name in ("default", "fast", "safe"):
        cascade.operating_points[name] = fc.OperatingPoint(name, (0.0,), {}, 0.5, 1e6, (0.5, 0.5), 7)
    cascade.save("run/model")
    train, test = (fc.load_data("cifar10:data", split) for split in ("train", "test"))
    test = test.take(range(64))
    images = torch.from_numpy(np.array(test.images))
    fast = fc.compile(cascade)
    # Labels that the last exit gives, so that every accuracy can be reached.
    held_out = (images, fast(images, [float("inf")]).label)
    return {
        "fc": fc, "np": np, "torch": torch, "cascade": cascade, "fast": fast, "train": train,
        "val": train.take(range(100, 160)), "test": test, "held_out": held_out,
        "unlabelled": (images, None), "images": images.permute(0, 3, 1, 2).contiguous(), "image": images[0],
    }  # fmt: skip


def pool() -> dict[str, Any]:
    """Three trained classifiers, for the page on selectors."""
    torch.manual_seed(0)
    labels = torch.arange(300) % 10
    logits = torch.randn(3, 300, 10) + torch.tensor([2.0, 4.0, 6.0])[:, None, None] * nn.functional.one_hot(
        labels, 10
    )
    networks = [small(4), small(8), small(16)]
    return {
        "logits": logits,
        "labels": labels,
        "macs": [1e6, 1e7, 4e7],
        "networks": networks,
        "names": list("abc"),
    }


async def _finish(result: Awaitable[object]) -> None:
    await result


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] == "fastcascade", f"{line!r} cannot run here; excuse it with <!-- not run: reason -->"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr("warnings.showwarning", None)  # main sets it; pytest wants its own back
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0, line


@pytest.mark.filterwarnings("ignore")  # a few noisy images are too few for temperatures and thresholds
@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in PAGES])
def test_code_runs_as_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [block for block in blocks((ROOT / page).read_text()) if block.reason is None]
    if not todo:
        return
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    known = names()
    if page == "docs/selection.md":
        known |= pool()
    for block in todo:
        if block.language == "python":
            code = compile("\n" * block.line + block.code, page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, True)
            result = eval(code, known)
            if inspect.isawaitable(result):
                asyncio.run(_finish(result))
        else:
            for line in block.code.splitlines():
                run_command(line, monkeypatch)
