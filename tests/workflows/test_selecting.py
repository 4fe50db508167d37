"""Members are selected by their predictions on validation data, which are made once; the report is on test data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import DATA, SHORT, TINY

from smp_ensemble import build_ensemble, load_data, load_model, search_snapshots
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.tracking import candidates
from smp_ensemble.workflows import selecting
from smp_ensemble.workflows.selecting import Selecting, choose_members

GREEDY = (*DATA, *SHORT, "--selector", "greedy", "--calibrate", "none")


@pytest.fixture
def trained(command):
    """Four snapshots, tracked."""
    _, values, _ = command("train", *DATA, *TINY, "--epochs", "4", "--cycles", "4")
    return values


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMP_ENSEMBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def best_iou(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The best IoU of all thresholds j / 256."""
    scores = []
    for code in range(1, 256):
        found = probabilities >= code / 256
        scores.append((found & (truth == 1)).sum() / max(1, (found | (truth == 1)).sum()))
    return max(scores)


def test_greedy_selects_predicts_once_and_leaves_its_numbers(command, trained, tracking, cache, caplog, tmp_path):
    caplog.set_level("INFO")
    code, values, _ = command(*("ensemble", *GREEDY))
    assert code == 0
    assert "4 candidates on 4 validation images: 0 read from" in caplog.text
    assert len(list(cache.iterdir())) == 4

    ensemble = load_model(values["uri"])
    assert sum(ensemble.weights) == pytest.approx(1)
    splits = load_data(DATA[1])
    pairs = [splits.val.read(index) for index in range(len(splits.val))]
    truth = np.concatenate([mask.ravel() for _, mask in pairs])
    alone = {}
    for snapshot in search_snapshots():
        found = Engine(load_model(snapshot.uri), "cpu", "32").predict([image for image, _ in pairs])
        alone[snapshot.uri] = np.concatenate([one.ravel() for one in found])
    mean = sum(weight * alone[uri] for uri, weight in zip(values["members"], ensemble.weights, strict=True))
    assert best_iou(mean, truth) >= max(best_iou(one, truth) for one in alone.values()) - 0.005  # one byte each

    kept = {one.path for one in tracking.list_artifacts(values["run_id"])}
    assert {"selection.png", "selection.json"} <= kept
    path = tracking.download_artifacts(values["run_id"], "selection.json", str(tmp_path))
    numbers = json.loads(Path(path).read_text())
    assert numbers == values["selection"]
    assert numbers["metric"] == "val_iou"
    for row in numbers["candidates"]:
        assert row["val_iou"] == pytest.approx(best_iou(alone[row["model"]], truth), abs=0.002)
    chosen = {row["model"]: row["weight"] for row in numbers["candidates"] if row["weight"]}
    assert chosen == pytest.approx(dict(zip(values["members"], values["weights"], strict=True)))
    assert numbers["path"][numbers["kept"] - 1]["val_iou"] == max(step["val_iou"] for step in numbers["path"])

    metrics = tracking.get_run(values["run_id"]).data.metrics
    crossed = numbers["cross_fit"]
    assert crossed["parts"] == 3
    assert metrics["crossfit_selected_val_iou"] == pytest.approx(crossed["selected"])
    assert metrics["crossfit_best_val_iou"] == pytest.approx(crossed["best"])
    assert metrics["crossfit_all_val_iou"] == pytest.approx(
        best_iou(sum(alone.values()) / 4, truth), abs=0.005
    )  # one byte each
    assert ("is luck: on images that had no say" in caplog.text) is not crossed["pays"]

    caplog.clear()
    code, again, _ = command(*("ensemble", *GREEDY, "--cross-fit", "0"))
    assert "no say" not in caplog.text
    assert not any(name.startswith("crossfit") for name in tracking.get_run(again["run_id"]).data.metrics)
    assert "4 read from" in caplog.text
    assert "0 predicted" in caplog.text
    for same in ("members", "weights", "val", "test"):
        assert again[same] == values[same]


def test_without_a_cache_the_same_is_selected_and_other_combiners_fit_their_own(command, trained, cache, monkeypatch):
    _, cached, _ = command("ensemble", *GREEDY)
    monkeypatch.setenv("SMP_ENSEMBLE_CACHE", "off")
    _, plain, _ = command("ensemble", *GREEDY)
    assert (plain["members"], plain["weights"]) == (cached["members"], cached["weights"])
    _, stacked, _ = command("ensemble", *GREEDY, "--combiner", "stacking")
    assert stacked["members"] == cached["members"]
    assert set(stacked["weights"]) == {1.0}
    _, diverse, _ = command("ensemble", *DATA, *SHORT, "--selector", "diverse", "--max-members", "2")
    assert len(diverse["members"]) == 2
    assert diverse["weights"] == [0.5, 0.5]


def test_only_the_best_candidates_are_looked_at_and_python_selects_too(command, trained, cache, caplog):
    caplog.set_level("INFO")
    code, values, _ = command("ensemble", *GREEDY, "--max-candidates", "2")
    assert code == 0
    assert "greedy looks at the best 2 of 4 candidates by val_iou: max-candidates raises that" in caplog.text
    assert len(list(cache.iterdir())) == 2
    best = {snapshot.uri for snapshot in search_snapshots()[:2]}
    assert set(values["members"]) <= best
    splits = load_data(DATA[1])
    ensemble = build_ensemble(search_snapshots(), data=splits, selector="greedy", max_members=2, precision="32")
    assert len(ensemble.members) <= 2
    assert sum(ensemble.weights) == pytest.approx(1)


def test_candidates_are_guarded_before_anything_is_predicted(command, trained, monkeypatch):
    monkeypatch.setattr(selecting, "load_snapshot", lambda uri, task: pytest.fail("predicted"))
    code, _, errors = command("ensemble", *GREEDY, "--split-seed", "1", "--pick", trained["snapshots"][0]["snapshot"])
    assert code == 2
    assert "was trained on" in errors[0]
    _, other, _ = command("train", *DATA, *TINY, "--epochs", "1", "--cycles", "1", "--mode", "multiclass")
    ids = [trained["snapshots"][0]["snapshot"], other["snapshots"][0]["snapshot"]]
    code, _, errors = command("ensemble", *GREEDY, "--pick", ",".join(ids))
    assert code == 2
    assert all(one in errors[0] for one in ids)
    assert "has mode" in errors[0]
    code, _, errors = command("ensemble", *GREEDY, "--pick", ids[1])
    assert "has mode multiclass, the data has binary" in errors[0]


def test_a_metric_that_is_not_measured_is_refused_before_anything_is_trained(command, tracking):
    options = (*DATA, *TINY, "--epochs", "1", "--cycles", "1", "--selector", "greedy")
    code, _, errors = command("main", *options, "--metric", "val_ece")
    assert code == 2
    assert "members are not selected by val_ece" in errors[0]
    assert not tracking.search_runs(["0"])
    with pytest.raises(ConfigError, match="unknown selector 'greddy': did you mean 'greedy'"):
        Selecting("greddy")


def test_members_of_other_architectures_and_normalisation_join(command, trained, cache):
    other = ("--arch", "linknet", "--model-options", '{"encoder_depth": 3}', "--normalization", "min-max")
    code, one, _ = command("train", *DATA, *TINY, *other, "--epochs", "1", "--cycles", "1")
    assert code == 0
    ids = f"{trained['snapshots'][-1]['snapshot']},{one['snapshots'][0]['snapshot']}"
    splits = load_data(DATA[1])
    chosen = choose_members(candidates.picked(ids), splits, Selecting("diverse", 2), precision="32", accelerator="cpu")
    assert len(chosen.members) == 2
    code, values, _ = command("ensemble", *DATA, *SHORT, "--selector", "diverse", "--pick", ids)
    assert code == 0
    assert len(values["members"]) == 2


@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
def test_other_modes(command, mode, cache):
    options = (*DATA, *TINY, "--mode", mode, "--epochs", "2", "--cycles", "2")
    code, values, _ = command("main", *options, "--selector", "greedy", "--views", "flips")
    assert code == 0
    assert sum(values["ensemble"]["weights"]) == pytest.approx(1)


def test_one_part_is_refused_before_anything_is_looked_for(command, tracking):
    code, _, errors = command(*("ensemble", *GREEDY, "--cross-fit", "1"))
    assert code == 2
    assert errors == ["error: cross_fit: expected 0 (off), or 2 parts or more, got 1"]
    assert tracking.search_runs(["0"]) == []
