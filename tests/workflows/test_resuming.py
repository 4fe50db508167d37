"""`resume`: a training goes on, is finished already, or is another one, which is said."""

from __future__ import annotations

import shlex
from pathlib import Path

import mlflow
import pytest
from tiny import DATA, TINY

from smp_ensemble import cli
from smp_ensemble.tracking import names
from smp_ensemble.tracking.store import MlflowStore
from smp_ensemble.training.module import SegmentationModule
from smp_ensemble.workflows.options import MainOptions, TrainOptions
from smp_ensemble.workflows.resuming import resume_note

SHORT = (*DATA, *TINY, "--epochs", "3", "--trainer", "checkpoints", "--trainer-options", '{"every_epochs": 1}')


class Killed(BaseException):
    """A process that dies does nothing more."""


@pytest.fixture
def dies(monkeypatch):
    """Lets the process die in a step of training, counted from 1, without any clearing up."""
    original, steps, close = SegmentationModule.training_step, [], MlflowStore.__exit__

    def leave(self, kind, error, trace):
        if kind is Killed:
            self._courier.close()
        else:
            close(self, kind, error, trace)

    def at(step):
        def training_step(self, batch, batch_idx):
            steps.append(step)
            if len(steps) == step:
                raise Killed
            return original(self, batch, batch_idx)

        monkeypatch.setattr(SegmentationModule, "training_step", training_step)
        monkeypatch.setattr(MlflowStore, "__exit__", leave)
        return steps

    return at


def kinds(client):
    return [run.data.tags[names.KIND] for run in client.search_runs(["0"])]


def died(arguments):
    with pytest.raises(Killed):
        cli.main(["train", *arguments])


@pytest.fixture
def revive(monkeypatch):
    """The next process: nothing dies any more."""
    training_step, leave = SegmentationModule.training_step, MlflowStore.__exit__

    def again():
        monkeypatch.setattr(SegmentationModule, "training_step", training_step)
        monkeypatch.setattr(MlflowStore, "__exit__", leave)

    return again


def test_the_same_command_goes_on_and_then_says_that_it_is_finished(command, tracking, revive, dies, caplog):
    steps = dies(10)  # in the third of three epochs of four steps
    died(SHORT)
    (run,) = tracking.search_runs(["0"], f"tags.`{names.KIND}` = 'training'")
    assert run.info.status == "RUNNING"
    revive()
    assert len(steps) == 10

    code, _, errors = command("train", *SHORT, "--lr", "0.01", "--resume", run.info.run_id)
    assert code == 2
    assert errors == [
        f"error: resume={run.info.run_id}: that run was begun with lr=0.05, now it is lr=0.01: go on with the same "
        "options, or train anew without resume"
    ]

    code, values, _ = command("train", *SHORT, "--workers", "1", "--resume", "auto")  # workers change nothing
    assert code == 0
    assert values["run_id"] == run.info.run_id
    assert [row["step"] for row in values["snapshots"]] == [4, 8, 12]
    assert f"run {run.info.run_id} goes on after epoch 2 of 3" in caplog.text
    assert tracking.get_run(run.info.run_id).info.status == "FINISHED"
    assert sorted(kinds(tracking)) == ["snapshot"] * 3 + ["training"]
    assert not Path(".smp_ensemble").exists()

    for resume in ("auto", run.info.run_id):
        code, again, _ = command("train", *SHORT, "--resume", resume)
        assert code == 0
        assert again["snapshots"] == values["snapshots"]
        assert again["run_id"] == run.info.run_id
        assert f"this training is finished already: run {run.info.run_id}" in caplog.text
    assert len(kinds(tracking)) == 4

    code, _, errors = command("train", *SHORT, "--seed", "3", "--resume", run.info.run_id)
    assert (code, errors[0]) == (
        2,
        f"error: resume={run.info.run_id}: that run was begun with seed=0, now it is seed=3: go on with the same "
        "options, or train anew without resume",
    )


def test_a_run_that_nothing_is_kept_of_is_an_error_and_auto_begins_anew(command, tracking, caplog):
    options = (*DATA, *TINY, "--trainer", "single", "--epochs", "1")
    code, _, errors = command("train", *options, "--resume", "f" * 32)
    assert code == 2
    assert errors[0].startswith(f"error: resume={'f' * 32}: nothing of that training is kept in this folder; ")
    assert kinds(tracking) == []
    code, _, _ = command("train", *options, "--resume", "auto")
    assert code == 0
    assert "resume=auto: no training of this configuration was begun here: it begins now" in caplog.text


def test_new_trainings_say_that_an_equal_one_is_not_finished(command, tracking, revive, dies, caplog):
    options = (*DATA, *TINY, "--trainer", "single", "--epochs", "1")
    dies(2)
    died(options)
    revive()
    assert command("train", *options)[0] == 0
    assert "was begun and is not finished" in caplog.text
    assert len(kinds(tracking)) == 3  # the one that died, the new one and its snapshot
    assert command("train", *options, "--resume", "auto")[0] == 0
    assert sorted(kinds(tracking)) == ["snapshot"] * 2 + ["training"] * 2


def test_other_images_under_the_same_name_are_another_training(command, tracking, revive, dies, monkeypatch):
    from smp_ensemble.data.datasets import SegmentationDataset

    options = (*DATA, *TINY, "--trainer", "single", "--epochs", "1")
    dies(2)
    died(options)
    revive()
    (run,) = tracking.search_runs(["0"])
    digest = SegmentationDataset.digest
    monkeypatch.setattr(
        SegmentationDataset, "digest", property(lambda self: f"other{digest.__get__(self)}")  # type: ignore[attr-defined]
    )  # fmt: skip
    code, _, errors = command("train", *options, "--resume", run.info.run_id)
    assert code == 2
    assert "was begun with images of train=" in errors[0]


@pytest.mark.slow
def test_a_plan_goes_on_with_the_training_that_broke_off_and_runs_those_that_are_missing(
    command, tracking, revive, dies
):
    options = (*DATA, *TINY, "--trainer", "single", "--epochs", "2", "--folds", "3")
    code, expected, _ = command("train", *options)
    assert code == 0
    for run in tracking.search_runs(["0"]):
        tracking.delete_run(run.info.run_id)
    in_first = 4 * 1  # two steps in an epoch of a fold, two epochs
    steps = dies(in_first + 3)  # the second epoch of the second fold
    died(options)
    revive()
    assert len(steps) == in_first + 3
    code, values, _ = command("train", *options, "--resume", "auto")
    assert code == 0
    assert sorted(kinds(tracking)) == ["plan"] + ["snapshot"] * 3 + ["training"] * 3
    assert {run.info.status for run in tracking.search_runs(["0"])} == {"FINISHED"}
    assert values["cv"] == expected["cv"]
    scores = [[row[name] for name in ("step", "val IoU", "val loss", "cv IoU")] for row in values["snapshots"]]
    assert scores == [
        [row[name] for name in ("step", "val IoU", "val loss", "cv IoU")] for row in expected["snapshots"]
    ]
    code, again, _ = command("train", *options, "--resume", "auto")
    assert code == 0
    assert again["cv"] == expected["cv"]
    assert again["run_id"] == values["run_id"]
    assert len(kinds(tracking)) == 7
    for name, value in expected["cv"].items():
        (point,) = tracking.get_metric_history(values["run_id"], name)
        assert point.value == value


def test_the_note_is_the_command_that_was_typed():
    typed = (
        *("--data", "my data", "--trainer-options", '{"start": 0.5}', "--freeze-encoder", "true"),
        *("--lr", "0.01", "--epochs", "7"),
    )
    note = resume_note(cli.parse_options(TrainOptions, dict(zip(map(option_of, typed[::2]), typed[1::2], strict=True))))
    words = shlex.split(note.removeprefix("to go on: "))
    assert words[:2] == ["smp-ensemble", "train"]
    assert words[-2:] == ["--resume", "auto"]
    found = dict(zip(words[2::2], words[3::2], strict=True))
    assert found == {**dict(zip(typed[::2], typed[1::2], strict=True)), "--resume": "auto"}
    assert resume_note(MainOptions(resume="auto")) == "to go on: smp-ensemble main --resume auto"


def test_under_mlflow_run_the_note_is_its_parameter(monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "run")
    assert resume_note(TrainOptions()) == "the same `mlflow run` with -P resume=auto goes on with it"


def option_of(flag):
    return flag.removeprefix("--").replace("-", "_")


def test_an_error_says_how_to_go_on_and_a_divergence_does_not(command, tracking, monkeypatch):
    options = (*DATA, *TINY, "--trainer", "single", "--epochs", "2")
    original = SegmentationModule.training_step
    for trouble, code, ending in (
        (lambda loss: loss + float("nan"), 1, "or with precision=32"),
        (lambda loss: (_ for _ in ()).throw(MemoryError()), 1, " --resume auto"),
    ):
        monkeypatch.setattr(
            SegmentationModule, "training_step", lambda *arguments, do=trouble: do(original(*arguments))
        )  # fmt: skip
        found, _, errors = command("train", *options)
        assert found == code
        assert errors[0].endswith(ending)
    assert {run.info.status for run in tracking.search_runs(["0"])} == {"FAILED"}
    assert mlflow.search_logged_models(["0"], output_format="list") == []
