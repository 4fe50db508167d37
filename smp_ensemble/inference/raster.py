"""Images of any size, predicted tile by tile: memory is that of a few rows of tiles, and interrupted work goes on."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from smp_ensemble.exceptions import ConfigError, DataError, InputError
from smp_ensemble.inference.engine import MAX_BATCH_PIXELS
from smp_ensemble.inference.fingerprint import fingerprint
from smp_ensemble.inference.payload import check_kind
from smp_ensemble.inference.postprocess import clean
from smp_ensemble.inference.raster_files import BLOCK_ROWS, check_format, write_file
from smp_ensemble.inference.raster_rendering import render_rows
from smp_ensemble.inference.row_file import RowFile
from smp_ensemble.inference.rows import Strip
from smp_ensemble.inference.tiling import OVERLAP, SIGMA, TILE, Blender, make_grid
from smp_ensemble.inference.uncertainty import COLUMNS
from smp_ensemble.inference.windows import open_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    import numpy.typing as npt
    from torch import Tensor

    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.inference.engine import Engine
    from smp_ensemble.inference.rows import ImageRows, Rows
    from smp_ensemble.inference.tiling import Grid

BATCH_PIXELS = 4 * 512 * 512
"""Pixels of the tiles that the CPU predicts together; an accelerator gets as many as the engine runs at once."""

MAX_CLEANED_PIXELS = 2**26
"""Up to so many pixels a mask is cleaned whole, once all of it is there."""

MAX_STRIP_BYTES = 4 * 2**30
"""One row of tiles, read and predicted, may need so much memory."""


@dataclass(frozen=True)
class RasterResult:
    """What was written.

    Attributes:
        output: The file.
        height: In pixels.
        width: In pixels.
        tiles: That cover the image.
        resumed_rows: Rows of pixels that earlier, interrupted work had finished.
        seconds: Of this call.
    """

    output: Path
    height: int
    width: int
    tiles: int
    resumed_rows: int
    seconds: float


def predict_raster(
    engine: Engine,
    source: str | Path,
    output: str | Path,
    *,
    kind: str = "mask",
    tile: int = TILE,
    overlap: float = OVERLAP,
    resume: bool = True,
    progress: bool | None = None,
) -> RasterResult:
    """Predicts one image in overlapping tiles, blended by Gaussian weights, into one file.

    All members and views see a tile while it is in memory. What they say of a pixel is averaged over the tiles that it
    lies in, then decided, written and forgotten. An image that is no larger than a tile is predicted as the engine
    predicts it.

    Where the source has no data, masks are 255, probabilities and uncertainty NaN, and overlays black; tiles without
    any data are skipped. A GeoTIFF keeps the source's coordinate system and place.

    Post-processing looks at the whole mask: it is done once all of that is there, up to `MAX_CLEANED_PIXELS`. A CRF,
    and any post-processing of an overlay, needs the image to be one tile.

    Args:
        engine: Runs the ensemble.
        source: PNG, JPEG or TIFF, read as far as needed if rasterio is installed; anything else is decoded whole.
        output: Ends in `.png` (mask, overlay), `.tif` (any kind; with rasterio) or `.npy` (all but overlay). Until it
            is whole, finished rows lie in `NAME.partial.rows` beside it.
        kind: `mask`, `probabilities`, `uncertainty` or `overlay`.
        tile: Side of the tiles in pixels, rounded up to a multiple of the members' stride.
        overlap: Share of a tile's side that neighbours have in common, 0 to below 1.
        resume: Go on where an interrupted call with the same source, model and settings was; the result is the same,
            bit for bit. False: start anew.
        progress: Show a bar; None: on a terminal.

    Raises:
        InputError: An output that does not fit the kind, an image that cannot be read or has other bands than the
            model, an overlap that is no share, or post-processing that would need more than a few rows.
        OSError: The output cannot be written; the work is kept.
    """
    started = time.monotonic()
    source, output = Path(source), Path(output)
    kind = check_kind(kind)
    check_format(output, kind, engine.ensemble.mode)
    if output.resolve() == source.resolve():
        raise InputError(f"output {output} is the image itself: choose another")
    with open_image(source) as image:
        grid = make_grid(image.height, image.width, tile, overlap, engine.stride)
        _check(engine, image, grid, kind, source)
        output.parent.mkdir(parents=True, exist_ok=True)
        work = RowFile(output, _digest(engine, source, image, grid, kind), image.width, resume=resume)
        resumed = work.rows
        with _bar(image, resumed, progress) as bar:
            for rows in _finished_rows(engine, image, grid, kind, resumed, bar.update):
                work.append(rows)
        place = image.place
    blocks, shape = work.blocks(BLOCK_ROWS), (work.bands, grid.height, grid.width)
    if kind == "mask" and engine.ensemble.postprocess.active and grid.tiles > 1:
        blocks = _cleaned(work, engine.ensemble)
    write_file(output, blocks, shape, work.dtype, kind, place=place, names=_names(engine.ensemble, kind, work.bands))
    work.remove()
    return RasterResult(output, grid.height, grid.width, grid.tiles, resumed, time.monotonic() - started)


def _check(engine: Engine, image: ImageRows, grid: Grid, kind: str, source: Path) -> None:
    """Refuses before anything is predicted."""
    if engine.in_channels not in (None, image.bands):
        raise DataError(f"{source} has {image.bands} bands, the model takes {engine.in_channels}")
    outputs = max(1, len(engine.ensemble.class_names))
    needed = grid.tile_height * grid.width * (2 * image.bands * image.dtype.itemsize + 12 * outputs)
    if grid.tiles > 1 and needed > MAX_STRIP_BYTES:
        raise InputError(
            f"one row of tiles of {source}, {grid.tile_height} x {grid.width} pixels, would need "
            f"{needed / 2**30:.1f} GiB, and {MAX_STRIP_BYTES / 2**30:.0f} are allowed: choose a smaller tile"
        )
    if grid.tiles == 1 or kind not in {"mask", "overlay"}:
        return
    one_tile = (
        f"choose a tile of at least {max(image.height, image.width)} pixels if memory allows, or kind=probabilities"
    )
    settings = engine.ensemble.postprocess
    if settings.crf is not None:
        raise ConfigError(f"the model's CRF needs the image to be one tile, got {grid.tiles} tiles: {one_tile}")
    if kind == "overlay" and (settings.active or image.dtype != np.uint8):
        reason = "post-processing needs" if settings.active else f"stretching {image.dtype} to colours needs"
        raise ConfigError(f"{reason} the image to be one tile for kind=overlay, got {grid.tiles} tiles: {one_tile}")
    if settings.active and image.height * image.width > MAX_CLEANED_PIXELS:
        raise ConfigError(
            f"the model's post-processing looks at whole masks of at most {MAX_CLEANED_PIXELS} pixels, got "
            f"{image.height * image.width}: {one_tile}"
        )


def _digest(engine: Engine, source: Path, image: ImageRows, grid: Grid, kind: str) -> str:
    """Of everything that decides what finished rows hold."""
    state = source.stat()
    parts = [
        source.name, state.st_size, state.st_mtime_ns, image.height, image.width, image.bands, image.dtype.name,
        grid.tile_height, grid.tile_width, grid.tops, grid.lefts, SIGMA, kind, fingerprint(engine),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _bar(image: ImageRows, done: int, progress: bool | None) -> Any:
    """Megapixels, with throughput and time left."""
    return tqdm(
        total=image.height * image.width / 1e6,
        initial=done * image.width / 1e6,
        desc="predict",
        unit="Mpx",
        leave=False,
        disable=None if progress is None else not progress,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} Mpx [{elapsed}<{remaining}, {rate_fmt}]",
    )


def _finished_rows(
    engine: Engine, image: ImageRows, grid: Grid, kind: str, done: int, advance: Callable[[float], object]
) -> Iterator[npt.NDArray[Any]]:
    """Rows of the result below the first `done`, `(B, rows, W)`, as they become final.

    Rows of tiles that reach below those are predicted from the first on, in the same batches as ever.
    """
    strip, blender = Strip(image), Blender(grid)
    for row in range(grid.first_row(done), len(grid.tops)):
        top, bottom = grid.tops[row], grid.finished(row)
        rows = strip.move(top, top + grid.tile_height)
        megapixels = (bottom - top) * grid.width / 1e6 if bottom > done else 0.0
        columns = [column for column in range(len(grid.lefts)) if _has_data(rows, grid, column)]
        if not columns and blender.empty:
            columns = [0]  # says how many outputs there are
        for batch in _batches(columns, grid, engine):
            for column, values in zip(batch, _predict(engine, rows, grid, batch, kind), strict=True):
                blender.add(row, column, values)
            advance(megapixels * len(batch) / len(columns))
        values = blender.take(row)
        if bottom > done:
            yield render_rows(engine.ensemble, kind, values, rows.of(slice(bottom - top)), whole=grid.tiles == 1)


def _has_data(rows: Rows, grid: Grid, column: int) -> bool:
    left = grid.lefts[column]
    return rows.valid is None or bool(rows.valid[:, left : left + grid.tile_width].any())


def _batches(columns: Sequence[int], grid: Grid, engine: Engine) -> Iterator[Sequence[int]]:
    pixels = BATCH_PIXELS if engine.device.type == "cpu" else MAX_BATCH_PIXELS
    size = max(1, pixels // (grid.tile_height * grid.tile_width))
    for at in range(0, len(columns), size):
        yield columns[at : at + size]


def _predict(engine: Engine, rows: Rows, grid: Grid, columns: Sequence[int], kind: str) -> Sequence[Tensor]:
    """What the ensemble says of some tiles in a row, `(K, tile height, tile width)` each; of uncertainty three maps."""
    lefts = [grid.lefts[column] for column in columns]
    tiles = [rows.pixels[:, :, left : left + grid.tile_width] for left in lefts]
    if kind == "uncertainty":
        return [torch.from_numpy(maps) for maps in engine.uncertainty([tile.transpose(1, 2, 0) for tile in tiles])]
    batch = np.stack(tiles)
    return [*engine(torch.from_numpy(batch if batch.dtype == np.uint8 else batch.astype(np.float32))).cpu()]


def _cleaned(work: RowFile, ensemble: Ensemble) -> Iterator[npt.NDArray[np.uint8]]:
    """The whole mask after post-processing, in blocks."""
    mask = np.concatenate([*work.blocks(BLOCK_ROWS)], axis=1)
    planes = mask if ensemble.mode == "multilabel" else mask[0]
    cleaned: npt.NDArray[np.uint8] = clean(planes, ensemble.mode, ensemble.postprocess).reshape(mask.shape)
    for top in range(0, cleaned.shape[1], BLOCK_ROWS):
        yield cleaned[:, top : top + BLOCK_ROWS]


def _names(ensemble: Ensemble, kind: str, bands: int) -> Sequence[str]:
    """Of the bands of the result, where they have some."""
    if kind == "uncertainty":
        return COLUMNS
    names = ensemble.class_names[-1:] if ensemble.mode == "binary" else ensemble.class_names
    return names if kind != "overlay" and len(names) == bands else ()
