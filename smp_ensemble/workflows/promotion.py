"""Whether a new version takes an alias over: if it is better than the one that has it, on the same test data."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from smp_ensemble.ensembling import artifact
from smp_ensemble.ensembling.member import Member
from smp_ensemble.evaluation.guards import check_leaks, task_of
from smp_ensemble.evaluation.measuring import measure_all
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.exceptions import ConfigError, IntegrityError, LeakError, NetworkError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.metrics.bootstrap import paired_difference
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import load_model, local_folder
from smp_ensemble.tracking.versions import describe_version, move_alias, set_alias, version_with
from smp_ensemble.workflows.verdict import ALWAYS, Rule, Verdict, decide_promotion

if TYPE_CHECKING:
    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.evaluation.measurement import Measurement, ModelMeasurement
    from smp_ensemble.metrics.bootstrap import Difference
    from smp_ensemble.tracking.runs import TrackedRun
    from smp_ensemble.typing import Task
    from smp_ensemble.workflows.options import EnsembleOptions

CHALLENGER = "challenger"
"""The alias of the newest version that did not take over."""


@dataclass(frozen=True)
class Promotion:
    """What became of an alias.

    Attributes:
        name: Of the registered model.
        asked: The alias that was asked for.
        verdict: Whether the new version gets it, and why.
        version: The version that had the alias; None: none had.
        champion: What that version scores on the same test data; None: it was not measured.
        difference: Mean IoU of the new ensemble minus the champion's, over all pixels, rejected ones too.
        digest: Of the test data.
    """

    name: str
    asked: str
    verdict: Verdict
    version: str | None = None
    champion: ModelMeasurement | None = None
    difference: Difference | None = None
    digest: str = ""

    @property
    def alias(self) -> str | None:
        """The alias that the new version gets: the one asked for, or `challenger`."""
        if self.verdict.promote:
            return self.asked
        return CHALLENGER if self.asked != CHALLENGER else None

    @property
    def opponent(self) -> str:
        """`name/version` of the champion; empty if there is none."""
        return f"{self.name}/{self.version}" if self.version else ""

    def metrics(self) -> dict[str, float]:
        """The comparison's numbers, as the run keeps them; none if nothing was compared."""
        if self.champion is None or self.difference is None:
            return {}
        found = {
            "champion_test_iou": self.champion.score.metrics["iou"],
            "champion_difference": self.difference.estimate,
            "champion_difference_low": self.difference.low,
            "champion_difference_high": self.difference.high,
            "champion_difference_p": self.difference.p_value,
        }
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def tags(self) -> dict[str, str]:
        """What run and version say about the comparison."""
        tags = {names.PROMOTION: self.sentence()}
        if self.opponent:
            tags[names.CHAMPION] = self.opponent
        if self.digest:
            tags[f"{names.CHAMPION}.test_data"] = self.digest
        return tags

    def sentence(self) -> str:
        """What became of the alias, for people."""
        if self.verdict.promote:
            return f"{self.asked}: {self.verdict.reason}"
        where = f"{self.asked} stays with version {self.version}"
        return f"{where}{f', this version is {self.alias}' if self.alias else ''}: {self.verdict.reason}"

    def values(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "alias": self.alias,
            "promoted": self.verdict.promote,
            "reason": self.verdict.reason,
            "champion": self.opponent or None,
            "test_data": self.digest or None,
            **self.metrics(),
        }


def rule_of(options: EnsembleOptions) -> Rule:
    """The rule that options ask for.

    Raises:
        ConfigError: Out of range, or an alias without a registered model.
    """
    if options.alias and not options.register_as:
        raise ConfigError(f"alias={options.alias} needs a registered model: pass register-as=NAME too")
    return Rule(options.promote, options.min_gain, options.confidence)


def check_champion(options: EnsembleOptions, task: Task) -> None:
    """Refuses a name whose alias points to a model for another task, before anything is trained or measured.

    Raises:
        NetworkError: Names the difference.
        IntegrityError: What has the alias is no model of ours.
    """
    rule = rule_of(options)
    if not options.register_as or not options.alias or rule.promote == ALWAYS:
        return
    if version_with(options.register_as, options.alias) is not None:
        uri = f"models:/{options.register_as}@{options.alias}"
        _check_task(uri, artifact.read_spec(local_folder(uri)).task, task)


def _check_task(uri: str, found: Task, wanted: Task) -> None:
    for what in ("mode", "class_names", "in_channels"):
        if getattr(found, what) != getattr(wanted, what):
            raise NetworkError(
                f"{uri} has {what} {getattr(found, what)}, the data has {getattr(wanted, what)}: an alias does not "
                "change its task. Register under another name, or pass promote=always"
            )


def judge(
    options: EnsembleOptions, engine: Engine, data: SegmentationDataset | None, measurement: Measurement | None
) -> Promotion | None:
    """Compares a new ensemble with the version that has the alias; None where no alias was asked for.

    The champion predicts as it is served, with its own views, threshold and post-processing. Where one of the two
    rejects pixels, both are measured without rejection: leaving out hard pixels is no gain.

    Args:
        options: Name, alias and rule.
        engine: Of the new ensemble.
        data: Test data; None: there is none.
        measurement: Of the new ensemble on it.

    Raises:
        NetworkError: The champion is for another task.
    """
    if not options.register_as or not options.alias:
        return None
    rule = rule_of(options)
    name, alias = options.register_as, options.alias
    version = version_with(name, alias)
    if version is None:
        return Promotion(name, alias, Verdict(True, "no version had it before"))
    if rule.promote == ALWAYS:
        return Promotion(name, alias, Verdict(True, f"moved from version {version} unasked: promote=always"), version)
    if data is None or measurement is None:
        return Promotion(name, alias, Verdict(False, "there is no test data to compare them on"), version)
    uri = f"models:/{name}/{version}"
    try:
        champion = load_model(uri)
        _check_task(f"models:/{name}@{alias}", task_of(champion), data.task)
        check_leaks([one for one in champion.members if isinstance(one, Member)], data, "test")
    except (ConfigError, IntegrityError, LeakError) as error:
        return Promotion(name, alias, Verdict(False, f"version {version} cannot be compared: {error}"), version)
    rejects = bool(champion.reject or engine.ensemble.reject)
    other = _measured(Engine(champion, engine.device, engine.precision), data, options.batch_size)
    own = _measured(engine, data, options.batch_size) if rejects else measurement
    difference = paired_difference(
        own.ensemble.counts,
        other.ensemble.counts,
        groups=data.groups,
        resamples=rule.resamples,
        level=rule.confidence,
    )
    verdict = decide_promotion(difference, rule.min_gain, rule.confidence)
    return Promotion(name, alias, verdict, version, other.ensemble, difference, data.digest)


def _measured(engine: Engine, data: SegmentationDataset, batch_size: int) -> Measurement:
    """As it is served, but for rejection."""
    ensemble = copy.copy(engine.ensemble)  # the members are the same objects
    ensemble.reject = 0.0
    return measure_all(
        Predictions(engine.with_ensemble(ensemble), data, batch_size=batch_size, label="champion"), split="test"
    )


def carry_out(promotion: Promotion, run: TrackedRun, version: str, description: str) -> Promotion:
    """Keeps a comparison in the run and in the registered version, and moves the alias as the last step.

    Args:
        promotion: What was decided.
        run: Of the new ensemble.
        version: Of the new ensemble.
        description: Of the version, in Markdown; what became of the alias is put before it.

    Returns:
        What was done: the alias stays where somebody else moved it since the comparison.
    """
    run.log_metrics(promotion.metrics())
    _annotate(promotion, run, version, description)
    if promotion.verdict.promote and not move_alias(
        promotion.name, promotion.asked, version, expected=promotion.version
    ):
        present = version_with(promotion.name, promotion.asked)
        reason = f"since the comparison, {promotion.asked} was moved from version {promotion.version} to {present}"
        promotion = replace(promotion, verdict=Verdict(False, reason), version=present)
        _annotate(promotion, run, version, description)
    if not promotion.verdict.promote and promotion.alias is not None:
        set_alias(promotion.name, promotion.alias, version)
    return promotion


def _annotate(promotion: Promotion, run: TrackedRun, version: str, description: str) -> None:
    run.set_tags(promotion.tags())
    describe_version(promotion.name, version, f"{promotion.sentence()}\n\n{description}", promotion.tags())
