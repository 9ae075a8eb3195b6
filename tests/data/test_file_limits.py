"""Files that are not what they seem: FIFOs, decompression bombs, GIF and TIFF, sets larger than memory."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastcascade as fc
from fastcascade.data.batches import arrays
from fastcascade.data.sources import load_data
from fastcascade.errors import DataError, FastCascadeError

pillow = pytest.importorskip("PIL.Image", reason="reading image files needs Pillow")
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)


def npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def write_npz(path: Path, name: str, header: bytes, zeros: int, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """One array whose data are zeros, written without holding them."""
    with zipfile.ZipFile(path, "w", method) as archive, archive.open(f"{name}.npy", "w") as member:
        member.write(header)
        for start in range(0, zeros, 2**20):
            member.write(bytes(min(2**20, zeros - start)))
    return path


def load_in_little_memory(path: Path, bytes_allowed: int) -> str:
    """The error of loading in a process that may allocate so many bytes beyond its start."""
    code = (
        "import resource, sys\n"
        "from fastcascade.data import npz\n"
        "from fastcascade.data.sources import load_data\n"
        "from fastcascade.errors import DataError\n"
        f"npz.MAX_MEMORY_BYTES = {bytes_allowed // 2}\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (size + {bytes_allowed},) * 2)\n"
        "try: load_data('npz:' + sys.argv[1])\n"
        "except DataError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def test_a_decompression_bomb_is_refused_before_it_is_decompressed(tmp_path: Path) -> None:
    """200 KB that are 200 MB."""
    path = write_npz(tmp_path / "a.npz", "images", npy_header((2**16, 32, 32, 3)), 2**16 * 3072)
    assert path.stat().st_size < 2**18
    assert "at most 33,554,432" in load_in_little_memory(path, 2**26)


def test_sizes_that_the_archive_declares_are_not_believed(tmp_path: Path) -> None:
    """Header and table of contents agree on 5 GiB, of which 1,000 bytes are there."""
    count = 5 * 2**30 // 3072
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
            archive.writestr("images.npy", npy_header((count, 32, 32, 3)) + bytes(1000))
            archive.filelist[0].file_size += count * 3072 - 1000
        with pytest.raises(DataError, match=r"5,368,70.* at most 4,294,967,296|not a readable npz"):
            load_data(tmp_path / "a.npz")


def test_arrays_that_must_be_in_memory_have_a_documented_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastcascade.data import npz

    monkeypatch.setattr(npz, "MAX_MEMORY_BYTES", 10_000)
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((60, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"11,520 bytes.* at most 10,000.*numpy\.savez"):
        load_data(tmp_path / "a.npz")
    np.savez_compressed(
        tmp_path / "b.npz", images=IMAGES, labels=np.arange(7), classes=np.array(["x" * 2300])
    )
    with pytest.raises(DataError, match="at most 10,000"):
        load_data(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", images=np.zeros((60, 8, 8, 3), np.uint8))
    assert len(load_data(tmp_path / "c.npz")) == 60


@pytest.mark.parametrize("shape", [(2**40, 0, 3, 3), (2**33, 1, 1, 0)])
def test_images_without_pixels_are_refused_whatever_their_number(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    path = write_npz(tmp_path / "a.npz", "images", npy_header(shape), 0)
    assert "expected four axes" in load_in_little_memory(path, 2**28)


def test_other_compression_methods_are_refused(tmp_path: Path) -> None:
    """bz2 and lzma decompress without a bound."""
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_npz(tmp_path / "a.npz", "images", npy_header((4, 8, 8, 3)), 768, method)
        with pytest.raises(DataError, match="compression"):
            load_data(tmp_path / "a.npz")


def test_a_huge_table_of_contents_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for i in range(30_000):
            archive.writestr(f"{i}.npy", b"")
    with pytest.raises(DataError, match="not a readable npz"):
        load_data(tmp_path / "a.npz")


def test_a_long_npy_header_is_refused(tmp_path: Path) -> None:
    header = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**28)
    path = write_npz(tmp_path / "a.npz", "images", header, 2**28)
    assert "not a readable npz" in load_in_little_memory(path, 2**27)


##### FIFOs


def fifo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


@pytest.fixture
def alarm() -> Any:
    """A test that hangs on a FIFO ends with an error instead."""
    import signal

    def stop(*_: object) -> None:
        raise TimeoutError("blocked")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)


@pytest.mark.usefixtures("alarm")
def test_a_fifo_in_a_folder_is_an_error_row(tmp_path: Path) -> None:
    fifo(tmp_path / "a.png")
    pillow.fromarray(IMAGES[0]).save(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("b.png")
    (tmp_path / "d.png").symlink_to("/dev/zero")
    images, errors = load_data(tmp_path).images.read(range(4))  # type: ignore[union-attr]
    assert "is a FIFO, not a regular file" in str(errors[0])
    assert errors[1:3] == [None, None]
    assert "is a device, not a regular file" in str(errors[3])
    assert (images == IMAGES[[0, 0]]).all()


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("{}/a.npz", ["a.npz"]),
        ("npz:{}/a.npz", ["a.npz"]),
        ("cifar10:{}", ["test_batch.bin"]),
        ("cifar10:{}/a.bin", ["a.bin"]),
        ("{}/a.bin", ["a.bin"]),
    ],
)
def test_a_fifo_in_place_of_a_data_set_is_refused(tmp_path: Path, source: str, files: list[str]) -> None:
    for name in files:
        fifo(tmp_path / name)
    with pytest.raises(DataError, match=r"is a FIFO, not a regular file|cannot infer"):
        load_data(source.format(tmp_path))


@pytest.mark.usefixtures("alarm")
def test_a_fifo_in_place_of_a_model_is_refused(tmp_path: Path) -> None:
    fifo(tmp_path / "cascade.json")
    fifo(tmp_path / "plan.json")
    for load in (fc.load, fc.load_plan):
        with pytest.raises(FastCascadeError, match="is a FIFO, not a regular file"):
            load(tmp_path)


##### Formats


def test_gif_and_tiff_are_rows(tmp_path: Path) -> None:
    picture = pillow.fromarray(IMAGES[0])
    few = picture.quantize(16)
    few.save(tmp_path / "a.gif", save_all=True, append_images=[pillow.new("P", (8, 8))])
    picture.save(tmp_path / "b.tif", save_all=True, append_images=[pillow.new("RGB", (8, 8))])
    picture.save(tmp_path / "c.tiff", compression="tiff_lzw")
    pillow.fromarray(IMAGES[1, :, :, 0].astype(np.uint16) * 200).save(tmp_path / "d.tif")
    picture.convert("F").save(tmp_path / "e.TIFF")
    (tmp_path / "f.gif").write_bytes(b"GIF89a" + bytes(20))
    data = load_data(tmp_path)
    assert list(data.ids) == ["a.gif", "b.tif", "c.tiff", "d.tif", "e.TIFF", "f.gif"]
    images, errors = data.images.read(range(6))  # type: ignore[union-attr]
    assert [error is None for error in errors] == [True, True, True, False, False, False]
    assert (images[0] == np.asarray(few.convert("RGB"))).all()
    assert (images[1] == IMAGES[0]).all()
    assert (images[2] == IMAGES[0]).all()
    assert "expected 8 bits per channel" in str(errors[3])


def test_images_in_formats_that_are_not_supported_are_error_rows(tmp_path: Path) -> None:
    pillow.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    for name in ("b.heic", "c.avif", "d.jp2"):
        (tmp_path / name).write_bytes(b"whatever")
    data = load_data(tmp_path)
    _, errors = data.images.read(range(4))  # type: ignore[union-attr]
    assert [error is None for error in errors] == [True, False, False, False]
    assert "is damaged, or its format is none of" in str(errors[1])


##### Data that stay on disk


@pytest.mark.parametrize("kind", ["npz", "cifar10"])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, kind: str) -> None:
    """100 MB of images are read in batches by a process that grows by a fraction of that."""
    if kind == "npz":
        path = tmp_path / "a.npz"
        write_npz(path, "images", npy_header((32_000, 32, 32, 3)), 32_000 * 3072, zipfile.ZIP_STORED)
    else:
        path = tmp_path / "test_batch.bin"
        path.write_bytes(bytes(32_000 * 3073))
    code = (
        "import sys\n"
        "from fastcascade.data.sources import load_data\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "print(sum(len(rows.ids) for rows in load_data(sys.argv[1]).rows(256)), peak() - before)\n"
    )
    command = [sys.executable, "-c", code, f"{kind}:{path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total, grown_kib = map(int, done.stdout.split())
    assert total == 32_000
    assert grown_kib < 30_000


def test_stored_images_are_read_at_any_position_and_in_any_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=np.arange(7))
    data = load_data(tmp_path / "a.npz").take([5, 6, 0, 0, 3])
    images, labels = arrays(data)
    assert torch.equal(images, torch.from_numpy(IMAGES[[5, 6, 0, 0, 3]]))
    assert labels is not None
    assert labels.tolist() == [5, 6, 0, 0, 3]
    assert (np.asarray(data.take([1, 4]).images) == IMAGES[[6, 3]]).all()
    again = load_data(tmp_path / "a.npz")
    assert [rows.ids for rows in again.rows(3)] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]


def test_big_endian_and_float_images_are_read_from_disk(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((5, 3, 4, 4)).astype(">f4")
    np.savez(tmp_path / "a.npz", images=values)
    assert torch.equal(arrays(load_data(tmp_path / "a.npz"))[0], torch.from_numpy(values.astype("f4")))


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES)
    data = load_data(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=IMAGES[::-1])
    with pytest.raises(DataError, match="has changed since it was checked"):
        next(data.rows(2))
