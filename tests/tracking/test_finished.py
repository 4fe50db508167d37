"""Finished trainings are found by their configuration, with the snapshots that they kept."""

from __future__ import annotations

from smp_ensemble.tracking import names
from smp_ensemble.tracking.finished import configuration_of, find_by_token, find_finished, snapshots_of
from smp_ensemble.tracking.runs import open_run
from smp_ensemble.tracking.store import MlflowStore, Resumable


def find(digest, **more):
    return find_finished(names.TRAINING, digest, **{"experiment": None, "parent_run_id": None, **more})


def test_a_finished_training_is_found_with_its_snapshots(tracking, make_record, tmp_path):
    with MlflowStore(spool=tmp_path, keep=1, resumable=Resumable("token", "digest")) as store:
        for index, iou in ((1, 0.6), (2, 0.4)):
            store.save_snapshot(make_record(index, iou=iou))
        expected = store.snapshots()
        assert find("digest") is None  # it is not finished yet
        assert find_by_token("token", experiment=None, parent_run_id=None) == store.run_id
    assert find("digest") == store.run_id
    assert find("another") is None
    assert configuration_of(store.run_id)[0] == "digest"
    (found,), (kept,) = snapshots_of(store.run_id), expected
    assert (found.uri, found.run_id, found.step) == (kept.uri, kept.run_id, 10)
    assert dict(found.metrics) == dict(kept.metrics)
    assert kept.params.items() <= found.params.items()


def test_a_training_of_a_plan_is_another_than_the_same_alone(tracking, tmp_path):
    plan = open_run(names.PLAN)
    with MlflowStore(spool=tmp_path, parent_run_id=plan.run_id, resumable=Resumable("token", "digest")) as store:
        pass
    assert find("digest", parent_run_id=plan.run_id) == store.run_id
    assert find("digest", parent_run_id=open_run(names.PLAN).run_id) is None
    assert find_by_token("token", experiment=None, parent_run_id=plan.run_id) == store.run_id


def test_a_run_that_is_not_there_says_nothing(tracking):
    assert configuration_of("0" * 32) == (None, {})
    assert configuration_of("no run id") == (None, {})
