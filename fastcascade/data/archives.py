"""Download of CIFAR-10 and CIFAR-100 from their home page."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
import urllib.request
import zlib
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from fastcascade.errors import DataError, InvalidArgument, SaveError
from fastcascade.storage.files import read_bytes, write_atomically

__all__ = ["download"]

_TIMEOUT_S = 60.0
_CHUNK = 2**18


class Archive(NamedTuple):
    """A published archive.

    Attributes:
        url: the official address.
        md5: as published; it detects damage, not forgery.
        folder: the folder in the archive.
        files: the members to extract from it.
    """

    url: str
    md5: str
    folder: str
    files: tuple[str, ...]


ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-batches-bin",
        (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt"),
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-binary",
        ("train.bin", "test.bin", "fine_label_names.txt", "coarse_label_names.txt"),
    ),
}
_MAX_MEMBER_BYTES = 2**28


def download(name: str, directory: str | Path, url: str | None = None) -> Path:
    """Download, check and unpack a data set, unless the folder already holds it.

    ``SHA256SUMS`` in the folder lists the files' hashes, which :func:`fastcascade.data.sources.load_data`
    compares.

    Args:
        name: "cifar10" or "cifar100".
        directory: parent of the data set's folder.
        url: mirror of the official archive.

    Returns:
        the folder, for :func:`fastcascade.data.sources.load_data`.

    Raises:
        InvalidArgument: an unknown name.
        DataError: unreachable, truncated, not the published archive, or the folder holds other files.
        SaveError: the operating system reported an error while writing.
    """
    if name not in ARCHIVES:
        raise InvalidArgument(f"unknown data set {name!r}; expected one of {sorted(ARCHIVES)}")
    archive = ARCHIVES[name]
    folder = Path(directory) / archive.folder
    sums = folder / "SHA256SUMS"
    if _is_complete(folder, sums, archive):
        return folder
    if folder.exists() and any(folder.iterdir()) and not sums.exists():
        raise DataError(f"{folder} holds files that fastcascade did not download; move them away first")
    with tempfile.TemporaryFile() as file:
        _fetch(url or archive.url, file, archive.md5)
        contents = _members(file, archive)
    lines = (f"{hashlib.sha256(data).hexdigest()}  {file}\n" for file, data in contents.items())
    # The list is written first: it marks a folder with missing files as an interrupted download.
    write_atomically(sums, "".join(lines).encode())
    for file_name, data in contents.items():
        write_atomically(folder / file_name, data)
    return folder


def _is_complete(folder: Path, sums: Path, archive: Archive) -> bool:
    """Whether every file exists and has its listed hash."""
    try:
        lines = read_bytes(sums, _MAX_MEMBER_BYTES, DataError).decode("ascii").splitlines()
        listed = dict(line.split("  ")[::-1] for line in lines)
        return all(
            hashlib.sha256(read_bytes(folder / name, _MAX_MEMBER_BYTES, DataError)).hexdigest()
            == listed.get(name)
            for name in archive.files
        )
    except (DataError, ValueError):
        return False


def _fetch(url: str, file: BinaryIO, md5: str) -> None:
    """Download a URL into an open file, with a progress bar on standard error, and compare its md5."""
    digest = hashlib.md5(usedforsecurity=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with (
            closing(urllib.request.urlopen(url, timeout=_TIMEOUT_S)) as response,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            total = int(response.headers.get("Content-Length") or 0) or None
            task = progress.add_task(url.rsplit("/", 1)[-1], total=total)
            while chunk := response.read(_CHUNK):
                digest.update(chunk)
                _write(file, chunk)
                progress.advance(task, len(chunk))
    except SaveError:
        raise
    except (OSError, ValueError, HTTPException) as error:
        raise DataError(
            f"cannot download {url}: {error}. Check the connection, or name a mirror: fastcascade download "
            "--url ADDRESS, or url= in Python"
        ) from error
    if digest.hexdigest() != md5:
        raise DataError(
            f"{url} has md5 {digest.hexdigest()}; expected {md5}: the download is truncated or altered"
        )


def _write(file: BinaryIO, chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise SaveError(
            f"cannot store the download: {error.strerror}; free some space and try again"
        ) from error


def _members(file: BinaryIO, archive: Archive) -> dict[str, bytes]:
    """The members' contents, looked up by fixed names: no path from the archive is used."""
    file.seek(0)
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:gz") as tar:
            for name in archive.files:
                member = tar.getmember(f"{archive.folder}/{name}")
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None or member.size > _MAX_MEMBER_BYTES:
                    raise DataError(f"{name} in the archive is not a file of ≤ {_MAX_MEMBER_BYTES} bytes")
                contents[name] = stream.read()
    except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"the archive does not hold the files of {archive.folder}: {error}") from error
    return contents
