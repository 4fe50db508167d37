"""Whether a stored model is what was written: every file against `files.sha256`, and that against MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlflow
import yaml
from mlflow.exceptions import MlflowException

from smp_ensemble.ensembling import artifact
from smp_ensemble.ensembling.spec import COMBINER_FILE, ENSEMBLE_FILE
from smp_ensemble.exceptions import IntegrityError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.manifest import MANIFEST_FILE, manifest_digest, read_manifest, verify_files
from smp_ensemble.tracking.packing import CODE_FOLDER, FLAVOR_NAME, MLMODEL_FILE
from smp_ensemble.untrusted import read_limited, shorten

if TYPE_CHECKING:
    from pathlib import Path

MLMODEL_BYTES = 1 << 18


def verify_mlmodel(folder: Path, uri: str = "") -> None:
    """Verifies all of a stored model but its members, whose files `artifact.verify` compares; imports nothing of it.

    A folder without MLmodel is an artifact that was never made a model; there is nothing to compare. A model of the
    first version has no `files.sha256`: there, MLmodel holds the SHA-256 of `ensemble.json`, and that is all.

    Args:
        folder: The model.
        uri: Where it came from: of `models:/...`, MLflow knows the SHA-256 of the list of files as well.

    Raises:
        IntegrityError: A file is missing, changed, added to the code or behind a link; names it, the expected and the
            found SHA-256.
    """
    tracked = _tracked_digest(uri)
    if tracked is None and not _exists(folder / MANIFEST_FILE):
        if _exists(folder / MLMODEL_FILE):
            _verify_description(folder, listed=False)
        return
    files = read_manifest(folder)
    found = manifest_digest(folder)
    if tracked is not None and found != tracked:
        raise IntegrityError(f"{folder / MANIFEST_FILE} was changed: expected SHA-256 {tracked}, found {found}")
    for name in (MLMODEL_FILE, ENSEMBLE_FILE):
        if name not in files:
            raise IntegrityError(f"{folder / MANIFEST_FILE} lists no {name}: not a model of smp_ensemble")
        artifact.verify_file(folder.resolve() / name, files[name])
    _verify_description(folder, listed=True)
    members = _files_of_members(folder)
    for name, digest in members.items():
        if files.get(name) != digest:
            raise IntegrityError(
                f"{folder / name} was changed: expected SHA-256 {files.get(name, 'none')} as {MANIFEST_FILE} says, "
                f"found {digest} in {ENSEMBLE_FILE}"
            )
    verify_files(folder, files, but=members, closed=CODE_FOLDER)


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _files_of_members(folder: Path) -> dict[str, str]:
    """What `ensemble.json` lists: large files, which are read once, in `artifact.verify`."""
    spec = artifact.read_spec(folder)
    found = {f"{one.folder}/{name}": digest for one in spec.members for name, digest in one.sha256.items()}
    if spec.combiner_sha256 is not None:
        found[COMBINER_FILE] = spec.combiner_sha256
    return found


def _verify_description(folder: Path, *, listed: bool) -> None:
    """MLmodel: of our flavor, and of this `ensemble.json`.

    Args:
        folder: The model.
        listed: Whether there is a `files.sha256`.
    """
    path = folder / MLMODEL_FILE
    flavors = _flavors(path)
    ours = flavors.get(FLAVOR_NAME)
    if not isinstance(ours, dict) or not isinstance(ours.get("ensemble_sha256"), str):
        raise IntegrityError(
            f"expected the flavor '{FLAVOR_NAME}' in {path}, found {shorten(', '.join(map(str, flavors)))}: "
            "not a model of smp_ensemble"
        )
    if "manifest" in ours and not listed:
        raise IntegrityError(f"{folder / MANIFEST_FILE} was changed: expected the SHA-256 of all files, found no file")
    artifact.verify_file(folder.resolve() / ENSEMBLE_FILE, ours["ensemble_sha256"])


def _flavors(path: Path) -> dict[Any, Any]:
    try:
        # Not MLflow's reader, which has no limits; and Python's parser, because libyaml's overflows the stack.
        content = yaml.safe_load(read_limited(path, MLMODEL_BYTES))
        flavors = dict(content["flavors"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise IntegrityError(f"cannot read {path}: {type(error).__name__} {shorten(error)}") from error
    return flavors


def _tracked_digest(uri: str) -> str | None:
    """What MLflow says about the list of files of a model at `models:/...`; None: nothing."""
    scheme, _, name = uri.partition(":/")
    if scheme != "models":
        return None
    client = mlflow.MlflowClient()
    try:
        model_id = name if name.startswith("m-") else _registered(client, name)
        found: str | None = client.get_logged_model(model_id).tags.get(names.FILES_SHA256) if model_id else None
    except MlflowException:  # deleted since: the files speak for themselves
        return None
    return found


def _registered(client: mlflow.MlflowClient, name: str) -> str | None:
    """The logged model that a version is of: `NAME@ALIAS` or `NAME/VERSION`."""
    model, _, alias = name.partition("@")
    if alias:
        version = client.get_model_version_by_alias(model, alias)
    else:
        model, _, number = name.rpartition("/")
        if not number.isdigit():
            return None
        version = client.get_model_version(model, number)
    source = version.source or ""
    model_id: str | None = version.model_id
    return model_id or (source.removeprefix("models:/") if source.startswith("models:/m-") else None)
