"""From tracked snapshots to an ensemble in memory: load, verify, guard, combine, tune the threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smp_ensemble.ensembling import artifact
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.selection import make_selector
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.precision import choose_device
from smp_ensemble.tracking.flavor import local_folder, verify_mlmodel
from smp_ensemble.workflows.guards import check_fits, check_leaks
from smp_ensemble.workflows.scoring import Score, score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.typing import Snapshot


@dataclass(frozen=True)
class Built:
    """An ensemble with where its members came from.

    Attributes:
        ensemble: With its threshold tuned on validation data.
        members: The tracked snapshots, in the members' order.
        training_images: Digests of each member's training images; None: unknown.
        validation: Scores of each member and, last, the ensemble, on validation data.
    """

    ensemble: Ensemble
    members: list[Snapshot]
    training_images: list[frozenset[str] | None]
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
    loaded, images = [], []
    for member in members:
        folder = local_folder(member.uri)
        verify_mlmodel(folder)
        spec = artifact.read_spec(folder)
        artifact.verify(spec, folder)
        check_fits(member.uri, spec.task, splits.task)
        loaded.append(artifact.load_member(folder, spec.members[0]))
        images += artifact.training_images(spec, folder)[:1]
    check_leaks(members, images, splits.val, "validation")
    if splits.test is not None:
        check_leaks(members, images, splits.test, "test")
    task = splits.task
    combined = Ensemble(loaded, mode=task.mode, combiner=combiner, weights=weights, class_names=task.class_names)
    engine = Engine(combined, choose_device(accelerator), precision)
    validation = score(engine, splits.val, batch_size=batch_size, label="validation")
    combined.threshold = validation[-1].threshold
    return Built(combined, list(members), images, validation)


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
