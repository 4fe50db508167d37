"""`predict` in tiles: all images where it is asked for, else those of very many pixels."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.raster import predict_raster
from smp_ensemble.tracking.flavor import load_model, save_model

TRANSFORM = Affine(0.2, 0, 400000, 0, -0.2, 5000000)
TYPED = ("predict", "--model", "model", "--input", "images", "--precision", "32", "--accelerator", "cpu")


@pytest.fixture
def images(make_tiny_network, tmp_path):
    """A saved model, a picture and a GeoTIFF of it."""
    ensemble = Ensemble([Member(make_tiny_network(1), imagenet())], mode="binary", class_names=("ground", "roof"))
    save_model(ensemble, tmp_path / "model")
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (7, 9, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "a.png")
    with rasterio.open(
        folder / "b.tif", "w", driver="GTiff", count=3, dtype="uint8", height=70, width=90, crs="EPSG:25832",
        transform=TRANSFORM,
    ) as raster:  # fmt: skip
        raster.write(pixels.transpose(2, 0, 1))
    return folder


@pytest.mark.parametrize("kind", ["mask", "probabilities"])
def test_all_images_are_cut_where_it_is_asked_for(command, images, tmp_path, kind):
    code, values, _ = command(*TYPED, "--kind", kind, "--tile", "32", "--overlap", "0.5")
    assert (code, values["count"], values["errors"]) == (0, 2, {})
    suffix = ".png" if kind == "mask" else ".npy"
    assert sorted(one.name for one in (tmp_path / "predictions").iterdir()) == [f"a{suffix}", "b.tif"]
    engine = Engine(load_model("model"), "cpu", "32")
    predict_raster(engine, images / "a.png", tmp_path / f"expected{suffix}", kind=kind, tile=32, overlap=0.5)
    expected = (tmp_path / f"expected{suffix}").read_bytes()
    assert (tmp_path / "predictions" / f"a{suffix}").read_bytes() == expected
    with rasterio.open(tmp_path / "predictions" / "b.tif") as raster:
        assert (raster.crs.to_epsg(), raster.transform) == (25832, TRANSFORM)


@pytest.mark.parametrize("limit", [70 * 90, 70 * 90 - 1])
def test_very_large_images_are_cut_anyway(command, images, tmp_path, monkeypatch, limit):
    seen = []
    monkeypatch.setattr("smp_ensemble.workflows.large.LARGE_PIXELS", limit)
    monkeypatch.setattr(
        "smp_ensemble.workflows.large.predict_raster",
        lambda *arguments, **options: (
            seen.append((options["tile"], options["overlap"])) or predict_raster(*arguments, **options)
        ),
    )
    assert command(*TYPED)[0] == 0
    assert seen == ([] if limit == 70 * 90 else [(512, 0.25)] * 2)


def test_a_broken_image_is_listed_and_the_rest_goes_on(command, images, tmp_path):
    (images / "c.png").write_bytes((images / "a.png").read_bytes()[:60])
    Image.new("L", (40, 40)).save(images / "d.png")
    code, values, _ = command(*TYPED, "--tile", "32")
    assert (code, values["count"], sorted(values["errors"])) == (0, 2, ["c.png", "d.png"])
    assert "1 bands, the model takes 3" in values["errors"]["d.png"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("--tile", "0"), "--tile: expected a whole number above 0, got 0"),
        (("--overlap", "1"), "expected overlap as a share of the tile, from 0 to below 1, got 1.0"),
        (("--tile", "32", "--kind", "rle"), "kind=rle keeps whole masks in memory: leave --tile out"),
    ],
)
def test_tiles_that_make_no_sense_are_refused_before_anything_is_loaded(command, typed, message):
    code, _, errors = command(*TYPED, *typed)
    assert code == 2
    assert message in errors[0]
