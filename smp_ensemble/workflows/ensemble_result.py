"""What `ensemble` left, and how people are told: the table of members, the best single one and the ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smp_ensemble.tracking.pages import REPORT_FOLDER
from smp_ensemble.workflows.results import Report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.evaluation.adaptive_measuring import AdaptiveScore
    from smp_ensemble.evaluation.measurement import Measurement
    from smp_ensemble.evaluation.selection_figures import SelectionNumbers
    from smp_ensemble.typing import Snapshot
    from smp_ensemble.workflows.promotion import Promotion


@dataclass(frozen=True)
class EnsembleResult:
    """What `ensemble` left.

    Attributes:
        uri: `models:/m-...`, the logged model.
        run_id: Its run.
        registered: `name/version` where it was registered.
        alias: The one that the new version has: that which was asked for, or `challenger`; None: none.
        members: The tracked snapshots.
        ensemble: As it was logged.
        validation: What it and its members score on validation data, each with its own threshold and temperature.
        test: The same thresholds and temperatures on test data; None without test data.
        promotion: What became of the alias; None where none was asked for.
        selection: What a selector that looks at predictions saw; None with any other.
    """

    uri: str
    run_id: str
    registered: str | None
    alias: str | None
    members: list[Snapshot]
    ensemble: Ensemble
    validation: Measurement
    test: Measurement | None
    promotion: Promotion | None = None
    selection: SelectionNumbers | None = None

    @property
    def best_member(self) -> int:
        """The member with the best validation IoU: chosen without looking at test data."""
        return self.validation.best_member

    @property
    def load_uri(self) -> str:
        """The address under which people load it."""
        if self.registered is None:
            return self.uri
        name, _, registered_version = self.registered.rpartition("/")
        return f"models:/{name}@{self.alias}" if self.alias else f"models:/{name}/{registered_version}"

    def report(self) -> Report:
        """The table of members, the best single one and the ensemble."""
        labels = [
            label + (" best single" if index == self.best_member else "")
            for index, label in enumerate(labels_of(self.members))
        ]
        validation = self.validation.scores
        test = self.test.scores if self.test is not None else None
        weights = self.ensemble.weights
        rows = []
        for index, label in enumerate([*labels, "ensemble"]):
            found = validation[index]
            row = {
                "member": label,
                "weight": weights[index] if index < len(weights) and self.ensemble.combiner != "stacking" else None,
                "threshold": round(found.threshold, 3),
                "val IoU": found.metrics["iou"],
                "val ECE": found.metrics["ece"],
            }
            if test is not None:
                row |= {"test IoU": test[index].metrics["iou"], "test ECE": test[index].metrics["ece"]}
            if self.ensemble.reject:
                row["coverage"] = (test or validation)[index].metrics["coverage"]
            rows.append(row)
        rows += self._adaptive_row(rows[-1])
        promotion = self.promotion
        if promotion is not None and promotion.champion is not None:
            champion = promotion.champion
            row = {
                "member": f"{promotion.asked} {promotion.opponent}",
                "threshold": round(champion.score.threshold, 3),
                "test IoU": champion.score.metrics["iou"],
                "test ECE": champion.score.metrics["ece"],
                "coverage": champion.score.metrics["coverage"],
            }
            rows.append({heading: row.get(heading) for heading in rows[0]})
        values = {
            "uri": self.uri,
            "run_id": self.run_id,
            "registered": self.registered,
            "load": self.load_uri,
            "members": [member.uri for member in self.members],
            "weights": list(weights),
            "temperature": self.ensemble.temperature,
            "postprocess": self.ensemble.postprocess.to_dict(),
            "best_member": self.members[self.best_member].uri,
            "val": [one.metrics for one in validation],
            "test": [one.metrics for one in test] if test is not None else None,
            "thresholds": [one.threshold for one in validation],
            "selection": self.selection.to_dict() if self.selection is not None else None,
            "promotion": promotion.values() if promotion is not None else None,
            "adaptive": {split: score.to_dict() for split, score in self._adaptive_scores().items()},
        }
        notes = [
            f"report: {REPORT_FOLDER}/report.html in run {self.run_id}",
            f'model = mlflow.pyfunc.load_model("{self.load_uri}")',
        ]
        if promotion is not None:
            notes.insert(1, promotion.sentence())
        notes[1:1] = [
            f"adaptive on {split} data: {score.members:.2f} of {len(weights)} members on average, "
            f"{100 * score.agreement:.3f} % of pixels as with all (promised: {100 * (1 - score.tolerance):g} %)"
            for split, score in self._adaptive_scores().items()
        ]
        return Report(values, rows, notes)

    def _adaptive_scores(self) -> dict[str, AdaptiveScore]:
        """By split; empty without an adaptive rule."""
        both = {"val": self.validation, "test": self.test}
        return {split: one.adaptive for split, one in both.items() if one is not None and one.adaptive is not None}

    def _adaptive_row(self, whole: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The ensemble whose images skip members, below the one in which all run."""
        found = self._adaptive_scores()
        if not found:
            return []
        row = {"member": "ensemble, adaptive", "threshold": whole["threshold"]}
        row |= {f"{split} IoU": score.iou for split, score in found.items()}
        return [{heading: row.get(heading) for heading in whole}]


def labels_of(members: Sequence[Snapshot]) -> list[str]:
    """What people call each member: the start of its id, and where in which training it was taken."""
    return [f"{member.model_id[:12]} ({_place(member, members)})" for member in members]


def _place(member: Snapshot, members: Sequence[Snapshot]) -> str:
    """Where in its training a member was taken, and what tells that training from the others."""
    fold = "bootstrap " if member.params.get("bootstrap") else "fold "
    parts = [
        f"{word}{member.params.get(param)}, "
        for word, param in (("", "arch"), ("", "encoder_name"), ("", "trainer"), (fold, "fold"), ("seed ", "seed"))
        if len({one.params.get(param) for one in members}) > 1
    ]
    return f"{''.join(parts)}step {member.step}"
