"""Which images `predict` cuts into tiles, and one such image to its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference import geo
from smp_ensemble.inference.raster import predict_raster
from smp_ensemble.inference.tiling import TILE, make_grid

if TYPE_CHECKING:
    from pathlib import Path

    from smp_ensemble.inference.engine import Engine
    from smp_ensemble.workflows.options import PredictOptions

LARGE_PIXELS = 4096 * 4096
"""Images of more pixels are cut into tiles, whether or not it was asked for."""

_TIFF = (".tif", ".tiff")


def check_tiles(options: PredictOptions) -> None:
    """Refuses tiles that make no sense, before anything is loaded.

    Raises:
        ConfigError: `kind=rle` in tiles, or an overlap that is no share below 1.
    """
    if options.tile is not None and options.kind == "rle":
        raise ConfigError("kind=rle keeps whole masks in memory: leave --tile out, or predict --kind mask")
    make_grid(1, 1, TILE, options.overlap)


def is_large(size: tuple[int, int], options: PredictOptions) -> bool:
    """Whether an image of this height and width is cut into tiles: all are with `--tile`, else very large ones."""
    return options.tile is not None or (options.kind != "rle" and size[0] * size[1] > LARGE_PIXELS)


def predict_large(engine: Engine, source: Path, target: Path, options: PredictOptions) -> Path:
    """Predicts one image in tiles, and goes on with what an interrupted call left.

    Args:
        engine: Runs the ensemble.
        source: The image.
        target: Where a small image's result would be; what is written has this name, with another ending where the
            source is a TIFF (`.tif`, if rasterio is installed) or the kind needs it.
        options: Say kind, tile and overlap.

    Returns:
        The file.

    Raises:
        InputError: As `predict_raster`.
    """
    tiff = source.suffix.lower() in _TIFF and geo.available()
    picture = options.kind == "overlay" or (options.kind == "mask" and engine.ensemble.mode != "multilabel")
    output = target.with_suffix(".tif" if tiff else ".png" if picture else ".npy")
    tile = TILE if options.tile is None else options.tile
    return predict_raster(engine, source, output, kind=options.kind, tile=tile, overlap=options.overlap).output
