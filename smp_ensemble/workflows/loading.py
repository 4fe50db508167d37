"""Tracked snapshots as members: verified, fit for the data, and not trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smp_ensemble.ensembling import artifact
from smp_ensemble.ensembling.member import Member
from smp_ensemble.evaluation.guards import check_leaks, task_of
from smp_ensemble.exceptions import NetworkError
from smp_ensemble.tracking.flavor import load_model, local_folder
from smp_ensemble.tracking.verification import verify_mlmodel
from smp_ensemble.typing import Task
from smp_ensemble.workflows.guards import check_alike, check_fits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.ensembling.spec import MemberEntry
    from smp_ensemble.typing import Snapshot


@dataclass(frozen=True)
class StoredMember:
    """What the files of a tracked snapshot say of it, without its network.

    Attributes:
        source: Its address.
        task: What it predicts.
        entry: Its files and normalisation.
        training_images: Digests of the images it was trained on; None: unknown.
    """

    source: str
    task: Task
    entry: MemberEntry
    training_images: frozenset[str] | None


def load_members(members: Sequence[Snapshot], splits: DataSplits) -> list[Member]:
    """Loads and verifies tracked snapshots, none of which was trained on validation or test images.

    Raises:
        LeakError: One was.
        NetworkError: One is an ensemble of several, or does not fit the data.
        IntegrityError: A file is missing or changed.
    """
    loaded = [load_snapshot(member.uri, splits.task) for member in members]
    for what, data in (("validation", splits.val), ("test", splits.test)):
        if data is not None:
            check_leaks(loaded, data, what)
    return loaded


def load_snapshot(uri: str, task: Task) -> Member:
    """Loads and verifies one tracked snapshot.

    Raises:
        NetworkError: It is an ensemble of several, or does not fit the task.
        IntegrityError: A file is missing or changed.
    """
    ensemble = load_model(uri)
    _check_one(uri, len(ensemble.members))
    check_fits(uri, task_of(ensemble), task)
    (member,) = ensemble.members
    assert isinstance(member, Member)
    return member


def inspect_snapshots(snapshots: Sequence[Snapshot], splits: DataSplits) -> list[StoredMember]:
    """Verifies tracked snapshots from their files alone, before any network is built.

    Raises:
        LeakError: One was trained on validation or test images.
        NetworkError: One is an ensemble of several, two do not predict the same thing, or they do not fit the data.
        IntegrityError: A file is missing or changed.
    """
    found = [_inspect(snapshot.uri) for snapshot in snapshots]
    for one in found:
        check_alike(found[0].source, found[0].task, one.source, one.task)
    for one in found[:1]:
        check_fits(one.source, one.task, splits.task)
    for what, data in (("validation", splits.val), ("test", splits.test)):
        if data is not None:
            check_leaks(found, data, what)
    return found


def _inspect(uri: str) -> StoredMember:
    folder = local_folder(uri)
    verify_mlmodel(folder, uri)
    spec = artifact.read_spec(folder)
    artifact.verify(spec, folder)
    _check_one(uri, len(spec.members))
    (entry,) = spec.members
    images = artifact.read_training_images(folder, entry)
    return StoredMember(uri, Task(spec.mode, spec.class_names, spec.in_channels), entry, images)


def _check_one(uri: str, members: int) -> None:
    if members != 1:
        raise NetworkError(
            f"{uri} is an ensemble of {members}, expected one snapshot: pick its members by id, or "
            "by the name it is registered under"
        )
