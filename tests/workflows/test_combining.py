"""How members are combined: what is asked for is checked first, fitted on validation data, kept and served."""

from __future__ import annotations

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DATA, SHORT, TINY

from smp_ensemble import build_ensemble, load_data, load_model, search_snapshots
from smp_ensemble.ensembling.postprocessing import PostProcessing
from smp_ensemble.evaluation.fitting import sample_pixels
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.typing import IGNORE_INDEX
from smp_ensemble.workflows.combining import AUTO, FIT, Combination, combination_of
from smp_ensemble.workflows.options import EnsembleOptions

COMBINERS = ("mean", "weighted", "geometric", "vote", "majority", "stacking")


@pytest.fixture
def trained(command):
    """Three snapshots, tracked."""
    _, values, _ = command("train", *DATA, *TINY, "--epochs", "3", "--cycles", "3")
    return values


def test_options_become_a_combination():
    options = EnsembleOptions(
        combiner="geometric", weights="3, 1", reject=0.2, views="d4", calibrate="none", postprocess='{"min_area": 9}'
    )
    assert combination_of(options) == Combination(
        "geometric", [3.0, 1.0], 0.2, "d4", "none", PostProcessing(min_area=9)
    )
    assert combination_of(EnsembleOptions()) == Combination()
    assert combination_of(EnsembleOptions(weights="fit", postprocess="Auto")).postprocess == AUTO
    assert combination_of(EnsembleOptions(adaptive=0.001)) == Combination(adaptive=0.001)


@pytest.mark.parametrize(
    ("options", "wants"),
    [
        ({"combiner": "weighted"}, True),
        ({"combiner": "mean", "weights": FIT}, True),
        ({"combiner": "weighted", "weights": [1.0]}, False),
        ({"combiner": "mean"}, False),
        ({"combiner": "stacking"}, False),
    ],
)
def test_weights_are_fitted_where_they_are_asked_for_and_not_given(options, wants):
    assert Combination(**options).wants_fitted_weights is wants


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--combiner", "stackign"), "unknown combiner 'stackign': did you mean 'stacking'"),
        (("--views", "d5"), "unknown views 'd5': did you mean 'd4'"),
        (("--calibrate", "platt"), "unknown calibration 'platt'"),
        (("--weights", "fit", "--combiner", "vote"), "weights are fitted for the mean of probabilities"),
        (("--weights", "a,b"), "expected weights as numbers separated by commas, or 'fit', got 'a,b'"),
        (("--reject", "1.5"), "expected reject as 0 (no pixel) or a number below 1, got 1.5"),
        (("--postprocess", '{"min_aera": 3}'), "did you mean 'min_area'"),
        (("--postprocess", "yes"), "expected post-processing as JSON"),
        (("--adaptive", "1"), "expected adaptive as a share of pixels from 0 to below 1, such as 0.001, got 1.0"),
        (("--adaptive", "nan"), "expected adaptive as a share of pixels"),
        (("--adaptive", "some"), "expected a share such as 0.001, or nothing, got 'some'"),
        (("--adaptive", "0.1", "--combiner", "stacking"), "adaptive needs a combiner that adds members up"),
    ],
)
def test_nonsense_is_refused_before_anything_is_trained(command, tracking, options, message):
    code, _, errors = command("main", *DATA, *TINY, "--epochs", "1", "--cycles", "1", *options)
    assert code == 2
    assert message in errors[0]
    assert not tracking.search_runs(["0"])


def test_opening_in_multiclass_mode_is_refused(command, tracking):
    options = ("--mode", "multiclass", "--epochs", "1", "--cycles", "1", "--postprocess", '{"opening": 1}')
    code, _, errors = command("main", *DATA, *TINY, *options)
    assert code == 2
    assert "expected no opening or closing in multiclass mode" in errors[0]
    assert not tracking.search_runs(["0"])


def by_hand(name: str, stack: np.ndarray, ensemble) -> np.ndarray:
    """The mask `(H, W)` of one image from its members' probabilities `(M, H, W)`, in float64."""
    weights = np.array(ensemble.weights) / sum(ensemble.weights)
    if name in {"vote", "majority"}:
        share = np.tensordot(weights, stack >= np.float32(ensemble.threshold), 1)
        mean = np.tensordot(weights, stack, 1)
        tie = np.isclose(share, 0.5)
        mask = np.where(tie, mean >= ensemble.threshold, share > 0.5).astype(np.uint8)
        winner = np.maximum(share, 1 - share)
        return np.where(winner > 0.5 + 1e-9, mask, IGNORE_INDEX) if name == "majority" else mask
    if name == "geometric":
        logit = np.tensordot(weights, np.log(stack / (1 - stack)), 1)
    elif name == "stacking":
        logit = np.tensordot(ensemble.state["weight"][:, 0, 0].numpy(), stack, 1) + float(ensemble.state["bias"])
    else:
        mean = np.tensordot(weights, stack, 1)
        logit = np.log(mean / (1 - mean))
    return (1 / (1 + np.exp(-logit / ensemble.temperature)) >= ensemble.threshold).astype(np.uint8)


def test_every_combiner_is_fitted_logged_loaded_and_served_as_its_formula_says(command, trained):
    image = load_data(DATA[1]).test.read(1)[0]
    for name in COMBINERS:
        code, values, _ = command("ensemble", *DATA, *SHORT, "--combiner", name)
        assert code == 0
        ensemble = load_model(values["uri"])
        assert ensemble.combiner == name
        assert ensemble.threshold == values["thresholds"][-1]
        members = [load_model(uri) for uri in values["members"]]
        stack = np.stack([Engine(one).predict([image])[0][0] for one in members]).astype(np.float64)
        mask = mlflow.pyfunc.load_model(values["uri"]).predict(image[None])[0]
        assert (mask == by_hand(name, stack, ensemble)).mean() > 0.999, name  # floating point near the threshold
        assert values["test"][-1]["coverage"] == 1.0 if name != "majority" else values["test"][-1]["coverage"] <= 1.0
        if name not in {"majority", "stacking"}:
            continue
        _, again, _ = command("evaluate", *DATA, *SHORT, "--model", values["uri"])
        assert again["metrics"] == pytest.approx(values["test"][-1], nan_ok=True)
        for one, other in zip(again["members"], values["test"], strict=False):
            assert one == pytest.approx(other, nan_ok=True)


def test_fitted_weights_are_on_the_simplex_and_no_worse_than_equal_ones(command, trained):
    _, values, _ = command("ensemble", *DATA, *SHORT, "--combiner", "weighted", "--calibrate", "none")
    weights = np.array(values["weights"])
    assert weights.sum() == pytest.approx(1)
    assert (weights > 0).all()
    assert len(weights) == len(values["members"]) <= 3  # members of weight 0 are left out
    _, equal, _ = command("ensemble", *DATA, *SHORT, "--calibrate", "none")
    assert values["val"][-1]["nll"] <= equal["val"][-1]["nll"] + 1e-6


def test_the_stacker_has_the_least_log_loss_of_all_linear_heads(command, trained):
    splits = load_data(DATA[1])
    ensemble = build_ensemble(search_snapshots(), data=splits, combiner="stacking", calibrate="none", precision="32")
    sample = sample_pixels(Predictions(Engine(ensemble, "cpu", "32"), splits.val))
    features, truth = sample.probabilities[..., 0].double(), sample.truth.double()

    def loss(weight, bias):
        logits = features @ weight + bias
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, truth) + 0.5e-4 * weight.square().sum()

    weight, bias = ensemble.state["weight"][:, 0, 0].double(), ensemble.state["bias"].double()
    best = float(loss(weight, bias))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        moved = weight + 0.05 * torch.randn(len(weight), generator=generator, dtype=torch.float64)
        assert float(loss(moved, bias)) >= best - 1e-9


def test_calibration_lowers_the_log_loss_on_validation_data_of_members_too(command, trained):
    _, plain, _ = command("ensemble", *DATA, *SHORT, "--calibrate", "none")
    _, calibrated, _ = command("ensemble", *DATA, *SHORT)
    assert plain["temperature"] == 1.0
    assert calibrated["temperature"] != 1.0
    for before, after in zip(plain["val"], calibrated["val"], strict=True):
        assert after["nll"] < before["nll"]
        assert after["aurc"] == pytest.approx(before["aurc"], abs=0.05)
    members = load_model(calibrated["uri"]).members
    assert all(member.temperature != 1.0 for member in members)


def test_views_belong_to_the_model_and_are_what_pyfunc_uses(command, trained):
    _, values, _ = command("ensemble", *DATA, *SHORT, "--views", "flips")
    model = mlflow.pyfunc.load_model(values["uri"])
    image = load_data(DATA[1]).test.read(1)[0]
    own = model.predict(image[None], params={"kind": "probabilities"})
    flips = model.predict(image[None], params={"kind": "probabilities", "views": "flips"})
    none = model.predict(image[None], params={"kind": "probabilities", "views": "none"})
    assert np.array_equal(own, flips)
    assert not np.allclose(own, none, atol=1e-4)
    assert load_model(values["uri"]).views == ("flips",)


def test_rejected_pixels_are_255_in_masks_and_coverage_is_reported(command, trained):
    _, values, _ = command("ensemble", *DATA, *SHORT, "--reject", "0.6")
    assert 0 < values["test"][-1]["coverage"] < 1
    images = np.stack([load_data(DATA[1]).test.read(index)[0] for index in range(2)])
    model = mlflow.pyfunc.load_model(values["uri"])
    masks, probabilities = model.predict(images), model.predict(images, params={"kind": "probabilities"})[:, 0]
    threshold = np.float32(load_model(values["uri"]).threshold)
    confidence = np.where(probabilities >= threshold, probabilities, 1 - probabilities)
    assert np.array_equal(masks == IGNORE_INDEX, confidence <= np.float32(0.6))
    code, text, _ = command("ensemble", *DATA, *SHORT, "--reject", "0.6", values=False)
    assert code == 0
    assert "coverage" in text


def test_post_processing_is_kept_with_the_model(command, trained):
    settings = '{"min_area": 40, "max_hole": 30}'
    _, values, _ = command("ensemble", *DATA, *SHORT, "--postprocess", settings)
    assert values["postprocess"] == {"min_area": 40, "max_hole": 30}
    ensemble = load_model(values["uri"])
    assert ensemble.postprocess == PostProcessing(min_area=40, max_hole=30)
    code, tuned, _ = command("ensemble", *DATA, *SHORT, "--postprocess", "auto")
    assert code == 0
    _, plain, _ = command("ensemble", *DATA, *SHORT)
    assert tuned["val"][-1]["iou"] >= plain["val"][-1]["iou"]


@pytest.mark.slow
def test_an_adaptive_rule_is_fitted_measured_kept_and_served_on_request(command, trained, tracking, tmp_path):
    code, values, _ = command("ensemble", *DATA, *SHORT, "--weights", "1,3,2", "--adaptive", "0.2")
    assert code == 0
    assert values["weights"] == [3.0, 2.0, 1.0]  # the heaviest member runs first
    ensemble = load_model(values["uri"])
    assert ensemble.adaptive is not None
    assert (ensemble.adaptive.tolerance, ensemble.adaptive.members) == (0.2, 3)
    metrics = tracking.get_run(values["run_id"]).data.metrics
    for split in ("val", "test"):
        found = values["adaptive"][split]
        assert metrics[f"{split}_adaptive_members"] == found["members"]
        assert metrics[f"{split}_adaptive_agreement"] == found["agreement"]
        assert 1 <= found["members"] <= 3
    images = np.stack([load_data(DATA[1]).test.read(index)[0] for index in range(3)])
    model = mlflow.pyfunc.load_model(values["uri"])
    early = Engine(ensemble, adaptive=True)
    expected = [ensemble.decide(torch.from_numpy(one)[None])[0].numpy() for one in early.predict(list(images))]
    assert np.array_equal(model.predict(images, params={"adaptive": True}), np.stack(expected))
    code, text, _ = command("ensemble", *DATA, *SHORT, "--adaptive", "0.2", values=False)
    assert "ensemble, adaptive" in text
    assert "adaptive on test data: " in text
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    options = ("predict", "--model", values["uri"], "--input", str(tmp_path / "*.png"), "--accelerator", "cpu")
    _, predicted, _ = command(*options, "--adaptive", "true")
    assert 1 <= predicted["members_used"] <= 3
    _, predicted, _ = command(*options, "--output", "whole")
    assert predicted["members_used"] is None
    snapshot = search_snapshots()[0].uri
    code, _, errors = command("predict", "--model", snapshot, "--input", str(tmp_path), "--adaptive", "true")
    assert code == 2
    assert "this ensemble has no adaptive rule: build it with --adaptive 0.001" in errors[0]
    code, scored, _ = command("evaluate", "--model", values["uri"], *DATA, *SHORT)
    assert scored["adaptive"] == values["adaptive"]["test"]


@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
def test_other_modes_stack_vote_and_clean(command, mode):
    options = (*DATA, *TINY, "--mode", mode, "--epochs", "2", "--cycles", "2")
    code, values, _ = command("main", *options, "--combiner", "stacking", "--views", "flips")
    assert code == 0
    assert np.isfinite(values["ensemble"]["test"][-1]["nll"])
    code, values, _ = command(
        "ensemble", *DATA, *SHORT, "--mode", mode, "--combiner", "majority", "--postprocess", '{"min_area": 9}'
    )
    assert code == 0
    assert 0 <= values["test"][-1]["coverage"] <= 1


def test_python_refuses_what_the_command_refuses():
    with pytest.raises(ConfigError, match="unknown calibration"):
        build_ensemble([], data=None, calibrate="platt")
