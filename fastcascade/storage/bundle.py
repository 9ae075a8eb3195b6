"""Bundles: a directory with structure in ``<name>.json`` and tensors in ``<name>-<sha256>.safetensors``.

The JSON file holds the hash of the tensor file and its own hash, and it is written last. After a crash at any
moment the directory therefore loads as the old bundle or as the new one, never as a mixture. Writers of one
directory wait for each other. Readers need no lock: if a writer removes the tensor file that a reader has
just looked up, the reader starts again with the new JSON file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from fastcascade.errors import FileFormatError, InvalidArgument
from fastcascade.storage.files import (
    MAX_JSON_BYTES,
    exclusive,
    parse_json,
    read_bytes,
    read_json,
    remove_leftover,
    write_atomically,
)

if TYPE_CHECKING:  # plans are read without torch, too
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "PLAN_FORMAT",
    "BundleFormat",
    "bundle_exists",
    "bundle_sha256",
    "load_arrays",
    "load_bundle",
    "save_bundle",
]

MAX_TENSOR_BYTES = 16 * 2**30

_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_ATTEMPTS = 20


@dataclass(frozen=True)
class BundleFormat:
    """A kind of bundle: the prefix of its file names, and its version, which grows when old readers fail."""

    name: str
    version: int

    def document_path(self, directory: Path) -> Path:
        """Path of the JSON file."""
        return directory / f"{self.name}.json"

    def tensor_path(self, directory: Path, sha256: str) -> Path:
        """Path of the tensor file with this content."""
        return directory / f"{self.name}-{sha256}.safetensors"


PLAN_FORMAT = BundleFormat("plan", 1)
"""Plans, which :mod:`fastcascade.lowering.plan_file` writes and :mod:`fastcascade.runtime` reads, too."""

T = TypeVar("T")


def bundle_exists(directory: str | Path, bundle: BundleFormat) -> bool:
    """Whether ``<name>.json`` exists and holds JSON. Without it, a save was interrupted."""
    path = bundle.document_path(Path(directory))
    try:
        parse_json(read_bytes(path, MAX_JSON_BYTES))
    except FileFormatError:
        return os.path.lexists(path)  # a directory or an unreadable file also occupies the name
    except ValueError:
        return False
    return True


def bundle_sha256(directory: str | Path, bundle: BundleFormat) -> str | None:
    """The hash of a bundle's structure and tensors; None if there is no readable bundle."""
    try:
        return str(_read_document(bundle.document_path(Path(directory)), bundle)["sha256"])
    except FileFormatError:
        return None


def save_bundle(
    directory: str | Path,
    bundle: BundleFormat,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    overwrite: bool = False,
) -> str:
    """Save JSON content and tensors.

    Args:
        directory: created if missing; unrelated files in it are kept.
        content: JSON values only; write infinities as text.
        tensors: any device, dtype and layout; stored contiguous.
        overwrite: replace a bundle of the same name.

    Returns:
        sha256 of content and tensors.

    Raises:
        InvalidArgument: a bundle exists and ``overwrite`` is False.
        SaveError: the operating system reported an error; the directory holds the old bundle or the new one.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save_bundle(directory, BundleFormat("demo", 1), {"a": 1}, {"w": torch.ones(2)})
        ...     load_bundle(directory, BundleFormat("demo", 1))
        ({'a': 1}, {'w': tensor([1., 1.])})
    """
    directory = Path(directory)
    document_path = bundle.document_path(directory)
    if not overwrite:
        _require_free(directory, bundle)
    data = _serialise(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    document: dict[str, Any] = {
        "format": f"fastcascade {bundle.name}",
        "version": bundle.version,
        "tensors": {"sha256": sha256},
        "content": dict(content),
    }
    document["sha256"] = _hash_of(document)
    text = json.dumps(document, indent=1, allow_nan=False).encode()
    tensor_path = bundle.tensor_path(directory, sha256)
    with exclusive(directory / f".{bundle.name}.lock"):
        if not overwrite:
            _require_free(directory, bundle)
        torn = os.path.lexists(document_path)
        write_atomically(tensor_path, data)
        write_atomically(document_path, text, overwrite=overwrite or torn)
        _remove_stale(tensor_path, bundle)
    return str(document["sha256"])


def _require_free(directory: Path, bundle: BundleFormat) -> None:
    if bundle_exists(directory, bundle):
        raise InvalidArgument(
            f"{bundle.document_path(directory)} exists; choose another directory, or pass "
            "overwrite=True (--overwrite)"
        )


def _serialise(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as safetensors bytes; equal tensors give equal bytes."""
    import safetensors.torch
    import torch

    contiguous = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    # One metadata key only: safetensors writes several in random order.
    return safetensors.torch.save(contiguous, metadata={"format": "pt"})


def _remove_stale(current: Path, bundle: BundleFormat) -> None:
    """Remove the files of earlier saves, complete or killed; an error here is ignored."""
    own = rf"{re.escape(bundle.name)}-[0-9a-f]{{64}}\.safetensors"
    tensor_file = re.compile(own)
    temporary = re.compile(rf"\.({own}|{re.escape(bundle.name)}\.json)\..+")
    with contextlib.suppress(OSError):
        for path in current.parent.iterdir():
            if tensor_file.fullmatch(path.name) and path != current:
                path.unlink()
            elif temporary.fullmatch(path.name):
                remove_leftover(path)


def load_bundle(directory: str | Path, bundle: BundleFormat) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load what :func:`save_bundle` wrote, after checking both hashes.

    Returns:
        (content, tensors); tensors on the CPU. The hashes detect damage, not forgery: callers must check
        every value before they use it.

    Raises:
        FileFormatError: missing, damaged, of another kind, or written by a newer version.
    """
    import safetensors.torch

    return _load(directory, bundle, safetensors.torch.load)


def load_arrays(
    directory: str | Path, bundle: BundleFormat
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """:func:`load_bundle` with numpy arrays in place of tensors, without torch."""
    import safetensors.numpy

    return _load(directory, bundle, safetensors.numpy.load)


def _load(
    directory: str | Path, bundle: BundleFormat, parse: Callable[[bytes], dict[str, T]]
) -> tuple[dict[str, Any], dict[str, T]]:
    directory = Path(directory)
    attempt = 0
    while True:
        document = _read_document(bundle.document_path(directory), bundle)
        path = _named_tensor_file(directory, bundle, document)
        try:
            return document["content"], _load_tensors(path, parse)
        except FileFormatError as error:
            attempt += 1
            replaced = isinstance(error.__cause__, FileNotFoundError)  # by a writer, after it was named
            if not replaced or attempt == _READ_ATTEMPTS:
                raise
        time.sleep(attempt / 1000)


def _read_document(path: Path, bundle: BundleFormat) -> dict[str, Any]:
    """The JSON file, checked except for its content."""
    document = read_json(path)
    if document.get("format") != f"fastcascade {bundle.name}":
        raise FileFormatError(
            f"{path} has format {document.get('format')!r}; expected 'fastcascade {bundle.name}'"
        )
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise FileFormatError(f"{path} has version {version!r}; expected an integer ≥ 1")
    if version > bundle.version:
        raise FileFormatError(
            f"{path} has format version {version}; this fastcascade reads up to {bundle.version}: upgrade it"
        )
    if document.get("sha256") != _hash_of(document):
        raise FileFormatError(f"{path} is damaged: its content does not match its sha256")
    if not isinstance(document.get("content"), dict):
        raise FileFormatError(f"{path} has no object 'content'")
    return document


def _named_tensor_file(directory: Path, bundle: BundleFormat, document: Mapping[str, Any]) -> Path:
    reference = document.get("tensors")
    sha256 = reference.get("sha256") if isinstance(reference, dict) else None
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise FileFormatError(f"{bundle.document_path(directory)} names no tensor file by its sha256")
    return bundle.tensor_path(directory, sha256)


def _load_tensors(path: Path, parse: Callable[[bytes], dict[str, T]]) -> dict[str, T]:
    """The tensors of a file whose name ends in the sha256 of its content."""
    data = read_bytes(path, MAX_TENSOR_BYTES)
    if not path.stem.endswith(hashlib.sha256(data).hexdigest()):
        raise FileFormatError(f"{path} is damaged: its content does not match the sha256 in its name")
    try:
        return parse(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"{path} is not a valid safetensors file: {error}") from error


def _hash_of(document: Mapping[str, Any]) -> str:
    """sha256 of the document without its own hash, in canonical form: sorted keys, compact, ASCII."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
