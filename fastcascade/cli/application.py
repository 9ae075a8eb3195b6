"""The ``fastcascade`` command: the list of its sub-commands, and how one ends."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer

from fastcascade.cli.environment import doctor, download
from fastcascade.cli.measurement import bench, evaluate, report
from fastcascade.cli.models import calibrate, choose, export, inspect, quantize, train
from fastcascade.cli.output import say
from fastcascade.cli.prediction import predict
from fastcascade.errors import FastCascadeError

__all__ = ["app", "main"]

COMMANDS: dict[Callable[..., None], str] = {
    train: "examples/cifar10/config.toml cifar10:data --out run/",
    predict: "model/ photos/ -o predictions/",
    evaluate: "model/ cifar10:data --curve curve.png",
    calibrate: "model/ cifar10:data --split train --rows 47500: --name fast --budget-macs 2e7",
    bench: "model/ npz:test-images.npz --batch 1,256 --threads 1,2 --peers",
    report: "model/ npz:test-images.npz --out report/",
    inspect: "model/",
    quantize: "model/ cifar10:data --split train --rows 47500: --out int8/",
    export: "model/ --onnx exported/",
    choose: "pool.npz --budget 3e7",
    doctor: "",
    download: "cifar10 data/",
}
"""Every command, in the order of ``--help``, with the arguments of the example that its help shows."""

app = typer.Typer(
    help="Cascades of image classifiers with learned early exit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

for command, example in COMMANDS.items():
    app.command(epilog=f"Example: fastcascade {command.__name__} {example}".rstrip())(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastcascade {version('fastcascade')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None:
    """Cascades of image classifiers with learned early exit."""


def main() -> None:
    """Entry point of the ``fastcascade`` command."""
    warnings.showwarning = lambda message, *_, **__: say("warning:", str(message))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows "?" for "×"
    try:
        status = _run()
        sys.stdout.flush()
    except FastCascadeError as error:
        status = _fail(str(error))
    except BrokenPipeError:  # the reader, such as head, has enough
        status = 1
    except OSError as error:
        status = _fail(_reason(error))
    _discard_output()
    sys.exit(status)


def _run() -> int:
    """Run a command; returns its exit status."""
    try:
        app(args=["--ray=local" if word == "--ray" else word for word in sys.argv[1:]])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _fail(message: str) -> int:
    with contextlib.suppress(OSError):  # standard error may be full, too
        say("error:", message)
    return 1


def _reason(error: OSError) -> str:
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return f"cannot write to standard output: {error.strerror}"
    return str(error)


def _discard_output() -> None:
    """Drop output that cannot be written; Python would try again at exit and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
