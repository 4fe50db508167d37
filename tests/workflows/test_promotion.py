"""Promotion: an alias moves to a better version only, and whatever happens is said with numbers."""

from __future__ import annotations

import math
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NETWORK, OPTIONS, SHORT

from smp_ensemble import load_data, load_model
from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.metrics.bootstrap import paired_difference
from smp_ensemble.metrics.confusion import confusion_counts
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import register
from smp_ensemble.tracking.runs import tracked_run
from smp_ensemble.tracking.versions import move_alias, version_with
from smp_ensemble.workflows.options import EnsembleOptions
from smp_ensemble.workflows.promotion import Promotion, carry_out, rule_of
from smp_ensemble.workflows.verdict import Verdict

HOLDOUT = "0.25,0.5"
CHAMPION = ("--register-as", "roofs", "--alias", "champion")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """24 images of one bright rectangle each, and two networks: one that found them, and one that was never trained."""
    place = tmp_path_factory.mktemp("promotion")
    for name in ("data/images", "data/masks"):
        (place / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(24):
        mask = np.zeros((32, 32), np.uint8)
        (top, left), (height, width) = random.integers(2, 14, 2), random.integers(8, 16, 2)
        mask[top : top + height, left : left + width] = 1
        image = np.where(mask, 190, 60)[..., None] + random.normal(0, 15, (32, 32, 3))
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(place / f"data/images/{index:02d}.png")
        Image.fromarray(mask).save(place / f"data/masks/{index:02d}.png")
    train = load_data(str(place / "data"), holdout=HOLDOUT).train
    pairs = [train.read(index) for index in range(len(train))]
    images = imagenet()(torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image, _ in pairs])).float())
    masks = torch.from_numpy(np.stack([mask for _, mask in pairs])).float()
    torch.manual_seed(0)
    network = create_network("unet", num_outputs=1, model_options=OPTIONS)
    torch.save(network.state_dict(), place / "weak.pt")
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(network(images)[:, 0], masks).backward()
        optimizer.step()
    torch.save(network.state_dict(), place / "strong.pt")
    return place


@pytest.fixture
def data(material):
    return ("--data", str(material / "data"), "--holdout", HOLDOUT)


@pytest.fixture
def snapshot(command, material, data):
    """Tracks `weak` or `strong`, and gives the model id."""

    def run(name: str, *more: str) -> str:
        _, values, _ = command(
            "import", "--files", str(material / f"{name}.pt"), *data, *SHORT, *NETWORK, "--trained-on", "train", *more
        )
        return values["snapshots"][0]["snapshot"]

    return run


@pytest.fixture
def build(command, data):
    def run(pick: str, *more: str):
        return command("ensemble", *data, *SHORT, "--pick", pick, *more)

    return run


def counts_of(uri, data):
    """True positives, false positives and false negatives of each image, image by image."""
    engine = Engine(load_model(uri), torch.device("cpu"), "32")
    found = []
    for index in range(len(data)):
        image, mask = data.read(index)
        (probabilities,) = engine.predict([image])
        predicted = torch.from_numpy((probabilities >= np.float32(engine.ensemble.threshold)).astype("int64"))
        counts = confusion_counts(predicted, torch.from_numpy(mask.astype("int64"))[None], "binary", 1)
        found.append(np.stack([part.numpy() for part in counts[:3]], axis=1))
    return np.stack(found)


def test_first_then_better_then_no_better(build, snapshot, tracking, material):
    weak, strong = snapshot("weak"), snapshot("strong")
    code, first, _ = build(weak, *CHAMPION)
    assert code == 0
    assert first["load"] == "models:/roofs@champion"
    assert first["promotion"] == {
        "alias": "champion", "promoted": True, "reason": "no version had it before", "champion": None,
        "test_data": None,
    }  # fmt: skip

    code, better, _ = build(strong, *CHAMPION)
    assert code == 0
    assert (better["registered"], better["load"]) == ("roofs/2", "models:/roofs@champion")
    test = load_data(str(material / "data"), holdout=HOLDOUT).test
    new, old = counts_of("models:/roofs/2", test), counts_of("models:/roofs/1", test)
    expected = paired_difference(new, old)
    found = better["promotion"]
    assert found["promoted"]
    assert found["champion"] == "roofs/1"
    assert found["test_data"] == test.digest
    assert found["champion_test_iou"] == pytest.approx(old[:, :, 0].sum() / old.sum(), abs=1e-4)
    for key, value in (("", expected.estimate), ("_low", expected.low), ("_high", expected.high)):
        assert found[f"champion_difference{key}"] == pytest.approx(value, abs=1e-4)
    assert found["champion_difference_p"] == expected.p_value == pytest.approx(2 / 1001)
    assert version_with("roofs", "champion") == "2"
    run = tracking.get_run(better["run_id"]).data
    assert run.metrics["champion_difference_low"] == found["champion_difference_low"]
    assert run.tags[names.CHAMPION] == "roofs/1"
    version = tracking.get_model_version("roofs", "2")
    assert version.tags[names.CHAMPION] == "roofs/1"
    assert version.description.startswith(f"champion: IoU {found['champion_difference']:+.4f} against the champion")
    assert f"models/{strong})" in version.description

    code, text, _ = build(strong, *CHAMPION, "--json")  # the same snapshot once more
    again = tracking.get_model_version_by_alias("roofs", "challenger")
    assert (code, again.version) == (0, "3" if isinstance(again.version, str) else 3)
    assert version_with("roofs", "champion") == "2"
    assert text["promotion"]["champion_difference"] == text["promotion"]["champion_difference_high"] == 0
    assert text["promotion"]["champion_difference_p"] == 1
    assert text["load"] == "models:/roofs@challenger"
    assert "champion stays with version 2, this version is challenger: IoU +0.0000" in again.description
    assert tracking.get_run(tracking.get_logged_model(strong).source_run_id).data.tags[names.USED_BY] == (
        "roofs/2,roofs/3"
    )


def test_the_table_shows_the_champion_and_the_notes_say_why(command, build, snapshot, data):
    strong, weak = snapshot("strong"), snapshot("weak")
    build(strong, *CHAMPION)
    code, text, _ = command("ensemble", *data, *SHORT, "--pick", weak, *CHAMPION, values=False)
    assert code == 0
    row = next(line for line in text.splitlines() if line.startswith("champion roofs/1 "))
    assert row.split()[2] == "-"
    assert "champion stays with version 1, this version is challenger: IoU -0." in text
    assert "models:/roofs@challenger" in text


def test_what_is_rejected_is_no_gain(build, snapshot, tracking):
    weak = snapshot("weak")
    build(weak, *CHAMPION)
    _, values, _ = build(weak, *CHAMPION, "--reject", "0.55")
    assert values["test"][-1]["coverage"] < 1
    assert values["promotion"]["champion_difference"] == pytest.approx(0, abs=1e-9)
    assert not values["promotion"]["promoted"]


def test_another_task_is_refused_before_anything_is_measured(command, build, snapshot, tracking, data):
    strong = snapshot("strong")
    build(strong, *CHAMPION)
    before = len(tracking.search_runs(["0"]))
    for name in ("ensemble", "main"):
        code, _, errors = command(name, *data, *SHORT, *CHAMPION, "--mode", "multiclass")
        assert code == 2
        assert "models:/roofs@champion has mode binary, the data has multiclass" in errors[0]
    runs = tracking.search_runs(["0"])
    assert len([run for run in runs if run.data.tags[names.KIND] == "ensemble"]) == 1
    assert len(runs) <= before + 1  # a training's run, which failed


def test_a_champion_that_knows_the_test_images_is_not_compared(build, snapshot, tracking):
    strong = snapshot("strong")
    build(strong, *CHAMPION)
    unknown = snapshot("weak", "--trained-on", "unknown")
    code, values, _ = build(unknown, *CHAMPION, "--split-seed", "1")
    assert code == 0
    assert "version 1 cannot be compared: " in values["promotion"]["reason"]
    assert "was trained on" in values["promotion"]["reason"]
    assert values["promotion"]["alias"] == "challenger"
    assert version_with("roofs", "champion") == "1"
    code, forced, _ = build(unknown, *CHAMPION, "--split-seed", "1", "--promote", "always")
    assert (code, forced["promotion"]["promoted"]) == (0, True)
    assert version_with("roofs", "champion") == "3"


def test_without_test_data_the_alias_stays(command, build, snapshot, data):
    strong = snapshot("strong")
    build(strong, *CHAMPION, "--holdout", "0.25,0")
    assert version_with("roofs", "champion") == "1"  # nothing to beat
    code, values, _ = build(strong, *CHAMPION, "--holdout", "0.25,0")
    assert code == 0
    assert values["promotion"]["reason"] == "there is no test data to compare them on"
    assert version_with("roofs", "champion") == "1"
    assert version_with("roofs", "challenger") == "2"


def test_any_alias_is_kept_so_and_a_broken_champion_too(build, snapshot, tracking):
    strong = snapshot("strong")
    _, first, _ = build(strong, "--register-as", "roofs", "--alias", "challenger")
    assert version_with("roofs", "challenger") == "1"
    _, second, _ = build(strong, "--register-as", "roofs", "--alias", "challenger")
    assert second["promotion"]["alias"] is None
    assert second["load"] == "models:/roofs/2"
    assert version_with("roofs", "challenger") == "1"
    location = tracking.get_logged_model(first["uri"].removeprefix("models:/")).artifact_location
    path = Path(mlflow.artifacts.download_artifacts(location)) / "members/00/model.safetensors"
    path.write_bytes(path.read_bytes() + b"\x01")
    code, third, _ = build(strong, "--register-as", "roofs", "--alias", "challenger")
    assert code == 0
    assert "version 1 cannot be compared: " in third["promotion"]["reason"]
    assert "expected SHA-256" in third["promotion"]["reason"]
    assert load_model("models:/roofs/3")


def test_an_alias_that_was_moved_meanwhile_stays_there(tracking, snapshot):
    strong = snapshot("strong")
    uri = f"models:/{strong}"
    for _ in range(3):
        register(uri, "roofs")
    tracking.set_registered_model_alias("roofs", "champion", "2")
    decided = Promotion("roofs", "champion", Verdict(True, "better"), version="1")
    with tracked_run(names.ENSEMBLE) as run:
        done = carry_out(decided, run, "3", "the members")
    assert not done.verdict.promote
    assert version_with("roofs", "champion") == "2"
    assert version_with("roofs", "challenger") == "3"
    sentence = (
        "champion stays with version 2, this version is challenger: since the comparison, champion was moved from "
        "version 1 to 2"
    )
    assert tracking.get_model_version("roofs", "3").description == f"{sentence}\n\nthe members"
    assert tracking.get_run(run.run_id).data.tags[names.PROMOTION] == sentence
    assert not move_alias("roofs", "champion", "3", expected=None)
    assert move_alias("roofs", "champion", "3", expected="2")


def test_rules_out_of_range_are_refused(command):
    for changes, message in (
        ({"promote": "alwys"}, "unknown promote 'alwys': did you mean 'always'"),
        ({"min_gain": 2.0}, "expected min-gain as a difference of IoU between -1 and 1, got 2.0"),
        ({"min_gain": math.nan}, "expected min-gain"),
        ({"confidence": 95.0}, "expected confidence between 0.5 and 0.999, got 95.0"),
        ({"alias": "champion"}, "alias=champion needs a registered model"),
    ):
        with pytest.raises(ConfigError, match=message):
            rule_of(EnsembleOptions(**changes))
    code, _, errors = command("main", "--promote", "never")
    assert code == 2
    assert "unknown promote 'never'" in errors[0]


def test_evaluate_and_pick_say_what_became_of_members(command, build, snapshot, tracking, data):
    strong, weak = snapshot("strong"), snapshot("weak")
    _, built, _ = build(f"{strong},{weak}", "--register-as", "roofs")
    run = tracking.get_run(built["run_id"])
    assert {one.model_id for one in run.inputs.model_inputs} >= {strong, weak}
    assert f"models/{weak})" in run.data.tags[names.NOTE]
    evaluate = ("evaluate", *data, *SHORT, "--model", "models:/roofs/1")
    _, before, _ = command(*evaluate)
    assert before["lineage"] == []
    tracking.delete_logged_model(weak)
    code, after, _ = command(*evaluate)
    assert (code, after["metrics"]) == (0, before["metrics"])
    (problem,) = after["lineage"]
    assert problem.startswith(f"models:/{weak}: deleted: ")
    _, text, _ = command(*evaluate, values=False)
    assert f"note: {problem}" in text
    code, _, errors = build("roofs")
    assert code == 2
    assert f"snapshots that 'roofs' was made of are gone (models:/{weak}: deleted: " in errors[0]
