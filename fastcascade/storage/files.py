"""Atomic writes, locks, and guarded reads.

A file is written under a temporary name in the same directory and renamed when it is complete. The writer
holds a lock on the temporary file, which the kernel releases when the process ends. A temporary file whose
lock is free was therefore left by a killed writer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from fastcascade.errors import FastCascadeError, FileFormatError, InvalidArgument, SaveError

__all__ = [
    "exclusive",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_regular",
    "remove_leftover",
    "remove_leftovers",
    "require_writable",
    "write_atomically",
]

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 64
MAX_JSON_VALUES = 2**22

_TEMPORARY = re.compile(r"\.(?P<destination>.+)\.[0-9a-f]{16}\.fastcascade-tmp")
_LEFTOVER_AGE_S = 3600.0
# File systems without hard links or locks.
_UNSUPPORTED = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


##### Writing


def write_atomically(
    path: str | Path, content: bytes | Callable[[BinaryIO], object], overwrite: bool = True
) -> None:
    """Create or replace a file. After a crash or an error it has the old content or the new, never a part.

    The order is: write a temporary file, fsync it, rename it, fsync the directory. Temporary files of killed
    writers are removed first.

    Args:
        path: the destination; missing directories are created.
        content: the bytes, or a function that writes them to an open binary file.
        overwrite: replace an existing file. If False, a file that appears while this one is written is kept.

    Raises:
        InvalidArgument: the file exists and ``overwrite`` is False.
        SaveError: the operating system reported an error.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_atomically(Path(directory) / "a.txt", b"text")
        ...     (Path(directory) / "a.txt").read_bytes()
        b'text'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.fastcascade-tmp")
    try:
        _make_directory(path.parent)
        _remove_leftovers(path)
        with open(_open_locked(temporary, os.O_EXCL), "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            _publish(temporary, path, overwrite)
        _sync_directory(path.parent)
    except OSError as error:
        raise SaveError(
            f"cannot save {path}: {error.strerror or error}. No partial file was left; "
            "fix the cause and save again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a complete file its final name."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        try:
            os.link(temporary, path)  # fails if the name is taken, unlike a rename
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            # No hard links on this file system: claim the name with an empty file, then replace that.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            os.replace(temporary, path)
    except FileExistsError:
        raise InvalidArgument(
            f"{path} exists; choose another name, or pass overwrite=True (--overwrite)"
        ) from None


def require_writable(directory: Path) -> None:
    """Refuse a directory in which files cannot be made, before any work and without making it.

    Raises:
        SaveError: it, or the nearest directory above it that exists, is no directory or cannot be written.

    Example:
        >>> require_writable(Path(os.devnull) / "run")
        Traceback (most recent call last):
        fastcascade.errors.SaveError: cannot write to /dev/null/run: /dev/null is not a directory
    """
    path = directory.absolute()
    there = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not there.is_dir():
        raise SaveError(f"cannot write to {directory}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SaveError(f"cannot write to {directory}: no permission to make files in {there}")


def _make_directory(path: Path) -> None:
    """``mkdir -p``; each new directory entry is on disk before anything is written into it."""
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


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of killed writers; an error here is ignored.

    Some network file systems hide other machines' locks. Temporary files of other destinations are therefore
    removed only after an hour without a write.
    """
    with contextlib.suppress(OSError):
        for other in path.parent.iterdir():
            match = _TEMPORARY.fullmatch(other.name)
            if match is None:
                continue
            idle_s = time.time() - other.stat().st_mtime
            if match["destination"] == path.name or idle_s > _LEFTOVER_AGE_S:
                remove_leftover(other)


def remove_leftovers(directory: Path) -> None:
    """Remove all temporary files of killed writers in a directory."""
    for path in directory.iterdir():
        remove_leftover(path)


def remove_leftover(path: Path) -> None:
    """Remove a temporary file of :func:`write_atomically` if its writer is dead; an error here is ignored."""
    if not _TEMPORARY.fullmatch(path.name):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)


##### Locks


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[None]:
    """A lock on a name: one holder at a time among all threads and processes; others wait, or are refused.

    The lock file is removed on exit. One that a killed process left is unlocked and is used again.

    Args:
        path: the lock file; missing directories are created.
        wait: if False, do not wait for another holder.

    Raises:
        InvalidArgument: another holds the lock, and ``wait`` is False.
        SaveError: the lock file cannot be created.
    """
    try:
        _make_directory(path.parent)
        descriptor = _open_locked(path, wait=wait)
    except BlockingIOError:
        raise InvalidArgument(f"another process works in {path.parent}; wait until it ends") from None
    except OSError as error:
        raise SaveError(f"cannot lock {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for copies of the descriptor in forked children
        os.close(descriptor)


def _open_locked(path: Path, flags: int = 0, wait: bool = True) -> int:
    """Descriptor of a file that is created if missing and locked. Without lock support, it is unlocked.

    Raises:
        BlockingIOError: another holds the lock, and ``wait`` is False.
    """
    mode = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666)
        try:
            fcntl.flock(descriptor, mode)
            if _has_name(descriptor, path):
                return descriptor
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return descriptor
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder or a cleaner removed the file before the lock was free


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


##### Reading


def open_regular(path: str | Path) -> BufferedReader:
    """A regular file, or a link to one, opened for reading.

    Raises:
        OSError: it cannot be opened, or it is a directory, FIFO, device or socket.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a blocking open of a FIFO waits for a writer
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    kind = "FIFO" if stat.S_ISFIFO(mode) else "directory" if stat.S_ISDIR(mode) else "device"
    raise OSError(errno.EINVAL, f"it is a {kind}, not a regular file", str(path))


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most ``max_bytes``.

    Raises:
        OSError: as for :func:`open_regular`, or it is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes; expected at most {max_bytes:,}", str(path))
        return file.read(max_bytes)


def read_bytes(
    path: str | Path, max_bytes: int, error_type: type[FastCascadeError] = FileFormatError
) -> bytes:
    """The same, with an error of the library.

    Raises:
        error_type: missing, unreadable, not a regular file, or larger.
    """
    try:
        return read_regular(path, max_bytes)
    except OSError as error:
        raise error_type(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file; see :func:`parse_json`.

    Raises:
        FileFormatError: missing, larger than ``max_bytes``, or not a JSON object within the limits.
    """
    try:
        return parse_json(read_bytes(path, max_bytes))
    except ValueError as error:
        raise FileFormatError(f"{path} {error}") from error


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object: UTF-8, no duplicate keys, no NaN or Infinity, bounded depth and number of values.

    Raises:
        ValueError: anything else; the message starts with a verb.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_reject_constant
        )
    except RecursionError:
        raise ValueError(f"is not valid JSON: it nests deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"holds a JSON {type(value).__name__}; expected an object")
    _check_extent(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError(f"duplicate key among {sorted(key for key, _ in pairs)[:10]}")
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_extent(value: Any) -> None:
    """Bound the depth, since readers recurse into values, and the number of values."""
    level, total = [value], 0
    for _ in range(MAX_JSON_DEPTH):
        children = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [child for container in children for child in container]
        total += len(level)
        if total > MAX_JSON_VALUES:
            raise ValueError(f"holds more than {MAX_JSON_VALUES} values")
        if not level:
            return
    raise ValueError(f"is not valid JSON: it nests deeper than {MAX_JSON_DEPTH} levels")
