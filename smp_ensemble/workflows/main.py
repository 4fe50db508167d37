"""`main`: the whole way, from data to a registered ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smp_ensemble.workflows.combining import combination_of
from smp_ensemble.workflows.ensemble import ensemble
from smp_ensemble.workflows.promotion import check_champion, rule_of
from smp_ensemble.workflows.results import Report
from smp_ensemble.workflows.selecting import selecting_of
from smp_ensemble.workflows.train import TrainResult, train

if TYPE_CHECKING:
    from smp_ensemble.typing import Task
    from smp_ensemble.workflows.ensemble_result import EnsembleResult
    from smp_ensemble.workflows.options import MainOptions


@dataclass(frozen=True)
class MainResult:
    """What was trained, and the ensemble of its snapshots."""

    training: TrainResult
    ensemble: EnsembleResult

    def report(self) -> Report:
        """The ensemble's table, and where to see the snapshots."""
        found = self.ensemble.report()
        values = {"training": self.training.report().values, "ensemble": found.values}
        notes = [*self.training.cross_validation(), f"snapshots in the tracking UI: {self.training.link}", *found.notes]
        return Report(values, found.rows, notes)


def main(options: MainOptions) -> MainResult:
    """Trains, then builds an ensemble from the new snapshots, or from what `where` or `pick` finds.

    All trainings of a plan are scored on one validation set, so their snapshots are ranked together.
    """
    combination = combination_of(options)  # what cannot be combined is found now, not after the training
    selecting_of(options)
    rule_of(options)

    def check(task: Task) -> None:
        combination.check_mode(task.mode)
        check_champion(options, task)

    training = train(options, check)
    asked = bool(options.where.strip() or options.pick.strip())
    ranked = sorted(training.snapshots, key=lambda snapshot: -snapshot.metrics.get("val_iou", float("-inf")))
    result = ensemble(
        options,
        snapshots=None if asked else ranked,
        splits=training.splits,
        parent_run_id=training.run_id,
    )
    return MainResult(training, result)
