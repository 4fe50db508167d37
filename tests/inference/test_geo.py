"""rasterio's side: pixels as `read_image` gives them, and a GeoTIFF that keeps where it lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image
from rasterio.control import GroundControlPoint

from smp_ensemble.data.images import read_image
from smp_ensemble.exceptions import DataError
from smp_ensemble.inference import geo
from smp_ensemble.inference.rows import Place
from smp_ensemble.inference.windows import open_image, size_of

TRANSFORM = Affine(0.2, 0, 400000, 0, -0.2, 5000000)


def make_tiff(path: Path, pixels: np.ndarray, **options) -> Path:
    profile = {"driver": "GTiff", "count": len(pixels), "dtype": pixels.dtype, "transform": TRANSFORM, **options}
    with rasterio.open(path, "w", height=pixels.shape[1], width=pixels.shape[2], crs="EPSG:25832", **profile) as raster:
        raster.write(pixels)
    return path


def read_all(path: Path, step: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `(H, W, C)` and which are valid, read a few rows at a time."""
    with open_image(path) as image:
        parts = [image.read(top, min(top + step, image.height)) for top in range(0, image.height, step)]
        assert (image.bands, image.dtype) == (parts[0].pixels.shape[0], parts[0].pixels.dtype)
    valid = [np.ones(one.pixels.shape[1:], bool) if one.valid is None else one.valid for one in parts]
    return np.concatenate([one.pixels for one in parts], axis=1).transpose(1, 2, 0), np.concatenate(valid)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pixels_are_those_of_read_image(tmp_path, mode, suffix):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8))
    picture = picture.convert("L").convert(mode) if mode in {"LA", "1"} else picture.convert(mode)
    path = tmp_path / f"one{suffix}"
    picture.save(path)
    pixels, valid = read_all(path)
    expected = read_image(path)
    assert pixels.dtype == expected.dtype
    assert np.array_equal(pixels, expected)
    assert valid.all()
    assert size_of(path) == (20, 31)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32", "float64"])
@pytest.mark.parametrize("bands", [1, 4, 7])
def test_any_bands_and_depth(tmp_path, dtype, bands):
    pixels = np.random.default_rng(0).integers(0, 200, (bands, 20, 31)).astype(dtype)
    path = make_tiff(tmp_path / "one.tif", pixels)
    found, valid = read_all(path)
    kept = dtype if dtype in {"uint8", "uint16", "int16"} else "float32"
    assert found.dtype == kept
    assert np.array_equal(found, read_image(path))  # of which Pillow gives a single band of int16 as float32
    assert valid.all()


def test_nodata_and_masks_are_told_apart_from_data(tmp_path):
    pixels = np.random.default_rng(0).integers(1, 200, (3, 20, 31), dtype=np.uint8)
    pixels[:, :5] = 0
    pixels[0, 5:] = 0  # a band alone may be 0
    found, valid = read_all(make_tiff(tmp_path / "nodata.tif", pixels, nodata=0))
    assert np.array_equal(valid, np.arange(20)[:, None].repeat(31, 1) >= 5)
    assert np.array_equal(found, pixels.transpose(1, 2, 0))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        path = make_tiff(tmp_path / "masked.tif", pixels)
        with rasterio.open(path, "r+") as raster:
            raster.write_mask(np.arange(31)[None].repeat(20, 0) < 9)
    found, valid = read_all(path)
    assert np.array_equal(valid, np.arange(31)[None].repeat(20, 0) < 9)
    assert (found[:, 9:] == 0).all()


def test_a_geotiff_keeps_where_it_lies_in_compressed_blocks(tmp_path):
    pixels = np.random.default_rng(0).random((2, 700, 530)).astype(np.float32).round(1)
    blocks = (pixels[:, top : top + geo.BLOCK] for top in range(0, 700, geo.BLOCK))
    with rasterio.open(make_tiff(tmp_path / "source.tif", pixels)) as source:
        place = geo.GeoRows(source).place
    names, path = ("roof", "road"), tmp_path / "one.tif"
    geo.write_geotiff(path, blocks, pixels.shape, pixels.dtype, place=place, nodata=float("nan"), names=names)
    with rasterio.open(path) as raster:
        assert np.array_equal(raster.read(), pixels)
        assert (raster.crs.to_epsg(), raster.transform, raster.descriptions) == (25832, TRANSFORM, names)
        assert np.isnan(raster.nodata)
        assert (raster.profile["tiled"], raster.profile["compress"]) == (True, "deflate")
        assert raster.block_shapes == [(512, 512)] * 2
        assert raster.tags(ns="IMAGE_STRUCTURE").get("PREDICTOR", "3") == "3"
    assert path.stat().st_size < 0.6 * pixels.nbytes


def test_control_points_are_kept_in_place_of_a_transform(tmp_path):
    points = [
        GroundControlPoint(row, col, 10 + col, 50 - row, id=str(row + col)) for row, col in ((0, 0), (0, 9), (9, 0))
    ]
    with rasterio.open(
        tmp_path / "source.tif", "w", driver="GTiff", count=1, dtype="uint8", height=10, width=10, gcps=points,
        crs="EPSG:4326",
    ) as raster:  # fmt: skip
        raster.write(np.ones((1, 10, 10), np.uint8))
    with open_image(tmp_path / "source.tif") as image:
        place = image.place
    geo.write_geotiff(
        tmp_path / "one.tif", [np.ones((1, 10, 10), np.uint8)], (1, 10, 10), np.dtype("uint8"), place=place
    )
    with rasterio.open(tmp_path / "one.tif") as raster:
        found, system = raster.gcps
    assert system.to_epsg() == 4326
    assert [(one.row, one.col, one.x, one.y) for one in found] == [(one.row, one.col, one.x, one.y) for one in points]


def test_an_image_without_a_place_stays_without(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    with open_image(tmp_path / "one.png") as image:
        assert image.place == Place()
    geo.write_geotiff(
        tmp_path / "one.tif", [np.ones((1, 9, 9), np.uint8)], (1, 9, 9), np.dtype("uint8"), place=image.place
    )
    assert read_all(tmp_path / "one.tif")[0].all()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("cut", [0.02, 0.5])
def test_a_broken_file_is_named(tmp_path, suffix, cut):
    path = tmp_path / f"one{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    with pytest.raises(DataError, match=f"cannot read image .*one{suffix}"):
        read_all(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read image .*nowhere\.tif: No such file"):
        read_all(tmp_path / "nowhere.tif")


def test_formats_that_refer_to_other_files_are_not_opened(tmp_path):
    make_tiff(tmp_path / "secret.tif", np.ones((1, 9, 9), np.uint8))
    text = '<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
    text += f"<SourceFilename>{tmp_path / 'secret.tif'}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    (tmp_path / "one.tif").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="expected PNG, JPEG, TIFF, BMP or WebP, found none"):
        read_all(tmp_path / "one.tif")
