"""Lineage: an ensemble names its members, members name their ensembles, and what changed since is found."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble import load_model
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling import artifact
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import WEIGHTS_FILE, Member
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import log_model, register
from smp_ensemble.tracking.lineage import (
    TEXT_LIMIT,
    appended,
    lineage,
    link_members,
    mark_used,
    members_table,
    registered_lineage,
    verify_lineage,
)
from smp_ensemble.tracking.runs import tracked_run


@pytest.fixture
def built(track):
    """Two tracked snapshots, and the logged ensemble of them."""
    snapshots = track(0.3, 0.6)
    members = [load_model(one.uri).members[0] for one in snapshots]
    uri = log_model(Ensemble(members, mode="binary", class_names=["building"]))
    return snapshots, uri


def weights_of(tracking, snapshot) -> Path:
    location = tracking.get_logged_model(snapshot.model_id).artifact_location
    return Path(urlparse(location).path) / "members/00" / WEIGHTS_FILE


def test_untouched_members_are_unchanged(built):
    snapshots, uri = built
    assert [(one.source, one.state) for one in lineage(uri)] == [(one.uri, "unchanged") for one in snapshots]
    assert verify_lineage(uri) == []
    assert verify_lineage(uri, contents=False) == []


def test_a_deleted_snapshot_is_found_and_the_ensemble_works_on(built, tracking):
    (first, second), uri = built
    raw = torch.rand(1, 3, 32, 32) * 255
    with torch.no_grad():
        before = load_model(uri)(raw)
        tracking.delete_logged_model(first.model_id)
        assert torch.equal(load_model(uri)(raw), before)
    assert [(one.source, one.state) for one in lineage(uri)] == [(first.uri, "deleted"), (second.uri, "unchanged")]
    (problem,) = verify_lineage(uri)
    assert problem.startswith(f"{first.uri}: deleted: there is no such snapshot at sqlite:///")


def test_files_that_are_gone_count_as_deleted(built, tracking):
    (first, _), uri = built
    weights_of(tracking, first).parents[2].joinpath(artifact.ENSEMBLE_FILE).unlink()
    assert verify_lineage(uri) == [f"{first.uri}: deleted: its files are gone"]


def test_one_flipped_bit_is_found_with_both_digests(built, tracking):
    (first, _), uri = built
    path = weights_of(tracking, first)
    expected = artifact.file_sha256(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = artifact.file_sha256(path)
    assert verify_lineage(uri) == [f"{first.uri}: altered: {WEIGHTS_FILE}: expected SHA-256 {expected}, found {found}"]
    assert verify_lineage(uri, contents=False) == []  # what ensemble.json says is as it was


def test_a_snapshot_that_was_replaced_whole_is_found_without_reading_its_weights(built, tracking):
    (first, second), uri = built
    mine, other = (weights_of(tracking, one) for one in (first, second))
    expected, found = artifact.file_sha256(mine), artifact.file_sha256(other)
    mine.write_bytes(other.read_bytes())
    spec = mine.parents[2] / artifact.ENSEMBLE_FILE
    spec.write_text(spec.read_text().replace(expected, found))
    for contents in (True, False):
        (problem,) = verify_lineage(uri, contents=contents)
        assert problem.endswith(f"altered: {WEIGHTS_FILE}: expected SHA-256 {expected}, found {found}")
    spec.write_text("{}")
    (problem,) = verify_lineage(uri)
    assert "altered: ensemble.json" in problem


def test_members_that_were_never_tracked_are_no_problem(tracking, make_tiny_network):
    ensemble = Ensemble([Member(make_tiny_network(), imagenet())], mode="binary", class_names=["building"])
    uri = log_model(ensemble)
    assert [str(one) for one in lineage(uri)] == ["a member: untracked"]
    assert verify_lineage(uri) == []


def test_lineage_by_registered_name(built, tracking):
    (first, _), uri = built
    register(uri, "roofs", "champion")
    tracking.delete_logged_model(first.model_id)
    for pick in ("roofs", "roofs@champion", "roofs/1"):
        assert [one.state for one in registered_lineage(pick)] == ["deleted", "unchanged"]
    for pick in ("", "walls", first.model_id, "roofs,walls", "roofs@nobody"):
        assert registered_lineage(pick) == []


def test_an_ensembles_run_and_model_link_to_its_members(built, tracking):
    snapshots, uri = built
    model_id = uri.removeprefix("models:/")
    note = members_table(snapshots, {"weight": [0.25, 0.75], "val IoU": [0.3, None]})
    with tracked_run(names.ENSEMBLE) as run:
        for _ in range(2):
            link_members(run, model_id, snapshots, note)
    kept = tracking.get_run(run.run_id)
    assert {one.model_id for one in kept.inputs.model_inputs} == {one.model_id for one in snapshots}
    assert len(kept.inputs.model_inputs) == 2
    tags = tracking.get_logged_model(model_id).tags
    assert kept.data.tags[names.NOTE] == tags[names.NOTE] == note
    assert tags[names.MEMBERS] == ",".join(one.model_id for one in snapshots)
    first = tracking.get_run(snapshots[0].run_id).info
    row = note.splitlines()[2]
    assert f"(#/experiments/{first.experiment_id}/models/{snapshots[0].model_id})" in row
    assert f"[{first.run_name}](#/experiments/{first.experiment_id}/runs/{first.run_id})" in row
    assert row.endswith("| 10 | 0.25 | 0.3 |")
    assert note.splitlines()[3].endswith("| 20 | 0.75 | - |")


def test_a_long_table_is_cut_and_says_so(built):
    (first, _), _ = built
    table = members_table([first] * 60, {"weight": [1.0] * 60})
    assert len(table) <= TEXT_LIMIT
    rows = sum(line.startswith("| [") for line in table.splitlines())
    assert 10 < rows < 60
    assert table.endswith(f"and {60 - rows} more: the run's param `members` has all of them")


def test_members_runs_say_who_uses_them_once(built, tracking):
    (first, second), _ = built
    for label in ("roofs/1", "roofs/1", "m-0123"):
        mark_used([first, second], label)
    mark_used([first], "walls/2")
    assert tracking.get_run(first.run_id).data.tags[names.USED_BY] == "roofs/1,m-0123,walls/2"
    assert tracking.get_run(second.run_id).data.tags[names.USED_BY] == "roofs/1,m-0123"


def test_a_tag_that_somebody_else_overwrote_is_written_again(built, tracking, monkeypatch):
    (first, _), _ = built
    set_tag, overwritten = type(tracking).set_tag, []

    def lost(client, run_id, key, value):
        set_tag(client, run_id, key, value)
        if not overwritten:
            overwritten.append(value)
            set_tag(client, run_id, key, "theirs/1")

    monkeypatch.setattr(type(tracking), "set_tag", lost)
    mark_used([first], "ours/1")
    assert tracking.get_run(first.run_id).data.tags[names.USED_BY] == "theirs/1,ours/1"


def test_a_run_that_is_gone_is_a_warning(built, tracking, caplog):
    (first, second), _ = built
    tracking.delete_run(first.run_id)
    mark_used([first, second], "roofs/1")
    assert f"run {first.run_id} is not marked as used by roofs/1" in caplog.text
    assert tracking.get_run(second.run_id).data.tags[names.USED_BY] == "roofs/1"


LABELS = st.text("abcdef/0123-", min_size=1, max_size=12)


@given(st.lists(LABELS, max_size=20), LABELS, st.integers(12, 60))
def test_a_list_of_labels_keeps_the_newest_each_once(labels, label, limit):
    text = ""
    for one in labels:
        text = appended(text, one, limit)
    text = appended(text, label, limit)
    kept = text.split(",")
    assert len(text) <= limit
    assert label in kept
    assert len(set(kept)) == len(kept)
    assert set(kept) <= {*labels, label}
    assert appended(text, label, limit) == text
