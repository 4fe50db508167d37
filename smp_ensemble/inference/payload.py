"""What people hand to `predict`, and what they get: arrays for arrays, a DataFrame for a DataFrame."""

from __future__ import annotations

import base64
import io
import json
import math
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from smp_ensemble.data import rle
from smp_ensemble.data.limits import FILES, Limits
from smp_ensemble.exceptions import InputError
from smp_ensemble.inference.inputs import check_arrays, image_bytes, image_cells, read_arrays, read_image_bytes
from smp_ensemble.inference.masks import make_mask
from smp_ensemble.inference.overlay import draw_overlay
from smp_ensemble.inference.requests import REPORT, check_work, is_report, with_params
from smp_ensemble.inference.uncertainty import COLUMNS, image_means
from smp_ensemble.registry import nearest
from smp_ensemble.typing import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    import numpy.typing as npt

    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.inference.engine import Engine

DEFAULT_KIND = "mask"
PARAMS = ("kind", "views", "passes", "on_error", "adaptive")
ERROR_COLUMN = "error"
PNG_LEVEL = 3
"""Of 9: a mask takes half the time of Pillow's 6 and a quarter more bytes."""
CHUNK_PIXELS = 16 * 512 * 512
"""Pixels of a DataFrame's images that are in memory, and predicted, at once; one image always is."""


def check_kind(kind: str) -> str:
    """Refuses what is no kind of prediction.

    Raises:
        InputError: Unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind '{kind}': {nearest(kind, KINDS)}")
    return kind


def answer(
    engine: Engine,
    data: Any,
    params: Mapping[str, Any],
    limits: Limits = FILES,
    turn: AbstractContextManager[Any] | None = None,
) -> Any:
    """Predicts for whatever was handed in.

    Args:
        engine: Runs the ensemble.
        data: Images as uint8 `(N, H, W, C)`, or a list of `(H, W, C)` of any sizes, or a DataFrame whose column
            `image` holds PNG, JPEG, TIFF, BMP or WebP bytes, or base64 of them.
        params: `kind`: `mask`, `probabilities`, `uncertainty`, `rle` or `overlay`; `views`: test-time views such as
            `none` or `d4`, by default `own`, the model's; `passes`, how many with dropout on are averaged; `adaptive`,
            whether images stop early by the model's rule; `on_error`:
            `raise`, or `report` for a DataFrame: what is wrong with a row is said in its cell of the column `error`,
            and the other rows are answered.
        limits: What is refused before it is decoded.
        turn: Is held while the engine runs, so that of several threads one at a time fills memory with activations.

    Returns:
        For arrays and lists: masks as uint8 `(N, H, W)`, in multilabel mode `(N, K, H, W)`; probabilities as float32
        `(N, K, H, W)`; uncertainty as float32 `(N, 3, H, W)`, which `Engine.uncertainty` explains; overlays as uint8
        `(N, H, W, 3)`; run lengths as a list of strings. A list of arrays where sizes differ. For a DataFrame: one
        column named after the kind, with its index: base64 of a PNG (mask, overlay), base64 of a `.npy` file
        (probabilities, uncertainty), or run lengths. Multilabel masks and all run lengths but the binary one are a JSON
        object with an entry for each class. With uncertainty come three columns of means over each image: `entropy`,
        `mutual_information`, `variation_ratio`. With `on_error=report` comes the column `error`, empty text where a row
        is fine; a row that is not has empty text as its result, and no means.

    Raises:
        InputError: Anything else; the message names what was expected and what came.
    """
    for name in params:
        if name not in PARAMS:
            raise InputError(f"unknown param '{str(name)[:40]}': {nearest(str(name), PARAMS)}")
    kind = check_kind(str(params.get("kind", DEFAULT_KIND)))
    report = is_report(params.get("on_error"))
    engine = with_params(engine, params, limits)
    turn = turn or nullcontext()
    if isinstance(data, pd.DataFrame):
        return _answer_frame(engine, data, kind, limits, turn, report=report)
    if report:
        raise InputError(f"on_error={REPORT} is for DataFrames: expected one, got {type(data).__name__}")
    images = read_arrays(data, engine.in_channels)
    check_work(check_arrays(images, limits), engine, limits)
    with turn:
        results = predict_as(engine, images, kind)
    if kind != "rle" and len({result.shape for result in results}) == 1:
        return np.stack(results)
    return results


def _answer_frame(
    engine: Engine, data: pd.DataFrame, kind: str, limits: Limits, turn: AbstractContextManager[Any], *, report: bool
) -> pd.DataFrame:
    """A row for each row. Headers of all are looked at first; then a few images at a time are decoded and predicted."""
    cells = image_cells(data)
    limits.check("request_images", len(cells), "images in one request")
    errors: dict[int, str] = {}
    contents: dict[int, bytes] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for row, cell in enumerate(cells):
        with _collected(errors, row, report=report):
            contents[row], sizes[row] = image_bytes(cell, f"row {row}", limits)
    check_work(list(sizes.values()), engine, limits)
    rows: dict[int, dict[str, Any]] = {}
    for chunk in _chunks(sizes):
        images: dict[int, Any] = {}
        for row in chunk:
            with _collected(errors, row, report=report):
                images[row] = read_image_bytes(contents.pop(row), f"row {row}", engine.in_channels, limits)
        with turn:
            results = predict_as(engine, list(images.values()), kind) if images else []
        for row, result in zip(images, results, strict=True):
            rows[row] = {kind: encode(result, kind, engine.ensemble)}
            if kind == "uncertainty":
                rows[row].update(zip(COLUMNS, image_means(result), strict=True))
    columns = [kind, *(COLUMNS if kind == "uncertainty" else ())]
    for row in errors:
        rows[row] = {name: "" if name == kind else None for name in columns}
    found = {name: [rows[row][name] for row in range(len(cells))] for name in columns}
    if report:
        found[ERROR_COLUMN] = [errors.get(row, "") for row in range(len(cells))]
    return pd.DataFrame(found, index=data.index, dtype=object if errors else None)  # None stays None: JSON knows no NaN


@contextmanager
def _collected(errors: dict[int, str], row: int, *, report: bool) -> Iterator[None]:
    """What is wrong with a row, kept for its cell where that is asked for."""
    try:
        yield
    except InputError as error:
        if not report:
            raise
        errors[row] = str(error)


def _chunks(sizes: Mapping[int, tuple[int, int]]) -> Iterator[list[int]]:
    """The rows in their order, as many at once as have `CHUNK_PIXELS`."""
    chunk: list[int] = []
    pixels = 0
    for row, size in sizes.items():
        if chunk and pixels + math.prod(size) > CHUNK_PIXELS:
            yield chunk
            chunk, pixels = [], 0
        chunk.append(row)
        pixels += math.prod(size)
    if chunk:
        yield chunk


def predict_as(engine: Engine, images: Sequence[npt.NDArray[np.generic]], kind: str) -> list[Any]:
    """One result for each of `images` `(H, W, C)`, in their order: an array, or for `rle` a string."""
    raw = predict_raw(engine, images, kind)
    return [render(engine.ensemble, image, one, kind) for image, one in zip(images, raw, strict=True)]


def predict_raw(engine: Engine, images: Sequence[npt.NDArray[np.generic]], kind: str) -> list[npt.NDArray[np.float32]]:
    """What `render` makes a kind of, for each of `images` `(H, W, C)`: maps of uncertainty, or probabilities."""
    return engine.uncertainty(images) if kind == "uncertainty" else engine.predict(images)


def render(ensemble: Ensemble, image: npt.NDArray[np.generic], raw: npt.NDArray[np.float32], kind: str) -> Any:
    """What `predict_raw` gives for one image as a kind: an array, or for `rle` a string."""
    if kind in {"probabilities", "uncertainty"}:
        return raw
    mask = make_mask(ensemble, image, raw)
    match kind:
        case "mask":
            return mask
        case "overlay":
            return draw_overlay(image, mask, ensemble.mode)
    if ensemble.mode == "binary":
        return rle.encode(mask == 1)  # 255 is a rejected pixel
    planes = mask == 1 if ensemble.mode == "multilabel" else [mask == index for index in range(len(raw))]
    return json.dumps({name: rle.encode(plane) for name, plane in _named(ensemble, planes)})


def encode(result: Any, kind: str, ensemble: Ensemble) -> str:
    """A result of `predict_as` as text, for a cell of a DataFrame."""
    if kind == "rle":
        return str(result)
    if kind in {"probabilities", "uncertainty"}:
        buffer = io.BytesIO()
        np.save(buffer, result, allow_pickle=False)
        return base64.b64encode(buffer.getvalue()).decode()
    if kind == "mask" and ensemble.mode == "multilabel":
        return json.dumps({name: to_png_base64(plane) for name, plane in _named(ensemble, result)})
    return to_png_base64(result)


def to_png_base64(picture: npt.NDArray[np.uint8]) -> str:
    """Base64 of a PNG of a mask `(H, W)` or an RGB picture `(H, W, 3)`."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return base64.b64encode(buffer.getvalue()).decode()


def _named(ensemble: Ensemble, planes: Sequence[Any] | npt.NDArray[np.uint8]) -> list[tuple[str, Any]]:
    names = ensemble.class_names or tuple(str(index) for index in range(len(planes)))
    return list(zip(names, planes, strict=True))
