"""Saving so that a crash loses nothing, and reading so that nothing in a file is trusted.

A *bundle* is a directory with two files: ``<name>.json`` for structure and ``<name>-<sha256>.safetensors``
for tensors. The JSON is replaced last and carries the tensor file's hash and its own, so after a crash at
any moment the directory loads as what it was before or as what was being saved, never as a mixture. A
directory has one writer at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastcascade.errors import FastCascadeError, FileFormatError, InvalidArgument, SaveError

__all__ = ["BundleFormat", "load_bundle", "read_bytes", "read_json", "save_bundle", "write_atomically"]

MAX_JSON_BYTES = 16 * 2**20
MAX_TENSOR_BYTES = 16 * 2**30
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write_atomically(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Replace a file so that a crash or a full disk leaves the old content or the new, never a part.

    Order: write beside it, fsync the file, rename over the old one, fsync the directory.

    Args:
        path: the file to create or replace; missing directories are made.
        content: the bytes, or a function that writes them to the open binary file it is given.

    Raises:
        SaveError: a call to the operating system failed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_atomically(Path(directory) / "a.txt", b"text")
        ...     (Path(directory) / "a.txt").read_bytes()
        b'text'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _make_directory(path.parent)
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise SaveError(
            f"could not save {path}: {error.strerror or error}. No file was left half-written; "
            "mend the cause and save again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _make_directory(path: Path) -> None:
    """mkdir -p, with every new entry on disk before anything is put into it."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(
    path: str | Path, max_bytes: int, error_type: type[FastCascadeError] = FileFormatError
) -> bytes:
    """The content of a regular file of at most ``max_bytes``.

    Raises:
        error_type: missing, unreadable, not a regular file, or larger.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error_type(f"{path} is not a regular file")
            if status.st_size > max_bytes:
                raise error_type(f"{path} has {status.st_size} bytes; expected at most {max_bytes}")
            return file.read()
    except OSError as error:
        raise error_type(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file: UTF-8, no duplicate keys, no NaN or Infinity.

    Raises:
        FileFormatError: missing, larger than ``max_bytes``, malformed, or not an object.
    """
    try:
        value = json.loads(
            read_bytes(path, max_bytes).decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError(f"a key occurs twice among {sorted(key for key, _ in pairs)[:10]}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


@dataclass(frozen=True)
class BundleFormat:
    """What a bundle holds: files are called after ``name``; ``version`` grows when old readers must stop."""

    name: str
    version: int


def save_bundle(
    directory: str | Path,
    bundle: BundleFormat,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    overwrite: bool = False,
) -> None:
    """Save JSON content and tensors; see the top of this file for the order and what a crash leaves.

    Args:
        directory: made if missing; other files in it are left alone.
        content: JSON values only; write infinities as text.
        tensors: any device, dtype and layout; stored contiguous.
        overwrite: replace a bundle of the same name.

    Raises:
        InvalidArgument: there is one already and ``overwrite`` is False.
        SaveError: a call to the operating system failed; the old bundle is intact, or the new one complete.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_bundle(directory, BundleFormat("demo", 1), {"a": 1}, {"w": torch.ones(2)})
        ...     load_bundle(directory, BundleFormat("demo", 1))
        ({'a': 1}, {'w': tensor([1., 1.])})
    """
    directory = Path(directory)
    document_path = directory / f"{bundle.name}.json"
    if os.path.lexists(document_path) and not overwrite:
        raise InvalidArgument(f"{document_path} exists; choose another directory, or pass overwrite=True")
    # One metadata key only: safetensors writes several in random order, and the name is the bytes' hash.
    data = safetensors.torch.save(
        {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        },
        metadata={"format": "pt"},
    )
    sha256 = hashlib.sha256(data).hexdigest()
    document: dict[str, Any] = {
        "format": f"fastcascade {bundle.name}",
        "version": bundle.version,
        "tensors": {"sha256": sha256},
        "content": dict(content),
    }
    document["sha256"] = _hash_of(document)
    tensor_path = _tensor_path(directory, bundle, sha256)
    text = json.dumps(document, indent=1, allow_nan=False)
    write_atomically(tensor_path, data)
    write_atomically(document_path, text.encode())
    _remove_stale(tensor_path, bundle)


def load_bundle(directory: str | Path, bundle: BundleFormat) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load what :func:`save_bundle` wrote, after checking both hashes.

    Returns:
        (content, tensors); tensors on the CPU. The hashes guard against damage, not against a forger:
        callers still check every value before use.

    Raises:
        FileFormatError: missing, damaged, of another kind, or written by a newer version.
    """
    directory = Path(directory)
    path = directory / f"{bundle.name}.json"
    document = read_json(path)
    if document.get("format") != f"fastcascade {bundle.name}":
        raise FileFormatError(
            f"{path} has format {document.get('format')!r}; expected 'fastcascade {bundle.name}'"
        )
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise FileFormatError(f"{path} has version {version!r}; expected a number from 1")
    if version > bundle.version:
        raise FileFormatError(
            f"{path} has format version {version}; this fastcascade reads up to {bundle.version}: upgrade it"
        )
    if document.get("sha256") != _hash_of(document):
        raise FileFormatError(f"{path} is damaged: its content does not match its sha256")
    content = document.get("content")
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} has no object 'content'")
    return content, _load_tensors(directory, bundle, document.get("tensors"))


def _load_tensors(directory: Path, bundle: BundleFormat, reference: object) -> dict[str, Tensor]:
    sha256 = reference.get("sha256") if isinstance(reference, dict) else None
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise FileFormatError(f"{directory / bundle.name}.json names no tensor file by its sha256")
    path = _tensor_path(directory, bundle, sha256)
    data = read_bytes(path, MAX_TENSOR_BYTES)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise FileFormatError(f"{path} is damaged: its content does not match the sha256 in its name")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"{path} is not a valid safetensors file: {error}") from error


def _hash_of(document: Mapping[str, Any]) -> str:
    """sha256 of the document without its own hash, in one canonical spelling (sorted, compact, ASCII)."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _tensor_path(directory: Path, bundle: BundleFormat, sha256: str) -> Path:
    return directory / f"{bundle.name}-{sha256}.safetensors"


def _remove_stale(current: Path, bundle: BundleFormat) -> None:
    """Remove tensor files of earlier saves, and what killed ones left behind; failing to is no error."""
    own = re.compile(rf"{re.escape(bundle.name)}-[0-9a-f]{{64}}\.safetensors")
    leftover = re.compile(rf"\.{re.escape(bundle.name)}(\.json|-[0-9a-f]{{64}}\.safetensors)\.\d+\.tmp")
    with contextlib.suppress(OSError):
        for path in current.parent.iterdir():
            if path != current and (own.fullmatch(path.name) or leftover.fullmatch(path.name)):
                path.unlink()
