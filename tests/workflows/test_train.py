"""`train` leaves snapshots, curves and figures; bad input leaves one line and nothing half-written."""

from __future__ import annotations

import re
import shutil
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DATA, SHORT, TINY

from smp_ensemble import load_data, load_model, search_snapshots
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.tracking import names
from smp_ensemble.training.fit import fit
from smp_ensemble.typing import IGNORE_INDEX
from smp_ensemble.workflows.starting import new_network


def kinds(client):
    return sorted(run.data.tags.get(names.KIND, "") for run in client.search_runs(["0"]))


def test_what_a_training_leaves(command, tracking):
    code, values, _ = command("train", *DATA, *TINY, "--epochs", "4", "--cycles", "2", "--run-name", "roofs")
    assert code == 0
    assert [row["epoch"] for row in values["snapshots"]] == [2, 4]
    assert kinds(tracking) == ["snapshot", "snapshot", "training"]
    run = tracking.get_run(values["run_id"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "roofs")
    assert run.data.params["cycles"] == "2"
    assert run.data.params["trainer"] == "snapshot"
    assert run.data.params["env/torch"]
    assert run.data.tags[names.SNAPSHOTS_LINK] == values["link"]
    assert {used.tags[0].value for used in run.inputs.dataset_inputs} == {"training", "validation"}
    history = tracking.get_metric_history(run.info.run_id, "val_iou")
    assert [point.step for point in history] == [4, 8, 12, 16]
    found = {one.path for one in tracking.list_artifacts(run.info.run_id)}
    assert {"curves.png", "learning_rate.png", "overlays"} <= found


def test_the_same_seed_gives_the_same_scores(command):
    rows = [
        [row["val loss"] for row in command("train", *DATA, *TINY, "--epochs", "1", "--cycles", "1")[1]["snapshots"]]
        for _ in range(2)
    ]
    assert rows[0] == rows[1]


def test_torchvisions_fcn_is_trained_and_tracked_as_any_other(command):
    arguments = ("--arch", "fcn", "--model-options", '{"dropout": 0.3}', "--encoder-lr-scale", "0.5")
    code, values, _ = command("train", *DATA, *SHORT, *arguments, "--crop-size", "32", "--epochs", "1", "--cycles", "1")
    assert code == 0
    (row,) = values["snapshots"]
    network = load_model(f"models:/{row['snapshot']}").members[0].network
    assert [one.p for one in network.modules() if isinstance(one, torch.nn.Dropout)] == [0.3]
    assert network(torch.zeros(1, 3, 40, 56)).shape == (1, 1, 40, 56)


def nested(client, run_id, kind):
    found = client.search_runs(
        ["0"],
        f"tags.`{names.PARENT_RUN}` = '{run_id}' and tags.`{names.KIND}` = '{kind}'",
        order_by=["attributes.start_time"],
    )
    return list(found)


def predicted(snapshots, image):
    """The mean of the snapshots' probabilities `(H, W)` of one image."""
    raw = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float()
    with torch.no_grad():
        return torch.stack([snapshot(raw) for snapshot in snapshots]).mean(0)[0, 0].numpy()


def iou(pairs):
    """Pooled over (probabilities, mask) pairs, at threshold 0.5, by plain counting."""
    chosen = np.concatenate([one.ravel() >= 0.5 for one, _ in pairs])
    true = np.concatenate([mask.ravel() == 1 for _, mask in pairs])
    valid = np.concatenate([mask.ravel() != IGNORE_INDEX for _, mask in pairs])
    return (chosen & true & valid).sum() / ((chosen | true) & valid).sum()


@pytest.fixture
def networks_alive(monkeypatch):
    """How many networks of earlier trainings are in memory whenever a training makes its own."""
    made, alive = [], []

    def watched(*arguments):
        alive.append(sum(one() is not None for one in made))
        network = new_network(*arguments)
        made.append(weakref.ref(network))
        return network

    monkeypatch.setattr("smp_ensemble.workflows.training.new_network", watched)
    return alive


@pytest.mark.slow
def test_folds_train_in_turn_and_score_what_they_left_out(command, tracking, networks_alive):
    short = (*DATA, *TINY, "--epochs", "2", "--cycles", "2", "--loss", "lovasz", "--optimizer", "adam", "--lr", "0.01")
    code, values, _ = command("train", *short, "--folds", "2", "--run-name", "roofs")
    assert code == 0
    assert networks_alive == [0, 0]
    plan = tracking.get_run(values["run_id"])
    assert (plan.info.status, plan.info.run_name, plan.data.tags[names.KIND]) == ("FINISHED", "roofs", "plan")
    trainings = nested(tracking, values["run_id"], "training")
    assert [run.info.run_name for run in trainings] == ["roofs-fold-0", "roofs-fold-1"]
    assert [(run.data.params["folds"], run.data.params["fold"]) for run in trainings] == [("2", "0"), ("2", "1")]

    whole = load_data(DATA[1])
    pairs, combined = [], []
    for fold, training in enumerate(values["trainings"]):
        left_out = load_data(DATA[1], folds=2, fold=fold).left_out
        snapshots = [load_model(f"models:/{one}") for one in training["snapshots"]]
        samples = [left_out.read(index) for index in range(len(left_out))]
        of_fold = [(predicted(snapshots, image), mask) for image, mask in samples]
        pairs += of_fold
        combined.append(iou(of_fold))
        assert training["cv"]["cv_iou"] == pytest.approx(combined[-1], abs=1e-6)
        assert tracking.get_run(training["run_id"]).data.metrics["cv_iou"] == pytest.approx(combined[-1], abs=1e-6)
        first = iou([(predicted(snapshots[:1], image), mask) for image, mask in samples])
        model = tracking.get_logged_model(training["snapshots"][0])
        found = {one.key: one for one in model.metrics}
        assert found["cv_iou"].value == pytest.approx(first, abs=1e-6)
        assert found["cv_iou"].dataset_digest == left_out.digest
        assert found["cv_iou"].step == found["val_iou"].step
        assert found["val_iou"].dataset_digest == whole.val.digest
        trained_on = set(whole.train.image_digests) - set(left_out.image_digests)
        assert all(snapshot.members[0].training_images == trained_on for snapshot in snapshots)
    assert 0 < iou(pairs) < 1
    assert values["cv"]["cv_iou"] == pytest.approx(iou(pairs), abs=1e-6)
    assert values["cv"]["cv_iou_mean"] == pytest.approx(np.mean(combined), abs=1e-6)
    assert values["cv"]["cv_iou_std"] == pytest.approx(np.std(combined, ddof=1), abs=1e-6)
    assert plan.data.metrics == pytest.approx(values["cv"])

    ranked = search_snapshots(dataset_digest=whole.val.digest)
    assert {one.model_id for one in ranked} == {row["snapshot"] for row in values["snapshots"]}

    code, alone, _ = command("train", *short, "--folds", "2", "--fold", "1")
    assert code == 0
    second = [row for row in values["snapshots"] if row["snapshot"] in values["trainings"][1]["snapshots"]]
    scores = ("epoch", "step", "val IoU", "val loss", "val ECE", "cv IoU")
    assert [[row[name] for name in scores] for row in alone["snapshots"]] == [
        [row[name] for name in scores] for row in second
    ]
    assert alone["cv"] == values["trainings"][1]["cv"]
    params = [tracking.get_run(run_id).data.params for run_id in (alone["run_id"], values["trainings"][1]["run_id"])]
    assert params[0] == params[1]

    code, scored, _ = command(
        *("evaluate", *DATA, *SHORT, "--model", f"models:/{alone['snapshots'][0]['snapshot']}"),
        *("--split", "left-out", "--folds", "2", "--fold", "1"),
    )
    assert code == 0
    assert scored["metrics"]["iou"] == pytest.approx(alone["snapshots"][0]["cv IoU"])


@pytest.mark.slow
def test_main_ranks_the_snapshots_of_all_bootstrap_samples_under_one_project_run(command, tracking, monkeypatch):
    project = tracking.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", project)
    code, values, _ = command("main", *DATA, *TINY, "--trainer", "single", "--epochs", "1", "--bootstrap", "2")
    assert code == 0
    assert values["training"]["run_id"] == project
    assert tracking.get_run(project).data.tags[names.KIND] == "plan"
    trainings = nested(tracking, project, "training")
    assert [run.info.run_id for run in trainings] == [one["run_id"] for one in values["training"]["trainings"]]
    assert {run.data.params["bootstrap"] for run in trainings} == {"2"}
    (ensemble,) = nested(tracking, project, "ensemble")
    assert ensemble.info.run_id == values["ensemble"]["run_id"]
    snapshots = values["training"]["snapshots"]
    best_first = sorted(snapshots, key=lambda row: -row["val IoU"])
    assert values["ensemble"]["members"] == [f"models:/{row['snapshot']}" for row in best_first]
    for fold, row in enumerate(snapshots):
        drawn = load_data(DATA[1], bootstrap=2, fold=fold).train
        assert load_model(f"models:/{row['snapshot']}").members[0].training_images == set(drawn.image_digests)


@pytest.mark.slow
def test_main_says_which_fold_a_member_left_out_and_what_folds_score(command):
    options = (*TINY, "--trainer", "single", "--epochs", "1", "--folds", "2")
    code, text, _ = command("main", *DATA, *options, values=False)
    assert code == 0
    members = [line.split("  ")[0] for line in text.splitlines() if line.startswith("m-")]
    assert sorted(member[len("m-0123456789 ") :].removesuffix(" best single") for member in members) == [
        "(fold 0, step 2)", "(fold 1, step 2)",
    ]  # fmt: skip
    assert re.search(
        r"^cross-validated IoU: 0\.\d{4} \+- 0\.\d{4} over 2 trainings, 0\.\d{4} over all", text, re.MULTILINE
    )


@pytest.mark.slow
def test_seeds_are_trainings_that_differ_in_the_seed_alone(command, tracking):
    code, values, _ = command("train", *DATA, *TINY, "--trainer", "single", "--epochs", "1", "--seeds", "2")
    assert code == 0
    assert values["cv"] is None
    first, second = nested(tracking, values["run_id"], "training")
    differing = {name for name, value in first.data.params.items() if second.data.params[name] != value}
    assert differing == {"seed"}
    assert [first.data.params["seed"], second.data.params["seed"]] == ["0", "1"]
    assert values["snapshots"][0]["val loss"] != values["snapshots"][1]["val loss"]
    assert [one["training"] for one in values["trainings"]] == ["seed-0", "seed-1"]


def test_a_training_that_fails_fails_the_plan_and_leaves_what_was_finished(command, tracking, monkeypatch):
    started = []

    def fragile(*arguments, **options):
        started.append(options)
        if len(started) == 2:
            raise ConfigError("the second one fails")
        return fit(*arguments, **options)

    monkeypatch.setattr("smp_ensemble.workflows.training.fit", fragile)
    code, _, errors = command("train", *DATA, *TINY, "--trainer", "single", "--epochs", "1", "--seeds", "3")
    assert (code, errors) == (2, ["error: the second one fails"])
    assert len(started) == 2
    (plan,) = tracking.search_runs(["0"], f"tags.`{names.KIND}` = 'plan'")
    assert plan.info.status == "FAILED"
    assert "the second one fails" in plan.data.tags[names.ERROR]
    first, second = nested(tracking, plan.info.run_id, "training")
    assert (first.info.status, second.info.status) == ("FINISHED", "FAILED")
    (snapshot,) = search_snapshots()
    assert tracking.get_run(snapshot.run_id).data.tags[names.PARENT_RUN] == first.info.run_id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer", "snapshto"], "unknown trainer 'snapshto': did you mean 'snapshot'?"),
        (["--trainer", "single", "--cycles", "4"], "trainer 'single' has no option 'cycles'"),
        (["--encoder-name", "resnet19"], "unknown encoder 'resnet19': did you mean"),
        (
            ["--arch", "fcn", "--encoder-name", "resnet19"],
            "unknown encoder 'resnet19' for fcn: did you mean 'resnet18'",
        ),
        (["--model-options", '{"dropout": 2}'], "expected a number above 0 and below 1 for dropout, got 2"),
        (["--arch", "unett"], "unknown arch 'unett': did you mean 'unet'?"),
        (["--model-options", '{"activation": "sigmoid"}'], "this network has 'activation'"),
        (["--model-options", '{"aux_params": {"classes": 2}}'], "this network has 'aux_params'"),
        (["--model-options", "{broken"], "--model-options: expected a JSON object"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--epochs", "2", "--cycles", "3"], "3 cycles do not fit into 2 epochs"),
        (["--epochs", "many"], "--epochs: expected a whole number above 0, got 'many'"),
        (["--zzz", "1"], "train has no option '--zzz'"),
        (["--in-channels", "4"], "in-channels=4, but the images have 3 bands"),
        (["--mode", "binery"], "unknown mode 'binery': did you mean 'binary'?"),
        (["--folds", "3", "--seeds", "2"], "folds=3 and seeds=2: expected one of them; choose one"),
        (["--folds", "3", "--fold", "3"], "fold: expected 0..2 for 3 folds, found 3"),
        (["--fold", "1"], "fold=1 is one of what: pass folds=N or bootstrap=N too"),
        (["--folds", "17"], "17 folds needs at least 17 images, found 16"),
        (["--bootstrap", "3", "--arch", "unett"], "unknown arch 'unett': did you mean 'unet'?"),
        (["--init", "nowhere.pt"], "no checkpoint found at 'nowhere.pt'"),
        (["--init", "models:/m-nothing"], "cannot find the model 'models:/m-nothing'"),
        (["--init", "a.pt", "--encoder-weights", "imagenet"], "init=a.pt brings the encoder's weights too"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, tracking, tmp_path, arguments, message):
    code, _, errors = command("train", *DATA, *arguments)
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert kinds(tracking) == []
    assert not (tmp_path / ".smp_ensemble").exists()


@pytest.mark.parametrize(("option", "value"), [("--loss", "dise"), ("--optimizer", "sdg"), ("--crop-size", "30")])
def test_what_only_training_notices_fails_the_run_with_the_reason(command, tracking, option, value):
    code, _, errors = command("train", *DATA, *TINY, option, value)
    assert code == 2
    (run,) = tracking.search_runs(["0"])
    assert run.info.status == "FAILED"
    assert errors[0].removeprefix("error: ") in run.data.tags[names.ERROR]


@pytest.fixture
def folder(tmp_path):
    """A folder of six images with masks."""
    place = tmp_path / "data"
    for name in ("images", "masks"):
        (place / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / f"images/{index}.png")
        Image.fromarray((generator.random((32, 32)) > 0.5).astype(np.uint8)).save(place / f"masks/{index}.png")
    (place / "classes.json").write_text('{"names": ["background", "roof"], "task": "binary"}')
    return place


def drop_mask(place):
    (place / "masks/3.png").unlink()


def shrink_mask(place):
    Image.fromarray(np.zeros((16, 32), np.uint8)).save(place / "masks/3.png")


def odd_class(place):
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(place / "masks/3.png")


def break_image(place):
    path = place / "images/3.png"
    path.write_bytes(path.read_bytes()[:-200])


def drop_folder(place):
    shutil.rmtree(place / "masks")


def long_run(place):
    (place / "train_mask.csv").write_text("name,mask\n" + "".join(f"{index}.png,1000 100\n" for index in range(6)))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (drop_mask, ["3", "mask"]),
        (shrink_mask, ["3.png", "16", "32"]),
        (odd_class, ["3.png", "7"]),
        (break_image, ["3.png", "cannot read"]),
        (drop_folder, ["masks"]),
        (long_run, ["1024", "1000"]),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing(command, tracking, folder, harm, words):
    harm(folder)
    data = folder / "train_mask.csv" if harm is long_run else folder
    code, _, errors = command("train", "--data", str(data), *TINY)
    assert code == 2
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert kinds(tracking) == []
