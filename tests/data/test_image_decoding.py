"""How encoded images become pixels: the same bits with and without simplejpeg, bounded, upright."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcascade.data import image_decoding
from fastcascade.data.image_decoding import decode
from fastcascade.errors import DataError

RNG = np.random.default_rng(0)


def photo(height: int, width: int, mode: str = "RGB", **options: object) -> bytes:
    """A JPEG with smooth areas, edges and noise."""
    coarse = Image.fromarray(RNG.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = (smooth + RNG.integers(-10, 11, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture
def by_pillow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    def decoded(*arguments: object) -> np.ndarray:
        with monkeypatch.context() as patch:
            patch.setattr(image_decoding, "_simplejpeg", lambda: None)
            return decode(*arguments)  # type: ignore[arg-type]

    return decoded


@pytest.mark.parametrize("size", [None, (8, 8), (32, 32), (17, 40), (224, 224)])
def test_simplejpeg_gives_the_bits_of_pillow(
    by_pillow: Callable[..., np.ndarray], size: tuple[int, int]
) -> None:
    pytest.importorskip("simplejpeg", reason="simplejpeg is optional")
    for number in range(24):
        height, width = (int(n) for n in RNG.integers(1, 700, 2))
        data = photo(
            height,
            width,
            "L" if number % 6 == 0 else "RGB",
            quality=int(RNG.integers(20, 100)),
            subsampling=number % 3,
            progressive=number % 2 == 0,
        )
        channels = 1 if number % 5 == 0 else 3
        fast = decode(data, channels, size, True)
        assert (fast == by_pillow(data, channels, size, True)).all(), (height, width, number)


def test_simplejpeg_decodes_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    simplejpeg = pytest.importorskip("simplejpeg", reason="simplejpeg is optional")
    seen = []

    class Spy:
        decode_jpeg_header = staticmethod(simplejpeg.decode_jpeg_header)

        @staticmethod
        def decode_jpeg(*arguments: object, **options: object) -> np.ndarray:
            array: np.ndarray = simplejpeg.decode_jpeg(*arguments, **options)
            seen.append(array.shape)
            return array

    monkeypatch.setattr(image_decoding, "_simplejpeg", lambda: Spy)
    decode(photo(640, 480), 3, (32, 32), True)
    decode(photo(640, 480), 3, None, False)
    assert seen == [(80, 60, 3), (640, 480, 3)] or seen == [(160, 120, 3), (640, 480, 3)]
    assert seen[0][0] >= 64


def test_reduced_decoding_is_close_to_full_decoding() -> None:
    data = photo(960, 1280, quality=92)
    full = Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BILINEAR)
    difference = np.abs(decode(data, 3, (32, 32), True).astype(int) - np.asarray(full))
    assert difference.mean() < 1.0
    assert difference.max() <= 8


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_truncated_jpegs_are_errors_in_both(by_pillow: Callable[..., np.ndarray], cut: float) -> None:
    data = photo(200, 300)
    for decoder in (decode, by_pillow):
        with pytest.raises(DataError, match="cannot be decoded"):
            decoder(data[: int(cut * len(data))], 3, (32, 32), True)


def test_bytes_after_damage_give_what_pillow_gives(by_pillow: Callable[..., np.ndarray]) -> None:
    for _ in range(40):
        data = bytearray(photo(60, 70))
        for position in RNG.integers(300, len(data) - 2, 3):
            data[position] = int(RNG.integers(256))
        results = []
        for decoder in (decode, by_pillow):
            try:
                results.append(decoder(bytes(data), 3, (32, 32), True))
            except DataError:
                results.append(None)
        assert (results[0] is None) == (results[1] is None)
        assert results[0] is None or (results[0] == results[1]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_exif_orientation_is_made_upright(
    by_pillow: Callable[..., np.ndarray], orientation: int, kind: str
) -> None:
    from PIL import ImageOps

    image = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    for decoder in (decode, by_pillow):
        assert (decoder(file.getvalue(), 3, None, False) == wanted).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "1", "P", "LA", "RGBA"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (9, 11, 3), np.uint8))
    image = image.convert(mode)
    file = io.BytesIO()
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    image.save(file, kind)
    found = decode(file.getvalue(), 3)
    assert (found == np.asarray(Image.open(file).convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["I;16", "F", "I"])
def test_more_than_8_bits_are_refused(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (4, 4)).save(file, "TIFF")
    with pytest.raises(DataError, match="expected 8 bits per channel"):
        decode(file.getvalue(), 3)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("P", (6, 5), color) for color in (3, 9)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert (decode(file.getvalue(), 3) == np.asarray(Image.open(file).convert("RGB"))).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_bombs_are_refused_before_decoding(side: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    png = bytearray(file.getvalue())
    png[16:24] = struct.pack(">II", side, side)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    with pytest.raises(DataError, match="pixels; expected at most 67108864"):
        decode(bytes(png), 3)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="bytes; expected at most"):
        decode(path, 3)
