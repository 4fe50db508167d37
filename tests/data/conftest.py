from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

AERIAL = Path(__file__).parents[2].parent / "shared" / "data" / "aerial"


@pytest.fixture(scope="session")
def aerial() -> Path:
    if not AERIAL.is_dir():
        pytest.skip("the aerial set is not beside this repository, in ../shared/data/aerial")
    return AERIAL


def write(path: Path, pixels: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)
    return path


MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes a small data set: random images, and masks of the given ids or arrays."""

    def make(
        masks: Mapping[str, object],
        *,
        size: tuple[int, int] = (8, 8),
        classes: Mapping[str, object] | None = None,
        splits: Sequence[str] | None = None,
        name: str = "set",
    ) -> Path:
        folder = tmp_path / name
        rng = np.random.default_rng(0)
        for stem, mask in masks.items():
            write(folder / "images" / f"{stem}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            layers = mask if isinstance(mask, dict) else {"": mask}
            for label, ids in layers.items():
                full = np.broadcast_to(np.asarray(ids, dtype=np.uint8), size)
                write(folder / "masks" / label / f"{stem}.png", full)
        if classes is not None:
            (folder / "classes.json").write_text(json.dumps(classes))
        if splits is not None:
            (folder / "splits.csv").write_text("\n".join(splits) + "\n")
        return folder

    return make
