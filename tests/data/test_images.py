from __future__ import annotations

import io
import struct
import sys
import tracemalloc
import types
import warnings
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from malformed import bomb
from PIL import Image

from smp_ensemble.data.images import declared_size, decode_image, image_size, read_image, read_mask
from smp_ensemble.data.limits import SERVED
from smp_ensemble.exceptions import DataError

RGB = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
GREY = np.arange(20, dtype=np.uint8).reshape(4, 5)


def save(path, picture, **options):
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_rgb_files_are_read_as_stored(tmp_path, ending):
    path = save(tmp_path / f"a.{ending}", Image.fromarray(RGB))
    np.testing.assert_array_equal(read_image(path), RGB)
    assert image_size(path) == (4, 5)
    np.testing.assert_array_equal(decode_image(path.read_bytes(), "a"), RGB)


def test_jpeg_is_read_unrotated_whatever_its_orientation_tag(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    path = save(tmp_path / "a.jpg", Image.fromarray(RGB), exif=exif)
    assert read_image(path).shape == (4, 5, 3)
    assert image_size(path) == (4, 5)


def test_one_band_stays_one_band(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", Image.fromarray(GREY)))[..., 0], GREY)
    alpha = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (5, 4), 9)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", alpha))[..., 0], GREY)
    black_and_white = save(tmp_path / "c.png", Image.fromarray(GREY > 9))
    assert read_image(black_and_white).dtype == np.uint8
    np.testing.assert_array_equal(read_image(black_and_white)[..., 0], (GREY > 9) * 255)


def test_alpha_is_dropped_and_palettes_become_colours(tmp_path):
    transparent = Image.fromarray(np.dstack([RGB, np.zeros((4, 5), np.uint8)]))
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", transparent)), RGB)
    palette = Image.fromarray(GREY % 2).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    plain = read_image(save(tmp_path / "b.png", palette))
    np.testing.assert_array_equal(plain[0, :2], [[10, 20, 30], [40, 50, 60]])
    see_through = save(tmp_path / "c.png", palette, transparency=bytes([0, 255]))
    np.testing.assert_array_equal(read_image(see_through), plain)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_values(tmp_path, ending):
    values = GREY.astype(np.uint16) * 3000
    image = read_image(save(tmp_path / f"a.{ending}", Image.fromarray(values)))
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image[..., 0], values)


def test_other_sensor_values_become_float32(tmp_path):
    for values in (GREY.astype(np.float32) / 7, GREY.astype(np.int32) * 100_000):
        image = read_image(save(tmp_path / "a.tif", Image.fromarray(values)))
        assert image.dtype == np.float32
        np.testing.assert_allclose(image[..., 0], values)


def test_masks_keep_ids_of_grey_levels_and_palettes(tmp_path):
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.png", Image.fromarray(GREY))), GREY)
    palette = Image.fromarray(GREY)
    palette.putpalette([0, 0, 0, 250, 0, 0] + [7] * 762)
    assert palette.mode == "P"
    np.testing.assert_array_equal(read_mask(save(tmp_path / "b.png", palette)), GREY)
    bits = read_mask(save(tmp_path / "c.png", Image.fromarray(GREY > 9)))
    np.testing.assert_array_equal(bits, GREY > 9)
    assert bits.dtype == np.uint8
    wide = save(tmp_path / "d.png", Image.fromarray(GREY.astype(np.uint16)))
    np.testing.assert_array_equal(read_mask(wide), GREY)


def test_masks_of_four_bits_are_not_stretched(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\x13")) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert read_mask(tmp_path / "a.png").tolist() == [[1, 3]]


def test_masks_with_colours_or_large_ids_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.png: expected one band of class ids .* found mode RGB; turn its colours"):
        read_mask(save(tmp_path / "a.png", Image.fromarray(RGB)))
    with pytest.raises(DataError, match=r"b\.png: expected class ids 0\.\.255, found 0\.\.57000"):
        read_mask(save(tmp_path / "b.png", Image.fromarray(GREY.astype(np.uint16) * 3000)))


def test_missing_files_are_named(tmp_path):
    for read in (read_image, read_mask, image_size):
        with pytest.raises(DataError, match=r"^cannot read image .*gone\.png: No such file or directory$"):
            read(tmp_path / "gone.png")


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    for read in (read_image, read_mask, image_size):
        with pytest.raises(DataError, match=r"cannot read image .*a\.png: expected PNG, JPEG, TIFF, BMP or WebP"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("ending", ["png", "jpeg", "tiff", "webp", "bmp"])
def test_damaged_files_give_pixels_or_one_line(ending):
    buffer = io.BytesIO()
    Image.fromarray(np.tile(RGB, (8, 8, 1))).save(buffer, ending)
    content = buffer.getvalue()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content[: rng.integers(1, len(content) + 1)])
        for place in rng.integers(0, min(len(damaged), 200), 3):
            damaged[place] = rng.integers(256)
        message = _complaint(bytes(damaged))
        assert message is None or message.startswith("cannot read image a.bin: ")
        assert message is None or not ("\n" in message or "0x" in message)


def _complaint(content: bytes) -> str | None:
    try:
        decode_image(content, "a.bin")
    except DataError as error:
        return str(error)
    return None


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", Image.new("1", (400, 400)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"cannot read image .* exceeds limit of"):
        read_image(path)


def test_a_png_that_was_changed_anywhere_is_broken():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "png")
    content = buffer.getvalue()
    for place in range(len(content) - 12):  # the last chunk is the end, and holds nothing
        changed = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        assert _complaint(changed) is not None, place


def test_only_the_formats_that_are_named_are_opened(tmp_path):
    for form in ("gif", "ppm", "eps", "pdf"):
        Image.fromarray(RGB).save(tmp_path / f"a.{form}", form)
        for read in (read_image, image_size):
            with pytest.raises(DataError, match="expected PNG, JPEG, TIFF, BMP or WebP"):
                read(tmp_path / f"a.{form}")


@pytest.mark.parametrize("ending", ["png", "jpeg", "tiff", "webp", "bmp"])
def test_sizes_are_refused_from_the_header_before_memory_is_asked_for(ending):
    content = bomb(ending.upper(), 8000)
    assert declared_size(content, "a") == (8000, 8000, 3)
    tracemalloc.start()
    with pytest.raises(DataError, match="cannot read image a: 8000 x 8000 pixels are more than the 16777216 allowed"):
        decode_image(content, "a", SERVED)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert decode_image(bomb(ending.upper(), 16), "a", SERVED).shape == (16, 16, 3)


def test_a_sparse_raster_of_many_bands_is_refused_before_it_is_read(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "a.tif"
    shape = {"width": 4000, "height": 4000, "count": 200, "dtype": "uint16"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        rasterio.open(path, "w", driver="GTiff", tiled=True, sparse_ok=True, **shape).close()
    assert path.stat().st_size < 10 << 20
    content = path.read_bytes()
    assert declared_size(content, "a") == (4000, 4000, 200)
    with pytest.raises(DataError, match="4000 x 4000 pixels of 200 bands are more than the 16777216 allowed"):
        decode_image(content, "a", SERVED)


def four_bands() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([RGB, RGB[..., :1]])).save(buffer, "tiff")
    alpha, band = (struct.pack("<HHIHH", 338, 3, 1, meaning, 0) for meaning in (2, 0))
    assert alpha in buffer.getvalue()
    return buffer.getvalue().replace(alpha, band)


def test_tiff_keeps_a_fourth_band_that_is_marked_as_alpha(tmp_path):
    pixels = np.dstack([RGB, RGB[..., :1]])
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.tif", Image.fromarray(pixels))), pixels)


def test_multi_band_tiff_names_the_extra_where_rasterio_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(DataError, match=r'a\.tif: .* need rasterio; pip install "smp-ensemble\[geo\]"'):
        decode_image(four_bands(), "a.tif")


def test_multi_band_tiff_is_read_through_rasterio(monkeypatch):
    bands = np.arange(5 * 4 * 3, dtype=np.int32).reshape(3, 5, 4)

    class Raster:
        height, width, count = 5, 4, 3

        def read(self):
            return bands

    class MemoryFile:
        def __init__(self, content):
            assert content == four_bands()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        @contextmanager
        def open(self, driver):
            assert driver == ["GTiff", "PNG"]
            yield Raster()

    errors = types.ModuleType("rasterio.errors")
    errors.NotGeoreferencedWarning = type("NotGeoreferencedWarning", (UserWarning,), {})
    rasterio = types.ModuleType("rasterio")
    rasterio.MemoryFile = MemoryFile
    monkeypatch.setitem(sys.modules, "rasterio", rasterio)
    monkeypatch.setitem(sys.modules, "rasterio.errors", errors)
    image = decode_image(four_bands(), "a.tif")
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, bands.transpose(1, 2, 0))
    assert declared_size(four_bands(), "a.tif") == (5, 4, 3)
