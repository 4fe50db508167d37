"""Images of any size: the same as the engine and a stacked formula say, and resumed work is as if never interrupted."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from torch import nn

from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.postprocessing import Crf, PostProcessing
from smp_ensemble.exceptions import ConfigError, DataError, InputError
from smp_ensemble.inference import raster as raster_module
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.masks import make_mask
from smp_ensemble.inference.overlay import draw_overlay
from smp_ensemble.inference.raster import predict_raster
from smp_ensemble.inference.tiling import gaussian, make_grid

SIZE = (90, 130)
OUTPUTS = {"binary": 1, "multiclass": 4, "multilabel": 3}
NAMES = {"binary": ("ground", "roof"), "multiclass": tuple("abcd"), "multilabel": tuple("abc")}
TILES = {"tile": 40, "overlap": 0.3}


@contextmanager
def quiet():
    """Most of these images lie nowhere on Earth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def read(path: Path) -> np.ndarray:
    """Pixels `(B, H, W)`."""
    with quiet(), rasterio.open(path) as raster:
        return raster.read()


def make_engine(mode: str = "binary", bands: int = 3, views: str = "none", **options) -> Engine:
    members = []
    for seed in range(2):
        torch.manual_seed(seed)
        members.append(
            nn.Sequential(nn.Conv2d(bands, 6, 5, padding=2), nn.ReLU(), nn.Conv2d(6, OUTPUTS[mode], 5, padding=2))
        )
        with torch.no_grad():
            members[-1][0].weight /= 50
    return Engine(Ensemble(members, mode=mode, class_names=NAMES[mode], views=views, **options), "cpu", "32")


@pytest.fixture
def image(tmp_path) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 13, 3))
    pixels = np.kron(coarse, np.ones((10, 10, 1))).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return pixels


def stacked(engine: Engine, image: np.ndarray, tile: int, overlap: float, run=None) -> np.ndarray:
    """The weighted mean over all tiles, in float64, of what the engine says of each."""
    run = run or engine.predict
    grid = make_grid(*image.shape[:2], tile, overlap, engine.stride)
    high, wide = grid.tile_height, grid.tile_width
    weights = np.outer(gaussian(high), gaussian(wide))
    above, below = 0.0, np.zeros(image.shape[:2])
    for top in grid.tops:
        for left in grid.lefts:
            values = run([image[top : top + high, left : left + wide]])[0]
            full = np.zeros((len(values), *image.shape[:2]))
            full[:, top : top + high, left : left + wide] = weights * values
            below[top : top + high, left : left + wide] += weights
            above = above + full
    return above / below


@pytest.mark.parametrize("views", ["none", "d4"])
@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
def test_probabilities_are_the_weighted_mean_over_tiles(image, tmp_path, mode, views):
    engine = make_engine(mode, views=views)
    result = predict_raster(engine, tmp_path / "image.png", tmp_path / "out.npy", kind="probabilities", **TILES)
    found = np.load(tmp_path / "out.npy", allow_pickle=False)
    np.testing.assert_allclose(found, stacked(engine, image, **TILES), atol=2e-6)
    assert (result.height, result.width, result.tiles, result.resumed_rows) == (*SIZE, 6, 0)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["image.png", "out.npy"]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
@pytest.mark.parametrize("reject", [0.0, 0.6])
@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_masks_are_decided_from_them(image, tmp_path, mode, reject, suffix):
    engine = make_engine(mode, reject=reject)
    predict_raster(engine, tmp_path / "image.png", tmp_path / f"mask{suffix}", **TILES)
    predict_raster(engine, tmp_path / "image.png", tmp_path / "p.npy", kind="probabilities", **TILES)
    if suffix == ".npy":
        found = np.load(tmp_path / "mask.npy", allow_pickle=False)
    else:
        found = read(tmp_path / f"mask{suffix}")[0]
    probabilities = torch.from_numpy(np.load(tmp_path / "p.npy", allow_pickle=False))
    assert np.array_equal(found, engine.ensemble.decide(probabilities[None])[0].numpy())
    assert (reject > 0) == (found == 255).any()


@pytest.mark.parametrize("kind", ["mask", "probabilities", "uncertainty", "overlay"])
def test_an_image_of_one_tile_is_what_the_engine_says(image, tmp_path, kind):
    engine = make_engine("multiclass")
    predict_raster(engine, tmp_path / "image.png", tmp_path / "out.tif", kind=kind, tile=160)
    probabilities = engine.predict([image])[0]
    mask = make_mask(engine.ensemble, image, probabilities)
    expected = {
        "mask": mask[None],
        "probabilities": probabilities,
        "uncertainty": engine.uncertainty([image])[0],
        "overlay": draw_overlay(image, mask, "multiclass").transpose(2, 0, 1),
    }
    with quiet(), rasterio.open(tmp_path / "out.tif") as raster:
        assert np.array_equal(raster.read(), expected[kind])
        assert (
            raster.descriptions
            == {
                "mask": (None,),
                "probabilities": NAMES["multiclass"],
                "uncertainty": ("entropy", "mutual_information", "variation_ratio"),
                "overlay": (None,) * 3,
            }[kind]
        )


def test_uncertainty_and_overlays_are_blended_too(image, tmp_path):
    engine = make_engine("multiclass")
    source = tmp_path / "image.png"
    predict_raster(engine, source, tmp_path / "maps.npy", kind="uncertainty", **TILES)
    expected = stacked(engine, image, **TILES, run=engine.uncertainty)
    np.testing.assert_allclose(np.load(tmp_path / "maps.npy", allow_pickle=False), expected, atol=2e-6)
    predict_raster(engine, source, tmp_path / "mask.npy", **TILES)
    predict_raster(engine, source, tmp_path / "overlay.png", kind="overlay", **TILES)
    with Image.open(tmp_path / "overlay.png") as picture:
        mask = np.load(tmp_path / "mask.npy", allow_pickle=False)
        assert np.array_equal(np.asarray(picture), draw_overlay(image, mask, "multiclass"))


def test_a_geotiff_of_many_bands_keeps_its_place_and_what_is_no_data(tmp_path):
    pixels = np.random.default_rng(0).integers(1, 3000, (5, *SIZE), dtype=np.uint16)
    pixels[:, :60] = 0
    pixels[:, :, :50] = 0
    transform = Affine(0.2, 0, 400000, 0, -0.2, 5000000)
    with rasterio.open(
        tmp_path / "in.tif", "w", driver="GTiff", count=5, dtype="uint16", height=SIZE[0], width=SIZE[1],
        crs="EPSG:25832", transform=transform, nodata=0,
    ) as raster:  # fmt: skip
        raster.write(pixels)
    engine, nothing = make_engine("multilabel", bands=5), (pixels == 0).all(axis=0)
    for kind in ("mask", "probabilities"):
        predict_raster(engine, tmp_path / "in.tif", tmp_path / f"{kind}.tif", kind=kind, **TILES)
        with rasterio.open(tmp_path / f"{kind}.tif") as raster:
            assert (raster.crs.to_epsg(), raster.transform, raster.descriptions) == (25832, transform, tuple("abc"))
            found, nodata = raster.read(), raster.nodata
        if kind == "mask":
            assert nodata == 255
            assert np.array_equal(found == 255, np.broadcast_to(nothing, found.shape))
        else:
            assert np.array_equal(np.isnan(found), np.broadcast_to(nothing, found.shape))
            expected = stacked(engine, pixels.transpose(1, 2, 0), **TILES)
            np.testing.assert_allclose(found[:, ~nothing], expected[:, ~nothing], atol=2e-6)


def test_tiles_without_data_are_skipped(tmp_path, monkeypatch):
    with rasterio.open(
        tmp_path / "in.tif", "w", driver="GTiff", count=3, dtype="uint8", height=200, width=200, nodata=0,
        transform=Affine(1, 0, 5, 0, -1, 5),
    ) as raster:  # fmt: skip
        raster.write(np.pad(np.full((3, 20, 20), 9, np.uint8), ((0, 0), (0, 180), (180, 0))))
    engine, seen = make_engine(), []
    monkeypatch.setattr(
        Engine, "__call__", lambda self, images, run=Engine.__call__: seen.append(len(images)) or run(self, images)
    )
    predict_raster(engine, tmp_path / "in.tif", tmp_path / "mask.tif", tile=32, overlap=0)
    assert sum(seen) == 2  # the last column of tiles is moved back, so the data lies in two
    with rasterio.open(tmp_path / "mask.tif") as raster:
        assert np.array_equal(raster.read(1) != 255, np.pad(np.ones((20, 20), bool), ((0, 180), (180, 0))))
    with rasterio.open(tmp_path / "in.tif", "r+") as raster:
        raster.write(np.zeros((3, 200, 200), np.uint8))
    predict_raster(engine, tmp_path / "in.tif", tmp_path / "mask.tif", tile=32, overlap=0)
    with rasterio.open(tmp_path / "mask.tif") as raster:
        assert (raster.read(1) == 255).all()


class StopError(Exception):
    """Breaks a prediction off."""


def stop_after(monkeypatch, calls: int) -> None:
    """Lets the engine predict so many batches."""
    left = iter(range(calls))

    def call(self, images, run=Engine.__call__):
        if next(left, None) is None:
            raise StopError
        return run(self, images)

    monkeypatch.setattr(Engine, "__call__", call)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.7])
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("mask", ".png"), ("mask", ".tif"), ("mask", ".npy"), ("probabilities", ".tif"), ("probabilities", ".npy")],
)
def test_interrupted_work_goes_on_where_it_was_bit_for_bit(image, tmp_path, monkeypatch, kind, suffix, overlap):
    tile = 64 if overlap else 32
    monkeypatch.setattr(raster_module, "BATCH_PIXELS", 2 * tile**2)
    engine, source = make_engine("multiclass"), tmp_path / "image.png"
    options = {"kind": kind, "tile": tile, "overlap": overlap}
    predict_raster(engine, source, tmp_path / f"whole{suffix}", **options)
    output = tmp_path / f"parts{suffix}"
    resumed = []
    for calls in (3, 6, 9, 100):
        with monkeypatch.context() as patch:
            stop_after(patch, calls)
            try:
                resumed.append(predict_raster(engine, source, output, **options).resumed_rows)
                break
            except StopError:
                assert not output.exists()
                assert output.with_name(f"{output.name}.progress").exists()
    assert resumed[0] > 0
    assert output.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not [*tmp_path.glob("*.partial*"), *tmp_path.glob("*.progress")]


@pytest.mark.parametrize("change", ["source", "model", "threshold", "tile", "kind", "views", "resume"])
def test_other_work_starts_anew(image, tmp_path, monkeypatch, change):
    monkeypatch.setattr(raster_module, "BATCH_PIXELS", 2 * 32**2)
    source, output = tmp_path / "image.png", tmp_path / "out.npy"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(StopError):
            predict_raster(make_engine(), source, output, tile=32, overlap=0)
    assert predict_raster(make_engine(), source, tmp_path / "copy.npy", tile=32, overlap=0).resumed_rows == 0
    engine, options = make_engine(), {"tile": 32, "overlap": 0.0}
    if change == "source":
        Image.fromarray(255 - image).save(source)
    elif change == "model":
        with torch.no_grad():
            engine.ensemble.members[0][0].weight[0, 0, 0, 0] += 1
    elif change == "threshold":
        engine = make_engine(threshold=0.4)
    elif change == "views":
        engine = make_engine(views="flips")
    else:
        options |= {"tile": {"tile": 64}, "kind": {"kind": "probabilities"}, "resume": {"resume": False}}[change]
    assert predict_raster(engine, source, output, **options).resumed_rows == 0
    predict_raster(engine, source, tmp_path / "fresh.npy", **{**options, "resume": False})
    assert output.read_bytes() == (tmp_path / "fresh.npy").read_bytes()


SCRIPT = """
import sys, time, torch
from smp_ensemble import Engine, Ensemble
from smp_ensemble.inference.raster import predict_raster
torch.set_num_threads(1)
torch.manual_seed(0)
engine = Engine(Ensemble([torch.nn.Conv2d(3, 1, 5, padding=2)], mode="binary"), "cpu", "32")
run = Engine.__call__
def slowly(self, images):
    time.sleep(0.3)
    return run(self, images)
Engine.__call__ = slowly
predict_raster(engine, sys.argv[1], sys.argv[2], tile=32, overlap=0.25)
"""


@pytest.mark.slow
def test_a_process_that_was_killed_is_gone_on_with(tmp_path):
    source, output = tmp_path / "image.png", tmp_path / "parts.tif"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 64, 3), dtype=np.uint8)).save(source)
    killed = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SCRIPT, str(source), str(output)])
    deadline = time.monotonic() + 120
    while not output.with_name("parts.tif.progress").exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert not output.exists()
    torch.manual_seed(0)
    engine = Engine(Ensemble([nn.Conv2d(3, 1, 5, padding=2)], mode="binary"), "cpu", "32")
    assert 0 < predict_raster(engine, source, output, tile=32, overlap=0.25).resumed_rows < 400
    predict_raster(engine, source, tmp_path / "whole.tif", tile=32, overlap=0.25)
    assert output.read_bytes() == (tmp_path / "whole.tif").read_bytes()


@pytest.mark.parametrize("tile", [40, 160])
@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
def test_a_mask_is_cleaned_whole(image, tmp_path, mode, tile):
    settings = PostProcessing(min_area=30, max_hole=20)
    engine, plain = make_engine(mode, postprocess=settings), make_engine(mode)
    source = tmp_path / "image.png"
    predict_raster(engine, source, tmp_path / "mask.npy", tile=tile)
    predict_raster(plain, source, tmp_path / "p.npy", kind="probabilities", tile=tile)
    expected = make_mask(engine.ensemble, image, np.load(tmp_path / "p.npy", allow_pickle=False))
    found = np.load(tmp_path / "mask.npy", allow_pickle=False)
    assert np.array_equal(found, expected)
    predict_raster(plain, source, tmp_path / "raw.npy", tile=tile)
    assert not np.array_equal(found, np.load(tmp_path / "raw.npy", allow_pickle=False))


def test_a_crf_needs_one_tile(image, tmp_path):
    engine = make_engine(postprocess=PostProcessing(crf=Crf(iterations=1, window=3)))
    source, output = tmp_path / "image.png", tmp_path / "mask.png"
    with pytest.raises(ConfigError, match="CRF needs the image to be one tile, got 6 tiles: .* at least 130"):
        predict_raster(engine, source, output, **TILES)
    predict_raster(engine, source, output, tile=130)
    with Image.open(output) as picture:
        assert np.array_equal(np.asarray(picture), make_mask(engine.ensemble, image, engine.predict([image])[0]))


@pytest.mark.parametrize(
    ("name", "options", "engine", "message"),
    [
        ("out.png", {"kind": "probabilities"}, {}, r"probabilities to end in \.tif, \.tiff, \.npy, got 'out\.png'"),
        ("out.jpg", {}, {}, r"kind mask to end in \.png, \.tif, \.tiff, \.npy, got 'out\.jpg'"),
        ("out.png", {}, {"mode": "multilabel"}, r"kind mask in multilabel mode to end in \.tif, \.tiff, \.npy"),
        ("out.csv", {"kind": "rle"}, {}, "kind=rle keeps whole masks in memory: predict kind=mask"),
        ("out.png", {"kind": "masks"}, {}, "unknown kind 'masks': did you mean 'mask'"),
        ("image.png", {}, {}, "is the image itself: choose another"),
        ("out.png", {"tile": 0}, {}, "expected tile as a whole number of pixels above 0"),
        ("out.png", {"overlap": 1.0}, {}, "expected overlap as a share"),
        ("out.png", {"kind": "overlay", **TILES}, {"postprocess": PostProcessing(min_area=9)}, "post-processing needs"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_first(image, tmp_path, name, options, engine, message):
    with pytest.raises(InputError, match=message):
        predict_raster(make_engine(**engine), tmp_path / "image.png", tmp_path / name, **options)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["image.png"]


def test_limits_are_named(image, tmp_path, monkeypatch):
    source = tmp_path / "image.png"
    monkeypatch.setattr(raster_module, "MAX_CLEANED_PIXELS", 11699)
    with pytest.raises(
        ConfigError, match="whole masks of at most 11699 pixels, got 11700: choose a tile of at least 130"
    ):
        predict_raster(make_engine(postprocess=PostProcessing(min_area=9)), source, tmp_path / "out.png", **TILES)
    monkeypatch.setattr(raster_module, "MAX_STRIP_BYTES", 2**16)
    with pytest.raises(InputError, match=r"64 x 130 pixels, would need .* GiB, .* choose a smaller tile"):
        predict_raster(make_engine(), source, tmp_path / "out.png", **TILES)


def test_members_take_their_own_number_of_bands(tmp_path, make_tiny_network):
    from smp_ensemble.data.normalization import imagenet
    from smp_ensemble.ensembling.member import Member

    Image.new("L", (40, 40)).save(tmp_path / "grey.png")
    engine = Engine(Ensemble([Member(make_tiny_network(0), imagenet())], mode="binary"), "cpu", "32")
    with pytest.raises(DataError, match=r"grey\.png has 1 bands, the model takes 3"):
        predict_raster(engine, tmp_path / "grey.png", tmp_path / "out.png")


def test_the_bar_shows_megapixels_and_time_left(image, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(raster_module, "BATCH_PIXELS", 1)
    predict_raster(make_engine(), tmp_path / "image.png", tmp_path / "out.png", tile=32, progress=True)
    shown = capsys.readouterr().err
    assert "predict: " in shown
    assert "Mpx/s]" in shown
    predict_raster(make_engine(), tmp_path / "image.png", tmp_path / "out.png", tile=32)
    assert capsys.readouterr().err == ""


def test_without_rasterio_pillow_decodes_and_png_is_written(image, tmp_path, monkeypatch):
    engine, source = make_engine(), tmp_path / "image.png"
    result = asdict(predict_raster(engine, source, tmp_path / "with.png", **TILES))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    again = asdict(predict_raster(engine, source, tmp_path / "without.png", **TILES))
    assert {**result, "output": 0, "seconds": 0} == {**again, "output": 0, "seconds": 0}
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()
    with pytest.raises(InputError, match=r"writing 'out\.tif' needs rasterio: .*\[geo\].* ends in \.png or \.npy"):
        predict_raster(engine, source, tmp_path / "out.tif")


@pytest.mark.parametrize("factor", [0.9, 0.4])
def test_without_rasterio_too_many_pixels_are_not_decoded(image, tmp_path, monkeypatch, factor):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    limit = int(90 * 130 * factor)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=rf"at most {limit} \(PIL\.Image\.MAX_IMAGE_PIXELS\) .* pip install .*\[geo\]"):
        predict_raster(make_engine(), tmp_path / "image.png", tmp_path / "out.png")


def test_with_rasterio_there_is_no_such_limit(image, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    predict_raster(make_engine(), tmp_path / "image.png", tmp_path / "out.npy", **TILES)
    assert np.load(tmp_path / "out.npy", allow_pickle=False).shape == SIZE


def test_memory_does_not_grow_with_height(tmp_path):
    """As NumPy counts it: images of 800 and 3200 rows need the same."""
    engine, peaks = make_engine(), {}
    for height in (800, 3200):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, 300, 3), dtype=np.uint8)).save(
            tmp_path / "tall.png"
        )
        tracemalloc.start()
        try:
            predict_raster(engine, tmp_path / "tall.png", tmp_path / "mask.png", tile=64)
            peaks[height] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert 300 * 64 * 3 < peaks[3200] < 1.15 * peaks[800]
