"""Dataclasses as JSON and back. The fields and their types define the format.

JSON holds the name of a tensor; the tensor itself goes into a separate mapping. Infinity and NaN are text. A
subclass of a dataclass is tagged with its name. Fields marked ``NOT_SAVED`` are omitted, and have their
default after loading. Decoding checks every value against the type of its field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType, UnionType
from typing import Any, Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints

from torch import Tensor

from fastcascade.errors import FileFormatError

__all__ = ["ADDED", "NOT_SAVED", "Reader", "encode"]

NOT_SAVED = MappingProxyType({"saved": False})
"""``field(metadata=NOT_SAVED)`` omits a field from files."""

ADDED = MappingProxyType({"added": True})
"""``field(default=…, metadata=ADDED)`` may be missing from files written before the field existed."""

_MAX_INT = 2**53
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_TAG = "op"


def encode(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """A value as JSON; its tensors are added to ``tensors``, named by their path.

    Example:
        >>> from fastcascade.types import Normalize
        >>> encode(Normalize((0.5,), (0.25,)), {})
        {'mean': [0.5], 'std': [0.25]}
    """
    if isinstance(value, Tensor):
        tensors[path] = value
        return path
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [encode(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: encode(item, tensors, f"{path}.{key}") for key, item in value.items()}
    if is_dataclass(value):
        cls = type(value)
        tag = {_TAG: cls.__name__} if is_dataclass(cls.__base__) else {}
        return tag | {
            name: encode(getattr(value, name), tensors, f"{path}.{name}".lstrip("."))
            for name in _saved_fields(cls)
        }
    return value


def _saved_fields(cls: type) -> dict[str, Any]:
    """Name → type of the fields that are saved."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.metadata.get("saved", True)}


class Reader:
    """Decodes JSON by type; ``unused`` is the set of tensor names that have not been decoded yet."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.unused = set(tensors)

    def decode(self, hint: Any, value: Any, path: str) -> Any:
        """A JSON value as an instance of the type ``hint``; ``path`` is its place in the document.

        Raises:
            FileFormatError: the value has another type.
            InvalidArgument: a dataclass rejected the values of its fields.
        """
        origin, args = get_origin(hint), get_args(hint)
        if hint is Any:
            return _tuples(value)
        if hint is Tensor:
            return self.tensor(value, path)
        if origin in (Union, UnionType):
            return self.union(args, value, path)
        if origin is Literal:
            return value if value in args else _reject(path, value, f"one of {args}")
        if origin is tuple:
            return self.tuple(args, value, path)
        if origin in (dict, Mapping):
            items = value.items() if isinstance(value, dict) else _reject(path, value, "an object")
            return {key: self.decode(args[1], item, f"{path}.{key}") for key, item in items}
        if is_dataclass(hint):
            return self.record(cast(type, hint), value, path)
        return _scalar(hint, value, path)

    def union(self, members: tuple[Any, ...], value: Any, path: str) -> Any:
        """A union: None if allowed; a list as the tuple member, if any; else the first member."""
        if value is None and type(None) in members:
            return None
        present = [member for member in members if member is not type(None)]
        tuples = [member for member in present if _is_tuple(member)] if isinstance(value, list) else []
        return self.decode([*tuples, *present][0], value, path)

    def tensor(self, value: Any, path: str) -> Tensor:
        if not isinstance(value, str) or value not in self.tensors:
            _reject(path, value, "the name of a saved tensor")
        self.unused.discard(value)
        return self.tensors[value]

    def tuple(self, args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            _reject(path, value, "a list")
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(hints) != len(value):
            _reject(path, value, f"{len(hints)} entries")
        pairs = zip(hints, value, strict=True)
        return tuple(self.decode(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(pairs))

    def record(self, cls: type, value: Any, path: str) -> Any:
        """A dataclass, from an object with exactly its fields."""
        if not isinstance(value, dict):
            _reject(path, value, "an object")
        value = dict(value)
        subclasses: list[type] = cls.__subclasses__()
        variants = {subclass.__name__: subclass for subclass in subclasses}
        if variants:
            tag = value.pop(_TAG, None)
            cls = variants.get(str(tag)) or _reject(f"{path}.{_TAG}", tag, f"one of {sorted(variants)}")
        expected = _saved_fields(cls)
        for f in fields(cls):
            if f.name not in value and f.metadata.get("added", False):
                del expected[f.name]
        if set(value) != set(expected):
            _reject(path, sorted(value), f"the fields {sorted(expected)}")
        return cls(
            **{name: self.decode(hint, value[name], f"{path}.{name}") for name, hint in expected.items()}
        )


def _is_tuple(hint: Any) -> bool:
    origin: Any = get_origin(hint)
    return origin is tuple


def _scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float:
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        if type(value) not in (int, float) or abs(value) > 1e300:
            _reject(path, value, "a number")
        return float(value)
    if type(value) is not hint:
        _reject(path, value, hint.__name__)
    if isinstance(value, int) and not 0 <= value <= _MAX_INT:
        _reject(path, value, f"0 … {_MAX_INT}")
    return value


def _tuples(value: Any) -> Any:
    """JSON with every list as a tuple."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _reject(path: str, value: Any, expected: str) -> NoReturn:
    """Raise a :class:`FileFormatError`: the place in the document, the value, the expected value."""
    text = repr(value)
    raise FileFormatError(f"{path} is {text[:60] + '…' * (len(text) > 60)}; expected {expected}")
