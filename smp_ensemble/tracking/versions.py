"""Versions of a registered model and the aliases that point to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlflow
from mlflow.exceptions import MlflowException

from smp_ensemble.tracking.lineage import TEXT_LIMIT

if TYPE_CHECKING:
    from collections.abc import Mapping


def version_with(name: str, alias: str) -> str | None:
    """The version of a registered model that an alias points to; None: there is no such model or alias."""
    try:
        found = mlflow.MlflowClient().get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return None if found is None else str(found)


def describe_version(name: str, version: str, description: str, tags: Mapping[str, str]) -> None:
    """Sets the description, in Markdown, and tags of a version."""
    client = mlflow.MlflowClient()
    client.update_model_version(name, version, description[:TEXT_LIMIT])
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value[:TEXT_LIMIT])


def move_alias(name: str, alias: str, version: str, *, expected: str | None) -> bool:
    """Points an alias to a version if it still points to `expected` (None: to nothing); whether it was moved.

    MLflow has no compare-and-swap: somebody who moves the alias in the moment between the two calls is overruled.
    """
    if version_with(name, alias) != expected:
        return False
    set_alias(name, alias, version)
    return True


def set_alias(name: str, alias: str, version: str) -> None:
    """Points an alias to a version, whatever it pointed to."""
    mlflow.MlflowClient().set_registered_model_alias(name, alias, version)
