"""From tracked snapshots to an ensemble in memory: load, verify, guard, combine, tune the threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.ensembling.selection import make_selector
from smp_ensemble.exceptions import ConfigError, NetworkError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.precision import choose_device
from smp_ensemble.tracking.flavor import load_model
from smp_ensemble.workflows.guards import check_fits, check_leaks, task_of
from smp_ensemble.workflows.scoring import Score, score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.typing import Snapshot, Task


@dataclass(frozen=True)
class Built:
    """An ensemble with where its members came from.

    Attributes:
        ensemble: With its threshold tuned on validation data.
        members: The tracked snapshots, in the members' order.
        validation: Scores of each member and, last, the ensemble, on validation data.
    """

    ensemble: Ensemble
    members: list[Snapshot]
    validation: list[Score]


def assemble(
    members: Sequence[Snapshot],
    splits: DataSplits,
    *,
    combiner: str = "mean",
    weights: Sequence[float] | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    accelerator: str = "auto",
) -> Built:
    """Loads and verifies members, guards against leaks, combines them, and tunes the threshold on validation data."""
    task = splits.task
    loaded = [load_snapshot(member.uri, task) for member in members]
    for what, data in (("validation", splits.val), ("test", splits.test)):
        if data is not None:
            check_leaks(loaded, data, what)
    combined = Ensemble(loaded, mode=task.mode, combiner=combiner, weights=weights, class_names=task.class_names)
    engine = Engine(combined, choose_device(accelerator), precision)
    validation = score(engine, splits.val, batch_size=batch_size, label="validation")
    combined.threshold = validation[-1].threshold
    return Built(combined, list(members), validation)


def load_snapshot(uri: str, task: Task) -> Member:
    """Loads and verifies one tracked snapshot.

    Raises:
        NetworkError: It is an ensemble of several, or does not fit the task.
        IntegrityError: A file is missing or changed.
    """
    ensemble = load_model(uri)
    if len(ensemble.members) != 1:
        raise NetworkError(
            f"{uri} is an ensemble of {len(ensemble.members)}, expected one snapshot: pick its members by id, or "
            "by the name it is registered under"
        )
    check_fits(uri, task_of(ensemble), task)
    (member,) = ensemble.members
    assert isinstance(member, Member)
    return member


def build_ensemble(
    snapshots: Sequence[Snapshot],
    *,
    data: DataSplits,
    selector: str = "top-k",
    max_members: int = 5,
    combiner: str = "mean",
    weights: Sequence[float] | None = None,
    precision: str = "auto",
) -> Ensemble:
    """Selects among tracked snapshots and combines them; the threshold is tuned on `data.val` in binary mode.

    Args:
        snapshots: Candidates, best first, as `search_snapshots` gives them.
        data: Its validation split tunes; no member may have been trained on its validation or test images.
        selector: Name in the entry-point group `smp_ensemble.selectors`.
        max_members: At most so many.
        combiner: Name in the entry-point group `smp_ensemble.combiners`.
        weights: One for each member, in the selector's order.
        precision: Lightning's words, or `auto`.

    Raises:
        ConfigError: No snapshots, or an unknown name.
        LeakError: A member was trained on validation or test images.
        NetworkError: Members do not fit each other or the data.
    """
    if not snapshots:
        raise ConfigError("expected at least one snapshot, got none: search_snapshots() lists what is tracked")
    members = make_selector(selector)(snapshots, max_members)
    return assemble(members, data, combiner=combiner, weights=weights, precision=precision).ensemble
