"""`soup`: tracked snapshots to one more snapshot whose weights are their average, batch norm refreshed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.evaluation.scoring import score
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.precision import choose_device, resolve_precision
from smp_ensemble.registry import nearest
from smp_ensemble.tracking import names
from smp_ensemble.tracking.search import first_experiment
from smp_ensemble.tracking.store import MlflowStore
from smp_ensemble.training.batch_norm import has_batch_norm
from smp_ensemble.training.choosing import make_measure
from smp_ensemble.training.optimizers import freeze_encoder
from smp_ensemble.training.refreshing import SOURCES
from smp_ensemble.training.soups import Soup, greedy_soup, uniform_soup
from smp_ensemble.typing import SnapshotRecord
from smp_ensemble.workflows.ingredients import SOUP, Ingredient, find_ingredients, share_encoder
from smp_ensemble.workflows.loading import load_snapshot
from smp_ensemble.workflows.results import Report
from smp_ensemble.workflows.starting import describe_network
from smp_ensemble.workflows.train import load_splits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.evaluation.measurement import Score
    from smp_ensemble.typing import Snapshot, Task
    from smp_ensemble.workflows.options import SoupOptions

LOGGED = ("selector", "metric", "batch_norm", "where", "pick", "data")
SELECTORS = {"greedy": greedy_soup, "uniform": uniform_soup}
MEASURED = ("iou", "dice", "ece", "nll", "brier")
MEASURED_BY_CLASS = ("iou", "dice")


def soup(options: SoupOptions) -> Report:
    """Averages the weights of snapshots of one architecture and tracks the average as a snapshot.

    Batch-norm statistics are measured anew on the training split before an average is scored; a single snapshot is
    scored as it is. Memory holds two models.

    Raises:
        ConfigError: Fewer than two candidates, an unknown selector or source of batch norm, or a metric that is not
            measured here.
        NothingFoundError: No candidates.
        LeakError: An ingredient was trained on validation or test images.
        NetworkError: Ingredients of different architectures or normalisations, or for other data.
    """
    if options.selector not in SELECTORS:
        raise ConfigError(f"unknown selector '{options.selector}' of soups: {nearest(options.selector, SELECTORS)}")
    if options.batch_norm not in SOURCES[1:]:
        raise ConfigError(f"unknown batch-norm '{options.batch_norm}': {nearest(options.batch_norm, SOURCES[1:])}")
    splits = load_splits(options)
    _check_metric(options.metric, splits.task)
    ingredients = find_ingredients(options, splits)  # all of them checked before anything is tracked
    candidates = [one.snapshot for one in ingredients]
    judge = _Judge(options, splits, frozen=share_encoder(ingredients))
    # `where` may span experiments; the soup's own run belongs to the first.
    experiment = first_experiment(options.experiment)
    with MlflowStore(experiment=experiment, run_name=options.run_name) as store:
        store.log_params(
            {
                "trainer": SOUP,
                **{
                    name: getattr(options, name)
                    for name in ("selector", "metric", "batch_norm", "where", "pick", "data")
                },
                "candidates": ",".join(one.model_id for one in candidates),
            }
        )
        store.log_dataset(splits.train.reference(), "training")
        store.log_dataset(splits.val.reference(), "validation")
        found = SELECTORS[options.selector](
            len(candidates), lambda index: load_snapshot(candidates[index].uri, splits.task), judge
        )
        store.save_snapshot(_record(found, ingredients, judge, options, splits))
        (snapshot,) = store.snapshots()
    return _report(found, candidates, snapshot, store, options)


def _check_metric(metric: str, task: Task) -> None:
    measured = [f"val_{name}" for name in MEASURED]
    measured += [f"val_{name}/{output}" for name in MEASURED_BY_CLASS for output in task.output_names]
    if metric not in measured:
        raise ConfigError(f"soups are not scored by the metric '{metric}': {nearest(metric, measured)}")


class _Judge:
    """Scores a member on validation data, after a refresh of its batch norm if it is an average.

    Args:
        options: Metric, batches, device and number format.
        splits: `train` is for batch norm, `val` for scores.
        frozen: Whether all ingredients have the same encoder, so that its statistics stay.

    Attributes:
        scores: By the indices of the ingredients that were averaged.
        sources: What batch norm was measured on, by the same; nothing where it was not.
    """

    def __init__(self, options: SoupOptions, splits: DataSplits, *, frozen: bool) -> None:
        self.scores: dict[tuple[int, ...], Score] = {}
        self.sources: dict[tuple[int, ...], str | None] = {}
        self._frozen = frozen
        self._options, self._splits = options, splits
        self._device = choose_device(options.accelerator)
        self._metric = options.metric.removeprefix("val_")

    def __call__(self, member: nn.Module, kept: tuple[int, ...]) -> float:
        """The score in the metric of the options, greater is better."""
        assert isinstance(member, Member)
        options, task = self._options, self._splits.task
        if self._frozen:
            freeze_encoder(member.network)
        if len(kept) > 1:
            self.sources[kept] = self._refresh(member.to(self._device), f"batch norm of {len(kept)}")
        engine = Engine(
            Ensemble([member], mode=task.mode, class_names=task.class_names), self._device, options.precision
        )
        found = score(
            engine,
            self._splits.val,
            batch_size=options.batch_size,
            label=f"soup of {len(kept)}",
        )
        self.scores[kept] = found[-1]
        value = found[-1].metrics[self._metric]
        return -value if names.is_ascending(options.metric) else value

    def _refresh(self, member: Member, label: str) -> str | None:
        options, normalization = self._options, member.normalization
        measure = make_measure(
            options.batch_norm,
            train_data=self._splits.train,
            val_data=self._splits.val,
            transform=TrainTransform(options.crop_size, fill=normalization.raw_mean(), augment=options.augment),
            label=label,
            normalization=normalization,
            batch_size=options.batch_size,
            precision=resolve_precision(options.precision, self._device),
        )
        chosen = measure(member.network)
        return chosen if options.batch_norm == "best" else options.batch_norm


def _record(
    found: Soup,
    ingredients: Sequence[Ingredient],
    judge: _Judge,
    options: SoupOptions,
    splits: DataSplits,
) -> SnapshotRecord:
    member = found.network
    assert isinstance(member, Member)
    kept = [ingredients[index].snapshot for index in found.kept]
    return SnapshotRecord(
        network=member.network,
        normalization=member.normalization,
        task=splits.task,
        step=max(one.step for one in kept),
        epoch=max(int(one.params.get("epoch") or 0) for one in kept),
        index=1,
        metrics={f"val_{name}": value for name, value in judge.scores[found.kept].metrics.items()},
        params={
            "trainer": SOUP,
            "selector": options.selector,
            "metric": options.metric,
            **({"batch_norm": source} if (source := judge.sources.get(found.kept)) else {}),
            "ingredients": ",".join(one.model_id for one in kept),
            **describe_network(member.network),
            "normalization": member.normalization.kind,
        },
        dataset=splits.val.reference(),
        training_images=_seen(found, ingredients, splits),
    )


def _seen(found: Soup, ingredients: Sequence[Ingredient], splits: DataSplits) -> list[str] | None:
    """Digests of all images that shaped the soup: its ingredients', and those that its batch norm was measured on."""
    seen: set[str] = set()
    for index in found.kept:
        images = ingredients[index].training_images
        if images is None:
            return None
        seen |= images
    if len(found.kept) > 1 and has_batch_norm(found.network):
        seen |= set(splits.train.image_digests)
    return sorted(seen)


def _report(
    found: Soup, candidates: Sequence[Snapshot], snapshot: Snapshot, store: MlflowStore, options: SoupOptions
) -> Report:
    sign = -1 if names.is_ascending(options.metric) else 1
    rows = [
        {
            "ingredient": f"{one.model_id} (step {one.step})",
            options.metric: one.metrics.get(options.metric),
            "soup with it": sign * trial if trial is not None and options.selector == "greedy" else None,
            "kept": "yes" if index in found.kept else "no",
        }
        for index, (one, trial) in enumerate(zip(candidates, found.trials, strict=True))
    ]
    last = {
        "ingredient": f"soup of {len(found.kept)}",
        options.metric: snapshot.metrics[options.metric],
        "soup with it": None,
        "kept": None,
    }
    notes = [f"snapshot {snapshot.model_id} in run {store.run_id}: {store.link}"]
    if len(found.kept) == 1:
        notes.insert(0, "no other ingredient left it as good: the soup is its first ingredient alone")
    notes.append(f'model = mlflow.pyfunc.load_model("{snapshot.uri}")')
    values = {
        "uri": snapshot.uri,
        "run_id": store.run_id,
        "link": store.link,
        "selector": options.selector,
        "metric": options.metric,
        "ingredients": [candidates[index].uri for index in found.kept],
        "candidates": [
            {"uri": one.uri, "score": row[options.metric], "soup": row["soup with it"], "kept": row["kept"] == "yes"}
            for one, row in zip(candidates, rows, strict=True)
        ],
        "val": dict(snapshot.metrics),
    }
    return Report(values, [*rows, last], notes)
