"""What killed processes left open is found, or closed; what is finished stays as it is."""

from __future__ import annotations

from smp_ensemble.tracking import names
from smp_ensemble.tracking.runs import open_run
from smp_ensemble.tracking.settling import REASON, drop_doubles, find_snapshot_run, models_in, settle
from smp_ensemble.typing import Snapshot


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


def test_what_a_server_created_twice_is_deleted_and_nothing_else(tracking):
    """The sender of a call gave up, the server heard it all the same, and another one was made in its place."""
    training = open_run(names.TRAINING)

    def child(step, kind=names.SNAPSHOT):
        return open_run(kind, parent_run_id=training.run_id, tags={names.STEP: step})

    def model(run, **tags):
        return tracking.create_logged_model("0", source_run_id=run.run_id, tags=tags).model_id

    kept, late = child("10"), child("10")
    mine, double = model(kept, **{names.KIND: names.SNAPSHOT}), model(kept, **{names.KIND: names.SNAPSHOT})
    of_late, of_user = model(late, **{names.KIND: names.SNAPSHOT}), model(kept, mine="true")
    kept.set_tags({names.MODEL_ID: mine})
    unfinished, other_kind = child("20"), child("10", names.EVALUATION)
    snapshot = Snapshot(f"models:/{mine}", kept.run_id, 10, {}, {}, {})

    assert drop_doubles(training, [snapshot]) == 3
    assert drop_doubles(training, [snapshot]) == 0
    active = {run.info.run_id for run in tracking.search_runs(["0"])}
    assert active == {training.run_id, kept.run_id, unfinished.run_id, other_kind.run_id}
    left = {found.model_id for found in tracking.search_logged_models(["0"])}
    assert (left & {mine, double, of_late, of_user}) == {mine, of_user}
