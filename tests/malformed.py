"""Requests that a server must refuse: good ones, damaged in one place by a seed."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
JSON = "application/json"


class Request(NamedTuple):
    """A body with its type; `what` says what is wrong with it."""

    what: str
    body: bytes
    content_type: str = JSON


def picture(seed: int = 0, form: str = "PNG", size: tuple[int, int] = (33, 40), bands: int = 3) -> bytes:
    """An encoded image of noise."""
    shape = size if bands == 1 else (*size, bands)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def frame(*cells: Any, **params: Any) -> bytes:
    """The body of a request with these cells; bytes become base64."""
    texts = [base64.b64encode(cell).decode() if isinstance(cell, bytes) else cell for cell in cells]
    body: dict[str, Any] = {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}}
    return json.dumps({**body, **({"params": params} if params else {})}).encode()


def bomb(form: str, side: int) -> bytes:
    """A small file whose header speaks of `side` x `side` pixels."""
    content = bytearray(picture(0, form, (16, 16)))
    if form == "PNG":
        header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
        content[12:33] = header + struct.pack(">I", zlib.crc32(header))
    elif form == "BMP":
        content[18:26] = struct.pack("<ii", side, side)
    elif form == "JPEG":
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", side, side)
    elif form == "WEBP":
        at = content.index(b"\x9d\x01\x2a") + 3
        content[at : at + 4] = struct.pack("<HH", side, side)
    else:
        for tag in (256, 257):  # width and height, each one LONG
            entry = struct.pack("<HHI", tag, 4, 1)
            at = content.index(entry) + len(entry)
            content[at : at + 4] = struct.pack("<I", side)
    return bytes(content)


def all_requests(seed: int, rounds: int) -> Iterator[Request]:
    """Each kind of damage `rounds` times at random places, and once what knows no chance."""
    draw = random.Random(seed)
    for number in range(rounds):
        for make in (_images, _cells, _params, _tensors, _texts):
            for what, body in make(draw):
                yield Request(f"{what}, round {number}", body)
    for what, value in _shapes():
        yield Request(what, json.dumps(value).encode())
    for what, text in (("comma list", b"image\nno base64!\n"), ("no column", b"picture\nx\n"), ("nothing", b"")):
        yield Request(f"csv: {what}", text, "text/csv")
    yield Request("csv: other encoding", b"image\n\xff\xfe\n", "text/csv")
    yield Request("parquet: noise", draw.randbytes(300), "application/vnd.apache.parquet")


def _images(draw: random.Random) -> Iterator[tuple[str, bytes]]:
    for form in FORMATS:
        content = picture(draw.randrange(1000), form)
        yield f"{form} cut short", frame(content[: draw.randrange(1, int(0.9 * len(content)))])
        yield f"{form} with noise for pixels", frame(content[: draw.randrange(2, 12)] + draw.randbytes(300))
        yield f"{form} of too many pixels", frame(bomb(form, draw.randrange(4200, 16000)))
    content = bytearray(picture(draw.randrange(1000)))
    content[draw.randrange(len(content) - 12)] ^= 1 << draw.randrange(8)
    yield "PNG with a flipped bit", frame(bytes(content))
    yield "noise", frame(draw.randbytes(draw.randrange(400)))
    yield "a form that is not taken", frame(picture(0, draw.choice(["GIF", "PPM", "ICO", "TGA"])))
    bands = draw.choice([1, 4])
    yield f"{bands} bands", frame(picture(0, "TIFF" if bands == 4 else "PNG", bands=bands))
    good = [picture(number) for number in range(3)]
    good.insert(draw.randrange(4), good[0][:60])
    yield "one broken row of four", frame(*good)


def _cells(draw: random.Random) -> Iterator[tuple[str, bytes]]:
    good = base64.b64encode(picture()).decode()
    at = draw.randrange(len(good) - 8)
    wrong = [
        None, draw.random(), draw.randrange(1 << 40), True, float("nan"), [], [1, 2], {}, {"image": good}, "",
        good[:at] + draw.choice("!*-_ äß\n") + good[at + 1 :], good[:-1], good + "=" * 5,
        "data:image/png;base64," + good,
    ]  # fmt: skip
    value = draw.choice(wrong)
    yield f"cell {str(value)[:20]!r}", frame(value)
    value = draw.choice(wrong)
    yield f"second cell {str(value)[:20]!r}", frame(good, value)


def _params(draw: random.Random) -> Iterator[tuple[str, bytes]]:
    wrong: dict[str, list[Any]] = {
        "kind": ["masks", "", "MASK", 3, None, ["mask"], {"kind": "mask"}, "mask" * draw.randrange(2, 99), True],
        "views": ["d5", "none+none", "scales:9", "scales:", "scales:nan", "flips+d4", 4, ["d4"], "scales:1,1",
                  "x" * 5000,
                  "scales:" + ",".join(str(1 + number / 1e4) for number in range(3000))],
        "passes": [0, -draw.randrange(1, 99), 101, 10**12, 10**30, 1.5, "3", "many", True, [1], {}, float("nan")],
        "on_error": ["ignore", 1, ["raise"], "null"],
    }  # fmt: skip
    for name, values in wrong.items():
        value = draw.choice(values)
        yield f"{name}={str(value)[:20]!r}", frame(picture(), **{name: value})
    body = json.loads(frame(picture()))
    body["params"] = draw.choice([[], ["kind"], "mask", 3, True])
    if body["params"]:
        yield f"params {body['params']!r}", json.dumps(body).encode()


def _tensors(draw: random.Random) -> Iterator[tuple[str, bytes]]:
    good = np.random.default_rng(draw.randrange(1000)).integers(0, 256, (1, 8, 9, 3)).tolist()

    def changed(change: Callable[[list[Any]], object]) -> list[Any]:
        copy = json.loads(json.dumps(good))
        change(copy[0][draw.randrange(8)][draw.randrange(9)])
        return copy

    wrong: list[Any] = [
        good[0], good[0][0], [good], np.zeros((1, 8, 9, draw.choice([1, 2, 4]))).tolist(),
        np.zeros((1, 3, 8, 9)).tolist(),
        changed(list.pop), changed(lambda pixel: pixel.append(1)), changed(lambda pixel: pixel.insert(0, "1")),
        *(changed(lambda pixel, v=value: pixel.__setitem__(1, v)) for value in
          ("x", None, float("nan"), float("inf"), -float("inf"), 1e39, 1e300, [1], {}, 10**30)),
        np.zeros((1, 8, 9, 3), bool).tolist(), [], [[]], [[[]]], [[[[]]]], {}, {"image": good}, "x", 7, None, True,
        np.full((1, 4, 4, 3), "a").tolist(),
    ]  # fmt: skip
    for key in ("inputs", "instances"):
        value = draw.choice(wrong)
        yield f"{key} {str(value)[:40]}", json.dumps({key: value}).encode()


def _texts(draw: random.Random) -> Iterator[tuple[str, bytes]]:
    good = frame(picture())
    yield "JSON cut short", good[: draw.randrange(1, len(good) - 1)]
    at = draw.randrange(12)  # within the name of the field
    yield "JSON with a wrong byte", good[:at] + bytes([draw.choice(b"#\x00\xff@")]) + good[at + 1 :]
    yield "noise for JSON", draw.randbytes(draw.randrange(1, 200))


def _shapes() -> Iterator[tuple[str, Any]]:
    good = base64.b64encode(picture()).decode()
    records = "dataframe_records"
    for value in (
        {}, [], 3, None, "x", {"data": [good]}, {"image": good}, {"params": {}}, {"messages": []}, {"prompt": "x"},
        {"input": good}, {records: []}, {records: {}}, {records: "x"}, {records: [good]}, {records: [1, 2]},
        {records: [{}]}, {records: [{"picture": good}]}, {records: [{"image": good}, {"x": 1}]}, {records: [None]},
        {records: [{"image": good}], "inputs": [[[[1, 2, 3]]]]},
    ):  # fmt: skip
        yield f"body {str(value)[:40]}", value
    for value in (
        {}, [], "x", {"columns": ["image"]}, {"columns": ["image"], "data": []}, {"columns": [], "data": []},
        {"columns": ["image"], "data": [[good, good]]}, {"columns": ["a", "b"], "data": [[good, good]]},
        {"columns": ["image", "image"], "data": [[good, good]]}, {"data": [[good]]}, {"columns": 3, "data": [[good]]},
        {"columns": ["image"], "data": [[good]], "rows": 1}, {"columns": ["image"], "data": good},
        {"columns": ["image"], "data": [[good]] * 2, "index": [1]}, {"columns": [["image"]], "data": [[good]]},
        {"columns": ["image"], "data": [[good]] * 1025}, {"columns": ["Image"], "data": [[good]]},
        {"columns": [None], "data": [[good]]},
    ):  # fmt: skip
        yield f"split {str(value)[:40]}", {"dataframe_split": value}
    yield "columns that pandas cannot print", {"dataframe_split": {"columns": [{"image": 1}], "data": [[good]]}}
