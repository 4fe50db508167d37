"""What stands on the ground of a synthetic scene and casts a shadow: roofs, cars, trees."""

from __future__ import annotations

import math
from typing import NamedTuple

from smp_ensemble.data.canvas import BUILDING, VEGETATION, Canvas, Colour, scaled

_CARS: list[Colour] = [(226, 226, 224), (44, 46, 52), (150, 36, 32), (120, 124, 130), (44, 70, 120), (182, 104, 74)]


class Roof(NamedTuple):
    """A rectangle around `(u, v)` in street coordinates; `turn` is in radians."""

    u: float
    v: float
    length: float
    width: float
    turn: float


def cast_roof(canvas: Canvas, roof: Roof) -> None:
    """The shadow of a house; to be drawn before all roofs."""
    canvas.cast(canvas.quad(*roof), canvas.rng.uniform(6, 15))


def draw_roof(canvas: Canvas, roof: Roof, colour: Colour) -> None:
    """A flat roof with what stands on it, or a gable or hip roof with lit and unlit faces."""
    corners = canvas.quad(*roof)
    canvas.fill(corners, colour, BUILDING)
    canvas.shade.polygon(corners, fill=0)
    kind = canvas.rng.random()
    if max(roof.length, roof.width) > 45 or kind < 0.35:
        _furnish_flat_roof(canvas, roof, colour)
    else:
        _fold_roof(canvas, roof, colour, inset=0.0 if kind < 0.65 else 0.5 * min(roof.length, roof.width))


def draw_car(canvas: Canvas, place: tuple[float, float], sides: tuple[float, float]) -> None:
    """A car of any colour, among them a roof's."""
    outline = canvas.quad(*place, *sides)
    canvas.cast(outline, 2)
    canvas.fill(outline, canvas.vary(_CARS[canvas.rng.integers(len(_CARS))]))


def draw_tree(canvas: Canvas, place: tuple[float, float], radius: float, colour: Colour) -> None:
    """A crown that is brighter towards the sun; `place` counts from the canvas' corner."""
    x, y = place
    for height in (0.3, 0.6, 0.9):
        canvas.shade.ellipse(
            _disc(x + canvas.sun[0] * radius * height, y + canvas.sun[1] * radius * height, radius), 255
        )
    canvas.label.ellipse(_disc(x, y, radius), VEGETATION)
    canvas.shade.ellipse(_disc(x, y, radius), 0)
    for share, brightness in ((1.0, 0.8), (0.72, 1.0), (0.4, 1.2)):
        shift = radius * (1 - share) * 0.6
        disc = _disc(x - canvas.light[0] * shift, y - canvas.light[1] * shift, radius * share)
        canvas.paint.ellipse(disc, scaled(colour, brightness))


def _furnish_flat_roof(canvas: Canvas, roof: Roof, colour: Colour) -> None:
    """A parapet and a few small boxes."""
    rng = canvas.rng
    canvas.paint.polygon(canvas.quad(*roof), outline=scaled(colour, 0.75 if rng.random() < 0.5 else 1.25))
    for _ in range(int(rng.integers(0, 5))):
        along, aside = (rng.uniform(-0.35, 0.35, 2) * (roof.length, roof.width)).tolist()
        length, width = rng.uniform(3, 8, 2).tolist()
        box = canvas.quad(roof.u + along, roof.v + aside, length, width, roof.turn)
        canvas.fill(box, canvas.vary((170, 170, 170), 25))


def _fold_roof(canvas: Canvas, roof: Roof, colour: Colour, inset: float) -> None:
    """Faces on both sides of a ridge along the longer side; `inset` is how far it ends before the short sides."""
    corners = canvas.quad(*roof)
    reach = max(roof.length, roof.width) / 2 - inset
    if roof.length < roof.width:
        corners = [*corners[1:], corners[0]]
    turn = roof.turn if roof.length >= roof.width else roof.turn + math.pi / 2
    along = reach * math.cos(turn), reach * math.sin(turn)
    middle = canvas.point(roof.u, roof.v)
    first = canvas.point(roof.u - along[0], roof.v - along[1])
    last = canvas.point(roof.u + along[0], roof.v + along[1])
    a, b, c, d = corners
    for face in ([a, b, last, first], [c, d, first, last], [b, c, last], [d, a, first]):
        x, y = (sum(corner[axis] for corner in face) / len(face) - middle[axis] for axis in (0, 1))
        away = (x * canvas.light[0] + y * canvas.light[1]) / (math.hypot(x, y) or 1.0)
        canvas.paint.polygon(face, fill=scaled(colour, 1 - 0.17 * away))


def _disc(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius
