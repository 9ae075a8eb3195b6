"""The engine's type stub says what the compiled module takes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastcascade
from fastcascade import _C

STUB = Path(fastcascade.__file__).with_name("_C.pyi")


def parameters(function: ast.FunctionDef) -> list[tuple[str, str, bool]]:
    """(kind, name, has a default) of every parameter."""
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [False] * (len(plain) - len(arguments.defaults)) + [True] * len(arguments.defaults)
    named = [(a.arg, d is not None) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [("any", a.arg, d) for a, d in zip(plain, defaults, strict=True)] + [
        ("keyword", *n) for n in named
    ]


def stub_functions() -> dict[str, ast.FunctionDef]:
    """By dotted name, every function and method of the stub."""
    found = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)}
    return found


def compiled(name: str) -> ast.FunctionDef:
    """The signature that pybind11 writes into the docstring."""
    target: object = _C
    for part in name.split("."):
        target = getattr(target, part)
    signature = str(target.__doc__).splitlines()[0]
    (function,) = ast.parse(f"def {signature}: ...").body
    assert isinstance(function, ast.FunctionDef)
    return function


@pytest.mark.parametrize("name", stub_functions())
def test_signatures_agree(name: str) -> None:
    assert parameters(stub_functions()[name]) == parameters(compiled(name))


def test_nothing_is_missing() -> None:
    methods = {f"Cascade.{name}" for name in vars(_C.Cascade) if not name.startswith("_")}
    functions = {name for name in vars(_C) if not name.startswith("_") and name != "Cascade"}
    assert methods | functions | {"Cascade.__init__"} == set(stub_functions())
