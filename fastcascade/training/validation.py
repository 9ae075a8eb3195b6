"""Checks of settings against their type hints, by pydantic, with errors in this library's words.

Separate from the settings themselves, so that ``import fastcascade`` does not import pydantic.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from fastcascade.errors import InvalidArgument

__all__ = ["STRICT", "check_fields", "validated"]

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

Model = TypeVar("Model", bound=BaseModel)

_SHOWN = 60
"""Characters of a value in an error message."""


def validated(model: type[Model], document: Mapping[str, Any], source: str) -> Model:
    """An instance of a pydantic model from the content of a TOML or JSON file.

    Args:
        source: the name of the file, quoted in errors.

    Raises:
        InvalidArgument: one line per mistake, ``source: key is value; expected …``.

    Example:
        >>> class Table(BaseModel):
        ...     model_config = STRICT
        ...     seed: int
        >>> validated(Table, {"sead": 1, "seed": "x"}, "run.toml")
        Traceback (most recent call last):
        fastcascade.errors.InvalidArgument: run.toml: seed is 'x'; expected a valid integer
        run.toml: unknown key sead; did you mean seed?
    """
    try:
        # Strict mode takes lists for tuples in JSON only. Dates become strings, which no field accepts.
        return model.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        raise InvalidArgument(_explain(error, model, document, source)) from error


def check_fields(settings: Any) -> None:
    """Check the fields of a dataclass instance against their type hints.

    Raises:
        InvalidArgument: lists every mistake.
    """
    cls = type(settings)
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    model = _model_of(cls)
    try:
        model.model_validate(values)
    except ValidationError as error:
        raise InvalidArgument(_explain(error, model, values, cls.__name__)) from error


@lru_cache
def _model_of(cls: type) -> type[BaseModel]:
    # The dataclass itself cannot be the schema: pydantic would call its __post_init__, which calls this.
    hints = get_type_hints(cls, include_extras=True)
    fields: dict[str, Any] = {field.name: (hints[field.name], ...) for field in dataclasses.fields(cls)}
    return create_model(cls.__name__, __config__=STRICT, **fields)


##### Error messages


def _explain(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any], source: str) -> str:
    """One line per key; each alternative of a union reports an error of its own for it."""
    lines: dict[str, list[str]] = {}
    for details in error.errors(include_url=False):
        kind = details["type"]
        location, value = _locate(details["loc"], values)
        line, expectation = f"{_key(location)} is {_short(value)}; expected ", _expectation(details)
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            line, expectation = _unknown_key(model, location), ""
        elif kind in ("missing", "missing_argument"):
            line, expectation = f"{_key(details['loc'])} is missing", ""
        elif kind == "value_error":  # of a validator in this library
            what = _key(location) if isinstance(value, Mapping) else f"{_key(location)} is {_short(value)}"
            line, expectation = f"{what}: {details['ctx']['error']}", ""
        alternatives = lines.setdefault(line, [])
        if expectation not in alternatives:
            alternatives.append(expectation)
    return "\n".join(f"{source}: {line}{' or '.join(parts)}" for line, parts in lines.items())


def _locate(location: tuple[int | str, ...], values: Any) -> tuple[tuple[int | str, ...], Any]:
    """The part of an error's location that exists in the input, and the value there.

    Pydantic appends the name of the alternative that failed where a type is a union.
    """
    for depth, step in enumerate(location):
        inside = isinstance(values, Mapping) and step in values
        inside = inside or (isinstance(values, list | tuple) and isinstance(step, int) and step < len(values))
        if not inside:
            missing = isinstance(values, Mapping)
            return location[: depth + 1] if missing else location[:depth], values
        values = values[step]
    return location, values


def _key(location: tuple[int | str, ...]) -> str:
    """``("a", "b", 0)`` → ``a.b[0]``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).lstrip(".")


def _unknown_key(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    known = _known_keys(model, location[:-1])
    close = get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(known))}"
    return f"unknown key {_key(location)}; {hint}"


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys of the table at a location, from the model's JSON schema."""
    schema = model.model_json_schema()
    node = schema
    for step in location:
        node = node.get("properties", {}).get(step) or node.get("additionalProperties") or {}
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return list(node.get("properties", {}))


_EXPECTATIONS = {
    "dataclass_type": "a table",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "model_type": "a table",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
}
"""Pydantic's type of error → what was expected, where its own message does not say so in a few words."""


def _expectation(details: ErrorDetails) -> str:
    if details["type"] in _EXPECTATIONS:
        return _EXPECTATIONS[details["type"]].format(**details.get("ctx", {}))
    text = details["msg"].removeprefix("Input should be ")
    return text[:1].lower() + text[1:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
