"""The installed package, and the poisoned memory that the other tests rely on."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import torch

import fastcascade


def test_uninitialised_memory_is_poisoned() -> None:
    """Reading uninitialised memory gives NaN or a huge integer, so that tests detect it."""
    assert torch.empty(1000).isnan().all()
    assert torch.empty_like(torch.ones(1000)).isnan().all()
    assert torch.ones(1000).new_empty(1000).isnan().all()
    assert (torch.empty(1000, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_version_is_the_installed_one() -> None:
    assert fastcascade.__version__ == importlib.metadata.version("fastcascade")


def test_constraints_pin_every_direct_dependency() -> None:
    """constraints.txt pins every dependency, so that an installation is reproducible."""
    pinned = set(
        re.findall(
            r"^([a-z0-9-]+)==", Path(__file__).parents[1].joinpath("constraints.txt").read_text(), re.M
        )
    )
    optional = {"triton", "cupy-cuda13x", "fastcascade"}  # torch chooses triton; cupy needs a GPU
    for requirement in importlib.metadata.requires("fastcascade") or []:
        name = re.split(r"[^A-Za-z0-9-]", requirement)[0].lower()
        assert name in pinned | optional, f"{requirement} is not pinned in constraints.txt"


def test_import_is_light_and_needs_no_optional_package() -> None:
    """``import fastcascade`` loads neither an extra nor a GPU package."""
    code = "import sys, fastcascade; print([m for m in sys.argv[1:] if m in sys.modules])"
    names = ["pyarrow", "PIL", "matplotlib", "triton", "cupy", "typer"]
    run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
