"""The downloader, against a server on this machine."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastcascade.data import archives as module
from fastcascade.data.archives import ARCHIVES, download
from fastcascade.data.sources import load_data
from fastcascade.errors import DataError, InvalidArgument

CONTENT = {
    name: "".join(f"class {i}\n" for i in range(10)).encode() if name.endswith(".txt") else bytes(3073 * 2)
    for name in ARCHIVES["cifar10"].files
}


def archive_of(content: dict[str, bytes], extra: tarfile.TarInfo | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        if extra is not None:
            tar.addfile(extra, io.BytesIO(bytes(extra.size)))
    return file.getvalue()


class Server:
    """Serves one body; ``cut`` bytes are missing from its end although the header announces them."""

    def __init__(self) -> None:
        self.body = b""
        self.cut = 0
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests += 1
                self.send_response(200 if self.path == "/cifar.tar.gz" else 404)
                self.send_header("Content-Length", str(len(server.body)))
                self.end_headers()
                self.wfile.write(server.body[: len(server.body) - server.cut])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/cifar.tar.gz"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    publish(monkeypatch, server, archive_of(CONTENT))
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def publish(monkeypatch: pytest.MonkeyPatch, server: Server, body: bytes) -> None:
    """Make a body the published archive, whose md5 is known."""
    md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
    server.body = body
    monkeypatch.setitem(module.ARCHIVES, "cifar10", ARCHIVES["cifar10"]._replace(url=server.url, md5=md5))


def test_download_check_unpack_and_load(tmp_path: Path, server: Server) -> None:
    folder = download("cifar10", tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "SHA256SUMS"} == CONTENT
    assert len(load_data(folder, split="train")) == 10
    assert download("cifar10", tmp_path) == folder
    assert server.requests == 1, "a complete download is not fetched again"


def test_damaged_files_are_noticed_and_fetched_again(tmp_path: Path, server: Server) -> None:
    folder = download("cifar10", tmp_path)
    (folder / "test_batch.bin").write_bytes(bytes(3073) + b"\1" + bytes(3072))
    with pytest.raises(DataError, match="download it again"):
        load_data(folder)
    download("cifar10", tmp_path)
    assert len(load_data(folder)) == 2
    assert server.requests == 2


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path, server: Server) -> None:
    server.body = server.body[:-1] + b"x"
    with pytest.raises(DataError, match=r"has md5 .*; expected"):
        download("cifar10", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [1, 300])
def test_a_connection_cut_short_is_an_error(tmp_path: Path, server: Server, cut: int) -> None:
    server.cut = cut
    with pytest.raises(DataError, match=r"cannot download|truncated"):
        download("cifar10", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unreachable_server_or_unknown_page_is_named(tmp_path: Path, server: Server) -> None:
    for url in (server.url + "x", "http://127.0.0.1:1/", "not a url"):
        with pytest.raises(DataError, match="cannot download"):
            download("cifar10", tmp_path, url=url)
    with pytest.raises(InvalidArgument, match="unknown data set 'mnist'"):
        download("mnist", tmp_path)


def test_files_of_other_origin_are_not_replaced(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "test_batch.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match="move them away first"):
        download("cifar10", tmp_path)
    assert (folder / "test_batch.bin").read_bytes() == b"mine"


def test_paths_in_the_archive_are_never_used(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = tarfile.TarInfo("../evil")
    evil.size = 3
    publish(monkeypatch, server, archive_of(CONTENT, evil))
    download("cifar10", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert {path.name for path in (tmp_path / "data").rglob("*") if path.is_file()} == {
        *CONTENT,
        "SHA256SUMS",
    }


def test_a_link_in_place_of_a_file_is_refused(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    publish(monkeypatch, server, archive_of(CONTENT, link))
    with pytest.raises(DataError, match="is not a file"):
        download("cifar10", tmp_path)


def test_an_archive_without_its_files_is_refused(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for body in (b"not an archive", archive_of({"test_batch.bin": b""}), archive_of(CONTENT)[:200]):
        publish(monkeypatch, server, body)
        with pytest.raises(DataError, match="the archive does not hold"):
            download("cifar10", tmp_path)
