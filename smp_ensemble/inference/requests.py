"""What a request may ask of the engine: its params, and how much work they make of its images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from smp_ensemble.ensembling.views import OWN, parse_views
from smp_ensemble.exceptions import InputError
from smp_ensemble.registry import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smp_ensemble.data.limits import Limits
    from smp_ensemble.inference.engine import Engine

RAISE, REPORT = "raise", "report"
LONGEST_VIEWS = 200
"""Characters of the param `views`; more would be a list of scales that nobody needs."""


def is_report(word: Any) -> bool:
    """Whether a param `on_error` asks for errors beside the results; None: the default, `raise`.

    Raises:
        InputError: It is neither of both words.
    """
    word = word or RAISE
    if word not in (RAISE, REPORT):
        raise InputError(f"unknown on_error '{str(word)[:40]}': {nearest(str(word), (RAISE, REPORT))}")
    return bool(word == REPORT)


def with_params(engine: Engine, params: Mapping[str, Any], limits: Limits) -> Engine:
    """The engine with the params `views`, `passes` and `adaptive` that are asked for.

    Raises:
        InputError: They make no sense for this model, or are more than `limits` allow.
    """
    passes = params.get("passes")
    passes = None if passes is None else _to_whole(passes, "passes")
    limits.check("passes", passes or 1, "passes")
    views = str(params.get("views") or OWN)
    if len(views) > LONGEST_VIEWS:
        raise InputError(f"expected views as text of at most {LONGEST_VIEWS} characters, got {len(views)}")
    adaptive = params.get("adaptive")
    return engine.with_options(passes, views, None if adaptive is None else _to_bool(adaptive, "adaptive"))


def check_work(sizes: Sequence[tuple[int, int]], engine: Engine, limits: Limits) -> None:
    """Refuses a request of more images or pixels than `limits` allow, counted as the engine's views show them.

    Args:
        sizes: Height and width of each image.
        engine: Says how often each is predicted.
        limits: Of one image and of the request.

    Raises:
        InputError: More than is allowed.
    """
    limits.check("request_images", len(sizes), "images in one request")
    if limits.request_pixels is None:  # nothing else is shown larger on behalf of strangers
        return
    scales = [view.scale for view in parse_views(engine.views)]
    largest = max(1.0, *scales)
    for row, (height, width) in enumerate(sizes):
        limits.check_size(round(largest * height), round(largest * width), 1, f"row {row} at its largest view")
    pixels = sum(math.prod(size) for size in sizes) * sum(scale**2 for scale in scales) * engine.passes
    limits.check("request_pixels", round(pixels), "pixels in one request, all views and passes counted")


def _to_bool(value: Any, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"expected {name} as true or false, got {str(value)[:40]!r}")
    return bool(value)


def _to_whole(value: Any, name: str) -> int:
    """A whole number of Python's or NumPy's; which ones make sense is the engine's to say."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"expected {name} as a whole number above 0, got {value!r}")
    return int(value)
