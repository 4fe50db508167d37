"""`snapshots`: a table of candidates with their scores, and the link that opens them in the tracking UI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smp_ensemble.tracking.candidates import find_candidates, known_digest
from smp_ensemble.tracking.search import link_to
from smp_ensemble.workflows.results import Report
from smp_ensemble.workflows.train import pick_advice

if TYPE_CHECKING:
    from smp_ensemble.workflows.options import SnapshotsOptions


def snapshots(options: SnapshotsOptions) -> Report:
    """Lists tracked snapshots, best first.

    Raises:
        NothingFoundError: Nothing matches.
        ConfigError: MLflow cannot read the filter; or scores were measured on several data sets, and none is named.
    """
    digest = None
    if options.dataset:
        digest = known_digest(options.dataset, experiment=options.experiment, metric=options.metric)
    found = find_candidates(
        where=options.where,
        experiment=options.experiment,
        metric=options.metric,
        limit=options.limit,
        dataset_digest=digest,
    )
    rows = [
        {
            "snapshot": one.model_id,
            options.metric: one.metrics[options.metric],
            "trainer": one.params.get("trainer", ""),
            "arch": one.params.get("arch", ""),
            "encoder": one.params.get("encoder_name", ""),
            "epoch": one.params.get("epoch", ""),
            "run": one.run_id,
        }
        for one in found
    ]
    link = link_to(options.experiment, options.metric)
    return Report({"snapshots": rows, "link": link}, rows, pick_advice(link))
