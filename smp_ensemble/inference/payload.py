"""What people hand to `predict`, and what they get: arrays for arrays, a DataFrame for a DataFrame."""

from __future__ import annotations

import base64
import binascii
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from smp_ensemble.data import rle
from smp_ensemble.data.images import decode_image
from smp_ensemble.ensembling.views import OWN
from smp_ensemble.exceptions import InputError
from smp_ensemble.inference.masks import make_mask
from smp_ensemble.inference.overlay import draw_overlay
from smp_ensemble.inference.uncertainty import COLUMNS, image_means
from smp_ensemble.registry import nearest
from smp_ensemble.typing import KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.inference.engine import Engine

DEFAULT_KIND = "mask"
PARAMS = ("kind", "views", "passes")
IMAGE_COLUMN = "image"


def check_kind(kind: str) -> str:
    """Refuses what is no kind of prediction.

    Raises:
        InputError: Unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind '{kind}': {nearest(kind, KINDS)}")
    return kind


def answer(engine: Engine, data: Any, params: Mapping[str, Any]) -> Any:
    """Predicts for whatever was handed in.

    Args:
        engine: Runs the ensemble.
        data: Images as uint8 `(N, H, W, C)`, or a list of `(H, W, C)` of any sizes, or a DataFrame whose column
            `image` holds PNG, JPEG or TIFF bytes, or base64 of them.
        params: `kind`: `mask`, `probabilities`, `uncertainty`, `rle` or `overlay`; `views`: test-time views such as
            `none` or `d4`, by default `own`, the model's; `passes`, how many with dropout on are averaged.

    Returns:
        For arrays and lists: masks as uint8 `(N, H, W)`, in multilabel mode `(N, K, H, W)`; probabilities as float32
        `(N, K, H, W)`; uncertainty as float32 `(N, 3, H, W)`, which `Engine.uncertainty` explains; overlays as uint8
        `(N, H, W, 3)`; run lengths as a list of strings. A list of arrays where sizes differ. For a DataFrame: one
        column named after the kind, with its index: base64 of a PNG (mask, overlay), base64 of a `.npy` file
        (probabilities, uncertainty), or run lengths. Multilabel masks and all run lengths but the binary one are a JSON
        object with an entry for each class. With uncertainty come three columns of means over each image: `entropy`,
        `mutual_information`, `variation_ratio`.

    Raises:
        InputError: Anything else; the message names what was expected and what came.
    """
    for name in params:
        if name not in PARAMS:
            raise InputError(f"unknown param '{name}': {nearest(name, PARAMS)}")
    kind = check_kind(str(params.get("kind", DEFAULT_KIND)))
    passes = params.get("passes")
    passes = None if passes is None else _to_whole(passes, "passes")
    engine = engine.with_options(passes, str(params.get("views") or OWN))
    results = predict_as(engine, read_images(data, engine.in_channels), kind)
    if isinstance(data, pd.DataFrame):
        frame = pd.DataFrame({kind: [encode(one, kind, engine.ensemble) for one in results]}, index=data.index)
        if kind == "uncertainty":
            frame[list(COLUMNS)] = [image_means(one) for one in results]
        return frame
    if kind != "rle" and len({result.shape for result in results}) == 1:
        return np.stack(results)
    return results


def predict_as(engine: Engine, images: Sequence[npt.NDArray[np.generic]], kind: str) -> list[Any]:
    """One result for each of `images` `(H, W, C)`, in their order: an array, or for `rle` a string."""
    raw = predict_raw(engine, images, kind)
    return [render(engine.ensemble, image, one, kind) for image, one in zip(images, raw, strict=True)]


def predict_raw(engine: Engine, images: Sequence[npt.NDArray[np.generic]], kind: str) -> list[npt.NDArray[np.float32]]:
    """What `render` makes a kind of, for each of `images` `(H, W, C)`: maps of uncertainty, or probabilities."""
    return engine.uncertainty(images) if kind == "uncertainty" else engine.predict(images)


def _to_whole(value: Any, name: str) -> int:
    """A whole number of Python's or NumPy's; which ones make sense is the engine's to say."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"expected {name} as a whole number above 0, got {value!r}")
    return int(value)


def read_images(data: Any, bands: int | None = None) -> list[npt.NDArray[np.generic]]:
    """Images `(H, W, C)` from an array, a list of arrays, or a DataFrame of bytes.

    Args:
        data: What was handed in.
        bands: C, the number of bands that the model takes; None: any.

    Raises:
        InputError: Wrong shape, type or value, broken image bytes, or nothing at all.
    """
    if isinstance(data, pd.DataFrame):
        if IMAGE_COLUMN not in data.columns:
            raise InputError(f"expected a column '{IMAGE_COLUMN}', got {', '.join(map(str, data.columns)) or 'none'}")
        images = [
            decode_image(to_bytes(value, f"row {row}"), f"row {row}")
            for row, value in enumerate(data[IMAGE_COLUMN].tolist())
        ]
    elif isinstance(data, np.ndarray):
        if data.ndim != 4:
            hint = ": add the batch axis, images[None]" if data.ndim == 3 else ""
            raise InputError(f"expected an array of shape (N, H, W, C), got {data.shape}{hint}")
        images = list(data)
    elif isinstance(data, list | tuple):
        images = list(data)
    else:
        raise InputError(
            f"expected an array (N, H, W, C), a list of arrays (H, W, C) or a DataFrame, got {type(data).__name__}"
        )
    if not images:
        raise InputError("expected at least one image, got none")
    for index, image in enumerate(images):
        _check_image(image, index, bands)
    return images


def _check_image(image: Any, index: int, bands: int | None) -> None:
    if not isinstance(image, np.ndarray) or image.ndim != 3 or 0 in image.shape:
        shape = image.shape if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"expected image {index} as an array of shape (H, W, C), got {shape}")
    if bands is not None and image.shape[-1] != bands:
        hint = ": channels come last" if image.shape[0] == bands else ""
        raise InputError(f"expected image {index} with {bands} bands, shape (H, W, {bands}), got {image.shape}{hint}")
    if image.dtype.kind not in "uif":
        raise InputError(f"expected image {index} to hold numbers, raw pixel values, got dtype {image.dtype}")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise InputError(f"expected image {index} to hold finite values, got NaN or infinity")


def to_bytes(value: Any, where: str, what: str = "image") -> bytes:
    """A cell of a DataFrame, bytes or base64 of them, as bytes.

    Args:
        value: The cell.
        where: It stands, for errors: `row 3`.
        what: The bytes are of.

    Raises:
        InputError: Neither of both.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"expected base64 of {what} bytes in {where}, got other text: {error}") from error
    raise InputError(f"expected {what} bytes or base64 in {where}, got {type(value).__name__}")


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
    Image.fromarray(picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _named(ensemble: Ensemble, planes: Sequence[Any] | npt.NDArray[np.uint8]) -> list[tuple[str, Any]]:
    names = ensemble.class_names or tuple(str(index) for index in range(len(planes)))
    return list(zip(names, planes, strict=True))
