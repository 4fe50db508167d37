"""On which data scores were measured: found by questions that skip what is known, and never mixed in silence."""

from __future__ import annotations

import pytest
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag

from smp_ensemble.exceptions import ConfigError, NothingFoundError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.candidates import find_candidates, known_digest
from smp_ensemble.tracking.measured import scored_data
from smp_ensemble.tracking.search import search_snapshots
from smp_ensemble.typing import DatasetReference


@pytest.fixture
def write(tracking):
    """Writes a snapshot with a score on some data, or on data that nobody named."""

    def run(digest, iou=0.5, trainer="snapshot", used=()):
        run_id = tracking.create_run("0", tags={names.KIND: names.SNAPSHOT}).info.run_id
        tags = {names.KIND: names.SNAPSHOT}
        model_id = tracking.create_logged_model("0", name="one", source_run_id=run_id, tags=tags).model_id
        for data in (digest, *used):
            if data:
                tracking.log_inputs(run_id, [DatasetInput(Dataset("roofs/val", data, "local", "x"))])
        score = Metric("val_iou", iou, 1, 1, model_id, digest and "roofs/val", digest, run_id)
        done = [RunTag(names.MODEL_ID, model_id)]
        tracking.log_batch(run_id, metrics=[score], params=[Param("trainer", trainer)], tags=done)
        tracking.finalize_logged_model(model_id, "READY")
        return model_id

    return run


def test_scores_on_several_data_sets_are_not_ranked_in_silence(write):
    write("aaaa1111", 0.9)
    write("aaaa1111", 0.8)
    other = write("aabb2222", 0.1, trainer="swa")
    said = (
        r"val_iou measured on 2 data sets.*roofs/val aaaa1111 \(2 snapshots\); roofs/val aabb2222 \(1 snapshots\)"
        r".*--dataset DIGEST"
    )
    for options in ({}, {"limit": 1}, {"where": "metrics.val_iou > 0"}):
        with pytest.raises(ConfigError, match=said):
            search_snapshots(**options)
    assert len(search_snapshots("params.trainer = 'snapshot'")) == 2  # all that match: one data set
    assert [one.model_id for one in search_snapshots("dataset.digest = 'aabb2222'")] == [other]
    assert [one.model_id for one in search_snapshots(dataset_digest="aabb2222")] == [other]


def test_scores_without_a_data_set_do_not_compare_either(write):
    write(None, 0.5)
    assert len(search_snapshots()) == 1
    write("aaaa1111", 0.9)
    with pytest.raises(ConfigError, match="2 data sets.*unknown data"):
        search_snapshots()


def test_data_that_a_run_used_without_a_score_on_it_is_none_of_them(write, tracking):
    write("aaaa1111", used=("cccc3333",))
    assert len(search_snapshots(limit=1)) == 1
    assert scored_data(tracking, ["0"], "val_iou") == [DatasetReference("roofs/val", "aaaa1111")]


def test_a_digest_by_its_beginning(write):
    for digest in ("aaaa1111", "aabb2222", "cccc3333"):
        write(digest)
    assert known_digest("aab") == "aabb2222"
    assert known_digest("cccc3333") == "cccc3333"
    with pytest.raises(ConfigError, match="'aa' is the beginning of several digests: .*aaaa1111 .*aabb2222"):
        known_digest("aa")
    with pytest.raises(NothingFoundError, match="no snapshot was scored on data 'dd'; there is: .*cccc3333"):
        known_digest("dd")
    with pytest.raises(ConfigError, match="letters and digits"):
        known_digest("a%")


def test_nothing_on_the_data_asked_for_says_on_what_there_is(write):
    write("aaaa1111")
    with pytest.raises(NothingFoundError, match=r"holds 1 snapshots, scored on roofs/val aaaa1111 \(1 snapshots\)"):
        find_candidates(dataset_digest="dddd")
