"""Procedural aerial scenes: streets, blocks of roofs, fields, water, trees, and what is easily confused with roofs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from smp_ensemble.data.canvas import BUILDING, LAND, ROAD, VEGETATION, WATER, Canvas, Colour, Scene, scaled
from smp_ensemble.data.structures import Roof, cast_roof, draw_car, draw_roof, draw_tree

_GROUNDS: list[tuple[Colour, Colour]] = [
    ((186, 168, 134), (160, 146, 112)),  # sand
    ((148, 144, 100), (122, 128, 84)),  # dry grass
    ((128, 136, 92), (152, 142, 108)),  # meadow
    ((166, 150, 128), (136, 122, 102)),  # earth
]
_ROOFS: list[Colour] = [
    (178, 88, 62), (160, 76, 56), (200, 120, 84), (186, 104, 76), (168, 92, 70),  # tiles
    (210, 206, 200), (228, 226, 222), (220, 214, 204),  # white and cream
    (104, 128, 152), (96, 96, 106), (138, 142, 150),  # slate and metal
    (190, 164, 132),  # the colour of sand
]  # fmt: skip
_FIELDS: list[tuple[Colour, int]] = [
    ((96, 124, 62), VEGETATION), ((118, 142, 74), VEGETATION), ((82, 110, 66), VEGETATION),
    ((162, 134, 96), LAND), ((176, 150, 108), LAND), ((150, 104, 78), LAND), ((156, 152, 146), LAND),
]  # fmt: skip
_TREE_ODDS = {LAND: 1.0, VEGETATION: 1.0, ROAD: 0.3, BUILDING: 0.12, WATER: 0.0}  # that a tree stays where it fell


class Street(NamedTuple):
    """One of a family of parallel streets.

    Attributes:
        place: Of its centre line, across the family.
        half: Half its width.
        lengthwise: Which of the two families it belongs to.
    """

    place: float
    half: float
    lengthwise: bool

    def turned(self, along: float, aside: float) -> tuple[float, float]:
        """What is `along` the street and `aside` of the frame's centre, in street coordinates `(u, v)`."""
        return (along, aside) if self.lengthwise else (aside, along)


class Block(NamedTuple):
    """What lies between four streets, in street coordinates."""

    u0: float
    u1: float
    v0: float
    v1: float

    @property
    def whole(self) -> tuple[float, float, float, float]:
        """Centre `(u, v)`, length and width."""
        return (self.u0 + self.u1) / 2, (self.v0 + self.v1) / 2, self.u1 - self.u0, self.v1 - self.v0


def draw_scene(seed: int, index: int, size: int) -> Scene:
    """Draws a scene; a pixel is about a metre.

    Args:
        seed: Of the data set.
        index: Place in the data set.
        size: Height and width in pixels.
    """
    rng = np.random.default_rng([seed, index])
    canvas = Canvas(rng, size, _GROUNDS[rng.integers(len(_GROUNDS))])
    columns, rows = _plan_streets(canvas, lengthwise=False), _plan_streets(canvas, lengthwise=True)
    _lay_fields(canvas)
    _lay_water(canvas)
    _lay_streets(canvas, columns + rows)
    _build(canvas, _blocks(columns, rows))
    _park_along(canvas, columns + rows)
    _plant_trees(canvas)
    return canvas.photograph()


def _plan_streets(canvas: Canvas, *, lengthwise: bool) -> list[Street]:
    """Parallel streets from one end of the canvas to the other."""
    reach = 0.75 * canvas.fine
    place, found = -reach + canvas.rng.uniform(0, 60), []
    while place < reach:
        half = (5.0, 6.5, 9.0)[int(np.searchsorted((0.5, 0.85), canvas.rng.random()))]
        found.append(Street(place, half, lengthwise))
        place += canvas.rng.uniform(95, 210)
    return found


def _blocks(columns: list[Street], rows: list[Street]) -> list[Block]:
    """What lies between the streets, without the pavements."""
    return [
        Block(
            left.place + left.half + 5,
            right.place - right.half - 5,
            low.place + low.half + 5,
            high.place - high.half - 5,
        )
        for left, right in pairwise(columns)
        for low, high in pairwise(rows)
    ]


def _lay_fields(canvas: Canvas) -> None:
    """Parcels of crops, lawns, bare soil and gravel, often with furrows; some have the colour of roofs."""
    rng = canvas.rng
    for _ in range(int(rng.integers(2, 7)) * canvas.fine**2 // 256**2 + 1):
        u, v = (rng.uniform(-0.6, 0.6, 2) * canvas.fine).tolist()
        length, width = rng.uniform(30, 110, 2).tolist()
        colour, cover = _FIELDS[rng.integers(len(_FIELDS))]
        base = canvas.vary(colour)
        canvas.fill(canvas.quad(u, v, length, width), base, cover)
        if rng.random() < 0.5:
            for furrow in np.arange(v - width / 2 + 2, v + width / 2, rng.uniform(5, 8)).tolist():
                canvas.line((u - length / 2, furrow), (u + length / 2, furrow), scaled(base, 0.9), 2)


def _lay_water(canvas: Canvas) -> None:
    """Sometimes a winding canal, sometimes a pond."""
    rng, kind = canvas.rng, canvas.rng.random()
    if kind > 0.42:
        return
    if kind < 0.22:
        steps = np.linspace(-0.8, 0.8, 25) * canvas.fine
        bend = rng.uniform(10, 50) * np.sin(steps / rng.uniform(60, 120) + rng.uniform(0, 6))
        middle, half = bend + rng.uniform(-0.4, 0.4) * canvas.fine, rng.uniform(10, 26)
        u, v = np.concatenate([steps, steps[::-1]]), np.concatenate([middle - half, (middle + half)[::-1]])
    else:
        turns = np.linspace(0, 2 * math.pi, 28, endpoint=False)
        lobes = 0.2 * np.sin(turns * 2 + rng.uniform(0, 6)) + 0.12 * np.sin(turns * 3 + rng.uniform(0, 6))
        radii = rng.uniform(22, 50) * (1 + lobes)
        middle_u, middle_v = rng.uniform(-0.4, 0.4, 2) * canvas.fine
        u, v = middle_u + radii * np.cos(turns), middle_v + radii * np.sin(turns)
    shore = [canvas.point(*place) for place in zip(u.tolist(), v.tolist(), strict=True)]
    canvas.fill(shore, canvas.vary((62, 92, 98), 12), WATER)


def _lay_streets(canvas: Canvas, streets: list[Street]) -> None:
    """Streets with kerbs, the wide ones with dashed centre lines; they cross water on bridges."""
    grey, reach = canvas.vary((112, 112, 114), 12), canvas.fine
    for kerb in (5, 0):
        for street in streets:
            strip = canvas.quad(*street.turned(0, street.place), *street.turned(2 * reach, 2 * street.half + kerb))
            canvas.fill(strip, scaled(grey, 1.35) if kerb else grey, None if kerb else ROAD)
    for street in streets:
        if street.half > 6:
            for start in np.arange(-reach, reach, 14.0).tolist():
                ends = street.turned(start, street.place), street.turned(start + 6, street.place)
                canvas.line(*ends, scaled(grey, 1.6), 1)


def _build(canvas: Canvas, blocks: list[Block]) -> None:
    """In each block rows of houses, a few large halls, a car park, or nothing."""
    rng = canvas.rng
    palette = [_ROOFS[index] for index in rng.choice(len(_ROOFS), 5, replace=False)]
    density = rng.uniform(0.45, 0.95)
    roofs: list[Roof] = []
    for block in blocks:
        kind = rng.random()
        if kind < 0.07:
            _lay_car_park(canvas, block)
        elif kind < 0.88:
            roofs += _lots(canvas, block, rng.uniform(70, 110) if kind < 0.3 else rng.uniform(38, 54), density)
    for roof in roofs:
        cast_roof(canvas, roof)
    for roof in roofs:
        draw_roof(canvas, roof, canvas.vary(palette[rng.integers(5)], 10))


def _lots(canvas: Canvas, block: Block, pitch: float, density: float) -> list[Roof]:
    """Roofs of a block that is parted into lots of about `pitch` by `pitch`."""
    rng = canvas.rng
    u0, u1, v0, v1 = block
    across, down = max(1, int((u1 - u0) / pitch)), max(1, int((v1 - v0) / pitch))
    lot = (u1 - u0) / across, (v1 - v0) / down
    turn = rng.normal(0, 0.04)
    found: list[Roof] = []
    for place in range(across * down):
        u, v = u0 + (place % across + 0.5) * lot[0], v0 + (place // across + 0.5) * lot[1]
        if min(lot) < 20 or not canvas.visible(u, v, 70) or canvas.touches_water(u, v, *lot) or rng.random() > density:
            continue
        length, width = (rng.uniform(0.45, 0.82, 2) * lot).tolist()
        u, v = ((u, v) + rng.normal(0, 0.04, 2) * lot).tolist()
        found.append(Roof(u, v, length, width, turn))
        if rng.random() < 0.3:  # a wing makes it an L
            found.append(Roof(u + length * 0.3, v + width * 0.4, length * 0.4, width * 0.7, turn))
    return found


def _lay_car_park(canvas: Canvas, block: Block) -> None:
    """A paved area that looks like a flat roof, but casts no shadow."""
    if canvas.touches_water(*block.whole):
        return
    canvas.fill(canvas.quad(*block.whole), canvas.vary((140, 140, 140), 14), LAND)
    for u in np.arange(block.u0 + 6, block.u1 - 4, 7).tolist():
        for v in np.arange(block.v0 + 8, block.v1 - 6, 20).tolist():
            if canvas.visible(u, v, 10) and canvas.rng.random() < 0.55:
                draw_car(canvas, (u, v), (4, 9))


def _park_along(canvas: Canvas, streets: list[Street]) -> None:
    """Cars on both sides of the streets."""
    reach = 0.7 * canvas.fine
    for street in streets:
        for along in np.arange(-reach, reach, 12).tolist():
            if canvas.rng.random() < 0.16:
                side = 0.55 if canvas.rng.random() < 0.5 else -0.55
                place = street.turned(along, street.place + side * street.half)
                if canvas.visible(*place, 10):
                    draw_car(canvas, place, street.turned(9, 4))


def _plant_trees(canvas: Canvas) -> None:
    """Trees in groups, some of which hide a part of a roof or a street."""
    rng = canvas.rng
    for _ in range(int(rng.integers(4, 16)) * canvas.fine**2 // 256**2 + 1):
        x, y = rng.uniform(0, canvas.fine, 2).tolist()
        green = canvas.vary((66, 94, 48), 10)
        for _ in range(int(rng.integers(1, 8))):
            x, y = (min(max(place + rng.normal(0, 10), 0.0), canvas.fine - 1.0) for place in (x, y))
            if rng.random() < _TREE_ODDS[canvas.cover_at(x, y)]:
                draw_tree(canvas, (x, y), rng.uniform(4, 10), canvas.vary(green, 7))
