"""What an ensemble was made of: links between it and its members in MLflow, and whether they are still the same."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlparse

import mlflow
from mlflow.entities import LoggedModelInput
from mlflow.exceptions import MlflowException

from smp_ensemble.ensembling import artifact
from smp_ensemble.ensembling.member import WEIGHTS_FILE
from smp_ensemble.exceptions import ConfigError, IntegrityError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import local_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from smp_ensemble.tracking.runs import TrackedRun
    from smp_ensemble.typing import Snapshot

TEXT_LIMIT = 5000
"""Longest description or tag, in characters: what a registry on MySQL or PostgreSQL keeps of a description."""

MARKING_TRIES = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemberLineage:
    """A member of a stored ensemble, compared with the snapshot that it came from.

    Attributes:
        source: `models:/m-...`; empty for a member that was never tracked.
        state: `unchanged`; `deleted`: the snapshot or its files are gone; `altered`: a file is another one now;
            `untracked`: there is nothing to compare with.
        file: The file that differs, if one does.
        expected: SHA-256 that it should have.
        found: What it has.
    """

    source: str
    state: Literal["unchanged", "deleted", "altered", "untracked"]
    file: str = ""
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        if self.state == "deleted":
            return f"{self.source}: deleted: {self.found}"
        if self.state == "altered":
            return f"{self.source}: altered: {self.file}: expected SHA-256 {self.expected}, found {self.found}"
        return f"{self.source or 'a member'}: {self.state}"


def members_table(members: Sequence[Snapshot], columns: Mapping[str, Sequence[float | None]]) -> str:
    """A table in Markdown, as MLflow shows it in notes and descriptions: each member with links to its model and run.

    Args:
        members: Tracked snapshots.
        columns: Headings, and a number for each member: weight, scores.
    """
    client = mlflow.MlflowClient()
    lines = [
        f"| member | run | step | {' | '.join(columns)} |",
        f"|---|---|---{'|---' * len(columns)}|",
    ]
    for index, member in enumerate(members):
        model, run = f"`{member.model_id[:12]}`", "-"
        try:
            info = client.get_run(member.run_id).info
        except MlflowException:
            pass  # a run that was purged: its snapshot is named all the same
        else:
            place = f"#/experiments/{info.experiment_id}"
            name = (info.run_name or info.run_id[:8]).replace("|", "/").replace("[", "(").replace("]", ")")
            model, run = f"[{model}]({place}/models/{member.model_id})", f"[{name}]({place}/runs/{member.run_id})"
        numbers = [_number(column[index]) for column in columns.values()]
        lines.append(f"| {model} | {run} | {member.step} | {' | '.join(numbers)} |")
    shown = len(lines)
    while sum(len(line) + 1 for line in lines[:shown]) > TEXT_LIMIT - 1500:
        shown -= 1
    if shown < len(lines):
        lines = [*lines[:shown], "", f"and {len(lines) - shown} more: the run's param `members` has all of them"]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def link_members(run: TrackedRun, model_id: str, members: Sequence[Snapshot], note: str) -> None:
    """Links an ensemble's run and its logged model to its members.

    The members become inputs of the run, which is what MLflow calls lineage; their ids stand in a tag of the logged
    model; the note is what both pages show as their description.

    Args:
        run: Of the ensemble.
        model_id: Of the ensemble.
        members: Tracked snapshots.
        note: In Markdown, such as `members_table`.
    """
    run.client.log_inputs(run.run_id, models=[LoggedModelInput(member.model_id) for member in members])
    run.set_tags({names.NOTE: note[:TEXT_LIMIT]})
    ids = ",".join(member.model_id for member in members)
    run.client.set_logged_model_tags(model_id, {names.NOTE: note[:TEXT_LIMIT], names.MEMBERS: ids[:TEXT_LIMIT]})


def mark_used(members: Sequence[Snapshot], label: str) -> None:
    """Adds an ensemble to the tag `smp_ensemble.used_by` of its members' runs; safe to repeat.

    MLflow cannot append to a tag, so it is read again after it was written, and written again if somebody else came
    between. A run that cannot be tagged is a warning: the ensemble is there and does not need the tag.

    Args:
        members: Tracked snapshots.
        label: The ensemble's registered name with its version, or its model id; without commas.
    """
    client = mlflow.MlflowClient()
    for run_id in dict.fromkeys(member.run_id for member in members if member.run_id):
        try:
            _append(client, run_id, label)
        except MlflowException as error:
            logger.warning("run %s is not marked as used by %s: %s", run_id, label, str(error).splitlines()[0])


def _append(client: mlflow.MlflowClient, run_id: str, label: str) -> None:
    for _ in range(MARKING_TRIES):
        present = client.get_run(run_id).data.tags.get(names.USED_BY, "")
        if label in present.split(","):
            return
        client.set_tag(run_id, names.USED_BY, appended(present, label))


def appended(present: str, label: str, limit: int = TEXT_LIMIT) -> str:
    """A comma-separated list with one more label, once; the oldest go where it would get too long.

    Example:
        >>> appended("a,b", "c"), appended("a,b", "a"), appended("a,b", "c", limit=3)
        ('a,b,c', 'a,b', 'b,c')
    """
    labels = [one for one in present.split(",") if one]
    if label not in labels:
        labels.append(label)
    while len(labels) > 1 and len(",".join(labels)) > limit:
        labels.pop(0)
    return ",".join(labels)


def lineage(uri: str, *, contents: bool | None = None) -> list[MemberLineage]:
    """Compares each member of a stored ensemble with the snapshot that it came from.

    An ensemble carries its members' weights: it works all the same where a snapshot is gone. What cannot be done
    without it is building another ensemble from it.

    Args:
        uri: Any model of ours.
        contents: Whether files are read and not only what `ensemble.json` says about them; None: where the snapshot's
            files are on a local disk, so that nothing large is downloaded.

    Raises:
        ConfigError: There is no such model.
        IntegrityError: Its `ensemble.json` cannot be read.
    """
    spec = artifact.read_spec(local_folder(uri))
    client = mlflow.MlflowClient()
    return [_compared(client, entry, contents) for entry in spec.members]


def verify_lineage(uri: str, *, contents: bool | None = None) -> list[str]:
    """What is wrong with the snapshots that a stored ensemble was made from, one line each; empty if nothing is.

    Args:
        uri: Any model of ours.
        contents: As in `lineage`.

    Raises:
        ConfigError: There is no such model.
        IntegrityError: Its `ensemble.json` cannot be read.
    """
    return [str(member) for member in lineage(uri, contents=contents) if member.state in {"deleted", "altered"}]


def registered_lineage(pick: str) -> list[MemberLineage]:
    """The same for a registered model by name, `name@alias` or `name/version`; empty if there is none of that name.

    Args:
        pick: As for candidates: what else it may be gives an empty list.
    """
    pick = pick.strip()
    if not pick or "," in pick or pick.removeprefix("models:/").startswith("m-"):
        return []
    try:
        return lineage(f"models:/{pick}" if "@" in pick or "/" in pick else f"models:/{pick}/latest")
    except (ConfigError, IntegrityError):
        return []


def _compared(client: mlflow.MlflowClient, entry: artifact.MemberEntry, contents: bool | None) -> MemberLineage:
    source = entry.source
    if not source.startswith("models:/m-"):
        return MemberLineage(source, "untracked")
    try:
        location = client.get_logged_model(source.removeprefix("models:/")).artifact_location
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return MemberLineage(source, "deleted", found=f"there is no such snapshot at {mlflow.get_tracking_uri()}")
    if contents is None:
        contents = urlparse(location).scheme in {"", "file"}
    try:
        folder = local_folder(source if contents else f"{location}/{artifact.ENSEMBLE_FILE}")
    except ConfigError:
        return MemberLineage(source, "deleted", found="its files are gone")
    folder = folder if contents else folder.parent
    if not (folder / artifact.ENSEMBLE_FILE).is_file():
        return MemberLineage(source, "deleted", found="its files are gone")
    for name, expected, found in _digests(entry, folder, contents):
        if found != expected:
            return MemberLineage(source, "altered", name, expected, found)
    return MemberLineage(source, "unchanged")


def _digests(entry: artifact.MemberEntry, folder: Path, contents: bool) -> Iterator[tuple[str, str, str]]:
    """Each of a snapshot's files: name, the SHA-256 that it should have, and what it has.

    A configuration may be written otherwise by another version of this package, so it is compared with the snapshot's
    own list only.
    """
    try:
        original = artifact.read_spec(folder).members[0]
    except (IntegrityError, IndexError):
        yield artifact.ENSEMBLE_FILE, "of a snapshot", "something else"
        return
    for name in (WEIGHTS_FILE, artifact.TRAINING_IMAGES_FILE):
        yield name, entry.sha256.get(name, "no file"), original.sha256.get(name, "no file")
    for name, expected in original.sha256.items() if contents else ():
        path = folder / original.folder / name
        yield name, expected, artifact.file_sha256(path) if path.is_file() else "no file"
