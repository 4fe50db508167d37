"""Picks: by tags on snapshots, trainings and plans, and by ids; and what a pick that finds nothing says."""

from __future__ import annotations

import pytest
from mlflow.entities import Metric, RunTag

from smp_ensemble.exceptions import ConfigError, NothingFoundError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.picking import picked


@pytest.fixture
def write(tracking):
    """Writes a snapshot below a run; gives the ids of its run and its model."""

    def run(iou=0.5, *, parent=None, experiment="0", digest="aaaa1111", pick=None):
        tags = {names.KIND: names.SNAPSHOT} | ({names.PARENT_RUN: parent} if parent else {})
        tags |= {names.PICK: pick} if pick else {}
        run_id = tracking.create_run(experiment, tags=tags).info.run_id
        model_id = tracking.create_logged_model(
            experiment, name="one", source_run_id=run_id, tags={names.KIND: names.SNAPSHOT}
        ).model_id
        score = Metric("val_iou", iou, 1, 1, model_id, "roofs/val", digest, run_id)
        tracking.log_batch(run_id, metrics=[score], tags=[RunTag(names.MODEL_ID, model_id)])
        tracking.finalize_logged_model(model_id, "READY")
        return run_id, model_id

    return run


def ids(snapshots):
    return [one.model_id for one in snapshots]


def test_a_tagged_plan_is_all_snapshots_of_its_trainings_each_once(write, tracking):
    plan = tracking.create_run("0", tags={names.KIND: names.PLAN, names.PICK: "all"}).info.run_id
    wanted = []
    for fold in range(2):
        tags = {names.KIND: names.TRAINING, names.PARENT_RUN: plan} | ({names.PICK: "all"} if fold else {})
        training = tracking.create_run("0", tags=tags).info.run_id
        wanted += [write(0.1 * (3 * fold + index), parent=training)[1] for index in range(2)]
    write(0.9)
    assert ids(picked("all")) == wanted[::-1]


@pytest.mark.parametrize("name", ["best of may", "the roofs' best", 'the "best"', "a`b", "a,b", "100%", "x = 'y", "ä"])
def test_names_with_all_kinds_of_characters(write, name):
    _, model_id = write(pick=name)
    write(pick="other")
    assert ids(picked(name)) == [model_id]


@pytest.mark.parametrize("name", ["both ' and \"", "two\nlines"])
def test_a_name_that_no_filter_can_write_is_refused(tracking, name):
    with pytest.raises(ConfigError, match="one kind of quotes at most"):
        picked(name)


def test_ids_are_taken_once_and_not_mixed_with_names(write):
    (_, first), (_, second) = write(0.2), write(0.8)
    assert ids(picked(f"{first},models:/{second}, {first}")) == [second, first]
    with pytest.raises(ConfigError, match=f"expected model ids or one name.*{first} are ids"):
        picked(f"{first},mine")


def test_a_model_that_is_not_whole_is_named(tracking):
    pending = tracking.create_logged_model("0", tags={names.KIND: names.SNAPSHOT}).model_id
    with pytest.raises(NothingFoundError, match=f"'{pending}' is not whole: its status is PENDING"):
        picked(pending)


def test_picked_snapshots_without_weights_are_named_and_left_out(write, tracking, caplog):
    gone, _ = write(0.9, pick="mine")
    _, kept = write(0.1, pick="mine")
    tracking.set_tag(gone, names.PRUNED, "true")
    assert ids(picked("mine")) == [kept]
    assert f"without weights (pruned or not whole), so left out: {tracking.get_run(gone).info.run_name}" in caplog.text


def test_scores_on_other_data_do_not_rank_and_are_named(write, caplog):
    _, other = write(0.9, pick="mine", digest="bbbb2222")
    _, asked = write(0.1, pick="mine")
    found = picked("mine", dataset_digest="aaaa1111")
    assert ids(found) == [asked, other]
    assert [one.metrics for one in found] == [{"val_iou": 0.1}, {}]
    assert "1 of 2 picked snapshots have no val_iou on the data asked for (aaaa1111)" in caplog.text
    assert f"{other} (on bbbb2222)" in caplog.text
    caplog.clear()
    assert ids(picked("mine")) == [other, asked]
    assert "measured on 2 data sets" in caplog.text


def test_a_pick_in_another_experiment_is_said_to_be_there(write, tracking):
    elsewhere = tracking.create_experiment("elsewhere")
    _, there = write(pick="mine", experiment=elsewhere)
    write(pick="yours")
    with pytest.raises(
        NothingFoundError, match="experiment 'Default'.*in other experiments: pass experiment=elsewhere"
    ):
        picked("mine")
    assert ids(picked("mine", experiment="elsewhere")) == [there]


def test_a_pick_that_finds_nothing_lists_what_is_picked(write):
    write(pick="roofs")
    write(pick="roads")
    with pytest.raises(NothingFoundError, match="did you mean 'roofs'. Known: roads, roofs"):
        picked("rofs")
