"""`sync` from the command line: what waits, what is delivered, and what is left of a training afterwards."""

from __future__ import annotations

from tiny import DATA, TINY

from smp_ensemble.cli import UNDELIVERED
from smp_ensemble.tracking import names
from smp_ensemble.tracking.courier import Courier

TRAIN = ("train", *DATA, *TINY, "--epochs", "2", "--cycles", "1", "--encoder-name", "tu-test_resnet")


def test_nothing_waits_and_no_folder(command):
    code, values, _ = command("sync")
    assert (code, values) == (0, {"spools": []})
    code, _, errors = command("sync", "--spool", "nowhere")
    assert code == 2
    assert errors == ["error: expected the folder of a spool, or one with spools below it, got nowhere"]
    code, _, errors = command("sync", "--wait", "-1")
    assert (code, errors) == (2, ["error: --wait: expected 0 or more seconds, got -1"])


def test_a_training_without_its_server_is_delivered_later(command, tracking, monkeypatch, tmp_path):
    """The same training leaves the same, whether its server was there or not; nothing stays on the disk."""
    code, whole, _ = command(*TRAIN)
    assert code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Courier, "_run", lambda self: None)
        patch.setattr("smp_ensemble.tracking.store.DELIVERY_SECONDS", 0.0)
        code, _, (error,) = command(*TRAIN)
    assert code == UNDELIVERED
    assert error.endswith("`smp-ensemble sync` delivers it")
    code, values, _ = command("sync", "--dry-run", "true")
    (row,) = values["spools"]
    assert (code, row["outcome"]) == (0, "waits")
    assert row["entries"] > 5
    assert tracking.get_run(row["run"]).info.status == "RUNNING"

    code, values, _ = command("sync")
    assert (code, [one["outcome"] for one in values["spools"]]) == (0, ["delivered"])
    later, before = tracking.get_run(row["run"]), tracking.get_run(whole["run_id"])
    assert later.info.status == "FINISHED"
    assert later.data.metrics == before.data.metrics
    assert later.data.tags[names.CONFIGURATION] == before.data.tags[names.CONFIGURATION]
    artifacts = [sorted(one.path for one in tracking.list_artifacts(run.info.run_id)) for run in (later, before)]
    assert artifacts[0] == artifacts[1]
    assert not (tmp_path / ".smp_ensemble").exists()
    code, values, _ = command(*TRAIN, "--resume", "auto")  # it is finished: nothing is trained
    assert values["run_id"] in {later.info.run_id, before.info.run_id}


def test_a_training_that_was_stopped_can_still_be_gone_on_with(command, tracking, monkeypatch):
    from smp_ensemble.training.module import SegmentationModule

    def fails(self, *arguments):
        raise RuntimeError("the machine is on fire")

    step = SegmentationModule.training_step
    steps = []

    def soon(self, *arguments):
        steps.append(1)
        return fails(self) if len(steps) > 4 else step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationModule, "training_step", soon)
        code, _, _ = command(*TRAIN)
    assert code == 1
    code, text, _ = command("sync", values=False)
    assert code == 0
    assert "delivered, not finished" in text
    assert text.splitlines()[-1].endswith("the command that began them goes on with --resume auto")
    code, values, _ = command(*TRAIN, "--resume", "auto")
    assert code == 0
    assert tracking.get_run(values["run_id"]).info.status == "FINISHED"
