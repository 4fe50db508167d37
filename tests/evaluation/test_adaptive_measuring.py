"""Agreement, members and IoU of an ensemble that stops early, against plain counting."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evaluation.noisy import NAMES, make_data, make_engine
from sklearn.metrics import jaccard_score

from smp_ensemble.ensembling.adaptive import AdaptiveRule
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.evaluation.adaptive_measuring import AdaptiveScore
from smp_ensemble.evaluation.measuring import measure_all
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.evaluation.summary import summary_json
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.masks import make_mask
from smp_ensemble.typing import IGNORE_INDEX

RULE = AdaptiveRule(0.1, 0.2, 0.5, ((0.6, 0.1, 0.0), (0.3, 0.05, 0.0)))


@pytest.fixture(scope="module", params=sorted(NAMES))
def data(request, tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("adaptive") / "set", request.param)


def make_adaptive(data, rule: AdaptiveRule | None = RULE) -> Engine:
    members = list(make_engine(data, members=3).ensemble.members)
    names = data.task.class_names
    return Engine(Ensemble(members, mode=data.task.mode, class_names=names, reject=0.55, adaptive=rule), "cpu", "32")


def test_what_is_measured_is_what_an_adaptive_engine_serves(data):
    engine = make_adaptive(data)
    found = measure_all(Predictions(engine, data, batch_size=3), split="test")
    early = engine.with_options(adaptive=True)
    pairs = [data.read(index) for index in range(len(data))]
    images, truth = [image for image, _ in pairs], np.concatenate([mask.ravel() for _, mask in pairs])
    masks = [
        np.concatenate(
            [make_mask(engine.ensemble, image, p).ravel() for image, p in zip(images, one.predict(images), strict=True)]
        )
        for one in (early, engine)
    ]
    score = found.adaptive
    assert score is not None
    assert score.agreement == pytest.approx((masks[0] == masks[1]).mean())
    assert score.agreement < 1, "nothing differs: the test says nothing"
    assert score.members == pytest.approx(early.mean_members)
    valid = (truth != IGNORE_INDEX) & (masks[0] != IGNORE_INDEX)
    average = "binary" if data.task.mode == "binary" else "macro"
    assert score.iou == pytest.approx(jaccard_score(truth[valid], masks[0][valid], average=average))
    values = summary_json(found)["adaptive"]
    assert json.loads(json.dumps(values)) == score.to_dict()


def test_without_a_rule_that_holds_there_is_nothing_to_measure(data):
    assert measure_all(Predictions(make_adaptive(data, None), data), split="test").adaptive is None
    turned = make_adaptive(data).with_options(views="flips")
    assert measure_all(Predictions(turned, data), split="test").adaptive is None


def test_the_mean_of_members_is_weighted_by_images():
    score = AdaptiveScore(0.01, (3, 0, 1), 0.999, 0.5)
    assert score.members == (3 * 1 + 1 * 3) / 4
    assert score.metrics("test") == {
        "test_adaptive_members": 1.5,
        "test_adaptive_agreement": 0.999,
        "test_adaptive_iou": 0.5,
    }
