"""`mlflow.models.evaluate` with our evaluator: the numbers of the command, in MLflow's own run."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models.evaluation import list_evaluators
from PIL import Image

from smp_ensemble import load_data
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.tracking.evaluator import EvaluatorConfig, SegmentationEvaluator
from smp_ensemble.tracking.flavor import log_model, save_model

CLASSES = {
    "binary": ("background", "roof"),
    "multiclass": ("land", "roof", "road"),
    "multilabel": ("roof", "road"),
}
CHEAP = {"report": False}

pytestmark = [  # MLflow calling pandas
    pytest.mark.filterwarnings("ignore:Starting with pandas version 4.0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.drop:DeprecationWarning"),
]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def make_data(tmp_path):
    """Writes seven images with masks as a folder; the last five are the test images."""

    def make(mode: str):
        folder = tmp_path / "data"
        rng = np.random.default_rng(3)
        lines = ["image,mask,split,group"]
        for index in range(7):
            size = (21, 34) if index == 4 else (32, 32)
            name = f"{index}.png"
            files = {f"images/{name}": rng.integers(0, 256, (*size, 3), dtype=np.uint8)}
            for label in CLASSES[mode] if mode == "multilabel" else ("",):
                ids = rng.integers(0, 3 if mode == "multiclass" else 2, size, dtype=np.uint8)
                ids[:4] = 255
                files[f"masks/{label}/{name}"] = ids
            for path, pixels in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(png(pixels))
            split = {0: "train", 1: "val"}.get(index, "test")
            lines.append(f"images/{name},masks/{name},{split},g{index // 2}")
        (folder / "splits.csv").write_text("\n".join(lines) + "\n")
        (folder / "classes.json").write_text(json.dumps({"names": CLASSES[mode], "task": mode}))
        return folder

    return make


def read_frame(folder, mode: str) -> pd.DataFrame:
    """The test images of a folder, as files are."""
    rows = []
    for index in range(2, 7):
        image = (folder / "images" / f"{index}.png").read_bytes()
        if mode == "multilabel":
            paths = {label: folder / "masks" / label / f"{index}.png" for label in CLASSES[mode]}
            mask = json.dumps({label: base64.b64encode(path.read_bytes()).decode() for label, path in paths.items()})
        else:
            mask = (folder / "masks" / f"{index}.png").read_bytes()
        rows.append({"image": image, "mask": mask, "scene": f"g{index // 2}", "file": str(index)})
    return pd.DataFrame(rows)


@pytest.fixture
def make_ensemble(make_tiny_network):
    def make(mode: str, members: int = 2, trained_on=None) -> Ensemble:
        outputs = 1 if mode == "binary" else len(CLASSES[mode])
        networks = [make_tiny_network(seed, outputs) for seed in range(1, members + 1)]
        made = [Member(network, imagenet(), training_images=trained_on) for network in networks]
        return Ensemble(made, mode=mode, threshold=0.5, class_names=CLASSES[mode])

    return make


@pytest.fixture
def binary(tracking, make_data, make_ensemble):
    """The address of a model, and a frame for it."""
    return log_model(make_ensemble("binary")), read_frame(make_data("binary"), "binary")


def score(model, frame, *, config=CHEAP, targets="mask", **more):
    options = {"model_type": "segmentation", "evaluators": "smp_ensemble", **more}
    return mlflow.models.evaluate(model, frame, targets=targets, evaluator_config=config, **options)


@pytest.mark.parametrize("mode", CLASSES)
def test_numbers_are_those_of_the_command(command, tracking, make_data, make_ensemble, mode):
    folder = make_data(mode)
    uri = log_model(make_ensemble(mode))
    code, values, errors = command("evaluate", "--data", str(folder), "--model", uri, "--split", "test")
    assert (code, errors) == (0, [])
    expected = tracking.get_run(values["run_id"]).data.metrics
    frame = read_frame(folder, mode)
    if mode == "binary":  # base64 says the same as bytes
        frame = frame.map(lambda cell: base64.b64encode(cell).decode() if isinstance(cell, bytes) else cell)
    with mlflow.start_run() as run:
        result = score(uri, frame, config={"group": "scene", "name": "file", "report": mode == "binary"})
    found = tracking.get_run(run.info.run_id).data.metrics
    assert result.run_id == run.info.run_id
    assert {"test_iou", "test_ece", "test_nll", "test_aurc", "test_boundary_iou"} <= set(found)
    assert f"test_iou/{CLASSES[mode][-1]}" in found
    assert set(found) == set(expected) == set(result.metrics)
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, abs=1e-12, nan_ok=True), metric
        assert result.metrics[metric] == pytest.approx(value, abs=1e-12, nan_ok=True), metric
    if mode != "binary":
        return

    ours, theirs = (
        json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/report/report.json"))
        for run_id in (run.info.run_id, values["run_id"])
    )
    assert ours["data"]["digest"] == theirs["data"]["digest"]
    stored = {one.path for one in tracking.list_artifacts(run.info.run_id, "report")}
    assert {f"report/{name}" for name in result.artifacts} == stored
    assert {"report.html", "report.json", "scores.png"} <= set(result.artifacts)
    page = result.artifacts["report.html"]
    assert page.uri == f"runs:/{run.info.run_id}/report/report.html"
    assert page.content == mlflow.artifacts.load_text(page.uri).encode()


def test_metrics_are_logged_once_and_linked_to_model_and_data(binary, tracking):
    uri, frame = binary
    with mlflow.start_run() as run:
        score(uri, frame)
    stored = tracking.get_run(run.info.run_id)
    assert len(tracking.get_metric_history(run.info.run_id, "test_iou")) == 1
    (dataset,) = stored.inputs.dataset_inputs
    assert [one.model_id for one in stored.inputs.model_inputs] == [uri.removeprefix("models:/")]
    model = tracking.get_logged_model(uri.removeprefix("models:/"))
    assert ("test_iou", dataset.dataset.digest) in {(one.key, one.dataset_digest) for one in model.metrics}
    assert not tracking.list_artifacts(run.info.run_id)


def test_a_model_that_is_not_tracked_is_scored_too(tracking, make_data, make_ensemble, tmp_path):
    frame = read_frame(make_data("binary"), "binary")
    ensemble = make_ensemble("binary")
    save_model(ensemble, tmp_path / "model")
    result = score(str(tmp_path / "model"), frame, config={"split": "left-out", **CHEAP})
    (point,) = tracking.get_metric_history(result.run_id, "left_out_iou")
    assert point.value == result.metrics["left_out_iou"]
    assert len(tracking.get_run(result.run_id).inputs.dataset_inputs) == 1

    hits = union = 0  # by hand, pixel by pixel
    for image, mask in zip(frame["image"], frame["mask"], strict=True):
        pixels, ids = (np.array(Image.open(io.BytesIO(cell))) for cell in (image, mask))
        (probabilities,) = Engine(ensemble).predict([pixels])
        valid, found = ids != 255, probabilities[0] >= np.float32(0.5)
        hits += (found & (ids == 1) & valid).sum()
        union += ((found | (ids == 1)) & valid).sum()
    assert result.metrics["left_out_iou"] == pytest.approx(hits / union, abs=1e-6)  # scores are float32


def test_views_and_passes_are_those_of_the_engine(tracking, make_data, make_tiny_network):
    network = make_tiny_network(1, dropout=0.5)
    uri = log_model(Ensemble([Member(network, imagenet())], mode="binary", class_names=CLASSES["binary"]))
    frame = read_frame(make_data("binary"), "binary")
    found = {
        name: score(uri, frame, config={**CHEAP, name: value}).metrics["test_nll"]
        for name, value in {"batch_size": 1, "views": "flips", "passes": 2}.items()
    }
    plain = score(uri, frame).metrics["test_nll"]
    assert found["batch_size"] == pytest.approx(plain, abs=1e-6)
    assert len({plain, found["views"], found["passes"]}) == 3


def test_what_cannot_be_read_is_named_by_its_row(binary):
    uri, frame = binary
    for column, cell, message in (
        ("image", b"no image", "cannot read image row 1: expected PNG"),
        ("mask", png(np.zeros((16, 32), np.uint8)), "image row 1 is 32x32 .* its mask row 1 is 16x32"),
    ):
        cells = [cell if row == 1 else old for row, old in enumerate(frame[column])]
        with pytest.raises(MlflowException, match=message) as caught:
            score(uri, frame.assign(**{column: cells}))
        assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
        assert "\n" not in caught.value.message


def test_columns_and_configuration_are_checked(binary):
    uri, frame = binary
    extra = mlflow.models.make_metric(eval_fn=lambda predictions: 0.0, name="zero", greater_is_better=True)
    for wrong, message in (
        ({"targets": None}, "pass targets='mask'"),
        (
            {"frame": frame.rename(columns={"image": "picture"})},
            "expected a column 'image', found picture, scene, file",
        ),
        ({"frame": np.zeros((2, 3)), "targets": np.zeros(2)}, "expected data as a DataFrame"),
        ({"config": {"spilt": "val"}}, "unknown name 'spilt' .* did you mean 'split'"),
        ({"config": {"group": "scenes"}}, "expected a column 'scenes'"),
        ({"config": {"views": "d5"}}, "unknown views 'd5'"),
        ({"config": {"passes": 2}}, "needs dropout"),
        ({"extra_metrics": [extra]}, "extra_metrics: the evaluator smp_ensemble takes none"),
    ):
        arguments = {"frame": frame, **wrong}
        with pytest.raises(MlflowException, match=message):
            score(uri, **arguments)
    with pytest.raises(MlflowException, match="does not contain the specified targets column 'masks'"):  # MLflow's own
        score(uri, frame, targets="masks")


WRONG = [
    {"split": 1}, {"split": ""}, {"batch_size": 0}, {"batch_size": True}, {"report": "no"}, {"group": 3},
    {"views": None},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"expected {next(iter(wrong))} as"):
        EvaluatorConfig.of(wrong)


def test_masks_of_black_and_white_are_refused(binary):
    uri, frame = binary
    white = [png((np.array(Image.open(io.BytesIO(cell))) > 0).astype(np.uint8) * 255) for cell in frame["mask"]]
    with pytest.raises(MlflowException, match="nothing but 0 and 255.*write 1"):
        score(uri, frame.assign(mask=white))


def test_members_are_not_scored_on_their_training_images(tracking, make_data, make_ensemble, command, caplog):
    folder = make_data("binary")
    digests = load_data(str(folder)).test.image_digests
    uri = log_model(make_ensemble("binary", members=1, trained_on=digests[1:3]))
    message = "was trained on 2 of the 5 test images: its score would mean nothing. Use the split-seed"
    _, _, errors = command("evaluate", "--data", str(folder), "--model", uri)
    assert message in errors[0]
    with pytest.raises(MlflowException, match=f"{uri} {message}") as caught:
        score(uri, read_frame(folder, "binary"))
    assert errors[0] == f"error: {caught.value.message}"

    unknown = log_model(make_ensemble("binary", members=1))
    with caplog.at_level(logging.WARNING, "smp_ensemble"):
        score(unknown, read_frame(folder, "binary"))
    assert f"{unknown} does not say which images it was trained on" in caplog.text


def test_the_example_of_the_documents_runs(tracking, make_data, make_ensemble, capsys):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    log_model(make_ensemble("binary"), registered_model_name="fields")
    tracking.set_registered_model_alias("fields", "champion", "1")
    make_data("binary").rename("fields")
    exec(compile(block, "evaluation.md", "exec"), {})
    score, uri = capsys.readouterr().out.split()
    assert 0 < float(score) < 1
    assert uri.endswith("/report/report.html")


@pytest.mark.filterwarnings("ignore")
def test_models_of_others_are_left_to_others(tracking):
    """With `evaluators=None` MLflow asks everybody that is registered."""
    assert "smp_ensemble" in list_evaluators()
    for model_type in (None, "classifier", "regressor", "question-answering", "text"):
        assert not SegmentationEvaluator.can_evaluate(model_type=model_type, evaluator_config={})
    assert SegmentationEvaluator.can_evaluate(model_type="segmentation", evaluator_config={})
    frame = pd.DataFrame({"x": [0.0, 1.0, 2.0], "y": [0.0, 1.0, 2.5]})

    def predict(features):
        return features["x"]

    config = {"log_model_explainability": False}
    result = mlflow.models.evaluate(predict, frame, targets="y", model_type="regressor", evaluator_config=config)
    assert result.metrics["max_error"] == 0.5
    assert not [name for name in result.metrics if name.startswith("test_")]
    with pytest.raises(MlflowException, match="could not be evaluated by any of the registered evaluators"):
        score(predict, frame, targets="y")


@pytest.mark.filterwarnings("ignore")
def test_ours_is_found_without_being_named(binary):
    uri, frame = binary
    result = score(uri, frame, evaluators=None, config={"smp_ensemble": CHEAP})
    assert result.metrics == score(uri, frame).metrics


@pytest.mark.slow
def test_importing_it_costs_nothing_beyond_mlflow():
    script = """
import sys
import mlflow.models
before = set(sys.modules)
import smp_ensemble.tracking.evaluator
heavy = {"torch", "lightning", "matplotlib", "segmentation_models_pytorch", "albumentations"}
assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
