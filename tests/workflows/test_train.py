"""`train` leaves snapshots, curves and figures; bad input leaves one line and nothing half-written."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import DATA, TINY

from smp_ensemble.tracking import names


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer", "snapshto"], "unknown trainer 'snapshto': did you mean 'snapshot'?"),
        (["--trainer", "single", "--cycles", "4"], "trainer 'single' has no option 'cycles'"),
        (["--encoder-name", "resnet19"], "unknown encoder 'resnet19': did you mean"),
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
