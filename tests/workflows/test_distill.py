"""`distill`: one student, tracked as any snapshot, that says where it comes from and what it kept."""

from __future__ import annotations

import shutil

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DATA, OPTIONS, SHORT

from smp_ensemble import load_data, load_model, search_snapshots
from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.engine import Engine
from smp_ensemble.metrics.confusion import SegmentationScores
from smp_ensemble.tracking.flavor import log_model, register

STUDENT = ("--crop-size", "32", *SHORT, "--epochs", "1")
SEEN = ("a" * 32, "b" * 32)


@pytest.fixture
def splits():
    return load_data(DATA[1])


@pytest.fixture
def make_teacher(tracking, splits):
    """Logs an ensemble of two untrained networks, the second with the better score or not; gives its address."""

    def make(*, images=SEEN, views="none", reject=None, name=None):
        members = []
        for index in range(2):
            torch.manual_seed(index)
            network = create_network("unet", num_outputs=splits.task.num_outputs, model_options=OPTIONS)
            members.append(Member(network, imagenet(), training_images=images))
        ensemble = Ensemble(
            members, mode="binary", views=views, class_names=splits.task.class_names, reject=reject, temperature=1.3
        )
        uri = log_model(ensemble)
        if name is not None:
            register(uri, name, "champion")
        return uri

    return make


def pooled_iou(ensemble, data):
    """At the ensemble's own threshold."""
    scores = SegmentationScores(data.task, ensemble.threshold)
    engine = Engine(ensemble, "cpu", "32")
    for index in range(len(data)):
        image, mask = data.read(index)
        (found,) = engine.predict([image])
        scores.update(torch.from_numpy(found)[None], torch.from_numpy(mask.astype("int64"))[None])
    return float(scores.compute()["iou"])


def test_a_student_is_tracked_and_compared(command, tracking, make_teacher, splits):
    uri = make_teacher(views="flips", name="roofs")
    code, values, errors = command(
        "distill", "--model", "models:/roofs@champion", *DATA, *STUDENT, "--alpha", "0.3", "--soften", "2"
    )
    assert (code, errors) == (0, [])
    assert values["teacher"] == uri  # the exact model, not the alias
    assert values["passes"] == {"teacher": 8, "best member": 4, "student": 1}
    assert values["time_ratio"] > 1
    assert values["val"]["teacher"]["iou"] == pytest.approx(pooled_iou(load_model(uri), splits.val))
    for split in ("val", "test"):
        found = values[split]
        assert found["accuracy_kept"] == pytest.approx(found["student"]["iou"] / found["teacher"]["iou"])

    run = tracking.get_run(values["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["distilled_from"] == uri
    assert (run.data.params["alpha"], run.data.params["soften"], run.data.params["trainer"]) == ("0.3", "2.0", "single")
    assert run.data.params["teacher_views"] == "flips"
    assert "'encoder_depth': 3" in run.data.params["model_options"]  # the first member's
    assert [one.model_id for one in run.inputs.model_inputs] == [uri.removeprefix("models:/")]
    assert run.data.metrics["student_test_iou"] == pytest.approx(values["test"]["student"]["iou"])
    assert run.data.metrics["teacher_passes"] == 8
    kept = mlflow.artifacts.load_dict(f"runs:/{values['run_id']}/distillation.json")
    assert kept["test"] == values["test"]

    (snapshot,) = search_snapshots(f"params.distilled_from = '{uri}'")
    assert snapshot.uri == values["student"]
    (member,) = load_model(snapshot.uri).members
    assert member.training_images == {*splits.train.image_digests, *SEEN}
    code, built, _ = command("ensemble", *DATA, *SHORT, "--pick", snapshot.model_id)
    assert code == 0
    assert built["test"][-1]["iou"] == pytest.approx(values["test"]["student"]["iou"])


def test_unlabelled_images_join_and_those_that_are_scored_are_refused(
    command, tracking, make_teacher, splits, tmp_path
):
    uri = make_teacher()
    more = tmp_path / "more"
    more.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(more / f"{index}.png")
    shutil.copy(more / "0.png", more / "again.png")
    arguments = ("distill", "--model", uri, *DATA, *STUDENT, "--unlabelled", str(more))
    code, values, _ = command(*arguments)
    assert code == 0
    assert values["images"] == {"with masks": len(splits.train), "without": 3}
    (member,) = load_model(values["student"]).members
    assert len(member.training_images) == len(splits.train) + 3 + len(SEEN)

    code, _, (error,) = command(*arguments, "--alpha", "1")
    assert code == 2
    assert "alpha=1 learns from masks alone" in error
    code, _, (error,) = command(*arguments, "--trainer", "boost", "--cycles", "1")
    assert code == 2
    assert "trainer=boost draws images by the loss on their masks" in error


def test_a_student_may_start_from_the_best_member(command, make_teacher):
    uri = make_teacher()
    # No step changes anything at such a rate: what is kept is what training started from.
    code, values, _ = command("distill", "--model", uri, *DATA, *STUDENT, "--init", "teacher", "--lr", "1e-30")
    assert code == 0
    members, (student,) = load_model(uri).members, load_model(values["student"]).members
    weights = student.network.state_dict()
    equal = [
        all(
            torch.allclose(weights[name], tensor, rtol=0, atol=1e-12)
            for name, tensor in member.network.named_parameters()
        )
        for member in members
    ]
    assert sum(equal) == 1
    assert values["val"]["best_member"]["iou"] == pytest.approx(pooled_iou_of_best(members, equal), abs=1e-6)


def pooled_iou_of_best(members, equal):
    data = load_data(DATA[1])
    member = members[equal.index(True)]
    return pooled_iou(
        Ensemble([member], mode="binary", threshold=member.threshold, class_names=data.task.class_names), data.val
    )


def test_another_network_learns_from_a_teacher_that_rejects_and_does_not_know_its_images(command, make_teacher):
    """Rejection would flatter the teacher's scores; and what the teacher has seen, the student has seen."""
    uri = make_teacher(images=None, reject=0.55)
    code, values, _ = command("distill", "--model", uri, *DATA, *STUDENT, "--arch", "fpn")
    assert code == 0
    (student,) = load_model(values["student"]).members
    assert type(student.network).__name__ == "FPN"
    assert student.training_images is None
    assert values["val"]["teacher"]["coverage"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "2"], "expected alpha, the share of the masks in the loss, from 0 to 1, got 2.0"),
        (["--soften", "0"], "expected soften, a temperature, as a finite number above 0, got 0.0"),
        (["--seeds", "3"], "distill trains one student, got a plan of 3: choose one with fold, or one seed"),
        (["--folds", "3"], "distill trains one student, got a plan of 3"),
        (["--views", "d8"], "unknown views 'd8'"),
        (["--init", "teacher", "--arch", "fpn"], "arch=fpn, but init=teacher has unet: leave it out"),
        (["--init", "teacher", "--encoder-weights", "imagenet"], "init=teacher brings the encoder's weights too"),
        (["--unlabelled", "nowhere"], "no images found at 'nowhere'"),
        (["--arch", "unett"], "unknown arch 'unett'"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_tracked(command, tracking, make_teacher, arguments, message):
    uri = make_teacher()
    before = len(tracking.search_runs(["0"]))
    code, _, (error,) = command("distill", "--model", uri, *DATA, *STUDENT, *arguments)
    assert code == 2
    assert message in error
    assert len(tracking.search_runs(["0"])) == before


def test_a_teacher_that_has_seen_what_is_scored_or_knows_another_task_is_refused(command, make_teacher, splits):
    uri = make_teacher(images=splits.test.image_digests[:1])
    code, _, (error,) = command("distill", "--model", uri, *DATA, *STUDENT)
    assert code == 2
    assert "was trained on 1 of the 4 test images" in error
    other = ("--data", f"{DATA[1]},mode=multiclass")
    code, _, (error,) = command("distill", "--model", make_teacher(), *other, *STUDENT)
    assert code == 2
    assert "has mode binary, the data has multiclass" in error
