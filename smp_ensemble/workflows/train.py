"""`train`: data to snapshots in MLflow."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smp_ensemble.architectures import create_network
from smp_ensemble.data.forms import load_data
from smp_ensemble.data.normalization import make_normalization
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.precision import choose_device, resolve_precision
from smp_ensemble.registry import nearest
from smp_ensemble.tracking import names
from smp_ensemble.tracking.report import draw_curves, draw_learning_rate, truth_for_overlay
from smp_ensemble.tracking.store import MlflowStore
from smp_ensemble.training.fit import FitOptions, fit
from smp_ensemble.training.previews import preview_indices
from smp_ensemble.training.trainers import describe, make_trainer
from smp_ensemble.typing import MODES
from smp_ensemble.workflows.results import Report

if TYPE_CHECKING:
    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.data.normalization import Normalization
    from smp_ensemble.typing import Mode, Snapshot, Trainer
    from smp_ensemble.workflows.options import DataOptions, TrainOptions


@dataclass(frozen=True)
class Training:
    """What a training left.

    Attributes:
        run_id: Its run.
        experiment: Name of its experiment.
        link: The address of its snapshots in the tracking UI.
        snapshots: In the order of their steps.
        splits: The data it was trained and scored on.
    """

    run_id: str
    experiment: str
    link: str
    snapshots: list[Snapshot]
    splits: DataSplits

    def report(self) -> Report:
        """The table of snapshots."""
        rows = [
            {
                "snapshot": snapshot.model_id,
                "epoch": int(snapshot.params["epoch"]),
                "step": snapshot.step,
                "val IoU": snapshot.metrics.get("val_iou"),
                "val loss": snapshot.metrics.get("val_loss"),
                "val ECE": snapshot.metrics.get("val_ece"),
            }
            for snapshot in self.snapshots
        ]
        values = {"run_id": self.run_id, "experiment": self.experiment, "link": self.link, "snapshots": rows}
        return Report(values, rows, [f"run {self.run_id} in experiment '{self.experiment}'", *pick_advice(self.link)])


def pick_advice(link: str) -> list[str]:
    """How to go on from snapshots to an ensemble."""
    return [
        f"see and pick snapshots (mlflow server, then): {link}",
        f"tick runs, add the tag {names.PICK}=NAME, then: mlflow run . -e ensemble -P pick=NAME",
    ]


def load_splits(options: DataOptions) -> DataSplits:
    """The data that options describe.

    Raises:
        ConfigError: Unknown mode.
        DataError: The data cannot be read as described.
    """
    return load_data(
        options.data,
        mask_column=options.mask_column,
        mode=as_mode(options.mode),
        holdout=options.holdout,
        folds=options.folds,
        fold=options.fold,
        split_seed=options.split_seed,
    )


def as_mode(mode: str | None) -> Mode | None:
    """A mode by name.

    Raises:
        ConfigError: Unknown mode.
    """
    for known in MODES:
        if mode == known:
            return known
    if mode is None:
        return None
    raise ConfigError(f"unknown mode '{mode}': {nearest(mode, MODES)}")


def normalization_for(kind: str, data: SegmentationDataset) -> Normalization:
    """A normalisation by name, from the training data's statistics."""
    found = data.statistics()
    return make_normalization(
        kind,
        data.task.in_channels,
        mean=found.mean.tolist(),
        std=found.std.tolist(),
        minimum=found.minimum.tolist(),
        maximum=found.maximum.tolist(),
    )


def _method(options: TrainOptions) -> Trainer:
    chosen = dict(options.trainer_options)
    if options.cycles is not None:
        chosen["cycles"] = options.cycles
    return make_trainer(options.trainer, chosen)


def train(options: TrainOptions) -> Training:
    """Trains by one method and leaves every snapshot in MLflow, scored.

    Raises:
        InputError: Something in the options or the data does not fit; nothing is tracked unless training had begun,
            and then the run is FAILED with the reason.
    """
    method = _method(options)
    method.schedule(options.epochs, 1)  # cycles that do not fit are an error before any data is read
    splits = load_splits(options)
    task = splits.task
    if options.in_channels not in {None, task.in_channels}:
        raise ConfigError(f"in-channels={options.in_channels}, but the images have {task.in_channels} bands")
    normalization = normalization_for(options.normalization, splits.train)
    torch.manual_seed(options.seed)
    network = create_network(
        options.arch,
        encoder_name=options.encoder_name,
        encoder_weights=options.encoder_weights,
        in_channels=task.in_channels,
        num_outputs=task.num_outputs,
        model_options=options.model_options,
    )
    previews = [splits.val.read(index) for index in preview_indices(splits.val)]
    store = MlflowStore(
        experiment=options.experiment,
        run_name=options.run_name,
        keep=options.keep,
        previews=[(image, truth_for_overlay(mask, task)) for image, mask in previews],
    )
    with store:
        params = {**configuration(options, method), "mode": task.mode}
        store.log_params({**params, **environment(options)})
        store.set_tags({names.SNAPSHOTS_LINK: store.link, names.NOTE: _note(store.link)})
        store.log_dataset(splits.train.reference(), "training")
        store.log_dataset(splits.val.reference(), "validation")
        snapshots = fit(
            network,
            splits.train,
            splits.val,
            trainer=method,
            epochs=options.epochs,
            normalization=normalization,
            store=store,
            options=fit_options(options),
            params=params,
        )
        _draw(store, method, options, snapshots)
    experiment = store.run.client.get_experiment(store.run.experiment_id).name
    return Training(store.run_id, experiment, store.link, snapshots, splits)


def fit_options(options: TrainOptions) -> FitOptions:
    """The part of the options that says how to train, whatever the method."""
    return FitOptions(**{known.name: getattr(options, known.name) for known in fields(FitOptions)})


def configuration(options: TrainOptions, method: Trainer) -> dict[str, Any]:
    """All options as params, with the method's own."""
    left_out = {"trainer_options", "cycles", "experiment", "run_name", "where", "pick", "register_as", "alias"}
    wanted = {known.name for known in fields(type(options))} - left_out
    found = {name: value for name, value in asdict(options).items() if name in wanted}
    return {**found, **describe(method)}


def environment(options: TrainOptions) -> dict[str, str]:
    """What the training ran on."""
    device = choose_device(options.accelerator)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "env/python": platform.python_version(),
        "env/torch": torch.__version__,
        "env/smp": version("segmentation-models-pytorch"),
        "env/smp_ensemble": version("smp-ensemble"),
        "env/device": f"{device.type} ({hardware}, {torch.get_num_threads()} threads)",
        "env/precision": resolve_precision(options.precision, device),
    }


def _note(link: str) -> str:
    return (
        f"[Snapshots of this experiment, sorted by validation IoU]({link})\n\n"
        f"Pick members: tick snapshot runs, add the tag `{names.PICK}=NAME`, then "
        "`mlflow run . -e ensemble -P pick=NAME`."
    )


def _draw(store: MlflowStore, method: Trainer, options: TrainOptions, snapshots: list[Snapshot]) -> None:
    steps_per_epoch = max(1, store.last_step // options.epochs)
    schedule = method.schedule(options.epochs, steps_per_epoch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scores = {one.step: one.metrics["val_iou"] for one in snapshots if "val_iou" in one.metrics}
        draw_learning_rate(
            schedule,
            options.lr,
            steps_per_epoch,
            folder / "learning_rate.png",
            title=f"{method.name}: {options.epochs} epochs, {len(schedule.snapshot_steps)} snapshots",
            scores=scores,
        )
        draw_curves(store.history, schedule.snapshot_steps, folder / "curves.png")
        for figure in sorted(folder.iterdir()):
            store.log_file(figure)
