"""`import`: checkpoints that exist already become tracked snapshots, scored on the given data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.evaluation.scoring import score
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.precision import choose_device
from smp_ensemble.registry import nearest
from smp_ensemble.tracking.store import MlflowStore
from smp_ensemble.typing import SnapshotRecord
from smp_ensemble.workflows.checkpoints import find_checkpoints, load_checkpoint
from smp_ensemble.workflows.results import Report
from smp_ensemble.workflows.starting import describe_network, normalization_for
from smp_ensemble.workflows.train import load_splits, pick_advice

if TYPE_CHECKING:
    from smp_ensemble.workflows.options import ImportOptions


def import_checkpoints(options: ImportOptions) -> Report:
    """Scores checkpoints on validation data and tracks each as a snapshot.

    Raises:
        ConfigError: No such file.
        NetworkError: A checkpoint that does not fit the architecture; names the first differing tensor.
    """
    if options.trained_on not in {"train", "unknown"}:
        raise ConfigError(
            f"unknown trained-on '{options.trained_on}': {nearest(options.trained_on, ('train', 'unknown'))}"
        )
    files = find_checkpoints(options.files)
    splits = load_splits(options)
    task = splits.task
    normalization = normalization_for(options.normalization, splits.train)
    networks = [  # all, before anything is tracked
        load_checkpoint(
            path,
            task,
            arch=options.arch,
            encoder_name=options.encoder_name,
            model_options=options.model_options,
        )
        for path in files
    ]
    with MlflowStore(experiment=options.experiment, run_name=options.run_name) as store:
        store.log_params({"trainer": "import", "files": len(files), "data": options.data})
        store.log_dataset(splits.val.reference(), "validation")
        for index, (path, network) in enumerate(zip(files, networks, strict=True), 1):
            member = Ensemble([Member(network, normalization)], mode=task.mode)
            engine = Engine(member, choose_device(options.accelerator), options.precision)
            found = score(engine, splits.val, batch_size=options.batch_size, label=path.name)
            store.save_snapshot(
                SnapshotRecord(
                    network=network,
                    normalization=normalization,
                    task=task,
                    step=index,
                    epoch=0,
                    index=index,
                    metrics={f"val_{name}": value for name, value in found[-1].metrics.items()},
                    params={"trainer": "import", "file": path.name, **describe_network(network)},
                    dataset=splits.val.reference(),
                    training_images=splits.train.image_digests if options.trained_on == "train" else None,
                )
            )
        snapshots = store.snapshots()
    rows = [
        {"snapshot": one.model_id, "file": one.params["file"], "val IoU": one.metrics["val_iou"]} for one in snapshots
    ]
    return Report({"run_id": store.run_id, "snapshots": rows, "link": store.link}, rows, pick_advice(store.link))
