"""Commands that prepare work: ``doctor`` says what runs on this machine, ``download`` fetches data sets."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from fastcascade.text import plain, printable

__all__ = ["OPTIONAL", "doctor", "download"]

OPTIONAL = {
    "pyarrow": "Parquet",
    "Pillow": "image files",
    "simplejpeg": "faster decoding of JPEG",
    "matplotlib": "pictures of the cost–accuracy curve",
    "onnx": "ONNX files, read and written",
    "triton": "the triton backend",
    "cupy": "the cuda backend",
    "cuda-bindings": "torch stages on the GPU without reading a count back",
}
"""Package → feature that needs it."""


def doctor() -> None:
    """Print versions, the CPU, each backend or why it cannot run, and missing optional packages."""
    import torch

    from fastcascade.backends.registry import NAMES, load_backend

    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"fastcascade {version('fastcascade')}, Python {platform.python_version()}, {platform.platform()}"
    )
    isa = torch.backends.cpu.get_cpu_capability()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU with {isa}")
    console.print(plain(f"bf16: {_bf16_state()}"))
    for variable in ("FASTCASCADE_BACKEND", "FASTCASCADE_ISA", "FASTCASCADE_STAGES"):
        if variable in os.environ:
            console.print(plain(f"{variable}={os.environ[variable]} is set and overrides the choice"))
    backends = Table("backend", "state", title="backends, in the order in which auto tries them")
    for name in NAMES:
        backends.add_row(name, plain(load_backend(name).unavailable_reason() or "ready"))
    packages = Table("package", "version", "needed for", title="optional packages")
    for name, use in OPTIONAL.items():
        packages.add_row(name, _version(name) or "missing", use)
    console.print(backends)
    console.print(packages)


def _bf16_state() -> str:
    """Whether the engine can run in bf16, or why not."""
    try:
        from fastcascade import _C

        return _C.bf16_refusal() or "ready"
    except (ImportError, ValueError) as error:
        return str(error)


def _version(package: str) -> str | None:
    """Installed version; cupy's packages have the CUDA version in their name."""
    for name in (package, f"{package}-cuda13x", f"{package}-cuda12x"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def download(
    name: Annotated[Literal["cifar10", "cifar100"], typer.Argument(help="which data set")],
    directory: Annotated[Path, typer.Argument(help="destination directory")],
    url: Annotated[str | None, typer.Option(help="mirror of the official archive")] = None,
) -> None:
    """Download a data set from its home page or a mirror, verify it and print its path."""
    from fastcascade.data.archives import download as fetch

    print(printable(str(fetch(name, directory, url))))
