"""A tracked model is compared with what MLflow knows of it; a stored one with itself."""

from __future__ import annotations

import mlflow
import pytest

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import IntegrityError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import load_model, local_folder, log_model, register, save_model
from smp_ensemble.tracking.manifest import manifest_digest, write_manifest
from smp_ensemble.tracking.verification import verify_mlmodel


@pytest.fixture
def ensemble(make_tiny_network):
    return Ensemble([Member(make_tiny_network(1), imagenet())], mode="binary", class_names=("background", "roof"))


def test_a_model_that_was_changed_with_its_list_is_found_where_it_is_tracked(ensemble, tracking):
    uri = log_model(ensemble, "roofs", registered_model_name="roofs")
    register(uri, "roofs", alias="champion")
    folder = local_folder(uri)
    client = mlflow.MlflowClient()
    tags = client.get_logged_model(uri.removeprefix("models:/")).tags
    assert tags[names.FILES_SHA256] == manifest_digest(folder)
    addresses = (uri, "models:/roofs@champion", "models:/roofs/1")
    for address in addresses:
        load_model(address)
    (folder / "requirements.txt").write_text("something-else\n")
    found = write_manifest(folder)
    load_model(str(folder))  # by itself it is whole
    for address in addresses:
        with pytest.raises(IntegrityError) as caught:
            load_model(address)
        message = str(caught.value)
        assert f"files.sha256 was changed: expected SHA-256 {tags[names.FILES_SHA256]}, found {found}" in message
    (folder / "files.sha256").unlink()
    with pytest.raises(IntegrityError, match=r"files.sha256 was changed: expected .* found no file"):
        load_model(uri)


def test_a_model_that_mlflow_knows_no_list_of_loads(ensemble, tracking):
    uri = log_model(ensemble, "roofs")
    client = mlflow.MlflowClient()
    client.delete_logged_model_tag(uri.removeprefix("models:/"), names.FILES_SHA256)
    load_model(uri)


@pytest.mark.parametrize(
    "text",
    [
        "flavors: " + "[" * 100_000,
        "- " * 50_000,
        "flavors:\n  smp_ensemble: !!python/object/apply:os.system ['true']\n",
        "flavors: 5\n",
        "flavors: {smp_ensemble: []}\n",
        "flavors: {smp_ensemble: {ensemble_sha256: 5}}\n",
        "x" * 300_000,
        "",
        "\0",
    ],
    ids=range(9),
)
def test_a_description_made_to_do_harm_is_refused(tmp_path, text):
    (tmp_path / "MLmodel").write_text(text)
    with pytest.raises(IntegrityError, match="MLmodel") as caught:
        verify_mlmodel(tmp_path)
    assert "\n" not in str(caught.value)


def test_loading_imports_nothing_of_the_model(ensemble, tmp_path):
    """Not even where the list of files says that all is well."""
    save_model(ensemble, tmp_path / "model")
    trap = f"open({str(tmp_path / 'harm')!r}, 'w').write('harm')\n"
    for path in (tmp_path / "model" / "code").rglob("*.py"):
        path.write_text(trap)
    write_manifest(tmp_path / "model")
    load_model(str(tmp_path / "model"))
    assert not (tmp_path / "harm").exists()
