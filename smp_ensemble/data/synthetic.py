"""Form 3: procedural aerial scenes, drawn on the fly, each a pure function of seed, place and size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from smp_ensemble.data.datasets import Record
from smp_ensemble.data.folders import Description
from smp_ensemble.data.scenes import draw_scene
from smp_ensemble.data.sidecars import Classes
from smp_ensemble.data.sources import digest_of_array
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest
from smp_ensemble.typing import MODES, Mode

CLASS_NAMES: dict[Mode, tuple[str, ...]] = {
    "binary": ("background", "building"),
    "multiclass": ("land", "building", "road", "vegetation", "water"),
    "multilabel": ("building", "road", "shadow"),
}

_LEAST = {"count": 1, "size": 32, "seed": 0}
_scene = lru_cache(maxsize=16)(draw_scene)  # image and mask of one scene are read one after the other


@dataclass(frozen=True)
class SceneImage:
    """The image of a scene.

    Attributes:
        seed: Of the data set.
        index: Place in the data set.
        size: Height and width in pixels.
    """

    seed: int
    index: int
    size: int

    def __str__(self) -> str:
        return f"synthetic scene {self.index} of seed {self.seed}"

    def read(self) -> npt.NDArray[Any]:
        """Pixels, uint8, shape `(size, size, 3)`."""
        return _scene(self.seed, self.index, self.size).image.copy()

    def read_with_digest(self) -> tuple[npt.NDArray[Any], str]:
        """Pixels and their digest."""
        pixels = self.read()
        return pixels, digest_of_array(pixels)


@dataclass(frozen=True)
class SceneMask:
    """The mask of a scene in one mode.

    Attributes:
        seed: Of the data set.
        index: Place in the data set.
        size: Height and width in pixels.
        mode: `CLASS_NAMES` has the classes of each.
    """

    seed: int
    index: int
    size: int
    mode: Mode

    def __str__(self) -> str:
        return f"mask of synthetic scene {self.index} of seed {self.seed}"

    def read(self) -> npt.NDArray[np.uint8]:
        """Class ids, shape `(size, size)`; multilabel 0 and 1, shape `(size, size, 3)`."""
        scene = _scene(self.seed, self.index, self.size)
        if self.mode == "multilabel":
            return np.stack([scene.building, scene.road, scene.shadow], axis=-1).astype(np.uint8)
        if self.mode == "binary":
            return scene.building.astype(np.uint8)
        return scene.cover.copy()


def describe_synthetic(options: str, mode: Mode | None) -> tuple[str, Description]:
    """Source (all options spelled out) and description of `count=120,size=128,seed=0,mode=binary`.

    Args:
        options: `key=value` pairs with commas between them; each may be left out.
        mode: Wins over the one in `options`.

    Raises:
        ConfigError: An unknown key, or a value out of range.
    """
    values = {"count": "120", "size": "128", "seed": "0", "mode": "binary"}
    for pair in filter(None, options.split(",")):
        key, separator, value = (part.strip() for part in pair.partition("="))
        if not separator or key not in values:
            raise ConfigError(f"synthetic data: expected key=value, found '{pair}': {nearest(key, values)}")
        values[key] = value
    if values["mode"] not in MODES:
        raise ConfigError(f"synthetic data: unknown mode '{values['mode']}': {nearest(values['mode'], MODES)}")
    numbers = {key: _whole(key, values[key], least) for key, least in _LEAST.items()}
    chosen = mode or values["mode"]
    count, size, seed = numbers["count"], numbers["size"], numbers["seed"]
    records = tuple(
        Record(f"scene_{index:04}", SceneImage(seed, index, size), SceneMask(seed, index, size, chosen))
        for index in range(count)
    )
    source = f"synthetic:count={count},size={size},seed={seed},mode={chosen}"
    return source, Description(records, Classes(CLASS_NAMES[chosen], chosen))


def _whole(key: str, value: str, least: int) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 9 and int(value) >= least):
        raise ConfigError(f"synthetic data: expected a whole number of at least {least} as {key}, found '{value}'")
    return int(value)
