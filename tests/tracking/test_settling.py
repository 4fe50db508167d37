"""What killed processes left open is found, or closed; what is finished stays as it is."""

from __future__ import annotations

from smp_ensemble.tracking import names
from smp_ensemble.tracking.runs import open_run
from smp_ensemble.tracking.settling import REASON, find_snapshot_run, models_in, settle


def test_runs_and_models_that_are_open_are_closed(tracking):
    training = open_run(names.TRAINING)
    stale, whole = (open_run(names.SNAPSHOT, parent_run_id=training.run_id, tags={names.STEP: step}) for step in "12")
    other = open_run(names.SNAPSHOT, parent_run_id=open_run(names.TRAINING).run_id, tags={names.STEP: "1"})
    pending = tracking.create_logged_model("0", source_run_id=stale.run_id).model_id
    ready = tracking.create_logged_model("0", source_run_id=whole.run_id).model_id
    tracking.finalize_logged_model(ready, "READY")
    whole.end()

    assert find_snapshot_run(training, 1) == stale.run_id
    assert find_snapshot_run(training, 3) is None
    assert [one.model_id for one in models_in(tracking, "0", stale.run_id)] == [pending]

    assert settle(training) == 1
    assert settle(training) == 0
    run = tracking.get_run(stale.run_id)
    assert (run.info.status, run.data.tags[names.ERROR]) == ("KILLED", REASON)
    assert tracking.get_logged_model(pending).status.name == "FAILED"
    assert tracking.get_run(whole.run_id).info.status == "FINISHED"
    assert tracking.get_logged_model(ready).status.name == "READY"
    assert tracking.get_run(other.run_id).info.status == "RUNNING"
