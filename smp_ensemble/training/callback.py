"""The snapshot callback: sets the rate before each step, and keeps the weights after the epochs that a schedule names.

It uses public Lightning hooks only and never touches the trainer's loops, so it fits into anybody's own `Trainer`.

A method with an averager (SWA, EMA): at a snapshot point, validation runs on the average. Its weights, with batch-norm
statistics of their own, are put into the network when validation starts, and the training's are back, bit for bit,
before anything else happens.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from smp_ensemble.architectures import check_network, network_config
from smp_ensemble.exceptions import ConfigError, ScheduleError
from smp_ensemble.training.batch_norm import refresh_batch_norm
from smp_ensemble.training.networks import find_network, holding
from smp_ensemble.training.stores import open_default_store
from smp_ensemble.training.trainers import describe, make_trainer
from smp_ensemble.training.warmup import warmed_up
from smp_ensemble.typing import Resampling, SnapshotRecord, Task

if TYPE_CHECKING:
    import lightning.pytorch as pl
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from smp_ensemble.data.normalization import Normalization
    from smp_ensemble.typing import DatasetReference, Mode, Schedule, SnapshotStore, Trainer

logger = logging.getLogger(__name__)

PreviewFunction = Callable[["nn.Module"], Sequence["npt.NDArray[np.uint8]"]]
AVERAGE, REFRESHED = "average/", "refreshed/"
"""Before the names of scores, in the training's curves, that were measured for the average, or for the network with its
batch norm measured anew, and not for the network as training leaves it."""


class SnapshotCallback(Callback):
    """Runs a trainer's schedule in your own Lightning `Trainer` and hands its snapshots to a store.

    Your `configure_optimizers` returns an optimizer and no scheduler; each parameter group's own `lr` is its maximum.
    Validation must run at the end of each epoch with a snapshot, and log its scores as `val_*`.

    Args:
        trainer: Name of a training method, or the method itself.
        mode: `binary`, `multiclass` or `multilabel`.
        class_names: In the order of their ids; in binary mode background and foreground.
        normalization: What your data set does to images before they reach the network; it is saved with each snapshot.
        store: Where snapshots go; None: MLflow, as configured by its environment variables.
        network: Finds the network in the LightningModule; None: the one smp network in it.
        params: Further params to keep with each snapshot.
        dataset: What the scores are measured on.
        training_images: Digests of the training images, for the leak guard; None: unknown.
        previews: Predicts masks of the same few validation images from the network, at each snapshot.
        warmup_epochs: Epochs over which the rate climbs to the schedule's.
        refresh: Measures the batch-norm statistics of the network anew, for averaged weights, best on whole images if
            that is what is predicted; None: on the images of the trainer's own training batches, as they come. If it
            returns on what, that becomes the snapshot's param `batch_norm`.
        refresh_all: Whether that is done for every snapshot, and not for averages alone. Training goes on with the
            running statistics.
        resampling: Whether somebody draws training images as the method says, for methods that do (`boost`).

    Raises:
        ScheduleError: At the start of training when a scheduler is configured or validation would not run at a
            snapshot point; at a snapshot point when validation has not run for exactly these weights.
    """

    def __init__(
        self,
        trainer: str | Trainer = "snapshot",
        *,
        mode: Mode,
        class_names: Sequence[str],
        normalization: Normalization,
        store: SnapshotStore | None = None,
        network: Callable[[pl.LightningModule], nn.Module] | None = None,
        params: Mapping[str, Any] | None = None,
        dataset: DatasetReference | None = None,
        training_images: Sequence[str] | None = None,
        previews: PreviewFunction | None = None,
        warmup_epochs: float = 0.0,
        refresh: Callable[[nn.Module], str | None] | None = None,
        refresh_all: bool = False,
        resampling: bool = False,
    ) -> None:
        self.method = make_trainer(trainer) if isinstance(trainer, str) else trainer
        self.task = Task(mode, tuple(class_names), normalization.in_channels)
        self._owns_store = store is None
        self.store: SnapshotStore = store if store is not None else open_default_store()
        self._normalization = normalization
        self._find_network = network or find_network
        self._params = {**describe(self.method), **(params or {})}
        self._dataset = dataset
        self._training_images = training_images
        self._previews = previews
        self._warmup_epochs = warmup_epochs
        self._refresh = refresh
        self._refresh_all = refresh_all
        self._source: str | None = None
        self._resampling = resampling
        self._network: nn.Module | None = None
        self._averager = self.method.averager()
        self._kept: tuple[int, dict[str, Tensor]] | None = None
        self._holding = contextlib.ExitStack()
        self._schedule: Schedule | None = None
        self._steps_per_epoch = 1
        self._last_step = 0
        self._validated_step: int | None = None
        self._taken: list[int] = []

    def took(self, step: int) -> bool:
        """Whether a snapshot was taken after `step` completed steps."""
        return step in self._taken

    def network_of(self, module: pl.LightningModule) -> nn.Module:
        """The network whose snapshots are taken."""
        if self._network is None:  # looked for once: an average asks after every step
            self._network = self._find_network(module)
        return self._network

    def schedule_of(self, trainer: pl.Trainer) -> Schedule:
        """The method's schedule for this trainer's epochs and batches.

        Raises:
            ScheduleError: The trainer has no fixed number of epochs or batches.
        """
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        if not isinstance(batches, int) or epochs is None or epochs < 1:
            raise ScheduleError(
                f"a schedule needs a fixed length, got max_epochs={epochs} and {batches} batches in an epoch: "
                "set Trainer(max_epochs=...) and a data set with a length"
            )
        steps_per_epoch = -(-batches // trainer.accumulate_grad_batches)
        return warmed_up(self.method.schedule(epochs, steps_per_epoch), self._warmup_epochs, steps_per_epoch)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses set-ups in which the schedule or the scores could not be right."""
        if trainer.lr_scheduler_configs:
            names = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
            raise ScheduleError(
                f"the learning rate is set by SnapshotCallback ({self.method.name}), but {names} is configured too: "
                "return only the optimizer from configure_optimizers"
            )
        if len(trainer.optimizers) != 1:
            raise ScheduleError(f"expected one optimizer, got {len(trainer.optimizers)}: steps would be counted twice")
        if isinstance(self.method, Resampling) and not self._resampling:
            raise ScheduleError(
                f"'{self.method.name}' draws training images by their loss, which a callback alone cannot do: "
                "train with smp_ensemble.fit"
            )
        self._network = None
        network = self.network_of(pl_module)
        check_network(network)
        network_config(network)
        for group in trainer.optimizers[0].param_groups:
            group.setdefault("initial_lr", group["lr"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the schedule; refuses a snapshot point at which no validation would run."""
        self._schedule = schedule = self.schedule_of(trainer)
        self._steps_per_epoch = steps_per_epoch = schedule.total_steps // (trainer.max_epochs or 1)
        self._last_step = trainer.global_step
        every = trainer.check_val_every_n_epoch
        for step in schedule.snapshot_steps:
            epoch = step // steps_per_epoch
            if not trainer.enable_validation or every is None or epoch % every:
                raise ScheduleError(
                    f"a snapshot is due after epoch {epoch}, but no validation runs there "
                    f"(check_val_every_n_epoch={every}, validation {'on' if trainer.enable_validation else 'off'}): "
                    "pass validation data and check_val_every_n_epoch=1"
                )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets each group's rate for the step to come."""
        assert self._schedule is not None
        factor = self._schedule.factor(trainer.global_step)
        for group in trainer.optimizers[0].param_groups:
            rate = group["initial_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)  # capturable optimizers hold the rate on their device
            else:
                group["lr"] = rate

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each step: takes the weights into the average where they belong to it."""
        step = trainer.global_step
        if step == self._last_step:
            return  # gradients are still being accumulated
        self._last_step = step
        if step % self._steps_per_epoch == 0:
            # Lookahead is validated, averaged and kept at its slow weights.
            sync = getattr(trainer.optimizers[0], "sync_lookahead", None)
            if sync is not None:
                sync()
        if self._averager is not None and self._averager.is_due(step, trainer.max_epochs or 1, self._steps_per_epoch):
            self._averager.update(self.network_of(pl_module), step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets a snapshot's validation run on the weights that are kept, where these are not the training's own."""
        step = trainer.global_step
        if not (self._averager or self._refresh_all) or trainer.sanity_checking or self._schedule is None:
            return
        if not self._schedule.is_snapshot(step) or step in self._taken:
            return
        network = self.network_of(pl_module)
        kept = self._averager.weights() if self._averager else network.state_dict()
        self._holding.enter_context(holding(network, kept))
        if self._refresh is not None:
            self._source = self._refresh(network)
        else:
            refresh_batch_norm(network, trainer.train_dataloader or ())
        self._kept = step, {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the training's own weights back; remembers for which weights the scores were measured."""
        self._holding.close()
        if not trainer.sanity_checking:
            self._validated_step = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sends the epoch's curves, and the snapshot if one is due; validation has just run for these weights."""
        assert self._schedule is not None
        step = trainer.global_step
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        of_kept = self._kept is not None and self._kept[0] == step
        if trainer.is_global_zero:
            rate = self._schedule.factor(max(step - 1, 0)) * trainer.optimizers[0].param_groups[-1]["initial_lr"]
            prefix = REFRESHED if self._averager is None else AVERAGE
            curves = {
                f"{prefix}{name}" if of_kept and name.startswith("val_") else name: value
                for name, value in metrics.items()
            }
            self.store.log_metrics({**curves, "lr": rate, "epoch": trainer.current_epoch + 1}, step)
        stops_early = trainer.should_stop and not self._schedule.is_snapshot(step)
        if stops_early and self._averager is not None:
            logger.warning("training stops after step %d, before the average was due: no snapshot of it", step)
            return
        if step in self._taken or not (self._schedule.is_snapshot(step) or stops_early):
            return
        scores = {name: value for name, value in metrics.items() if name.startswith("val_")}
        if self._validated_step != step or not scores:
            raise ScheduleError(
                f"a snapshot is due after step {step}, but "
                + (
                    "validation logged nothing named val_*: log at least val_loss in validation_step"
                    if self._validated_step == step
                    else f"the last validation ran after step {self._validated_step}: validate at this epoch's end"
                )
            )
        self._taken.append(step)
        if trainer.is_global_zero:
            with contextlib.ExitStack() as stack:
                if of_kept and self._kept is not None:
                    stack.enter_context(holding(self.network_of(pl_module), self._kept[1]))
                self._hand_over(trainer, pl_module, step, scores)

    def _hand_over(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, scores: Mapping[str, float]
    ) -> None:
        network = self.network_of(pl_module)
        record = SnapshotRecord(
            network=network,
            normalization=self._normalization,
            task=self.task,
            step=step,
            epoch=trainer.current_epoch + 1,
            index=len(self._taken),
            metrics=scores,
            params={**self._params, **({"batch_norm": self._source} if self._source else {})},
            dataset=self._dataset,
            training_images=self._training_images,
            previews=self._previews(network) if self._previews else (),
        )
        self.store.save_snapshot(record)
        shown = ", ".join(f"{name} {scores[name]:.4f}" for name in ("val_iou", "val_loss") if name in scores)
        total = len(self._schedule.snapshot_steps) if self._schedule else 0
        logger.info("epoch %d: snapshot %d of %d, %s", record.epoch, record.index, total, shown)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the training's run, if the store was opened here."""
        if self._owns_store:
            self.store.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Puts the training's own weights back; ends its run as failed, if the store was opened here."""
        self._holding.close()
        if self._owns_store:
            self.store.close(f"{type(exception).__name__}: {exception}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the snapshots that were taken, and the average; all else follows from the steps."""
        average = {} if self._averager is None else {"average": self._averager.state_dict()}
        return {"taken": list(self._taken), **average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        taken = state_dict.get("taken", [])
        if not isinstance(taken, list):
            raise ConfigError(f"expected a list of steps in the checkpoint of SnapshotCallback, got {taken!r}")
        self._taken = [int(step) for step in taken]
        if self._averager is not None and "average" in state_dict:
            self._averager.load_state_dict(state_dict["average"])
