"""Scores of members and ensemble: as torchmetrics and plain counting give them, on the pixels that count."""

from __future__ import annotations

import json
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional.classification import binary_jaccard_index, multiclass_f1_score, multiclass_jaccard_index

from smp_ensemble.data.forms import load_data
from smp_ensemble.ensembling.combiners import Mean
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.inference import engine as engine_module
from smp_ensemble.inference.engine import Engine
from smp_ensemble.typing import IGNORE_INDEX
from smp_ensemble.evaluation.scoring import measure, pooled, score

if TYPE_CHECKING:
    from smp_ensemble.data.datasets import SegmentationDataset

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


@pytest.fixture(scope="module", params=sorted(NAMES))
def data(request, tmp_path_factory) -> SegmentationDataset:
    return make_data(tmp_path_factory.mktemp("scoring") / "set", request.param)


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> SegmentationDataset:
    return make_data(tmp_path_factory.mktemp("scoring") / "set", "binary")


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


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_torchmetrics(data, batch_size):
    engine = make_engine(data)
    probabilities, truth = collect(data, engine)
    scores = score(engine, data, batch_size=batch_size, thresholds=[0.4, 0.5, 0.6])
    assert len(scores) == 3
    for found, one, threshold in zip(scores, probabilities, (0.4, 0.5, 0.6), strict=True):
        assert found.threshold == threshold
        target = torch.from_numpy(truth.astype(np.int64))
        if data.task.mode == "binary":
            decision = torch.from_numpy(one[0] >= np.float32(threshold)).long()
            iou = binary_jaccard_index(decision, target, ignore_index=IGNORE_INDEX)
            assert found.metrics["iou"] == pytest.approx(iou.item())
            assert found.metrics["iou/roof"] == found.metrics["iou"]
            assert found.metrics["iou_at_half"] == pytest.approx(iou_at(one, truth, 0.5))
            continue
        decision = torch.from_numpy(one.argmax(axis=0))
        options = {"num_classes": 3, "average": None, "ignore_index": IGNORE_INDEX}
        iou = multiclass_jaccard_index(decision, target, **options)
        dice = multiclass_f1_score(decision, target, **options)
        for index, name in enumerate(data.task.class_names):
            assert found.metrics[f"iou/{name}"] == pytest.approx(iou[index].item())
            assert found.metrics[f"dice/{name}"] == pytest.approx(dice[index].item())
        assert found.metrics["iou"] == pytest.approx(iou.mean().item())
        assert found.metrics["dice"] == pytest.approx(dice.mean().item())


def test_log_loss_and_brier_score_are_those_of_the_valid_pixels(data):
    engine = make_engine(data)
    probabilities, truth = collect(data, engine)
    valid = truth != IGNORE_INDEX
    for found, one in zip(score(engine, data, thresholds=[0.5] * 3), probabilities, strict=True):
        stacked = np.concatenate([1 - one, one]) if data.task.mode == "binary" else one
        chosen = stacked[truth[valid], np.flatnonzero(valid)].astype(np.float64)
        assert found.metrics["nll"] == pytest.approx(-np.log(chosen).mean(), rel=1e-4)
        assert 0 <= found.metrics["ece"] <= 1
        assert set(found.metrics) >= {"iou", "dice", "ece", "nll", "brier"}


def test_the_threshold_is_the_best_of_all(binary):
    engine = make_engine(binary)
    probabilities, truth = collect(binary, engine)
    for found, one in zip(score(engine, binary), probabilities, strict=True):
        every = {step / 256: iou_at(one, truth, step / 256) for step in range(1, 256)}
        assert found.metrics["iou"] == pytest.approx(max(every.values()))
        assert every[found.threshold] == pytest.approx(max(every.values()))
        assert found.metrics["iou_at_half"] == pytest.approx(every[0.5])
        iou = found.metrics["iou"]
        assert found.metrics["dice"] == pytest.approx(2 * iou / (1 + iou))


def test_a_tuned_threshold_scores_the_same_when_it_is_given(binary):
    engine = make_engine(binary)
    tuned = score(engine, binary)
    given = score(engine, binary, thresholds=[one.threshold for one in tuned])
    for first, second in zip(tuned, given, strict=True):
        assert first.threshold == second.threshold
        assert first.metrics == pytest.approx(second.metrics)


def test_cutting_batches_changes_nothing(data, monkeypatch):
    engine = make_engine(data)
    whole = score(engine, data, batch_size=4, thresholds=[0.5] * 3)
    monkeypatch.setattr(engine_module, "MAX_BATCH_PIXELS", 1)
    cut = score(engine, data, batch_size=4, thresholds=[0.5] * 3)
    for first, second in zip(whole, cut, strict=True):
        assert first.metrics == pytest.approx(second.metrics)


def test_one_member_scores_as_its_ensemble(data):
    member, ensemble = score(make_engine(data, members=1), data, thresholds=[0.5, 0.5])
    assert member.metrics == pytest.approx(ensemble.metrics)


def test_meters_pool_to_the_scores_of_all_pixels_and_stay_as_they_are(data):
    engine = make_engine(data)
    parts = [data.subset([0, 2]), data.subset([1]), data.subset([3])]
    meters = [measure(engine, part, thresholds=[0.4, 0.5, 0.6])[-1] for part in parts]
    alone = [meter.score().metrics for meter in meters]
    whole = score(engine, data, thresholds=[0.4, 0.5, 0.6])[-1]
    for order in (meters, meters[::-1]):
        found = pooled(order)
        assert found.threshold == whole.threshold
        assert found.metrics == pytest.approx(whole.metrics)
    assert [meter.score().metrics for meter in meters] == alone


def test_memory_holds_one_members_probabilities_and_one_sum(binary, monkeypatch):
    seen, alive = [], []

    class WatchedMean(Mean):
        def update(self, probabilities, weight=1.0):
            seen.append(weakref.ref(probabilities))
            super().update(probabilities, weight)

    class Watching(nn.Conv2d):
        def forward(self, images):
            alive.append(sum(one() is not None for one in seen))
            return super().forward(images)

    monkeypatch.setattr("smp_ensemble.ensembling.ensemble.combiner_class", lambda name: WatchedMean)
    engine = Engine(Ensemble([Watching(3, 1, 1) for _ in range(3)], mode="binary"), "cpu", "32")
    score(engine, binary, thresholds=[0.5] * 4)
    assert len(seen) >= 3
    assert set(alive) == {0}
