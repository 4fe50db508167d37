"""Tracked snapshots to search, select and load."""

from __future__ import annotations

import pytest

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.tracking.store import MlflowStore
from smp_ensemble.typing import SnapshotRecord


@pytest.fixture
def make_record(make_tiny_network, tiny_splits):
    """Makes snapshots with chosen scores."""

    def make(index: int = 1, *, iou: float = 0.5, step: int | None = None, splits=tiny_splits, **more):
        return SnapshotRecord(
            **{
                "network": make_tiny_network(seed=index, num_outputs=splits.task.num_outputs),
                "normalization": imagenet(),
                "task": splits.task,
                "step": 10 * index if step is None else step,
                "epoch": index,
                "index": index,
                "metrics": {"val_iou": iou, "val_loss": 1 - iou, "val_iou/building": iou},
                "params": {"trainer": "snapshot", "arch": "unet"},
                "dataset": splits.val.reference(),
                "training_images": splits.train.image_digests,
                **more,
            }
        )

    return make


@pytest.fixture
def track(tracking, make_record):
    """Tracks snapshots with the given scores in one training; returns their references."""

    def run(*ious: float, experiment: str | None = None, **more):
        with MlflowStore(experiment=experiment) as store:
            for index, iou in enumerate(ious, 1):
                store.save_snapshot(make_record(index, iou=iou, **more))
            return store.snapshots()

    return run
