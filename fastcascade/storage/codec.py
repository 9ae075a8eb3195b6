"""Dataclasses as JSON and back: the fields and their types are the format.

A tensor is put aside under its path and named in the JSON. A number that is not finite is written as text.
A dataclass derived from another is tagged with its class. Fields with ``NOT_SAVED`` are left out, and take
their default when loaded. What comes back has passed the type of every field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType, UnionType
from typing import Any, Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints

from torch import Tensor

from fastcascade.errors import FileFormatError

__all__ = ["ADDED", "NOT_SAVED", "Reader", "encode", "refuse"]

NOT_SAVED = MappingProxyType({"saved": False})
"""``field(metadata=NOT_SAVED)`` keeps a field out of files."""

ADDED = MappingProxyType({"added": True})
"""``field(default=…, metadata=ADDED)`` may be missing from files written before the field existed."""

_LARGEST = 2**53
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_TAG = "op"


def encode(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """JSON for a value; its tensors are added to ``tensors``.

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
    """Name → type of the fields that files hold."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.metadata.get("saved", True)}


class Reader:
    """Decodes JSON by type; ``unused`` holds the names of the tensors not asked for yet."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.unused = set(tensors)

    def decode(self, hint: Any, value: Any, path: str) -> Any:
        """The value as its type; ``path`` says where it stood.

        Raises:
            FileFormatError: it is of another type.
            InvalidArgument: a dataclass refused its fields.
        """
        origin, args = get_origin(hint), get_args(hint)
        if hint is Any:
            return _tuples(value)
        if hint is Tensor:
            return self.tensor(value, path)
        if origin in (Union, UnionType):
            return self.union(args, value, path)
        if origin is Literal:
            return value if value in args else refuse(path, value, f"one of {args}")
        if origin is tuple:
            return self.tuple(args, value, path)
        if origin in (dict, Mapping):
            items = value.items() if isinstance(value, dict) else refuse(path, value, "an object")
            return {key: self.decode(args[1], item, f"{path}.{key}") for key, item in items}
        if is_dataclass(hint):
            return self.record(cast(type, hint), value, path)
        return _scalar(hint, value, path)

    def union(self, arms: tuple[Any, ...], value: Any, path: str) -> Any:
        """None where that is an arm; a list by the arm that is a tuple, if there is one."""
        if value is None and type(None) in arms:
            return None
        present = [arm for arm in arms if arm is not type(None)]
        tuples = [arm for arm in present if _is_tuple(arm)] if isinstance(value, list) else []
        return self.decode([*tuples, *present][0], value, path)

    def tensor(self, value: Any, path: str) -> Tensor:
        if not isinstance(value, str) or value not in self.tensors:
            refuse(path, value, "the name of a saved tensor")
        self.unused.discard(value)
        return self.tensors[value]

    def tuple(self, args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            refuse(path, value, "a list")
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(hints) != len(value):
            refuse(path, value, f"{len(hints)} entries")
        pairs = zip(hints, value, strict=True)
        return tuple(self.decode(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(pairs))

    def record(self, cls: type, value: Any, path: str) -> Any:
        """A dataclass: exactly its fields, each of its type."""
        if not isinstance(value, dict):
            refuse(path, value, "an object")
        value = dict(value)
        subclasses: list[type] = cls.__subclasses__()
        variants = {subclass.__name__: subclass for subclass in subclasses}
        if variants:
            tag = value.pop(_TAG, None)
            cls = variants.get(str(tag)) or refuse(f"{path}.{_TAG}", tag, f"one of {sorted(variants)}")
        expected = _saved_fields(cls)
        for f in fields(cls):
            if f.name not in value and f.metadata.get("added", False):
                del expected[f.name]
        if set(value) != set(expected):
            refuse(path, sorted(value), f"the fields {sorted(expected)}")
        return cls(
            **{name: self.decode(hint, value[name], f"{path}.{name}") for name, hint in expected.items()}
        )


def _is_tuple(hint: Any) -> bool:
    origin: Any = get_origin(hint)
    return origin is tuple


def _scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float:
        if isinstance(value, str) and value in _NOT_FINITE:
            return _NOT_FINITE[value]
        if type(value) not in (int, float) or abs(value) > 1e300:
            refuse(path, value, "a number")
        return float(value)
    if type(value) is not hint:
        refuse(path, value, hint.__name__)
    if isinstance(value, int) and not 0 <= value <= _LARGEST:
        refuse(path, value, f"0 … {_LARGEST}")
    return value


def _tuples(value: Any) -> Any:
    """Free JSON as it was before saving: lists were tuples."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def refuse(path: str, value: Any, expected: str) -> NoReturn:
    """Raise the :class:`FileFormatError` that says where a file holds what instead of what."""
    text = repr(value)
    raise FileFormatError(f"{path} is {text[:60] + '…' * (len(text) > 60)}; expected {expected}")
