"""A teacher is one exact model, however it was named, and an input of the student's run."""

from __future__ import annotations

import logging

import pytest

from smp_ensemble import load_model, save_model
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import log_model, register
from smp_ensemble.tracking.runs import tracked_run
from smp_ensemble.tracking.teachers import exact_uri, link_teacher


@pytest.fixture
def built(track):
    """A tracked snapshot, and the registered ensemble of it."""
    (snapshot,) = track(0.4)
    uri = log_model(Ensemble(load_model(snapshot.uri).members, mode="binary", class_names=["building"]))
    register(uri, "roofs", "champion")
    return snapshot, uri


def test_every_name_leads_to_the_same_logged_model(built, tmp_path):
    snapshot, uri = built
    for name in (uri, "models:/roofs@champion", "models:/roofs/1", "models:/roofs/latest"):
        assert exact_uri(name) == uri
    assert exact_uri(snapshot.uri) == snapshot.uri
    folder = tmp_path / "saved"
    save_model(load_model(uri), folder)
    assert exact_uri(str(folder)) == str(folder)
    with pytest.raises(ConfigError, match="cannot find the model 'models:/walls@champion'"):
        exact_uri("models:/walls@champion")


def test_the_teacher_is_an_input_of_the_run_and_a_folder_is_none(built, tracking, caplog):
    _, uri = built
    with tracked_run(names.TRAINING) as run:
        link_teacher(run, uri)
        link_teacher(run, "some/folder")
    inputs = tracking.get_run(run.run_id).inputs.model_inputs
    assert [one.model_id for one in inputs] == [uri.removeprefix("models:/")]
    assert not caplog.records


def test_a_link_that_cannot_be_made_is_a_warning(built, tracking, monkeypatch, caplog):
    _, uri = built
    with tracked_run(names.TRAINING) as run, caplog.at_level(logging.WARNING, "smp_ensemble"):
        tracking.delete_run(run.run_id)
        link_teacher(run, uri)
        tracking.restore_run(run.run_id)
    assert f"is not linked to its teacher {uri}" in caplog.text
