"""`predict` and `evaluate`: views, uncertainty and passes are the engine's, and an error where there is no dropout."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import DATA, SHORT

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.uncertainty import draw_heatmap
from smp_ensemble.tracking.flavor import load_model, save_model


@pytest.fixture
def models(make_tiny_network, tmp_path):
    """Two saved models: `dropping` and `plain`."""
    for name, options in (("dropping", {"dropout": 0.5}), ("plain", {})):
        member = Member(make_tiny_network(1, **options), imagenet())
        save_model(Ensemble([member], mode="binary", class_names=("background", "building")), tmp_path / name)
    return tmp_path


def test_predict_averages_passes(command, models):
    image = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    Image.fromarray(image).save(models / "one.png")
    arguments = ("--model", "dropping", "--input", "one.png", "--kind", "probabilities", "--precision", "32")
    found = {}
    for passes in (1, 5):
        code, _, _ = command(
            "predict", *arguments, "--accelerator", "cpu", "--output", f"out{passes}", "--passes", str(passes)
        )
        assert code == 0
        found[passes] = np.load(models / f"out{passes}" / "one.npy", allow_pickle=False)
    ensemble = load_model("dropping")
    for passes, probabilities in found.items():
        expected = Engine(ensemble, "cpu", "32", passes=passes)(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
        assert np.array_equal(probabilities, expected[0].numpy())
    assert not np.array_equal(found[1], found[5])


@pytest.fixture
def turning(make_tiny_network, tmp_path):
    """A saved model of two members with views of its own, and two images."""
    members = [Member(make_tiny_network(seed), imagenet()) for seed in (1, 2)]
    ensemble = Ensemble(members, mode="binary", class_names=("background", "building"), views="flips")
    save_model(ensemble, tmp_path / "turning")
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    images = {name: generator.integers(0, 256, (21, 34, 3), dtype=np.uint8) for name in ("a.png", "b.png")}
    for name, image in images.items():
        Image.fromarray(image).save(tmp_path / "images" / name)
    return images


@pytest.mark.parametrize("views", [None, "own", "none", "d4+scales:0.75,1"])
def test_predict_uses_the_models_own_views_or_others(command, turning, tmp_path, views):
    chosen = () if views is None else ("--views", views)
    code, _, _ = command(
        "predict", "--model", "turning", "--input", "images", "--kind", "probabilities", "--precision", "32",
        "--accelerator", "cpu", *chosen,
    )  # fmt: skip
    assert code == 0
    engine = Engine(load_model("turning"), "cpu", "32", views=views if views != "own" else "flips")
    for name, expected in zip(turning, engine.predict(list(turning.values())), strict=True):
        found = np.load(tmp_path / "predictions" / f"{name[0]}.npy", allow_pickle=False)
        assert np.array_equal(found, expected)


def test_predict_says_how_unsure_it_is(command, turning, tmp_path):
    code, values, _ = command(
        "predict", "--model", "turning", "--input", "images", "--kind", "uncertainty", "--precision", "32",
        "--accelerator", "cpu",
    )  # fmt: skip
    assert code == 0
    assert values["count"] == 2
    expected = Engine(load_model("turning"), "cpu", "32").uncertainty(list(turning.values()))
    table = pd.read_csv(tmp_path / "predictions" / "uncertainty.csv", index_col="name")
    assert table.index.tolist() == ["a.png", "b.png"]
    for name, maps in zip(turning, expected, strict=True):
        assert np.array_equal(np.load(tmp_path / "predictions" / f"{name[0]}.npy", allow_pickle=False), maps)
        np.testing.assert_allclose(table.loc[name], maps.astype(np.float64).mean(axis=(1, 2)), rtol=1e-12)
        with Image.open(tmp_path / "predictions" / name) as picture:
            assert np.array_equal(np.asarray(picture), draw_heatmap(maps[0], np.log(2)))


def test_unknown_views_are_refused_before_anything_is_read(command, tmp_path):
    code, _, errors = command("predict", "--model", "nowhere", "--input", "nowhere", "--views", "d5")
    assert code == 2
    assert "unknown views 'd5': did you mean 'd4'" in errors[0]


def test_evaluate_scores_passes_and_says_how_many(command, models, tracking):
    scores = {}
    for passes in ("1", "3", "3"):
        code, values, _ = command("evaluate", *DATA, *SHORT, "--model", "dropping", "--passes", passes)
        assert code == 0
        assert tracking.get_run(values["run_id"]).data.params["passes"] == passes
        scores.setdefault(passes, []).append(values["metrics"]["nll"])
    assert scores["3"][0] == scores["3"][1] != scores["1"][0]


@pytest.mark.parametrize("name", ["predict", "evaluate"])
def test_a_model_without_dropout_is_told_what_adds_some(command, models, name):
    Image.new("RGB", (16, 16)).save(models / "one.png")
    what = ("--input", "one.png") if name == "predict" else DATA
    code, _, errors = command(name, "--model", "plain", *what, "--passes", "3")
    assert code == 2
    assert len(errors) == 1
    assert "passes=3 needs dropout, but member 0 (Unet) holds none" in errors[0]
    assert '{"dropout": 0.2}' in errors[0]
    assert not (models / "predictions").exists()


def test_no_passes_at_all_are_refused(command, models):
    code, _, errors = command("predict", "--model", "plain", "--input", "one.png", "--passes", "0")
    assert code == 2
    assert "--passes: expected a whole number above 0, got 0" in errors[0]
