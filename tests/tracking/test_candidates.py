"""Candidates: found by a filter, or picked by a person."""

from __future__ import annotations

import pytest

from smp_ensemble.data.forms import load_data
from smp_ensemble.exceptions import ConfigError, NothingFoundError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.candidates import find_candidates
from smp_ensemble.tracking.flavor import load_model, log_model


def scores(snapshots):
    return [snapshot.metrics["val_iou"] for snapshot in snapshots]


def test_scores_on_other_data_are_no_candidates_and_the_error_says_so(track):
    track(0.5, 0.6)
    with pytest.raises(NothingFoundError, match="measured on data 0123.*holds 2 snapshots"):
        find_candidates(dataset_digest="0123")


def test_picked_by_tag_on_runs_or_on_a_whole_training(track, tracking):
    first, second, third = track(0.3, 0.6, 0.5)
    for snapshot in (first, second):
        tracking.set_tag(snapshot.run_id, "ensemble", "mine")
    assert scores(find_candidates(pick="mine")) == [0.6, 0.3]
    parent = tracking.get_run(third.run_id).data.tags[names.PARENT_RUN]
    tracking.set_tag(parent, "ensemble", "whole")
    assert scores(find_candidates(pick="whole")) == [0.6, 0.5, 0.3]


def test_a_pick_ranks_on_the_data_asked_for(track, tracking, tiny_splits, caplog):
    (first,) = track(0.3)
    other = load_data("synthetic:count=16,size=64,seed=3")
    (second,) = track(0.9, splits=other)
    for snapshot in (first, second):
        tracking.set_tag(snapshot.run_id, "ensemble", "mine")
    found = find_candidates(pick="mine", dataset_digest=tiny_splits.val.digest)
    assert [one.uri for one in found] == [first.uri, second.uri]
    assert f"{second.model_id} (on {other.val.digest})" in caplog.text
    assert find_candidates(pick="mine", dataset_digest=other.val.digest, limit=1)[0].uri == second.uri


def test_picked_by_id_and_by_a_registered_models_name(track):
    first, second, _ = track(0.3, 0.6, 0.5)
    assert scores(find_candidates(pick=f"{first.model_id}, {second.uri}")) == [0.6, 0.3]
    log_model(load_model(first.uri), registered_model_name="roofs")
    assert scores(find_candidates(pick="roofs")) == [0.3]
    assert scores(find_candidates(pick="roofs/1")) == [0.3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no snapshot found \(no filter with val_iou\) in experiment 'Default'.*holds no snapshots: train some"),
        ({"pick": "mine"}, r"nothing is picked as 'mine'.*add the tag ensemble=mine"),
        ({"pick": "m-00000000000000000000000000000000"}, "no logged model 'm-0000"),
    ],
)
def test_nothing_found_says_what_was_searched_and_what_would_match(tracking, options, message):
    with pytest.raises(NothingFoundError, match=message):
        find_candidates(**options)


def test_a_filter_and_a_pick_at_once_are_refused(tracking):
    with pytest.raises(ConfigError, match="either where or pick"):
        find_candidates(where="metrics.val_iou > 0", pick="mine")
