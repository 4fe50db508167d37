"""Test-time views: transforms of the image with their inverses on the probabilities, averaged in probability."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

WORDS = ("none", "flips", "d4", "scales")
"""The parts that a text of views consists of; `scales` is followed by its factors."""

EXAMPLE = "scales:0.75,1,1.25"

OWN = "own"
"""Where a model is used: the views that it brings along."""

SMALLEST_SCALE, LARGEST_SCALE = 0.1, 8.0
MOST_SCALES = 32


@dataclass(frozen=True)
class View:
    """One transform of an image and its inverse on the probabilities.

    Turns and flips only move pixels: their inverse gives back every bit, for any height and width. A scale resamples
    both ways, so fine detail is lost: its inverse gives back shapes and constant images, and every class's share of
    the image but for what the borders weigh.

    Attributes:
        turns: Quarter turns, counterclockwise.
        flip: Whether left and right are swapped after that.
        scale: Factor of height and width after that; 1 leaves every bit.

    Example:
        >>> view = View(turns=1, flip=True)
        >>> view.name, view.size((2, 3))
        ('rotate90+hflip', (3, 2))
        >>> image = torch.arange(6.0).reshape(1, 1, 2, 3)
        >>> torch.equal(view.inverse(view.forward(image), (2, 3)), image)
        True
    """

    turns: int = 0
    flip: bool = False
    scale: float = 1.0

    @property
    def name(self) -> str:
        """What it does, in the order in which it does it: `identity`, `hflip`, `rotate90+hflip`, `scale 0.75`."""
        if self.turns == 2 and self.flip:
            parts = ["vflip"]
        else:
            parts = [f"rotate{90 * self.turns}"] * (self.turns > 0) + ["hflip"] * self.flip
        if self.scale != 1:
            parts.append(f"scale {_number(self.scale)}")
        return "+".join(parts) or "identity"

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what `forward` makes of an image of `size`: `max(1, round(scale * side))` each."""
        height, width = size if self.turns % 2 == 0 else size[::-1]
        if self.scale == 1:
            return height, width
        return max(1, round(self.scale * height)), max(1, round(self.scale * width))

    def forward(self, images: Tensor) -> Tensor:
        """The images `(N, C, H, W)` as this view shows them, `(N, C, h, w)`."""
        turned = torch.rot90(images, self.turns, (-2, -1)) if self.turns else images
        flipped = turned.flip(-1) if self.flip else turned
        return _resize(flipped, self.size((images.shape[-2], images.shape[-1])))

    def inverse(self, probabilities: Tensor, size: tuple[int, int]) -> Tensor:
        """Probabilities `(N, K, h, w)` of what `forward` gave, as those `(N, K, H, W)` of images of `size` (H, W)."""
        back = _resize(probabilities, View(self.turns).size(size))
        flipped = back.flip(-1) if self.flip else back
        return torch.rot90(flipped, -self.turns, (-2, -1)) if self.turns else flipped


IDENTITY = View()
FLIPS = (IDENTITY, View(flip=True), View(2, flip=True), View(2))
D4 = tuple(View(turns, flip) for flip in (False, True) for turns in range(4))


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, with antialiasing where it shrinks; never beyond the values that an image's channel holds."""
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    exact = images if images.is_floating_point() else images.float()
    smaller = size[0] < height or size[1] < width
    resized = F.interpolate(exact, size, mode="bilinear", align_corners=False, antialias=smaller)
    # Weights that sum to 1 only up to rounding would take probabilities beyond 1.
    return torch.clamp(resized, exact.amin((-2, -1), keepdim=True), exact.amax((-2, -1), keepdim=True))


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def check_views(views: str | Sequence[str] | None) -> tuple[str, ...]:
    """The parts of a text of views in their canonical form, as `ensemble.json` lists them.

    Args:
        views: Parts joined by `+`, or a sequence of such texts; the views are the product of the parts. `none`, the
            image as it is; `flips`, four; `d4`, the eight symmetries of the square; `scales:0.75,1,1.25`, so many.
            None or nothing: `none`.

    Raises:
        ConfigError: An unknown part, the same part twice, `flips` beside `d4`, or factors that make no sense.

    Example:
        >>> check_views("scales:1,0.750 + flips")
        ('flips', 'scales:0.75,1')
        >>> check_views(None)
        ('none',)
    """
    text = views if isinstance(views, str) else "+".join(views or ())
    parts = [_check_part(part.strip()) for part in text.split("+")] if text.strip() else ["none"]
    words = [part.partition(":")[0] for part in parts]
    for word in words:
        if words.count(word) > 1:
            raise ConfigError(f"views '{text}' name '{word}' twice: name it once")
    if {"flips", "d4"} <= set(words):
        raise ConfigError(f"views '{text}' name flips and d4, which holds the flips: leave out 'flips'")
    chosen = sorted(part for part in parts if part != "none")  # geometry first, then scales
    return tuple(chosen) or ("none",)


def _check_part(part: str) -> str:
    word, colon, factors = part.partition(":")
    if word == "scales":
        return f"scales:{','.join(map(_number, _scales(part, factors)))}"
    if word not in WORDS:
        raise ConfigError(f"unknown views '{part}': {nearest(word, WORDS)} (as in {EXAMPLE})")
    if colon:
        raise ConfigError(f"expected no factors after '{word}', got '{part}': only scales take some")
    return word


def _scales(part: str, factors: str) -> list[float]:
    try:
        found = [float(factor) for factor in factors.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"expected numbers separated by commas in views '{part}', such as {EXAMPLE}: {error}"
        ) from error
    if len(found) > MOST_SCALES:
        raise ConfigError(f"expected at most {MOST_SCALES} factors in views, such as {EXAMPLE}: got {len(found)}")
    for factor in found:
        if not SMALLEST_SCALE <= factor <= LARGEST_SCALE:  # NaN too
            raise ConfigError(
                f"expected factors from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g} in views '{part}', such as {EXAMPLE}: "
                f"got {_number(factor)}"
            )
        if found.count(factor) > 1:
            raise ConfigError(f"expected each factor once in views '{part}', got {_number(factor)} twice: remove one")
    return sorted(found)


def views_name(views: str | Sequence[str] | None) -> str:
    """The canonical text of views: `flips+scales:0.75,1,1.25`. Raises as `check_views`."""
    return "+".join(check_views(views))


def parse_views(views: str | Sequence[str] | None) -> tuple[View, ...]:
    """The views that a text, or a sequence of texts, stands for. Raises as `check_views`.

    Example:
        >>> [view.name for view in parse_views("flips")]
        ['identity', 'hflip', 'vflip', 'rotate180']
        >>> len(parse_views("d4+scales:0.5,1"))
        16
    """
    shapes: Sequence[View] = (IDENTITY,)
    scales = [1.0]
    for part in check_views(views):
        word, _, factors = part.partition(":")
        if word == "scales":
            scales = _scales(part, factors)
        elif word != "none":
            shapes = D4 if word == "d4" else FLIPS
    return tuple(View(shape.turns, shape.flip, scale) for scale in scales for shape in shapes)


def average_views(
    views: Sequence[View],
    images: Tensor,
    predict: Callable[[Tensor], Tensor],
    max_pixels: int | None = None,
) -> Tensor:
    """The mean over views of the probabilities, each brought back to the image.

    Views of one size run as one batch as far as `max_pixels` allows. Whatever their number, memory holds one such batch
    and one running sum.

    Args:
        views: At least one.
        images: Shape `(N, C, H, W)`.
        predict: Probabilities `(n, K, h, w)` of images `(n, C, h, w)`.
        max_pixels: That run through `predict` at once; one image always does. None: one view at a time.

    Returns:
        Shape `(N, K, H, W)`. One view that is the image itself is predicted as it is, bit for bit.
    """
    count, size = len(images), (images.shape[-2], images.shape[-1])
    if tuple(views) == (IDENTITY,):
        at_once = count if max_pixels is None else max(1, max_pixels // math.prod(size))
        return _predict_in_parts(images, predict, at_once)
    total: Tensor | None = None
    for group, at_once in _batches(views, count, size, max_pixels):
        probabilities = _predict_in_parts(torch.cat([view.forward(images) for view in group]), predict, at_once)
        for view, part in zip(group, torch.split(probabilities, count), strict=True):
            back = view.inverse(part, size)
            total = back.clone() if total is None else total.add_(back)
            del back
        del probabilities, part
    assert total is not None  # there is a view
    return total / len(views)


def _batches(
    views: Sequence[View], count: int, size: tuple[int, int], max_pixels: int | None
) -> Iterator[tuple[Sequence[View], int]]:
    """Views that run together, and how many images of theirs may at once."""
    if max_pixels is None:
        yield from (((view,), count) for view in views)
        return
    by_size: dict[tuple[int, int], list[View]] = {}
    for view in views:
        by_size.setdefault(view.size(size), []).append(view)
    for shape, group in by_size.items():
        at_once = max(1, max_pixels // math.prod(shape))
        yield from ((batch, at_once) for batch in _chunks(group, max(1, at_once // count)))


def _chunks(views: Sequence[View], length: int) -> Iterator[Sequence[View]]:
    rest = iter(views)
    while chunk := tuple(itertools.islice(rest, length)):
        yield chunk


def _predict_in_parts(images: Tensor, predict: Callable[[Tensor], Tensor], at_once: int) -> Tensor:
    if len(images) <= at_once:
        return predict(images)
    return torch.cat([predict(part) for part in torch.split(images, at_once)])
