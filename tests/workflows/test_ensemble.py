"""`ensemble`, `main`, `evaluate`, `predict`, `snapshots` and `import` on what a training left."""

from __future__ import annotations

import csv

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DATA, NETWORK, SHORT, TINY

from smp_ensemble import build_ensemble, load_data, load_model, search_snapshots
from smp_ensemble.data import rle
from smp_ensemble.inference.engine import Engine
from smp_ensemble.metrics.confusion import SegmentationScores
from smp_ensemble.tracking import names
from smp_ensemble.typing import Snapshot
from smp_ensemble.workflows.ensemble_result import labels_of


@pytest.fixture
def trained(command):
    """Two snapshots, tracked."""
    _, values, _ = command("train", *DATA, *TINY, "--epochs", "2", "--cycles", "2")
    return values


def pooled_iou(ensemble, data, threshold):
    """IoU over a data set, image by image, apart from the workflow's own scoring."""
    scores = SegmentationScores(data.task, threshold)
    for index in range(len(data)):
        image, mask = data.read(index)
        with torch.no_grad():
            probabilities = ensemble(torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float())
        scores.update(probabilities, torch.from_numpy(mask.astype("int64"))[None])
    return float(scores.compute()["iou"])


@pytest.mark.figures
def test_the_ensemble_is_the_mean_of_its_members_and_says_what_it_scored(command, trained, tracking):
    code, values, _ = command("ensemble", *DATA, *SHORT, "--register-as", "roofs", "--alias", "champion")
    assert code == 0
    assert sorted(values["members"]) == sorted(f"models:/{row['snapshot']}" for row in trained["snapshots"])
    assert values["load"] == "models:/roofs@champion"

    ensemble = load_model(values["load"])
    raw = torch.rand(2, 3, 32, 32) * 255
    with torch.no_grad():
        members = [load_model(uri)(raw) for uri in values["members"]]
        mean = torch.stack(members).mean(0)
        assert torch.allclose(ensemble(raw), torch.sigmoid(torch.logit(mean) / values["temperature"]), atol=1e-5)

    splits = load_data(DATA[1])
    threshold = values["thresholds"][-1]
    assert ensemble.threshold == threshold
    for split, name in ((splits.val, "val"), (splits.test, "test")):
        assert values[name][-1]["iou"] == pytest.approx(pooled_iou(ensemble, split, threshold), abs=1e-6)
    best = max(range(2), key=lambda index: values["val"][index]["iou"])
    assert values["best_member"] == values["members"][best]

    run = tracking.get_run(values["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags[names.KIND] == "ensemble"
    assert run.data.metrics["test_iou"] == pytest.approx(values["test"][-1]["iou"])
    assert run.data.metrics["best_member_test_iou"] == pytest.approx(values["test"][best]["iou"])
    assert "overlays.png" in {one.path for one in tracking.list_artifacts(values["run_id"])}
    kept = {one.path for one in tracking.list_artifacts(values["run_id"], "report")}
    assert {"report/report.html", "report/report.json", "report/scores.png", "report/diversity.png"} <= kept
    model = tracking.get_logged_model(values["uri"].removeprefix("models:/"))
    linked = {(metric.key, metric.dataset_digest) for metric in model.metrics}
    assert ("val_iou", splits.val.digest) in linked
    assert ("test_iou", splits.test.digest) in linked
    assert str(tracking.get_model_version_by_alias("roofs", "champion").version) == "1"


def test_labels_say_what_tells_members_apart():
    def member(number: int, **params: str) -> Snapshot:
        return Snapshot(f"models:/m-{number:010d}", "", 10 * number, params={"seed": "0", "trainer": "fge", **params})

    assert labels_of([member(1), member(2)]) == ["m-0000000001 (step 10)", "m-0000000002 (step 20)"]
    found = labels_of([member(1, arch="unet", fold="0"), member(2, arch="fpn", fold="1")])
    assert found == ["m-0000000001 (unet, fold 0, step 10)", "m-0000000002 (fpn, fold 1, step 20)"]
    (first, _) = labels_of([member(1, fold="0", bootstrap="3", trainer="swa"), member(2, seed="7")])
    assert first == "m-0000000001 (swa, bootstrap 0, seed 0, step 10)"


def test_selectors_and_weights(command, trained):
    _, last, _ = command("ensemble", *DATA, *SHORT, "--selector", "last", "--max-members", "1")
    steps = {f"models:/{row['snapshot']}": row["step"] for row in trained["snapshots"]}
    assert [steps[uri] for uri in last["members"]] == [max(steps.values())]
    _, weighted, _ = command("ensemble", *DATA, *SHORT, "--weights", "3,1")
    assert weighted["weights"] == [3.0, 1.0]
    code, _, errors = command("ensemble", *DATA, *SHORT, "--weights", "3,1,2")
    assert code == 2
    assert "expected one weight for each of 2 members, got 3" in errors[0]


def test_a_member_trained_on_the_test_images_is_refused(command, trained, tracking):
    before = len(tracking.search_runs(["0"]))
    code, _, errors = command(
        "ensemble", *DATA, *SHORT, "--split-seed", "1", "--pick", trained["snapshots"][0]["snapshot"]
    )
    assert code == 2
    assert len(errors) == 1
    assert "was trained on" in errors[0]
    assert "images: its score would mean nothing" in errors[0]
    assert len(tracking.search_runs(["0"])) == before


def test_an_empty_query_says_what_was_searched(command, trained):
    code, _, errors = command("ensemble", *DATA, "--where", "metrics.val_iou > 2")
    assert code == 2
    assert 'where="metrics.val_iou > 2"' in errors[0]
    assert "holds 2 snapshots" in errors[0]


def test_members_for_other_classes_are_refused(command, trained):
    picked = trained["snapshots"][0]["snapshot"]
    code, _, errors = command("ensemble", *DATA, "--mode", "multiclass", "--pick", picked)
    assert code == 2
    assert "has mode binary, the data has multiclass" in errors[0]


@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
def test_the_whole_way_in_other_modes(command, mode):
    code, values, _ = command("main", *DATA, *TINY, "--mode", mode, "--epochs", "2", "--cycles", "2")
    assert code == 0
    found = values["ensemble"]
    task = load_data(DATA[1], mode=mode).task
    model = mlflow.pyfunc.load_model(found["load"])
    mask = model.predict(np.zeros((1, 20, 28, 3), np.uint8))
    assert mask.shape == ((1, 20, 28) if mode == "multiclass" else (1, task.num_outputs, 20, 28))
    assert 0 <= found["test"][-1]["iou"] <= 1


def test_main_under_mlflow_run_nests_the_ensemble(command, tracking, monkeypatch):
    project = tracking.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", project)
    code, values, _ = command("main", *DATA, *TINY, "--epochs", "2", "--cycles", "2")
    assert code == 0
    assert values["training"]["run_id"] == project
    tags = tracking.get_run(values["ensemble"]["run_id"]).data.tags
    assert tags[names.PARENT_RUN] == project


def test_an_early_error_under_mlflow_run_fails_its_run(command, tracking, monkeypatch):
    project = tracking.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", project)
    code, _, errors = command("main", "--zzz", "1")
    assert code == 2
    run = tracking.get_run(project)
    assert run.info.status == "FAILED"
    assert f"error: {run.data.tags[names.ERROR]}" == errors[0]


def test_evaluate_gives_the_ensembles_own_numbers(command, trained, tracking):
    _, built, _ = command("ensemble", *DATA, *SHORT)
    code, values, _ = command("evaluate", *DATA, *SHORT, "--model", built["uri"], "--split", "test")
    assert code == 0
    assert values["metrics"] == pytest.approx(built["test"][-1])
    assert tracking.get_run(values["run_id"]).data.metrics["test_iou"] == pytest.approx(values["metrics"]["iou"])
    code, _, errors = command("evaluate", *DATA, *SHORT, "--model", built["uri"], "--split", "train")
    assert code == 2
    assert "was trained on" in errors[0]


def test_predict_writes_what_pyfunc_answers_and_lists_broken_images(command, trained, tmp_path):
    uri = f"models:/{trained['snapshots'][-1]['snapshot']}"
    splits = load_data(DATA[1])
    place = tmp_path / "photos"
    place.mkdir()
    images = [splits.test.read(index)[0] for index in range(2)]
    for index, image in enumerate(images):
        Image.fromarray(image).save(place / f"{index}.png")
    (place / "broken.png").write_bytes(b"not an image")
    expected = mlflow.pyfunc.load_model(uri).predict(images)

    code, values, _ = command("predict", "--model", uri, "--input", str(place), "--output", "masks")
    assert code == 0
    assert values["count"] == 2
    assert list(values["errors"]) == ["broken.png"]
    for index in range(2):
        assert np.array_equal(np.array(Image.open(tmp_path / f"masks/{index}.png")), expected[index])
    with (tmp_path / "masks/errors.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["broken.png"]

    command("predict", "--model", uri, "--input", str(place / "*.png"), "--output", "out.csv", "--kind", "rle")
    with (tmp_path / "out.csv").open() as file:
        rows = {row["name"]: row["mask"] for row in csv.DictReader(file)}
    for index in range(2):
        assert np.array_equal(rle.decode(rows[f"{index}.png"], 64, 64), expected[index])

    code, _, errors = command("predict", "--model", uri, "--input", str(place), "--kind", "maks")
    assert code == 2
    assert "did you mean 'mask'" in errors[0]
    code, _, errors = command("predict", "--model", uri, "--input", "nowhere")
    assert code == 2
    assert "no images found at 'nowhere'" in errors[0]


def test_snapshots_lists_the_best_first_with_the_link(command, trained):
    code, values, _ = command("snapshots", "--limit", "1")
    assert code == 0
    best = max(trained["snapshots"], key=lambda row: row["val IoU"])
    assert [row["snapshot"] for row in values["snapshots"]] == [best["snapshot"]]
    assert values["link"] == trained["link"]
    code, text, _ = command("snapshots", values=False)
    assert best["snapshot"] in text
    assert "add the tag ensemble=NAME" in text


@pytest.mark.parametrize("form", ["state.pt", "lightning.ckpt", "weights.safetensors", "folder"])
def test_checkpoints_that_exist_become_snapshots(command, tracking, tmp_path, make_tiny_network, form):
    from safetensors.torch import save_file

    network = make_tiny_network(seed=3)
    path = tmp_path / form
    if form == "folder":
        network.save_pretrained(path)
    elif form == "weights.safetensors":
        save_file(network.state_dict(), path)
    elif form == "lightning.ckpt":
        torch.save({"state_dict": {f"net.{name}": one for name, one in network.state_dict().items()}, "epoch": 3}, path)
    else:
        torch.save(network.state_dict(), path)
    code, values, _ = command("import", "--files", str(path), *DATA, *SHORT, *NETWORK)
    assert code == 0
    (row,) = values["snapshots"]
    loaded = load_model(f"models:/{row['snapshot']}")
    assert all(
        torch.equal(one, network.state_dict()[name]) for name, one in loaded.members[0].network.state_dict().items()
    )
    assert row["val IoU"] == pytest.approx(pooled_iou(loaded, load_data(DATA[1]).val, 0.5), abs=1e-6)


def test_checkpoints_that_do_not_fit_are_refused_before_anything_is_tracked(
    command, tracking, tmp_path, make_tiny_network
):
    torch.save(make_tiny_network(num_outputs=4).state_dict(), tmp_path / "four.pt")
    code, _, errors = command("import", "--files", str(tmp_path / "four.pt"), *DATA, *NETWORK)
    assert code == 2
    assert "tensor 'segmentation_head.0.weight' has shape (4, 8, 3, 3), the network expects (1, 8, 3, 3)" in errors[0]
    torch.save(make_tiny_network(), tmp_path / "whole.pt")  # a pickled module, not weights
    code, _, errors = command("import", "--files", str(tmp_path / "whole.pt"), *DATA, *NETWORK)
    assert code == 2
    assert "without executing code that it holds" in errors[0]
    code, _, errors = command("import", "--files", "no*.pt", *DATA)
    assert code == 2
    assert "no checkpoint found at 'no*.pt'" in errors[0]
    assert not tracking.search_runs(["0"])


def test_the_python_way_equals_the_command(command, trained):
    splits = load_data(DATA[1])
    ensemble = build_ensemble(search_snapshots(), data=splits, precision="32")
    _, values, _ = command("ensemble", *DATA, *SHORT)
    assert ensemble.threshold == values["thresholds"][-1]
    image = splits.test.read(0)[0]
    expected = mlflow.pyfunc.load_model(values["uri"]).predict(image[None])[0]
    (probabilities,) = Engine(ensemble).predict([image])
    assert np.array_equal((probabilities[0] >= np.float32(ensemble.threshold)).astype(np.uint8), expected)


def test_an_ensemble_is_no_member_but_its_members_are(command, trained):
    _, built, _ = command("ensemble", *DATA, *SHORT, "--register-as", "roofs")
    code, _, errors = command("ensemble", *DATA, *SHORT, "--pick", built["uri"])
    assert code == 2
    assert "is an ensemble of 2, expected one snapshot: pick its members by id" in errors[0]
    code, again, _ = command("ensemble", *DATA, *SHORT, "--pick", "roofs")
    assert code == 0
    assert again["members"] == built["members"]
    assert again["test"] == built["test"]
