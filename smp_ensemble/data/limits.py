"""How much one image and one request may hold, checked before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from smp_ensemble.exceptions import ConfigError, DataError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

MEBI = 1 << 20

BANDS_AT_THE_LIMIT = 16
"""An image of the largest size may have so many bands; a smaller one may have more."""

VARIABLES = {
    "image_bytes": "SMP_ENSEMBLE_MAX_IMAGE_BYTES",
    "image_pixels": "SMP_ENSEMBLE_MAX_IMAGE_PIXELS",
    "request_images": "SMP_ENSEMBLE_MAX_REQUEST_IMAGES",
    "request_pixels": "SMP_ENSEMBLE_MAX_REQUEST_PIXELS",
    "passes": "SMP_ENSEMBLE_MAX_PASSES",
}
"""Environment variables that set a limit where a model is loaded: a whole number above 0, or `none`."""


@dataclass(frozen=True)
class Limits:
    """The most that is taken; None is no limit.

    Attributes:
        image_bytes: Encoded bytes of one image.
        image_pixels: Height x width of one image, as its header declares it and as the largest view shows it.
        request_images: Images in one request.
        request_pixels: Pixels that a request sends through each member: of all images, views and passes.
        passes: Passes with dropout on.
    """

    image_bytes: int | None = None
    image_pixels: int | None = None
    request_images: int | None = None
    request_pixels: int | None = None
    passes: int | None = None

    def check(self, name: str, found: int, what: str) -> None:
        """Refuses more than the limit of this name.

        Args:
            name: One of the attributes.
            found: How many there are.
            what: They are, for the error: `row 3: encoded bytes`.

        Raises:
            InputError: Too many; says the limit and the variable that moves it.
        """
        limit: int | None = getattr(self, name)
        if limit is not None and found > limit:
            raise InputError(f"expected at most {limit} {what}, got {found}: send less, or raise {VARIABLES[name]}")

    def check_size(self, height: int, width: int, bands: int, name: str) -> None:
        """Refuses an image by the size that its header declares, before memory is asked for.

        Raises:
            DataError: Too many pixels, or too many bands for so many pixels.
        """
        limit = self.image_pixels
        if limit is None or height * width * max(1, bands / BANDS_AT_THE_LIMIT) <= limit:
            return
        of_bands = f" of {bands} bands" if bands > BANDS_AT_THE_LIMIT else ""
        raise DataError(
            f"cannot read image {name}: {height} x {width} pixels{of_bands} are more than the {limit} allowed: "
            f"cut it into smaller ones, or raise {VARIABLES['image_pixels']}"
        )


FILES = Limits(image_pixels=178_956_970)
"""For people's own files and arrays: as many pixels as Pillow opens, for every reader."""

SERVED = Limits(
    image_bytes=64 * MEBI, image_pixels=16 * MEBI, request_images=1024, request_pixels=64 * MEBI, passes=100
)
"""For requests of strangers: an image of 4096x4096; 64 million pixels, which is 256 images of 512x512."""


def limits_from(environment: Mapping[str, str], default: Limits) -> Limits:
    """The default limits, with those in their place that the environment sets.

    Raises:
        ConfigError: A variable is neither a whole number above 0 nor `none`.

    Example:
        >>> limits_from({"SMP_ENSEMBLE_MAX_PASSES": "8", "SMP_ENSEMBLE_MAX_IMAGE_BYTES": "none"}, SERVED).passes
        8
    """
    changes: dict[str, int | None] = {}
    for name, variable in VARIABLES.items():
        text = environment.get(variable, "").strip()
        if text.lower() == "none":
            changes[name] = None
        elif text:
            if not (text.isascii() and text.isdigit() and int(text) > 0):
                raise ConfigError(f"expected {variable} as a whole number above 0 or 'none', got '{text}'")
            changes[name] = int(text)
    return replace(default, **changes)
