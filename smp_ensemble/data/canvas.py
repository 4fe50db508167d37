"""The canvas of a synthetic scene: colours, covers and shadows, in a frame turned like the streets, and its camera."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

LAND, BUILDING, ROAD, VEGETATION, WATER = range(5)

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

_FINE = 2  # drawn at twice the size, then averaged: soft edges
_ROUGHNESS = np.array([9.0, 5.0, 5.0, 15.0, 3.5])  # texture of each cover, in grey levels


class Scene(NamedTuple):
    """A drawn scene.

    Attributes:
        image: uint8, shape `(size, size, 3)`.
        cover: Visible cover of each pixel, uint8: `LAND`, `BUILDING`, `ROAD`, `VEGETATION` or `WATER`.
        building: Visible roofs, bool, shape `(size, size)`.
        road: Streets, shaded or not.
        shadow: Shadows of buildings and trees.
    """

    image: npt.NDArray[np.uint8]
    cover: npt.NDArray[np.uint8]
    building: npt.NDArray[np.bool_]
    road: npt.NDArray[np.bool_]
    shadow: npt.NDArray[np.bool_]


class Canvas:
    """One scene while it is drawn.

    Attributes:
        rng: Every draw of the scene comes from it, in order.
        fine: Height and width of the canvas; drawn at twice the scene's size, then averaged.
        paint: Draws colours.
        label: Draws covers.
        shade: Draws shadows.
        sun: Offset of a shadow for a height of 1.
        light: Direction of shadows, of length 1.
    """

    def __init__(self, rng: np.random.Generator, size: int, grounds: tuple[Colour, Colour]) -> None:
        self.rng = rng
        self.fine = size * _FINE
        self._size = size
        patches = np.clip(self._noise(32) * 0.4 + self._noise(10) * 0.2 + 0.5, 0, 1)[..., None]
        first, last = np.array(grounds, dtype=np.float32)
        blend = (first * patches + last * (1 - patches)).astype(np.uint8)
        side = (self.fine, self.fine)
        self._colours = Image.fromarray(blend).resize(side, Image.Resampling.NEAREST)
        self._covers = Image.new("L", side, LAND)
        self._shadows = Image.new("L", side, 0)
        self.paint = ImageDraw.Draw(self._colours)
        self.label = ImageDraw.Draw(self._covers)
        self.shade = ImageDraw.Draw(self._shadows)
        angle, sun = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
        self._along, self._across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
        self.light = math.cos(sun), math.sin(sun)
        length = rng.uniform(0.5, 1.3)
        self.sun = self.light[0] * length, self.light[1] * length

    def point(self, u: float, v: float) -> tuple[float, float]:
        """Canvas place of street coordinates, which count from the centre."""
        middle = self.fine / 2
        return middle + u * self._along[0] + v * self._across[0], middle + u * self._along[1] + v * self._across[1]

    def quad(self, u: float, v: float, length: float, width: float, turn: float = 0.0) -> Points:
        """Corners of a rectangle around `(u, v)`."""
        c, s = math.cos(turn), math.sin(turn)
        corners = ((-length, -width), (length, -width), (length, width), (-length, width))
        return [self.point(u + (a * c - b * s) / 2, v + (a * s + b * c) / 2) for a, b in corners]

    def vary(self, colour: Colour, amount: float = 9.0) -> Colour:
        """A colour near another one."""
        shared, *own = self.rng.standard_normal(4).tolist()
        red, green, blue = (
            round(min(max(c + amount * (shared + o / 3), 0), 255)) for c, o in zip(colour, own, strict=True)
        )
        return red, green, blue

    def visible(self, u: float, v: float, margin: float) -> bool:
        """Whether a thing around `(u, v)` can reach the canvas."""
        return all(-margin < place < self.fine + margin for place in self.point(u, v))

    def fill(self, points: Points, colour: Colour, cover: int | None = None) -> None:
        """Paints a polygon, and says what it is."""
        self.paint.polygon(points, fill=colour)
        if cover is not None:
            self.label.polygon(points, fill=cover)

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: Colour, width: int) -> None:
        """Paints a line between two places in street coordinates."""
        self.paint.line([self.point(*start), self.point(*end)], colour, width)

    def cover_at(self, x: float, y: float) -> int:
        """What is at a place of the canvas."""
        return self._covers.getpixel((int(x), int(y)))  # type: ignore[return-value]

    def touches_water(self, u: float, v: float, length: float, width: float) -> bool:
        """Whether the centre or a corner of a rectangle lies in water."""
        places = [(u, v), *((u + a * length, v + b * width) for a in (-0.45, 0.45) for b in (-0.45, 0.45))]
        pixels = [(int(x), int(y)) for x, y in (self.point(*place) for place in places)]
        inside = [place for place in pixels if min(place) >= 0 and max(place) < self.fine]
        return any(self._covers.getpixel(place) == WATER for place in inside)

    def cast(self, points: Points, height: float) -> None:
        """The shadow of a prism."""
        moved = [(x + self.sun[0] * height, y + self.sun[1] * height) for x, y in points]
        for first in range(len(points)):
            last = (first + 1) % len(points)
            self.shade.polygon([points[first], points[last], moved[last], moved[first]], fill=255)
        self.shade.polygon(moved, fill=255)

    def _noise(self, grain: int) -> npt.NDArray[np.float32]:
        """Smooth noise of about unit variance; `grain` is the size of its blobs in pixels."""
        size = self._size
        coarse = self.rng.standard_normal((size // grain + 3,) * 2, dtype=np.float32) * 1.3
        blown = Image.fromarray(coarse).resize((size + 2 * grain,) * 2, Image.Resampling.BICUBIC)
        return np.asarray(blown)[grain : grain + size, grain : grain + size]

    def photograph(self) -> Scene:
        """Textures, shadows, light, haze, lens and sensor."""
        rng, size = self.rng, self._size
        covers = np.asarray(self._covers)[1::_FINE, 1::_FINE]
        shadow = np.asarray(self._shadows.reduce(_FINE), dtype=np.float32) / 255
        texture = 0.6 * self._noise(2) + 0.5 * rng.standard_normal((size, size), dtype=np.float32)
        pixels = np.asarray(self._colours.reduce(_FINE), dtype=np.float32)
        pixels = pixels + (texture * _ROUGHNESS[covers])[..., None] + 5 * self._noise(24)[..., None]
        depth = rng.uniform(0.38, 0.6)
        pixels *= 1 - shadow[..., None] * (depth * np.array([1.05, 1.0, 0.88], dtype=np.float32))
        slope = np.linspace(-0.5, 0.5, size, dtype=np.float32) * rng.uniform(-0.2, 0.2, (2, 1)).astype(np.float32)
        light = rng.uniform(0.86, 1.12) * (1 + slope[0][:, None] + slope[1][None])
        cast = 1 + rng.normal(0, 0.02, 3).astype(np.float32)
        haze = rng.uniform(0, 0.12)
        pixels = pixels * light[..., None] * cast * (1 - haze) + haze * 185
        sharp = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        blurred = np.asarray(sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8))), dtype=np.float32)
        grain = rng.uniform(1.5, 4.5) * rng.standard_normal((size, size, 3), dtype=np.float32)
        image = np.clip(np.rint(blurred + grain), 0, 255).astype(np.uint8)
        return Scene(image, covers.copy(), covers == BUILDING, covers == ROAD, shadow > 0.5)


def scaled(colour: Colour, factor: float) -> Colour:
    """A colour, darker or brighter."""
    red, green, blue = (min(255, round(value * factor)) for value in colour)
    return red, green, blue
