"""The contest project, run in-process on a tiny contest: what it writes is what the registered model predicts."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from smp_ensemble import load_data
from smp_ensemble.data import rle

SIZE = 64
SPLITS = {"train": 10, "val": 3, "test": 3}
SCRIPT = Path(__file__).parents[2] / "mlflow_projects" / "aerial_buildings" / "aerial_buildings.py"


@pytest.fixture
def project():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("aerial_buildings", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def contest(tmp_path):
    """Synthetic scenes in contest form: images/, and a list of run lengths for each split."""
    scenes = load_data(f"synthetic:count={sum(SPLITS.values()) + 8},size={SIZE}").train
    folder = tmp_path / "contest"
    (folder / "images").mkdir(parents=True)
    place = 0
    for split, count in SPLITS.items():
        rows = []
        for index in range(place, place + count):
            image, mask = scenes.read(index)
            Image.fromarray(image).save(folder / "images" / f"scene_{index}.png")
            rows.append((f"scene_{index}.png", rle.encode(mask)))
        with (folder / f"{split}_mask.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("name", "mask"), *rows])
        place += count
    return folder


@pytest.fixture(autouse=True)
def tracking(tmp_path, monkeypatch):
    """A tracking store of the test's own; and MLflow puts the code of each model it loads on `sys.path`."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    uri = f"sqlite:///{(tmp_path / 'mlflow.db').as_posix()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield
    mlflow.set_tracking_uri(before)


def options_for(contest, **options):
    values = {"data": contest / "train_mask.csv", "crop-size": 32, "batch-size": 4, "epochs": 2, "cycles": 2, **options}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def the_run():
    [run] = mlflow.search_runs(
        search_all_experiments=True, filter_string="tags.mlflow.parentRunId IS NULL", output_format="list"
    )
    return run


def read_submission(text):
    rows = list(csv.reader(text.splitlines()))
    assert rows[0] == ["name", "mask"]
    return {name: rle.decode(runs, SIZE, SIZE) for name, runs in rows[1:]}


def test_the_submission_holds_the_registered_models_masks(project, contest, tmp_path, capsys):
    """Rows are the test list's names; their run lengths decode to what the model predicts from arrays."""
    project.main(options_for(contest, output=tmp_path / "copy.csv", **{"register-as": "buildings"}))
    run = the_run()
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/submission.csv")
    submission = read_submission(text)
    listed = [line.partition(",")[0] for line in (contest / "test_mask.csv").read_text().splitlines()[1:]]
    assert list(submission) == listed
    assert read_submission((tmp_path / "copy.csv").read_text()).keys() == submission.keys()

    images = np.stack([np.asarray(Image.open(contest / "images" / name)) for name in listed])
    masks = mlflow.pyfunc.load_model("models:/buildings/1").predict(images)
    assert np.array_equal(np.stack(list(submission.values())), masks)

    assert run.info.status == "FINISHED"
    scores = {f"{split}_iou_{model}" for split in ("val", "test") for model in ("best_snapshot", "ensemble")}
    assert scores <= run.data.metrics.keys()
    assert f"test IoU ensemble: {run.data.metrics['test_iou_ensemble']:.4f}" in capsys.readouterr().out


def test_the_score_is_the_iou_of_the_submission_against_the_contests_list(project, contest):
    """`test_iou_ensemble` can be computed from the two lists alone, as the contest's referee does."""
    project.main(options_for(contest, epochs=1, cycles=1))
    run = the_run()
    submission = read_submission(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/submission.csv"))
    truth = read_submission((contest / "test_mask.csv").read_text())
    ours, theirs = (np.stack([masks[name] for name in truth]) for masks in (submission, truth))
    union = np.count_nonzero(ours | theirs)
    assert run.data.metrics["test_iou_ensemble"] == pytest.approx(np.count_nonzero(ours & theirs) / union, abs=1e-12)


def test_a_folder_of_images_replaces_the_test_split(project, contest, tmp_path):
    """With `images`, every image of that folder is predicted, and nothing else in it."""
    folder = tmp_path / "unseen"
    folder.mkdir()
    Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(folder / "b.png")
    Image.fromarray(np.full((SIZE, SIZE, 3), 200, np.uint8)).save(folder / "a.png")
    (folder / "notes.txt").write_text("not an image")
    project.main(options_for(contest, epochs=1, cycles=1, images=folder))
    text = mlflow.artifacts.load_text(f"{the_run().info.artifact_uri}/submission.csv")
    assert list(read_submission(text)) == ["a.png", "b.png"]


def test_a_failure_ends_the_run_as_failed(project, contest):
    """An image that is listed and missing: the error names it, and MLflow shows the run as FAILED."""
    (contest / "images" / "scene_0.png").unlink()
    with pytest.raises(ValueError, match=r"scene_0\.png"):
        project.main(options_for(contest))
    assert the_run().info.status == "FAILED"
