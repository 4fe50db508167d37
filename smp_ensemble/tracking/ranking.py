"""The best of many snapshots: exact, with memory for no more than are asked for.

The server can rank logged models (fast), and filter runs (fast), but not both at once, and each entity that it sends
takes time. So with a filter there are two ways: down the ranking, asking which models' runs match, or through the
matching runs, keeping the best. The first is fast where good snapshots match, the second where few match. Both go on in
turns, and the first to end has the answer: never more than about twice the faster way.
"""

from __future__ import annotations

import heapq
import logging
import math
from typing import TYPE_CHECKING

from smp_ensemble.tracking import names
from smp_ensemble.tracking.queries import (
    PAGE,
    among,
    find_runs,
    models_of,
    ranked_pages,
    run_pages,
    snapshots_where,
    usable,
)
from smp_ensemble.typing import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import mlflow
    from mlflow.entities import LoggedModel, Metric, Run

FIRST_PAGE = 100
TIES = 5000
"""How many models with the score of the last one are looked through for those that come first by id."""

logger = logging.getLogger(__name__)


def latest_metrics(model: LoggedModel, dataset_digest: str | None = None) -> dict[str, Metric]:
    """The last logged value of each metric, by the server's own rule; on one data set, where a digest is given."""
    found: dict[str, Metric] = {}
    for metric in model.metrics or []:
        if dataset_digest is not None and metric.dataset_digest != dataset_digest:
            continue
        known = found.get(metric.key)
        if known is None or (metric.timestamp, metric.step) > (known.timestamp, known.step):
            found[metric.key] = metric
    return found


def snapshot_of(model: LoggedModel, dataset_digest: str | None = None) -> Snapshot:
    """The reference to a logged model, with its scores (those on one data set, where a digest is given)."""
    return Snapshot(
        uri=f"models:/{model.model_id}",
        run_id=model.source_run_id or "",
        step=max((metric.step for metric in model.metrics or []), default=0),
        params=dict(model.params or {}),
        metrics={key: metric.value for key, metric in latest_metrics(model, dataset_digest).items()},
        tags=dict(model.tags or {}),
    )


class Best:
    """The best snapshots of those that pass by: by score, equal ones by id.

    Args:
        metric: Ranks them.
        limit: Keep so many; None: all.
        dataset_digest: Only scores measured on this data set count; None: any.
    """

    def __init__(self, metric: str, limit: int | None, dataset_digest: str | None) -> None:
        self.metric, self.limit, self.dataset_digest = metric, limit, dataset_digest
        self._sign = 1 if names.is_ascending(metric) else -1
        self._heap: list[tuple[float, _Reversed, LoggedModel]] = []  # the worst first
        self._held: set[str] = set()

    def __len__(self) -> int:
        return len(self._heap)

    def cost(self, model: LoggedModel) -> float | None:
        """The score with a sign that makes less better; None: it has none."""
        scored = latest_metrics(model, self.dataset_digest).get(self.metric)
        return None if scored is None or scored.value is None or math.isnan(scored.value) else self._sign * scored.value

    def offer(self, models: Iterable[LoggedModel]) -> None:
        """Keeps those that are among the best."""
        for model in models:
            cost = self.cost(model)
            if cost is None or model.model_id in self._held:
                continue
            heapq.heappush(self._heap, (-cost, _Reversed(model.model_id), model))
            self._held.add(model.model_id)
            if self.limit is not None and len(self._heap) > self.limit:
                self._held.discard(heapq.heappop(self._heap)[2].model_id)

    def beats(self, model: LoggedModel) -> bool:
        """Whether neither this model nor a worse one can be among the best any more."""
        cost = self.cost(model)
        if cost is None:  # the server ranks models without a score last
            return True
        return self.limit is not None and len(self._heap) == self.limit and cost > -self._heap[0][0]

    def models(self) -> list[LoggedModel]:
        """Best first."""
        return [model for _, _, model in sorted(self._heap, key=lambda entry: (-entry[0], entry[1].value))]


class _Reversed:
    """A string that sorts the other way round, for a heap whose first is the last."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __lt__(self, other: _Reversed) -> bool:
        return self.value > other.value


def best_models(
    client: mlflow.MlflowClient,
    experiment_ids: Sequence[str],
    where: str,
    *,
    metric: str,
    limit: int | None,
    dataset_digest: str | None,
) -> list[LoggedModel]:
    """The models of the best snapshots whose runs match, best first, equal ones by id.

    Raises:
        ConfigError: MLflow cannot read the filter.
    """
    ranked = _down_the_ranking(client, experiment_ids, where, Best(metric, limit, dataset_digest))
    if not where.strip():
        ways = [ranked]
    else:
        matching = _through_the_runs(client, experiment_ids, where, Best(metric, limit, dataset_digest))
        ways = [matching] if limit is None else [ranked, matching]
    while True:
        for way in ways:
            found = next(way)
            if found is not None:
                return found.models()


def _down_the_ranking(
    client: mlflow.MlflowClient, experiment_ids: Sequence[str], where: str, best: Best
) -> Iterator[Best | None]:
    """None after each page, and the best at the end; goes on until equal scores at the limit are complete."""
    size = min(PAGE, best.limit + 1) if best.limit and not where.strip() else FIRST_PAGE if best.limit else PAGE
    beyond = 0
    for page in ranked_pages(client, experiment_ids, best.metric, best.dataset_digest, size=size):
        full = best.limit is not None and len(best) == best.limit
        best.offer(_matching(client, experiment_ids, where, page, best))
        beyond += len(page) if full else 0
        if page and best.beats(page[-1]):
            break
        if beyond > TIES:
            logger.warning("more than %d snapshots have the same %s: some of them are left out", TIES, best.metric)
            break
        yield None
    yield best


def _through_the_runs(
    client: mlflow.MlflowClient, experiment_ids: Sequence[str], where: str, best: Best
) -> Iterator[Best | None]:
    size = FIRST_PAGE if best.limit else PAGE
    for page in run_pages(client, experiment_ids, snapshots_where(where), size=size):
        best.offer(_with_real_scores(models_of(client, page), page, best))
        yield None
    yield best


def _matching(
    client: mlflow.MlflowClient, experiment_ids: Sequence[str], where: str, page: Sequence[LoggedModel], best: Best
) -> list[LoggedModel]:
    """The models of a page whose runs match and have weights; a run is sent only if it has to be looked at."""
    models = [model for model in page if best.cost(model) is not None]
    if not models:
        return []
    inside = f"attributes.run_id IN {among(model.source_run_id or '' for model in models)}"
    if where.strip():
        runs = find_runs(client, experiment_ids, f"{snapshots_where(where)} AND {inside}")
        whole = {run.data.tags[names.MODEL_ID] for run in runs if usable(run)}
        return _with_real_scores([model for model in models if model.model_id in whole], runs, best)
    gone = {
        run.info.run_id
        for run in (
            *find_runs(client, experiment_ids, f"tags.`{names.PRUNED}` = 'true' AND {inside}"),
            *find_runs(client, experiment_ids, inside, deleted=True),
        )
    }
    models = [model for model in models if model.source_run_id not in gone]
    zero = [model.source_run_id or "" for model in models if best.cost(model) == 0]
    runs = find_runs(client, experiment_ids, f"attributes.run_id IN {among(zero)}") if zero else []
    return _with_real_scores(models, runs, best)


def _with_real_scores(models: Iterable[LoggedModel], runs: Iterable[Run], best: Best) -> list[LoggedModel]:
    """Without scores that are not a number: MLflow keeps these as such with runs, with models as 0, the best loss."""
    diverged = {run.info.run_id for run in runs if math.isnan(run.data.metrics.get(best.metric, 0.0))}
    return [model for model in models if model.source_run_id not in diverged or best.cost(model) != 0]
