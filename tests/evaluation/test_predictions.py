"""Stored predictions are the engine's own, batch by batch, and nothing runs twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation.noisy import SIZES, make_data, make_engine
from torch import nn

from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.evaluation import predictions as predictions_module
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.inference import engine as engine_module
from smp_ensemble.inference.engine import Engine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("predictions") / "set", "multiclass")


def everything(predictions: Predictions) -> dict[int, np.ndarray]:
    """All members' probabilities of each image: `(M, K, H, W)`."""
    found = {}
    for batch in predictions:
        stacked = torch.stack(list(predictions.of_members(batch)), dim=1).numpy()
        found |= dict(zip(batch.indices, stacked, strict=True))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_every_image_once_in_its_own_size(data, batch_size):
    predictions = Predictions(make_engine(data), data, batch_size=batch_size)
    seen = []
    for batch in predictions:
        seen += batch.indices
        for place, index in enumerate(batch.indices):
            image, mask = data.read(index)
            assert np.array_equal(batch.images[place], image)
            assert np.array_equal(batch.truth[place].numpy(), mask)
            assert mask.shape == SIZES[index + 2]  # the first two are train and val
    assert sorted(seen) == list(range(len(data)))
    assert [batch.number for batch in predictions] == list(range(len(list(predictions))))


def test_they_are_the_engines_and_the_same_from_disk(data, tmp_path):
    engine = make_engine(data, members=3)
    live, stored = Predictions(engine, data), Predictions(engine, data, folder=tmp_path)
    first, second, again = everything(live), everything(stored), everything(stored)
    for index in range(len(data)):
        (image, _), expected = data.read(index), first[index]
        for place, member in enumerate(engine.ensemble.members):
            (alone,) = Engine(Ensemble([member], mode="multiclass"), "cpu", "32").predict([image])
            np.testing.assert_allclose(expected[place], alone, rtol=0, atol=1e-6)
        assert np.array_equal(second[index], expected)
        assert np.array_equal(again[index], expected)


def test_members_run_once_with_a_folder_and_in_each_pass_without(data, tmp_path):
    runs = []

    class Counting(nn.Conv2d):
        def forward(self, images):
            runs.append(len(images))
            return super().forward(images)

    engine = Engine(Ensemble([Counting(3, 3, 1) for _ in range(2)], mode="multiclass"), "cpu", "32")
    stored = Predictions(engine, data, folder=tmp_path)
    for _ in range(3):
        everything(stored)
    everything(stored.combined_by(Ensemble(list(engine.ensemble.members), mode="multiclass", combiner="vote")))
    assert sum(runs) == 2 * len(data)
    runs.clear()
    live = Predictions(engine, data)
    everything(live)
    everything(live)
    assert sum(runs) == 4 * len(data)


def test_some_of_the_members_keep_their_own_predictions(data, tmp_path):
    stored = Predictions(make_engine(data, members=3), data, folder=tmp_path)
    whole = everything(stored)
    some = stored.of_some([2, 0])
    assert list(some.ensemble.members) == [stored.ensemble.members[2], stored.ensemble.members[0]]
    again = some.of_some([1])
    for index, one in everything(some).items():
        assert np.array_equal(one, whole[index][[2, 0]])
    for index, one in everything(again).items():
        assert np.array_equal(one, whole[index][[0]])


def test_without_room_they_are_computed_anew(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(predictions_module, "FREE_SHARE", 0.0)
    with caplog.at_level("INFO"):
        stored = Predictions(make_engine(data), data, folder=tmp_path, label="validation")
    everything(stored)
    assert not list(tmp_path.iterdir())
    assert "they are computed anew in each pass" in caplog.text


def test_large_images_run_alone(data, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_BATCH_PIXELS", 1)
    assert all(len(batch.indices) == 1 for batch in Predictions(make_engine(data), data))
