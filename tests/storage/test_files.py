"""Saved files: either the old content or the new after any failure, and damage never goes unnoticed."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import io
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import reseal
from forked import exit_code_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcascade.errors import FileFormatError, InvalidArgument, SaveError
from fastcascade.storage import files
from fastcascade.storage.bundle import BundleFormat, load_bundle, save_bundle
from fastcascade.storage.files import read_bytes, read_json, write_atomically

DEMO = BundleFormat("demo", 2)
OLD = ({"text": "old", "numbers": [1, 2.5]}, {"w": torch.arange(6.0).reshape(2, 3)})
NEW = ({"text": "new ✓"}, {"w": torch.arange(4), "hashes": torch.tensor([2**64 - 1], dtype=torch.uint64)})


def same(a: tuple[dict[str, Any], dict[str, Tensor]], b: tuple[dict[str, Any], dict[str, Tensor]]) -> bool:
    return (
        a[0] == b[0]
        and a[1].keys() == b[1].keys()
        and all(x.dtype == b[1][k].dtype and torch.equal(x, b[1][k]) for k, x in a[1].items())
    )


class FailingSystem:
    """Makes the N-th write, fsync, rename or open fail, or end the process there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, action: Callable[[], object]) -> None:
        self.calls = 0
        self.fail_at = fail_at
        self.action = action
        for name in ("fsync", "replace", "link", "open"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(files, "open", self.open_file, raising=False)

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                self.action()
            return function(*args, **kwargs)

        return call

    def open_file(self, path: Path, mode: str, **kwargs: Any) -> Any:
        if "w" not in mode:
            return builtins.open(path, mode, **kwargs)
        system = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                half = max(1, len(data) // 2)  # a full disk may still take a part
                if system.calls + 1 == system.fail_at:
                    super().write(memoryview(data)[:half])
                return system.counted(super().write)(data)  # type: ignore[no-any-return]

        return io.BufferedWriter(system.counted(Raw)(path, mode))


def disk_full() -> None:
    raise OSError(28, "No space left on device")


def calls_of_one_save(directory: Path) -> int:
    directory.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        system = FailingSystem(monkeypatch, 0, disk_full)
        save_bundle(directory, DEMO, *NEW, overwrite=True)
        return system.calls


def test_a_bundle_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_bundle(tmp_path / "new" / "directory", DEMO, *NEW)
    assert same(load_bundle(tmp_path / "new" / "directory", DEMO), NEW)


def test_tensors_that_share_memory_or_are_strided_are_stored_apart(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(1, 2, 3, 4)
    tensors = {"all": base, "row": base[0, 0], "last": base.to(memory_format=torch.channels_last)}
    save_bundle(tmp_path, DEMO, {}, tensors)
    assert same(load_bundle(tmp_path, DEMO), ({}, tensors))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_bundle(tmp_path / name, DEMO, *NEW)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")
    )
    assert first == second


def test_an_existing_bundle_is_kept_unless_overwriting(tmp_path: Path) -> None:
    save_bundle(tmp_path, DEMO, *OLD)
    with pytest.raises(InvalidArgument, match="overwrite=True"):
        save_bundle(tmp_path, DEMO, *NEW)
    assert same(load_bundle(tmp_path, DEMO), OLD)


def test_overwriting_removes_only_its_own_stale_files(tmp_path: Path) -> None:
    other = BundleFormat("other", 1)
    save_bundle(tmp_path, other, *OLD)
    save_bundle(tmp_path, DEMO, *OLD)
    (tmp_path / "demo-notes.txt").write_text("mine")
    (tmp_path / f".demo.json.{'0' * 16}.fastcascade-tmp").write_text("left by a killed save")
    save_bundle(tmp_path, DEMO, *NEW, overwrite=True)
    assert same(load_bundle(tmp_path, other), OLD)
    assert same(load_bundle(tmp_path, DEMO), NEW)
    assert len(list(tmp_path.glob("demo-*.safetensors"))) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if "safetensors" not in p.name) == [
        "demo-notes.txt",
        "demo.json",
        "other.json",
    ]


def test_content_is_on_disk_before_its_name_and_the_name_before_returning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync(file) → rename → fsync(directory), for the tensors and then for the JSON."""
    calls: list[str] = []
    fsync, replace, link = os.fsync, os.replace, os.link

    def recorded_fsync(descriptor: int) -> None:
        calls.append("sync directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append(f"name it {target.suffix}")
        replace(source, target)

    def recorded_link(source: Path, target: Path) -> None:
        calls.append(f"name it {target.suffix}")
        link(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(os, "link", recorded_link)
    save_bundle(tmp_path, DEMO, *NEW)
    assert calls == [
        step
        for suffix in (".safetensors", ".json")
        for step in ("sync file", f"name it {suffix}", "sync directory")
    ]


@pytest.mark.parametrize("overwrite", [True, False], ids=["over an old one", "fresh"])
def test_failure_of_any_call_leaves_the_old_bundle_or_the_new(tmp_path: Path, overwrite: bool) -> None:
    calls = calls_of_one_save(tmp_path / "count")
    assert calls >= 10, "two files, each opened, written, synced, renamed, its directory opened and synced"
    outcomes = set()
    for n in range(1, calls + 1):
        directory = tmp_path / str(n)
        directory.mkdir()
        if overwrite:
            save_bundle(directory, DEMO, *OLD)
        with pytest.MonkeyPatch.context() as monkeypatch:
            FailingSystem(monkeypatch, n, disk_full)
            with pytest.raises(SaveError, match="No space left"):
                save_bundle(directory, DEMO, *NEW, overwrite=True)
        assert not list(directory.glob(".*")), f"call {n} left a temporary file"
        if (directory / "demo.json").exists():
            loaded = load_bundle(directory, DEMO)
            assert same(loaded, NEW) or (overwrite and same(loaded, OLD)), f"call {n}"
            outcomes.add(loaded[0]["text"])
        else:
            assert not overwrite, f"call {n} lost the old bundle"
            outcomes.add("none")
        save_bundle(directory, DEMO, *NEW, overwrite=True)
        assert len(list(directory.iterdir())) == 2, f"call {n} left something behind for ever"
    assert outcomes == {"old" if overwrite else "none", "new ✓"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to be killed in the middle of a save")
def test_killed_at_any_call_leaves_the_old_bundle_or_the_new(tmp_path: Path) -> None:
    calls = calls_of_one_save(tmp_path / "count")
    for n in range(1, calls + 1):
        directory = tmp_path / str(n)
        save_bundle(directory, DEMO, *OLD)

        def save_and_die(directory: Path = directory, n: int = n) -> None:
            with pytest.MonkeyPatch.context() as monkeypatch:
                FailingSystem(monkeypatch, n, lambda: os._exit(9))
                save_bundle(directory, DEMO, *NEW, overwrite=True)

        assert exit_code_of(save_and_die) == 9, f"call {n} was not reached"
        loaded = load_bundle(directory, DEMO)
        assert same(loaded, OLD) or same(loaded, NEW), f"killed at call {n}"


def test_a_file_over_the_size_limit_of_the_system_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    code = (
        "import resource, signal, sys; from fastcascade.storage.files import write_atomically\n"
        "from fastcascade.errors import SaveError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomically(sys.argv[1], bytes(5000))\n"
        "except SaveError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert "File too large" in result.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_function_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupted(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_bit_flip_of_the_json_loads_identically_or_raises(tmp_path: Path) -> None:
    save_bundle(tmp_path, DEMO, *OLD)
    path = tmp_path / "demo.json"
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with contextlib.suppress(FileFormatError):
            assert same(load_bundle(tmp_path, DEMO), OLD), f"bit {bit}"


def test_every_bit_flip_and_truncation_of_the_tensors_raises(tmp_path: Path) -> None:
    save_bundle(tmp_path, DEMO, *OLD)
    (path,) = tmp_path.glob("demo-*.safetensors")
    good = path.read_bytes()
    flips = [bytes(b ^ (1 << bit % 8) if i == bit // 8 else b for i, b in enumerate(good)) for bit in
             range(8 * len(good))]  # fmt: skip
    for bad in [*flips, *(good[:n] for n in range(len(good))), good + b"\0"]:
        path.write_bytes(bad)
        with pytest.raises(FileFormatError, match="damaged"):
            load_bundle(tmp_path, DEMO)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forged_tensor_files_never_crash_the_loader(tmp_path: Path, data: st.DataObject) -> None:
    """Damage with a matching name and hashes reaches the safetensors parser itself."""
    save_bundle(tmp_path, DEMO, *OLD, overwrite=True)
    (path,) = tmp_path.glob("demo-*.safetensors")
    bad = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    del bad[data.draw(st.integers(0, len(bad)) | st.just(len(bad))) :]
    sha256 = hashlib.sha256(bad).hexdigest()
    (tmp_path / f"demo-{sha256}.safetensors").write_bytes(bad)
    reseal(tmp_path / "demo.json", lambda document: document["tensors"].update(sha256=sha256))
    with contextlib.suppress(FileFormatError):
        load_bundle(tmp_path, DEMO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=3), r"version 3.*reads up to 2.*upgrade"),
        (lambda d: d.update(version=True), "version True"),
        (lambda d: d.update(version="1"), "version '1'"),
        (lambda d: d.update(format="fastcascade plan"), "expected 'fastcascade demo'"),
        (lambda d: d.update(content=[1]), "no object 'content'"),
        (lambda d: d.update(tensors={"sha256": "../../secret"}), "names no tensor file"),
        (lambda d: d.update(tensors=None), "names no tensor file"),
        (lambda d: d.update(tensors={"sha256": "0" * 64}), "cannot read .*No such file"),
    ],
)
def test_forged_json_is_refused_with_its_reason(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    save_bundle(tmp_path, DEMO, *OLD)
    reseal(tmp_path / "demo.json", change)
    with pytest.raises(FileFormatError, match=message):
        load_bundle(tmp_path, DEMO)


def test_an_older_version_still_loads(tmp_path: Path) -> None:
    save_bundle(tmp_path, BundleFormat("demo", 1), *OLD)
    assert same(load_bundle(tmp_path, DEMO), OLD)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "duplicate key"),
        ('{"x": {"a": 1, "a": 1}}', "duplicate key"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "not a JSON number"),
        ("[1]", "expected an object"),
        ('{"a": ', "not valid JSON"),
        ("", "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"a":' * 64 + "1" + "}" * 64, "nests deeper than 64 levels"),
        ('{"a":' + "[" * 900 + "]" * 900 + "}", "nests deeper than 64 levels"),
        ('{"a": [' + "1," * 2**22 + "1]}", "more than 4194304 values"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_json_outside_the_strict_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_json(path)


def test_what_is_not_a_file_of_the_right_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(11))
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="11 bytes; expected at most 10"):
        read_bytes(tmp_path / "large", 10)
    for name in ("pipe", "", "missing"):
        with pytest.raises(FileFormatError, match=r"not a regular file|cannot read"):
            read_bytes(tmp_path / name, 10)
    with pytest.raises(FileFormatError, match="not valid JSON"):
        read_json(tmp_path / "binary")
