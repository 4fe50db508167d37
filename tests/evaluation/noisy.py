"""A small noisy data set, an ensemble of 1x1 convolutions on it, and all its probabilities as plain arrays."""

from __future__ import annotations

import json

import numpy as np
import torch
from PIL import Image
from torch import nn

from smp_ensemble.data.datasets import SegmentationDataset
from smp_ensemble.data.forms import load_data
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.inference.engine import Engine
from smp_ensemble.typing import IGNORE_INDEX

SIZES = [(8, 8), (9, 13), (32, 20), (5, 40), (7, 7), (33, 3)]
NAMES = {"binary": ["ground", "roof"], "multiclass": ["land", "roof", "road"]}


def make_data(folder, mode: str) -> SegmentationDataset:
    """Images of several sizes whose masks follow their bands with noise, and hold ignored pixels."""
    rng = np.random.default_rng(0)
    lines = ["image,mask,split"]
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index, size in enumerate(SIZES):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        noisy = image.astype(float) + rng.normal(0, 60, image.shape)
        mask = noisy.argmax(axis=-1) if mode == "multiclass" else noisy[..., 0] > 150
        mask = np.where(rng.random(size) < 0.2, IGNORE_INDEX, mask).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
        split = {0: "train", 1: "val"}.get(index, "test")
        lines.append(f"images/{index}.png,masks/{index}.png,{split}")
    (folder / "splits.csv").write_text("\n".join(lines) + "\n")
    classes = {"names": NAMES[mode], "ignore_index": IGNORE_INDEX, "task": mode}
    (folder / "classes.json").write_text(json.dumps(classes))
    return load_data(str(folder)).split("test")


def make_engine(data: SegmentationDataset, members: int = 2) -> Engine:
    """1x1 convolutions: what a pixel gets depends on no other, so padding cannot help or harm."""
    outputs = data.task.num_outputs
    networks = []
    for index in range(members):
        network = nn.Conv2d(3, outputs, 1)
        with torch.no_grad():
            network.weight.copy_((0.01 + 0.01 * index) * torch.eye(3)[:outputs, :, None, None])
            network.bias.fill_(-2.0 - index)
        networks.append(network)
    ensemble = Ensemble(networks, mode=data.task.mode, class_names=data.task.class_names, weights=range(1, members + 1))
    return Engine(ensemble, "cpu", "32")


def collect(data: SegmentationDataset, engine: Engine) -> tuple[list[np.ndarray], np.ndarray]:
    """Probabilities `(K, pixels)` of each member and the ensemble, and the truth, without padding or batches."""
    pairs = [data.read(index) for index in range(len(data))]
    models = [*[Ensemble([one], mode=engine.ensemble.mode) for one in engine.ensemble.members], engine.ensemble]
    probabilities = [
        np.concatenate(
            [one.reshape(len(one), -1) for one in Engine(model, "cpu", "32").predict([image for image, _ in pairs])],
            axis=1,
        )
        for model in models
    ]
    return probabilities, np.concatenate([mask.ravel() for _, mask in pairs])


def iou_at(probabilities: np.ndarray, truth: np.ndarray, threshold: float) -> float:
    predicted, valid, true = probabilities[0] >= np.float32(threshold), truth != IGNORE_INDEX, truth == 1
    return (predicted & true).sum() / ((predicted | true) & valid).sum()
