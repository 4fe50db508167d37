"""Which post-processing an ensemble carries: pure settings, kept as JSON in `ensemble.json`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest

LARGEST_WINDOW = 255
MOST_ITERATIONS = 1000
MOST_PIXELS = (1 << 31) - 1
"""Of a radius or an area."""


@dataclass(frozen=True)
class Crf:
    """A fully connected CRF, cut off at a local window.

    Kernels are normalised: a weight is about what neighbours that all agree add to a pixel's log odds.

    Attributes:
        iterations: Mean-field updates.
        window: Side of the square of pixels that a pixel listens to; odd.
        position_sigma: Of the smoothness kernel, in pixels.
        position_weight: Of the smoothness kernel.
        bilateral_sigma: Of the appearance kernel, in pixels.
        colour_sigma: Of the appearance kernel, in grey levels 0..255.
        bilateral_weight: Of the appearance kernel.

    Raises:
        ConfigError: A value of the wrong type or out of range.

    References:
        Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NeurIPS
        2011, arXiv:1210.5644; Teichmann and Cipolla, "Convolutional CRFs for Semantic Segmentation", arXiv:1805.04777.
    """

    iterations: int = 5
    window: int = 11
    position_sigma: float = 3.0
    position_weight: float = 1.0
    bilateral_sigma: float = 10.0
    colour_sigma: float = 13.0
    bilateral_weight: float = 3.0

    def __post_init__(self) -> None:
        _check_whole("crf.iterations", self.iterations, 1, MOST_ITERATIONS)
        _check_whole("crf.window", self.window, 3, LARGEST_WINDOW)
        if self.window % 2 == 0:
            raise ConfigError(f"expected crf.window as an odd number of pixels, got {self.window}")
        for name in ("position_sigma", "bilateral_sigma", "colour_sigma"):
            _check_number(f"crf.{name}", getattr(self, name), zero=False)
        for name in ("position_weight", "bilateral_weight"):
            _check_number(f"crf.{name}", getattr(self, name), zero=True)


@dataclass(frozen=True)
class PostProcessing:
    """What is done to one image's probabilities (`crf`) and then to its mask; by default nothing.

    Attributes:
        opening: Radius in pixels of a disc; what no such disc fits into is taken off objects.
        closing: Radius in pixels of a disc; gaps that no such disc fits into are filled.
        min_area: In pixels; smaller components go to what surrounds them.
        max_hole: In pixels; holes of up to that area are filled.
        crf: Refines probabilities before they become a mask.

    Raises:
        ConfigError: A value of the wrong type or out of range.

    Example:
        >>> PostProcessing(min_area=20).to_dict()
        {'min_area': 20}
        >>> PostProcessing.from_dict({"min_area": 20}).active
        True
    """

    opening: int = 0
    closing: int = 0
    min_area: int = 0
    max_hole: int = 0
    crf: Crf | None = None

    def __post_init__(self) -> None:
        for name in ("opening", "closing", "min_area", "max_hole"):
            _check_whole(name, getattr(self, name), 0, MOST_PIXELS)
        if not (self.crf is None or isinstance(self.crf, Crf)):
            raise ConfigError(f"expected crf as a Crf or None, got {self.crf!r}")

    @property
    def active(self) -> bool:
        """Whether anything is on."""
        return self != PostProcessing()

    def to_dict(self) -> dict[str, Any]:
        """What is on, as plain values; nothing: `{}`. A CRF is written out, so that new defaults do not change it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PostProcessing:
        """The inverse of `to_dict`; what is not named is off, and a CRF's settings have their defaults.

        Raises:
            ConfigError: An unknown name, a wrong type or a value out of range.
        """
        chosen = _checked(cls, content, "post-processing")
        if chosen.get("crf") is not None:
            chosen["crf"] = Crf(**_checked(Crf, chosen["crf"], "crf"))
        return cls(**chosen)


def parse_postprocess(text: str) -> PostProcessing:
    """Settings as typed: JSON, or `none` and nothing for no post-processing.

    Raises:
        ConfigError: The text is no JSON object, or its content no settings.

    Example:
        >>> parse_postprocess('{"closing": 2}')
        PostProcessing(opening=0, closing=2, min_area=0, max_hole=0, crf=None)
    """
    if text.strip().lower() in {"", "none"}:
        return PostProcessing()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"expected post-processing as JSON like {{\"min_area\": 20}}, got '{text}': {error}"
        ) from error
    return PostProcessing.from_dict(content)


def _checked(owner: type[Any], content: Any, word: str) -> dict[str, Any]:
    """The content as a dict, once it is one and all its names are fields of `owner`."""
    if not isinstance(content, Mapping):
        raise ConfigError(f'expected the settings of {word} as a JSON object like {{"name": 1}}, got {content!r}')
    known = [field.name for field in dataclasses.fields(owner)]
    for name in content:
        if name not in known:
            raise ConfigError(f"unknown setting '{name}' of {word}: {nearest(str(name), known)}")
    return dict(content)


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"expected {name} as a whole number from {least}, got {value!r}")
    if value > most:
        raise ConfigError(f"expected {name} as a whole number of at most {most}, got {value}")


def _check_number(name: str, value: Any, *, zero: bool) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0 or (value == 0 and not zero):
        raise ConfigError(f"expected {name} as a number {'from' if zero else 'above'} 0, got {value!r}")
